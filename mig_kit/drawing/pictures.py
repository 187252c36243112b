"""Boxes on images: a sample, replies to it, a training's rollouts; and a reply's tokens in colour.

Targets are solid, boxes of replies dashed, the reference dotted, to tell them apart in grey.
"""

import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mig_kit.boxes import Box, BoxFormat
from mig_kit.drawing.palette import (
    CORRECT,
    FRAME,
    INK,
    MUTED,
    PREDICTED,
    REFERENCE,
    TARGET,
    text_colour,
)
from mig_kit.prompts import Answer, format_question, read_reply
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample

GAP, HEAD = 10, 22  # between images, and above them; pixels
MAX_WIDTH = 720  # of a row of images with replies, pixels
DASHES, SHORT_DASHES, DOTS = (12, 7), (6, 5), (3, 4)  # stroke and space, pixels
SOLID = (100_000, 0)
TOKENS_WIDTH, TOKENS_LINE = 760, 26  # of a picture of tokens, and of one of its lines, pixels
STYLES = {True: (CORRECT, DASHES), False: (PREDICTED, SHORT_DASHES)}  # by whether it is correct
CORRECTNESS = "blue: a correct reply's box; orange: another one's"


class Stroke(NamedTuple):
    """A box to draw on image number `image`, in its original pixels, and its letter."""

    image: int
    box: Box
    colour: str
    dashes: tuple[int, int]
    letter: str = ""


def _draw_dashed(pen: ImageDraw.ImageDraw, stroke: Stroke, size: tuple[int, int]) -> None:
    """Draw a stroke on an image of `size`; edges far outside, which nobody sees, are moved near."""
    x1, y1, x2, y2 = (min(max(value, -10), limit + 10)
                      for value, limit in zip(stroke.box, size * 2))
    length, step = stroke.dashes[0], sum(stroke.dashes)
    for start in range(int(x1), int(x2), step):
        for y in (y1, y2):
            pen.line((start, y, min(start + length, x2), y), fill=stroke.colour, width=3)
    for start in range(int(y1), int(y2), step):
        for x in (x1, x2):
            pen.line((x, start, x, min(start + length, y2)), fill=stroke.colour, width=3)


def draw_sample(sample: Sample, reply: str = "", box_format: BoxFormat | None = None,
                height: int = 200) -> Image.Image:
    """All images of a sample side by side with its boxes, a reply's, and a line that explains them.

    height: of the images, pixels. A reply needs a box_format.
    """
    answer = read_reply(reply, sample, box_format) if reply else None
    sheet = _draw_answer(sample, answer, height)
    return _add_caption(sheet, sample, "orange: the reply's box" if reply else "")


def _draw_answer(sample: Sample, answer: Answer | None, height: int) -> Image.Image:
    has_box = answer is not None and answer.box is not None
    strokes = [Stroke(answer.image, answer.box, PREDICTED, DASHES)] if has_box else []
    return draw_boxes(sample, strokes, height)


def _add_caption(sheet: Image.Image, sample: Sample, boxes: str) -> Image.Image:
    """The sheet above a line that says what its colours mean; boxes: what to say of a reply's."""
    lines = ["green: the target"] * bool(sample.targets) + [boxes] * bool(boxes)
    lines += ["magenta: the place in question"] * bool(sample.reference)
    if not lines:
        return sheet
    return stack([sheet, draw_text("; ".join(lines), max(sheet.width, 420), 12, MUTED)])


def _fit_height(sample: Sample, height: int) -> int:
    """The height, lowered to keep images side by side within MAX_WIDTH."""
    room = MAX_WIDTH - GAP * (len(sample.sizes) + 1)
    return min(height, int(room / sum(width / tall for width, tall in sample.sizes)))


def draw_replies_of_group(sample: Sample, answers: Sequence[Answer]) -> Image.Image:
    """A sample's images with the numbered boxes of all answers, and a line that explains them."""
    strokes = [Stroke(answer.image, answer.box, *STYLES[is_correct(answer, sample)], str(number))
               for number, answer in enumerate(answers, 1) if answer.box]
    sheet = draw_boxes(sample, strokes, _fit_height(sample, 300))
    return _add_caption(sheet, sample, f"{CORRECTNESS}, with the reply's number")


def draw_boxes(sample: Sample, strokes: list[Stroke], height: int) -> Image.Image:
    """The numbered images with targets, `strokes` and reference; height: of an image, pixels."""
    strokes = [*(Stroke(*target, TARGET, SOLID) for target in sample.targets), *strokes]
    if sample.reference:
        strokes.append(Stroke(1, sample.reference, REFERENCE, DOTS))
    sheets = []
    for number, image in enumerate(sample.images, 1):
        scale = height / image.height
        size = max(1, round(image.width * scale)), height
        tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        scaled = [stroke._replace(box=tuple(value * scale for value in stroke.box))
                  for stroke in strokes if stroke.image == number]
        for stroke in scaled:
            _draw_dashed(ImageDraw.Draw(tile), stroke, size)
        _draw_letters(ImageDraw.Draw(tile), scaled, size)
        framed = ImageOps.expand(tile, 1, FRAME)
        sheet = ImageOps.expand(framed, (GAP - 2, HEAD - 1, 1, GAP - 1), "white")
        ImageDraw.Draw(sheet).text((GAP, 3), f"Image {number}", fill=INK,
                                   font=ImageFont.load_default(14))
        sheets.append(sheet)
    return stack(sheets, across=True)


def _draw_letters(pen: ImageDraw.ImageDraw, strokes: list[Stroke], size: tuple[int, int]) -> None:
    """Letters in a row beside all boxes, which hides none of them, each with a line to its box."""
    side, step = 15, 19
    row = sorted((stroke for stroke in strokes if stroke.letter),
                 key=lambda stroke: stroke.box[0] + stroke.box[2])
    if not row:
        return
    top, bottom = min(stroke.box[1] for stroke in row), max(stroke.box[3] for stroke in row)
    is_below = bottom + step + side < size[1]
    y = bottom + step if is_below else max(0, top - step - side)
    middle = sum(stroke.box[0] + stroke.box[2] for stroke in row) / (2 * len(row))
    x = max(0, min(middle - step * len(row) / 2, size[0] - step * len(row)))
    for place, stroke in enumerate(row):
        end = (stroke.box[0] + stroke.box[2]) / 2, stroke.box[3 if is_below else 1]
        pen.line((x + place * step + side / 2, y + side / 2, *end), fill=stroke.colour)
    for place, stroke in enumerate(row):
        left = x + place * step
        pen.rectangle((left, y, left + side - 1, y + side - 1), fill=stroke.colour)
        pen.text((left + side / 2, y + side / 2), stroke.letter, fill=text_colour(stroke.colour),
                 anchor="mm", font=ImageFont.load_default(12))


def text_font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's font, or matplotlib's DejaVu for a text that is not ASCII."""
    if text.isascii():
        return ImageFont.load_default(size)
    from matplotlib import font_manager  # of an extra

    return ImageFont.truetype(font_manager.findfont("DejaVu Sans"), size - 1)


def draw_replies(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                 height: int = 150) -> Image.Image:
    """The question, and below it each system's reply and boxes, a bar beside: blue if correct.

    replies: system -> reply. height: of the images, pixels.
    """
    height = _fit_height(sample, height)
    rows = []
    for system, reply in replies.items():
        answer = read_reply(reply, sample, box_format)
        is_right = is_correct(answer, sample)
        rows.append((_draw_answer(sample, answer, height), STYLES[is_right][0],
                     f"{system} ({'correct' if is_right else 'wrong'}): {reply}"))
    width = max(520, *(sheet.width for sheet, _, _ in rows))
    question = format_question(sample, box_format, with_instruction=False)
    parts = [draw_text(question, width + 16, 17)]
    for sheet, colour, text in rows:
        row = stack([sheet, draw_text(text, width, 15)])
        bar = Image.new("RGB", (6, row.height), colour)
        parts.append(stack([bar, row], across=True, gap=2))
    return _add_caption(stack(parts, gap=10), sample, "orange: the reply's box")


def draw_text(text: str, width: int, size: int = 14, colour: str = INK,
              struck: Sequence[tuple[int, int]] = ()) -> Image.Image:
    """The text on white, wrapped to the width (pixels) line by line; size: of its letters.

    struck: (start, end) of parts that are orange and struck through.
    """
    lines = [part for line in text.split("\n")
             for part in textwrap.wrap(line, max(10, 2 * width // size)) or [""]]
    block = Image.new("RGB", (width, round(1.4 * size) * len(lines) + 8), "white")
    pen, offset = ImageDraw.Draw(block), 0
    for number, line in enumerate(lines):
        font, y = text_font(size, line), 4 + round(1.4 * size) * number
        pen.text((8, y), line, fill=colour, font=font)
        offset = max(offset, text.find(line, offset))
        for start, end in struck:
            before, part = line[:max(0, start - offset)], line[max(0, start - offset):end - offset]
            if part and end > offset:
                x, middle = 8 + font.getlength(before), y + 0.6 * size
                pen.text((x, y), part, fill=PREDICTED, font=font)
                pen.line((x, middle, x + font.getlength(part), middle), fill=PREDICTED)
        offset += len(line)
    return block


def stack(pictures: Sequence[Image.Image], across: bool = False, gap: int = 0) -> Image.Image:
    """The pictures on white, below each other or, with `across`, beside each other; gap: pixels."""
    lengths = [picture.width if across else picture.height for picture in pictures]
    breadth = max(picture.height if across else picture.width for picture in pictures)
    length = sum(lengths) + gap * (len(pictures) - 1)
    sheet = Image.new("RGB", (length, breadth) if across else (breadth, length), "white")
    at = 0
    for picture, taken in zip(pictures, lengths):
        sheet.paste(picture, (at, 0) if across else (0, at))
        at += taken + gap
    return sheet


def draw_rollouts(sample: Sample, rows: list[dict], box_format: BoxFormat) -> Image.Image:
    """Replies to one question at up to six updates: the boxes of all, and the first reply.

    rows: {step, reply, reward, correct, boxes}; boxes: (image number, box) pairs.
    """
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    spread = np.linspace(0, len(by_step) - 1, min(6, len(by_step))).round().astype(int)
    picked = [list(by_step)[index] for index in spread]
    parts = [part for step in picked for part in _draw_step(sample, step, by_step[step])]
    question = format_question(sample, box_format, with_instruction=False)
    sheet = stack([draw_text(question, max(part.width for part in parts), 16), *parts])
    return _add_caption(sheet, sample, f"{CORRECTNESS}; struck through: what the images contradict")


def _draw_step(sample: Sample, step: int, rows: list[dict]) -> list[Image.Image]:
    strokes = [Stroke(image, box, *STYLES[row["correct"]]) for row in rows
               for image, box in row.get("boxes", [])]  # version 0.2 kept them otherwise
    sheet = draw_boxes(sample, strokes, _fit_height(sample, 110))
    n_correct = sum(row["correct"] for row in rows)
    reward = sum(row["reward"] for row in rows) / len(rows)
    width = max(sheet.width, 560)
    line = f"update {step}: {n_correct} of {len(rows)} correct, mean reward {reward:.2f}"
    head, first = 'first reply: "', rows[0]
    text = head + first["reply"][:400] + ("..." if len(first["reply"]) > 400 else '"')
    false = [(len(head) + start, len(head) + end) for start, end in first.get("false", [])]
    return [draw_text(line, width), sheet, draw_text(text, width, 13, MUTED, false)]


def merge_runs(tokens: Sequence[str], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """Tokens and values with each run of an equal pair written once, as "token x 9"."""
    merged = [(token, value, len(list(run)))
              for (token, value), run in groupby(zip(tokens, values, strict=True))]
    texts = [f"{token} x {count} " if count > 1 else token for token, _, count in merged]
    return texts, [value for _, value, _ in merged]


def colour_tokens(tokens: Sequence[str], values: Sequence[float], title: str,
                  high: float = 1) -> Image.Image:
    """The tokens below a title, each on a ground that is the darker the larger its value.

    values: one a token, white at 0, blue above and orange below it, darkest from `high` on.
    """
    import matplotlib  # of an extra

    font, places, x, y = ImageFont.load_default(15), [], 8, 0
    for token in tokens:
        shown = token.replace("\n", "\\n")
        width = round(font.getlength(shown)) + 3
        if x + width > TOKENS_WIDTH - 8 and x > 8:
            x, y = 8, y + TOKENS_LINE
        places.append((x, y, width, shown))
        x += width
    page = Image.new("RGB", (TOKENS_WIDTH, y + TOKENS_LINE + 4), "white")
    pen = ImageDraw.Draw(page)
    for value, (x, y, width, shown) in zip(values, places, strict=True):
        colours = matplotlib.colormaps["Blues" if value >= 0 else "Oranges"]
        ground = colours(0.6 * min(1.0, abs(value) / high))  # black stays readable on it
        pen.rectangle((x, y, x + width - 2, y + TOKENS_LINE - 5), matplotlib.colors.to_hex(ground))
        pen.text((x + 1, y + 1), shown, fill="#000000", font=font)
    return stack([draw_text(title, TOKENS_WIDTH, 16), page])
