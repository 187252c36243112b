"""The rule-based teacher: its details are recognised, and its errors are the ones it names."""

import random

import numpy as np
import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import parse_reply, read_reply
from mig_kit.rewards import reply_iou
from mig_kit.world import teacher
from mig_kit.world.free_form import FREE_FORM
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import TASKS, make_sample

TRAINING_KINDS = [*TASKS, *FREE_FORM]


@pytest.fixture(scope="module")
def samples_by_kind():
    tasks = [make_sample(task, "cot", 2) for task in TASKS]
    return {sample.task: sample for sample in [*tasks, *iter_free_form("cot", 1)]}


@pytest.mark.parametrize("reply", [
    '<answer>{"image": 2, "box": [12,30,26,44]}</answer>', "<answer>A</answer>",
    '<think>Find. red star: image 2. things: 3.<answer>{"image": 2, "box": [1,2,3,4]}</answer>'])
def test_a_reply_without_reasoning_has_no_detail(reply):
    assert teacher.recognize_detail(parse_reply(reply)) == "none"


@pytest.mark.parametrize("kind", TRAINING_KINDS)
@pytest.mark.parametrize("detail", teacher.DETAILS)
def test_the_detail_of_a_trace_is_recognised(kind, detail, samples_by_kind):
    thinking = teacher.write_reasoning(samples_by_kind[kind], detail)
    reply = f"<think>{thinking}</think><answer>a: b: c</answer>"
    assert teacher.recognize_detail(parse_reply(reply)) == detail


@pytest.mark.parametrize("kind", TRAINING_KINDS)
def test_a_trace_has_the_error_that_it_names(kind, samples_by_kind):
    sample, box_format = samples_by_kind[kind], BoxFormat()
    for seed in range(40):
        trace = teacher.write_trace(sample, random.Random(seed), box_format, error_rate=0.5)
        reply = read_reply(trace.text, sample, box_format)
        assert reply.well_formed == (trace.error != "broken format")
        if sample.options:
            is_right_letter = reply.letter == sample.letter
            assert is_right_letter == (trace.error != "wrong choice") or not reply.well_formed
        elif trace.error == "wrong image":
            assert reply.image not in {sample.targets[0].image, None}
        elif not trace.error:
            assert reply_iou(reply, sample) > 0.5


def test_errors_are_as_large_in_0_to_1000_as_in_pixels(samples_by_kind):
    """Of the image as the model sees it; else the filter would keep what it should drop."""
    sample, errors = samples_by_kind["diff"], set()
    for seed in range(60):
        traces, boxes = [], []
        for box_format in (BoxFormat(), BoxFormat(coordinates="normalized_1000")):
            traces.append(teacher.write_trace(sample, random.Random(seed), box_format,
                                              error_rate=0.7))
            boxes.append(read_reply(traces[-1].text, sample, box_format).box)
        assert traces[0].error == traces[1].error
        if all(boxes):
            errors.add(traces[0].error)
            assert np.abs(np.subtract(*boxes)).max() < 1.5, "but for rounding"
    assert errors >= {"", "wrong object", "sloppy box"}
