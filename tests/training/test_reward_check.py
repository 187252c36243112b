"""What rewards pay for constructed replies: by hand, and what is refused."""

import json
import re
import subprocess
import sys

import pytest
from command_line import error_of, output_of
from PIL import Image

from mig_kit.boxes import BoxFormat, iou
from mig_kit.common import NOTEBOOKS, UserError
from mig_kit.pipeline.params import profile_params
from mig_kit.prompts import parse_reply
from mig_kit.rewards import REWARDS
from mig_kit.sample import Sample
from mig_kit.training.reward_check import (
    KINDS,
    SUM,
    choose_questions,
    construct_replies,
    tabulate_payments,
)
from mig_kit.training.reward_loading import load_rewards

ABSOLUTE, THOUSAND = BoxFormat(), BoxFormat(coordinates="normalized_1000")
SHIFTED = 0.7 ** 2 / (2 - 0.7 ** 2)  # IoU of a box and itself moved by 0.3 of both its sides
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


def raw_iou(answer, sample):
    """A reward that compares a reply's numbers with the target in pixels of the original."""
    box = parse_reply(answer.text).box
    return iou(box, sample.targets[0].box) if box else 0.0


@pytest.mark.parametrize("box_format", [ABSOLUTE, THOUSAND])
def test_the_kits_rewards_pay_the_right_reply_most(samples, choices, box_format):
    for sample in (samples[0], choices[0]):
        replies = construct_replies(sample, box_format)
        assert [kind for kind in KINDS if kind in replies] == list(replies)
    weights = profile_params("05_grpo")["reward_weights"]
    table = tabulate_payments(REWARDS, [*samples, *choices], box_format, weights)
    assert list(table.index) == list(KINDS) and list(table) == [*REWARDS, SUM]
    assert table["image"].tolist() == [1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0]
    assert table["format"].tolist() == [1, 0, 1, 1, 1, 1, 1, 1, 1, 0.75, 1, 0.75]
    assert table["choice"].dropna().to_dict() == {
        "right": 1, "empty": 0, "wrong image": 0, "hedged": 0, "long": 1, "malformed": 0}
    assert table["box"]["shifted"] == pytest.approx(SHIFTED, abs=0.03), "boxes are rounded"
    assert table["box"]["right"] > 0.9 and table["box"]["other frame"] < 0.3
    assert table["box"][["doubled box", "whole image", "dot"]].max() < 0.5
    wrong = table[SUM].drop(["right", "long"])
    assert table[SUM]["right"] == table[SUM]["long"] > wrong.max() + 0.3


def test_a_reward_in_another_frame_is_seen(samples):
    table = tabulate_payments({"mine": raw_iou}, samples, ABSOLUTE, {})
    assert list(table) == ["mine"] and table["mine"]["right"] < 0.6
    brief = {"mine": lambda answer, _: 1 - len(answer.text) / 1e4}
    table = tabulate_payments(brief, samples, ABSOLUTE, {})
    assert table["mine"]["empty"] == 1 > table["mine"]["right"] > table["mine"]["long"]


def covered(answer, sample):
    """The share of the target that the reply's box covers."""
    (image, (x1, y1, x2, y2)), = sample.targets
    if image != answer.image or not answer.box:
        return 0.0
    a, b, c, d = answer.box
    width, height = min(c, x2) - max(a, x1), min(d, y2) - max(b, y1)
    return max(width, 0) * max(height, 0) / ((x2 - x1) * (y2 - y1))


@pytest.mark.parametrize("rewards, kind", [
    ({"mine": covered}, "whole image"),
    (REWARDS | {"mine": lambda answer, _: -len(answer.text)}, "empty"),
    ({"mine": lambda answer, _: float(answer.image == 4)}, "no such image")])
def test_a_wrong_reply_that_earns_no_less_than_the_right_one_is_a_warning(
        rewards, kind, samples, capsys):
    tabulate_payments(REWARDS, samples, ABSOLUTE, {})
    assert not capsys.readouterr().out
    tabulate_payments(rewards, samples, ABSOLUTE, {})
    assert f"warning: the reply '{kind}' earns" in capsys.readouterr().out


def test_a_part_may_be_the_same_for_all_and_its_weight_counts(samples):
    rewards = REWARDS | {"mine": lambda *_: 0.5}
    table = tabulate_payments(rewards, samples, ABSOLUTE, {"mine": 2.0})
    assert set(table["mine"]) == {0.5} and table[SUM]["empty"] == 1
    for refused, weight in ((REWARDS["box"], 0.0),
                            (lambda _, sample: float(sample.id == "q3"), 1.0)):
        with pytest.raises(UserError, match="the rewards mine pay the same for every reply"):
            tabulate_payments({"mine": refused}, samples, ABSOLUTE, {"mine": weight})
    with pytest.raises(UserError, match="add one that is about these questions"):
        tabulate_payments({"choice": REWARDS["choice"]}, samples, ABSOLUTE, {})


def test_a_reward_of_a_batch_is_shown_alone_and_mixed(samples):
    def longest(completions, **columns):
        sizes = [len(completion[0]["content"]) for completion in completions]
        assert len(sizes) % 4 == 0
        return [float(size == max(sizes)) for size in sizes]

    rewards = {"box": REWARDS["box"], "longest": longest}
    table = tabulate_payments(rewards, samples[:2], ABSOLUTE, {}, group=4)
    assert set(table["longest"]) == {1.0}, "alone every reply is the longest"
    assert table["longest, mixed"].to_dict() == {kind: float(kind == "long") for kind in KINDS}


def test_every_task_has_questions(samples):
    mixed = [*samples * 30, Sample("x", "own", "rare", "train", samples[0].images, "Find it.",
                                   samples[0].targets)]
    chosen = choose_questions(mixed)
    assert len(chosen) == 13 and {sample.task for sample in chosen} == {"own", "rare"}
    with pytest.raises(UserError, match="there is no question"):
        choose_questions([])


def test_the_guides_rewards_pay_the_right_reply_most(samples, tmp_path):
    text = (NOTEBOOKS / "guide" / "variants.md").read_text()
    blocks = re.findall("```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "mine.py").write_text("".join(blocks))
    names = re.findall(r"^def (\w+)", "".join(blocks), re.MULTILINE)
    rewards = load_rewards([f"{tmp_path}/mine.py:{name}" for name in names], None)
    assert names
    for name in names:
        table = tabulate_payments({name: rewards[name]}, samples, ABSOLUTE, {})
        assert table[name]["right"] == table[name].max() > table[name]["empty"]


def test_the_command(samples, tmp_path):
    for number, size in enumerate(SIZES):
        Image.new("RGB", [side // 5 for side in size]).save(tmp_path / f"{number}.png")
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({
        "images": ["0.png", "1.png", "2.png"], "question": "Find it.", "coordinates": "pixels",
        "image": target.image, "box": [value / 5 for value in target.box]}) + "\n"
        for sample in samples for target in sample.targets))
    (tmp_path / "my.py").write_text(
        "def f(completions, solution, **columns):\n"
        "    return [float(s in c[0]['content']) for c, s in zip(completions, solution)]\n"
        "def zero(answer, sample):\n    return 0\n")
    words = ("reward", "check", "--data", str(tmp_path / "mine.jsonl"))
    output = output_of(*words, f"{tmp_path}/my.py:f")
    assert re.search(r"right +1\.0 +1\.0\n", output) and "24 questions" in output
    for name, sentence in (("zero", "pay the same for every reply"),
                           ("zer", "has no function 'zer'; it has f, zero")):
        assert sentence in error_of(*words, f"{tmp_path}/my.py:{name}")
    assert "name rewards and --data FILE, or --run RUN" in error_of("reward", "check")
    (tmp_path / "lacks.py").write_text("import not_of_the_kit\ndef f(answer, sample): return 1\n")
    script = "from mig_kit.commands.main import main; main()"
    error = subprocess.run([sys.executable, "-c", script, *words, f"{tmp_path}/lacks.py:f"],
                           capture_output=True, text=True).stderr
    assert "lacks.py\", line 1" in error and "pip install" not in error, "no extra of the kit"


def test_a_runs_rewards_with_its_weights_are_what_05_shows(smoke_runs):
    output = output_of("reward", "check", "--run", "smoke", MIG_KIT_RUNS=str(smoke_runs))
    assert SUM in output and "doubled box" in output and "format" in output
