"""mig-kit status and diff."""

import pytest
from command_line import output_of

from mig_kit.common import write_json
from mig_kit.pipeline import status


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    for run_id, seed, score in (("a", 0, 41.5), ("b", 1, 43.0)):
        folder = tmp_path / run_id / "02_sft"
        folder.mkdir(parents=True)
        many = dict.fromkeys(map(str, range(99)), seed)
        write_json(folder / "metrics.json", {
            "loss": {"last": score}, "steps": 7, "curve": [1, 2], "rates": many})
        write_json(folder / "run.json", {
            "params": {"run_id": run_id, "seed": seed, "epochs": 2.0},
            "inputs": {"01_synthesize": {"cot.parquet": f"{seed}" * 64, "started.json": run_id}},
            "versions": {"torch": "2.13.0"}, "machine": "x", "hardware": "CPU", "git": "",
            "outputs": {}})
    return tmp_path


def test_only_what_differs_is_named(two_runs):
    rows = status.list_differences("a", "b")
    assert {row["name"]: (row["a"], row["b"]) for row in rows} == {
        "parameter seed": (0, 1), "metric loss.last": (41.5, 43.0),
        "input 01_synthesize/cot.parquet": ("00000000", "11111111")}
    assert output_of("diff", "a", "b").endswith("3 differences, 1 of them other metrics (--all)\n")
    assert "metric loss.last                 41.5" in output_of("diff", "a", "b", "--all")
    assert "no difference" in output_of("diff", "a", "a")


def test_columns_stand_apart_under_the_runs_names(tmp_path):
    rows = [{"stage": "06_evaluate", "name": f"metric systems.{'x' * 60}.mig_bench.score",
             "a": 44.123456, "b": 46.0},
            {"stage": "06_evaluate", "name": "metric n", "a": 1.00001234, "b": 1.00002},
            {"stage": "02_sft", "name": "parameter server", "a": "", "b": "a\nb"}]
    lines = status.format_differences(rows, "first_run", "second_run", with_metrics=True)
    assert lines[0].split() == ["stage", "name", "first_run", "second_run"]
    assert lines[1].endswith("a b") and lines[1].index("a b") == lines[0].index("second_run")
    assert lines[2].split()[-2:] == ["1.00001", "1.00002"], "as many digits as differ"
    assert lines[3].split() == ["06_evaluate", *rows[0]["name"].split(), "44.12", "46"], "last"
    assert lines[4] == "3 differences"


def test_a_stage_that_only_one_run_has(two_runs):
    (two_runs / "b" / "02_sft" / "run.json").unlink()
    assert status.list_differences("a", "b") == [
        {"stage": "02_sft", "name": "finished", "a": True, "b": False}]
