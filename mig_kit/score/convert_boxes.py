"""Replies whose boxes are in other coordinates, or another order, than the authors' rules read.

These rules read 0 to 1000, x1, y1, x2, y2, and would silently take pixels for that.
"""

import re
from collections.abc import Callable

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.image_names import find_names
from mig_kit.score.official import last_answer_block, parse_revised_mig_bench_box, shown_text
from mig_kit.score.reply_boxes import BOX, parse_named_box

# how four numbers are meant -> the same as x1, y1, x2, y2
BOX_ORDERS: dict[str, Callable[..., tuple]] = {
    "xyxy": lambda x1, y1, x2, y2: (x1, y1, x2, y2),
    "yxyx": lambda y1, x1, y2, x2: (x1, y1, x2, y2),
    "xywh": lambda x, y, width, height: (x, y, f"{float(x) + float(width):g}",
                                         f"{float(y) + float(height):g}")}


def rewrite_boxes(reply: str, change: Callable[[Box], tuple], in_place: bool = True) -> str:
    """The reply with the numbers of every box changed.

    in_place: whether a box keeps its brackets, for rules that go by them; else it becomes
        "(x1,y1),(x2,y2)".
    """
    def rewrite(match: re.Match) -> str:
        written = [number for number in match.groups() if number]
        if any(abs(float(number)) > 1e9 for number in written):
            return match[0]
        values = iter(map(str, change(*written)))
        if not in_place:
            return "({},{}),({},{})".format(*values)
        return re.sub(r"[-+]?\d+(?:\.\d+)?", lambda _: next(values), match[0])

    return BOX.sub(rewrite, reply)


def named_size(reply: str, sizes: list[tuple[int, int]], target: int | None,
               coordinates: Coordinates, box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) in `coordinates` of the one image that the reply names, else of `target`.

    sizes: of the original images.
    """
    block = last_answer_block(reply)
    named = parse_named_box(reply).image
    numbers = {named} if named else set().union(
        *(name.numbers for name in find_names(shown_text(reply) if block is None else block)))
    number = numbers.pop() if len(numbers) == 1 else None
    place = number if number and number <= len(sizes) else target or 1
    return coordinate_size(sizes[place - 1], coordinates, box_format)


def convert_exactly(reply: str, sizes: list[tuple[int, int]], target: int | None,
                    box_format: BoxFormat) -> str:
    """The reply's one box as an <answer> in 0..1000 with decimals; a reply without one as it is.

    One unit of rounding outside the image is cut.
    """
    answer = parse_named_box(reply)
    if answer.box is None:
        return reply
    size = named_size(reply, sizes, target, box_format.coordinates, box_format)
    box = [min(max(value, 0), limit) if -1 <= value <= limit + 1 else value
           for value, limit in zip(answer.box, (*size, *size))]
    x1, y1, x2, y2 = (f"{value:.4f}" for value in rescale_box(box, size, (1000, 1000)))
    image_text = "" if answer.image is None else f"image {answer.image}: "
    return f"<answer>{image_text}({x1},{y1}),({x2},{y2})</answer>"


def to_official_line(item: BenchmarkItem, benchmark: str, line: dict,
                     sizes: list[tuple[int, int]], coordinates: Coordinates,
                     box_format: BoxFormat) -> dict:
    """A line as the benchmark's own rule reads it: whole 0..1000, Ref-L4's "pred_bbox" in pixels.

    sizes: of the item's original images. coordinates: of the reply's boxes.
    """
    reply = line["response"]
    size = named_size(reply, sizes, item.target, coordinates, box_format)
    line = line | {"response": rewrite_boxes(reply, lambda *box: tuple(
        max(round(value), 0) for value in rescale_box(tuple(map(float, box)), size, (1000, 1000))),
        in_place=benchmark == "mig_bench")}
    if benchmark != "ref_l4":
        return line
    box = parse_named_box(reply).box or parse_revised_mig_bench_box(reply)
    pixels = [0, 0, 0, 0] if box is None else list(rescale_box(box, size, sizes[0]))
    return line | {"pred_bbox": pixels, "format": "xyxy"}
