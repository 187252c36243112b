"""Rows of the tables and plots that notebooks 06, 07 and 09 show, and sentences on a run."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from mig_kit import __version__
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.evaluation.items import paired_gap, pick
from mig_kit.pipeline.params import default_params, find_changed
from mig_kit.pipeline.runs import Run
from mig_kit.sample import Sample
from mig_kit.stats import interval_text, number_text
from mig_kit.world.suites import OWN, suite_title, task_title

# Suite, what is compared, the delta of metrics.json, and the paper's points on the real benchmark
# with a 7B model (arXiv 2507.00748 v2; v3 has +4.41 over seven benchmarks out of domain).
CLAIMS = (
    ("mig_bench", "RL over SFT", "grpo-sft", 9.04),
    ("ood_grounding", "RL over SFT", "grpo-sft", 4.98),
    ("blink", "RL over base", "grpo-base", 3.1),
    ("mmiu", "RL over base", "grpo-base", 2.4),
)
RL_STARTS = ("start", "sft", "base")  # beside GRPO in pictures: the first that a run has
DIFFERENCES = (("sft", "base"), ("grpo", "sft"), ("grpo", "start"), ("grpo", "base"))


def claim_rows(metrics: dict) -> list[dict]:
    """This run's differences beside the paper's, in points; [] with own data; metrics: of 06."""
    if any(OWN in by_suite for by_suite in metrics["deltas"].values()):
        return []
    from_sft = metrics.get("start_from", "merged") == "merged"
    return [{"suite": suite_title(suite), "compared": comparison,
             "this run (95 %)": gap_text(difference),
             "at temperature 1": None if difference["sampled"] is None else (
                 number_text(difference["sampled"], "+")),
             "paper v2 (real benchmark, 7B)": f"{paper:+.2f}"}
            for suite, comparison, delta, paper in CLAIMS if from_sft or delta != "grpo-sft"
            if (difference := metrics["deltas"].get(delta, {}).get(suite))]


def score_rows(systems: dict, figure: str = "score") -> list[dict]:
    """Rows {system, suite -> percent}; systems: of stage 06's metrics. figure: or "sampled"."""
    return _rows_by_suite("system", systems, lambda result: result[figure])


def difference_rows(deltas: dict) -> list[dict]:
    """A row per pair of systems, a column per suite, of `gap_text`; deltas: of 06's metrics."""
    return _rows_by_suite("compared", deltas, gap_text)


def _rows_by_suite(head: str, results: dict, cell: Callable[[dict], object]) -> list[dict]:
    """Rows {head: the system, or "after over before"; suite -> cell of its result}."""
    return [{head: " over ".join(SYSTEM_LABELS.get(part, part) for part in name.split("-")),
             **{suite_title(suite): cell(result) for suite, result in by_suite.items()}}
            for name, by_suite in results.items()]


def own_data_rows(deltas: dict) -> list[dict]:
    """`difference_rows` of the held-out part of own data alone; [] for a run without own data."""
    return difference_rows({pair: {OWN: by_suite[OWN]} for pair, by_suite in deltas.items()
                            if OWN in by_suite})


def task_rows(items: pd.DataFrame, suite: str) -> list[dict]:
    """Per task of a suite: percent correct of systems, greedy, and differences as `gap_text`.

    items: of `items.make_items`; [] without the suite.
    """
    rows = []
    for task, part in pick(items, suite=suite, kind="greedy").groupby("task", sort=False):
        row = {"suite": task_title(task)}
        row |= {SYSTEM_LABELS[system]: f"{100 * values.mean():.1f}"
                for system, values in part.groupby("model", sort=False)["correct"]}
        for after, before in DIFFERENCES:
            if gap := paired_gap(part, after, before):
                row[f"{SYSTEM_LABELS[after]} over {SYSTEM_LABELS[before]}"] = gap_text(gap)
        rows.append(row)
    return rows


def describe_moved_tasks(items: pd.DataFrame, suite: str) -> str:
    """One sentence on the tasks of a suite in which GRPO and the first of RL_STARTS differ by more
    than their interval, both ways.
    """
    models = {*items["model"]}
    start = SYSTEM_LABELS[next(name for name in RL_STARTS if name in models)]
    rows, rl = task_rows(items, suite), SYSTEM_LABELS["grpo"]
    moved = {mark: [f"{row['suite']} {row[start]} → {row[rl]}" for row in rows
                    if row[f"{rl} over {start}"].startswith(mark)] for mark in "▲▼"}
    texts = [f"{mark} {', '.join(tasks)}" for mark, tasks in moved.items() if tasks]
    return (f"RL moved {sum(map(len, moved.values()))} of {len(rows)} tasks beyond their "
            f"intervals{': ' * bool(texts)}{'; '.join(texts)}. Of twenty tasks that it does not "
            "change, one is named by chance.")


def gap_text(gap: dict) -> str:
    """"+1.0 (-2.1 to +4.1)" of {"value", "ci95"}, after ▲ or ▼ if the interval leaves out 0."""
    low, high = gap["ci95"]
    mark = "▲ " if low > 0 else "▼ " if high < 0 else ""
    return mark + interval_text(gap["value"], gap["ci95"], "+")


def pass_at_k_rows(systems: dict) -> list[dict]:
    """Rows {suite, system, samples, pass@1, ...} of SFT, a start of one's own, GRPO; may be []."""
    return [{"suite": suite_title(suite), "system": SYSTEM_LABELS[system],
             "samples": result["n_sampled"],
             **{f"pass@{k}": value for k, value in result["pass_at_k"].items()}}
            for suite in systems["grpo"] for system in ("sft", "start", "grpo") if system in systems
            if (result := systems[system][suite]).get("pass_at_k")]


def score_bars(systems: dict) -> list[dict]:
    """Rows {suite, system, score, ci95, n} for `plots.plot_scores`; systems: of 06's metrics."""
    return [{"suite": suite_title(suite), "system": system,
             **{name: result[name] for name in ("score", "ci95", "n")}}
            for system, suites in systems.items() for suite, result in suites.items()]


def task_bars(systems: dict, suite: str = "mig_bench") -> list[dict]:
    """Rows {task, system, acc@0.5, ci95, n} of a suite's tasks, for `plots.plot_scores`."""
    return [{"task": task_title(task), "system": system,
             **{name: result[name] for name in ("acc@0.5", "ci95", "n")}}
            for system, suites in systems.items()
            for task, result in suites[suite]["tasks"].items()]


def changed_rows(run_id: str, records: dict[str, dict]) -> list[dict]:
    """Rows of parameters that differ from the run's source or, without one, the defaults."""
    source = next((record["run_id"] for record in records.values()
                   if record["run_id"] != run_id), "")
    rows = []
    for stage, record in records.items():
        others = Run(source).params(stage) if source else default_params(stage)
        rows += [{"stage": stage, "parameter": name, "this run": str(value),
                  f"run {source}" if source else "default": str(others[name])}
                 for name, value in find_changed(record["params"], others).items()]
    return rows


def reasoning_bars(systems: dict) -> list[dict]:
    """Rows {figure, system, share, ci95, n} of truth, silent, false, for `plots.plot_scores`."""
    return [{"figure": f"{suite_title(suite)}: {name}", "system": system,
             "share": figures[name], "ci95": figures[f"{name}_ci95"] or [np.nan] * 2,
             "n": result["n"]}
            for name in ("truth", "silent", "false")
            for system, suites in systems.items() for suite, result in suites.items()
            if name in (figures := result.get("reasoning", {}))]


def stage_rows(records: dict[str, dict], marks: dict[str, dict]) -> list[dict]:
    """Rows {stage, run, minutes, seed, commit, machine} of finished stages, and their sum.

    records: stage -> run.json. marks: of `Run.marks`. The + of a commit says that its tree had
    changes.
    """
    rows = []
    for stage, record in records.items():
        seeds = [f"{name} {record['params'][name]}" for name in ("seed", "eval_seed")
                 if name in record["params"]]
        commit = record["git"]
        words = f" ({', '.join(marks[stage])})" if marks.get(stage) else ""
        rows.append({"stage": f"{stage}{words}", "run": record["run_id"],
                     "minutes": f"{record['seconds'] / 60:.1f}", "seed": ", ".join(seeds),
                     "commit": commit[:8] + "+" * commit.endswith("+"),
                     "machine": record["machine"]})
    total = sum(record["seconds"] for record in records.values()) / 60
    return [*rows, {"stage": "together", "minutes": f"{total:.1f}"}]


def describe_run(records: dict[str, dict], samples: dict[str, Sequence[Sample]]) -> str:
    """One line on a run: questions by suite, minutes, hardware, the kit's version.

    records: stage -> run.json.
    """
    own = len(samples.get(OWN, ()))
    drawn = sum(map(len, samples.values())) - own
    facts = [f"{own} held-out questions of own data"] * bool(own)
    facts += [f"{drawn} drawn questions, to be compared with each other alone"] * bool(drawn)
    minutes = sum(record["seconds"] for record in records.values()) / 60
    hardware = dict.fromkeys(record.get("hardware") for record in records.values())
    shipped = records["06_evaluate"].get("shipped")
    return "; ".join([" and ".join(facts), f"{minutes:.1f} minutes", *filter(None, hardware),
                      *filter(None, [shipped]), f"mig-kit {__version__}"])


def describe_outcome(metrics: dict) -> str:
    """One sentence on the first suite: all scores, and what RL added; metrics: of 06."""
    systems, deltas = metrics["systems"], metrics["deltas"]
    suite = next(iter(systems["grpo"]))
    scores = " → ".join(f"{SYSTEM_LABELS[name]} {systems[name][suite]['score']:.1f}"
                        for name in SYSTEM_LABELS if name in systems)
    pair = ("grpo-sft" if metrics.get("start_from", "merged") == "merged" else
            "grpo-start" if "start" in systems else "grpo-base")
    gap = deltas.get(pair, {}).get(suite)
    added = gap and f"; {pair.replace('grpo-', 'RL over ').replace('sft', 'SFT')}: {gap_text(gap)}"
    return (f"{suite_title(suite)}, percent correct: {scores}{added or ''} points, 95 % interval "
            "over questions.")
