"""Stage 07: one self-contained HTML page: the paper's claims beside this run's, bars, curves and a gallery.

Every text that a model or a data set produced is escaped; the page holds no script.
"""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from scipy import stats

from mig_kit.plots import strip
from mig_kit.prompts import parse, question_text
from mig_kit.records import Sample
from mig_kit.rewards import correct

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
small{opacity:.75}
"""


def headline(metrics: dict) -> list[dict]:
    """Rows {claim, paper, here, ci95, sampled} from 06's metrics.json; all in points."""
    rows = []
    for claim, paper, delta, suite in CLAIMS:
        found = metrics["deltas"][delta][suite]
        rows.append({"claim": claim, "paper": paper, "here": found["value"], "ci95": found["ci95"], "sampled": found["sampled"]})
    return rows


def side_by_side(found: dict[str, dict]) -> str:
    """A Markdown table of runs (run id -> 06's metrics.json): per claim base, SFT and GRPO, the difference, the mean.

    Differences carry their 95 % interval over the test samples; the last column is the mean over runs, with the half width
    of its 95 % t interval when there are several.
    """
    lines = ["| claim | paper | " + " | ".join(f"{run}: base / SFT / GRPO, difference" for run in found) + " | mean |",
             "|---|---|" + "---|" * (len(found) + 1)]
    for claim, paper, delta, suite in CLAIMS:
        cells, values = [], []
        for metrics in found.values():
            scores = " / ".join(f"{metrics['systems'][s][suite]['score']:.1f}" for s in ("base", "sft", "grpo"))
            gap = metrics["deltas"][delta][suite]
            values.append(gap["value"])
            cells.append(f"{scores}, **{gap['value']:+.1f}** ({gap['ci95'][0]:+.1f} to {gap['ci95'][1]:+.1f})")
        mean = f"**{np.mean(values):+.2f}**"
        if len(values) > 1:
            mean += f" ± {stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5:.2f}"
        lines.append(f"| {claim} | {paper:+.2f} | " + " | ".join(cells) + f" | {mean} |")
    return "\n".join(lines)


def image_tag(picture, alt: str) -> str:
    """An <img> with the picture inside: a PIL image or a matplotlib figure."""
    data = io.BytesIO()
    if hasattr(picture, "savefig"):
        picture.savefig(data, format="png", dpi=110, bbox_inches="tight")
    else:
        picture.save(data, "PNG")
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}">'


def table(rows: list[dict]) -> str:
    """An HTML table of plain rows; pairs are shown as intervals."""
    def cell(value) -> str:
        if isinstance(value, list | tuple):
            return f"{value[0]:+.1f} to {value[1]:+.1f}" if min(value) < 0 else f"{value[0]:.1f} to {value[1]:.1f}"
        return f"{value:.2f}" if isinstance(value, float) else html.escape("" if value is None else str(value))

    head = "".join(f"<th>{html.escape(str(key))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def card(sample: Sample, replies: dict[str, str], pixels: tuple[int, int]) -> str:
    """One sample with the replies of some systems: pictures with boxes, question, reasoning and answer, all escaped."""
    parts = [f"<div class=card><p><b>{html.escape(sample.task)}</b> <small>{html.escape(sample.id)}</small></p>",
             f"<p>{html.escape(question_text(sample, *pixels).split(' Think in ')[0])}</p>"]
    for system, reply in replies.items():
        right = correct(reply, sample, pixels=pixels)
        read = parse(reply)
        parts.append(f'<div class="{"right" if right else "wrong"}" style="padding-left:.6rem"><p><b>{html.escape(system)}</b> '
                     f'({"right" if right else "wrong"})</p>{image_tag(strip(sample, reply, pixels, 130), system)}'
                     f"<p><small>thinks:</small> <code>{html.escape(read.thinking or '-')}</code></p>"
                     f"<p><small>says:</small> <code>{html.escape(reply.split('</think>')[-1][:300])}</code></p></div>")
    return "".join(parts) + "</div>"


def choose(samples: list[Sample], before: dict[str, str], after: dict[str, str], pixels: tuple[int, int],
           per_kind: int = 4) -> list[tuple[str, Sample]]:
    """Samples for the gallery by what changed from `before` to `after` (replies by id): fixed, kept, lost, never right."""
    kinds: dict[str, list[Sample]] = {"wrong, then right": [], "right both times": [], "right, then wrong": [],
                                      "wrong both times": []}
    for sample in samples:
        was, now = (correct(r[sample.id], sample, pixels=pixels) for r in (before, after))
        kind = list(kinds)[{(0, 1): 0, (1, 1): 1, (1, 0): 2, (0, 0): 3}[int(was), int(now)]]
        if len(kinds[kind]) < per_kind and sample.task not in [s.task for s in kinds[kind]]:
            kinds[kind].append(sample)
    return [(kind, sample) for kind, found in kinds.items() for sample in found]


def page(title: str, sections: list[tuple[str, str]]) -> str:
    """The whole page. sections: (heading, HTML) pairs; headings are escaped here, the HTML must be safe already."""
    body = "".join(f"<h2>{html.escape(heading)}</h2>{content}" for heading, content in sections)
    return (f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n")


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())
