"""What `mig-kit status` shows: runs in a line each, or the stages of one."""

from mig_kit.pipeline import store
from mig_kit.pipeline.run_folders import (
    RECIPE,
    STAGES,
    is_locked,
    list_runs,
    list_sources,
    load_branch,
    load_profile,
    load_record,
    runs_root,
)
from mig_kit.world.suites import suite_title


def run_tree() -> list[tuple[str, int]]:
    """(run, depth) of all runs: a branch follows its source, one deeper, if that is there."""
    names = list_runs()
    paths = [[name for name in reversed(list_sources(run_id)) if name in names] for run_id in names]
    return [(path[-1], len(path) - 1) for path in sorted(paths)]


def run_line(run_id: str) -> str:
    """A run in one line: profile, what has finished, the scores of its first suite."""
    branch, stale = load_branch(run_id), store.find_stale(run_id)
    own = [stage for stage in STAGES if stage not in branch.get("stages", ())
           and (runs_root() / run_id / stage / "run.json").is_file()]
    parts = [f"{run_id} ({load_profile(run_id) or 'by hand'})"]
    parts += [f"from {branch['from']}"] if branch else []
    parts += [f"{' '.join(stage[:2] for stage in own) or 'nothing'} done"]
    parts += [f"{' '.join(stage[:2] for stage in stale)} stale"] if stale else []
    parts += ["running"] if is_locked(runs_root() / run_id) else []
    systems = _scores(run_id)
    if systems:
        suite = next(iter(systems["grpo"]))
        scores = " / ".join(f"{by_suite[suite]['score']:.1f}" for by_suite in systems.values())
        parts.append(f"{suite_title(suite)} {scores} ({' / '.join(systems)})")
    return "; ".join(parts)


def run_lines(run_id: str) -> list[str]:
    """A run's stages, why they are stale, and all greedy scores."""
    branch, stale = load_branch(run_id), store.find_stale(run_id)
    lines = [run_line(run_id)]
    for stage in STAGES:
        state = _stage_state(stage, run_id)
        if state and stage not in branch.get("stages", ()):
            reason = f"; stale, {stale[stage]}" if stage in stale else ""
            lines.append(f"  {stage:<24}{state}{reason}")
    systems = _scores(run_id)
    for suite in systems.get("grpo", ()):
        scores = ", ".join(f"{system} {by_suite[suite]['score']:.1f}"
                           for system, by_suite in systems.items())
        lines.append(f"  {suite_title(suite):<24}{scores}")
    own = [stage for stage in RECIPE if stage not in branch.get("stages", ())]
    return [*lines, *(f"  {mark}" for mark in store.list_marks(own, run_id))]


def _scores(run_id: str) -> dict:
    folder = runs_root() / run_id / "06_evaluate"
    return store.read_metrics(folder)["systems"] if (folder / "run.json").is_file() else {}


def _stage_state(stage: str, run_id: str) -> str:
    """What became of one of the run's own stages; "" if it has not begun."""
    seconds = store.seconds_spent(store.unfinished_folder(stage, run_id))
    if (runs_root() / run_id / stage / "run.json").is_file():
        return f"done in {load_record(stage, run_id)['seconds'] / 60:.1f} min"
    if not store.unfinished_folder(stage, run_id).exists():
        return ""
    word = "running" if is_locked(runs_root() / run_id) else "stopped"
    return f"{word} after {seconds / 60:.1f} min"
