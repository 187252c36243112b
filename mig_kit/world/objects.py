"""The objects of a drawn sample, to tell a loose box from a box around another object."""

from mig_kit.boxes import Box, iou
from mig_kit.sample import Sample
from mig_kit.world.suites import SUITES


def is_drawn(sample: Sample) -> bool:
    """Whether the sample is of a suite that this world draws."""
    return sample.suite in SUITES


def list_object_boxes(sample: Sample, seed: int) -> list[list[Box]]:
    """The boxes of all objects, per image; seed: the one that the sample was drawn with.

    If the question asks for a part of an image, the part counts as an object. Raises ValueError for
    a sample that is not drawn, and for another seed.
    """
    if not is_drawn(sample):
        raise ValueError(f"{sample.id} is not drawn; only drawn samples know their objects")
    index = int(sample.id.rpartition("/")[2])
    spec = SUITES[sample.suite].tasks[sample.task](sample.split, index, seed)
    boxes = [[obj.box for obj in scene.objects] for scene in spec.scenes]
    for number, name in spec.answers:
        box = spec.box or spec.scenes[number - 1].find(name).box
        if (number, box) not in sample.targets:
            raise ValueError(f"{sample.id} was not drawn with seed {seed}")
        if spec.box:
            boxes[number - 1].append(box)
    return boxes


def is_on_target(box: Box, target: Box, objects: list[Box]) -> bool:
    """Whether the box overlaps the target, and no other object more (by IoU)."""
    overlap = iou(box, target)
    return overlap > 0 and overlap >= max((iou(box, other) for other in objects), default=0.0)
