"""Stage 07: one HTML page with tables, figures and a gallery of replies.

The page needs no other file and holds no script; all texts of models and data are escaped.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from markupsafe import Markup
from matplotlib import pyplot as plt
from PIL.Image import Image

from mig_kit.boxes import BoxFormat, iou
from mig_kit.drawing.palette import PREDICTED, SYSTEM_COLOURS, SYSTEM_LABELS, text_colour
from mig_kit.drawing.pictures import SYSTEM_MARKS, draw_sample, draw_systems
from mig_kit.prompts import format_question, parse_reply, reply_boxes_in_original
from mig_kit.rewards import is_correct, reply_iou
from mig_kit.sample import Sample
from mig_kit.serving.stored_replies import load_replies
from mig_kit.stages import tables
from mig_kit.training.reward_loading import Score
from mig_kit.world.suites import OWN, is_on_target, list_object_boxes, suite_title

SYSTEMS = ("base", "sft", "start", "grpo")
RL_STARTS = ("start", "sft", "base")  # what RL is compared with, the first that a run has
OUTCOMES = ("correct", "loose box", "wrong object", "wrong image", "wrong option", "no answer",
            "box where none is")
LOOSE_IOU = 0.1  # from here on a box of own data, whose objects are not known, counts as loose
KINDS = {(False, True): "wrong, then correct", (True, True): "correct both times",
         (True, False): "correct, then wrong", (False, False): "wrong both times"}

_templates = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent),
                                autoescape=True, trim_blocks=True, lstrip_blocks=True)
macros = _templates.get_template("report.html.jinja").module


def load_greedy_replies(folder: Path, suite: str, samples: Sequence[Sample],
                        systems: Iterable[str]) -> dict[str, dict[str, str]]:
    """System -> sample id -> greedy reply; {} without samples. folder: "replies" of 06."""
    replies = {}
    for system in [name for name in SYSTEMS if samples and name in systems]:
        stored = load_replies(folder / f"{system}_{suite}_greedy.jsonl")
        replies[system] = {sample.id: stored[sample.id][0] for sample in samples}
    return replies


def classify_outcome(reply: str, sample: Sample, box_format: BoxFormat) -> str:
    """One of OUTCOMES.

    A box in the correct image with IoU under 0.5 is a "loose box" if it overlaps the target more
    than any other object, else a "wrong object". Of own data it is loose from LOOSE_IOU on.
    """
    answer = parse_reply(reply)
    if is_correct(reply, sample, box_format):
        return "correct"
    if sample.options:
        return "wrong option" if answer.letter else "no answer"
    if answer.box is None:
        return "no answer"
    targets = [target.box for target in sample.targets if target.image == answer.image]
    if not targets:
        return "wrong image" if sample.targets else "box where none is"
    if not sample.spec:
        is_loose = reply_iou(reply, sample, box_format) >= LOOSE_IOU
    else:
        (_, box), = reply_boxes_in_original(sample, reply, box_format)
        nearest = max(targets, key=lambda target: iou(box, target))
        is_loose = is_on_target(box, nearest, list_object_boxes(sample.spec)[answer.image - 1])
    return "loose box" if is_loose else "wrong object"


def count_outcomes(samples: Sequence[Sample], replies: dict[str, dict[str, str]],
                   box_format: BoxFormat) -> dict[str, dict[str, int]]:
    """system -> outcome -> how many of `samples`; replies: per system by sample id."""
    counts = {system: Counter(classify_outcome(by_id[sample.id], sample, box_format)
                              for sample in samples)
              for system, by_id in replies.items()}
    occurring = [outcome for outcome in OUTCOMES
                 if any(count[outcome] for count in counts.values())]
    return {system: {outcome: count[outcome] for outcome in occurring}
            for system, count in counts.items()}


def pick_gallery(samples: Sequence[Sample], before: dict[str, str], after: dict[str, str],
                 box_format: BoxFormat, per_kind: int = 4) -> list[tuple[str, Sample]]:
    """(kind, sample) pairs, by what changed from `before` to `after` (replies by sample id).

    At most `per_kind` samples of each of KINDS, of as many tasks as possible.
    """
    outcomes = [tuple(is_correct(replies[sample.id], sample, box_format)
                      for replies in (before, after)) for sample in samples]
    table = pd.DataFrame({"kind": [KINDS[outcome] for outcome in outcomes],
                          "task": [sample.task for sample in samples]})
    table["place"] = table.groupby(["kind", "task"]).cumcount()
    ranked = table.sort_values("place", kind="stable")
    return [(kind, samples[row]) for kind in KINDS.values()
            for row in ranked.index[ranked["kind"] == kind][:per_kind]]


def collect_gallery(folder: Path, samples: dict[str, Sequence[Sample]], systems: Iterable[str],
                    box_format: BoxFormat, per_kind: int) -> tuple[list[tuple[str, Sample]],
                                                                   dict[str, dict[str, str]]]:
    """(gallery of all suites, replies per system by sample id); folder: "replies" of 06."""
    gallery: list[tuple[str, Sample]] = []
    replies: dict[str, dict[str, str]] = {}
    for suite, part in samples.items():
        by_system = load_greedy_replies(folder, suite, part, systems)
        before = next(by_system[name] for name in RL_STARTS if name in by_system)
        picked = pick_gallery(part, before, by_system["grpo"], box_format, per_kind)
        gallery += picked
        for system, by_id in by_system.items():
            replies.setdefault(system, {}).update(
                {sample.id: by_id[sample.id] for _, sample in picked})
    return gallery, replies


def gallery_html(gallery: list[tuple[str, Sample]], replies: dict[str, dict[str, str]],
                 box_format: BoxFormat, scores: dict[str, Score]) -> Markup:
    """Cards of (kind, sample) pairs; replies: per system by sample id; scores: as `sample_card`."""
    return Markup("").join(
        sample_card(sample, {system: by_id[sample.id] for system, by_id in replies.items()
                             if sample.id in by_id}, box_format, scores, kind)
        for kind, sample in gallery)


def sample_card(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                scores: dict[str, Score], kind: str = "") -> Markup:
    """One sample as a picture with all boxes, and a line for each system's reply.

    kind: the card's heading. scores: the rewards to show, of `reward_loading.score_functions`.
    """
    rows = [_reply_row(system, reply, sample, box_format, scores)
            for system, reply in replies.items()]
    question = format_question(sample, box_format, with_instruction=False)
    picture = (draw_systems(sample, replies, box_format) if len(replies) > 1 else
               draw_sample(sample, next(iter(replies.values())), box_format, 150))
    outcomes = "; ".join(f"{row['system']}: {row['outcome']}" for row in rows)
    alt = f"{len(sample.sizes)} images with the target and the boxes of the replies. {outcomes}"
    return macros.card(sample, suite_title(sample.suite), kind, question, image_tag(picture, alt),
                       rows)


def _reply_row(system: str, reply: str, sample: Sample, box_format: BoxFormat,
               scores: dict[str, Score]) -> dict:
    values = {name: score(reply, sample) for name, score in scores.items()}
    colour = SYSTEM_COLOURS.get(system, PREDICTED)
    facts = [f"IoU {reply_iou(reply, sample, box_format):.2f}"] if sample.targets else []
    facts += [f"{name} {round(value, 2):g}" for name, value in values.items() if value is not None]
    return {
        "system": SYSTEM_LABELS.get(system, system),
        "letter": SYSTEM_MARKS[system][1] if system in SYSTEM_MARKS else "",
        "colour": colour, "ink": text_colour(colour),
        "is_correct": is_correct(reply, sample, box_format),
        "outcome": classify_outcome(reply, sample, box_format),
        "rewards": ", ".join(facts),
        "thinking": parse_reply(reply).thinking or "-",
        "answer": reply.split("</think>")[-1][:300]}


def image_tag(picture, alt: str) -> Markup:
    """An <img> with the picture inside: a PIL image or a matplotlib figure."""
    data = io.BytesIO()
    if isinstance(picture, plt.Figure):
        picture.savefig(data, format="png", dpi=150, bbox_inches="tight")
        kind = "png"
    else:
        picture.save(data, "WEBP", quality=85)
        kind = "webp"
    return macros.image(kind, base64.b64encode(data.getvalue()).decode(), alt)


def html_table(rows: list[dict]) -> Markup:
    """Plain rows as escaped HTML, pairs as intervals, without empty columns; "" for one column."""
    table = pd.DataFrame(rows, dtype=object).dropna(axis=1, how="all")
    if len(table.columns) < 2:
        return Markup("")
    with pd.option_context("display.max_colwidth", None):
        text = table.map(_cell_text).to_html(index=False, border=0)
    return Markup("<div class=wide>{}</div>").format(Markup(text))


def _cell_text(value) -> str:
    if isinstance(value, list | tuple):
        return f"{value[0]:.1f} to {value[1]:.1f}"
    if value is None or value != value:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def render_page(title: str, sections: list[tuple[str, Markup]], facts: str = "",
                outcome: str = "") -> str:
    """The whole page of (heading, HTML) sections; facts, outcome: lines below the title."""
    return str(macros.page(title, sections, facts, outcome)) + "\n"


def _alternative_text(picture: plt.Figure | Image) -> str:
    """What a picture shows, for readers who do not see it; of a figure its title."""
    if isinstance(picture, Image):
        return "The boxes of the replies to one prompt, before RL and after more and more updates"
    return picture.get_suptitle() or picture.axes[0].get_title(loc="left")


def report_sections(metrics: dict, figures: Mapping[str, plt.Figure | Image | None],
                    gallery: Markup, rows: dict[str, list[dict]]) -> list[tuple[str, Markup]]:
    """The (heading, HTML) sections of the run's page, for `render_page`.

    Args:
        metrics: of stage 06.
        figures: by the names of their captions; a figure that is missing or None is left out.
        gallery: HTML of `gallery_html`.
        rows: of the tables "changed", "ood" and "stages".
    """
    systems = metrics["systems"]

    def table(rows: list[dict], caption: str) -> Markup:
        html = html_table(rows)
        return html and macros.captioned(html, macros.captions[caption])

    def images(*names: str) -> Markup:
        return Markup("").join(
            macros.captioned(image_tag(figures[name], _alternative_text(figures[name])),
                             macros.captions[name])
            for name in names if figures.get(name))

    main_suite = next(iter(systems["grpo"]))
    drawn = "suites" if main_suite == OWN else "drawn suites"
    return [
        ("What differs from the default profile, or from the run that this one stands on",
         html_table(rows["changed"])),
        ("Your data: the held-out part",
         table(tables.own_data_rows(metrics["deltas"]), "gains")),
        ("The paper's claims and this run (points)", table(tables.claim_rows(metrics), "claims")),
        (f"Scores on {drawn}, greedy (percent)",
         html_table(tables.score_rows(systems)) + images("suites")),
        ("Out of domain, by suite (drawn)", images("ood") + table(rows["ood"], "ood_rows")),
        (f"Scores on {drawn}, mean of replies at temperature 1 (percent)",
         table(tables.score_rows(systems, "sampled"), "sampled")
         + table(tables.pass_at_k_rows(systems), "pass_at_k")),
        (f"{suite_title(main_suite)}, per task", images("tasks", "outcomes")),
        ("Is the reasoning true? (greedy, percent)", images("reasoning")),
        ("Training", images("loss", "grpo")),
        ("What the replies become while RL trains", images("shares", "rollouts")),
        ("Data", images("flow", "dropped")),
        ("How this run was made", html_table(rows["stages"])),
        ("Gallery", gallery and macros.folded(macros.captions["gallery"], gallery))]
