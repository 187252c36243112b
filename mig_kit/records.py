"""The one record that flows through all stages: a question about several images, and what would answer it."""

from dataclasses import dataclass

from PIL import Image

from mig_kit.frames import Box, iou


@dataclass(frozen=True)
class Sample:
    """One question.

    images: in prompt order, RGB. question: "{ref}" stands for the reference box. reference: xyxy pixels of the original
    first image, or None. targets: the acceptable (image number from 1, box) pairs, boxes xyxy pixels of that original
    image; empty when nothing in the images answers. options and letter: a multiple-choice question's, else empty.
    notes and finding: the scene graph's account of the way to the answer, for the tiny profile's teacher.
    """

    id: str
    suite: str
    task: str
    split: str
    images: tuple[Image.Image, ...]
    question: str
    targets: tuple[tuple[int, Box], ...] = ()
    reference: Box | None = None
    options: tuple[str, ...] = ()
    letter: str = ""
    notes: tuple[str, ...] = ()
    finding: str = ""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every original image, pixels."""
        return [image.size for image in self.images]


def best_iou(sample: Sample, image: int, box: Box) -> float:
    """Highest IoU of a box (xyxy, original pixels of image number `image`) with the targets in that image; else 0."""
    return max((iou(box, target) for number, target in sample.targets if number == image), default=0.0)


def to_row(sample: Sample) -> dict:
    """The sample as a plain row of a `datasets` table; images stay PIL images."""
    return {
        "id": sample.id, "suite": sample.suite, "task": sample.task, "split": sample.split,
        "images": list(sample.images), "question": sample.question,
        "target_images": [number for number, _ in sample.targets],
        "target_boxes": [list(box) for _, box in sample.targets],
        "reference": list(sample.reference) if sample.reference else [],
        "options": list(sample.options), "letter": sample.letter, "notes": list(sample.notes), "finding": sample.finding,
    }


def from_row(row: dict) -> Sample:
    """The sample a row was made from; extra columns are ignored."""
    return Sample(
        id=row["id"], suite=row["suite"], task=row["task"], split=row["split"], images=tuple(row["images"]),
        question=row["question"],
        targets=tuple((int(n), tuple(b)) for n, b in zip(row["target_images"], row["target_boxes"])),
        reference=tuple(row["reference"]) if row["reference"] else None, options=tuple(row["options"]),
        letter=row["letter"], notes=tuple(row["notes"]), finding=row["finding"])
