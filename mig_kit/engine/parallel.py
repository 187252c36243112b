"""Threads that draw replies with one model, and processes that train one together.

A step of a small model is hundreds of operations that are too short for all cores of a CPU to
share. Two of them side by side, on half of the cores each, take less time than one after the other.
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

TIMEOUT = 120  # seconds that processes get to start, and to end after the first one
HOST = "127.0.0.1"


def map_in_threads(function: Callable, parts: Iterable, threads: int) -> Iterator:
    """function(part) for every part, in their order, `threads` at a time.

    Each thread has its share of this process's cores. With one thread, or with a GPU, the calls are
    made in this thread, one after the other. The caller sees to it that no call changes what
    another one reads. Raises ValueError for fewer than one thread.
    """
    if threads < 1:
        raise ValueError(f"workers is {threads}; use 1 or more")
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


def count_processes(processes: int, steps: int) -> int:
    """Processes to train with: `processes`, or for 0 as many as pay that share `steps` evenly.

    One per GPU pays, and on a CPU two.
    """
    if processes:
        return processes
    most = torch.cuda.device_count() or min(2, torch.get_num_threads())
    return max(count for count in range(1, most + 1) if steps % count == 0)


@contextmanager
def training_processes(processes: int, function: Callable, *arguments) -> Iterator[None]:
    """While it lasts this process is the first of `processes` that train together.

    The others run function(*arguments). All of them are to make the same trainer, which finds the
    others as under torchrun. Each process has one GPU, or its share of the cores. function:
    importable by name; arguments: what pickle takes.

    An error in another process is raised here with its traceback. When this process leaves with an
    error or is killed, the others end, too. Raises ValueError for an impossible number of
    processes, and RuntimeError if one does not start or end within TIMEOUT.
    """
    _check_process_count(processes)
    if processes == 1:
        yield
        return
    cores = torch.get_num_threads()
    share = max(1, cores // processes)
    store = distributed.TCPStore(HOST, 0, processes, True, wait_for_workers=False)
    environment = _torchrun_environment(processes, store.port, share)
    environment_before = dict(os.environ)
    workers = torch.multiprocessing.spawn(
        _worker_main, (store.port, processes, environment, function, arguments), processes - 1,
        join=False)
    try:
        os.environ.update(environment, RANK="0", LOCAL_RANK="0")
        _reset_accelerate_state()
        torch.set_num_threads(share)
        _wait_until_started(store, workers, processes)
        _join_process_group(store, 0, processes)
        try:
            yield
        except RuntimeError:
            # Perhaps the only cause is that a worker failed; then `join` raises its error.
            workers.join(timeout=10)
            raise
        while not workers.join(timeout=TIMEOUT):
            if any(process.is_alive() for process in workers.processes):
                raise RuntimeError("the other processes had not ended "
                                   f"{TIMEOUT} s after the first")
    finally:
        for process in workers.processes:
            process.kill()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        _reset_accelerate_state()
        torch.set_num_threads(cores)
        for name in (*environment, "RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
            if name in environment_before:
                os.environ[name] = environment_before[name]


def _check_process_count(processes: int) -> None:
    """Raise ValueError unless so many processes can train together, this one being the first."""
    gpus = torch.cuda.device_count()
    if processes < 1 or gpus and processes > gpus:
        range_text = f"1 to {gpus}, one per GPU" if gpus else "1 or more"
        raise ValueError(f"processes is {processes}; use {range_text}")
    if processes > 1 and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"processes is {processes} in a process that is one of several already; "
                         "use 1 under torchrun")


def _torchrun_environment(processes: int, port: int, threads: int) -> dict[str, str]:
    """The variables that torchrun would set for all processes alike."""
    environment = {"MASTER_ADDR": HOST, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
                   "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": str(threads)}
    if not torch.cuda.device_count():
        environment["ACCELERATE_USE_CPU"] = "true"
    return environment


def _wait_until_started(store: distributed.TCPStore, workers, processes: int) -> None:
    """Return when all workers have reported; RuntimeError after TIMEOUT, or the error of one."""
    deadline = time.monotonic() + TIMEOUT
    reports = [_report_key(rank) for rank in range(1, processes)]
    while not store.check(reports):
        if workers.join(timeout=0.2) or time.monotonic() > deadline:
            raise RuntimeError(f"{processes} processes did not start within {TIMEOUT} s; "
                               "set processes to 1")


def _report_key(rank: int) -> str:
    """The key under which a worker reports in the store that it has started."""
    return f"started {rank}"


def _worker_main(number: int, port: int, processes: int, environment: dict[str, str],
                 function: Callable, arguments: tuple) -> None:
    """What a spawned process does. number: from 0; the process that spawned it has rank 0."""
    rank = number + 1
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    store = distributed.TCPStore(HOST, port, processes, False)
    store.set(_report_key(rank), "")
    _join_process_group(store, rank, processes)
    function(*arguments)
    distributed.destroy_process_group()


def _join_process_group(store: distributed.TCPStore, rank: int, processes: int) -> None:
    """Become process `rank` of several that have all started."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes,
                                   timeout=timedelta(minutes=30))


def _reset_accelerate_state() -> None:
    """Have accelerate look again how many processes there are."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
