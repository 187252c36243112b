"""The objects of drawn samples, drawn again from their ids."""

from dataclasses import replace

import pytest

from mig_kit.world import objects
from mig_kit.world.suites import SUITES, make_suite

SAMPLES = [sample for suite in SUITES for sample in make_suite(suite, "test", 3, 14)]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_every_target_is_an_object_of_its_image(sample):
    boxes = objects.list_object_boxes(sample, 14)
    assert len(boxes) == len(sample.images) and all(boxes)
    assert all(target.box in boxes[target.image - 1] for target in sample.targets)
    for image_boxes, (width, height) in zip(boxes, sample.sizes):
        assert all(x2 <= width + 1 and y2 <= height + 1 for _, _, x2, y2 in image_boxes)


def test_another_seed_and_own_data_are_refused():
    with pytest.raises(ValueError, match="not drawn with seed 3"):
        objects.list_object_boxes(SAMPLES[0], 3)
    with pytest.raises(ValueError, match="is not drawn"):
        objects.list_object_boxes(replace(SAMPLES[0], suite="own"), 14)


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 10, 5), True),  # IoU 0.5 with the target
    ((8, 0, 18, 10), False),  # 0.11 with the target, 0.67 with its neighbour
    ((0, 8, 10, 18), True),  # 0.11, and no other object
    ((50, 50, 60, 60), False)])  # on nothing
def test_whose_object_a_box_is_on(box, expected):
    target, neighbour = (0, 0, 10, 10), (10, 0, 20, 10)
    assert objects.is_on_target(box, target, [target, neighbour]) is expected
