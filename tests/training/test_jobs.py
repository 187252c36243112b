"""Launchers: what their words say, what is refused, and how a command that fails is told."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import TrainerState

from mig_kit.common import UserError
from mig_kit.pipeline import processes
from mig_kit.training import jobs


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """As on a machine with two cores and no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(jobs, "count_cores", lambda: 2)


@pytest.mark.parametrize(("launcher", "local", "nodes"), [
    ("torchrun --standalone --nproc-per-node 8", 8, 1),
    ("torchrun --nnodes=2 --nproc_per_node=4 --rdzv-backend c10d", 4, 2),
    ("torchrun --nnodes 1:4 --nproc-per-node gpu", 0, 0),
    ("accelerate launch --multi_gpu --num_processes 4 --num_machines 2", 2, 2),
    ("python -m torch.distributed.run --nproc-per-node 2", 2, 1),
    ("env A=1 torchrun", 0, 1)])
def test_words_of_a_launcher(launcher, local, nodes, monkeypatch):
    launch = jobs.plan_launch(launcher)
    assert (launch.local, launch.nodes) == (local, nodes)
    assert launch.words[1:] == (*launcher.split()[1:], "-m", processes.MODULE)
    assert os.access(launch.words[0], os.X_OK)
    monkeypatch.setenv("PATH", "/nowhere")  # programs beside Python come first
    program = jobs.plan_launch("torchrun --nproc-per-node 1").words[0]
    assert os.path.dirname(program) == os.path.dirname(sys.executable)


def test_one_gpu_or_core_needs_no_launcher(monkeypatch):
    two, many = "torchrun --nproc-per-node 2", "torchrun --nproc-per-node 8"
    assert jobs.plan_launch("") is jobs.plan_launch(" ") is None
    monkeypatch.setattr(jobs, "count_cores", lambda: 1)
    assert jobs.plan_launch(two) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert jobs.plan_launch(two) is None
    assert jobs.plan_launch("torchrun --nnodes 2 --nproc-per-node 1").nodes == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert jobs.plan_launch(two).local == 2
    with pytest.raises(ValueError, match="starts 8 processes, and this machine has 4 GPUs"):
        jobs.plan_launch(many)


def save_state(folder, params, **inputs):
    """What a stage's `train` leaves, at least."""
    checkpoint = folder / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    TrainerState(global_step=3, max_steps=3).save_to_json(checkpoint / "trainer_state.json")
    (folder / "inputs.json").write_text(json.dumps(inputs))


@pytest.mark.parametrize("launcher", ["", "python"])
def test_a_job_runs_alike_here_and_launched(launcher, tmp_path, monkeypatch, capsys):
    module = tmp_path / "saving.py"
    module.write_text("import sys; from pathlib import Path\n"
                      "from mig_kit.training import jobs\nfrom test_jobs import save_state\n"
                      "folder = Path(sys.argv[1]); stage, params, inputs = jobs.read_job(folder)\n"
                      "print(stage, params.seed); save_state(folder, params, **inputs)\n")
    tests = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), tests]))
    monkeypatch.setattr(processes, "MODULE", "saving")
    monkeypatch.chdir(tmp_path)
    params = SimpleNamespace(launcher=launcher, gradient_accumulation_steps=4, seed=7)
    state = jobs.run_job(save_state, "05_grpo", tmp_path, params, kept="saving.py", base="a/hub")
    assert state.global_step == 3
    assert json.loads((tmp_path / "inputs.json").read_text()) == {
        "kept": str(module), "base": "a/hub"}
    output = capsys.readouterr().out
    if launcher:
        assert f"bin/python -m saving {tmp_path}" in output and "05_grpo 7\n" in output
    # cells that are run again show it and train nothing
    assert jobs.run_job(pytest.fail, "05_grpo", tmp_path, params).global_step == 3
    assert "this training has ended, and is taken from disk: 3 updates" in capsys.readouterr().out


def test_what_another_launcher_has_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    params = SimpleNamespace(launcher="", gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 .* trains alone; unset it"):
        jobs.run_job(save_state, "05_grpo", tmp_path, params)
    assert not list(tmp_path.iterdir())


def test_a_failure_is_told_by_the_process_that_failed_first(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(RuntimeError, match="status 3:\nits output above says why$"):
        jobs.start_processes(command, tmp_path)
    for error in (KeyError("no image"), RuntimeError("connection closed")):
        try:
            raise error
        except Exception as raised:
            jobs.record_error(tmp_path, raised)
    with pytest.raises(RuntimeError, match="(?s)status 3:\nTraceback .*KeyError: 'no image'\n$"):
        jobs.start_processes(command, tmp_path)
    (tmp_path / jobs.ERROR_FILE).unlink()
    jobs.record_error(tmp_path, UserError("too few; give more"))
    with pytest.raises(UserError, match="^too few; give more$"):
        jobs.start_processes(command, tmp_path)


def test_processes_share_the_cores_unless_it_is_said_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    command = [sys.executable, "-c", "import os; print('has', os.environ['OMP_NUM_THREADS'])"]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    jobs.start_processes(command, tmp_path, 2)
    assert "with: OMP_NUM_THREADS=4 /" in (output := capsys.readouterr().out)
    assert "\nhas 4\n" in output
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    jobs.start_processes(command, tmp_path, 2)
    assert "\nhas 3\n" in capsys.readouterr().out


# leaves its process id and stays
WORKER = """
import os, sys, time
from mig_kit.common import end_with_parent
end_with_parent()
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""


def is_alive(process_id):
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(is_so, what):
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until, what
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sentence"), [
    ("caller", ""), *(pytest.param(*case, marks=pytest.mark.nightly) for case in (
        ("agent", "RuntimeError: the launched training ended with exit status -9"),
        ("worker", "ended with exit status 1:")))])
def test_whoever_of_torchrun_is_killed_leaves_no_process(tmp_path, victim, sentence):
    script, ids = tmp_path / "worker.py", tmp_path / "ids"
    script.write_text(WORKER)
    ids.touch()
    words = [*jobs.plan_launch("torchrun --standalone --nproc-per-node 2").words[:-2], str(script),
             str(ids)]
    code = ("from pathlib import Path; from mig_kit.training import jobs; "
            f"jobs.start_processes({words!r}, Path({str(tmp_path)!r}), 2)")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: ids.read_text().count("\n") == 2, "the processes have not started")
    workers = [psutil.Process(int(text)) for text in ids.read_text().split()]
    agent = workers[0].parent()
    process_ids = [*(worker.pid for worker in workers), agent.pid]
    victims = {"caller": psutil.Process(caller.pid), "agent": agent, "worker": workers[0]}
    victims[victim].kill()
    output = caller.communicate(timeout=60)[0]
    wait_until(lambda: not any(map(is_alive, process_ids)), "a process outlived its caller")
    assert sentence in output
