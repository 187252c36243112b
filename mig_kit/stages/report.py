"""Stage 07: one self-contained HTML page with claims, figures and a gallery.

The templates in report.html.jinja escape every text that a model or a data set produced; the page
holds no script.
"""

import base64
import io
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import seaborn as sns
from markupsafe import Markup
from matplotlib import pyplot as plt
from PIL.Image import Image

from mig_kit import plots
from mig_kit.boxes import BoxFormat
from mig_kit.engine.own_rewards import compute_reward
from mig_kit.plots import HELD_OUT_NAMES, OOD_NAMES, SUITE_NAMES, draw_sample, suite_name
from mig_kit.prompts import format_question, parse_reply
from mig_kit.rewards import Reward, is_correct
from mig_kit.sample import Sample
from mig_kit.stages.report_tables import (
    CAPTIONS,
    box_rows,
    classify_list,
    gain_rows,
    held_out_rows,
    pass_at_k_rows,
)
from mig_kit.world.specs import count_listed_objects

# Suite, what is compared, the delta of metrics.json, and the paper's points on the real benchmark
# with a 7B model (arXiv 2507.00748, v1/v2 for the second row).
CLAIMS = (
    ("mig_bench", "RL over SFT", "grpo-sft", 9.04),
    ("ood_grounding", "RL over SFT", "grpo-sft", 4.98),
    ("blink", "RL over base", "grpo-base", 3.1),
    ("mmiu", "RL over base", "grpo-base", 2.4),
)
OUTCOMES = ("correct", "box off", "wrong image", "wrong option", "no answer",
            "wrong number of boxes", "wrongly none", "box where none is")
KINDS = {(False, True): "wrong, then correct", (True, True): "correct both times",
         (True, False): "correct, then wrong", (False, False): "wrong both times"}

_templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                                autoescape=True, trim_blocks=True, lstrip_blocks=True)
_macros = _templates.get_template("report.html.jinja").module


def claim_rows(metrics: dict) -> list[dict]:
    """Rows with this run's difference beside the paper's, in points; metrics: of stage 06. A claim
    on a suite or model that the run does not have is left out.
    """
    rows = []
    for suite, comparison, delta, paper in CLAIMS:
        if suite not in metrics["deltas"].get(delta, ()):
            continue
        difference = metrics["deltas"][delta][suite]
        rows.append({"suite": SUITE_NAMES[suite], "compared": comparison,
                     "this run": difference["value"], "95 %": difference["ci95"],
                     "at temperature 1": difference["sampled"],
                     "paper (real benchmark, 7B)": paper})
    return rows


def score_rows(systems: dict, figure: str = "score") -> list[dict]:
    """Rows {system, suite -> percent}; systems: of stage 06's metrics. figure: or "sampled"."""
    return [{"system": system, **{suite_name(suite): result[figure]
                                  for suite, result in suites.items()}}
            for system, suites in systems.items()]


def kl_rows(kl: dict) -> list[dict]:
    """Rows {system, suite -> nats per token}; kl: of `engine.systems.kl_from_base`."""
    return [{"system": system, **{suite_name(suite): round(figures["per_token"], 3)
                                  for suite, figures in by_suite.items()}}
            for system, by_suite in kl.items()]


def classify_outcome(reply: str, sample: Sample, box_format: BoxFormat) -> str:
    """One of OUTCOMES; "box off" is the right image with an IoU under 0.5.

    The last three are of questions for all boxes.
    """
    answer = parse_reply(reply)
    if is_correct(reply, sample, box_format):
        return "correct"
    if sample.find_all:
        return classify_list(reply, sample)
    if sample.options:
        return "wrong option" if answer.letter else "no answer"
    if answer.box is None:
        return "no answer"
    is_target_image = answer.image in {target.image for target in sample.targets}
    return "box off" if is_target_image else "wrong image"


def count_outcomes(samples: list[Sample], replies: dict[str, dict[str, str]],
                   box_format: BoxFormat) -> dict[str, dict[str, int]]:
    """system -> outcome -> how many of `samples`; replies: per system by sample id."""
    counts = {system: Counter(classify_outcome(by_id[sample.id], sample, box_format)
                              for sample in samples)
              for system, by_id in replies.items()}
    occurring = [outcome for outcome in OUTCOMES
                 if any(count[outcome] for count in counts.values())]
    return {system: {outcome: count[outcome] for outcome in occurring}
            for system, count in counts.items()}


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

    Rows {"things": "3 to 4", "pass rate", "n"}. rates: by sample id, 0..1; counted are the samples
    whose notes list their images, as those of drawn scenes do.
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
                         "pass rate": float(np.mean(inside)), "n": len(inside)})
    return rows


def pick_gallery(samples: list[Sample], before: dict[str, str], after: dict[str, str],
                 box_format: BoxFormat, per_kind: int = 4) -> list[tuple[str, Sample]]:
    """(kind, sample) pairs, by what changed from `before` to `after` (replies by sample id).

    At most `per_kind` samples of each of KINDS, each of another task where there are so many.
    """
    of_one_task = -(-per_kind // max(1, len({sample.task for sample in samples})))
    gallery: dict[str, list[Sample]] = {kind: [] for kind in KINDS.values()}
    for sample in samples:
        was, now = (is_correct(replies[sample.id], sample, box_format)
                    for replies in (before, after))
        picked = gallery[KINDS[was, now]]
        n_alike = sum(other.task == sample.task for other in picked)
        if len(picked) < per_kind and n_alike < of_one_task:
            picked.append(sample)
    return [(kind, sample) for kind, picked in gallery.items() for sample in picked]


def gallery_html(gallery: list[tuple[str, Sample]], replies: dict[str, dict[str, str]],
                 box_format: BoxFormat, rewards: dict[str, Reward]) -> Markup:
    """Cards of (kind, sample) pairs with filters above them; replies: per system by sample id.

    rewards: by name, those that are shown. The filters are style sheets, no script.
    """
    groups = {"task": sorted({sample.task for _, sample in gallery}),
              "kind": list(dict.fromkeys(kind for kind, _ in gallery))}
    cards = [sample_card(sample, {system: by_id[sample.id] for system, by_id in replies.items()},
                         box_format, rewards, kind,
                         f"task-{groups['task'].index(sample.task)} "
                         f"kind-{groups['kind'].index(kind)}")
             for kind, sample in gallery]
    return _macros.filters(groups) + Markup("").join(cards)


def sample_card(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                rewards: dict[str, Reward], kind: str = "", classes: str = "") -> Markup:
    """One sample with the replies of some systems: images with boxes, reasoning, answer, rewards.

    kind: stands in its head. classes: what the filters know the card by.
    """
    rows = [_reply_row(system, reply, sample, box_format, rewards)
            for system, reply in replies.items()]
    question = format_question(sample, box_format, with_instruction=False)
    return _macros.card(sample, classes, kind, question, rows)


def _reply_row(system: str, reply: str, sample: Sample, box_format: BoxFormat,
               rewards: dict[str, Reward]) -> dict:
    scores = {name: compute_reward(name, reward, reply, sample, box_format)
              for name, reward in rewards.items()}
    return {
        "system": system, "is_correct": is_correct(reply, sample, box_format),
        "outcome": classify_outcome(reply, sample, box_format),
        "rewards": ", ".join(f"{name} {round(value, 2):g}" for name, value in scores.items()
                             if value is not None),
        "image": image_tag(draw_sample(sample, reply, box_format, 130), system),
        "thinking": parse_reply(reply).thinking or "-",
        "answer": reply.split("</think>")[-1][:300]}


def image_tag(picture, alt: str) -> Markup:
    """An <img> with the picture inside: a PIL image or a matplotlib figure."""
    data = io.BytesIO()
    if isinstance(picture, plt.Figure):
        picture.savefig(data, format="png", dpi=110, bbox_inches="tight")
    else:
        picture.save(data, "PNG")
    return _macros.image(base64.b64encode(data.getvalue()).decode(), alt)


def html_table(rows: list[dict]) -> Markup:
    """An HTML table of plain rows; pairs are shown as intervals.

    Columns without a value are left out; "" if only one has any.
    """
    columns = [name for name in dict.fromkeys(name for row in rows for name in row)
               if any(row.get(name) is not None for row in rows)]
    if len(columns) < 2:
        return Markup("")
    cells = [[_cell_text(row.get(column)) for column in columns] for row in rows]
    return _macros.table(columns, cells)


def _cell_text(value) -> str:
    if isinstance(value, list | tuple):
        sign = "+" if min(value) < 0 else ""
        return f"{value[0]:{sign}.1f} to {value[1]:{sign}.1f}"
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def render_page(title: str, sections: list[tuple[str, Markup]]) -> str:
    """The whole page. sections: (heading, HTML) pairs; a section without content is left out."""
    return str(_macros.page(title, sections)) + "\n"


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
    scores = plots.plot_bars(bars, "suite", "score", "GRPO model, greedy, percent", "run",
                             "colorblind", "ci95")
    rows = [{name: str(value) for name, value in row.items()} for row in differences]
    sections = [
        ("Scores, greedy (percent)", html_table(compare_scores(evaluated))),
        ("Bars", image_tag(scores, "scores per suite")),
        ("Training", image_tag(_reward_figure(metrics), "reward")),
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
    figure, axis = plt.subplots(figsize=(8, 3))
    sns.lineplot(table, x="step", y="reward", hue="run", palette="colorblind", ax=axis)
    axis.set_title("Mean reward over the last ten steps", loc="left", fontsize=11)
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
    return _macros.captioned(content, CAPTIONS[name]) if content else Markup("")


def report_sections(metrics: dict, figures: dict[str, plt.Figure | Image | None], gallery: Markup,
                    tables: dict[str, list[dict]], hardware: str) -> list[tuple[str, Markup]]:
    """The sections of the run's page, for `render_page`.

    metrics: of stage 06. figures: "suites", "ood", "tasks", "outcomes", "loss", "grpo", "flow",
    "dropped", "difficulty", "shares", "rollouts"; None for one that cannot be drawn. tables: rows
    of "benchmark" (a real one, or []), "ood", "rewards" and "stages". hardware: a sentence below
    the last.
    """
    def images(*names: str) -> Markup:
        return Markup("").join(captioned(image_tag(figures[name], name), name)
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
        ("How this run was made", _macros.captioned(html_table(tables["stages"]), hardware)),
        ("Gallery: target green, answer dashed orange, reference pink", gallery)]


def score_bars(systems: dict) -> list[dict]:
    """Rows {suite, system, score, ci95} for `plots.plot_bars`; systems: of stage 06's metrics."""
    return [{"suite": suite_name(suite), "system": system, "score": result["score"],
             "ci95": result["ci95"]}
            for system, suites in systems.items() for suite, result in suites.items()]


def task_bars(systems: dict, suite: str = "mig_bench") -> list[dict]:
    """Rows {task, system, acc@0.5, ci95} of a suite's tasks, for `plots.plot_bars`."""
    return [{"task": OOD_NAMES.get(task, task), "system": system, "acc@0.5": result["acc@0.5"],
             "ci95": result["ci95"]}
            for system, suites in systems.items()
            for task, result in suites[suite]["tasks"].items()]
