"""Rewards by hand."""

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.rewards import box_reward, choice_reward, cites_only_existing_images, format_reward, image_reward, is_correct
from mig_kit.world.suites import make_free_form
from mig_kit.world.tasks import make_sample


@pytest.fixture
def sample():
    """A sample whose target lies in image 2, at its own size."""
    return next(s for s in (make_sample("diff", "val", i) for i in range(50)) if s.sizes[1] == (84, 84))


def reply(image, box):
    return f'<think>Compare.</think><answer>{{"image": {image}, "box": {list(map(int, box))}}}</answer>'


def test_right(sample):
    text = reply(2, sample.targets[0][1])
    assert (format_reward(text, sample), image_reward(text, sample), box_reward(text, sample, box_format=BoxFormat())) == (1, 1, 1)
    assert is_correct(text, sample, box_format=BoxFormat())


def test_the_image_gates_the_box(sample):
    text = reply(1, sample.targets[0][1])
    assert (format_reward(text, sample), image_reward(text, sample), box_reward(text, sample, box_format=BoxFormat())) == (1, 0, 0)


def test_half_a_box(sample):
    x1, y1, x2, y2 = sample.targets[0][1]
    text = reply(2, (x1, y1, x2, y1 + (y2 - y1) // 2))
    expected = ((y2 - y1) // 2) / (y2 - y1)
    assert box_reward(text, sample, box_format=BoxFormat()) == pytest.approx(expected)
    assert box_reward(text, sample, floor=0.9, box_format=BoxFormat()) == 0


def test_naming_several_boxes_gains_nothing(sample):
    one = reply(2, sample.targets[0][1]).split("<answer>")[1].split("</answer>")[0]
    for text in (f"<think></think><answer>[{one}, {one}]</answer>", f"<think></think><answer>{one}</answer><answer>{one}</answer>"):
        assert image_reward(text, sample) == 0 == box_reward(text, sample, box_format=BoxFormat())
        assert format_reward(text, sample) < 1


def test_format_counts_paired_tags(sample):
    assert format_reward("", sample) == 0
    assert format_reward("<think></think>", sample) == 0.5
    assert format_reward("<think></think><answer>nothing</answer>", sample) == 0.75


def test_a_choice_is_right_or_not(sample):
    question = make_free_form("val", 1)[0]
    other = "AB"[question.letter == "A"]
    assert choice_reward(f"<think></think><answer>{question.letter}</answer>", question) == 1
    assert choice_reward(f"<think></think><answer>{other}</answer>", question) == 0 == choice_reward("", question)
    assert choice_reward("<think></think><answer></answer>", sample) == 0
    assert is_correct(f"<think></think><answer>{question.letter}</answer>", question, box_format=BoxFormat())


def test_citations_of_images_that_are_not_there():
    sample = make_sample("diff", "val", 0)
    assert cites_only_existing_images("<think>image 1: a. image 2: b. new: b.</think><answer>?</answer>", sample)
    assert not cites_only_existing_images("<think>image 1: a. Image 3: b.</think><answer>?</answer>", sample)
    assert not cites_only_existing_images("<think>image 0: a.</think>", sample)
    assert cites_only_existing_images('<answer>{"image": 7}</answer>', sample), "the answer has a reward of its own"
