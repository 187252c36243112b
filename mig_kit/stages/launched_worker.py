"""What a launcher starts in every process: `python -m mig_kit.stages.launched_worker STAGE_FOLDER`.
"""

import os
import sys
from pathlib import Path

from mig_kit.common import end_with_parent
from mig_kit.pipeline.processes import prepare_process


def train_job(folder: Path) -> None:
    """Train the job.json of a stage folder, as the process that the environment names."""
    import torch

    from mig_kit.stages import grpo, sft
    from mig_kit.training import jobs, resuming

    stage, params, inputs = jobs.read_job(folder)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if os.environ.get("RANK", "0") == "0":
        print(f"processes that train together: {resuming.count_processes()}", flush=True)
    {"02_sft": sft, "05_grpo": grpo}[stage].train(folder, params, **inputs)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def main() -> None:
    """Train; on failure say why in the stage folder, where the notebook looks."""
    end_with_parent()
    prepare_process()
    from mig_kit.training import jobs  # seconds, in which the parent may end

    folder = Path(sys.argv[1])
    try:
        train_job(folder)
    except Exception as error:
        jobs.record_error(folder, error)
        raise


if __name__ == "__main__":
    main()
    # all is on disk; a library's thread that outlives the interpreter would abort the process, and
    # torchrun would take the training for failed
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
