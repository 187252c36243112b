"""Drawn general questions."""

from collections import Counter

import pytest
from notes import names_in_note

from mig_kit.prompts import LETTERS
from mig_kit.world.suites import iter_free_form


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
