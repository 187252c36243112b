"""Pictures that one can move in a live notebook: a box, a group's replies, a gallery.

Each function returns an Explorer. As the last line of a cell it shows its controls where a person
sits at the notebook, and a still picture that says the same everywhere else: in what papermill and
nbval execute, and in every published copy.
"""

import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ipywidgets
import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont

from mig_kit.boxes import Box, BoxFormat, to_model_box
from mig_kit.plots import CORRECT, PREDICTED, TARGET, draw_replies, draw_sample
from mig_kit.prompts import cut_reasoning, format_answer
from mig_kit.rewards import REWARDS, Reward, is_correct, reply_iou
from mig_kit.sample import Sample

# what a server of notebooks, or a hosted service, gives to a kernel that someone looks at
LIVE_ENVIRONMENT = ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
SHIFTS = (0, 1 / 8, 1 / 4, 1 / 2, 7 / 8)  # of the box's width: IoU 1, 7/9, 3/5, 1/3 and 1/15
MAX_WIDTH = 900  # of a still picture, pixels


@dataclass(frozen=True)
class Explorer:
    """A still picture and, in a live notebook, the controls that take its place.

    alt: what the picture shows, for those who do not see it. controls: None where none are live.
    """

    picture: Image.Image
    alt: str
    controls: ipywidgets.Widget | None

    def _repr_mimebundle_(self, **_) -> dict[str, object]:
        """What the notebook holds: a front end shows the controls if it can, else the picture."""
        bundle = {"text/plain": self.alt, "image/png": _png(self.picture)}
        if self.controls is not None:
            bundle |= self.controls._repr_mimebundle_()
        return bundle | {"text/plain": self.alt}


def is_live() -> bool:
    """Whether someone looks at this notebook in a front end that can move controls."""
    return "ipykernel" in sys.modules and any(name in os.environ for name in LIVE_ENVIRONMENT)


def explore_box(sample: Sample, box_format: BoxFormat, rewards: dict[str, Reward] | None = None,
                height: int = 200) -> Explorer:
    """Move a box with sliders and see its IoU and what each reward pays for it.

    sample: of a question with a target. rewards: by name; the image's and the box's by default.
    height: of the images, pixels. The still picture shows the target's box shifted by SHIFTS.
    ValueError for a sample without a target.
    """
    if not sample.targets:
        raise ValueError(f"sample {sample.id} has no target; take one that has a box")
    rewards = rewards or {name: REWARDS[name] for name in ("image", "box")}
    picture = _draw_shifts(sample, box_format, rewards)
    alt = "The target's box and five boxes shifted from it, with IoU and rewards of each"
    if not is_live():
        return Explorer(picture, alt, None)
    image, box = sample.targets[0]
    width, image_height = sample.sizes[image - 1]
    which = ipywidgets.Dropdown(options=range(1, len(sample.images) + 1), value=image,
                                description="image")
    across, down = (ipywidgets.IntRangeSlider(
        value=(round(low), round(high)), max=limit, description=name, layout={"width": "420px"})
        for name, low, high, limit in (("x1 to x2", box[0], box[2], width),
                                       ("y1 to y2", box[1], box[3], image_height)))

    def show(image: int, across: tuple[int, int], down: tuple[int, int]) -> tuple[Image.Image, str]:
        box = across[0], down[0], across[1], down[1]
        reply = _reply_of(sample, image, box, box_format)
        return draw_sample(sample, reply, box_format, height), ", ".join(
            _score_lines(reply, sample, box_format, rewards))

    def set_limits(_: dict) -> None:
        across.max, down.max = sample.sizes[which.value - 1]

    which.observe(set_limits, "value")
    return Explorer(picture, alt, _connect(show, image=which, across=across, down=down))


def step_through(sample: Sample, replies: Sequence[str], box_format: BoxFormat,
                 captions: Sequence[str] = (), height: int = 150) -> Explorer:
    """Step through the replies to one question, each with its box on the images.

    captions: a few words to each reply, such as its reward and advantage. height: of the images,
    pixels. The still picture has all replies, without their reasoning. ValueError without a reply,
    and for another number of captions than of replies.
    """
    if not replies or (captions and len(captions) != len(replies)):
        raise ValueError(f"{len(replies)} replies and {len(captions)} captions; give at least one "
                         "reply, and a caption for each or none")
    names = [f"reply {number}" + (f", {caption}" if caption else "")
             for number, caption in enumerate(captions or [""] * len(replies), 1)]
    picture = _draw_grid([_draw_tile(sample, reply, name, box_format)
                          for name, reply in zip(names, replies)])
    alt = f"{len(replies)} replies to one question, each with its box on the images"
    if not is_live():
        return Explorer(picture, alt, None)

    def show(number: int) -> tuple[Image.Image, str]:
        pair = {names[number - 1]: replies[number - 1]}
        return draw_replies(sample, pair, box_format, height), ""

    return Explorer(picture, alt, _connect(show, number=_stepper("reply", len(replies))))


def browse_gallery(gallery: Sequence[tuple[str, Sample]], replies: dict[str, dict[str, str]],
                   box_format: BoxFormat, height: int = 110) -> Explorer:
    """Leaf through (kind, sample) pairs, as `report.pick_gallery` gives them, by kind and task.

    replies: per system, as it is to be called, by sample id. height: of the images, pixels. The
    still picture has the first sample of each kind. ValueError for an empty gallery.
    """
    if not gallery:
        raise ValueError("the gallery is empty; give at least one sample")

    def draw(kind: str, sample: Sample) -> Image.Image:
        of_sample = {system: by_id[sample.id] for system, by_id in replies.items()}
        page = draw_replies(sample, of_sample, box_format, height)
        return _add_heading(page, f"{sample.task}: {kind}")

    first = {kind: sample for kind, sample in reversed(gallery)}
    kinds = list(dict.fromkeys(kind for kind, _ in gallery))
    picture = _stack([draw(kind, first[kind]) for kind in kinds])
    alt = f"One question of each kind ({', '.join(kinds)}) with the replies of {', '.join(replies)}"
    if not is_live():
        return Explorer(picture, alt, None)
    tasks = sorted({sample.task for _, sample in gallery})
    choices = {name: ipywidgets.Dropdown(options=["all", *values], description=name)
               for name, values in (("kind", kinds), ("task", tasks))}
    stepper = _stepper("sample", len(gallery))

    def matches() -> list[tuple[str, Sample]]:
        return [(kind, sample) for kind, sample in gallery
                if choices["kind"].value in ("all", kind)
                and choices["task"].value in ("all", sample.task)]

    def rewind(_: dict) -> None:
        stepper.max = max(1, len(matches()))
        stepper.value = 1

    def show(number: int, **_) -> tuple[Image.Image | None, str]:
        picked = matches()
        if not picked:
            return None, "no sample of this kind and task"
        number = min(number, len(picked))
        return draw(*picked[number - 1]), f"{number} of {len(picked)}"

    for choice in choices.values():
        choice.observe(rewind, "value")
    return Explorer(picture, alt, _connect(show, number=stepper, **choices))


def _connect(show: Callable[..., tuple[Image.Image | None, str]],
             **inputs: ipywidgets.Widget) -> ipywidgets.VBox:
    """The inputs above what `show` draws and says for their values, drawn again at each change."""
    canvas, text = ipywidgets.Image(format="png"), ipywidgets.Label()

    def redraw(*_) -> None:
        picture, text.value = show(**{name: item.value for name, item in inputs.items()})
        canvas.value = _png(picture) if picture else b""

    for item in inputs.values():
        item.observe(redraw, "value")
    redraw()
    return ipywidgets.VBox([*inputs.values(), text, canvas])


def _stepper(name: str, count: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(value=1, min=1, max=count, description=name)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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


def _draw_shifts(sample: Sample, box_format: BoxFormat, rewards: dict[str, Reward]) -> Image.Image:
    """The neighbourhood of the target once per shift: the target green, the shifted box dashed."""
    image, (x1, y1, x2, y2) = sample.targets[0]
    picture, (width, height) = sample.images[image - 1], sample.sizes[image - 1]
    step = x2 - x1 if x1 + x2 < width else x1 - x2  # to the far side, where there is room
    figure, axes = plt.subplots(1, len(SHIFTS), figsize=(8.2, 2.6))
    for axis, shift in zip(axes, SHIFTS):
        box = x1 + shift * step, y1, x2 + shift * step, y2
        axis.imshow(picture, extent=(0, width, height, 0))
        for corners, colour, style in (((x1, y1, x2, y2), TARGET, "-"),
                                       (box, PREDICTED, "--")):
            axis.add_patch(plt.Rectangle(corners[:2], x2 - x1, y2 - y1, fill=False, color=colour,
                                         linestyle=style, linewidth=2))
        axis.set(xlim=_window(x1, x2, width), ylim=_window(y1, y2, height)[::-1],
                 xticks=[], yticks=[])
        axis.grid(False)
        lines = _score_lines(_reply_of(sample, image, box, box_format), sample, box_format, rewards)
        axis.set_xlabel("\n".join(lines), fontsize=9)
    figure.set_layout_engine("tight")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    return Image.open(buffer)


def _window(low: float, high: float, limit: float) -> tuple[float, float]:
    """A stretch of 0..limit that is 3.6 times as long as the one from low to high, around it."""
    length = min(limit, 3.6 * (high - low))
    start = min(max(0, (low + high - length) / 2), limit - length)
    return start, start + length


def _draw_tile(sample: Sample, reply: str, name: str, box_format: BoxFormat) -> Image.Image:
    """One reply's box on the images, with its name above and its answer below."""
    font = ImageFont.load_default(13)
    sheet = draw_sample(sample, reply, box_format, 90)
    width = max(sheet.width, 280)
    answer = textwrap.fill(textwrap.shorten(cut_reasoning(reply), 200, placeholder=" ..."),
                           width // 7)
    bottom = 24 + sheet.height
    tile = Image.new("RGB", (width, bottom + 18 * (answer.count("\n") + 1) + 10), "white")
    pen = ImageDraw.Draw(tile)
    pen.text((10, 4), name, fill="#111111", font=ImageFont.load_default(14))
    tile.paste(sheet, (6, 24))
    pen.multiline_text((10, bottom), answer, fill="#333333", font=font)
    colour = CORRECT if is_correct(reply, sample, box_format) else PREDICTED
    pen.rectangle((0, 4, 4, tile.height - 8), fill=colour)
    return tile


def _draw_grid(tiles: Sequence[Image.Image]) -> Image.Image:
    """The tiles from left to right, in as many columns as fit into MAX_WIDTH."""
    columns = max(1, MAX_WIDTH // max(tile.width for tile in tiles))
    rows = [tiles[start:start + columns] for start in range(0, len(tiles), columns)]
    return _stack([_stack(row, across=True) for row in rows])


def _stack(pictures: Sequence[Image.Image], across: bool = False, gap: int = 8) -> Image.Image:
    """The pictures on white, below or beside each other."""
    lengths = [picture.width if across else picture.height for picture in pictures]
    breadth = max(picture.height if across else picture.width for picture in pictures)
    length = sum(lengths) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (length, breadth) if across else (breadth, length), "white")
    at = 0
    for picture, taken in zip(pictures, lengths):
        sheet.paste(picture, (at, 0) if across else (0, at))
        at += taken + gap
    return sheet


def _add_heading(picture: Image.Image, heading: str) -> Image.Image:
    page = Image.new("RGB", (picture.width, picture.height + 24), "white")
    ImageDraw.Draw(page).text((12, 4), heading, fill="#555555", font=ImageFont.load_default(14))
    page.paste(picture, (0, 24))
    return page
