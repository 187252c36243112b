"""Rewards by hand."""

from dataclasses import replace

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.rewards import (
    box_reward,
    choice_reward,
    cites_only_existing_images,
    format_reward,
    image_reward,
    image_set_iou,
    is_correct,
    names_letter,
)
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


@pytest.fixture
def sample():
    """A sample whose target lies in image 2, which the model sees at its own size."""
    samples = (make_sample("diff", "val", i) for i in range(50))
    return next(sample for sample in samples if sample.sizes[1] == (84, 84))


def write_answer(image, box):
    return f'{{"image": {image}, "box": {[int(value) for value in box]}}}'


def write_reply(image, box):
    return f"<think>Compare.</think><answer>{write_answer(image, box)}</answer>"


def rewards(reply, sample):
    return (format_reward(reply, sample, BOX_FORMAT), image_reward(reply, sample, BOX_FORMAT),
            box_reward(reply, sample, BOX_FORMAT))


def test_the_image_gates_the_box(sample):
    right, wrong = (write_reply(image, sample.targets[0].box) for image in (2, 1))
    assert rewards(right, sample) == (1, 1, 1) and is_correct(right, sample, BOX_FORMAT)
    assert rewards(wrong, sample) == (1, 0, 0) and not is_correct(wrong, sample, BOX_FORMAT)
    assert image_set_iou(right, sample) == 1 and image_set_iou(wrong, sample) == 0
    question = next(iter_free_form("val", 1))
    assert rewards("", question)[1:] == (None, None)


def test_half_a_box(sample):
    x1, y1, x2, y2 = sample.targets[0].box
    height = (y2 - y1) // 2
    reply = write_reply(2, (x1, y1, x2, y1 + height))
    assert box_reward(reply, sample, BOX_FORMAT) == pytest.approx(height / (y2 - y1))
    assert box_reward(reply, sample, BOX_FORMAT, floor=0.9) == 0


def test_naming_several_boxes_gains_nothing(sample):
    answer = write_answer(2, sample.targets[0].box)
    for reply in (f"<think></think><answer>[{answer}, {answer}]</answer>",
                  f"<think></think><answer>{answer}</answer><answer>{answer}</answer>"):
        assert image_reward(reply, sample, BOX_FORMAT) == 0 == box_reward(reply, sample, BOX_FORMAT)
        assert format_reward(reply, sample, BOX_FORMAT) < 1


def test_format_counts_paired_tags(sample):
    assert format_reward("", sample, BOX_FORMAT) == 0
    assert format_reward("<think></think>", sample, BOX_FORMAT) == 0.5
    assert format_reward("<think></think><answer>nothing</answer>", sample, BOX_FORMAT) == 0.75


def test_a_choice_is_correct_or_not(sample):
    question = next(iter_free_form("val", 1))
    wrong = "B" if question.letter == "A" else "A"
    correct_reply, wrong_reply = (f"<think></think><answer>{letter}</answer>"
                                  for letter in (question.letter, wrong))
    assert choice_reward(correct_reply, question, BOX_FORMAT) == 1
    assert choice_reward(wrong_reply, question, BOX_FORMAT) == 0
    assert choice_reward("", question, BOX_FORMAT) == 0
    assert choice_reward("<think></think><answer></answer>", sample, BOX_FORMAT) is None
    assert names_letter(correct_reply, question) and not names_letter(correct_reply, sample)
    assert is_correct(correct_reply, question, BOX_FORMAT)


def test_where_nothing_answers_it_is_correct_to_say_so(sample):
    empty = replace(sample, targets=())
    assert is_correct("<think>Search.</think><answer>none</answer>", empty, BOX_FORMAT)
    assert not is_correct(write_reply(1, (0, 0, 9, 9)), empty, BOX_FORMAT)
    assert not is_correct("none", empty, BOX_FORMAT)


def test_reasoning_that_cites_images_that_do_not_exist():
    sample = make_sample("diff", "val", 0)
    for thinking, is_sound in (("image 1: a. image 2: b. new: b.", True),
                               ("image 1: a. Image 3: b.", False), ("image 0: a.", False)):
        reply = f"<think>{thinking}</think><answer>?</answer>"
        assert cites_only_existing_images(reply, sample) == is_sound
    assert cites_only_existing_images('<answer>{"image": 7}</answer>', sample), (
        "the answer has a reward of its own")
