"""Drawn questions for all boxes: as many as the kind says, told by the images alone."""

import random

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.filters import drop_reason
from mig_kit.prompts import is_well_formed, parse_boxes
from mig_kit.rewards import is_correct
from mig_kit.world import teacher
from mig_kit.world.free_form import FIND_ALL
from mig_kit.world.suites import make_suite

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
