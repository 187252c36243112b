"""What a launcher starts in every process: `python -m mig_kit.stages.launched_worker STAGE_FOLDER`.
"""

import os
import sys
import traceback
from pathlib import Path

import torch

from mig_kit.stages import grpo, sft
from mig_kit.training import guard, jobs, resuming

TRAIN = {"02_sft": sft.train, "05_grpo": grpo.train}


def train_job(folder: Path) -> None:
    """Train the job.json of a stage folder, as the process that the environment names."""
    stage, params, inputs = jobs.read_job(folder)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if os.environ.get("RANK", "0") == "0":
        print(f"processes that train together: {resuming.count_processes()}", flush=True)
    TRAIN[stage](folder, params, **inputs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Train; on failure print the traceback and a line that the notebook looks for."""
    guard.end_with_parent()
    try:
        train_job(Path(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        rank = os.environ.get("RANK", 0)
        print(f"{jobs.ERROR_MARK} {rank}: {type(error).__name__}: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
