"""Threads side by side, and processes that train together; what two processes learn is in
test_grpo.
"""

import multiprocessing
import os
import threading
import time

import pytest
import torch
import two_processes
from accelerate import PartialState

from mig_kit.engine import parallel


def test_threads_share_the_cores_and_keep_the_order():
    cores, barrier = torch.get_num_threads(), threading.Barrier(2, timeout=30)

    def count_cores(part):
        return part, torch.get_num_threads()

    def count_cores_in_pairs(part):
        barrier.wait()  # two are under way at a time, or it breaks
        return count_cores(part)

    try:
        torch.set_num_threads(4)
        in_pairs = list(parallel.map_in_threads(count_cores_in_pairs, range(6), 2))
        assert in_pairs == [(part, 2) for part in range(6)]
        assert torch.get_num_threads() == 4
        assert list(parallel.map_in_threads(count_cores, range(2), 1)) == [(0, 4), (1, 4)]
    finally:
        torch.set_num_threads(cores)


def test_an_error_in_a_thread_is_raised_and_ends_the_rest():
    cores, done = torch.get_num_threads(), []

    def fail_at_1(part):
        if part == 1:
            raise KeyError("part 1")
        time.sleep(0.05)
        done.append(part)

    with pytest.raises(KeyError, match="part 1"):
        list(parallel.map_in_threads(fail_at_1, range(40), 2))
    assert len(done) < 39 and torch.get_num_threads() == cores
    with pytest.raises(ValueError, match="workers is 0"):
        list(parallel.map_in_threads(fail_at_1, [], 0))


def test_one_process_is_this_one():
    before = dict(os.environ)
    with parallel.training_processes(1, two_processes.train):
        assert os.environ == before
    with pytest.raises(ValueError, match="processes is 0; use 1"):
        with parallel.training_processes(0, two_processes.train):
            pass


def test_how_many_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    expected = {(0, 4): 2, (0, 3): 1, (3, 4): 3, (1, 4): 1}
    for arguments, count in expected.items():
        assert parallel.count_processes(*arguments) == count
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert parallel.count_processes(0, 4) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [parallel.count_processes(0, steps) for steps in (16, 6, 5)] == [4, 3, 1]
    with pytest.raises(ValueError, match="processes is 5; use 1 to 4, one per GPU"):
        with parallel.training_processes(5, two_processes.train):
            pass


def test_processes_within_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one of several already"):
        with parallel.training_processes(2, two_processes.train):
            pass


@pytest.mark.slow
def test_an_error_in_the_other_process_is_raised_here(tmp_path, random_folder):
    (tmp_path / "fail").touch()
    before, cores, start = dict(os.environ), torch.get_num_threads(), time.monotonic()
    arguments = tmp_path, random_folder, 2
    with pytest.raises(Exception, match="no such thing in the second process"):
        with parallel.training_processes(2, two_processes.train, *arguments):
            two_processes.train(*arguments)
    assert time.monotonic() - start < 100
    assert os.environ == before and torch.get_num_threads() == cores
    assert not torch.distributed.is_initialized()
    assert PartialState().num_processes == 1
    PartialState._reset_state()


@pytest.mark.slow
def test_an_error_here_ends_the_other_process(tmp_path, random_folder):
    arguments = tmp_path, random_folder, 2
    with pytest.raises(ZeroDivisionError):
        with parallel.training_processes(2, two_processes.train, *arguments):
            worker, = multiprocessing.active_children()
            raise ZeroDivisionError
    worker.join(10)
    assert not worker.is_alive()
