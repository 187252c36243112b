"""What `mig-kit status` shows: runs in a line each, or the stages of one."""

from mig_kit.pipeline import run_folders, store
from mig_kit.world.suites import suite_title


def run_line(run_id: str) -> str:
    """A run in one line: profile, what has finished, the scores of its first suite."""
    branch, stale = run_folders.load_branch(run_id), store.find_stale(run_id)
    done = [stage[:2] for stage, state in _stage_states(run_id).items() if "done" in state]
    parts = [f"{run_id} ({run_folders.load_profile(run_id) or 'by hand'})"]
    parts += [f"from {branch['from']}"] if branch else []
    parts += [f"{' '.join(done) or 'nothing'} done"]
    parts += [f"{' '.join(stage[:2] for stage in stale)} stale"] if stale else []
    parts += ["running"] if run_folders.is_locked(run_folders.runs_root() / run_id) else []
    if systems := _scores(run_id):
        suite, summary = next(iter(systems["grpo"].items()))
        scores = " / ".join(f"{by_suite[suite]['score']:.1f}" for by_suite in systems.values())
        parts.append(f"{suite_title(suite)} {scores} ({' / '.join(systems)}; n = {summary['n']})")
    return "; ".join(parts)


def run_lines(run_id: str) -> list[str]:
    """A run's stages, why they are stale, and all greedy scores."""
    stale, states, systems = store.find_stale(run_id), _stage_states(run_id), _scores(run_id)
    lines = [run_line(run_id)]
    for stage, state in states.items():
        reason = f"; stale, {stale[stage]}" if stage in stale else ""
        lines.append(f"  {stage:<24}{state}{reason}")
    for suite, summary in systems.get("grpo", {}).items():
        scores = ", ".join(f"{system} {by_suite[suite]['score']:.1f}"
                           for system, by_suite in systems.items())
        lines.append(f"  {suite_title(suite):<24}{scores} (n = {summary['n']})")
    return lines


def _scores(run_id: str) -> dict:
    folder = run_folders.runs_root() / run_id / "06_evaluate"
    return store.read_metrics(folder)["systems"] if (folder / "run.json").is_file() else {}


def _stage_states(run_id: str) -> dict[str, str]:
    """What became of the run's own stages, of those that have begun."""
    states, run = {}, run_folders.runs_root() / run_id
    word = "running" if run_folders.is_locked(run) else "stopped"
    inherited = run_folders.load_branch(run_id).get("stages", ())
    for stage in [stage for stage in run_folders.STAGES if stage not in inherited]:
        unfinished = store.unfinished_folder(stage, run_id)
        if record := run_folders.load_record(stage, run_id):
            states[stage] = f"done in {record['seconds'] / 60:.1f} min"
        elif unfinished.exists():
            states[stage] = f"{word} after {store.seconds_spent(unfinished) / 60:.1f} min"
    return states
