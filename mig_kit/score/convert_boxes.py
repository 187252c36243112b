"""Replies whose boxes are measured otherwise than a benchmark's own rule reads them.

The authors' rules read 0 to 1000. Qwen2.5-VL answers in pixels of the resized image, which these
rules would silently read as 0 to 1000.
"""

import json
import re
from collections.abc import Callable, Iterable

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.official import FENCE, last_answer_block, shown_text
from mig_kit.score.reply_boxes import parse_named_box, parse_strict_answer

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_POINT = rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*"
_FOUR = rf"{_POINT},{_POINT}"
_BOX = re.compile(
    rf"\({_POINT}\)\s*,?\s*\({_POINT}\)|\[\s*\[{_POINT}\]\s*,\s*\[{_POINT}\]\s*\]"
    rf"|\[{_FOUR}\]|\({_FOUR}\)"
    rf"|<box>\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*</box>")
_NATIVE_KEY = re.compile(r'"b?box_2d"')
Y_FIRST_KEY = re.compile(r"\bbox_2d\b")
SIZE_KEYS = re.compile(r"\b(?:w|width)[\"']?\s*[:=]\s*[\d.]+[^\w]{1,5}(?:h|height)[\"']?\s*[:=]")
# how four numbers are meant -> the same as x1, y1, x2, y2
BOX_ORDERS: dict[str, Callable[..., tuple]] = {
    "xyxy": lambda x1, y1, x2, y2: (x1, y1, x2, y2),
    "yxyx": lambda y1, x1, y2, x2: (x1, y1, x2, y2),
    "xywh": lambda x, y, width, height: (x, y, f"{float(x) + float(width):g}",
                                         f"{float(y) + float(height):g}"),
    "percent": lambda *values: [f"{10 * float(value):.0f}" for value in values]}
_ROUNDING = 1  # pixels that a box of the model may reach outside, as rounding makes it


def wrap_native_json(reply: str) -> str:
    """Qwen-VL's or Gemini's own JSON of boxes as an <answer>; other replies as they are."""
    shown = shown_text(reply).strip()
    fenced = FENCE.findall(shown)
    text = fenced[0] if len(fenced) == 1 else shown
    if last_answer_block(reply) is not None or not (
            _NATIVE_KEY.search(text) and text.startswith(("[", "{"))):
        return reply
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return reply
    return f"<answer>{shown}</answer>"


def model_size(reply: str, sizes: list[tuple[int, int]], target: int | None,
               coordinates: Coordinates, box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) in `coordinates` of the image that the reply names, else of image `target`.

    sizes: of the original images.
    """
    image, _ = parse_named_box(reply)
    number = image if image is not None and 1 <= image <= len(sizes) else target or 1
    return coordinate_size(sizes[number - 1], coordinates, box_format)


def convert_reply(reply: str, size: tuple[int, int], in_place: bool = False) -> str:
    """The reply with every box in whole 0..1000, as the authors' rules read; below 0 becomes 0.

    size: of the image in the reply's coordinates. in_place: whether a box keeps its brackets, for
    rules that go by them; else it becomes "(x1,y1),(x2,y2)".
    """
    def convert(match: re.Match) -> str:
        box = tuple(float(number) for number in match.groups() if number)
        if any(abs(value) > 1e9 for value in box):
            return match.group()
        values = [max(round(value), 0) for value in rescale_box(box, size, (1000, 1000))]
        if in_place:
            return _replace_numbers(match, values)
        return "({},{}),({},{})".format(*values)

    return _BOX.sub(convert, reply)


def reorder_boxes(reply: str, order: str | None) -> str:
    """The reply with every box as x1, y1, x2, y2; order: one of BOX_ORDERS, None for xyxy."""
    if order in (None, "xyxy"):
        return reply
    return _BOX.sub(lambda match: _replace_numbers(match, BOX_ORDERS[order](
        *filter(None, match.groups()))), reply)


def has_bracketed_box(reply: str) -> bool:
    """Whether the reply has a box that `reorder_boxes` rewrites."""
    return bool(_BOX.search(reply))


def largest_coordinate(reply: str) -> float:
    """The largest number in any box of the reply; 0 without a box."""
    return max((float(number) for match in _BOX.finditer(reply)
                for number in filter(None, match.groups())), default=0.0) or max(
                    parse_named_box(reply)[1] or (0.0,))


def _replace_numbers(match: re.Match, values: Iterable[object]) -> str:
    """The match with its four numbers replaced by the values."""
    spans = [span for span in map(match.span, range(1, match.re.groups + 1)) if span != (-1, -1)]
    parts, place = [], match.start()
    for (start, end), value in zip(spans, values, strict=True):
        parts += [match.string[place:start], str(value)]
        place = end
    return "".join([*parts, match.string[place:match.end()]])


def convert_exactly(reply: str, sizes: list[tuple[int, int]], target: int | None,
                    box_format: BoxFormat) -> str:
    """The reply's one box as an <answer> in 0..1000 with decimals; a reply without one as it is.

    target: None if no image has to be named. One unit of rounding outside the image is cut.
    """
    answer = parse_strict_answer(wrap_native_json(reply), target is not None, len(sizes))
    image, box = answer.image, answer.box
    if box is None:
        return reply
    size = model_size(reply, sizes, target, box_format.coordinates, box_format)
    box = [min(max(value, 0), limit) if -_ROUNDING <= value <= limit + _ROUNDING else value
           for value, limit in zip(box, (*size, *size))]
    x1, y1, x2, y2 = (f"{value:.4f}" for value in rescale_box(box, size, (1000, 1000)))
    image_text = "" if image is None else f"image {image}: "
    return f"<answer>{image_text}({x1},{y1}),({x2},{y2})</answer>"


def to_official_line(item: BenchmarkItem, benchmark: str, line: dict,
                     sizes: list[tuple[int, int]], coordinates: Coordinates,
                     box_format: BoxFormat) -> dict:
    """A line as the benchmark's own rule reads it; Ref-L4's gets "pred_bbox" in pixels.

    sizes: of the item's original images. coordinates: of the reply's boxes.
    """
    reply = line["response"]
    size = model_size(reply, sizes, item.target, coordinates, box_format)
    line = line | {"response": convert_reply(reply, size, in_place=benchmark == "mig_bench")}
    if benchmark != "ref_l4":
        return line
    _, box = parse_named_box(reply)
    pixels = [0, 0, 0, 0] if box is None else list(rescale_box(box, size, sizes[0]))
    return line | {"pred_bbox": pixels, "format": "xyxy"}
