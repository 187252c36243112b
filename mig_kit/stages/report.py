"""Stage 07: one self-contained HTML page with claims, figures and a gallery.

The templates in report.html.jinja escape every text that a model or a data set produced; the page
holds no script.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib import pyplot as plt
from PIL.Image import Image

from mig_kit import plots
from mig_kit.pipeline.joint_rules import NEEDS_SFT
from mig_kit.plots import HELD_OUT_NAMES, OOD_NAMES, SUITE_NAMES, SYSTEM_LABELS, suite_name
from mig_kit.sample import Sample
from mig_kit.stages.report_gallery import (
    OUTCOMES,
    classify_outcome,
    count_outcomes,
    gallery_html,
    image_tag,
    list_objects,
    macros,
    pick_gallery,
    sample_card,
)
from mig_kit.stages.report_tables import (
    CAPTIONS,
    box_rows,
    gain_rows,
    held_out_rows,
    pass_at_k_rows,
)
from mig_kit.stats import bootstrap_interval
from mig_kit.world.specs import count_listed_objects

__all__ = ["OUTCOMES", "classify_outcome", "count_outcomes", "gallery_html", "image_tag",
           "list_objects", "pick_gallery", "sample_card"]  # of report_gallery

# Suite, what is compared, the delta of metrics.json, and the paper's points on the real benchmark
# with a 7B model (arXiv 2507.00748, v1/v2 for the second row).
CLAIMS = (
    ("mig_bench", "RL over SFT", "grpo-sft", 9.04),
    ("ood_grounding", "RL over SFT", "grpo-sft", 4.98),
    ("blink", "RL over base", "grpo-base", 3.1),
    ("mmiu", "RL over base", "grpo-base", 2.4),
)


@dataclass(frozen=True)
class Picture:
    """A figure or an image of the page, and what it shows in words, for those who do not see it."""

    image: plt.Figure | Image
    alt: str


def claim_rows(metrics: dict) -> list[dict]:
    """Rows with this run's difference beside the paper's, in points, rounded to two decimals. A
    claim on a suite or model that the run does not have is left out, and that of RL over SFT where
    RL started elsewhere. metrics: of stage 06.
    """
    from_sft = metrics.get("start_from", "merged") in NEEDS_SFT
    rows = []
    for suite, comparison, delta, paper in CLAIMS:
        if suite not in metrics["deltas"].get(delta, ()) or (delta == "grpo-sft" and not from_sft):
            continue
        difference = metrics["deltas"][delta][suite]
        rows.append({"suite": SUITE_NAMES[suite], "compared": comparison,
                     "this run": round(difference["value"], 2),
                     "95 %": np.round(difference["ci95"], 2).tolist(),
                     "at temperature 1": difference["sampled"] and round(difference["sampled"], 2),
                     "paper (real benchmark, 7B)": paper})
    return rows


def score_rows(systems: dict, figure: str = "score") -> list[dict]:
    """Rows {system, suite -> percent}; systems: of stage 06's metrics. figure: or "sampled"."""
    return [{"system": SYSTEM_LABELS[system],
             **{suite_name(suite): result[figure] for suite, result in suites.items()}}
            for system, suites in systems.items()]


def kl_rows(kl: dict) -> list[dict]:
    """Rows {system, suite -> nats per token}; kl: of `engine.systems.kl_from_base`."""
    return [{"system": SYSTEM_LABELS[system],
             **{suite_name(suite): round(figures["per_token"], 3)
                for suite, figures in by_suite.items()}}
            for system, by_suite in kl.items()]


def sample_counts(metrics: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Where traces and candidates went, in stages 01 and 04; metrics: by stage."""
    traces = metrics["01_synthesize"]["traces"]
    dropped = {f"dropped: {reason}": count for reason, count in traces["dropped"].items()}
    candidates: Counter = Counter()
    for counts in metrics["04_rejection_sampling"]["why"].values():
        candidates.update(counts)
    return {"traces": {"kept": traces["kept"], **dropped}, "candidates": dict(candidates)}


def pass_rate_by_difficulty(rates: dict[str, float], samples: list[Sample],
                            bins: int = 5) -> list[dict]:
    """Mean pass rate over the number of things in all images of a question.

    Rows {"things": "3 to 4", "pass rate", "ci95", "n"}, 0..1. rates: by sample id, 0..1; counted
    are the samples whose notes list their images, as those of drawn scenes do.
    """
    pairs = [(count_listed_objects(sample.notes), rates[sample.id])
             for sample in samples if sample.notes and sample.id in rates]
    if not pairs:
        return []
    quantiles = np.quantile([count for count, _ in pairs], np.linspace(0, 1, bins + 1))
    edges = np.unique(quantiles.round())
    rows = []
    for low, high in zip(edges, edges[1:]):
        is_last = high == edges[-1]
        inside = [rate for count, rate in pairs
                  if low <= count < high or (is_last and count == high)]
        last = int(high) - (not is_last)
        if inside:
            rows.append({"things": f"{int(low)} to {last}" if last > low else f"{int(low)}",
                         "pass rate": float(np.mean(inside)), "n": len(inside),
                         "ci95": bootstrap_interval([np.array(inside)])})
    return rows


def html_table(rows: list[dict]) -> Markup:
    """An HTML table of plain rows; pairs are shown as intervals.

    Columns without a value are left out; "" if only one has any.
    """
    columns = [name for name in dict.fromkeys(name for row in rows for name in row)
               if any(row.get(name) is not None for row in rows)]
    if len(columns) < 2:
        return Markup("")
    cells = [[_cell_text(row.get(column)) for column in columns] for row in rows]
    return macros.table(columns, cells)


def _cell_text(value) -> str:
    if isinstance(value, list | tuple):
        sign = "+" if min(value) < 0 else ""
        return f"{value[0]:{sign}.1f} to {value[1]:{sign}.1f}"
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def render_page(title: str, sections: list[tuple[str, Markup]], facts: str = "") -> str:
    """The whole page. sections: (heading, HTML) pairs; a section without content is left out.
    facts: a line below the title.
    """
    return str(macros.page(title, sections, facts)) + "\n"


def two_run_page(metrics: dict[str, dict[str, dict]], differences: list[dict]) -> str:
    """One page about two runs.

    metrics: run -> stage -> metrics. differences: rows of `differences.list_differences`.
    """
    plots.set_style()
    evaluated = {run: stages["06_evaluate"] for run, stages in metrics.items()}
    bars = [{"suite": suite_name(suite), "run": run, "score": result["score"],
             "ci95": result["ci95"]}
            for run, evaluation in evaluated.items()
            for suite, result in evaluation["systems"]["grpo"].items()]
    scores = plots.plot_bars(bars, "suite", "score", "Greedy score of the GRPO models, percent",
                             "run", "colorblind", "ci95")
    columns = ("stage", "what", "name", *metrics)
    rows = [dict(zip(columns, map(str, row.values()))) for row in differences]
    sections = [
        ("Scores, greedy (percent)", html_table(compare_scores(evaluated))),
        ("Bars", image_tag(scores, describe_scores(bars, "suite", "run"))),
        ("Training", image_tag(_reward_figure(metrics), "The mean reward, a line per run.")),
        ("What differs", html_table(rows) or Markup("nothing"))]
    return render_page(" and ".join(metrics), sections)


def compare_scores(evaluated: dict[str, dict]) -> list[dict]:
    """Rows {run, what, suite -> figure}: scores of every system, then differences in points.

    evaluated: run -> metrics of stage 06.
    """
    rows = []
    for run, metrics in evaluated.items():
        for system, suites in metrics["systems"].items():
            scores = {suite_name(suite): result["score"] for suite, result in suites.items()}
            rows.append({"run": run, "what": system, **scores})
        for name, deltas in metrics["deltas"].items():
            points = {suite_name(suite): delta["value"] for suite, delta in deltas.items()}
            rows.append({"run": run, "what": f"{name} (points)", **points})
    return rows


def _reward_figure(metrics: dict[str, dict[str, dict]]) -> plt.Figure:
    rows = [{"run": run, "step": row["step"], "reward": row["reward"]}
            for run, stages in metrics.items() for row in stages["05_grpo"]["curves"]]
    table = pd.DataFrame(rows)
    by_run = table.groupby("run")["reward"]
    table["reward"] = by_run.transform(lambda values: values.rolling(10, min_periods=1).mean())
    figure, axis = plt.subplots(figsize=(plots.WIDTH, 3), layout="constrained")
    sns.lineplot(table, x="step", y="reward", hue="run", style="run", palette="colorblind",
                 ax=axis)
    axis.set_title("Mean reward over the last ten updates", loc="left", fontsize=11)
    axis.set_xlabel("update")
    return figure


def reward_rows(curves: list[dict], params: dict, span: int = 10) -> list[dict]:
    """A row per reward that 05 was trained with: its weight, and its mean over the first and the
    last `span` updates; params: of 05.
    """
    rows = []
    for reference in params["rewards"]:
        name = reference.rpartition(":")[2]
        values = [row[name] for row in curves if row.get(name) is not None]
        first, last = (float(np.mean(part)) if part else None
                       for part in (values[:span], values[-span:]))
        rows.append({"reward": reference, "weight": params["reward_weights"].get(name, 1.0),
                     f"first {span} updates": first, f"last {span} updates": last})
    return rows


def captioned(content: Markup, name: str) -> Markup:
    """A table or a figure with what to look at in it below; "" stays "". name: of CAPTIONS."""
    return macros.captioned(content, CAPTIONS[name]) if content else Markup("")


def report_sections(metrics: dict, figures: dict[str, Picture | None], gallery: Markup,
                    tables: dict[str, list[dict]], hardware: str) -> list[tuple[str, Markup]]:
    """The sections of the run's page, for `render_page`.

    metrics: of stage 06. figures: "suites", "ood", "tasks", "outcomes", "loss", "grpo", "flow",
    "dropped", "difficulty", "shares", "rollouts"; None for one that cannot be drawn. tables: rows
    of "benchmark" (a real one, or []), "ood", "rewards" and "stages". hardware: a sentence below
    the last.
    """
    def images(*names: str) -> Markup:
        return Markup("").join(captioned(image_tag(figures[name].image, figures[name].alt), name)
                               for name in names if figures[name])

    systems = metrics["systems"]
    main_suite = next(iter(systems["grpo"]))
    drawn = "suites" if main_suite in HELD_OUT_NAMES else "drawn suites"
    held_out = (captioned(html_table(held_out_rows(systems)), "held_out")
                + captioned(html_table(gain_rows(metrics["deltas"])), "gains"))
    claims = captioned(html_table(claim_rows(metrics)), "claims")
    sections = [("Your data: the held-out part", held_out),
                ("The paper's claims and this run (points)", claims)]
    if tables["benchmark"]:
        benchmark = metrics["benchmark"]
        title = f"{benchmark['name']} {benchmark['version']} (greedy, percent)"
        sections.append((title, html_table(tables["benchmark"])))
    return [
        *sections,
        (f"Scores on {drawn}, greedy (percent)",
         html_table(score_rows(systems)) + images("suites")),
        ("Out of domain, by suite (drawn)",
         images("ood") + captioned(html_table(tables["ood"]), "ood_rows")),
        (f"Scores on {drawn}, mean of replies at temperature 1 (percent)",
         captioned(html_table(score_rows(systems, "sampled")), "sampled")
         + captioned(html_table(pass_at_k_rows(systems)), "pass_at_k")),
        ("None, one or several boxes (greedy, percent)",
         captioned(html_table(box_rows(systems)), "boxes")),
        (f"{suite_name(main_suite)}, per task", images("tasks", "outcomes")),
        ("Training", images("loss", "grpo") + html_table(tables["rewards"])),
        ("What the replies become while RL trains",
         images("shares", "rollouts")),
        ("Data", images("flow", "dropped", "difficulty")),
        ("How this run was made", macros.captioned(html_table(tables["stages"]), hardware)),
        ("Gallery", macros.note(CAPTIONS["gallery"]) + gallery if gallery else gallery)]


def score_bars(systems: dict) -> list[dict]:
    """Rows {suite, system, score, ci95, n} for `plots.plot_scores`; systems: of stage 06's metrics.
    """
    return [{"suite": suite_name(suite), "system": system, "score": result["score"],
             "ci95": result["ci95"], "n": result["n"]}
            for system, suites in systems.items() for suite, result in suites.items()]


def task_bars(systems: dict, suite: str = "mig_bench") -> list[dict]:
    """Rows {task, system, acc@0.5, ci95, n} of a suite's tasks, for `plots.plot_scores`."""
    return [{"task": OOD_NAMES.get(task, task), "system": system, "acc@0.5": result["acc@0.5"],
             "ci95": result["ci95"], "n": result["n"]}
            for system, suites in systems.items()
            for task, result in suites[suite]["tasks"].items()]


def draw_scores(rows: list[dict], by: str, title: str, value: str = "score") -> Picture:
    """`plots.plot_scores` of the rows, with its numbers in words."""
    return Picture(plots.plot_scores(rows, by, title, value),
                   f"{title}. {describe_scores(rows, by, 'system', value)}")


def describe_scores(rows: list[dict], by: str, hue: str, value: str = "score") -> str:
    """The rows in words: "MMIU-like (drawn): base 32.1, SFT 34.2; ..."."""
    table: dict[str, list[str]] = {}
    for row in rows:
        name = SYSTEM_LABELS.get(row[hue], row[hue])
        table.setdefault(row[by], []).append(f"{name} {row[value]:.1f}")
    return "; ".join(f"{name}: {', '.join(scores)}" for name, scores in table.items()) + "."


def draw_counts(counts: dict[str, dict[str, int]], title: str, unit: str) -> Picture:
    """`plots.plot_stacked` of the counts, with its numbers in words."""
    words = [f"{SYSTEM_LABELS.get(name, name)}: "
             + ", ".join(f"{piece} {count}" for piece, count in pieces.items() if count)
             for name, pieces in counts.items()]
    return Picture(plots.plot_stacked(counts, title, unit), f"{title}. {'; '.join(words)}.")


def draw_difficulty(rows: list[dict]) -> Picture:
    """Bars of the rows of `pass_rate_by_difficulty`, with their numbers in words."""
    title = "Pass rate before RL, by the number of objects in all images"
    named = [{**row, "objects": f"{row['things']}, n = {row['n']}"} for row in rows]
    words = ", ".join(f"{row['things']}: {row['pass rate']:.2f}" for row in rows)
    return Picture(plots.plot_bars(named, "objects", "pass rate", title, interval="ci95"),
                   f"{title}. {words}.")


def draw_curves(rows: list[dict], names: list[str], title: str, smooth: int) -> Picture:
    """`plots.plot_curves` of the rows, with each curve's first and last mean in words."""
    table = pd.DataFrame(rows)
    words = []
    for name in names:
        values = table[name].dropna().astype(float) if name in table else ()
        if len(values):
            first, last = values[:smooth].mean(), values[-smooth:].mean()
            words.append(f"{plots.CURVE_NAMES.get(name, name)} from {first:.3g} to {last:.3g}")
    return Picture(plots.plot_curves(rows, names, title, smooth), f"{title}: {'; '.join(words)}.")
