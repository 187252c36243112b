"""Every stage of the smoke profile killed (SIGKILL, the kernel with it) at random moments and
started again.

What it leaves must equal, file by file, what an undisturbed run leaves. MIG_KIT_KILLS=20 kills
every stage twenty times; by default once. MIG_KIT_KILLS_PROFILE=tiny does so over the tiny profile,
which takes hours.
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

from mig_kit.pipeline import store

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("MIG_KIT_KILLS", "1"))
PROFILE = os.environ.get("MIG_KIT_KILLS_PROFILE", "smoke")


def start(root, run_id, *stages, **options):
    command = [*CLI, "run", *stages, "--profile", PROFILE, "--run-id", run_id]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "MIG_KIT_RUNS": str(root)}, **options)


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
def undisturbed(request, tmp_path_factory):
    """A folder of runs with an undisturbed one, "whole", and the seconds each of its stages took
    with its kernel.
    """
    if PROFILE == "smoke":  # as deep as that run, for an adapter names its base by a relative path
        smoke_runs = request.getfixturevalue("smoke_runs")
        root = Path(tempfile.mkdtemp(prefix="kills-", dir=smoke_runs.parent))
        shutil.copytree(smoke_runs / "smoke", root / "whole")
    else:
        root = tmp_path_factory.mktemp("kills")
        finish(start(root, "whole"))
    ends = [(root / "whole" / stage / "run.json").stat().st_mtime for stage in store.RECIPE]
    seconds = {stage: end - previous
               for stage, previous, end in zip(store.RECIPE[1:], ends, ends[1:])}
    return root, seconds | {"00_preflight": min(seconds.values())}


def output_hashes(root, run_id, stage):
    """Hashes of what the stage wrote, the marker with its key included: a run's name is no part of
    it.
    """
    return json.loads((root / run_id / stage / "run.json").read_text())["outputs"]


def describe_differences(folder, expected):
    """Lines that differ between two folders' texts, the first few of every file: hashes alone say
    nothing.
    """
    texts = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".jsonl")
                   and path.name not in ("run.json", "started.json"))
    differences = []
    for path in texts:
        name = path.relative_to(folder)
        other = expected / name
        other_lines = other.read_text().splitlines() if other.is_file() else []
        pairs = zip(path.read_text().splitlines(), other_lines, strict=False)
        differences += [f"{name}:{number}: {line[:300]} | {other_line[:300]}"
                        for number, (line, other_line) in enumerate(pairs)
                        if line != other_line][:3]
    return "\n".join(differences)


def check_same_outputs(root, run_id, stage):
    differences = describe_differences(root / run_id / stage, root / "whole" / stage)
    assert output_hashes(root, run_id, stage) == output_hashes(root, "whole", stage), differences


# 00 and 07 leave nothing to go on with, and are never the same bytes: this machine, a run's name
@pytest.mark.parametrize("stage", store.RECIPE[1:-1])
def test_a_killed_stage_ends_as_if_undisturbed(stage, undisturbed):
    root, seconds = undisturbed
    rng, interrupted = random.Random(f"{stage}/{KILLS}"), 0
    for number in range(KILLS):
        run_id = f"{stage}-{number}"
        (root / run_id).mkdir()
        for earlier in store.RECIPE[:store.RECIPE.index(stage)]:
            shutil.copytree(root / "whole" / earlier, root / run_id / earlier)
        folder = root / run_id / stage
        process = start(root, run_id, stage)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * seconds[stage])
        except subprocess.TimeoutExpired:
            kill(process)
            interrupted += 1
            is_finished = (folder / "run.json").exists()
            assert is_finished == folder.exists(), "only what has finished has the stage's name"
        finish(start(root, run_id, stage))
        check_same_outputs(root, run_id, stage)
        shutil.rmtree(root / run_id)
    print(f"{stage}: killed {interrupted} of {KILLS} times before it finished")


def wait_for_kernel(process, patience=60):
    """The kernel that the command has started."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                return child
        time.sleep(0.1)
    raise AssertionError("no kernel was started")


def test_a_kernel_that_dies_is_one_sentence_and_nothing_is_lost(undisturbed):
    root, seconds = undisturbed
    process = start(root, "dead-kernel", "01_synthesize")
    kernel = wait_for_kernel(process)
    time.sleep(0.2 * seconds["01_synthesize"])
    kernel.kill()
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "mig-kit: Kernel died" in output and "Traceback" not in output
    assert not (root / "dead-kernel" / "01_synthesize" / "run.json").exists()
    finish(start(root, "dead-kernel", "01_synthesize"))
    check_same_outputs(root, "dead-kernel", "01_synthesize")


def test_an_interrupt_stops_command_and_kernel(undisturbed):
    root, seconds = undisturbed
    # a shell's background jobs ignore Ctrl-C
    process = start(root, "interrupted", "01_synthesize", start_new_session=True,
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    kernel = wait_for_kernel(process)
    time.sleep(0.2 * seconds["01_synthesize"])
    # as Ctrl-C in a terminal: to the command and its kernel alike
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Traceback" not in output.split("interrupted;")[-1]
    assert not (root / "interrupted" / "01_synthesize" / "run.json").exists()
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()
    finish(start(root, "interrupted", "01_synthesize"))
    check_same_outputs(root, "interrupted", "01_synthesize")
