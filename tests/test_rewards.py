"""Rewards by hand."""

from dataclasses import replace

import pytest

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.prompts import read_reply
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SAMPLE = make_sample("diff", "val", 0)


@pytest.fixture
def sample():
    """A sample whose target lies in image 2, which the model sees at its own size."""
    samples = (make_sample("diff", "val", i) for i in range(50))
    return next(sample for sample in samples if sample.sizes[1] == (84, 84))


def write_answer(image, box):
    return f'{{"image": {image}, "box": {[int(value) for value in box]}}}'


def write_reply(image, box):
    return f"<think>Compare.</think><answer>{write_answer(image, box)}</answer>"


def read(reply, sample):
    return read_reply(reply, sample, BOX_FORMAT)


def earn(reply, sample, *names):
    return tuple(rewards.REWARDS[name](read(reply, sample), sample) for name in names)


def test_the_image_gates_the_box(sample):
    right, wrong = (write_reply(image, sample.targets[0].box) for image in (2, 1))
    for reply, earned in ((right, (1, 1, 1)), (wrong, (1, 0, 0))):
        assert earn(reply, sample, "format", "image", "box") == earned
        answer = read(reply, sample)
        assert rewards.is_correct(answer, sample) == (reply is right)
        assert rewards.names_image(answer, sample) == bool(earned[1])
    assert earn("", next(iter_free_form("val", 1)), "image", "box") == (None, None)


def test_half_a_box(sample):
    x1, y1, x2, y2 = sample.targets[0].box
    height = (y2 - y1) // 2
    answer = read(write_reply(2, (x1, y1, x2, y1 + height)), sample)
    assert rewards.box_reward(answer, sample) == pytest.approx(height / (y2 - y1))
    assert rewards.box_reward(answer, sample, floor=0.9) == 0


def test_naming_several_boxes_gains_nothing(sample):
    answer = write_answer(2, sample.targets[0].box)
    for answers in (f"[{answer}, {answer}]", f"{answer}</answer><answer>{answer}"):
        reply = f"<think></think><answer>{answers}</answer>"
        assert earn(reply, sample, "image", "box") == (0, 0)
        assert earn(reply, sample, "format") < (1,)


def test_any_of_several_targets_answers(sample):
    first, second = sample.targets[0], (1, (0, 0, 28, 28))
    both = replace(sample, targets=(first, second))
    for target in both.targets:
        assert rewards.is_correct(read(write_reply(*target), both), both)
    assert earn(write_reply(1, first.box), both, "image") == (1,)
    assert not rewards.is_correct(read(write_reply(1, first.box), both), both)


@pytest.mark.parametrize(("reply", "earned"), [
    ("", 0), ("<think></think>", 0.5), ("<think></think><answer>nothing</answer>", 0.75)])
def test_format_counts_paired_tags(sample, reply, earned):
    assert earn(reply, sample, "format") == (earned,)


def test_a_choice_is_correct_or_not(sample):
    question = next(iter_free_form("val", 1))
    wrong = "B" if question.letter == "A" else "A"
    right_reply, wrong_reply = (f"<think></think><answer>{letter}</answer>"
                                for letter in (question.letter, wrong))
    assert [earn(reply, question, "choice") for reply in (right_reply, wrong_reply, "")] == [
        (1,), (0,), (0,)]
    assert earn("<think></think><answer></answer>", sample, "choice") == (None,)
    for asked in (question, sample):
        assert rewards.names_letter(read(right_reply, asked), asked) == (asked is question)
    assert rewards.is_correct(read(right_reply, question), question)


def test_reasoning_that_cites_images_that_do_not_exist():
    sample = make_sample("diff", "val", 0)
    for thinking, is_sound in (("image 1: a. image 2: b. new: b.", True),
                               ("image 1: a. Image 3: b.", False), ("image 0: a.", False)):
        reply = f"<think>{thinking}</think><answer>?</answer>"
        assert rewards.cites_only_existing_images(read(reply, sample), sample) == is_sound
    assert rewards.cites_only_existing_images(read('<answer>{"image": 7}</answer>', sample),
                                              sample), "the answer has a reward of its own"
