"""Boxes on images: a sample, the replies of several systems to it, a group of replies, a training's
rollouts; and the tokens of a reply in colour.

Every image stands in a frame of its own, because scenes are often as white as the page. Targets are
solid, boxes of replies dashed, the reference dotted, so that a print in grey tells them apart.
"""

import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import matplotlib
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from mig_kit.boxes import Box, BoxFormat
from mig_kit.drawing.palette import (
    CORRECT,
    FRAME,
    INK,
    MUTED,
    PREDICTED,
    REFERENCE,
    SYSTEM_COLOURS,
    TARGET,
    text_colour,
)
from mig_kit.prompts import format_question, reply_boxes_in_original
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample

GAP, HEAD = 10, 22  # between images, and above them; pixels
MAX_WIDTH = 720  # of a row of images with replies, pixels
DASHES, SHORT_DASHES, DOTS = (12, 7), (6, 5), (3, 4)  # stroke and space, pixels
TOKENS_WIDTH, TOKENS_LINE = 760, 26  # of a picture of tokens, and of one of its lines, pixels
STYLES = {True: (CORRECT, DASHES), False: (PREDICTED, SHORT_DASHES)}  # by whether it is correct
# The corner that holds a system's letter (share of width and height), and its dashes.
SYSTEM_MARKS = {"base": ("b", (0, 0), DOTS), "sft": ("S", (1, 0), SHORT_DASHES),
                "grpo": ("G", (1, 1), DASHES), "sft_long": ("L", (0, 1), SHORT_DASHES),
                "start": ("R", (0, 1), SHORT_DASHES)}

Stroke = tuple[int, Box, str, tuple[int, int]]  # image number, box in its pixels, colour, dashes


def _draw_dashed(pen: ImageDraw.ImageDraw, box: Box, colour: str, width: int,
                 dashes: tuple[int, int]) -> None:
    x1, y1, x2, y2 = box
    stroke, step = dashes[0], sum(dashes)
    for start in range(int(x1), int(x2), step):
        for y in (y1, y2):
            pen.line((start, y, min(start + stroke, x2), y), fill=colour, width=width)
    for start in range(int(y1), int(y2), step):
        for x in (x1, x2):
            pen.line((x, start, x, min(start + stroke, y2)), fill=colour, width=width)


def _cut_to_image(box: Box, size: tuple[int, int], margin: int = 10) -> Box:
    """The box with edges that lie far outside an image of `size` moved to `margin` pixels from it.
    """
    return tuple(min(max(value, -margin), limit + margin) for value, limit in zip(box, size * 2))


def draw_sample(sample: Sample, reply: str = "", box_format: BoxFormat | None = None,
                height: int = 200) -> Image.Image:
    """All images of a sample side by side, numbered and framed: targets solid green, the reply's
    boxes dashed orange, reference dotted pink.

    box_format: of the reply; a reply without one is a ValueError. height: of the images, pixels.
    """
    if reply and box_format is None:
        raise ValueError("a reply's box cannot be drawn without its box_format")
    boxes = reply_boxes_in_original(sample, reply, box_format) if reply else []
    return draw_boxes(sample, [(image, box, PREDICTED, DASHES) for image, box in boxes], height)


def _fit_height(sample: Sample, height: int) -> int:
    """The height, made smaller where the images beside each other would exceed MAX_WIDTH."""
    room = MAX_WIDTH - GAP * (len(sample.sizes) + 1)
    return min(height, int(room / sum(width / tall for width, tall in sample.sizes)))


def draw_systems(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                 height: int = 150) -> Image.Image:
    """All images of a sample with the boxes of several systems, each in its colour and dashes, with
    its letter (SYSTEM_MARKS) at a corner of its own.

    replies: system -> reply; a system without a mark is drawn as PREDICTED, without a letter.
    """
    strokes, letters = [], []
    for system, reply in replies.items():
        colour = SYSTEM_COLOURS.get(system, PREDICTED)
        letter, corner, dashes = SYSTEM_MARKS.get(system, ("", (0, 0), DASHES))
        for image, box in reply_boxes_in_original(sample, reply, box_format):
            strokes.append((image, box, colour, dashes))
            letters.append((image, box, colour, letter, corner))
    return draw_boxes(sample, strokes, _fit_height(sample, height), letters)


def draw_group(sample: Sample, replies: Sequence[str], box_format: BoxFormat,
               height: int = 150) -> Image.Image:
    """All images of a sample with the boxes of all replies to it, each with its number: correct
    ones blue with long dashes, others orange with short ones.

    height: of the images, pixels.
    """
    strokes, numbers = [], []
    for place, reply in enumerate(replies):
        colour, dashes = STYLES[is_correct(reply, sample, box_format)]
        corner = place / max(1, len(replies) - 1), 0  # apart where boxes agree
        for image, box in reply_boxes_in_original(sample, reply, box_format):
            strokes.append((image, box, colour, dashes))
            numbers.append((image, box, colour, str(place + 1), corner))
    return draw_boxes(sample, strokes, _fit_height(sample, height), numbers)


def draw_boxes(sample: Sample, strokes: list[Stroke], height: int,
               letters: list[tuple] = ()) -> Image.Image:
    """The images with targets, reference and the boxes `strokes`, each below its number; height: of
    an image, pixels.

    letters: (image number, box, colour, letter, corner as shares of width and height).
    """
    tiles = []
    for number, image in enumerate(sample.images, 1):
        scale = height / image.height
        size = max(1, round(image.width * scale)), height
        tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        pen = ImageDraw.Draw(tile)
        for target in sample.targets:
            if target.image == number:
                _draw_solid(pen, tuple(value * scale for value in target.box), TARGET)
        boxes = [(box, colour, dashes) for at, box, colour, dashes in strokes if at == number]
        if number == 1 and sample.reference:
            boxes.append((sample.reference, REFERENCE, DOTS))
        for box, colour, dashes in boxes:
            scaled = _cut_to_image(tuple(value * scale for value in box), size)
            _draw_dashed(pen, scaled, colour, 3, dashes)
        for at, box, colour, letter, corner in letters:
            if at == number and letter:
                _draw_letter(pen, tuple(value * scale for value in box), size, colour, letter,
                             corner)
        tiles.append(tile)
    return _frame_in_row(tiles)


def _draw_solid(pen: ImageDraw.ImageDraw, box: Box, colour: str) -> None:
    if box[2] > box[0] and box[3] > box[1]:
        pen.rectangle(box, outline=colour, width=3)


def _draw_letter(pen: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], colour: str,
                 letter: str, corner: tuple[float, float], side: int = 15) -> None:
    """A filled square with a letter, outside the box at one of its corners, or between two, but in
    the image.
    """
    x, y = (min(max(low + share * (high - low) - side * (1 - share), 0), limit - side)
            for low, high, share, limit in zip(box[:2], box[2:], corner, size))
    pen.rectangle((x, y, x + side - 1, y + side - 1), fill=colour)
    pen.text((x + side / 2, y + side / 2), letter, fill=text_colour(colour), anchor="mm",
             font=ImageFont.load_default(12))


def _frame_in_row(tiles: list[Image.Image]) -> Image.Image:
    """The tiles side by side, each in a frame."""
    width = sum(tile.width for tile in tiles) + GAP * (len(tiles) + 1)
    sheet = Image.new("RGB", (width, tiles[0].height + HEAD + GAP), "white")
    pen, x = ImageDraw.Draw(sheet), GAP
    for number, tile in enumerate(tiles, 1):
        pen.text((x, 3), f"Image {number}", fill=INK, font=ImageFont.load_default(14))
        sheet.paste(tile, (x, HEAD))
        pen.rectangle((x - 1, HEAD - 1, x + tile.width, HEAD + tile.height), outline=FRAME)
        x += tile.width + GAP
    return sheet


def text_font(size: int, text: str) -> ImageFont.FreeTypeFont:
    """Pillow's own font, in the size; for a text that is not ASCII DejaVu, which has accents, Greek
    and Cyrillic, or the font of this machine that has the most of its letters.
    """
    if text.isascii():
        return ImageFont.load_default(size)
    return ImageFont.truetype(_find_font(frozenset(map(ord, text))), size - 1)


@cache
def _find_font(letters: frozenset[int]) -> str:
    first = font_manager.findfont("DejaVu Sans")
    if letters <= _letters_of(first):
        return first
    others = sorted(font.fname for font in font_manager.fontManager.ttflist
                    if font.style == "normal" and font.weight in (400, "normal", "regular")
                    and "LastResort" not in font.fname)  # which has a box for each
    return max([first, *others], key=lambda file: len(letters & _letters_of(file)))


@cache
def _letters_of(file: str) -> frozenset[int]:
    return frozenset(font_manager.get_font(file).get_charmap())


def draw_replies(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                 height: int = 150) -> Image.Image:
    """The question, and below it per system its reply with its box on the images, a blue bar beside
    a correct one and an orange bar beside another.

    replies: system -> reply. height: of the images, pixels.
    """
    height = _fit_height(sample, height)
    rows = []
    for system, reply in replies.items():
        is_right = is_correct(reply, sample, box_format)
        rows.append((draw_sample(sample, reply, box_format, height), STYLES[is_right][0],
                     f"{system} ({'correct' if is_right else 'wrong'}): {reply}"))
    width = max(520, *(sheet.width for sheet, _, _ in rows))
    question = format_question(sample, box_format, with_instruction=False)
    parts = [draw_text(question, width + 16, 17)]
    for sheet, colour, text in rows:
        row = stack([sheet, draw_text(text, width, 15)])
        bar = Image.new("RGB", (6, row.height), colour)
        parts.append(stack([bar, row], across=True, gap=2))
    return stack(parts, gap=10)


def draw_text(text: str, width: int, size: int = 14, colour: str = INK) -> Image.Image:
    """The text on white, wrapped to the width (pixels) line by line; size: of its letters."""
    lines = [part for line in text.split("\n")
             for part in textwrap.wrap(line, max(10, 2 * width // size)) or [""]]
    block = Image.new("RGB", (width, round(1.4 * size) * len(lines) + 8), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(block).text((8, 4 + round(1.4 * size) * number), line, fill=colour,
                                   font=text_font(size, line))
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


def draw_rollouts(sample: Sample, rows: list[dict], box_format: BoxFormat, height: int = 110,
                  steps: int = 6) -> Image.Image:
    """The replies to one question over the updates of a training: per update the images with the
    boxes of all replies, in the colours of `draw_group`, and the first reply.

    rows: {step, reply, reward, correct, boxes} each; boxes: (image number, box) pairs. steps: how
    many updates are shown at most, the first and the last among them.
    """
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    spread = np.linspace(0, len(by_step) - 1, min(steps, len(by_step))).round().astype(int)
    picked = [list(by_step)[index] for index in spread]
    parts = [part for step in picked for part in _draw_step(sample, step, by_step[step], height)]
    question = format_question(sample, box_format, with_instruction=False)
    return stack([draw_text(question, max(part.width for part in parts), 16), *parts])


def _draw_step(sample: Sample, step: int, rows: list[dict], height: int) -> list[Image.Image]:
    """A line about the replies of one update, the images with their boxes, and the first reply."""
    strokes = [(image, tuple(box), *STYLES[row["correct"]]) for row in rows
               for image, box in row["boxes"]]
    sheet = draw_boxes(sample, strokes, _fit_height(sample, height))
    n_correct = sum(row["correct"] for row in rows)
    reward = sum(row["reward"] for row in rows) / len(rows)
    width = max(sheet.width, 560)
    line = f"update {step}: {n_correct} of {len(rows)} correct, mean reward {reward:.2f}"
    reply = textwrap.shorten(rows[0]["reply"], 400, placeholder=" ...")
    return [draw_text(line, width), sheet, draw_text(f'first reply: "{reply}"', width, 13, MUTED)]


def merge_runs(tokens: Sequence[str], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """Tokens and values with each run of one token of one value written once, as "token x 9"."""
    merged = [(token, value, len(list(run)))
              for (token, value), run in groupby(zip(tokens, values, strict=True))]
    texts = [f"{token} x {count} " if count > 1 else token for token, _, count in merged]
    return texts, [value for _, value, _ in merged]


def colour_tokens(tokens: Sequence[str], values: Sequence[float], title: str,
                  high: float = 1) -> Image.Image:
    """The tokens one after the other below a title, each on a ground that is the darker the larger
    its value, such as its log-probability, or whether it carries loss.

    values: one a token, white up to 0 and darkest from `high` on.
    """
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
        share = min(1.0, max(0.0, value / high))
        ground = matplotlib.colormaps["Blues"](0.6 * share)  # black stays readable on it
        pen.rectangle((x, y, x + width - 2, y + TOKENS_LINE - 5), matplotlib.colors.to_hex(ground))
        pen.text((x + 1, y + 1), shown, fill="#000000", font=font)
    return stack([draw_text(title, TOKENS_WIDTH, 16), page])
