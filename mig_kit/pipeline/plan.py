"""What `mig-kit run` will do, checked before anything is written: stages and parameters."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_origin

import yaml

from mig_kit.common import PROJECT_ROOT, SHIPPED, UserError
from mig_kit.pipeline import run_folders, runs
from mig_kit.pipeline.params import choose_params, needs_gpu, unknown_parameter_message
from mig_kit.pipeline.runs import Run
from mig_kit.pipeline.stage_keys import MODEL_PARAMS
from mig_kit.pipeline.stage_params import MODELS, RUN_PARAMS_STAGE, START_WORDS

CURATION = "04_rejection_sampling"


@dataclass(frozen=True)
class PlannedRun:
    """The stages to run, with parameters; source: the run that this one starts from, or "".

    origin: the run whose earlier stages are read, before a new branch is made.
    """

    run_id: str
    source: str
    params: dict[str, dict]
    profile: str
    origin: Run


def plan_run(names: list[str], profile: str, run_id: str, source: str,
             overrides: tuple[tuple[str, str], ...], force: bool = False) -> PlannedRun:
    """The run, with the parameters of all its stages.

    Args:
        names: stages; [] for all that are the run's own.
        profile: "" for the run's, or its source's.
        overrides: (name, text) of `-p`.
        force: whether finished stages are made again.
    Raises: UserError if the run could not start.
    """
    run_folders.validate_run_id(run_id)
    run, origin = Run(run_id), Run(source or run_id)
    recorded = run.profile or origin.profile
    if profile and recorded not in ("", profile):
        raise UserError(f"run '{source or run_id}' is of profile {recorded}; leave --profile out, "
                        "or use another --run-id for a run of its own")
    profile = profile or recorded or "tiny"
    for stage in names:
        run.require_own(stage)
    origin = run if run.branch else origin
    stages = names or [stage for stage in run_folders.RECIPE if run.owner(stage) is run]
    values = parse_overrides(overrides, stages)
    params = {stage: choose_params(stage, profile, run_id, values) for stage in stages}
    synthesized = params.get(RUN_PARAMS_STAGE) or origin.params(RUN_PARAMS_STAGE)
    if not names and synthesized.get("teacher") == "none":  # nothing to learn a cold start from
        for stage in run_folders.COLD_START:
            params.pop(stage, None)
    if RUN_PARAMS_STAGE in params and synthesized["data"] == "scenes" and (
            "data" not in values and needs_gpu(profile)):
        raise UserError(
            f"profile '{profile}' would train a full model on synthetic scenes; name the file of "
            "your data (-p data mine.jsonl), or say -p data scenes to train on them")
    if source:
        runs.check_branch(source, run_id, stages)
    if any(run_folders.STAGES[stage] for stage in params) and RUN_PARAMS_STAGE not in params:
        origin.require(RUN_PARAMS_STAGE, min(params))
    left = {stage: values for stage, values in params.items() if force or not run.record(stage)}
    check_run(left, origin)
    if "start_from" not in values and left.get("05_grpo", {}).get("start_from") == "base" and (
            "03_merge" in params or origin.record("03_merge")):
        raise UserError(
            f"05_grpo: profile '{profile}' starts from the base and would leave the model of 03 "
            "unused; say -p start_from merged, or -p start_from base if that is meant")
    return PlannedRun(run_id, source, params, profile, origin)


def parse_overrides(pairs: tuple[tuple[str, str], ...], stages: list[str]) -> dict:
    """The values of `-p name value`: words as they stand, all others read as YAML.

    Raises: UserError for a name that no stage has.
    """
    known = {name: field for stage in stages
             for name, field in MODELS[stage].model_fields.items()}
    overrides = {}
    for name, text in pairs:
        if name == "run_id":
            raise UserError("-p run_id would part a run's notebook from its files; use --run-id")
        if name not in known:
            raise UserError(unknown_parameter_message(name, " or ".join(stages), known))
        kind = known[name].annotation
        is_text = kind is str or get_origin(kind) is Literal  # YAML may read these as a mapping
        try:
            value = text if is_text or not text else yaml.safe_load(text)
        except yaml.YAMLError:
            value = text  # the parameter says what it must be
        overrides[name] = locate_paths(name, value)
    return overrides


def locate_paths(name: str, value: object) -> object:
    """A value of `-p`; paths relative to the working directory become relative to the project."""
    if name == "rewards" and isinstance(value, list):
        return [locate_paths("advantage", str(text)) for text in value]
    if name == "advantage":
        return re.sub(r".+(?=:)", lambda match: relative_to_project(match[0]), str(value))
    is_model = name in MODEL_PARAMS and value not in (*SHIPPED, *START_WORDS)
    is_path = (name == "image_root" or name == "data" and value != "scenes"
               or is_model and Path(value).is_dir())
    return relative_to_project(value) if is_path and value else value


def relative_to_project(text: str) -> str:
    """A path relative to the project; absolute outside it."""
    path = Path(os.path.abspath(text))
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def check_run(planned: dict[str, dict], run: Run) -> None:
    """UserError if a planned stage cannot work on what the run's other stages make.

    planned: parameters by stage. run: the run, or the one that it starts from.
    """
    synthesized = planned.get(RUN_PARAMS_STAGE) or run.params(RUN_PARAMS_STAGE)
    rl, evaluation = planned.get("05_grpo"), planned.get("06_evaluate")
    if "02_sft" in planned and synthesized.get("teacher") == "none":
        raise UserError("02_sft: teacher is 'none', so there is no cold-start set to learn from; "
                        "use another run with a teacher, or leave 02 and 03 out and set start_from "
                        "of 05 to base")
    if rl and rl["start_from"] == "merged" and synthesized.get("teacher") == "none":
        raise UserError("05_grpo: start_from is 'merged', and there is no cold start; set "
                        "start_from to base, for RL alone, or teacher to own (the key 'reply' of "
                        "your data) or endpoint")
    curated = run.stage_folder(CURATION) / "metrics.json"
    if rl and CURATION not in planned and curated.is_file():
        kept = json.loads(curated.read_text()).get("kept", math.inf)
        replies = rl["per_device_train_batch_size"] * rl["gradient_accumulation_steps"]
        if kept < (prompts := replies // rl["num_generations"]):
            raise UserError(
                f"05_grpo: an update uses {prompts} prompts (per_device_train_batch_size x "
                f"gradient_accumulation_steps / num_generations), and 04 keeps {kept}; lower "
                "gradient_accumulation_steps, raise per_task or widen min_pass_rate and "
                "max_pass_rate in 04, or make more candidates in 01 (both with --force)")
    is_drawn = synthesized.get("data", "scenes") == "scenes"
    if evaluation and is_drawn and not any(evaluation["suites"].values()):
        raise UserError("06_evaluate: all suites are 0, so there is nothing to score; raise one of "
                        "them")
