"""Rewards in files of users: loaded from the stage's copy, tried; a failing one shows its line."""

import sys
import traceback

import pytest
from transformers import TrainerState

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.pipeline.reward_names import check_rewards
from mig_kit.prompts import parse_reply, read_reply
from mig_kit.rewards import REWARDS
from mig_kit.training import reward_loading
from mig_kit.training.reward_check import construct_replies, tabulate_payments
from mig_kit.training.reward_loading import Score, load_rewards
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
HEAD = "def center(answer, sample):\n"


def right_answer(sample):
    return read_reply(construct_replies(sample, BOX_FORMAT)["right"], sample, BOX_FORMAT)


def try_rewards(rewards, samples):
    """Beside the kit's, so that nothing is said of what they leave out."""
    tabulate_payments({**REWARDS, **rewards}, samples, BOX_FORMAT, {"center": 0}, group=2)


@pytest.fixture
def load(tmp_path):
    """Call it with the text of a file of rewards for the loaded reward and the file."""
    def load_text(text):
        file = tmp_path / "my_rewards.py"
        file.write_text(text)
        reward_loading.copy_own_files(["box", f"{file}:center"], tmp_path)
        rewards = load_rewards(["box", f"{file}:center"], tmp_path)
        assert list(rewards) == ["box", "center"] and rewards["box"] is REWARDS["box"]
        return rewards["center"], file

    return load_text


@pytest.fixture
def samples():
    return [make_sample("diff", "val", 0), *iter_free_form("val", 2)]


def test_the_copy_counts(load, tmp_path, samples):
    text = HEAD + "    return None if sample.options else len(answer.text) / 2\n"
    reward, file = load(text)
    assert [Score("center", reward, BOX_FORMAT)(parse_reply("four"), sample)
            for sample in samples[:2]] == [2.0, None]
    assert (tmp_path / "rewards" / "my_rewards.py").read_text() == text
    file.write_text(text.replace("/ 2", "/ 4"))
    again = load_rewards([f"{file}:center"], tmp_path)["center"]
    assert again(parse_reply("four"), samples[0]) == 2.0, "not from the copy"


def test_dataclasses_the_kit_and_a_byte_order_mark_can_be_used(load, samples):
    reward, file = load("\ufefffrom __future__ import annotations\n"
                        "from dataclasses import dataclass\n"
                        "from mig_kit.rewards import box_reward\n"
                        "@dataclass\nclass Part:\n    value: float\n"
                        + HEAD + "    return Part(box_reward(answer, sample)).value\n")
    check_rewards([f"{file}:center"], {}, {})
    assert reward(right_answer(samples[0]), samples[0]) > 0.9


BATCH = "def center(completions, solution, {}**columns):\n    return "


@pytest.mark.parametrize(("text", "values"), [
    (BATCH.format("") + "[len(text[0]['content']) for text in completions]\n", [1, 3]),
    ("def center(prompts, completions, **columns):\n    return [1, float('nan')] * "
     "(len(completions) // 2)\n", [1, None]),
    ("from trl.rewards import get_soft_overlong_punishment\n"
     "center = get_soft_overlong_punishment(5, 4)\n", [-0.25, -1]),
    ("import numpy\ndef center(completions, **columns):\n    groups = numpy.reshape("
     "[len(c[0]['content']) for c in completions], (-1, 2))\n"
     "    return (groups - groups.mean(1, keepdims=True)).ravel()\n", [-1, 1]),
    ("import asyncio\nasync def center(completions, **columns):\n    await asyncio.sleep(0)\n"
     "    return [2.5] * len(completions)\n", [2.5, 2.5]),
    ("import numpy, torch\ndef center(completions, **columns):\n    return [numpy.array(2), "
     "torch.tensor(4.5)] * (len(completions) // 2)\n", [2, 4.5]),
    ("def center(**columns):\n    return [len(rows) for rows in columns['images']]\n", None),
    (BATCH.format("log_metric, trainer_state, ") + "[log_metric('a', trainer_state.max_steps) or 2"
     " for _ in completions]\n", [2, 2])])
def test_a_reward_in_trls_form_gets_the_batch(load, samples, text, values):
    reward, file = load(text)
    check_rewards([f"{file}:center"], {}, {})
    try_rewards({"center": reward}, samples)
    score = Score("center", reward, BOX_FORMAT)
    results = score.score_batch(
        [parse_reply("a"), parse_reply("bcd")], samples[:2],
        completions=reward_loading.as_completions(["a", "bcd"]), completion_ids=[[1, 2], [1] * 6],
        trainer_state=TrainerState(), log_metric=print)
    assert results == (values or [len(sample.images) for sample in samples[:2]])
    assert score(parse_reply("a"), samples[0]) is None, "a reply alone is no batch"


@pytest.mark.parametrize(("text", "error", "words"), [
    ("def center(completions, **columns):\n    return [1 / 0]\n", ZeroDivisionError, "division"),
    ("def center(completions, nowhere, **columns):\n    return 1\n", TypeError, "'nowhere'"),
    (HEAD + "    return sample.nothing\n", AttributeError, "nothing"),
    (HEAD + "    return float(answer.text[0] == '<')\n", IndexError, "'center' was given ''"),
    ("import nothing_of_this_name\n" + HEAD + "    return 1\n", ModuleNotFoundError, "nothing_of"),
    ("x = 1\n\n\nx / 0\n" + HEAD + "    return 1\n", ZeroDivisionError, "x / 0"),
    (HEAD + "return 1\n", IndentationError, "my_rewards.py")])
def test_a_reward_or_file_that_fails_shows_its_own_line(load, samples, tmp_path, text, error,
                                                        words):
    with pytest.raises(error) as caught:
        reward, _ = load(text)
        try_rewards({"center": reward}, samples)
    assert words in "".join(traceback.format_exception(caught.value))
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    has_frame = error not in (TypeError, IndentationError)
    assert (str(tmp_path / "my_rewards.py") in files) == has_frame


@pytest.mark.parametrize(("text", "sentence"), [
    ("def center(completions, **columns):\n    return [1.0]\n", "gave 1 values for "),
    ("def center(completions, **columns):\n    return [1e999] * len(completions)\n",
     "gave inf for sample"),
    (HEAD + "    return float('nan')\n", "gave nan for sample "),
    (HEAD + "    return 'much'\n", "gave 'much'"),
    *((HEAD + body, "gave None for every reply, so noth") for body in (
        "    len(answer.text)\n", "    return None\n",
        "    if answer.text == 'never':\n        return 1\n"))])
def test_a_value_that_is_no_number_is_one_sentence(load, samples, text, sentence):
    reward, _ = load(text)
    with pytest.raises(UserError, match=f"the reward 'center' {sentence}"):
        try_rewards({"center": reward}, samples)


def test_what_a_reward_uses_of_its_folder_is_copied_with_it(tmp_path, samples):
    folder, stage = tmp_path / "mine", tmp_path / "stage"
    for path, text in {
            folder / "rules.py": "from json import load\nimport deeper\nVALUE = deeper.VALUE\n",
            folder / "deeper.py": "VALUE = 2\n", folder / "unused.py": "1 / 0\n",
            folder / "table.json": "[3]",
            folder / "my.py": "from pathlib import Path\nfrom rules import VALUE, load\n"
                              "FILES = ['table.json']\ndef f(answer, sample):\n"
                              "    with Path(__file__).with_name('table.json').open() as file:\n"
                              "        return VALUE * load(file)[0]\n"}.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    stage.mkdir()
    reward_loading.copy_own_files([f"{folder / 'my.py'}:f"], stage)
    for path in folder.iterdir():
        path.unlink()
    (folder / "my.py").write_text("")
    reward = load_rewards([f"{folder / 'my.py'}:f"], stage)["f"]
    assert reward(right_answer(samples[0]), samples[0]) == 6
    assert sorted(path.name for path in (stage / "rewards").iterdir()) == [
        "deeper.py", "my.py", "rules.py", "table.json"]
    assert not {"rules", "deeper"} & sys.modules.keys()


@pytest.mark.parametrize("arguments", ["reply", "reply, sample, box_format"])
def test_the_form_of_a_reward_is_said(load, arguments):
    with pytest.raises(UserError, match=r"a reward is called as center\(answer, sample\)"):
        load(f"def center({arguments}):\n    return 1\n")


@pytest.mark.parametrize("condition", ["sample.options", "not sample.options", "not answer.text",
                                       "sample.task == 'region'"])
def test_a_reward_may_be_about_some_questions_or_replies(load, samples, condition):
    reward, _ = load(HEAD + f"    return 1 if {condition} else None\n")
    many = [*samples, *(make_sample("diff", "val", i) for i in range(70)),
            make_sample("region", "val", 0)]
    try_rewards({"center": reward}, many)
    try_rewards({"choice": REWARDS["choice"]}, many[-9:])
