"""Whether a run's scores are those that the README prints, the last line of `make run`."""

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store
from mig_kit.pipeline.run_facts import changed_params
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.stages.evaluated_runs import EvaluatedRun, load_groups
from mig_kit.world.suites import suite_title

RECORD = "notebooks/guide/ablations/default.json"  # the run whose scores the README prints


def compare_with_readme(run_id: str) -> str:
    """One line: "scores: as in the README", or which differ, by how much, and why that can be.

    "" for a run that is not the README's: other parameters, no finished 06, or scores that cannot
    be compared.
    """
    record = store.load_record("06_evaluate", run_id)
    if not (PROJECT_ROOT / RECORD).is_file() or not record or changed_params(run_id, RECIPE[1:7]):
        return ""
    try:
        _, groups = load_groups({"run": [run_id], "readme": [RECORD]})
    except (FileNotFoundError, ValueError):
        return ""
    (run,), (published,) = groups["run"], groups["readme"]
    differences = [
        f"{suite_title(suite)} {system} {ours:.1f} (README: {theirs:.1f})"
        for system, by_suite in published.correct.items() if system in run.correct
        for suite in by_suite
        for ours, theirs in [(_score(run, system, suite), _score(published, system, suite))]
        if f"{ours:.1f}" != f"{theirs:.1f}"]
    if not differences:
        return "scores: as in the README"
    here, there = (run.machine, published.machine)
    reason = ("another version of a library or of the code" if here == there else
              f"here: {here}; README: {there}. Each kind of CPU and number of cores rounds sums "
              "otherwise and makes another model")
    return f"scores: not as in the README: {', '.join(differences)} ({reason})"


def _score(run: EvaluatedRun, system: str, suite: str) -> float:
    bits = run.correct[system][suite]
    return 100 * bits.count("1") / len(bits)
