"""Stages killed at random moments, the kernel with them, and started again: the same files.

`MIG_KIT_KILLS=20 pytest -m "slow or nightly" tests/test_kills.py` kills each twenty times.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from command_line import CLI

from mig_kit.pipeline import run_folders
from mig_kit.pipeline.run_folders import RECIPE

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MIG_KIT_KILLS", "1"))


def start(root, run_id, *stages, **options):
    """Its kernels are the kit's own, though Jupyter knows a python3 that is another's."""
    kernel = root.with_name("jupyter") / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    kernel.write_text(json.dumps(
        {"argv": ["/bin/false"], "display_name": "Python 3", "language": "python"}))
    command = [*CLI, "run", *stages, "--profile", "smoke", "--run-id", run_id]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "MIG_KIT_RUNS": str(root),
                                 "JUPYTER_PATH": str(kernel.parents[2])}, **options)


def finish(process):
    output = process.communicate(timeout=3600)[0]
    assert process.returncode == 0, output[-3000:]


def kill(process):
    """Kill the command and everything it started, at once."""
    parent = psutil.Process(process.pid)
    family = [*parent.children(recursive=True), parent]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(smoke_runs):
    """(folder with a run "whole", stage -> seconds); as deep as the smoke run."""
    root = Path(tempfile.mkdtemp(prefix="kills-", dir=smoke_runs.parent))
    shutil.copytree(smoke_runs / "smoke", root / "whole")
    ends = [(root / "whole" / stage / "run.json").stat().st_mtime for stage in RECIPE]
    return root, {stage: end - previous
                  for stage, previous, end in zip(RECIPE[1:], ends, ends[1:])}


def check_same_outputs(root, run_id, stage):
    """Hashes of what the stage wrote, the marker with its key included."""
    outputs, expected = (json.loads((root / run / stage / "run.json").read_text())["outputs"]
                         for run in (run_id, "whole"))
    assert outputs == expected


def wait_for_kernel(process, run, patience=120):
    """The kernel, once it has begun its stage: its imports take longer than what is killed."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "ipykernel_launcher" in " ".join(child.cmdline()) and run_folders.is_locked(run):
                return child
        time.sleep(0.1)
    raise AssertionError("no kernel has begun its stage")


def see_nothing_finished(folder):
    assert folder.exists() == (folder / "run.json").exists(), "a stage's name means finished"


# 00 and 07 leave nothing to go on with, and are never the same bytes: this machine, a run's name
@pytest.mark.parametrize("stage", [
    "05_grpo", *(pytest.param(stage, marks=pytest.mark.nightly) for stage in (
        "02_sft", "03_merge", "04_rejection_sampling", "06_evaluate"))])
def test_a_killed_stage_ends_as_if_undisturbed(stage, undisturbed):
    root, seconds = undisturbed
    rng = random.Random(f"{stage}/{KILLS}")
    for number in range(KILLS):
        run_id = f"{stage}-{number}"
        (root / run_id).mkdir()
        for earlier in RECIPE[:RECIPE.index(stage)]:
            shutil.copytree(root / "whole" / earlier, root / run_id / earlier)
        process = start(root, run_id, stage)
        wait_for_kernel(process, root / run_id)
        try:
            process.wait(timeout=rng.uniform(0.1, 0.9) * seconds[stage])
        except subprocess.TimeoutExpired:
            kill(process)
        see_nothing_finished(root / run_id / stage)
        finish(start(root, run_id, stage))
        check_same_outputs(root, run_id, stage)
        shutil.rmtree(root / run_id)


def test_however_01_is_stopped_it_ends_as_if_undisturbed(undisturbed):
    """A kernel that is killed and Ctrl-C are one sentence each."""
    root, seconds = undisturbed
    folder = root / "stopped" / "01_synthesize"
    process = start(root, "stopped", "01_synthesize")
    kernel = wait_for_kernel(process, folder.parent)
    time.sleep(0.2 * seconds["01_synthesize"])
    kernel.kill()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "the kernel of 01_synthesize died" in output and "Traceback" not in output
    see_nothing_finished(folder)

    # a shell's background jobs ignore Ctrl-C
    process = start(root, "stopped", "01_synthesize", start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    kernel = wait_for_kernel(process, folder.parent)
    time.sleep(0.2 * seconds["01_synthesize"])
    # as Ctrl-C in a terminal: to the command and its kernel alike
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Traceback" not in output.split("interrupted;")[-1]
    see_nothing_finished(folder)
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()
    finish(start(root, "stopped", "01_synthesize"))
    check_same_outputs(root, "stopped", "01_synthesize")
