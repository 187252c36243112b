"""The box that a reply states, and the image that it is in, by rules of ours.

A statement is JSON with a key for the image and one for the box, or "image 2: box" and nothing
else: text that says more may deny or suppose what it says, so it is unread. None raises.
"""

import json
import math
import re
import unicodedata
from dataclasses import dataclass

from mig_kit.boxes import Box, Coordinates
from mig_kit.score.annotations import is_four_numbers
from mig_kit.score.choice_parsers import DENIES, REJECTS, has_no_weight, is_taken_back
from mig_kit.score.image_names import NOUN, ORDINALS, find_names
from mig_kit.score.official import FENCE, last_answer_block, shown_text, split_answer

NO_ANSWER, UNREAD, SEVERAL = "no <answer> block", "unread", "several boxes"
NOT_A_BOX = "not a box: needs x1 < x2 and y1 < y2"
WITHIN_ONE = "box within 0 to 1, where larger numbers were expected"

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_POINT = rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*"
BOX = re.compile(  # two corners, four numbers in brackets or tags
    rf"\({_POINT}\)\s*,?\s*\({_POINT}\)|\[\s*\[{_POINT}\]\s*,\s*\[{_POINT}\]\s*\]"
    rf"|\[{_POINT},{_POINT}\]|\({_POINT},{_POINT}\)"
    rf"|<b?box>\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*</b?box>")
_BARE = re.compile(rf"(?<![\w.]){_POINT},{_POINT}(?![\w.])")
# what released families write around a box: InternVL's, Qwen's and Seed's marks
_TAG = re.compile(r"<\|?/?(?:b?box|box_start|box_end)\|?>")
_LABEL = re.compile(r"<ref>(.*?)</ref>|<\|object_ref_start\|>(.*?)<\|object_ref_end\|>")
_UNCLEAR = re.compile(rf"{NOUN}|\b(?:{'|'.join(ORDINALS)})\b", re.IGNORECASE)  # which image?
_FILLER = re.compile(r"\b(?:it's|it|is|in|the|at|box|located)\b"
                     r"|[\s:,.;*_`\"'()<>|\[\]=\u2013\u2014-]")
_JSON = re.compile(r"\[?\s*\{")
_IMAGE_KEY = re.compile(r"(?:(?:target|answer)_)?(?:image|img|picture|photo|frame)"
                        r"(?:_?(?:id|idx|index|number|no))?", re.IGNORECASE)
_BOX_KEY = re.compile(r"(?:b?box|bounding_box|coordinates)(?:_2d)?", re.IGNORECASE)
_ASIDE = ("label", "confidence", "score")  # keys that say nothing about the image
_SIDES = (("x1", "y1", "x2", "y2"), ("xmin", "ymin", "xmax", "ymax"))

NamedBox = tuple[int | None, Box]


@dataclass(frozen=True)
class StrictAnswer:
    """What a reply states: image from 1, box xyxy as written; problem: why there is none."""

    image: int | None
    box: Box | None
    problem: str = ""


def parse_strict_answer(text: str) -> StrictAnswer:
    """The one box that the last <answer>, else a reply of JSON or with a family's marks, states."""
    block, shown = last_answer_block(text), shown_text(text)
    if block is None and not _JSON.match(_unfence(shown)) and not _TAG.search(shown):
        return StrictAnswer(None, None, NO_ANSWER)
    return parse_named_box(text)


def parse_named_box(text: str) -> StrictAnswer:
    """The one box that the last <answer> or, without one, the whole reply states."""
    named = parse_named_boxes(text)
    if len(set(named)) != 1:
        return StrictAnswer(None, None, SEVERAL if named else UNREAD)
    image, box = named[0]
    problem = box_problem(box)
    return StrictAnswer(image, None if problem else box, problem)


def box_problem(box: Box, coordinates: Coordinates = Coordinates.NORMALIZED_1) -> str:
    """Why four numbers are no box, or none in these coordinates; or ""."""
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)) or x1 >= x2 or y1 >= y2:
        return NOT_A_BOX
    is_within_one = coordinates != Coordinates.NORMALIZED_1 and 0 <= min(box) <= max(box) <= 1
    return WITHIN_ONE if is_within_one else ""


def parse_named_boxes(text: str) -> list[NamedBox]:
    """The (image, box) pairs that the last <answer> or, without one, the whole reply states.

    image: from 1, None if none is named. [] if any part of it is not read.
    """
    before, inside, behind = split_answer(text) or ("", shown_text(text), "")
    if is_taken_back(before, behind) or BOX.search(behind) or find_names(behind):
        return []
    final = _unfence(unicodedata.normalize("NFKC", inside))
    if _JSON.match(final):
        return _read_json_boxes(final)
    named = [_read_statement(line) for line in final.split("\n") if line.strip()]
    return [] if None in named else named


def _unfence(text: str) -> str:
    fenced = FENCE.fullmatch(text.strip())
    return fenced[1] if fenced else text.strip()


def _read_statement(text: str) -> NamedBox | None:
    """The box of a line that is a box, with or without the name of one image, and nothing else."""
    label = " ".join("".join(match) for match in _LABEL.findall(text))
    text = _LABEL.sub(" ", text)
    if "[" in text or not re.search("<b?box>", text):
        text = _TAG.sub(" ", text)
    text = " ".join(text.split())
    boxes = list(BOX.finditer(text)) or list(_BARE.finditer(text))
    if len(boxes) != 1:
        return None
    rest = f"{text[:boxes[0].start()]} \n {text[boxes[0].end():]}".lower()
    names = find_names(rest)
    for name in names:
        rest = rest[:name.start] + " " * (name.end - name.start) + rest[name.end:]
    if len(names) > 1 or names and len(names[0].numbers) != 1 or _FILLER.sub("", rest):
        return None
    image, is_read = _image_of_label(label)
    if not is_read or image and names:
        return None
    values = tuple(float(value) for value in boxes[0].groups() if value)
    return (names[0].numbers.pop() if names else image), values


def _image_of_label(label: str) -> tuple[int | None, bool]:
    """The image that an object's label names, and whether the label can stand for an object."""
    names = find_names(label)
    rest = re.sub(r"\W?\d+", "", label, count=1) if names else label
    is_denied = DENIES.search(label) or REJECTS.search(label)
    is_read = not is_denied and not re.search(r"\d", rest) and (
        len(names) == 1 and len(names[0].numbers) == 1 if names else not _UNCLEAR.search(label))
    return (names[0].numbers.pop() if names and is_read else None), is_read


def _require_single_keys(pairs: list[tuple[str, object]]) -> dict:
    if len({key.lower() for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is given twice")
    return {key.lower(): value for key, value in pairs}


def _read_json_boxes(text: str) -> list[NamedBox]:
    """The pairs of one or several objects, or a list; [] if one is of another form."""
    try:
        values = json.loads(text if text.startswith("[") else f"[{text}]",
                            object_pairs_hook=_require_single_keys)
    except (ValueError, RecursionError):
        return []
    named = list(map(_read_object, values))
    return [] if None in named else named


def _read_object(value: object) -> NamedBox | None:
    if not isinstance(value, dict):
        return None
    sides = next((names for names in _SIDES if set(names) <= set(value)), ())
    image_keys, box_keys = ([key for key in value if pattern.fullmatch(key)]
                            for pattern in (_IMAGE_KEY, _BOX_KEY))
    others = set(value) - {*sides, *image_keys, *box_keys, *_ASIDE}
    named, is_read = _image_of_label(str(value.get("label", "")).lower())
    if others or len(image_keys) + bool(named) > 1 or len(box_keys) + bool(sides) != 1 or (
            not is_read) or has_no_weight(value):
        return None
    numbers = [value[name] for name in sides] or value[box_keys[0]]
    if isinstance(numbers, list) and len(numbers) == 2 and all(
            isinstance(pair, list) for pair in numbers):
        numbers = [*numbers[0], *numbers[1]]
    image = value[image_keys[0]] if image_keys else named
    if isinstance(image, str):
        image = _image_of_label(f"image {image}" if image.isdecimal() else image)[0]
    is_image = type(image) is int and image != 0 or not image_keys
    return (image, tuple(map(float, numbers))) if is_image and is_four_numbers(numbers) else None
