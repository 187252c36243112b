"""Boxes on images: a sample, the replies of several systems to it, and a training's rollouts.

Every image stands in a frame of its own, because scenes are often as white as the page. Targets are
solid, boxes of replies dashed, the reference dotted, so that a print in grey tells them apart.
"""

import textwrap
from functools import cache

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from mig_kit.boxes import Box, BoxFormat
from mig_kit.palette import (
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


def draw_boxes(sample: Sample, strokes: list[Stroke], height: int,
               letters: list[tuple] = ()) -> Image.Image:
    """The images with targets, reference and the boxes `strokes`; height: of an image, pixels.

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
                 letter: str, corner: tuple[int, int], side: int = 15) -> None:
    """A filled square with a letter, outside the box at one of its corners but in the image."""
    edges = (box[0], box[2]), (box[1], box[3])
    x, y = (min(max(edge[share] - side * (1 - share), 0), limit - side)
            for edge, share, limit in zip(edges, corner, size))
    pen.rectangle((x, y, x + side - 1, y + side - 1), fill=colour)
    pen.text((x + side / 2, y + side / 2), letter, fill=text_colour(colour), anchor="mm",
             font=ImageFont.load_default(12))


def _frame_in_row(tiles: list[Image.Image]) -> Image.Image:
    """The tiles side by side, each numbered and in a frame."""
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


def missing_letters(text: str) -> set[str]:
    """The letters of a text that its `text_font` lacks."""
    letters = frozenset(ord(letter) for letter in text if letter.isprintable())
    return set() if text.isascii() else set(map(chr, letters - _letters_of(_find_font(letters))))


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
    question = format_question(sample, box_format, with_instruction=False)
    rows = [(draw_sample(sample, reply, box_format, height), _judged_reply(system, is_right, reply),
             CORRECT if is_right else PREDICTED)
            for system, reply in replies.items()
            for is_right in [is_correct(reply, sample, box_format)]]
    width = max(520, *(sheet.width for sheet, _, _ in rows))
    texts = [textwrap.fill(text, width // 8) for _, text, _ in rows]
    heights = [sheet.height + 20 * (text.count("\n") + 1) + 18
               for (sheet, _, _), text in zip(rows, texts)]
    title = textwrap.fill(question, width // 9)
    top = 22 * (title.count("\n") + 1) + 18
    page = Image.new("RGB", (width + 16, top + sum(heights)), "white")
    pen = ImageDraw.Draw(page)
    pen.multiline_text((12, 10), title, fill=INK, font=text_font(17, title))
    for (sheet, _, colour), text, row_height in zip(rows, texts, heights):
        page.paste(sheet, (8, top))
        pen.multiline_text((16, top + sheet.height), text, fill=INK, font=text_font(15, text))
        pen.rectangle((0, top, 5, top + row_height - 12), fill=colour)
        top += row_height
    return page


def _judged_reply(system: str, is_right: bool, reply: str) -> str:
    return f"{system} ({'correct' if is_right else 'wrong'}): {reply}"


def draw_rollouts(sample: Sample, rows: list[dict], box_format: BoxFormat, height: int = 110,
                  steps: int = 6) -> Image.Image:
    """The replies to one question over the updates of a training: per update the images with the
    boxes of all replies, blue with long dashes where correct and orange with short ones where not,
    and the first reply.

    rows: {step, reply, reward, correct, image, box} each, of a question for all boxes with "boxes",
    (image, box) pairs, in place of the last two. steps: how many updates are shown at most, the
    first and the last among them.
    """
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    picked = [list(by_step)[index] for index in _spread_indices(len(by_step), steps)]
    parts = [_draw_step(sample, step, by_step[step], height) for step in picked]
    bold = ImageFont.load_default(16)
    question = format_question(sample, box_format, with_instruction=False)
    width = max(part.width for part in parts)
    title = textwrap.fill(question, width // 9)
    head = 22 * (title.count("\n") + 1) + 12
    page = Image.new("RGB", (width, head + sum(part.height for part in parts)), "white")
    ImageDraw.Draw(page).multiline_text((8, 8), title, fill=INK, font=bold)
    for part in parts:
        page.paste(part, (0, head))
        head += part.height
    return page


def _spread_indices(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spread from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _draw_step(sample: Sample, step: int, rows: list[dict], height: int) -> Image.Image:
    """The images with the boxes of the replies of one update, a line about them, and a reply."""
    styles = {True: (CORRECT, DASHES), False: (PREDICTED, SHORT_DASHES)}
    strokes = [(image, tuple(box), *styles[row["correct"]]) for row in rows
               for image, box in row.get("boxes") or [(row.get("image"), row.get("box"))] if box]
    sheet = draw_boxes(sample, strokes, _fit_height(sample, height))
    n_correct = sum(row["correct"] for row in rows)
    reward = sum(row["reward"] for row in rows) / len(rows)
    line = f"update {step}: {n_correct} of {len(rows)} correct, mean reward {reward:.2f}"
    width = max(sheet.width, 560)
    reply = textwrap.shorten(rows[0]["reply"], 400, placeholder=" ...")
    text = textwrap.fill(f'first reply: "{reply}"', width // 7)
    size = sheet.height + 22 + 18 * (text.count("\n") + 1) + 14
    part = Image.new("RGB", (width, size), "white")
    pen = ImageDraw.Draw(part)
    pen.line((8, 0, width - 8, 0), fill="#CCCCCC")
    pen.text((8, 4), line, fill=INK, font=ImageFont.load_default(14))
    part.paste(sheet, (0, 22))
    below = 8, 22 + sheet.height
    pen.multiline_text(below, text, fill=MUTED, font=ImageFont.load_default(13))
    return part
