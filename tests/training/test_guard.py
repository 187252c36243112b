"""Nothing outlives its caller: the guard with plain processes, and with torchrun's."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from mig_kit.training import jobs

# leaves its process id, then that of a process in a session of its own, and stays, SIGTERM or not
FAMILY = """
import os, signal, subprocess, sys, time
if len(sys.argv) == 2:
    subprocess.Popen([sys.executable, __file__, sys.argv[1], "child"], start_new_session=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""
GUARD = [sys.executable, "-m", "mig_kit.training.guard"]


@pytest.fixture
def family(tmp_path):
    """(the command of a program with a child, a function that waits for both process ids)."""
    script, ids = tmp_path / "family.py", tmp_path / "ids"
    script.write_text(FAMILY)

    def wait_for_ids(count=2):
        until = time.monotonic() + 60
        while not ids.is_file() or len(ids.read_text().split()) < count:
            assert time.monotonic() < until, "the processes have not started"
            time.sleep(0.05)
        return [int(text) for text in ids.read_text().split()]

    return [sys.executable, str(script), str(ids)], wait_for_ids


def check_ended(process_ids):
    until = time.monotonic() + 30
    while alive := [number for number in process_ids if is_alive(number)]:
        assert time.monotonic() < until, f"{alive} outlived their caller"
        time.sleep(0.1)


def is_alive(process_id):
    try:
        return psutil.Process(process_id).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_status_and_output_are_the_commands():
    for code, status in (("print('x')", 0), ("raise SystemExit(3)", 3),
                         ("import os; os.kill(os.getpid(), 9)", 137)):
        read_end, write_end = os.pipe()  # open: the caller is alive
        result = subprocess.run([*GUARD, sys.executable, "-c", code], stdin=read_end,
                                capture_output=True, text=True)
        os.close(read_end), os.close(write_end)
        assert result.returncode == status
        assert result.stdout == ("x\n" if status == 0 else "")


def test_a_closed_input_ends_all_of_a_command(family):
    command, wait_for_ids = family
    process = subprocess.Popen([*GUARD, *command], stdin=subprocess.PIPE)
    process_ids = wait_for_ids()
    process.stdin.close()
    assert process.wait(timeout=30)
    check_ended(process_ids)


def test_orphans_end_with_the_command(family):
    command, wait_for_ids = family
    process = subprocess.Popen([*GUARD, *command], stdin=subprocess.PIPE)
    process_ids = wait_for_ids()
    parent = next(number for number in process_ids
                  if psutil.Process(number).ppid() == process.pid)
    os.kill(parent, signal.SIGKILL)
    assert process.wait(timeout=30) == 128 + signal.SIGKILL
    check_ended(process_ids)


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "sentence"), [
    ("caller", ""), ("agent", "RuntimeError: the launched training ended with exit status 137"),
    ("worker", "ended with exit status 1:")])
def test_whoever_of_torchrun_is_killed_leaves_no_process(family, tmp_path, victim, sentence):
    command, wait_for_ids = family
    launcher = jobs.plan_launch("torchrun --standalone --nproc-per-node 2")
    words = [*launcher.words, *command[1:], "child"]
    folder = str(tmp_path)
    code = ("from pathlib import Path; from mig_kit.training import jobs; "
            f"jobs.run_command({words!r}, Path({folder!r}), 2)")
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)
    workers = [psutil.Process(number) for number in wait_for_ids()]
    agent = workers[0].parent()
    process_ids = [worker.pid for worker in workers] + [agent.pid, agent.ppid()]
    victims = {"caller": psutil.Process(caller.pid), "agent": agent, "worker": workers[0]}
    victims[victim].kill()
    output = caller.communicate(timeout=60)[0]
    check_ended(process_ids)
    assert sentence in output


def test_the_guard_is_light():
    """It starts with every training, so that it must not load torch."""
    code = "import sys, mig_kit.training.guard; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
