"""Several runs of one recipe together: means over runs, with intervals over samples and seeds."""

import json

import numpy as np
from scipy import stats

from mig_kit.boxes import BoxFormat
from mig_kit.pipeline import store
from mig_kit.plots import SUITE_NAMES
from mig_kit.sample import Sample
from mig_kit.stages import evaluate
from mig_kit.stages.report import CLAIMS
from mig_kit.stats import bootstrap_interval, macro_mean, to_percent
from mig_kit.world import suites

# Runs that differ in one of these did not answer the same questions.
SAMPLE_PARAMS = ("eval_seed", *suites.SIZE_PARAMS.values(), "min_pixels", "max_pixels",
                 "coordinates")


def load_evaluations(run_ids: list[str]) -> dict[str, dict]:
    """Run id -> parameters of its 06_evaluate.

    Raises FileNotFoundError for a run without one; ValueError if a run is named twice, if a model
    was trained again since, or if the test samples differ.
    """
    if len(set(run_ids)) < len(run_ids):
        raise ValueError("a run is named twice; over seeds every run counts once")
    evaluations = {}
    for run_id in run_ids:
        record = store.load_record("06_evaluate", run_id)
        if record is None:
            raise FileNotFoundError(f"run '{run_id}' has no finished 06_evaluate; "
                                    f"run: mig-kit run --run-id {run_id}")
        if stale_input := store.find_stale_input("06_evaluate", run_id):
            raise ValueError(f"the scores of run '{run_id}' are of a model before {stale_input} "
                             f"was run again; run: mig-kit run 06 --run-id {run_id}, with the "
                             "--profile of that run")
        evaluations[run_id] = record["params"]
    for name in SAMPLE_PARAMS:
        if len({params[name] for params in evaluations.values()}) > 1:
            values = ", ".join(f"{run} {params[name]}" for run, params in evaluations.items())
            raise ValueError(f"the runs were not evaluated on the same samples: {name} is {values}")
    return evaluations


def paired_gaps(run_id: str, delta: str, suite: str, samples: list[Sample],
                box_format: BoxFormat) -> np.ndarray:
    """Correctness of one system's greedy replies less that of the other's, (samples,) in -1..1.

    delta: as in metrics.json, such as "grpo-sft".
    """
    first, second = (_correctness(run_id, system, suite, samples, box_format)
                     for system in delta.split("-"))
    return first - second


def _correctness(run_id: str, system: str, suite: str, samples: list[Sample],
                 box_format: BoxFormat) -> np.ndarray:
    folder = store.stage_folder("06_evaluate", run_id) / "replies"
    lines = (folder / f"{system}_{suite}_greedy.jsonl").read_text().splitlines()
    replies = {row["id"]: row["replies"][0] for row in map(json.loads, lines)}
    return np.array([evaluate.reply_is_correct(replies[sample.id], sample, box_format)
                     for sample in samples])


def aggregate_runs(run_ids: list[str]) -> dict[str, dict]:
    """Suite -> {"value", "ci95", "over_seeds"} of the paper's claims, in points.

    value: mean over runs. ci95: its 95 % bootstrap interval over test samples, the runs given.
    over_seeds: half the width of the 95 % t interval over runs, None for a single run.
    """
    params = next(iter(load_evaluations(run_ids).values()))
    box_format = BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
    results = {}
    for suite, _, delta, _ in CLAIMS:
        per_task = params[suites.SIZE_PARAMS[suite]]
        samples = suites.make_suite(suite, "test", per_task, params["eval_seed"])
        gaps = np.stack([paired_gaps(run_id, delta, suite, samples, box_format)
                         for run_id in run_ids])
        by_task = list(evaluate.split_by_task(samples, gaps.mean(0)).values())
        means = [macro_mean(list(evaluate.split_by_task(samples, run_gaps).values()))
                 for run_gaps in gaps]
        results[suite] = {"value": to_percent(np.mean(means)),
                          "ci95": [to_percent(edge) for edge in bootstrap_interval(by_task)],
                          "over_seeds": _half_width(means)}
    return results


def _half_width(means: list[float]) -> float | None:
    if len(means) < 2:
        return None
    quantile = stats.t.ppf(0.975, len(means) - 1)
    return to_percent(quantile * np.std(means, ddof=1) / len(means) ** 0.5)


def markdown_table(run_ids: list[str]) -> str:
    """A Markdown table: per claim the scores and the difference of every run, and their mean."""
    aggregate = aggregate_runs(run_ids)
    metrics = {run_id: store.read_metrics(store.stage_folder("06_evaluate", run_id))
               for run_id in run_ids}
    runs = " | ".join(f"{run_id}: base / SFT / GRPO, difference" for run_id in run_ids)
    lines = [f"| suite | compared | {runs} | mean (over samples; over seeds) "
             "| paper (real benchmark, 7B) |",
             "|---|---|" + "---|" * (len(run_ids) + 2)]
    for suite, comparison, delta, paper in CLAIMS:
        cells = [_run_cell(metrics[run_id], delta, suite) for run_id in run_ids]
        cells.append(_mean_cell(aggregate[suite]))
        lines.append(f"| {SUITE_NAMES[suite]} | {comparison} | {' | '.join(cells)} "
                     f"| {paper:+.2f} |")
    return "\n".join(lines)


def _run_cell(metrics: dict, delta: str, suite: str) -> str:
    scores = " / ".join(f"{metrics['systems'][system][suite]['score']:.1f}"
                        for system in ("base", "sft", "grpo"))
    difference = metrics["deltas"][delta][suite]
    low, high = difference["ci95"]
    return f"{scores}, **{difference['value']:+.1f}** ({low:+.1f} to {high:+.1f})"


def _mean_cell(mean: dict) -> str:
    low, high = mean["ci95"]
    seeds = "" if mean["over_seeds"] is None else f"; ± {mean['over_seeds']:.1f}"
    return f"**{mean['value']:+.1f}** ({low:+.1f} to {high:+.1f}{seeds})"
