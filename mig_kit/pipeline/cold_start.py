"""Runs without a cold start: without a teacher in 01 there is nothing to fine-tune on, and RL
starts from the base.
"""

from mig_kit.pipeline import store
from mig_kit.pipeline.params import RUN_PARAMS_STAGE
from mig_kit.pipeline.run_folders import load_record

SFT, _ = store.COLD_START
NEEDS_SFT = ("merged", "adapter")  # values of start_from


def leave_out(params: dict[str, dict], run_id: str, is_every_stage: bool) -> dict[str, dict]:
    """`params`, by stage, without 02 and 03 where the run has no cold start.

    run_id: the run, or the one that it starts from, whose 01 counts where none will run.
    is_every_stage: nobody named stages; named ones stay. A `traces_file` of 02 is a cold start.
    ValueError where RL would start from the model that 02 and 03 make.
    """
    if _teacher(params, run_id) != "none" or params.get(SFT, {}).get("traces_file"):
        return params
    has_own_sft = any(stage in params for stage in store.COLD_START) and not is_every_stage
    if has_own_sft or (RUN_PARAMS_STAGE not in params and store.has_cold_start(run_id)):
        return params
    if "05_grpo" in params:
        check_start(params["05_grpo"]["start_from"], has_sft=False)
    return {stage: values for stage, values in params.items() if stage not in store.COLD_START}


def check_start(start_from: str, has_sft: bool) -> None:
    """ValueError where RL would start from the model of 02 and 03 in a run that has none."""
    if start_from in NEEDS_SFT and not has_sft:
        raise ValueError(
            f"teacher is 'none', so there is no cold start, and start_from is '{start_from}'; set "
            "start_from to base, for RL alone, or teacher to own (the key 'reply' of your data) or "
            "endpoint")


def _teacher(params: dict[str, dict], run_id: str) -> str:
    """The teacher of the run's 01: the planned one, else that of the finished one; "" for none."""
    if RUN_PARAMS_STAGE in params:
        return params[RUN_PARAMS_STAGE]["teacher"]
    record = load_record(RUN_PARAMS_STAGE, run_id)
    return record["params"].get("teacher", "") if record else ""
