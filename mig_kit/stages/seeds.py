"""Several runs of the same recipe: what is true of them together, over the test samples and over the seeds."""

import json

import numpy as np
from scipy import stats

from mig_kit.boxes import BoxFormat
from mig_kit.pipeline import store
from mig_kit.pipeline.store import read_metrics
from mig_kit.sample import Sample
from mig_kit.stages import evaluate
from mig_kit.stages.report import CLAIMS
from mig_kit.stats import bootstrap_interval, macro_mean, to_percent
from mig_kit.world import suites

SAMPLE_PARAMS = ("eval_seed", *suites.SIZE_PARAMS.values(), "min_pixels", "max_pixels", "frame")  # or the runs did not answer the same questions


def load_evaluations(run_ids: list[str]) -> dict[str, dict]:
    """Run id -> parameters of its 06_evaluate.

    FileNotFoundError without one; ValueError if their test samples differ, a model was trained anew since, or a run is named twice.
    """
    found = {}
    if len(set(run_ids)) < len(run_ids):
        raise ValueError("a run is named twice; over seeds every run counts once")
    for run_id in run_ids:
        record = store.load_record("06_evaluate", run_id)
        if record is None:
            raise FileNotFoundError(f"run '{run_id}' has no finished 06_evaluate; run: mig-kit run --run-id {run_id}")
        if anew := store.find_stale_input("06_evaluate", run_id):
            raise ValueError(f"the scores of run '{run_id}' are of a model before {anew} was run anew; run: mig-kit run 06 "
                             f"--run-id {run_id}, with the --profile of that run")
        found[run_id] = record["params"]
    for key in SAMPLE_PARAMS:
        if len({params[key] for params in found.values()}) > 1:
            values = ", ".join(f"{run} {params[key]}" for run, params in found.items())
            raise ValueError(f"the runs were not evaluated on the same samples: {key} is {values}")
    return found


def paired_gaps(run_id: str, delta: str, suite: str, samples: list[Sample], box_format: BoxFormat) -> np.ndarray:
    """Right or not of one system less the other's, greedy, (samples,) in -1..1. delta: as in metrics.json, "grpo-sft"."""
    right = []
    for system in delta.split("-"):
        path = store.runs_root() / run_id / "06_evaluate" / "replies" / f"{system}_{suite}_greedy.jsonl"
        replies = {row["id"]: row["replies"][0] for row in map(json.loads, path.read_text().splitlines())}
        right.append(np.array([evaluate.reply_is_correct(replies[s.id], s, box_format) for s in samples]))
    return right[0] - right[1]


def aggregate_runs(run_ids: list[str]) -> dict[str, dict]:
    """Suite -> {"value", "ci95", "over_seeds"} of the paper's claims, in points.

    value: mean over runs; ci95: its 95 % bootstrap interval over test samples, the runs given; over_seeds: half the width of
    the 95 % t interval over runs, None for one.
    """
    params = load_evaluations(run_ids)
    p = next(iter(params.values()))
    box_format, found = BoxFormat(p["min_pixels"], p["max_pixels"], p["frame"]), {}
    for _, _, delta, suite in CLAIMS:
        samples = suites.make_suite(suite, "test", p[suites.SIZE_PARAMS[suite]], p["eval_seed"])
        every = np.stack([paired_gaps(run_id, delta, suite, samples, box_format) for run_id in run_ids])
        groups = list(evaluate.split_by_task(samples, every.mean(0)).values())
        means = [macro_mean(list(evaluate.split_by_task(samples, one).values())) for one in every]
        half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else None
        found[suite] = {"value": to_percent(np.mean(means)),
                        "ci95": [to_percent(v) for v in bootstrap_interval(groups)],
                        "over_seeds": None if half is None else to_percent(half)}
    return found


def markdown_table(run_ids: list[str]) -> str:
    """A Markdown table: per claim of the paper base, SFT and GRPO of every run and their difference, and the runs together."""
    whole = aggregate_runs(run_ids)
    found = {run_id: read_metrics(store.runs_root() / run_id / "06_evaluate") for run_id in run_ids}
    lines = ["| claim | paper | " + " | ".join(f"{run}: base / SFT / GRPO, difference" for run in found)
             + " | mean (over samples; over seeds) |", "|---|---|" + "---|" * (len(found) + 1)]
    for claim, paper, delta, suite in CLAIMS:
        cells, mean = [], whole[suite]
        for metrics in found.values():
            scores = " / ".join(f"{metrics['systems'][s][suite]['score']:.1f}" for s in ("base", "sft", "grpo"))
            gap = metrics["deltas"][delta][suite]
            cells.append(f"{scores}, **{gap['value']:+.1f}** ({gap['ci95'][0]:+.1f} to {gap['ci95'][1]:+.1f})")
        seeds = "" if mean["over_seeds"] is None else f"; ± {mean['over_seeds']:.1f}"
        cells.append(f"**{mean['value']:+.1f}** ({mean['ci95'][0]:+.1f} to {mean['ci95'][1]:+.1f}{seeds})")
        lines.append(f"| {claim} | {paper:+.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
