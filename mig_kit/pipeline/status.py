"""What `mig-kit status` shows: runs in a line each, or the stages of one."""

from mig_kit.pipeline import run_folders, store
from mig_kit.pipeline.runs import MARKS, Run
from mig_kit.world.suites import suite_title


def run_line(run_id: str) -> str:
    """A run in one line: profile, what has finished, the scores of its first suite."""
    run = Run(run_id)
    done = [stage[:2] for stage, state in _stage_states(run).items() if "done" in state]
    parts = [f"{run_id} ({run.profile or 'by hand'})"]
    parts += [f"from {run.branch['from']}"] if run.branch else []
    parts += [f"{' '.join(done) or 'nothing'} done"]
    for word in MARKS:
        marked = [stage[:2] for stage, marks in run.marks.items() if word in marks]
        parts += [f"{' '.join(marked)} {word}"] if marked else []
    parts += ["running"] if run_folders.is_locked(run.folder) else []
    if systems := _scores(run):
        suite, summary = next(iter(systems["grpo"].items()))
        scores = " / ".join(f"{by_suite[suite]['score']:.1f}" for by_suite in systems.values())
        parts.append(f"{suite_title(suite)} {scores} ({' / '.join(systems)}; n = {summary['n']})")
    return "; ".join(parts)


def run_lines(run_id: str) -> list[str]:
    """A run's stages, why they are stale, and all greedy scores."""
    run = Run(run_id)
    lines, systems = [run_line(run_id)], _scores(run)
    for stage, state in _stage_states(run).items():
        marks = [f"; {word}, {cause}" for word, cause in run.marks.get(stage, {}).items()]
        lines.append(f"  {stage:<24}{state}{''.join(marks)}")
    for suite, summary in systems.get("grpo", {}).items():
        scores = ", ".join(f"{system} {by_suite[suite]['score']:.1f}"
                           for system, by_suite in systems.items())
        lines.append(f"  {suite_title(suite):<24}{scores} (n = {summary['n']})")
    return lines


def _scores(run: Run) -> dict:
    folder = run.folder / "06_evaluate"
    return store.read_metrics(folder)["systems"] if (folder / "run.json").is_file() else {}


def _stage_states(run: Run) -> dict[str, str]:
    """What became of the run's own stages, of those that have begun."""
    states = {}
    word = "running" if run_folders.is_locked(run.folder) else "stopped"
    for stage in [stage for stage in run_folders.STAGES if run.owner(stage) is run]:
        unfinished = run.unfinished_folder(stage)
        if record := run.record(stage):
            states[stage] = f"done in {record['seconds'] / 60:.1f} min"
        elif unfinished.exists():
            states[stage] = f"{word} after {store.seconds_spent(unfinished) / 60:.1f} min"
    return states
