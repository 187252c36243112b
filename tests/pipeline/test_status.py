"""mig-kit status and diff."""

import pytest
from click.testing import CliRunner

from mig_kit.cli import cli
from mig_kit.common import NOTEBOOKS, write_json
from mig_kit.pipeline import status
from mig_kit.pipeline.run_facts import name_column


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
    assert {(row["what"], row["name"]): (row["a"], row["b"]) for row in rows} == {
        ("parameter", "seed"): (0, 1),
        ("input", "01_synthesize/cot.parquet"): ("00000000", "11111111"),
        ("metric", "loss.last"): (41.5, 43.0)}
    result = CliRunner().invoke(cli, ["diff", "a", "b"])
    assert result.exit_code == 0 and result.output.endswith("3 differences\n")
    assert "no difference" in CliRunner().invoke(cli, ["diff", "a", "a"]).output


def test_columns_stand_apart_under_the_runs_names(tmp_path):
    rows = [{"stage": "06_evaluate", "what": "metric", "name": f"{'x' * 60}.acc@0.5", "a": 44.0,
             "b": 46.0},
            {"stage": "02_sft", "what": "parameter", "name": "server", "a": "", "b": "a\nb"}]
    lines = status.format_differences(rows, "first_run", "second_run")
    assert lines[0].split() == ["stage", "what", "name", "first_run", "second_run"]
    assert lines[1].split() == ["06_evaluate", "metric", rows[0]["name"], "44.0", "46.0"]
    assert lines[2].endswith("a b") and lines[2].index("a b") == lines[0].index("second_run")
    assert lines[3] == "2 differences"
    assert status.format_differences([], "a", "b") == ["no difference"]


def test_a_stage_that_only_one_run_has(two_runs):
    (two_runs / "b" / "02_sft" / "run.json").unlink()
    assert status.list_differences("a", "b") == [
        {"stage": "02_sft", "what": "stage", "name": "finished", "a": True, "b": False}
    ]


@pytest.mark.parametrize(("machine", "hardware", "params", "expected"), [
    ("AMD EPYC, Linux, 2 of 2 cores", "CPU, 2 threads, avx512_bf16", {}, "'seed 0, two cores of"),
    ("AMD EPYC, Linux, 1 of 8 cores", "CPU, 1 threads, avx512_bf16", {}, "'one core'"),
    ("Intel Xeon, Linux, 2 of 4 cores", "CPU, amx_bf16", {}, "'Intel Xeon with AMX'"),
    ("Intel Xeon, Linux, 2 of 4 cores", "CPU, 2 threads: float32", {}, "Xeon in float32'"),
    ("AMD EPYC, Linux, 2 of 2 cores", "CPU", {"seed": 3}, "'seeds 0 to 5'"),
    ("AMD EPYC, Linux, 2 of 2 cores", "CPU", {"learning_rate": 1.0}, "(changed: learning_rate)"),
    ("AMD EPYC, Linux, 8 of 8 cores", "CPU", {}, "(AMD EPYC, Linux, 8 of 8 cores)"),
    ("AMD EPYC, Linux, 2 of 2 cores", "NVIDIA A100: bfloat16", {}, "(NVIDIA A100: bfloat16)")])
def test_the_column_of_the_guide(machine, hardware, params, expected):
    records = {"05_grpo": {"machine": machine, "hardware": hardware, "params": params}}
    assert expected in name_column(records)
    if "'" in expected:  # the guide has it
        column = name_column(records).split("'")[1]
        assert f"| {column} |" in (NOTEBOOKS / "guide" / "results.md").read_text()
