"""Pictures that one can move in a live notebook: a box, a group's replies, a gallery.

As the last line of a cell each function shows its controls where a person sits at the notebook, and
a still picture that says the same everywhere else: in what papermill and nbval execute, and in
every published copy.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import ipywidgets
from PIL import Image

from mig_kit.boxes import Box, BoxFormat, to_model_box
from mig_kit.drawing.pictures import (
    STYLES,
    draw_boxes,
    draw_group,
    draw_replies,
    draw_sample,
    draw_text,
    stack,
)
from mig_kit.prompts import format_answer
from mig_kit.rewards import REWARDS, Reward, is_correct, reply_iou
from mig_kit.sample import Sample, Target

# what a server of notebooks, or a hosted service, gives to a kernel that someone looks at
LIVE_ENVIRONMENT = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
OVERLAPS = (0.9, 0.7, 0.55, 0.45, 0.2)  # IoUs of the still picture


def is_live() -> bool:
    """Whether someone looks at this notebook in a front end that can move controls."""
    return "ipykernel" in sys.modules and any(name in os.environ for name in LIVE_ENVIRONMENT)


def explore_box(sample: Sample, box_format: BoxFormat, rewards: dict[str, Reward] | None = None,
                height: int = 200) -> Image.Image | ipywidgets.Widget:
    """Move a box with sliders and see its IoU and what each reward pays for it.

    sample: of a question with a target. rewards: by name; the image's and the box's by default.
    height: of the images, pixels. The still picture shows the target's box shifted to OVERLAPS,
    blue where it is correct. ValueError for a sample without a target.
    """
    if not sample.targets:
        raise ValueError(f"sample {sample.id} has no target; take one that has a box")
    rewards = rewards or {name: REWARDS[name] for name in ("image", "box")}
    if not is_live():
        return stack([_draw_shifted(sample, overlap, box_format, rewards) for overlap in OVERLAPS],
                     across=True)
    image, box = sample.targets[0]
    width, tall = map(max, zip(*sample.sizes))

    def draw(image: int, across: tuple[int, int], down: tuple[int, int]) -> Image.Image:
        reply = _reply_of(sample, image, (across[0], down[0], across[1], down[1]), box_format)
        picture = draw_sample(sample, reply, box_format, height)
        lines = _score_lines(reply, sample, box_format, rewards)
        return stack([draw_text(", ".join(lines), picture.width), picture])

    return _show_live(
        draw, image=ipywidgets.Dropdown(options=range(1, len(sample.images) + 1), value=image),
        across=ipywidgets.IntRangeSlider(value=(round(box[0]), round(box[2])), max=width),
        down=ipywidgets.IntRangeSlider(value=(round(box[1]), round(box[3])), max=tall))


def step_through(sample: Sample, replies: Sequence[str], box_format: BoxFormat,
                 captions: Sequence[str] = (),
                 height: int = 150) -> Image.Image | ipywidgets.Widget:
    """Step through the replies to one question, each with its box on the images.

    captions: a few words to each reply, such as its reward and advantage. height: of the images,
    pixels. The still picture has the boxes of all replies. ValueError without a reply, and for
    another number of captions than of replies.
    """
    if not replies or (captions and len(captions) != len(replies)):
        raise ValueError(f"{len(replies)} replies and {len(captions)} captions; give at least one "
                         "reply, and a caption for each or none")
    names = [f"reply {number}" + (f", {caption}" if caption else "")
             for number, caption in enumerate(captions or [""] * len(replies), 1)]
    if not is_live():
        group = draw_group(sample, replies, box_format, height)
        return stack([group, draw_text("\n".join(names), max(group.width, 400))])
    return _leaf_through({name: partial(draw_replies, sample, {name: reply}, box_format, height)
                          for name, reply in zip(names, replies)})


def browse_gallery(gallery: Sequence[tuple[str, Sample]], replies: dict[str, dict[str, str]],
                   box_format: BoxFormat, height: int = 110) -> Image.Image | ipywidgets.Widget:
    """Leaf through (kind, sample) pairs, as `report_gallery.pick_gallery` gives them.

    replies: per system, as it is to be called, by sample id. height: of the images, pixels. The
    still picture has the first sample of each kind. ValueError for an empty gallery.
    """
    if not gallery:
        raise ValueError("the gallery is empty; give at least one sample")

    def draw(kind: str, sample: Sample) -> Image.Image:
        of_sample = {system: by_id[sample.id] for system, by_id in replies.items()}
        page = draw_replies(sample, of_sample, box_format, height)
        return stack([draw_text(f"{sample.task}: {kind}", page.width), page])

    if not is_live():
        first = {kind: sample for kind, sample in reversed(gallery)}
        kinds = dict.fromkeys(kind for kind, _ in gallery)
        return stack([draw(kind, first[kind]) for kind in kinds], gap=8)
    return _leaf_through({f"{number}. {sample.task}: {kind}": partial(draw, kind, sample)
                          for number, (kind, sample) in enumerate(gallery, 1)})


def _leaf_through(pages: dict[str, Callable[[], Image.Image]]) -> ipywidgets.Widget:
    """Pages to choose from by name, each drawn when it is looked at."""
    return _show_live(lambda page: pages[page](), page=list(pages))


def _show_live(draw: Callable[..., Image.Image], **controls) -> ipywidgets.Widget:
    """The controls above what `draw` makes of their values, drawn again at each change."""
    return ipywidgets.interactive(draw, {"auto_display": True}, **controls)


def _reply_of(sample: Sample, image: int, box: Box, box_format: BoxFormat) -> str:
    """A reply that answers with this box, pixels of the original image."""
    model_box = to_model_box(box, sample.sizes[image - 1], box_format)
    return f"<think>Search.</think><answer>{format_answer(image, model_box)}</answer>"


def _score_lines(reply: str, sample: Sample, box_format: BoxFormat,
                 rewards: dict[str, Reward]) -> list[str]:
    outcome = "correct" if is_correct(reply, sample, box_format) else "not correct"
    scores = {name: reward(reply, sample, box_format) for name, reward in rewards.items()}
    return [f"IoU {reply_iou(reply, sample, box_format):.2f}: {outcome}",
            *(f"{name} reward {score:.2f}" for name, score in scores.items() if score is not None)]


def shift_to_iou(box: Box, wanted: float) -> Box:
    """The box moved to the right until its IoU with where it was is `wanted`, 0..1.

    Moved by a share s of its width it overlaps itself in 1 - s of 1 + s, so s is
    (1 - IoU) / (1 + IoU).
    """
    x1, y1, x2, y2 = box
    shift = (x2 - x1) * (1 - wanted) / (1 + wanted)
    return x1 + shift, y1, x2 + shift, y2


def _draw_shifted(sample: Sample, overlap: float, box_format: BoxFormat,
                  rewards: dict[str, Reward]) -> Image.Image:
    """The neighbourhood of the target with the target's box shifted to an IoU, and its scores."""
    number, (x1, y1, x2, y2) = sample.targets[0]
    moved = shift_to_iou((x1, y1, x2, y2), overlap)
    reply = _reply_of(sample, number, moved, box_format)
    width, tall = x2 - x1, y2 - y1
    left, top = round(x1 - 0.3 * width), round(y1 - 0.3 * tall)
    cut_out = Image.new("RGB", (round(2.2 * width), round(1.6 * tall)), "white")
    cut_out.paste(sample.images[number - 1].convert("RGB"), (-left, -top))
    target, shifted = ((a - left, b - top, c - left, d - top)
                       for a, b, c, d in ((x1, y1, x2, y2), moved))
    alone = replace(sample, images=(cut_out,), targets=(Target(1, target),), reference=None)
    style = STYLES[is_correct(reply, sample, box_format)]
    tile = draw_boxes(alone, [(1, shifted, *style)], 110, is_numbered=False)
    lines = _score_lines(reply, sample, box_format, rewards)
    return stack([tile, draw_text("\n".join(lines), tile.width, 12)])
