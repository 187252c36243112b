"""Rewards that pay for the wrong thing are refused or named; those that do not pass silently."""

import json
import re

import pytest
from click.testing import CliRunner
from PIL import Image

from mig_kit.boxes import BoxFormat, iou, to_model_box, to_original_box
from mig_kit.commands.reward import check
from mig_kit.common import NOTEBOOKS, UserError
from mig_kit.pipeline.params import profile_params
from mig_kit.prompts import parse_reply
from mig_kit.rewards import REWARDS
from mig_kit.sample import Sample
from mig_kit.training.reward_check import measure_payments, require_sound_rewards
from mig_kit.training.reward_loading import load_rewards

GUIDE = NOTEBOOKS / "guide"
ABSOLUTE, THOUSAND = BoxFormat(), BoxFormat(coordinates="normalized_1000")
SIZES = ((1600, 900), (640, 480), (1200, 1800))


@pytest.fixture(scope="module")
def samples():
    """Questions for a box about three images of three sizes, their targets here and there."""
    images, rows = tuple(Image.new("RGB", size) for size in SIZES), []
    for n in range(24):
        width, height = SIZES[n % 3]
        left, top = (n * 7 % 11) / 16, (n * 5 % 13) / 18
        box = tuple(round(share * side) for share, side in zip(
            (left, top, left + 0.12 + n % 4 / 20, top + 0.1 + n % 5 / 25), (width, height) * 2))
        rows.append(Sample(f"q{n}", "own", "own", "train", images, "Find it.", ((n % 3 + 1, box),)))
    return rows


@pytest.fixture(scope="module")
def choices():
    return [Sample(f"c{n}", "own", "own", "train", (Image.new("RGB", (300, 200)),), "What?",
                   options=("a cup", "a dog", "a hat"), letter="ABC"[n % 3]) for n in range(9)]


def numbers(reply):
    """The last four numbers of a reply, [] if it has none."""
    return [float(text) for text in re.findall(r"-?\d+(?:\.\d+)?", reply)][-4:]


def overlap(reply, target):
    return iou(tuple(numbers(reply)), target) if len(numbers(reply)) == 4 else 0.0


def in_original(reply, sample, box_format):
    """(image, box in pixels of the original) of a reply, None if it cannot be read."""
    read = parse_reply(reply)
    if read.box is None or not 1 <= (read.image or 0) <= len(sample.images):
        return None
    return read.image, to_original_box(read.box, sample.sizes[read.image - 1], box_format)


def score_box(score, unread=0.0):
    """A reward of a box and the target, whatever image the reply names."""
    def reward(reply, sample, box_format):
        answer = in_original(reply, sample, box_format)
        return unread if answer is None else float(score(answer[1], sample.targets[0].box))
    return reward


def compared_raw(to_target):
    """A reward that compares a reply's numbers with the target in a frame of its own."""
    return lambda reply, sample, box_format: overlap(reply, to_target(
        sample.targets[0].box, sample.sizes[sample.targets[0].image - 1]))


def intersection(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def area(box):
    return (box[2] - box[0]) * (box[3] - box[1])


def distance(a, b):
    return sum(abs(x - y) for x, y in zip(a, b))


def scaled(width, height):
    return lambda box, size: tuple(value / side * full for value, side, full in zip(
        box, size * 2, (width, height) * 2))


def has_tags(reply):
    return bool(re.search(r"<think>.*</think>\s*<answer>.*</answer>", reply, re.DOTALL))


# fault -> (reward, box format, words of what is said)
FAULTS = {
    "always 0": (lambda *_: 0.0, ABSOLUTE, "every reply earns the same"),
    "always 1": (lambda *_: 1.0, ABSOLUTE, "every reply earns the same"),
    "no return": (lambda *_: None, ABSOLUTE, "may lack a return"),
    "inverted: 1 - IoU": (score_box(lambda a, b: 1 - iou(a, b)), ABSOLUTE, "the right reply"),
    "a distance with the wrong sign": (score_box(distance), ABSOLUTE, "the right reply"),
    "pixels of the original where the model writes those of the resized image": (
        compared_raw(lambda box, size: box), ABSOLUTE, "as pixels of the original earns"),
    "thousandths read as pixels": (
        compared_raw(lambda box, size: box), THOUSAND, "as pixels of the original earns"),
    "pixels read as thousandths": (compared_raw(scaled(1000, 1000)), ABSOLUTE,
                                   "as 0 to 1000 earns"),
    "targets in 0 to 1": (compared_raw(scaled(1, 1)), THOUSAND, "as 0 to 1 earns"),
    "targets in percent": (compared_raw(scaled(100, 100)), THOUSAND, "as percent earns"),
    "targets as x, y, width, height": (compared_raw(lambda box, size: (
        lambda a, b, c, d: (a, b, c - a, d - b))(*scaled(1000, 1000)(box, size))), THOUSAND,
        "as x, y, width, height"),
    "targets with y first": (compared_raw(lambda box, size: (
        lambda a, b, c, d: (b, a, d, c))(*scaled(1000, 1000)(box, size))), THOUSAND, "as y1, x1"),
    "a box divided by 1000 twice": (compared_raw(scaled(1e6, 1e6)), THOUSAND,
                                    "every reply earns the same"),
    "exact equality of text": (lambda reply, sample, box_format: float(
        reply == str(sample.targets[0].box)), ABSOLUTE, "every reply earns the same"),
    "a box in a code fence is asked for": (lambda reply, sample, box_format: float(
        "```json" in reply), ABSOLUTE, "every reply earns the same"),
    "IoU cut to a whole number": (score_box(lambda a, b: int(iou(a, b) * 0.999)), ABSOLUTE,
                                  "every reply earns the same"),
    "IoU of the reply with itself": (score_box(lambda a, b: iou(a, a)), ABSOLUTE,
                                     "the best constant box earns 1.00"),
    "any box at all": (score_box(lambda a, b: 1), ABSOLUTE, "the best constant box earns 1.00"),
    "recall: the whole image is right": (
        score_box(lambda a, b: intersection(a, b) / area(b)), ABSOLUTE, "the best constant box"),
    "a larger box pays more": (score_box(lambda a, b: area(a)), ABSOLUTE, "twice as large earns"),
    "a smaller box pays more": (score_box(lambda a, b: 1 / (1 + area(a))), ABSOLUTE,
                                "half as large earns"),
    "the image is not looked at": (compared_raw(scaled(1000, 1000)), THOUSAND,
                                   "it does not judge the image"),
    "1 where the reply cannot be read": (score_box(iou, unread=1.0), ABSOLUTE, "empty earns 1.00"),
    "0.99 for no box": (score_box(lambda a, b: iou(a, b) - 0.1, unread=0.99), ABSOLUTE,
                        "no box earns 0.99"),
    "the format alone": (lambda reply, *_: float(has_tags(reply)), ABSOLUTE,
                         "it pays for the format"),
    "the format at three times the answer": (lambda reply, sample, box_format: 3 * has_tags(reply)
                                             + score_box(iou)(reply, sample, box_format), ABSOLUTE,
                                             "it pays for the format"),
    "the length of the reply": (lambda reply, *_: len(reply) / 100, ABSOLUTE,
                                "a box too many earns"),
    "minus the length of the reply": (lambda reply, *_: -len(reply) / 100, ABSOLUTE,
                                      "empty earns 0.00"),
    "the number of boxes": (lambda reply, *_: float(reply.count('"box"')), ABSOLUTE,
                            "a box too many earns"),
    "a penalty below that of silence": (score_box(lambda a, b: iou(a, b) - 2), ABSOLUTE,
                                        "empty earns 0.00"),
    '"none" is always right': (lambda reply, sample, box_format: 2.0 if "none" in reply else
                               score_box(iou)(reply, sample, box_format), ABSOLUTE,
                               '"none" earns 2.00'),
    "the first image's size for all": (lambda reply, sample, box_format: overlap(
        reply, to_model_box(sample.targets[0].box, sample.sizes[0], box_format)), ABSOLUTE,
        "earns"),
}


def judge(reward, samples, box_format):
    """All that is said of a reward."""
    try:
        faults, warnings = measure_payments({"f": reward}, samples, box_format, {})[0].judge()
    except UserError as error:
        return str(error)
    return "; ".join(faults + warnings)


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name, samples):
    reward, box_format, words = FAULTS[name]
    assert words in judge(reward, samples, box_format)


@pytest.mark.parametrize("reward, words", [
    (lambda reply, sample, _: float(f"({sample.letter})" in reply), "every reply earns the same"),
    (lambda reply, sample, _: float(sample.letter in reply), ""),
    (lambda reply, sample, _: float(bool(re.search("<answer>[A-H]</answer>", reply))),
     "it does not judge the letter"), (REWARDS["choice"], "")])
def test_letters(choices, reward, words):
    sentences = judge(reward, choices, ABSOLUTE)
    assert words in sentences if words else not sentences


def test_none_for_what_cannot_be_read_pays_nothing(samples):
    def strict(reply, sample, box_format):
        return None if in_original(reply, sample, box_format) is None else (
            REWARDS["box"](reply, sample, box_format))

    def length(reply, sample, box_format):
        return None if parse_reply(reply).well_formed else -len(reply) / 100

    assert judge(strict, samples, ABSOLUTE) == ""
    rewards = REWARDS | {"length": length}
    require_sound_rewards(rewards, samples, ABSOLUTE, profile_params("05_grpo")["reward_weights"])


def test_a_part_counts_with_its_weight(samples):
    def distance(reply, sample, box_format):
        return 1 - REWARDS["box"](reply, sample, box_format)

    rewards = {"box": REWARDS["box"], "distance": distance}
    for weight in (0, -0.5):
        require_sound_rewards(rewards, samples, ABSOLUTE, {"distance": weight})
    with pytest.raises(UserError, match="the reward distance pays for the wrong thing"):
        require_sound_rewards(rewards, samples, ABSOLUTE, {"distance": 0.5})


def test_rewards_that_are_about_no_question(samples):
    assert measure_payments({"choice": REWARDS["choice"]}, samples, ABSOLUTE, {}) == []
    with pytest.raises(UserError, match="there is no question"):
        measure_payments({"box": REWARDS["box"]}, [], ABSOLUTE, {})


@pytest.mark.parametrize("box_format", [ABSOLUTE, THOUSAND])
def test_the_kits_rewards_pass_without_a_word(samples, choices, box_format, capsys):
    asked = samples + choices
    require_sound_rewards(REWARDS, asked, box_format, profile_params("05_grpo")["reward_weights"])
    for name in ("box", "image", "choice"):
        require_sound_rewards({name: REWARDS[name]}, asked, box_format, {})
    assert capsys.readouterr().out == ""


def test_the_guides_rewards_pass_without_a_word(samples, tmp_path, capsys):
    blocks = re.findall("```python\n(.*?)```", (GUIDE / "variants.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text("".join(blocks))
    names = re.findall(r"^def (\w+)", "".join(blocks), re.MULTILINE)
    rewards = load_rewards([f"{tmp_path}/mine.py:{name}" for name in names], None)
    assert names
    for name, reward in rewards.items():
        require_sound_rewards(REWARDS | {name: reward}, samples, ABSOLUTE, {name: 0.5})
        require_sound_rewards({name: reward}, samples, ABSOLUTE, {})
    assert capsys.readouterr().out == ""


def test_a_part_of_the_sum_is_refused_for_a_wrong_answer_alone(samples, capsys):
    """Length, format and silence may be what a part is about; the box it may not get wrong."""
    for name in ("minus the length of the reply", "the format alone"):
        require_sound_rewards(REWARDS | {"mine": FAULTS[name][0]}, samples, ABSOLUTE,
                              {"mine": 0.1})
    require_sound_rewards(REWARDS | {"mine": FAULTS["always 0"][0]}, samples, ABSOLUTE, {})
    assert "warning: mine: every reply earns the same (0.00)" in capsys.readouterr().out
    for name in ("inverted: 1 - IoU", "a larger box pays more",
                 "pixels of the original where the model writes those of the resized image"):
        with pytest.raises(UserError, match="the reward .*mine.* pays for the wrong thing"):
            require_sound_rewards(REWARDS | {"mine": FAULTS[name][0]}, samples, ABSOLUTE, {})


def test_questions_to_which_every_reply_earns_the_same_are_counted(samples, choices, capsys):
    def no_none(reply, sample, box_format):
        return 0.0 if sample.options else REWARDS["box"](reply, sample, box_format)

    require_sound_rewards({"mine": no_none}, [*samples[:15], *choices], ABSOLUTE, {})
    assert "to 9 of 24 questions every reply earns the same; return None" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("engine, text", [
    ("trl", "def f(completions, solution, **columns):\n"
            "    return [float(s in c[0]['content']) for c, s in zip(completions, solution)]\n"),
    ("verl", "def f(data_source, solution_str, ground_truth, extra_info=None):\n"
             "    return {'score': float(ground_truth in solution_str)}\n"),
    ("swift", "class f:\n    def __call__(self, completions, solution, **columns):\n"
              "        return [float(s in c) for c, s in zip(completions, solution)]\n")])
def test_the_command(samples, tmp_path, engine, text):
    for number, size in enumerate(SIZES):
        Image.new("RGB", [side // 5 for side in size]).save(tmp_path / f"{number}.png")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({
        "images": ["0.png", "1.png", "2.png"], "question": "Find it.", "coordinates": "pixels",
        "image": target.image, "box": [value / 5 for value in target.box]}) + "\n"
        for sample in samples for target in sample.targets))
    (tmp_path / "my.py").write_text(text + "def zero(reply, sample, box_format):\n    return 0\n")
    words = ("--data", str(tmp_path / "mine.jsonl"))
    done = CliRunner().invoke(check, [f"{tmp_path}/my.py:f", *words, "--as", engine])
    assert done.exit_code == 0, done.output
    assert "    1.00  right (24)" in done.output and "    0.00  empty (24)" in done.output
    assert "0.00  as x, y, width, height" in done.output
    done = CliRunner().invoke(check, [f"{tmp_path}/my.py:zero", *words])
    assert "every reply earns the same (0.00)" in str(done.exception)
