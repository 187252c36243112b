"""Stage 07: what notebook 07 displays of a run, and its page, which is the notebook without code.

The page needs no other file and holds no script; all texts of models and data are escaped.
"""

import io
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path

import nbformat
import pandas as pd
import PIL.Image
from IPython.display import HTML, Image, display
from matplotlib import pyplot as plt
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

from mig_kit.boxes import BoxFormat, iou
from mig_kit.common import write_atomically
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.drawing.pictures import draw_replies
from mig_kit.evaluation.tables import RL_STARTS
from mig_kit.image_files import encode_image, to_data_url
from mig_kit.prompts import Answer, read_reply
from mig_kit.rewards import is_correct, reply_iou
from mig_kit.sample import Sample
from mig_kit.serving.stored_replies import load_replies, reply_file
from mig_kit.training.reward_loading import Score
from mig_kit.world.suites import is_on_target, list_object_boxes, suite_title

OUTCOMES = ("correct", "loose box", "wrong object", "wrong image", "wrong option", "no answer",
            "box where none is")
LOOSE_IOU = 0.1  # from here on a box of own data, whose objects are not known, counts as loose
KINDS = {(False, True): "wrong, then correct", (True, True): "correct both times",
         (True, False): "correct, then wrong", (False, False): "wrong both times"}
ROLLOUTS = "The boxes of the replies to one prompt, before RL and after more and more updates"
STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{margin:0 0 1rem}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid #8886;text-align:right}
th:first-child,td:first-child{text-align:left}
td{white-space:nowrap}
img{max-width:100%;background:#fff;border-radius:4px}
.output_html,.output_png{overflow-x:auto;background:
linear-gradient(to right,Canvas 30%,#0000) 0/3rem 100% no-repeat local,
linear-gradient(to left,Canvas 30%,#0000) 100%/3rem 100% no-repeat local,
linear-gradient(to right,#888a,#0000) 0/1rem 100% no-repeat,
linear-gradient(to left,#888a,#0000) 100%/1rem 100% no-repeat}
@media(max-width:46rem){img{max-width:36rem}}
small,.text_cell p{font-size:.9rem;opacity:.8}
"""


def show(*parts: list[dict] | plt.Figure | PIL.Image.Image | HTML | None) -> None:
    """Display rows as a table, figures, pictures of rollouts and HTML; nothing for an empty part.
    """
    for part in parts:
        if isinstance(part, plt.Figure):
            title = part.get_suptitle() or part.axes[0].get_title(loc="left")
            part.savefig(file := io.BytesIO(), dpi=150, bbox_inches="tight", format="png")
            plt.close(part)  # else the notebook shows it once more
            part = Image(file.getvalue(), alt=title)
        elif isinstance(part, PIL.Image.Image):
            part = Image(encode_image(part), alt=ROLLOUTS)
        elif isinstance(part, list):
            html = table_html(part)
            part = html and HTML(html)
        if part:
            display(part)


def headline(run_id: str, outcome: str, moved: str, facts: str) -> HTML:
    """The first lines: what came out, which tasks moved, and what the run consists of."""
    return HTML(f"<h1>mig-kit run {escape(run_id)}</h1>\n<p><strong>{escape(outcome)}</strong> "
                f"{escape(moved)}</p>\n<p><small>{escape(facts)}</small></p>")


def table_html(rows: list[dict]) -> str:
    """Plain rows as escaped HTML without empty columns; "" for one column."""
    table = pd.DataFrame(rows).dropna(axis=1, how="all")
    if len(table.columns) < 2:
        return ""
    with pd.option_context("display.max_colwidth", None):
        return table.to_html(index=False, border=0, na_rep="", float_format="{:.1f}".format)


def write_page(folder: Path, run_id: str) -> Path | None:
    """Write report.html beside the executed notebook in 07's folder, unless it is there; its path.
    """
    source, page = folder / "07_report.ipynb", folder / "report.html"
    if not source.is_file():  # a notebook that is run by hand lies elsewhere
        return None
    if not page.is_file():
        html = export_page(run_id, nbformat.read(source, 4).cells)
        write_atomically(page, lambda temporary: temporary.write_text(html, "utf-8"))
    return page


def export_page(run_id: str, cells: list[NotebookNode]) -> str:
    """The HTML of what executed cells display, each below the text directly above it."""
    shown = []
    for above, cell in pairwise(cells):
        outputs = [part for part in cell.get("outputs", ()) if part.output_type == "display_data"]
        if outputs:
            shown += [above] * (above.cell_type == "markdown") + [new_code_cell(outputs=outputs)]
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(new_notebook(cells=shown))
    return ("<!doctype html>\n<html lang=en><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width">\n'
            f"<title>mig-kit run {run_id}</title>\n<style>{STYLE}</style>\n{body}</html>\n")


def load_greedy_replies(folder: Path, suite: str, samples: Sequence[Sample],
                        systems: Iterable[str]) -> dict[str, dict[str, str]]:
    """System -> sample id -> greedy reply; {} without samples. folder: "replies" of 06."""
    replies = {}
    for system in [name for name in SYSTEM_LABELS if samples and name in systems]:
        stored = load_replies(reply_file(folder, system, suite))
        replies[system] = {sample.id: stored[sample.id][0] for sample in samples}
    return replies


def classify_outcome(answer: Answer, sample: Sample) -> str:
    """One of OUTCOMES.

    A box in the correct image with IoU under 0.5 is a "loose box" if it overlaps the target more
    than any other object, else a "wrong object". Of own data it is loose from LOOSE_IOU on.
    """
    if is_correct(answer, sample):
        return "correct"
    if sample.options:
        return "wrong option" if answer.letter else "no answer"
    if not answer.has_box:
        return "no answer"
    targets = [target.box for target in sample.targets if target.image == answer.image]
    if not targets:
        return "wrong image" if sample.targets else "box where none is"
    if not sample.spec:
        is_loose = reply_iou(answer, sample) >= LOOSE_IOU
    else:
        nearest = max(targets, key=lambda target: iou(answer.box, target))
        is_loose = is_on_target(answer.box, nearest,
                                list_object_boxes(sample.spec)[answer.image - 1])
    return "loose box" if is_loose else "wrong object"


def count_outcomes(samples: Sequence[Sample], replies: dict[str, dict[str, str]],
                   box_format: BoxFormat) -> dict[str, dict[str, int]]:
    """system -> outcome -> how many of `samples`; replies: per system by sample id."""
    counts = {system: Counter(
        classify_outcome(read_reply(by_id[sample.id], sample, box_format), sample)
        for sample in samples) for system, by_id in replies.items()}
    return {system: {outcome: count[outcome] for outcome in OUTCOMES}
            for system, count in counts.items()}


def pick_gallery(samples: Sequence[Sample], replies: dict[str, dict[str, str]],
                 box_format: BoxFormat, per_kind: int = 4) -> list[tuple[str, Sample, dict]]:
    """(kind, sample, system -> reply) of samples by what RL changed.

    At most `per_kind` samples of each of KINDS, of as many tasks as possible.

    Args:
        replies: per system by sample id.
    """
    before = next(replies[name] for name in RL_STARTS if name in replies)
    places, rows = Counter(), []  # place: how many of this kind and task came before
    for sample in samples:
        kind = KINDS[tuple(is_correct(read_reply(by_id[sample.id], sample, box_format), sample)
                           for by_id in (before, replies["grpo"]))]
        rows.append((places[kind, sample.task], kind, sample))
        places[kind, sample.task] += 1
    rows.sort(key=lambda row: row[0])
    return [(kind, sample, {system: by_id[sample.id] for system, by_id in replies.items()})
            for kind in KINDS.values()
            for _, _, sample in [row for row in rows if row[1] == kind][:per_kind]]


def draw_gallery(gallery: list[tuple[str, Sample, dict]], box_format: BoxFormat,
                 scores: dict[str, Score]) -> HTML:
    """HTML that unfolds to pictures of `pick_gallery`'s samples, with replies and rewards."""
    parts = ["<details><summary>Show the questions</summary>"]
    for kind, sample, replies in gallery:
        labelled = {}
        for system, reply in replies.items():
            answer = read_reply(reply, sample, box_format)
            values = {name: score(answer, sample) for name, score in scores.items()}
            rewards = [f"{name} {value:.2g}" for name, value in values.items() if value is not None]
            outcome = classify_outcome(answer, sample)
            facts = [outcome] * (outcome != "correct") + rewards
            labelled[", ".join([SYSTEM_LABELS[system], *facts])] = reply
        picture = to_data_url(draw_replies(sample, labelled, box_format), "WEBP", quality=85)
        parts.append(f"<p>{kind} · {suite_title(sample.suite)}, {escape(sample.task)} "
                     f"<small>{escape(sample.id)}</small></p>"
                     f'<img alt="{escape("; ".join(labelled))}" src="{picture}">')
    return HTML("\n".join([*parts, "</details>"]))
