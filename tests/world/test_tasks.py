"""Tasks and general questions: samples on their own, disjoint splits, and what questions mean."""

import random
from collections import Counter

import numpy as np
import pytest

from mig_kit.prompts import LETTERS
from mig_kit.world import tasks
from mig_kit.world.scenes import Appearance, Object, Scene
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import SPLITS, TASKS, make_sample


def names_in_note(note: str) -> list[str]:
    """The names in a note of the teacher's that lists an image; any other counts as one name."""
    return note.partition(": ")[2].removesuffix(".").split(", ")


def image_bytes(sample):
    return b"".join(image.tobytes() for image in sample.images)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_needs_no_other(task):
    alone = make_sample(task, "rl", 7)
    for index in (3, 9):
        make_sample(task, "rl", index)
    again = make_sample(task, "rl", 7)
    assert (alone.question, alone.targets) == (again.question, again.targets)
    assert image_bytes(alone) == image_bytes(again)


def test_splits_cannot_overlap():
    """Across splits and across seeds: a sample's content decides which split owns it."""
    owners: dict[bytes, str] = {}
    for split in SPLITS:
        for seed in (0, 1):
            for task in TASKS:
                for index in range(3):
                    content = image_bytes(make_sample(task, split, index, seed))
                    assert owners.setdefault(content, split) == split


@pytest.mark.parametrize("index", range(30))
def test_only_the_target_of_diff_differs(index):
    sample = make_sample("diff", "val", index)
    change = np.asarray(sample.images[0], int) - np.asarray(sample.images[1], int)
    rows, columns = np.where((change != 0).any(-1))
    x1, y1, x2, y2 = sample.targets[0].box
    assert columns.min() >= x1 - 1 and columns.max() < x2 + 1
    assert rows.min() >= y1 - 1 and rows.max() < y2 + 1


@pytest.mark.parametrize("index", range(30))
def test_only_the_common_object_is_in_all_images(index):
    sample = make_sample("common_object", "val", index)
    common = set.intersection(*(set(names_in_note(note)) for note in sample.notes))
    assert 3 <= len(sample.images) == len(sample.notes) <= 5
    assert sample.finding == f"in all: {common.pop()}." and not common


def test_extremes_by_hand():
    small = Object("red", "star", "plain", (2.0, 2.0, 16.0, 16.0))
    large = Object("blue", "ring", "plain", (40.0, 3.0, 66.0, 23.0))
    scene = Scene(84, 84, (small, large))
    assert tasks.find_extreme(scene, "leftmost") is tasks.find_extreme(scene, "smallest") is small
    assert tasks.find_extreme(scene, "rightmost") is tasks.find_extreme(scene, "largest") is large
    assert tasks.find_extreme(scene, "top") is None, "it leads by less than 5 pixels"


@pytest.mark.parametrize("attribute", [0, 1])
def test_only_the_first_matches(attribute):
    rng, appearance = random.Random(0), Appearance("red", "star", "plain")
    for _ in range(50):
        match, *others = tasks.pick_match_and_others(rng, appearance, attribute, 4)
        assert match[attribute] == appearance[attribute] and match[:2] != appearance[:2]
        assert all(other[attribute] != appearance[attribute] for other in others)


@pytest.fixture(scope="module")
def questions():
    by_kind = {}
    for sample in iter_free_form("cot", 60):
        by_kind.setdefault(sample.task, []).append(sample)
    return by_kind


def test_a_choice_has_two_options_or_three_and_no_letter_is_rare(questions):
    for kind in ("naming", "sharing", "tallying"):
        counts = Counter(len(sample.options) for sample in questions[kind])
        assert set(counts) == {2, 3} and min(counts.values()) >= 15, kind
        letters = Counter(sample.letter for sample in questions[kind])
        assert letters["A"] >= 10 and letters["B"] >= 10 and letters["C"] >= 3, kind


def test_an_images_letter_is_its_place_among_the_options(questions):
    moved = 0
    for sample in questions["showing"]:
        chosen = sample.options[LETTERS.index(sample.letter)]
        assert sample.finding.endswith(f": {chosen}.") and len(sample.options) >= 2
        moved += chosen != f"image {LETTERS.index(sample.letter) + 1}"
    assert moved >= 10


def test_an_exception_is_in_its_image_alone(questions):
    for sample in questions["excepting"]:
        target, = sample.targets
        name = sample.finding.removeprefix("new: ").removesuffix(".")
        shown = [names_in_note(note) for note in sample.notes]
        assert [number for number, names in enumerate(shown, 1) if name in names] == [target.image]
        others = {other for names in shown[:target.image - 1] + shown[target.image:]
                  for other in names}
        assert set(shown[target.image - 1]) - others == {name}, "one thing is in image k only"


def test_a_tally_is_what_the_note_lists(questions):
    asked = Counter()
    for sample in questions["tallying"]:
        names = names_in_note(sample.notes[0])
        is_striped = sample.question.endswith("are striped?")
        asked[is_striped] += 1
        total = sum(name.startswith("striped ") for name in names) if is_striped else len(names)
        assert sample.options[LETTERS.index(sample.letter)] == str(total)
    assert min(asked.values()) >= 15
