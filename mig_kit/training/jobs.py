"""Training jobs of stages 02 and 05: `run_job` calls the stage's `train`, here or launched.

Without a launcher it is called in this process. With one, such as `torchrun --standalone
--nproc-per-node 8`, each process that it starts, on any node, reads job.json from the stage folder
and calls the same `train` (`stages.launched_worker`). Launcher and processes end with their parent.
"""

import gc
import json
import os
import shlex
import subprocess
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import TrainerState

from mig_kit.common import PACKAGE, UserError, end_with_parent, release_memory, write_json
from mig_kit.pipeline.processes import Launch, parse_launcher, search_path
from mig_kit.training.resuming import count_processes, last_checkpoint

JOB_FILE = "job.json"
ERROR_FILE = "error.json"  # in the stage folder: how the launched process that failed first ended


def run_job(train: Callable, stage: str, folder: Path, params: SimpleNamespace,
            **inputs: str | Path) -> TrainerState:
    """Train as `params.launcher` says, or take a training that has ended from disk.

    Args:
        train: the stage's train(folder, params, **inputs), which starts or resumes.
        stage: its name, under which launched processes find `train`.
        folder: the stage's.
        inputs: names -> files, folders or hub names.
    Returns: the state of the finished trainer.
    Raises: as `plan_launch` and `train`; if a launched process fails, RuntimeError with its
        traceback, or its UserError.
    """
    path = folder / JOB_FILE
    is_done = path.is_file() and json.loads(path.read_text()).get("done")
    if is_done and last_checkpoint(folder):
        state = _load_state(folder)
        print(f"this training has ended, and is taken from disk: {state.global_step} updates")
        return state
    launch = plan_launch(params.launcher)
    if launch is None and count_processes() > 1:
        raise UserError(f"WORLD_SIZE is {count_processes()} in the environment, and this process "
                        "trains alone; unset it, or name what starts the others in launcher")
    # absolute, because launched processes work in other folders; a hub name stays as it is
    inputs = {name: str(Path(path).resolve() if Path(path).exists() else path)
              for name, path in inputs.items()}
    job = {"stage": stage, "params": vars(params), "inputs": inputs}
    write_json(path, job)
    if launch is None:
        if params.launcher:
            print(f"one GPU or one core: training runs in here, without '{params.launcher}'")
        train(folder, params, **inputs)
        gc.collect()  # a trainer and its model refer to each other
        release_memory()
    else:
        (folder / ERROR_FILE).unlink(missing_ok=True)
        start_processes([*launch.words, str(folder.resolve())], folder, launch.local)
    write_json(path, {**job, "done": True})
    return _load_state(folder)


def _load_state(folder: Path) -> TrainerState:
    return TrainerState.load_from_json(f"{last_checkpoint(folder)}/trainer_state.json")


def read_job(folder: Path) -> tuple[str, SimpleNamespace, dict[str, str]]:
    """(stage, parameters, inputs) of a folder's job; UserError if it has none."""
    path = folder / JOB_FILE
    if not path.is_file():
        raise UserError(f"there is no {path}; the stage's notebook writes it: start that "
                        "first, and see that the folder is on a disk that all nodes share")
    job = json.loads(path.read_text())
    return job["stage"], SimpleNamespace(**job["params"]), job["inputs"]


def plan_launch(launcher: str) -> Launch | None:
    """How to launch a job; None to train in this process, as with one GPU or core.

    Raises: UserError if the launcher's program is missing, or starts more processes on this
    machine than it has GPUs.
    """
    if not launcher.strip():
        return None
    launch = parse_launcher(launcher)
    gpus = torch.cuda.device_count()
    devices = gpus or count_cores()
    # several processes cannot share the only GPU, and gain nothing on the only core
    if devices == 1 and launch.local > 1 and launch.nodes == 1:
        return None
    if gpus and launch.local > gpus:
        raise UserError(f"launcher '{launcher}' starts {launch.local} processes, and this machine "
                        f"has {gpus} GPUs; start one per GPU, or set launcher to \"\"")
    return launch


def count_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def start_processes(command: list[str], folder: Path, local: int = 0) -> None:
    """Run a launcher's command, and print its output as it comes; it ends with this process.

    Args:
        folder: the stage's, in which the process that fails first says why.
        local: processes that it starts here, which share the cores unless OMP_NUM_THREADS is set.
    Raises: RuntimeError with the traceback of the process that failed first, or its UserError.
    """
    threads = {}
    if local and "OMP_NUM_THREADS" not in os.environ:
        threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // local))}
    python_path = os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **threads, "PATH": search_path(), "PYTHONUNBUFFERED": "1",
                   "TQDM_DISABLE": "1", "MPLBACKEND": "agg",
                   "PYTHONPATH": python_path.rstrip(os.pathsep)}
    assignments = [f"{name}={value}" for name, value in threads.items()]
    print("training is started with:", shlex.join([*assignments, *command]), flush=True)
    process = subprocess.Popen(
        command, env=environment, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
        start_new_session=True)  # an interrupt of the notebook is not the training's
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        status = process.wait()
    finally:
        process.terminate()  # after an interrupt; srun and torchrun pass it on
        process.wait()
        process.stdout.close()
    if status:
        path = folder / ERROR_FILE
        error = json.loads(path.read_text()) if path.is_file() else {}
        reason = error.get("text", "its output above says why")
        if error.get("is_user_error"):
            raise UserError(reason)
        raise RuntimeError(f"the launched training ended with exit status {status}:\n{reason}")


def record_error(folder: Path, error: Exception) -> None:
    """Write how this process ended to the stage folder, unless another one failed before."""
    is_user_error = isinstance(error, UserError)
    text = str(error) if is_user_error else "".join(traceback.format_exception(error))
    with suppress(FileExistsError), (folder / ERROR_FILE).open("x") as file:
        file.write(json.dumps({"is_user_error": is_user_error, "text": text}))
