"""Batches of replies side by side; the files themselves: stages/test_rejection_sampling.py."""

import threading
import time

import pytest
import torch

from mig_kit.serving import reply_files


def test_threads_share_the_cores_and_keep_the_order():
    cores, barrier = torch.get_num_threads(), threading.Barrier(2, timeout=30)

    def count_cores(part):
        return part, torch.get_num_threads()

    def count_cores_in_pairs(part):
        barrier.wait()  # two are under way at a time, or it breaks
        return count_cores(part)

    try:
        torch.set_num_threads(4)
        in_pairs = list(reply_files.map_in_threads(count_cores_in_pairs, range(6), 2))
        assert in_pairs == [(part, 2) for part in range(6)]
        assert torch.get_num_threads() == 4
        assert list(reply_files.map_in_threads(count_cores, range(2), 1)) == [(0, 4), (1, 4)]
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
        list(reply_files.map_in_threads(fail_at_1, range(40), 2))
    assert len(done) < 39 and torch.get_num_threads() == cores
