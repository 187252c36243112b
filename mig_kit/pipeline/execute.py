"""Run stages as notebooks, through papermill: what is up to date is skipped."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import branches, cold_start, store
from mig_kit.pipeline.params import (
    RUN_PARAMS,
    RUN_PARAMS_STAGE,
    list_profiles,
    merge_mappings,
    needs_gpu,
    profile_params,
    stage_parameters,
    unknown_parameter_message,
    validate_params,
)
from mig_kit.pipeline.stage_table import StageTable

# parameters that name a model: a folder, a name on the hub, or one of these words
MODEL_PARAMS = ("base_model", "model", "start_from")
MODEL_WORDS = ("tiny", "merged", "base", "adapter")


@dataclass(frozen=True)
class PlannedRun:
    """Stages to run, each with its parameters. source: the run that this one starts from, or ""."""

    run_id: str
    source: str
    params: dict[str, dict]


def plan_runs(names: list[str], profile: str, run_id: str, source: str, seeds: list[int],
              overrides: tuple[tuple[str, str], ...]) -> list[PlannedRun]:
    """The run or, with seeds, one run per seed, whose number stands for {seed} in names and values.

    names: stages; all that are the run's own where there are none. Raises with one sentence where
    one of the runs could not start; nothing is written.
    """
    branches.require_seed_in_name(run_id, seeds)
    if not seeds:
        return [_plan_run(names, profile, run_id, source, overrides)]
    if any(name == "seed" for name, _ in overrides):
        raise ValueError("-p seed and --seeds both set the seed; leave one of them out")
    plans = []
    for seed in seeds:
        words = [text.replace(branches.SEED, str(seed)) for text in (run_id, source)]
        values = [(name, text.replace(branches.SEED, str(seed))) for name, text in overrides]
        stages = branches.plan_stages(names, words[0])
        is_named = branches.SEED in run_id  # 03 of run{seed} is the run's own, without a seed
        if not is_named or any("seed" in stage_parameters(stage) for stage in stages):
            values.append(("seed", str(seed)))
        plans.append(_plan_run(names, profile, *words, tuple(values)))
    return plans


def _plan_run(names: list[str], profile: str, run_id: str, source: str,
              overrides: tuple[tuple[str, str], ...]) -> PlannedRun:
    store.validate_run_id(run_id)
    stages = branches.plan_stages(names, run_id)
    values = parse_overrides(overrides, stages)
    params = {stage: choose_params(stage, profile, run_id, values) for stage in stages}
    params = cold_start.leave_out(params, source or run_id, is_every_stage=not names)
    check_full_profile(profile, params, "data" in values)
    if source:
        branches.check_branch(source, run_id, stages)
    builds_on_run = any(store.STAGES[stage] for stage in params)
    if builds_on_run and RUN_PARAMS_STAGE not in params:
        _check_run_params(source or run_id, profile)
    return PlannedRun(run_id, source, params)


def run_plans(plans: list[PlannedRun], force: bool = False) -> None:
    """Run one plan after the other; with several, say after each how long the others will take."""
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            print(f"run '{plan.run_id}', {number} of {len(plans)}", flush=True)
        if plan.source:
            branches.start_branch(plan.source, plan.run_id, *plan.params)
        run_stages(plan.params, plan.run_id, force)
        if number < len(plans):
            left = minutes_left(plans[:number], len(plans) - number)
            print(f"{len(plans) - number} of {len(plans)} runs to go, about {left:.0f} min left",
                  flush=True)


def minutes_left(finished: list[PlannedRun], remaining: int) -> float:
    """Minutes that so many more runs take, by what the stages of those that finished took."""
    seconds = [store.load_record(stage, plan.run_id)["seconds"]
               for plan in finished for stage in plan.params]
    return remaining * sum(seconds) / len(finished) / 60


def parse_overrides(pairs: tuple[tuple[str, str], ...], stages: list[str]) -> dict:
    """What `-p name value` gave: words as they stand, all other values read as YAML.

    KeyError for a name that none of the stages has, ValueError for a value that cannot be read.
    """
    known = {name: parameter for stage in stages
             for name, parameter in stage_parameters(stage).items()}
    overrides = {}
    for name, text in pairs:
        text = locate_path(name, text)
        if name == "run_id":
            raise ValueError("-p run_id would part a run's notebook from its files; use --run-id")
        if name not in known:
            raise KeyError(unknown_parameter_message(name, " or ".join(stages), known))
        if isinstance(known[name].default, str):  # a command may hold what YAML reads as a mapping
            overrides[name] = text
            continue
        try:
            overrides[name] = yaml.safe_load(text) if text else ""
        except yaml.YAMLError:
            raise ValueError(f"-p {name} {text!r} is no value; write a number, a word, or a list "
                             "as \"[1, 2]\"") from None
        if name == "rewards" and isinstance(overrides[name], list):
            overrides[name] = [_locate_reward(reward) for reward in overrides[name]]
        if name == "groups" and isinstance(overrides[name], list):
            overrides[name] = [_locate_records(group) for group in overrides[name]]
    return overrides


def locate_path(name: str, text: str) -> str:
    """A path that `-p` gives, which is relative to where the command is given, as a parameter has
    it: relative to the project, or absolute outside it. Other values as they are.

    The parameters of a model name a folder only where there is one.
    """
    is_path = name.endswith("_file") or name == "image_root"
    is_model = name in MODEL_PARAMS and text not in MODEL_WORDS and Path(text).is_dir()
    if not text or not (is_path or is_model):
        return text
    return _relative_to_project(text)


def _relative_to_project(text: str) -> str:
    path = Path(os.path.abspath(text))
    return str(path.relative_to(PROJECT_ROOT) if path.is_relative_to(PROJECT_ROOT) else path)


def _locate_reward(reward: object) -> object:
    """"file.py:function" with the file as `locate_path` has it; other words as they are."""
    if not isinstance(reward, str) or ":" not in reward:
        return reward
    file, _, function = reward.rpartition(":")
    return f"{_relative_to_project(file)}:{function}"


def _locate_records(group: object) -> object:
    """"name=run,run" with the files of recorded runs as `locate_path` has them."""
    if not isinstance(group, str):
        return group
    name, sign, runs = group.rpartition("=")
    located = [_relative_to_project(run.strip()) if run.strip().endswith(".json") else run
               for run in runs.split(",")]
    return f"{name}{sign}{','.join(located)}"


def choose_params(stage: str, profile: str, run_id: str, overrides: dict) -> dict:
    """All parameters of a stage: its profile's, then run id, profile and overrides it knows."""
    values = profile_params(stage, profile)
    overrides = {"run_id": run_id, "profile": profile, **overrides}
    known = {name: merge_mappings(values[name], value)
             for name, value in overrides.items() if name in values}
    return validate_params({**values, **known}, stage)


def check_full_profile(profile: str, params: dict[str, dict], is_data_given: bool) -> None:
    """Refuse to start a full profile on drawn scenes that nobody asked for, or without a GPU.

    params: of every stage that will run. A profile is full where a stage of it has the device
    "cuda". is_data_given: `data` was set on the command line. ValueError or RuntimeError with one
    sentence.
    """
    if not needs_gpu(profile):
        return
    data = params.get(RUN_PARAMS_STAGE, {}).get("data")
    if data == "scenes" and not is_data_given:
        raise ValueError(
            f"profile '{profile}' would train a full model on drawn scenes; give your data (-p "
            "data own or -p data mgrounding, and its parameters), or say -p data scenes to train "
            "on them")
    if not any(values.get("device") == "cuda" for values in params.values()):
        return
    import torch  # seconds, which other profiles need not wait for

    if not torch.cuda.is_available():
        raise RuntimeError(
            f"profile '{profile}' needs a GPU, and PyTorch {torch.__version__} sees none; check "
            "the driver with nvidia-smi, or set -p device cpu")


def run_stages(params: dict[str, dict], run_id: str, force: bool = False) -> None:
    """Run the stages of `params` in order, each with its parameters.

    A stage that is up to date is skipped unless `force` is set. RuntimeError with the notebook's
    error where a stage fails; what it left is kept for resuming.
    """
    with StageTable(list(params)) as table:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[table], force=True)
        for stage, values in params.items():
            if not force and store.is_up_to_date(stage, run_id, values):
                table.set(stage, "up to date")
            elif _prepare_folder(stage, run_id, values, force):
                table.set(stage, "running")
                _execute_notebook(stage, run_id, values, table)
                record = store.load_record(stage, run_id)
                table.set(stage, "done", record["summary"])
            else:
                table.set(stage, "up to date")


def _check_run_params(run_id: str, profile: str) -> None:
    """Refuse to go on under `profile` with a run that has the model or box format of another.

    Values that no profile has were set by `-p`, and fit to any.
    """
    record = store.load_record(RUN_PARAMS_STAGE, run_id)
    if record is None:
        return
    values = store.run_params(run_id, RUN_PARAMS_STAGE)
    fitting = [other for other in list_profiles() if _run_params_of(other) == values]
    if not fitting or profile in fitting:
        return
    expected = _run_params_of(profile)
    name = next(name for name in RUN_PARAMS if values[name] != expected[name])
    raise ValueError(
        f"run '{run_id}' has the {name} {values[name]}, and profile '{profile}' {expected[name]}; "
        f"go on with --profile {fitting[0]}, or use another --run-id")


def _run_params_of(profile: str) -> dict:
    values = profile_params(RUN_PARAMS_STAGE, profile)
    return {name: values[name] for name in RUN_PARAMS}


def _prepare_folder(stage: str, run_id: str, params: dict, force: bool) -> bool:
    """Make room for a new run of the stage; False where an earlier result could be brought back."""
    folder = store.runs_root() / run_id / stage
    store.stage_key(stage, run_id, params)  # raises here, before anything is written
    store.lock_run(folder.parent)
    is_restored = not force and store.restore_outputs(stage, run_id, params)
    if not is_restored:
        store.set_aside_outputs(stage, run_id)
    if force:
        (folder / "started.json").unlink(missing_ok=True)  # its leftovers are not resumed
    store.unlock_run(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    return not is_restored


def _execute_notebook(stage: str, run_id: str, params: dict, table: StageTable) -> None:
    import papermill  # seconds, which wrong words need not wait for
    from papermill.exceptions import PapermillExecutionError

    notebooks = PROJECT_ROOT / "notebooks"
    output = store.runs_root() / run_id / stage / f"{stage}.ipynb"
    try:
        papermill.execute_notebook(notebooks / f"{stage}.ipynb", output, params,
                                   progress_bar=False, log_output=True, cwd=str(notebooks),
                                   extra_arguments=["--log-level=ERROR"])
    except PapermillExecutionError as error:
        table.set(stage, "failed")
        raise RuntimeError(f"{stage} failed: {error.ename}: {error.evalue} "
                           f"(the notebook is {output})") from None
