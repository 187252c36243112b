"""Own data through all stages on smoke parameters, at night."""

import json

import own_questions
import pytest
from command_line import notebooks_in_this_process, output_of
from PIL import Image

from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.sample import read_samples

pytestmark = pytest.mark.nightly
SMOKE = ("run", "--profile", "smoke", "-p", "data", "own.jsonl",
         "-p", "launcher", "", "-p", "per_task", "50")
ONE_DRAWN_SUITE = ("-p", "suites", "{ood_grounding: 0, blink: 0, mmiu: 0}")
NO_DRAWN_SUITE = ("-p", "suites", "{mig_bench: 0, ood_grounding: 0, blink: 0, mmiu: 0}")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """own.jsonl: 60 questions, most with a reply."""
    folder = tmp_path_factory.mktemp("questions")
    own_questions.write_questions(folder, 60, replies=0.7)
    Image.new("RGB", (90, 70), "white").save(folder / "one.png")
    question = {"task": "reasoning", "images": ["one.png", "one.png"], "question": "Find it.",
                "answer": [0.1, 0.2, 0.6, 0.7]}
    (folder / "annotations.json").write_text(json.dumps([question] * 3))
    return folder


@pytest.fixture
def run_here(questions, tmp_path, monkeypatch):
    """Call it with words for mig-kit, given where the questions lie; gives what it printed."""
    monkeypatch.chdir(questions)

    def run(*words) -> str:
        with notebooks_in_this_process():
            return output_of(*words, MIG_KIT_RUNS=str(tmp_path))

    return run


def read_run(folder):
    evaluation = json.loads((folder / "06_evaluate" / "metrics.json").read_text())
    return evaluation, (folder / "07_report" / "report.html").read_text()


def test_rl_from_the_base_needs_images_questions_and_targets_only(run_here, tmp_path):
    words = (*SMOKE, *NO_DRAWN_SUITE, "--run-id", "rl", "-p", "teacher", "none",
             "-p", "start_from", "base", "-p", "data_shares", "[0.0, 0.6, 0.4]")
    run_here(*words)
    folder = tmp_path / "rl"
    assert not (folder / "02_sft").exists() and not (folder / "03_merge").exists()
    evaluation, report = read_run(folder)
    held_out = read_samples(folder / "01_synthesize" / "val.parquet")
    assert evaluation["systems"].keys() == {"base", "grpo"}
    for by_suite in evaluation["systems"].values():
        assert by_suite.keys() == {"own"} and by_suite["own"]["n"] == len(held_out) > 10
    assert evaluation["deltas"].keys() == {"grpo-base"}
    assert "Your data: the held-out part" in report and "GRPO over base" in report
    shown = [sample for sample in held_out if f"<small>{sample.id}</small>" in report]
    assert shown and "MIG-Bench" not in report
    assert "own data (held out)" in run_here("status", "rl")
    assert "own data (held out)" in run_here("table", "rl")
    held_out_file = str(folder / "01_synthesize" / "val.parquet")
    run_here("eval", "--model", "rl", "--suite", "own", "--file", held_out_file, "--out",
             str(tmp_path / "eval"))
    scores = json.loads((tmp_path / "eval" / "eval.json").read_text())["scores"]["strict"]
    assert scores["own"]["score"] == evaluation["systems"]["grpo"]["own"]["score"]
    assert run_here(*words).count("up to date") >= 6, "nothing is run again"


def test_own_traces_need_no_teacher(run_here, questions, tmp_path):
    run_here(*SMOKE, *RECIPE[1:], *ONE_DRAWN_SUITE, "--run-id", "own", "-p", "teacher", "own",
             "-p", "data_shares", "[0.5, 0.25, 0.25]")
    folder = tmp_path / "own"
    evaluation, report = read_run(folder)
    assert list(evaluation["systems"]) == ["base", "sft", "grpo"]
    assert list(evaluation["systems"]["grpo"]) == ["own", "mig_bench"], (
        "own data, then the drawn suites")
    assert "SFT over base" in report and "MIG-Bench-like (drawn)" in report
    traces = json.loads((folder / "01_synthesize" / "metrics.json").read_text())["traces"]
    assert traces["kept"] > 5 and "no reply" not in traces["dropped"]
