"""Every stage of the smoke profile killed (SIGKILL, the kernel with it) at random moments and started again.

What it leaves must equal, file by file, what an undisturbed run leaves. MIG_KIT_KILLS=20 kills every stage twenty times;
by default once. MIG_KIT_KILLS_PROFILE=tiny does so over the tiny profile, which takes hours.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mig_kit.pipeline import store

pytestmark = pytest.mark.slow
KILLS, PROFILE = int(os.environ.get("MIG_KIT_KILLS", "1")), os.environ.get("MIG_KIT_KILLS_PROFILE", "smoke")
COMMAND = [sys.executable, "-c", "from mig_kit.cli import main; main()", "run"]


def start(root, run_id, *stages, **more):
    return subprocess.Popen([*COMMAND, *stages, "--profile", PROFILE, "--run-id", run_id], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, "MIG_KIT_RUNS": str(root)}, **more)


def finish(process):
    said = process.communicate(timeout=3600)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def kill(process):
    """The command and everything it started, at once."""
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    """A folder of runs with an undisturbed one, "whole", and the seconds each of its stages took with its kernel."""
    root = tmp_path_factory.mktemp("kills")
    if PROFILE == "smoke":
        shutil.copytree(request.getfixturevalue("smoke_runs") / "smoke", root / "whole")
    else:
        finish(start(root, "whole"))
    ended = [(root / "whole" / stage / "run.json").stat().st_mtime for stage in store.RECIPE]
    took = dict(zip(store.RECIPE[1:], (after - before for before, after in zip(ended, ended[1:]))))
    return root, took | {"00_preflight": min(took.values())}


def outputs(root, run_id, stage):
    """Hashes of what the stage wrote, but for the marker that holds its key, in which the run's name is."""
    found = json.loads((root / run_id / stage / "run.json").read_text())["outputs"]
    return {name: digest for name, digest in found.items() if name != "started.json"}


def differing(one, other):
    """Lines that differ between two folders' texts, the first few of every file: hashes alone say nothing."""
    said = []
    for path in sorted(p for p in one.rglob("*") if p.suffix in (".json", ".jsonl") and p.name not in ("run.json", "started.json")):
        there = other / path.relative_to(one)
        pairs = zip(path.read_text().splitlines(), there.read_text().splitlines() if there.is_file() else [], strict=False)
        said += [f"{path.relative_to(one)}:{number}: {a[:300]} | {b[:300]}" for number, (a, b) in enumerate(pairs) if a != b][:3]
    return "\n".join(said)


@pytest.mark.parametrize("stage", store.RECIPE)
def test_a_killed_stage_ends_as_if_undisturbed(stage, undisturbed):
    root, took = undisturbed
    rng, interrupted = random.Random(f"{stage}/{KILLS}"), 0
    for number in range(KILLS):
        run_id = f"{stage}-{number}"
        (root / run_id).mkdir()
        for before in store.RECIPE[:store.RECIPE.index(stage)]:
            shutil.copytree(root / "whole" / before, root / run_id / before)
        process = start(root, run_id, stage)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * took[stage])
        except subprocess.TimeoutExpired:
            kill(process)
            interrupted += 1
            assert not (root / run_id / stage / "run.json").exists() or not list((root / run_id / stage).glob("*.tmp"))
        finish(start(root, run_id, stage))
        if stage not in ("00_preflight", "07_report"):  # what this machine has, and a page that names its run
            assert outputs(root, run_id, stage) == outputs(root, "whole", stage), differing(root / run_id / stage,
                                                                                            root / "whole" / stage)
        shutil.rmtree(root / run_id)
    print(f"{stage}: killed {interrupted} of {KILLS} times before it finished")


def kernel_of(process, patience=60):
    """The kernel that the command has started."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        for child in psutil.Process(process.pid).children(recursive=True):
            if "ipykernel_launcher" in " ".join(child.cmdline()):
                return child
        time.sleep(0.1)
    raise AssertionError("no kernel was started")


def test_a_kernel_that_dies_is_one_sentence_and_nothing_is_lost(undisturbed):
    root, took = undisturbed
    process = start(root, "dead-kernel", "01_synthesize")
    kernel = kernel_of(process)
    time.sleep(0.2 * took["01_synthesize"])
    kernel.kill()
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "mig-kit: Kernel died" in said and "Traceback" not in said
    assert not (root / "dead-kernel" / "01_synthesize" / "run.json").exists()
    finish(start(root, "dead-kernel", "01_synthesize"))
    assert outputs(root, "dead-kernel", "01_synthesize") == outputs(root, "whole", "01_synthesize")


def test_an_interrupt_stops_command_and_kernel(undisturbed):
    root, took = undisturbed
    process = start(root, "interrupted", "01_synthesize", start_new_session=True,  # a shell's background jobs ignore Ctrl-C
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    kernel = kernel_of(process)
    time.sleep(0.2 * took["01_synthesize"])
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to the command and its kernel alike
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "Traceback" not in said.split("interrupted;")[-1]
    assert not (root / "interrupted" / "01_synthesize" / "run.json").exists()
    psutil.wait_procs([kernel], timeout=30)
    assert not kernel.is_running()
    finish(start(root, "interrupted", "01_synthesize"))
    assert outputs(root, "interrupted", "01_synthesize") == outputs(root, "whole", "01_synthesize")
