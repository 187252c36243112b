"""Threads that draw replies with one model.

A step of a small model is hundreds of operations that are too short for all cores of a CPU to
share. Two of them side by side, on half of the cores each, take less time than one after the other.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def map_in_threads(function: Callable, parts: Iterable, threads: int) -> Iterator:
    """function(part) for every part, in their order, `threads` at a time.

    Each thread has its share of this process's cores. With one thread, or with a GPU, the calls are
    made in this thread, one after the other. The caller sees to it that no call changes what
    another one reads.
    """
    if threads == 1 or torch.cuda.is_available():
        yield from map(function, parts)
        return
    cores = torch.get_num_threads()
    share = max(1, cores // threads)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,))
    try:
        yield from pool.map(function, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # part of what a thread sets is set for all
