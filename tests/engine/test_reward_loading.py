"""Rewards in files of users: loaded from the stage's copy, tried, and errors with file and line."""

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.engine.reward_loading import (
    compute_reward,
    copy_reward_files,
    correct_reply,
    describe_error,
    load_rewards,
    try_rewards,
)
from mig_kit.rewards import REWARDS, is_correct
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
HEAD = "def center(reply, sample, box_format):\n"


@pytest.fixture
def load(tmp_path):
    """Call it with the text of a file of rewards for the loaded reward and the file."""
    def load_text(text):
        file = tmp_path / "my_rewards.py"
        file.write_text(text)
        copy_reward_files(["box", f"{file}:center"], tmp_path)
        rewards = load_rewards(["box", f"{file}:center"], tmp_path)
        assert list(rewards) == ["box", "center"] and rewards["box"] is REWARDS["box"]
        return rewards["center"], file

    return load_text


@pytest.fixture
def samples():
    return [make_sample("diff", "val", 0), *iter_free_form("val", 2)]


def test_the_copy_counts(load, tmp_path, samples):
    text = HEAD + "    return None if sample.options else len(reply) / 2\n"
    reward, file = load(text)
    assert [compute_reward("center", reward, "four", sample, BOX_FORMAT)
            for sample in samples[:2]] == [2.0, None]
    assert (tmp_path / "rewards" / "my_rewards.py").read_text() == text
    file.write_text(text.replace("/ 2", "/ 4"))
    again = load_rewards([f"{file}:center"], tmp_path)["center"]
    assert again("four", samples[0], BOX_FORMAT) == 2.0, "not from the copy"


def test_dataclasses_and_the_kit_can_be_used(load, samples):
    reward, _ = load("from __future__ import annotations\nfrom dataclasses import dataclass\n"
                     "from mig_kit.rewards import box_reward\n"
                     "@dataclass\nclass Part:\n    value: float\n"
                     + HEAD + "    return Part(box_reward(reply, sample, box_format)).value\n")
    assert reward(correct_reply(samples[0], BOX_FORMAT), samples[0], BOX_FORMAT) > 0.9


def test_a_reward_in_trls_form_is_taken_as_it_is(load, samples):
    reward, _ = load(
        "def center(completions, targets, sizes, letter, log_metric=None, **columns):\n"
        "    log_metric('length', 1)\n"
        "    texts = [completion[0]['content'] for completion in completions]\n"
        "    return [len(text) + len(boxes) + len(size) if boxes else None\n"
        "            for text, boxes, size in zip(texts, targets, sizes)]\n")
    expected = 4 + len(samples[0].targets) + len(samples[0].images)
    assert [compute_reward("center", reward, "four", sample, BOX_FORMAT)
            for sample in samples[:2]] == [expected, None]


def test_an_error_in_trls_form_names_file_and_line(load, samples):
    reward, file = load("def center(completions, **columns):\n    return [1 / 0]\n")
    with pytest.raises(ValueError, match=f"{file}, line 2: ZeroDivisionError"):
        compute_reward("center", reward, "four", samples[0], BOX_FORMAT)


@pytest.mark.parametrize(("text", "sentence"), [
    ("import nothing_of_this_name\n" + HEAD + "    return 1\n", "line 1: ModuleNotFoundError"),
    ("x = 1\n\n\nx / 0\n" + HEAD + "    return 1\n", "line 4: ZeroDivisionError"),
    (HEAD + "return 1\n", "line 2: IndentationError"),
    ("center = 3\n", "has no function 'center'"),
])
def test_a_file_that_cannot_be_imported_names_file_and_line(load, text, sentence):
    with pytest.raises(ValueError, match=f"my_rewards.py.*{sentence}") as caught:
        load(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("body", "sentence"), [
    ("    x = len(reply)\n    return 1 / (x - x)\n",
     "'center' failed in .*my_rewards.py, line 3: ZeroDivisionError: division by zero"),
    ("    return sample.nothing\n", "line 2: AttributeError"),
    ("    return float('nan')\n", "my_rewards.py, line 1.* gave nan for sample "),
    ("    return float('inf')\n", "gave inf for sample"), ("    return 'much'\n", "gave 'much'"),
    ("    return len(reply) if reply else float('nan')\n", "gave nan"),
])
def test_every_reward_is_tried_before_training(load, samples, body, sentence):
    reward, _ = load(HEAD + body)
    with pytest.raises(ValueError, match=sentence):
        try_rewards({"center": reward}, samples, BOX_FORMAT)
    try_rewards(REWARDS, samples, BOX_FORMAT)


@pytest.mark.parametrize("body", ["    len(reply)\n", "    return None\n",
                                  "    if reply == 'never':\n        return 1\n"])
def test_a_reward_that_gives_none_for_every_reply_is_refused(load, samples, body):
    reward, file = load(HEAD + body)
    with pytest.raises(ValueError) as caught:
        try_rewards({"box": REWARDS["box"], "center": reward}, samples, BOX_FORMAT)
    assert str(caught.value).startswith(
        f"the reward 'center' ({file}, line 1) gave None for every reply, so nothing would learn "
        "from it: it may lack a return; ")


@pytest.mark.parametrize("condition", ["sample.options", "not sample.options", "not reply",
                                       "sample.task == 'region'"])
def test_a_reward_may_be_about_some_questions_or_replies(load, samples, condition):
    reward, _ = load(HEAD + f"    return 1 if {condition} else None\n")
    many = [*samples, *(make_sample("diff", "val", i) for i in range(70)),
            make_sample("region", "val", 0)]
    try_rewards({"center": reward}, many, BOX_FORMAT)
    try_rewards({"choice": REWARDS["choice"]}, many[-9:], BOX_FORMAT)


def test_too_few_arguments_are_one_sentence(load, samples):
    reward, _ = load("def center(reply):\n    return 1\n")
    with pytest.raises(ValueError, match="'center' failed in .*takes 1 positional argument"):
        try_rewards({"center": reward}, samples, BOX_FORMAT)


def test_a_correct_reply_is_correct(samples):
    for sample in samples:
        assert is_correct(correct_reply(sample, BOX_FORMAT), sample, BOX_FORMAT)


def test_an_error_from_elsewhere_has_no_line():
    assert describe_error(KeyError("a"), "/x.py") == "/x.py: KeyError: 'a'"
