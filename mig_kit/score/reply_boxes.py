"""Boxes of a free text, each with the image that it is in, read by rules of ours.

A box is four numbers in any brackets, tags or keys, or bare. `parse_strict_answer` wants one box in
the last <answer>; the other readers take any text. Any string is read; none raises.
"""

import json
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mig_kit.boxes import Box
from mig_kit.score.image_names import (
    BOX,
    NOT_READ,
    find_image_numbers,
    find_images_of_boxes,
    find_key_numbers,
    find_spoken_images,
)
from mig_kit.score.official import FENCE, last_answer_block, parse_revised_mig_bench_box, shown_text

AMBIGUOUS, IMAGE_NOT_READ = "ambiguous: several images", "image not read"
_MOST_BOXES = 8  # the same box written more often is no answer
_PLAIN = str.maketrans({"\u3001": ",", "\u3010": "[", "\u3011": "]", "\u2212": "-", "\u2019": "'",
                        "\u2018": "'", "\u201c": '"', "\u201d": '"', BOX: " "})
_TAG = re.compile(r"<\|?(/?)(\w{1,20})\|?>")
_TABLE = re.compile(r"^[ \t]*\|(.+)\|[ \t]*\n[ \t]*\|[ \t:|-]+\|[ \t]*\n"
                    r"((?:[ \t]*\|.+\|[ \t]*$\n?)+)", re.MULTILINE)
_LATEX = re.compile(r"\\[a-zA-Z]+|\$")

NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)"
_RUN = re.compile(rf"{NUMBER}(?:(?:\s*[,;]\s*|\s+){NUMBER})*")
_SIDE = re.compile(
    rf"\b(?:(x_?1|x_?min|left|x)|(y_?1|y_?min|top|y)|(x_?2|x_?max|right)|(y_?2|y_?max|bottom)"
    rf"|(w|width)|(h|height))[\"']?\s*[:=]\s*({NUMBER})", re.IGNORECASE)
# what may stand between two corners of a box
_BETWEEN_CORNERS = frozenset("to and through until top bottom upper lower left right hand corner "
                             "at is the its point x2 y2 x_2 y_2 xmax ymax x_max y_max".split())
_NAME = re.compile(r"[xy]_?(?:2|max)|[^\W_]+")
_IMAGE_WORDS = ("image", "img", "picture", "photo", "frame", "images")

NamedBox = tuple[int | None, Box]


@dataclass(frozen=True)
class StrictAnswer:
    """What the last <answer> says."""

    image: int | None  # from 1
    box: Box | None  # xyxy, as written
    problem: str = ""  # why there is no box


class _WrittenBox(NamedTuple):
    start: int  # place in the text
    end: int
    box: Box


def parse_strict_answer(text: str, one_image: bool = True, count: int | None = 0) -> StrictAnswer:
    """The one box of the last <answer>, and the one image that it names.

    Several different boxes count as none.

    Args:
        one_image: several images count as no box; if False, as no image.
        count: of the question's images, 0 if unknown; None reads only plain names of images.
    """
    block = last_answer_block(text)
    if block is None:
        return StrictAnswer(None, None, "no <answer> block")
    block = _plain_text(block)
    if count is not None:
        block = _TABLE.sub(_write_out_rows, block)
    written = _find_boxes(block)
    marked = _mark_boxes(block, written[:_MOST_BOXES])
    images = find_image_numbers(marked) if count is None else find_spoken_images(marked, count)
    image = _only(images) or None
    boxes = {box.box for box in written}
    if len(boxes) != 1 or len(written) > _MOST_BOXES:
        return StrictAnswer(image, None, "several boxes" if boxes else "no box")
    if NOT_READ in images and count is not None:
        return StrictAnswer(None, None, IMAGE_NOT_READ)
    if len(images) > 1 and one_image:
        return StrictAnswer(None, None, AMBIGUOUS)
    x1, y1, x2, y2 = box = boxes.pop()
    if not all(map(math.isfinite, box)) or x1 >= x2 or y1 >= y2:
        return StrictAnswer(image, None, "not a box: needs x1 < x2 and y1 < y2")
    return StrictAnswer(image, box)


def parse_named_box(reply: str, count: int | None = None) -> tuple[int | None, Box | None]:
    """The first (image, box) that a reply names, in its last <answer> or else anywhere.

    count: of the question's images; None reads only plain names of images, for the authors' rules.
    """
    if last_answer_block(reply) is not None:
        answer = parse_strict_answer(reply, count=count)
        return answer.image, answer.box or parse_revised_mig_bench_box(reply)
    shown = shown_text(reply).strip() or reply  # chat templates may open <think>
    text = _plain_text(shown)
    written = _find_boxes(text)
    marked = _mark_boxes(text, written)
    images = find_key_numbers(marked) or next(iter(find_images_of_boxes(marked)), set())
    boxes = {box.box for box in written}
    box = boxes.pop() if len(boxes) == 1 else parse_revised_mig_bench_box(shown)
    return _only(images), box


def parse_named_boxes(reply: str) -> list[NamedBox]:
    """Every (image, box) of a reply's last <answer> or, without one, after </think>.

    image: from 1, None if the text leaves it open. JSON counts by its keys; else a box is in the
    image that its sentence, or an earlier one, names for it.
    """
    block = last_answer_block(reply)
    text = shown_text(reply) if block is None else block
    named = _read_json(text)
    if any(image is not None for image, _ in named):
        return named
    text = _plain_text(text)
    written = _find_boxes(text)
    images = find_images_of_boxes(_mark_boxes(text, written))
    return [(_only(numbers), box.box) for numbers, box in zip(images, written, strict=True)]


def _only(numbers: set[int]) -> int | None:
    """The one number of a set of image numbers; None for several."""
    return next(iter(numbers)) if len(numbers) == 1 else None


def _plain_text(text: str) -> str:
    """Full-width signs as plain ones, tags of boxes as brackets, other tags as words, no LaTeX."""
    def convert(match: re.Match) -> str:
        name = match[2].lower()
        if "box" in name:
            return "]" if match[1] or name.endswith("_end") else "["
        return " " if match[1] else f" {match[2]} "

    text = unicodedata.normalize("NFKC", text).translate(_PLAIN)
    return _TAG.sub(convert, _LATEX.sub(" ", text))


def _write_out_rows(table: re.Match) -> str:
    """A Markdown table as "image: 1, x1: 10, ..." for each row."""
    names, *rows = ([cell.strip() for cell in row.strip(" \t|").split("|")]
                    for row in (table[1], *table[2].splitlines()))
    return "\n".join(", ".join(map(": ".join, zip(names, row))) for row in rows)


def _find_boxes(text: str) -> list[_WrittenBox]:
    """All boxes of a text, in order; bare numbers count only where nothing stands in brackets."""
    if labelled := _find_labelled(text):
        return labelled
    bracketed, bare, corner = [], [], None
    for match in _RUN.finditer(text):
        start, end = match.span()
        numbers = [float(number) for number in re.findall(NUMBER, match[0])]
        before = _NAME.findall(text[max(0, start - 12):start].lower())
        if len(numbers) == 5 and before and before[-1] in _IMAGE_WORDS:
            start += re.match(NUMBER, match[0]).end()  # "image 2, 10, 20, 30, 40"
            numbers = numbers[1:]
        if len(numbers) == 2 and corner and start - corner[1] <= 300 and (
                _BETWEEN_CORNERS.issuperset(_NAME.findall(text[corner[1]:start].lower()))):
            start, numbers = corner[0], [*corner[2], *numbers]
        corner = (start, end, numbers) if len(numbers) == 2 else None
        if len(numbers) == 4:
            is_bracketed = text[:start].rstrip()[-1:] in tuple("([{<|")
            (bracketed if is_bracketed else bare).append(_WrittenBox(start, end, tuple(numbers)))
    return bracketed or bare


def _find_labelled(text: str) -> list[_WrittenBox]:
    """Boxes with a key per number: x1, y1, x2, y2, or left, top, ..., or x, y, width, height."""
    sides = list(_SIDE.finditer(text))
    boxes, place = [], 0
    while place + 4 <= len(sides):
        four = sides[place:place + 4]
        values = {next(k for k in range(6) if side[k + 1]): float(side[7]) for side in four}
        if set(values) == {0, 1, 4, 5}:
            values |= {2: values[0] + values[4], 3: values[1] + values[5]}
        is_box = {0, 1, 2, 3} <= set(values)
        if is_box:
            boxes.append(_WrittenBox(four[0].start(), four[3].end(),
                                     tuple(values[k] for k in range(4))))
        place += 4 if is_box else 1
    return boxes


def _mark_boxes(text: str, written: list[_WrittenBox]) -> str:
    """The text with BOX in the place of every box."""
    parts, end = [], 0
    for box in written:
        parts += [text[end:box.start], BOX]
        end = box.end
    return "".join([*parts, text[end:]])


def _read_json(text: str) -> list[NamedBox]:
    """The boxes of a text that is JSON or has one fenced block of it; [] for any other."""
    fenced = FENCE.findall(text)
    for candidate in (*(fenced if len(fenced) == 1 else ()), text, f"[{text}]"):
        try:
            return list(_walk(json.loads(candidate), None))
        except (ValueError, RecursionError):
            continue
    return []


def _walk(value: object, image: int | None) -> Iterator[NamedBox]:
    """The boxes in a value of JSON; image: that of the objects around it."""
    if isinstance(value, list):
        numbers = value
        if len(value) == 2 and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            numbers = [*value[0], *value[1]]
        if len(numbers) == 4 and all(type(number) in (int, float) for number in numbers):
            yield image, tuple(map(float, numbers))
        else:
            for item in value:
                yield from _walk(item, image)
    elif isinstance(value, dict):
        nested = {key: item for key, item in value.items()
                  if isinstance(item, dict) or isinstance(item, list) and len(item) > 1}
        flat = json.dumps({key: item for key, item in value.items() if key not in nested})
        if numbers_named := find_key_numbers(flat):
            image = _only(numbers_named)
        yield from ((image, box.box) for box in _find_boxes(flat))
        for key, item in nested.items():
            yield from _walk(item, _only(find_image_numbers(key)) or image)
