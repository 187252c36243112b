"""A variant of 05 from a finished run: one command, and the run that it starts from stays as it is.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from hashlib import sha256

import nbformat
import pytest
from command_line import run_mig_kit

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store
from mig_kit.pipeline.execute import choose_params

pytestmark = pytest.mark.slow
VARIANT = ("run", "05", "06", "--from", "smoke", "--run-id", "variant", "--profile", "smoke",
           "-p", "loss_type", "dr_grpo")


@pytest.fixture(scope="module")
def runs(smoke_runs, tmp_path_factory):
    """A folder of runs with a copy of the smoke run and a variant of it, trained by two processes.
    """
    root = tmp_path_factory.mktemp("variants")
    shutil.copytree(smoke_runs / "smoke", root / "smoke")
    before = describe_files(root / "smoke")
    launcher = ("-p", "launcher", "torchrun --standalone --nproc-per-node 2")
    result = run_mig_kit(*VARIANT, *launcher, MIG_KIT_RUNS=str(root))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    assert describe_files(root / "smoke") == before, "a variant changed its source"
    return root


def describe_files(folder):
    """Hash and time of every file but the lock, which names the last process that wrote there."""
    return {path: (sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


def test_a_variant_is_one_command_and_has_its_own_stages_alone(runs):
    folders = {path.name for path in (runs / "variant").iterdir() if path.is_dir()}
    assert folders == {"05_grpo", "06_evaluate"}
    keys = {stage: json.loads((runs / "smoke" / stage / "run.json").read_text())["key"]
            for stage in store.RECIPE[1:5]}
    for stage in folders:
        record = json.loads((runs / "variant" / stage / "run.json").read_text())
        assert record["branch"] == {"from": "smoke", "stages": keys}
        if stage == "06_evaluate":
            assert record["inputs"].keys() == {"01_synthesize", "03_merge", "05_grpo"}
            assert record["taken"] == {f"{system} {kind}": "smoke" for system in ("base", "sft")
                                       for kind in ("greedy", "drawn")}
    first, second = (json.loads((runs / run / "05_grpo" / "run.json").read_text())
                     for run in ("smoke", "variant"))
    assert first["params"]["loss_type"] == "dapo" and second["params"]["loss_type"] == "dr_grpo"
    assert first["inputs"]["03_merge"].items() >= second["inputs"]["03_merge"].items()
    adapter = json.loads((runs / "variant/05_grpo/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "../../../smoke/03_merge/merged"


def test_a_notebook_stopped_with_other_parameters_leaves_what_has_finished(runs, tmp_path):
    """Its first cells, as stepped through in JupyterLab, up to the training; then the kernel ends.
    """
    before = describe_files(runs / "smoke")
    notebook = nbformat.read(PROJECT_ROOT / "notebooks" / "05_grpo.ipynb", 4)
    training = next(number for number, cell in enumerate(notebook.cells)
                    if "jobs.run_job" in cell.source)
    notebook.cells = notebook.cells[:training + 1]
    nbformat.write(notebook, tmp_path / "steps.ipynb")
    values = choose_params("05_grpo", "smoke", "smoke", {"max_steps": 1})
    script = (f"import papermill; papermill.execute_notebook({str(tmp_path / 'steps.ipynb')!r}, "
              f"{str(tmp_path / 'out.ipynb')!r}, {values!r}, progress_bar=False)")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path,
                   env={**os.environ, "MIG_KIT_RUNS": str(runs)})
    assert "finishing it replaces 05_grpo of run 'smoke' (reward " in (
        tmp_path / "out.ipynb").read_text()
    after = describe_files(runs / "smoke")
    assert {path: after[path] for path in before} == before
    attempt, = {path.relative_to(runs / "smoke").parts[0] for path in after.keys() - before.keys()}
    assert (runs / "smoke" / attempt / "adapter").is_dir()
    lines = run_mig_kit("status", "smoke", MIG_KIT_RUNS=str(runs)).stdout
    assert not re.search("not finished|stale|running", lines), lines
    shutil.rmtree(runs / "smoke" / attempt)


def test_a_variant_goes_on_without_its_sources_name(runs):
    """What is up to date is skipped; report, table and differences take earlier stages from there.
    """
    words = [word for word in VARIANT if word not in ("--from", "smoke")]
    words[words.index("--profile") + 1:words.index("--profile") + 1] = ["smoke"]
    again = run_mig_kit(*words, MIG_KIT_RUNS=str(runs))
    assert again.stdout.count("up to date") == 2, again.stderr
    words = ("run", "07", "--run-id", "variant", "--profile", "smoke")
    report = run_mig_kit(*words, MIG_KIT_RUNS=str(runs))
    assert report.returncode == 0, report.stderr[-3000:]
    assert (runs / "variant" / "07_report" / "report.html").is_file()
    table = run_mig_kit("table", "smoke", "variant", MIG_KIT_RUNS=str(runs))
    assert "\n| variant | 1 | " in table.stdout, table.stderr
    difference = run_mig_kit("diff", "smoke", "variant", MIG_KIT_RUNS=str(runs))
    stages = {line.split()[0] for line in difference.stdout.splitlines()[:-1]}
    assert "05_grpo" in stages and not stages & set(store.RECIPE[1:5])
    lines = run_mig_kit("status", MIG_KIT_RUNS=str(runs)).stdout.splitlines()
    assert lines[lines.index("  variant") + 1] == "    01 to 04 of smoke"


def test_only_replies_that_would_be_the_same_are_taken(runs):
    """With another seed of 06 the greedy ones alone, and nothing with another longest reply; what
    was taken equals what the source drew.
    """
    drawn, taken = (runs / run / "06_evaluate" / "replies" for run in ("smoke", "variant"))
    for name in ("base_mig_bench_greedy.jsonl", "sft_mmiu_drawn.jsonl"):
        assert (taken / name).read_bytes() == (drawn / name).read_bytes()
    words = [word for word in VARIANT if word != "05"]
    words[words.index("--from") + 1], words[words.index("--run-id") + 1] = "variant", "reseeded"
    words[-2:] = ["seed", "9"]
    result = run_mig_kit(*words, MIG_KIT_RUNS=str(runs))
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((runs / "reseeded" / "06_evaluate" / "run.json").read_text())
    other = runs / "reseeded" / "06_evaluate" / "replies" / "sft_mmiu_drawn.jsonl"
    assert record["taken"] == {"base greedy": "variant", "sft greedy": "variant",
                               "grpo greedy": "variant"}
    assert other.read_bytes() != (drawn / other.name).read_bytes()
    shorter = [*words[:words.index("--run-id")], "--run-id", "shorter", "--profile", "smoke",
               "-p", "max_new_tokens", "20", "-p", "replies", "0"]
    result = run_mig_kit(*shorter, MIG_KIT_RUNS=str(runs))
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((runs / "shorter" / "06_evaluate" / "run.json").read_text())
    assert record["taken"] == {}
