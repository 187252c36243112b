"""Several at once: threads that draw replies with one model, and processes that train one.

A step of a small model is hundreds of operations too short for all cores of a CPU to share. Two of them side by side, each on half
of the cores, take less time than one after the other.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import distributed

PATIENCE = 120  # seconds that processes get to start, and to end after the first


HOST = "127.0.0.1"


def map_in_threads(function: Callable, parts: Iterable, threads: int) -> Iterator:
    """function(part) for every part, in their order, `threads` at a time, each on its share of this process's cores.

    One thread, or a GPU: here, one after the other. The caller sees to it that no call changes what another one reads. Raises
    ValueError for fewer than one thread.
    """
    if threads < 1:
        raise ValueError(f"workers is {threads}; use 1 or more")
    if threads == 1 or torch.cuda.is_available():
        yield from map(function, parts)
        return
    cores = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),))
    try:
        yield from pool.map(function, parts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(cores)  # part of what a thread sets is set for all


def count_processes(asked: int, steps: int) -> int:
    """Processes to train with: `asked`, or for 0 one per GPU, on a CPU two, the most of them that share `steps` evenly."""
    if asked:
        return asked
    most = torch.cuda.device_count() or min(2, torch.get_num_threads())
    return max(n for n in range(1, most + 1) if steps % n == 0)


def _join_process_group(store, rank: int, processes: int) -> None:
    """Be process `rank` of several, all of which are there."""
    kind = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(kind, store=store, rank=rank, world_size=processes, timeout=timedelta(minutes=30))


def _worker_main(number: int, port: int, processes: int, environment: dict, function: Callable, given: tuple) -> None:
    """What a spawned process does; the one that spawned it is the first, this one is number + 1."""
    rank = number + 1
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    store = distributed.TCPStore(HOST, port, processes, False)
    store.set(f"here {rank}", "")
    _join_process_group(store, rank, processes)
    function(*given)
    distributed.destroy_process_group()


@contextmanager
def training_processes(processes: int, function: Callable, *given) -> Iterator[None]:
    """While it lasts this process is the first of `processes` that train together; the others run function(*given).

    All are to make the same trainer, which finds the others as under torchrun. One process per GPU, or each on its share of the
    cores. function: importable by name; given: what pickle takes. An error in another process is raised here with its traceback;
    when this process leaves with an error or is killed, so do the others. Raises ValueError for a number that cannot be had.
    """
    gpus = torch.cuda.device_count()
    if processes < 1 or gpus and processes > gpus:
        raise ValueError(f"processes is {processes}; use 1{f' to {gpus}, one per GPU' if gpus else ' or more'}")
    if processes == 1:
        yield
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"processes is {processes} in a process that is one of several already; use 1 under torchrun")
    cores = torch.get_num_threads()
    store = distributed.TCPStore(HOST, 0, processes, True, wait_for_workers=False)
    environment = {"MASTER_ADDR": HOST, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
                   "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(max(1, cores // processes))}
    environment |= {} if gpus else {"ACCELERATE_USE_CPU": "true"}
    here = environment | {"RANK": "0", "LOCAL_RANK": "0"}
    before = {name: os.environ.get(name) for name in here}
    others = torch.multiprocessing.spawn(_worker_main, (store.port, processes, environment, function, given), processes - 1, join=False)
    try:
        os.environ.update(here)
        _reset_accelerate_state()
        torch.set_num_threads(max(1, cores // processes))
        end, names = time.monotonic() + PATIENCE, [f"here {rank}" for rank in range(1, processes)]
        while not store.check(names):
            if others.join(timeout=0.2) or time.monotonic() > end:
                raise RuntimeError(f"{processes} processes did not start within {PATIENCE} s; set processes to 1")
        _join_process_group(store, 0, processes)
        try:
            yield
        except RuntimeError:  # perhaps only because another one failed, whose error is then raised
            others.join(timeout=10)
            raise
        while not others.join(timeout=PATIENCE):
            if any(process.is_alive() for process in others.processes):
                raise RuntimeError(f"the other processes had not ended {PATIENCE} s after the first")
    finally:
        for process in others.processes:
            process.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        _reset_accelerate_state()
        torch.set_num_threads(cores)
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def _reset_accelerate_state() -> None:
    """Have accelerate look anew how many processes there are."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
