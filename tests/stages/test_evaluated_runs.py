"""The last line of `make run`: are the scores the README's?"""

from dataclasses import replace

import pytest

from mig_kit.common import PROJECT_ROOT, UserError
from mig_kit.stages import evaluated_runs
from mig_kit.stages.evaluated_runs import read_recorded


@pytest.fixture
def published(monkeypatch):
    monkeypatch.setattr(evaluated_runs.run_folders, "load_record", lambda *_: {"params": {}})
    monkeypatch.setattr(evaluated_runs, "changed_params", lambda *_: {})
    return read_recorded(str(PROJECT_ROOT / evaluated_runs.README_RECORD))


def line_for(run, published, monkeypatch):
    monkeypatch.setattr(evaluated_runs, "load_groups",
                        lambda groups: ({}, {"run": [run], "readme": [published]}))
    return evaluated_runs.compare_with_readme("default")


def test_equal_scores_and_another_recipe(published, monkeypatch):
    assert line_for(published, published, monkeypatch) == "scores: as in the README"
    monkeypatch.setattr(evaluated_runs, "changed_params", lambda *_: {"05_grpo": {"beta": 1}})
    assert line_for(published, published, monkeypatch) == ""


@pytest.mark.parametrize(("machine", "reason"), [
    ("another CPU, Linux, 1 of 4 cores", "here: another CPU, Linux, 1 of 4 cores; README: "),
    ("", "another version of a library or of the code")])
def test_other_scores_are_named_with_a_reason(machine, reason, published, monkeypatch):
    bits = published.correct["grpo"]["mig_bench"]
    none = {**published.correct, "grpo": {**published.correct["grpo"],
                                          "mig_bench": "0" * len(bits)}}
    run = replace(published, correct=none, machine=machine or published.machine)
    line = line_for(run, published, monkeypatch)
    score = f"{100 * bits.count('1') / len(bits):.1f}"
    assert f"MIG-Bench-like (drawn) grpo 0.0 (README: {score})" in line
    assert reason in line and "BLINK" not in line


def test_why_scores_cannot_be_compared_is_said(published, monkeypatch):
    def refuse(groups):
        raise UserError("the runs answered other questions")

    monkeypatch.setattr(evaluated_runs, "load_groups", refuse)
    assert evaluated_runs.compare_with_readme("default") == (
        "scores: not compared with the README's: the runs answered other questions")
