"""Runs that start from another run's stages, several seeds of one, and how they are listed."""

from mig_kit.pipeline.run_folders import (
    COLD_START,
    RECIPE,
    has_cold_start,
    list_sources,
    load_branch,
    load_record,
    record_branch,
    require_own_stage,
    require_runs,
    run_command,
    runs_root,
    validate_run_id,
)
from mig_kit.pipeline.run_lock import lock_run, unlock_run

SEED = "{seed}"  # what stands for a seed in names and values


def plan_stages(names: list[str], run_id: str) -> list[str]:
    """`names` or, where there are none, the stages of the recipe that are the run's own.

    ValueError where one of `names` is that of the run that this one starts from.
    """
    for stage in names:
        require_own_stage(stage, run_id)
    inherited = load_branch(run_id).get("stages", ())
    return names or [stage for stage in RECIPE if stage not in inherited]


def check_branch(source: str, run_id: str, stages: list[str]) -> list[str]:
    """The stages that a branch of `source` takes from it: all of the recipe's before `stages` that
    the source has, which is without 02 and 03 where it has no cold start.

    [] where the run is that branch already. ValueError or FileNotFoundError with one sentence where
    it cannot be one.
    """
    validate_run_id(source)
    if source == run_id:
        raise ValueError(f"--from and --run-id are both '{run_id}'; use another --run-id")
    require_runs(source)
    if run_id in list_sources(source):
        raise ValueError(f"run '{source}' starts from '{run_id}' itself; use another --run-id")
    if branch := load_branch(run_id):
        if branch["from"] != source:
            raise ValueError(f"run '{run_id}' starts from '{branch['from']}' already, not from "
                             f"'{source}'; use another --run-id")
        return []
    inherited = [stage for stage in _stages_before(stages)
                 if stage not in COLD_START or has_cold_start(source)]
    _require_no_own_stages(run_id)
    for stage in inherited:
        if load_record(stage, source) is None:
            raise FileNotFoundError(
                f"run '{source}' has no finished {stage} to start from; run: "
                f"{run_command(stage, source)}")
    return inherited


def _stages_before(stages: list[str]) -> list[str]:
    """The recipe's stages before the first of `stages`, without 00, which is of the machine."""
    first = min((stage for stage in stages if stage in RECIPE[1:]), default="")
    if first <= "02":
        raise ValueError("--from gives the stages before those that you run, so name stages from "
                         "02 to 07, such as: mig-kit run 05 06 07 --from default --run-id NAME")
    return [stage for stage in RECIPE[1:] if stage < first]


def _require_no_own_stages(run_id: str) -> None:
    folder = runs_root() / run_id
    own = [stage for stage in RECIPE[1:] if (folder / stage).is_dir()]
    if own:
        raise ValueError(f"run '{run_id}' has its own {own[0]}, so it is no branch; use another "
                         "--run-id")


def start_branch(source: str, run_id: str, *stages: str) -> None:
    """Let the run start from `source`, whose stages before `stages` it then has by reference.

    Nothing is copied. Does nothing where the run is that branch already; raises as `check_branch`.
    """
    validate_run_id(run_id)
    if not check_branch(source, run_id, list(stages)):
        return
    folder = runs_root() / run_id
    lock_run(folder)
    try:  # another process may have made it a branch, or given it stages of its own
        if inherited := check_branch(source, run_id, list(stages)):
            record_branch(run_id, source, inherited)
    finally:
        unlock_run(folder)


def parse_seeds(text: str) -> list[int]:
    """The seeds of "0,1,2"; ValueError where they are no whole numbers or one is named twice."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--seeds is '{text}'; write whole numbers with commas, such as 0,1,2")
    seeds = [int(word) for word in words]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {text} names a seed twice; name each once")
    return seeds


def require_seed_in_name(run_id: str, seeds: list[int]) -> None:
    """Raise ValueError where several seeds would share a run, or a name has {seed} without seeds.
    """
    if len(seeds) > 1 and SEED not in run_id:
        raise ValueError(f"{len(seeds)} seeds cannot share the run '{run_id}'; put {SEED} into "
                         f"--run-id, such as {run_id}-{SEED}")
    if not seeds and SEED in run_id:
        raise ValueError(f"'{run_id}' has {SEED}, but there are no seeds; add --seeds 0,1,2")
