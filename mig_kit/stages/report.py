"""Stage 07: one self-contained HTML page: the paper's claims beside this run's, bars, curves and a gallery.

Every text that a model or a data set produced is escaped; the page holds no script.
"""

import base64
import html
import io
from collections import Counter

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.plots import draw_sample
from mig_kit.prompts import format_question, parse_reply
from mig_kit.rewards import box_reward, choice_reward, format_reward, image_reward, is_correct
from mig_kit.sample import Sample
from mig_kit.world.tasks import count_listed_objects

# Claim, the paper's points (arXiv 2507.00748, v1/v2 for the second row), the delta and suite of metrics.json.
CLAIMS = (
    ("MIG-Bench, RL over SFT", 9.04, "grpo-sft", "mig_bench"),
    ("Out-of-domain reasoning grounding, RL over SFT", 4.98, "grpo-sft", "ood_grounding"),
    ("BLINK, RL over base", 3.1, "grpo-base", "blink"),
    ("MMIU, RL over base", 2.4, "grpo-base", "mmiu"),
)


STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.35rem .8rem;border-bottom:1px solid #8886;text-align:right}
th:first-child,td:first-child{text-align:left}img{max-width:100%;background:#fff;border-radius:4px}
.card{border:1px solid #8886;border-radius:8px;padding:.8rem;margin:1rem 0}.card p{margin:.3rem 0}
.right{border-left:6px solid #009E73}.wrong{border-left:6px solid #D55E00}code{white-space:pre-wrap;word-break:break-word}
small{opacity:.75}.pick{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:.3rem 0}.wide{overflow-x:auto}
@media print{.pick{display:none}.card{break-inside:avoid}}
"""


OUTCOMES = ("right", "box off", "wrong image", "wrong option", "no answer")


def claim_rows(metrics: dict) -> list[dict]:
    """Rows {claim, paper, here, ci95, sampled} from 06's metrics.json; all in points."""
    rows = []
    for claim, paper, delta, suite in CLAIMS:
        found = metrics["deltas"][delta][suite]
        rows.append({"claim": claim, "paper": paper, "here": found["value"], "ci95": found["ci95"], "sampled": found["sampled"]})
    return rows


def classify_outcome(reply: str, sample: Sample, box_format: BoxFormat) -> str:
    """What became of a reply, one of OUTCOMES; "box off" is the right image with an IoU under 0.5."""
    read = parse_reply(reply)
    if is_correct(reply, sample, box_format=box_format):
        return "right"
    if sample.options:
        return "wrong option" if read.letter else "no answer"
    if read.box is None:
        return "no answer"
    return "box off" if read.image in {number for number, _ in sample.targets} else "wrong image"


def count_outcomes(samples: list[Sample], replies: dict[str, dict[str, str]], box_format: BoxFormat) -> dict[str, dict[str, int]]:
    """system -> outcome -> how many of `samples`; replies: per system by sample id."""
    counts = {name: Counter(classify_outcome(found[s.id], s, box_format) for s in samples) for name, found in replies.items()}
    seen = [kind for kind in OUTCOMES if any(found[kind] for found in counts.values())]
    return {name: {kind: found[kind] for kind in seen} for name, found in counts.items()}


def sample_counts(metrics: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Where samples went: traces through the filter, candidates through rejection sampling. metrics: by stage."""
    traces, sampled = metrics["01_synthesize"]["traces"], metrics["04_rejection_sampling"]
    why: Counter = Counter()
    for counts in sampled["why"].values():
        why.update(counts)
    return {"traces": {"kept": traces["kept"], **{f"dropped: {reason}": n for reason, n in traces["dropped"].items()}},
            "candidates": dict(why)}


def pass_rate_by_difficulty(rates: dict[str, float], samples: list[Sample], bins: int = 5) -> list[dict]:
    """Mean pass rate over what makes a question hard: rows {"things": "3 to 4", "pass rate", "n"}, by things in all images.

    rates: by sample id, 0..1; counted on the samples whose notes list their images, as those of drawn scenes do.
    """
    listed = [(count_listed_objects(s.notes), rates[s.id]) for s in samples if s.notes and s.id in rates]
    if not listed:
        return []
    edges = np.unique(np.quantile([n for n, _ in listed], np.linspace(0, 1, bins + 1)).round())
    rows = []
    for low, high in zip(edges, edges[1:]):
        inside = [rate for n, rate in listed if low <= n < high or n == high == edges[-1]]
        last = int(high) - (high != edges[-1])
        if inside:
            rows.append({"things": f"{int(low)} to {last}" if last > low else f"{int(low)}", "pass rate": float(np.mean(inside)),
                         "n": len(inside)})
    return rows


def compare_scores(found: dict[str, dict]) -> list[dict]:
    """Rows {run, system, suites...} of several runs' 06 metrics, with the differences in points below each run."""
    rows = []
    for run, metrics in found.items():
        rows += [{"run": run, "what": system, **{suite: r["score"] for suite, r in suites.items()}}
                 for system, suites in metrics["systems"].items()]
        rows += [{"run": run, "what": f"{name} (points)", **{suite: d["value"] for suite, d in deltas.items()}}
                 for name, deltas in metrics["deltas"].items()]
    return rows


def two_run_page(found: dict[str, dict[str, dict]], differences: list[dict]) -> str:
    """One page about several runs. found: run -> stage -> metrics; differences: rows of `compare.differences`."""
    import pandas as pd
    import seaborn as sns
    from matplotlib import pyplot as plt

    from mig_kit import plots

    plots.set_style()
    evaluated = {run: metrics["06_evaluate"] for run, metrics in found.items()}
    bars = [{"suite": suite, "run": run, "score": r["score"], "ci95": r["ci95"]}
            for run, metrics in evaluated.items() for suite, r in metrics["systems"]["grpo"].items()]
    figure = plots.plot_bars(bars, "suite", "score", "GRPO model, greedy, percent", "run", "colorblind", "ci95")
    rows = [{"run": run, "step": row["step"], "reward": row["reward"]}
            for run, metrics in found.items() for row in metrics["05_grpo"]["curves"]]
    curve, axis = plt.subplots(figsize=(8, 3))
    table_rows = pd.DataFrame(rows)
    table_rows["reward"] = table_rows.groupby("run")["reward"].transform(lambda v: v.rolling(10, min_periods=1).mean())
    sns.lineplot(table_rows, x="step", y="reward", hue="run", palette="colorblind", ax=axis)
    axis.set_title("Mean reward over the last ten steps", loc="left", fontsize=11)
    what = html_table([{k: str(v) for k, v in row.items()} for row in differences]) if differences else "nothing"
    sections = [("Scores, greedy (percent)", html_table(compare_scores(evaluated))), ("Bars", image_tag(figure, "scores per suite")),
                ("Training", image_tag(curve, "reward")), ("What differs", what)]
    return render_page(" and ".join(found), sections)


def gallery_filters(tasks: list[str], kinds: list[str]) -> str:
    """Radio buttons that show only some cards of the gallery; style sheets do it, no script."""
    rules, rows = [], []
    for group, names in (("task", tasks), ("kind", kinds)):
        buttons = [f'<label><input type=radio name=pick-{group} id=pick-{group}-all checked> all</label>']
        for i, name in enumerate(names):
            buttons.append(f"<label><input type=radio name=pick-{group} id=pick-{group}-{i}> {html.escape(name)}</label>")
            rules.append(f"body:has(#pick-{group}-{i}:checked) .card:not(.{group}-{i}){{display:none}}")
        rows.append(f"<div class=pick>{''.join(buttons)}</div>")
    return f"<style>{''.join(rules)}</style>{''.join(rows)}"


def gallery_html(chosen: list[tuple[str, Sample]], replies: dict[str, dict[str, str]], box_format: BoxFormat) -> str:
    """Cards of (kind, sample) pairs with the filters above them; replies: per system by sample id."""
    tasks, kinds = (list(dict.fromkeys(values)) for values in (sorted(s.task for _, s in chosen), (k for k, _ in chosen)))
    cards = [sample_card(s, {name: r[s.id] for name, r in replies.items()}, box_format,
                  f"task-{tasks.index(s.task)} kind-{kinds.index(kind)}", kind) for kind, s in chosen]
    return gallery_filters(tasks, kinds) + "".join(cards)


def image_tag(picture, alt: str) -> str:
    """An <img> with the picture inside: a PIL image or a matplotlib figure."""
    data = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(data, format="png", dpi=110, bbox_inches="tight")
    else:
        picture.save(data, "PNG")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def html_table(rows: list[dict]) -> str:
    """An HTML table of plain rows; pairs are shown as intervals. Columns without a value are left out; "" if only one has any."""
    def cell(value) -> str:
        if isinstance(value, list | tuple):
            return f"{value[0]:+.1f} to {value[1]:+.1f}" if min(value) < 0 else f"{value[0]:.1f} to {value[1]:.1f}"
        return f"{value:.2f}" if isinstance(value, float) else html.escape("" if value is None else str(value))

    keys = [key for key in dict.fromkeys(k for row in rows for k in row) if any(row.get(key) is not None for row in rows)]
    if len(keys) < 2:
        return ""
    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in keys)
    body = "".join("<tr>" + "".join(f"<td>{cell(row.get(key))}</td>" for key in keys) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def sample_card(sample: Sample, replies: dict[str, str], box_format: BoxFormat, classes: str = "", kind: str = "") -> str:
    """One sample with the replies of some systems: pictures with boxes, question, reasoning, answer and rewards, all escaped.

    classes: what the filters know the card by; kind: said in its head.
    """
    parts = [f'<div class="card {html.escape(classes)}"><p><b>{html.escape(sample.task)}</b> {html.escape(kind)} '
             f"<small>{html.escape(sample.id)}</small></p>",
             f"<p>{html.escape(format_question(sample, box_format).split(' Think in ')[0])}</p>"]
    for system, reply in replies.items():
        right, read = is_correct(reply, sample, box_format=box_format), parse_reply(reply)
        rewards = f"format {format_reward(reply, sample):g}, " + (
            f"choice {choice_reward(reply, sample):g}" if sample.options else
            f"image {image_reward(reply, sample):g}, box {box_reward(reply, sample, box_format=box_format):.2f}")
        parts.append(f'<div class="{"right" if right else "wrong"}" style="padding-left:.6rem"><p><b>{html.escape(system)}</b> '
                     f"({classify_outcome(reply, sample, box_format)}; {rewards})</p>{image_tag(draw_sample(sample, reply, box_format, 130), system)}"
                     f"<p><small>thinks:</small> <code>{html.escape(read.thinking or '-')}</code></p>"
                     f"<p><small>says:</small> <code>{html.escape(reply.split('</think>')[-1][:300])}</code></p></div>")
    return "".join(parts) + "</div>"


def pick_gallery(samples: list[Sample], before: dict[str, str], after: dict[str, str], box_format: BoxFormat,
           per_kind: int = 4) -> list[tuple[str, Sample]]:
    """Samples for the gallery by what changed from `before` to `after` (replies by id): fixed, kept, lost, never right."""
    kinds: dict[str, list[Sample]] = {"wrong, then right": [], "right both times": [], "right, then wrong": [],
                                      "wrong both times": []}
    for sample in samples:
        was, now = (is_correct(r[sample.id], sample, box_format=box_format) for r in (before, after))
        kind = list(kinds)[{(0, 1): 0, (1, 1): 1, (1, 0): 2, (0, 0): 3}[int(was), int(now)]]
        if len(kinds[kind]) < per_kind and sample.task not in [s.task for s in kinds[kind]]:
            kinds[kind].append(sample)
    return [(kind, sample) for kind, found in kinds.items() for sample in found]


def render_page(title: str, sections: list[tuple[str, str]]) -> str:
    """The whole page. sections: (heading, HTML) pairs; headings are escaped here, the HTML must be safe already."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections if content)
    return (f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n")
