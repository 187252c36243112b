"""Stages 02 and 05 on the random model, trained by processes that a launcher starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import launched
import psutil
import pytest
from safetensors.torch import load_file

from mig_kit.common import UserError
from mig_kit.pipeline import processes
from mig_kit.stages import launched_worker
from mig_kit.training import jobs, resuming

pytestmark = pytest.mark.slow
TESTS = str(Path(launched.__file__).parent)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, random_folder):
    """Call it with a stage for the folder in which this process alone has trained it."""
    root = tmp_path_factory.mktemp("alone")

    def train_once(stage, **changes):
        folder = root / f"{stage}{len(changes)}"
        if not folder.is_dir():
            launched.run(stage, folder, random_folder, "", **changes)
        return folder

    return train_once


@pytest.fixture
def launch(monkeypatch, tmp_path, random_folder):
    """Call it with a stage and a launcher for the folder of a job that it has trained."""
    monkeypatch.setattr(processes, "MODULE", "launched")
    monkeypatch.setattr(jobs, "count_cores", lambda: 2)
    monkeypatch.setenv("PYTHONPATH", TESTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def launch_job(stage, launcher, **changes):
        launched.run(stage, tmp_path / stage, random_folder, launcher, **changes)
        return tmp_path / stage

    return launch_job


def check_same_training(folder, expected, processes):
    """Gradients, adapters, losses and what was drawn are those of one process, to rounding."""
    names = [f"gradients-{rank}.safetensors" for rank in range(processes)]
    for name in [*names, "adapter/adapter_model.safetensors"]:
        expected_name = "gradients-0.safetensors" if name in names else name
        tensors, one = load_file(folder / name), load_file(expected / expected_name)
        assert tensors.keys() == one.keys() and len(one) == 16
        for key, tensor in one.items():
            assert tensor.any() and (tensors[key] - tensor).norm() <= 1e-4 * tensor.norm(), key
    drawn = [json.loads((folder / f"drawn-{rank}.json").read_text()) for rank in range(processes)]
    one = json.loads((expected / "drawn-0.json").read_text())
    for name, values in one.items():  # an update's rows are dealt in equal parts
        size = len(values) // 2
        parts = [[process[name][part * size // processes:(part + 1) * size // processes]
                  for process in drawn] for part in range(2)]
        assert sum(sum(parts, []), []) == values


def losses(folder):
    state = json.loads(Path(resuming.last_checkpoint(folder), "trainer_state.json").read_text())
    return [row["loss"] for row in state["log_history"] if "loss" in row]


LEARN_TWICE = {"num_iterations": 2, "max_steps": 4, "epsilon": 0.01,
               "advantage": "notebooks/guide/advantages.py:rloo"}  # of rewards that are gathered


@pytest.mark.parametrize(("stage", "launcher", "changes"), [
    ("05_grpo", launched.TORCHRUN, LEARN_TWICE),
    pytest.param("02_sft", "accelerate launch --multi_gpu --num_processes 2 --num_machines 1 "
                 "--mixed_precision no --dynamo_backend no --main_process_port 0", {},
                 marks=pytest.mark.nightly)])
def test_two_processes_train_as_one_does(stage, launcher, changes, launch, alone):
    folder, expected = launch(stage, launcher, **changes), alone(stage, **changes)
    check_same_training(folder, expected, 2)
    assert losses(folder) == pytest.approx(losses(expected), abs=2e-4)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.mark.nightly
def test_two_nodes_train_as_one_process_does(launch, alone, tmp_path):
    """The other node is told the command that the notebook prints."""
    launcher = ("torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id 1 "
                f"--rdzv-endpoint 127.0.0.1:{free_port()}")
    command = [*jobs.plan_launch(launcher).words, str(tmp_path / "02_sft")]

    def train_elsewhere():
        while not (tmp_path / "02_sft" / jobs.JOB_FILE).is_file():
            time.sleep(0.1)
        subprocess.run(command, check=True)

    node = threading.Thread(target=train_elsewhere)
    node.start()
    folder = launch("02_sft", launcher)
    node.join()
    check_same_training(folder, alone("02_sft"), 2)


@pytest.mark.nightly
@pytest.mark.parametrize(("stage", "changes", "update"), [
    ("02_sft", {}, 4), ("05_grpo", {"max_steps": 9, "rewards": ["format"]}, 6)])
def test_killed_in_the_second_pass_and_started_again_it_trains_as_if_undisturbed(
        stage, changes, update, launch, alone, tmp_path, random_folder):
    """A pass has 3 updates in 02 and 5 in 05."""
    folder = tmp_path / stage
    code = ("import launched; from pathlib import Path; from mig_kit.pipeline import processes; "
            "processes.MODULE = 'launched'; "
            f"launched.run({stage!r}, Path({str(folder)!r}), Path({str(random_folder)!r}), "
            f"{launched.TORCHRUN!r}, **{changes!r})")
    notebook = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 300
    while not is_saved(folder, update):
        assert time.monotonic() < until and notebook.poll() is None
        time.sleep(0.02)
    family = psutil.Process(notebook.pid).children(recursive=True)
    os.kill(notebook.pid, signal.SIGKILL)
    notebook.wait()
    assert len(family) >= 3, "agent and two workers"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive and not (folder / "adapter").exists()
    launch(stage, launched.TORCHRUN, **changes)
    expected = alone(stage, **changes)
    one = load_file(expected / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
        assert (tensor - one[name]).norm() <= 1e-4 * one[name].norm(), name
    assert losses(folder) == pytest.approx(losses(expected), abs=2e-4)


def is_saved(folder, update):
    checkpoint = resuming.last_checkpoint(folder)
    return checkpoint is not None and int(checkpoint.rpartition("-")[2]) >= update


def test_a_process_that_fails_says_why_in_the_stage_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    with pytest.raises(UserError):
        launched_worker.main()
    error = json.loads((tmp_path / jobs.ERROR_FILE).read_text())
    assert error["is_user_error"] and "job.json; the stage's notebook" in error["text"]
