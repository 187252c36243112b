"""The suites and the training mix: ids, options and boxes are sound."""

from collections import Counter

import pytest

from mig_kit.prompts import LETTERS
from mig_kit.world import suites
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.tasks import TASKS, make_sample


def assert_sound(*samples):
    """Options differ, and a target is an object of its image, as all that may be pointed at are."""
    for sample in samples:
        if sample.options:
            assert len(set(sample.options)) == len(sample.options) > LETTERS.index(sample.letter)
        boxes = suites.list_object_boxes(sample.spec)
        assert len(boxes) == len(sample.images) and all(boxes), sample.id
        assert all(target.box in boxes[target.image - 1] for target in sample.targets), sample.id
        for image_boxes, (width, height) in zip(boxes, sample.sizes):
            assert all(x1 < x2 <= width + 1 and y1 < y2 <= height + 1
                       for x1, y1, x2, y2 in image_boxes)
        for target in sample.targets:
            width, height = sample.sizes[target.image - 1]
            x1, y1, x2, y2 = target.box
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@pytest.mark.parametrize("suite", suites.SUITES)
def test_suites(suite):
    samples = suites.make_suite(suite, "test", 10)
    assert_sound(*samples)
    tasks = list(suites.SUITES[suite].tasks)
    assert list(dict.fromkeys(sample.task for sample in samples)) == tasks
    assert set(Counter(sample.task for sample in samples).values()) == {10}
    assert len({sample.id for sample in samples}) == len(samples)
    assert all(sample.id.startswith(f"{suite}/{sample.task}/test/") for sample in samples)


@pytest.mark.parametrize("make, arguments, sentence", [
    (suites.make_suite, ("coco", "test", 1), "no suite 'coco'; the suites are mig_bench, "),
    (make_sample, ("maze", "val", 0), "no task 'maze'; the tasks are diff, "),
    (make_sample, ("diff", "dev", 0), "no split 'dev'; the splits are base, cot, ")])
def test_an_unknown_name_is_one_sentence(make, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        make(*arguments)


def test_the_training_mix_counts_boxes_apart():
    samples = list(suites.iter_training_mix("rl", 2, 3, 0, 1))
    counts = Counter(sample.task for sample in samples)
    expected = {task: 2 for task in TASKS} | {
        kind: 1 if kind in BOX_FORMS else 3 for kind in FREE_FORM}
    assert counts == expected
    assert_sound(*samples)
    for sample in samples:
        assert bool(sample.options) == (sample.task in set(FREE_FORM) - {*BOX_FORMS})


def test_objects_of_every_second_candidate_are_small():
    drawn = suites.iter_training_mix("rl", 4, 2, 0, worlds=suites.CANDIDATE_WORLDS)
    sides = {True: [], False: []}
    for sample in drawn:
        # refer_grounding shows its object large, region asks for a cut-out
        if sample.targets and sample.task not in ("region", "multi_view", "view_diff"):
            x1, y1, x2, y2 = sample.targets[0].box
            is_small = int(sample.id.rpartition("/")[2]) % 2 == 1
            sides[is_small].append(max(x2 - x1, y2 - y1))
    assert max(sides[True]) <= 13 and min(sides[False]) >= 13


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 10, 5), True),  # IoU 0.5 with the target
    ((8, 0, 18, 10), False),  # 0.11 with the target, 0.67 with its neighbour
    ((0, 8, 10, 18), True),  # 0.11, and no other object
    ((50, 50, 60, 60), False)])  # on nothing
def test_whose_object_a_box_is_on(box, expected):
    target, neighbour = (0, 0, 10, 10), (10, 0, 20, 10)
    assert suites.is_on_target(box, target, [target, neighbour]) is expected
