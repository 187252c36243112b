"""Drawn general questions, and those for all boxes: as many as their kind says."""

import random
from collections import Counter

import pytest
from notes import names_in_note

from mig_kit.boxes import BoxFormat
from mig_kit.filters import drop_reason
from mig_kit.prompts import LETTERS, is_well_formed, parse_boxes
from mig_kit.rewards import is_correct
from mig_kit.world import teacher
from mig_kit.world.free_form import FIND_ALL
from mig_kit.world.suites import iter_free_form, make_suite

BOX_FORMAT = BoxFormat()


@pytest.fixture(scope="module")
def samples():
    return list(make_suite("find_all", "cot", 60))


def test_kinds_and_their_boxes(samples):
    numbers = {task: {len(sample.targets) for sample in samples if sample.task == task}
               for task in FIND_ALL}
    assert numbers == {"in_none": {0}, "in_one": {1}, "in_several": {2, 3}}
    for sample in samples:
        assert 2 <= len(sample.images) <= 3 and sample.find_all and sample.split == "cot"
        images = [target.image for target in sample.targets]
        assert images == sorted(set(images)) and set(images) <= {1, 2, 3}
    assert [s.id for s in make_suite("find_all", "cot", 2)] == [
        f"find_all/{task}/cot/{index}" for task in FIND_ALL for index in range(2)]


def test_traces_are_correct_but_for_the_error_that_they_name(samples):
    errors = set()
    for number, sample in enumerate(samples * 3):
        trace = teacher.write_trace(sample, random.Random(number), BOX_FORMAT, error_rate=0.5)
        errors.add((bool(sample.targets), trace.error))
        assert is_well_formed(trace.text, sample) == (trace.error != "broken format")
        if not trace.error:
            assert is_correct(trace.text, sample, BOX_FORMAT), trace
            assert drop_reason(trace.text, sample, BOX_FORMAT) == ""
            assert len(parse_boxes(trace.text)) == len(sample.targets)
        elif trace.error in ("wrong image", "wrong object"):
            assert not is_correct(trace.text, sample, BOX_FORMAT), trace
        elif trace.error == "leaked answer":
            assert drop_reason(trace.text, sample, BOX_FORMAT) == "leak"
    assert errors == {(False, error) for error in ("", *teacher.ERRORS)
                      if error != "leaked answer"} | {(True, error)
                                                      for error in ("", *teacher.ERRORS)}


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
