"""Models that ship as adapters: those of a run, merged to its bits, asked by name."""

import json
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from test_executed import load_tool

from mig_kit import common
from mig_kit.boxes import PROMPT, BoxFormat
from mig_kit.commands.main import cli
from mig_kit.common import SHIPPED, UserError, model_folder
from mig_kit.evaluation import evaluate
from mig_kit.models import loading
from mig_kit.models.model_folders import check_weights
from mig_kit.pipeline.run_facts import MODELS, find_run_model
from mig_kit.serving.reply_files import greedy_replies
from mig_kit.stages import grpo

TOOL = load_tool()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose tiny_base has no adapters beside it, and an empty cache."""
    shutil.copytree(loading.TINY_BASE, tmp_path / "tiny_base",
                    ignore=shutil.ignore_patterns("sft", "grpo"))
    monkeypatch.setattr(common, "PACKAGE", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def shipped(package, smoke_runs, monkeypatch):
    """Facts of the smoke run, whose adapters ship in `package`."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(smoke_runs))
    facts = {stage: {} for stages in TOOL.MADE_BY.values() for stage in stages}
    TOOL.ship_adapters("smoke", facts)  # ends where the merged weights are not the run's
    return facts


def read_files(folder):
    """Contents by name, but of the card, which names the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.mark.slow
def test_a_shipped_model_is_the_folder_that_its_run_made(shipped, smoke_runs, package):
    for name, made in (("tiny/sft", "03_merge/merged"), ("tiny/grpo", "05_grpo/model")):
        folder = loading.resolve_model(name)
        check_weights(folder)
        assert read_files(folder) == read_files(smoke_runs / "smoke" / made)
        assert folder.is_relative_to(package / "cache") and folder == loading.resolve_model(name)
    assert shipped["05_grpo"].keys() == {"adapter", "weights"}


@pytest.mark.slow
def test_replies_that_ship_are_given_again(shipped, tmp_path):
    TOOL.keep_replies("smoke", tmp_path / "replies.json")
    asked = json.loads((tmp_path / "replies.json").read_text())
    samples = [sample for part in evaluate.draw_test_samples(asked).values() for sample in part]
    assert len(samples) == 42
    for system, name in zip(MODELS, SHIPPED):
        policy = loading.load_policy(loading.resolve_model(name),
                                     loading.choose_hardware("float32", "cpu"), BoxFormat())
        replies = greedy_replies(policy, samples, asked["max_new_tokens"])
        assert dict(zip([sample.id for sample in samples], replies)) == asked["replies"][system]


@pytest.mark.slow
def test_rl_may_start_from_a_shipped_model_and_06_compares_with_it(shipped):
    params = SimpleNamespace(start_from="tiny/sft", min_pixels=3136, max_pixels=401408,
                             coordinates="absolute", prompt=PROMPT)
    assert grpo.resolve_start(params, None) == evaluate.find_rl_start("tiny/sft")


def test_a_shipped_model_is_no_run_and_lacking_adapters_are_named(package):
    assert all(find_run_model(name) is None for name in SHIPPED)
    assert not model_folder("tiny/sft").exists()
    with pytest.raises(UserError, match="tiny/sft is not in .*make executed"):
        loading.resolve_model("tiny/sft")


@pytest.mark.slow
def test_all_shipped_models_answer_an_example(shipped, tmp_path):
    command = ["ground", "--model", "tiny/grpo", "--example", "3", "--out", f"{tmp_path}/a.png"]
    question, *replies, picture = CliRunner().invoke(cli, command).stdout.splitlines()
    assert question.endswith("images)") and picture == f"picture: {tmp_path}/a.png"
    assert [reply.split(", ")[0] for reply in replies] == ["base", "SFT", "GRPO"]
    assert (tmp_path / "a.png").is_file()
