"""A control for a live notebook: move a box.

In executed copies, where nobody can move it, the function returns a still picture.
"""

import os
import sys
from dataclasses import replace

import ipywidgets
from PIL import Image

from mig_kit.boxes import Box, BoxFormat, to_model_box
from mig_kit.common import UserError
from mig_kit.drawing import pictures
from mig_kit.prompts import format_answer
from mig_kit.rewards import REWARDS, is_correct, reply_iou
from mig_kit.sample import Sample, Target

# variables that JupyterLab, VS Code and Colab set in the kernels of open notebooks
LIVE_ENVIRONMENT = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
OVERLAPS = (0.9, 0.7, 0.55, 0.45, 0.2)  # IoUs of the still picture


def is_live() -> bool:
    """Whether someone looks at this notebook in a front end that can move controls."""
    return "ipykernel" in sys.modules and any(name in os.environ for name in LIVE_ENVIRONMENT)


def explore_box(sample: Sample, box_format: BoxFormat) -> Image.Image | ipywidgets.Widget:
    """Move a box with sliders and see its IoU and the rewards `image` and `box`.

    The still picture shows the target shifted to OVERLAPS. Raises ValueError without a target.
    """
    if not sample.targets:
        raise UserError(f"sample {sample.id} has no target; take one that has a box")
    if not is_live():
        shifted = [_draw_shifted(sample, overlap, box_format) for overlap in OVERLAPS]
        return pictures.stack(shifted, across=True)
    image, box = sample.targets[0]
    width, tall = map(max, zip(*sample.sizes))

    def draw(image: int, across: tuple[int, int], down: tuple[int, int]) -> Image.Image:
        reply = _reply_of(sample, image, (across[0], down[0], across[1], down[1]), box_format)
        picture = pictures.draw_sample(sample, reply, box_format)
        lines = _score_lines(reply, sample, box_format)
        return pictures.stack([pictures.draw_text(", ".join(lines), picture.width), picture])

    return ipywidgets.interactive(
        draw, {"auto_display": True},
        image=ipywidgets.Dropdown(options=range(1, len(sample.images) + 1), value=image),
        across=ipywidgets.IntRangeSlider(value=(round(box[0]), round(box[2])), max=width),
        down=ipywidgets.IntRangeSlider(value=(round(box[1]), round(box[3])), max=tall))


def _reply_of(sample: Sample, image: int, box: Box, box_format: BoxFormat) -> str:
    """A reply that answers with this box, pixels of the original image."""
    model_box = to_model_box(box, sample.sizes[image - 1], box_format)
    return f"<think>Search.</think><answer>{format_answer(image, model_box)}</answer>"


def _score_lines(reply: str, sample: Sample, box_format: BoxFormat) -> list[str]:
    outcome = "correct" if is_correct(reply, sample, box_format) else "not correct"
    return [f"IoU {reply_iou(reply, sample, box_format):.2f}: {outcome}",
            *(f"{name} reward {REWARDS[name](reply, sample, box_format):.2f}"
              for name in ("image", "box"))]


def shift_to_iou(box: Box, wanted: float) -> Box:
    """The box moved to the left until its IoU with where it was is `wanted`, 0..1."""
    x1, y1, x2, y2 = box
    # moved by a share s of its width it overlaps itself in 1 - s of 1 + s
    shift = (x2 - x1) * (1 - wanted) / (1 + wanted)
    return x1 - shift, y1, x2 - shift, y2


def _draw_shifted(sample: Sample, overlap: float, box_format: BoxFormat) -> Image.Image:
    """The target's image with its box shifted to an IoU, and its scores."""
    number, box = sample.targets[0]
    alone = replace(sample, images=sample.images[number - 1:number], targets=(Target(1, box),),
                    reference=None)
    shifted = shift_to_iou(box, overlap)
    reply = _reply_of(alone, 1, shifted, box_format)
    style = pictures.STYLES[is_correct(reply, alone, box_format)]
    picture = pictures.draw_boxes(alone, [pictures.Stroke(1, shifted, *style)], 160)
    lines = _score_lines(reply, alone, box_format)
    return pictures.stack([picture, pictures.draw_text("\n".join(lines), picture.width, 12)])
