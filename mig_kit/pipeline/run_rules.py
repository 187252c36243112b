"""Rules between the stages of a run, checked before a kernel starts and again after each stage."""

import json
from collections import Counter

from mig_kit.common import UserError
from mig_kit.pipeline.run_folders import COLD_START, finished_params, stage_folder
from mig_kit.pipeline.stage_params import RUN_PARAMS_STAGE

CURATION = "04_rejection_sampling"


def check_run(planned: dict[str, dict], run_id: str) -> None:
    """UserError if a planned stage cannot work on what the run's other stages make.

    planned: parameters by stage. run_id: the run, or the one that it starts from.
    """
    if "02_sft" in planned and not _has_teacher(planned, run_id):
        raise UserError("02_sft: teacher is 'none', so there is no cold-start set to learn from; "
                        "use another run with a teacher, or leave 02 and 03 out and set start_from "
                        "of 05 to base")
    if "05_grpo" in planned:
        _check_rl(planned, run_id)
    if "06_evaluate" in planned:
        data = _find_params(RUN_PARAMS_STAGE, planned, run_id).get("data", "scenes")
        if data == "scenes" and not any(planned["06_evaluate"]["suites"].values()):
            raise UserError("06_evaluate: all suites are 0, so there is nothing to score; raise "
                            "one of them")


def _check_rl(planned: dict[str, dict], run_id: str) -> None:
    params = planned["05_grpo"]
    if params["start_from"] == "merged" and not _has_teacher(planned, run_id):
        raise UserError("05_grpo: start_from is 'merged', and there is no cold start; set "
                        "start_from to base, for RL alone, or teacher to own (the key 'reply' of "
                        "your data) or endpoint")
    replies = params["per_device_train_batch_size"] * params["gradient_accumulation_steps"]
    prompts, kept = replies // params["num_generations"], count_prompts(planned, run_id)
    if kept is not None and kept < prompts:
        raise UserError(
            f"05_grpo: an update uses {prompts} prompts (per_device_train_batch_size x "
            f"gradient_accumulation_steps / num_generations), and 04 keeps {kept}; lower "
            "gradient_accumulation_steps, widen min_pass_rate and max_pass_rate in 04, or make "
            "more candidates in 01")


def _find_params(stage: str, planned: dict[str, dict], run_id: str) -> dict:
    """A stage's planned parameters, else the ones that it finished with, else {}."""
    return planned.get(stage) or finished_params(stage, run_id)


def _has_teacher(planned: dict[str, dict], run_id: str) -> bool:
    return _find_params(RUN_PARAMS_STAGE, planned, run_id).get("teacher") != "none"


def count_prompts(planned: dict[str, dict], run_id: str) -> int | None:
    """How many prompts 04 has kept or, if it will run, keeps at most; None if unknown."""
    if CURATION not in planned:
        path = stage_folder(CURATION, run_id) / "metrics.json"
        return json.loads(path.read_text()).get("kept") if path.is_file() else None
    path = stage_folder(RUN_PARAMS_STAGE, run_id) / "rl.parquet"
    if RUN_PARAMS_STAGE in planned or not path.is_file():
        return None
    from pyarrow.parquet import read_table  # a moment, which most commands need not wait

    counts = Counter(read_table(path, columns=["task"])["task"].to_pylist())
    return sum(min(count, planned[CURATION]["per_task"]) for count in counts.values())


def leave_out_cold_start(params: dict[str, dict], run_id: str) -> dict[str, dict]:
    """`params` by stage, without 02 and 03 if the run (or its source) has no teacher."""
    left_out = () if _has_teacher(params, run_id) else COLD_START
    return {stage: values for stage, values in params.items() if stage not in left_out}
