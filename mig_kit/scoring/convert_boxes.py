"""Replies whose boxes are measured otherwise than a benchmark's own rule reads them.

The authors' rules read 0 to 1000. Qwen2.5-VL answers in pixels of the resized image, which would
be read as 0 to 1000, silently. `mig-kit score --coordinates`, `mig-kit eval` and stage 06 convert
here.
"""

import json
import re

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.prompts import parse_reply
from mig_kit.scoring.annotations import BenchmarkItem
from mig_kit.scoring.parsers import last_answer_block, parse_revised_mig_bench_box
from mig_kit.scoring.strict_parsers import parse_strict_answer

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_POINT = rf"\s*({_NUMBER})\s*,\s*({_NUMBER})\s*"
_FOUR = rf"{_POINT},{_POINT}"
_BOX = re.compile(
    rf"\({_POINT}\)\s*,?\s*\({_POINT}\)|\[\s*\[{_POINT}\]\s*,\s*\[{_POINT}\]\s*\]"
    rf"|\[{_FOUR}\]|\({_FOUR}\)"
    rf"|<box>\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*</box>")
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
_ROUNDING = 1  # pixels that a box of the model may reach outside, as rounding makes it


def wrap_native_json(reply: str) -> str:
    """A Qwen-VL's own JSON of boxes, [{"bbox_2d": [...]}], as an <answer>, which the strict rule
    reads: the whole reply, or its only fenced block. Any other reply as it is.
    """
    fenced = FENCE.findall(reply)
    text = fenced[0] if len(fenced) == 1 else reply.strip()
    if last_answer_block(reply) is not None:
        return reply
    if '"bbox_2d"' not in text or not text.startswith(("[", "{")):
        return reply
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return reply
    return f"<answer>{text}</answer>"


def parse_named_box(reply: str, exact: bool = False,
                    one_image: bool = True) -> tuple[int | None, Box | None]:
    """(image, box) that a reply names, as written: in the form the kit asks for, else in any that
    `mig-kit score` reads.

    exact: as the strict protocol reads, from the last <answer> alone; else from the whole reply,
    and of several boxes the first. one_image: see parse_strict_answer.
    """
    kit_answer = parse_reply(reply)
    has_answer = last_answer_block(reply) is not None
    if kit_answer.box is not None and (has_answer or not exact):
        return kit_answer.image, kit_answer.box
    if exact:
        reply = wrap_native_json(reply)
    elif not has_answer:
        text = reply.rpartition("</think>")[2].strip() or reply  # chat templates may open <think>
        answer = parse_strict_answer(f"<answer>{text}</answer>")
        return answer.image, answer.box or parse_revised_mig_bench_box(text)
    answer = parse_strict_answer(reply, one_image)
    if exact or answer.box is not None:
        return answer.image, answer.box
    return answer.image, parse_revised_mig_bench_box(reply)


def model_size(reply: str, sizes: list[tuple[int, int]], target: int | None,
               coordinates: Coordinates, box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) in `coordinates` of the image that the reply names, else of the target.

    sizes: of the original images; target: the number of the target image, from 1.
    """
    image, _ = parse_named_box(reply)
    number = image if image is not None and 1 <= image <= len(sizes) else target or 1
    return coordinate_size(sizes[number - 1], coordinates, box_format)


def convert_reply(reply: str, size: tuple[int, int], in_place: bool = False) -> str:
    """The reply with every box in whole 0..1000, as the authors' rules read.

    size: (width, height) of the image in the reply's coordinates. in_place: whether a box keeps its
    brackets, for rules that go by them; else it becomes "(x1,y1),(x2,y2)". Which box counts is left
    to the authors' rule. Below 0 is written as 0, for their patterns have no sign.
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


def _replace_numbers(match: re.Match, values: list[int]) -> str:
    """The match with its four numbers replaced by the values."""
    spans = [span for span in map(match.span, range(1, match.re.groups + 1)) if span != (-1, -1)]
    parts, place = [], match.start()
    for (start, end), value in zip(spans, values, strict=True):
        parts += [match.string[place:start], str(value)]
        place = end
    return "".join([*parts, match.string[place:match.end()]])


def convert_exactly(reply: str, sizes: list[tuple[int, int]], target: int | None,
                    box_format: BoxFormat) -> str:
    """The reply's one box as an <answer> in 0..1000 with decimals, for the strict protocol; a reply
    without one stays as it is. See model_size.

    A box that is outside by one unit of the model's, as rounding makes it, is cut to the image.
    target: None where no image has to be named.
    """
    image, box = parse_named_box(reply, exact=True, one_image=target is not None)
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
    """A line {"response", ...} as the benchmark's own rule reads it: boxes in 0..1000, and of
    Ref-L4 "pred_bbox" in pixels of the original image, four zeros where the reply has none.

    sizes: of the item's original images. coordinates: of the reply's boxes.
    """
    reply = line["response"]
    size = model_size(reply, sizes, item.target, coordinates, box_format)
    converted = convert_reply(reply, size, in_place=benchmark == "mig_bench")
    line = line | {"response": converted}
    if benchmark != "ref_l4":
        return line
    _, box = parse_named_box(reply)
    pixels = [0, 0, 0, 0] if box is None else list(rescale_box(box, size, sizes[0]))
    return line | {"pred_bbox": pixels, "format": "xyxy"}
