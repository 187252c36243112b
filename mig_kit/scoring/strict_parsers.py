"""The strict reading of a grounding reply: the one box of the last <answer>, and its image.

Boxes are read in any writing that says four numbers: brackets of all kinds, pairs of corners, tags,
keys such as x1, or bare numbers. The rules are ours. Any string is read; none raises.
"""

import math
import re
import unicodedata
from dataclasses import dataclass

from mig_kit.boxes import Box
from mig_kit.scoring.image_names import (
    BOX,
    UNCLEAR,
    find_image_numbers,
    find_images_of_boxes,
    find_key_numbers,
    is_no_answer,
)
from mig_kit.scoring.parsers import last_answer_block

AMBIGUOUS = "ambiguous: several images, or one without its number"
DENIED = "denied, in doubt or taken back"
_MOST_BOXES = 8  # the same box written more often is no answer
_PLAIN = str.maketrans({"\u3001": ",", "\u3010": "[", "\u3011": "]", "\u2212": "-", "\u2019": "'",
                        "\u2018": "'", "\u201c": '"', "\u201d": '"', BOX: " "})
_BOX_TAG = re.compile(r"<\|?(/?)\w{0,12}box(_end)?\w{0,12}\|?>", re.IGNORECASE)
_OPENING_TAG = re.compile(r"<\|?(\w{1,20})\|?>")
_CLOSING_TAG = re.compile(r"</\w{1,20}>")

_NUMBER = r"(?<![\w.])[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?!\w|\.\d)"
_RUN = re.compile(rf"{_NUMBER}(?:(?:\s*[,;]\s*|\s+){_NUMBER})*")
_CORNER_GAP = re.compile(r"(?:[\W_]|to|and|through|until|top|bottom|upper|lower|left|right|hand"
                         r"|corner|at|is|the|its|point|x_?2|y_?2|x_?max|y_?max){0,40}", re.I)
_IMAGE_BEFORE = re.compile(r"(?:image|img|picture|photo|frame)s?\W{0,3}$", re.IGNORECASE)
_SIDE = re.compile(
    rf"\b(?:(x_?1|x_?min|left|x)|(y_?1|y_?min|top|y)|(x_?2|x_?max|right)|(y_?2|y_?max|bottom)"
    rf"|(w|width)|(h|height))[\"']?\s*[:=]\s*({_NUMBER})", re.IGNORECASE)
_LATEX = re.compile(r"\\[a-zA-Z]+|\$")


@dataclass(frozen=True)
class StrictAnswer:
    """What the last <answer> block says.

    image: number from 1, or None. box: xyxy as written, or None. problem: why there is no box.
    """

    image: int | None
    box: Box | None
    problem: str = ""


@dataclass(frozen=True)
class _WrittenBox:
    """A box and its place in the text."""

    start: int
    end: int
    box: Box


def parse_strict_answer(text: str, one_image: bool = True, count: int = 0) -> StrictAnswer:
    """The one box of the last <answer> block, and the image it is said to be in.

    Several boxes count as none, unless all are the same; so does a denial, a doubt or a
    retraction, and so do several images, unless one_image is False: then the answer names none of
    them. count: of the images. Which image: see image_names.
    """
    block = last_answer_block(text)
    if block is None:
        return StrictAnswer(None, None, "no <answer> block")
    block = plain_text(block)
    written = find_boxes(block)
    marked = mark_boxes(block, written[:_MOST_BOXES])
    images = find_image_numbers(marked, count)
    image = next(iter(images)) if len(images) == 1 and UNCLEAR not in images else None
    boxes = {box.box for box in written}
    if len(boxes) != 1 or len(written) > _MOST_BOXES:
        return StrictAnswer(image, None, "several boxes" if boxes else "no box")
    if is_no_answer(marked):
        return StrictAnswer(image, None, DENIED)
    if images and image is None and one_image:
        return StrictAnswer(None, None, AMBIGUOUS)
    x1, y1, x2, y2 = box = boxes.pop()
    if not all(map(math.isfinite, box)) or x1 >= x2 or y1 >= y2:
        return StrictAnswer(image, None, "not a box: needs x1 < x2 and y1 < y2")
    return StrictAnswer(image, box)


def parse_free_answer(text: str) -> tuple[int | None, Box | None]:
    """(image, box) of a text that is no answer block: its one box, None for several, and the image
    that a key or the words nearest to it name.
    """
    text = plain_text(text)
    written = find_boxes(text)
    marked = mark_boxes(text, written)
    images = find_key_numbers(marked) or next(iter(find_images_of_boxes(marked)), set())
    image = next(iter(images)) if len(images) == 1 else None
    boxes = {box.box for box in written}
    return image, boxes.pop() if len(boxes) == 1 else None


def plain_text(text: str) -> str:
    """Full-width signs as plain ones, tags of boxes as brackets, other tags as words, no LaTeX."""
    text = _LATEX.sub(" ", unicodedata.normalize("NFKC", text).translate(_PLAIN))
    text = _BOX_TAG.sub(lambda match: "]" if match[1] or match[2] else "[", text)
    return _CLOSING_TAG.sub(" ", _OPENING_TAG.sub(r" \1 ", text))


def find_boxes(text: str) -> list[_WrittenBox]:
    """All boxes of a text, in order; bare numbers count only where nothing stands in brackets."""
    if labelled := _find_labelled(text):
        return labelled
    runs = [(match.start(), match.end(), match.group()) for match in _RUN.finditer(text)]
    bracketed, bare, corner = [], [], None
    for start, end, digits in runs:
        numbers = [float(number) for number in re.findall(_NUMBER, digits)]
        if len(numbers) == 5 and _IMAGE_BEFORE.search(text[max(0, start - 12):start]):
            start += re.match(_NUMBER, digits).end()  # "image 2, 10, 20, 30, 40"
            numbers = numbers[1:]
        if len(numbers) == 2 and corner and _CORNER_GAP.fullmatch(text[corner[1]:start][:300]):
            start, numbers = corner[0], [*corner[2], *numbers]
        corner = (start, end, numbers) if len(numbers) == 2 else None
        if len(numbers) == 4:
            is_bracketed = text[:start].rstrip()[-1:] in tuple("([{<|")
            (bracketed if is_bracketed else bare).append(_WrittenBox(start, end, tuple(numbers)))
    return bracketed or bare


def _find_labelled(text: str) -> list[_WrittenBox]:
    """Boxes written as x1, y1, x2, y2 (or left, top, ...; or x, y, width, height, of which x and y
    are the upper left corner) with a number each, in any order.
    """
    sides = list(_SIDE.finditer(text))
    boxes, place = [], 0
    while place + 4 <= len(sides):
        four = sides[place:place + 4]
        values = {next(k for k in range(6) if side[k + 1]): float(side[7])
                  for side in four}
        if set(values) == {0, 1, 4, 5}:
            values = {**values, 2: values[0] + values[4], 3: values[1] + values[5]}
        if {0, 1, 2, 3} <= set(values):
            boxes.append(_WrittenBox(four[0].start(), four[3].end(),
                                     tuple(values[k] for k in range(4))))
        place += 4 if {0, 1, 2, 3} <= set(values) else 1
    return boxes


def mark_boxes(text: str, written: list[_WrittenBox]) -> str:
    """The text with BOX in the place of every box."""
    parts, end = [], 0
    for box in written:
        parts += [text[end:box.start], BOX]
        end = box.end
    return "".join([*parts, text[end:]])
