"""Run stages as notebooks, through papermill: what is up to date is skipped."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import yaml

from mig_kit.common import PROJECT_ROOT, suggest_word, write_json
from mig_kit.pipeline import attempts, branches, run_rules, store
from mig_kit.pipeline.failures import failure_sentence
from mig_kit.pipeline.fingerprints import digest_json
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
from mig_kit.pipeline.run_folders import list_runs, require_runs
from mig_kit.pipeline.stage_table import StageTable

# parameters that name a model: a folder, a name on the hub, or one of these words
MODEL_PARAMS = ("base_model", "model", "start_from")
PLAN_FILE = "plan.json"  # in a run's folder: what the last command runs there
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
    params = run_rules.leave_out(params, source or run_id, is_every_stage=not names)
    check_full_profile(profile, params, "data" in values)
    if source:
        branches.check_branch(source, run_id, stages)
    is_branch = bool(branches.load_branch(run_id))
    run_rules.check_run(_drop_finished(params, run_id), run_id if is_branch else source or run_id)
    builds_on_run = any(store.STAGES[stage] for stage in params)
    if builds_on_run and RUN_PARAMS_STAGE not in params:
        if suggest_word(source or run_id, list_runs()):
            require_runs(source or run_id)
        _check_run_params(source or run_id, profile)
    return PlannedRun(run_id, source, params)


def _drop_finished(params: dict[str, dict], run_id: str) -> dict[str, dict]:
    """`params` of the stages from the first one of the recipe's, after 00, that is to run."""
    unfinished = dict(params)
    for stage in store.RECIPE[1:]:
        if stage in params and not store.is_up_to_date(stage, run_id, params[stage]):
            break
        unfinished.pop(stage, None)
    return unfinished


def run_plans(plans: list[PlannedRun], force: bool = False) -> None:
    """Run one plan after the other; with several, say after each how long the others will take."""
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            print(f"run '{plan.run_id}', {number} of {len(plans)}", flush=True)
        if plan.source:
            branches.start_branch(plan.source, plan.run_id, *plan.params)
        _write_plan(plan)
        run_stages(plan.params, plan.run_id, force)
        if number < len(plans):
            left = minutes_left(plans[:number], len(plans) - number)
            print(f"{len(plans) - number} of {len(plans)} runs to go, about {left:.0f} min left",
                  flush=True)


def _write_plan(plan: PlannedRun) -> None:
    """Tell 00 what will run after it, with which parameters."""
    if "00_preflight" not in plan.params or len(plan.params) == 1:
        return
    path = store.runs_root() / plan.run_id / PLAN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {stage: {name: value for name, value in values.items() if name != "run_id"}
                      for stage, values in plan.params.items() if stage != "00_preflight"})
    plan.params["00_preflight"]["plan_file"] = _relative_to_project(str(path))


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
            "data own and its parameters), or say -p data scenes to train on them")
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
    error where a stage fails: what had finished before is as it was, and what the attempt left is
    kept for resuming.
    """
    remaining = dict(params)
    with StageTable(list(params)) as table:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[table], force=True)
        for stage, values in params.items():
            if not force and store.is_up_to_date(stage, run_id, values):
                table.set(stage, "up to date")
            elif _bring_back(stage, run_id, values, force):
                table.set(stage, "up to date", "it is back, and what had replaced it in .before")
            else:
                table.set(stage, "running")
                _execute_notebook(stage, run_id, values, table)
                table.set(stage, "done", store.require_record(stage, run_id, stage)["summary"])
            del remaining[stage]
            run_rules.check_run(remaining, run_id)


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


def _bring_back(stage: str, run_id: str, params: dict, force: bool) -> bool:
    """True where what the stage last replaced has these parameters, inputs and code, and is back.
    With `force` the next attempt starts from nothing instead.
    """
    facts = store.stage_facts(stage, run_id, params)  # raises here, before anything is written
    key = digest_json(facts)
    run = store.runs_root() / run_id
    store.lock_run(run)
    is_back = not force and attempts.bring_back(stage, run_id, key)
    if force:
        attempts.begin_anew(stage, run_id, key, facts)
    store.unlock_run(run)
    return is_back


def _execute_notebook(stage: str, run_id: str, params: dict, table: StageTable) -> None:
    """Run a stage's notebook in a kernel of this Python, whatever kernels Jupyter knows.

    It is written beside the stage's folder, and into it once that has finished.
    """
    import papermill  # seconds, which wrong words need not wait for
    from papermill.exceptions import PapermillExecutionError

    from mig_kit.pipeline.kernel import ThisPython

    notebooks = PROJECT_ROOT / "notebooks"
    folder = store.runs_root() / run_id / stage
    output = folder.with_name(f"{stage}.running.ipynb")
    try:
        papermill.execute_notebook(notebooks / f"{stage}.ipynb", output, params,
                                   progress_bar=False, log_output=True, cwd=str(notebooks),
                                   kernel_manager_class=ThisPython,
                                   extra_arguments=["--log-level=ERROR"])
    except PapermillExecutionError as error:
        table.set(stage, "failed")
        kept = output.replace(folder.with_name(f"{stage}.failed.ipynb"))
        raise RuntimeError(f"{stage} failed: {failure_sentence(error, kept)} "
                           f"(the notebook is {kept})") from None
    output.replace(folder / f"{stage}.ipynb")
