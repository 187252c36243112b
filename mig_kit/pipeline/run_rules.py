"""What is known of a run's other stages when one is planned or begun, for `joint_rules`.

A run without a teacher in 01 has no cold start: there is nothing to fine-tune on, 02 and 03 are
left out, and RL starts from the base.
"""

import json
from collections import Counter

from mig_kit.pipeline.joint_rules import check_joint_rules, parse_groups
from mig_kit.pipeline.params import RUN_PARAMS_STAGE, stage_parameters
from mig_kit.pipeline.run_folders import (
    COLD_START,
    has_cold_start,
    load_record,
    require_runs,
    stage_folder,
)

SFT, _ = COLD_START
CURATION = "04_rejection_sampling"


def check_run(planned: dict[str, dict], run_id: str) -> None:
    """ValueError or FileNotFoundError, a sentence with the remedy, where a planned stage cannot
    work on what the run's other stages have made or will make, or on other runs.

    planned: parameters of the stages that will run, by stage. run_id: the run, or the one that it
    starts from.
    """
    builds_on_run = any("02" <= stage < "08" for stage in planned)
    facts = list_facts(planned, run_id) if builds_on_run else {}
    for stage, params in planned.items():
        defaults = {name: each.default for name, each in stage_parameters(stage).items()}
        check_joint_rules(params, defaults, stage, **facts)
        groups = parse_groups(params["groups"]) if "groups" in params else {}
        control = [params["control_run"]] if params.get("control_run") else []
        require_runs(*control, *(name for members in groups.values() for name in members))


def list_facts(planned: dict[str, dict], run_id: str) -> dict:
    """What rules need to know of stages other than their own, as far as it is known by now."""
    synthesize, sft = (_find_params(stage, planned, run_id) for stage in (RUN_PARAMS_STAGE, SFT))
    facts = {f"{name}_of_01": synthesize[name] for name in ("data", "teacher")
             if name in synthesize}
    facts["has_sft"] = any(stage in planned for stage in COLD_START) or (
        synthesize["teacher"] != "none" if RUN_PARAMS_STAGE in planned else has_cold_start(run_id))
    if sft:
        facts["adapter_of_02"] = [sft[name] for name in ("lora_r", "lora_alpha", "lora_targets")]
    if p := planned.get("05_grpo"):
        replies = p["per_device_train_batch_size"] * p["gradient_accumulation_steps"]
        facts["prompts_of_an_update"] = replies // p["num_generations"]
    if (count := count_prompts(planned, run_id)) is not None:
        facts |= {"candidates": count, "prompts_of_04": count}
    return facts


def _find_params(stage: str, planned: dict[str, dict], run_id: str) -> dict:
    """A stage's planned parameters, else those that it finished with; {} without."""
    return planned.get(stage) or (load_record(stage, run_id) or {}).get("params", {})


def count_prompts(planned: dict[str, dict], run_id: str) -> int | None:
    """How many prompts 04 has kept or, if it will run, can keep at most; None where it is not known
    yet, or the file that says it is damaged: `store` names that.
    """
    try:
        return _count_prompts(planned, run_id)
    except (OSError, ValueError):
        return None


def _count_prompts(planned: dict[str, dict], run_id: str) -> int | None:
    if CURATION not in planned:
        path = stage_folder(CURATION, run_id) / "metrics.json"
        return json.loads(path.read_text()).get("kept") if path.is_file() else None
    path = stage_folder(RUN_PARAMS_STAGE, run_id) / "rl.parquet"
    if RUN_PARAMS_STAGE in planned or not path.is_file():
        return None
    from pyarrow.parquet import read_table  # a moment, which most commands need not wait for

    params = planned[CURATION]
    counts = Counter(read_table(path, columns=["task"])["task"].to_pylist())
    most = sum(min(count, params["per_task"]) for count in counts.values())
    return min(most, params["kept_prompts"] or most)


def leave_out(params: dict[str, dict], run_id: str, is_every_stage: bool) -> dict[str, dict]:
    """`params`, by stage, without 02 and 03 where the run has no cold start.

    run_id: the run, or the one that it starts from, whose 01 counts where none will run.
    is_every_stage: nobody named stages; named ones stay.
    """
    teacher = _find_params(RUN_PARAMS_STAGE, params, run_id).get("teacher")
    if not is_every_stage or teacher != "none":
        return params
    return {stage: values for stage, values in params.items() if stage not in COLD_START}
