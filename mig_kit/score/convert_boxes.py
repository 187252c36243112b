"""Replies whose boxes are in other coordinates, or another order, than the authors' rules read.

These rules read 0 to 1000, x1, y1, x2, y2, and would silently take pixels for that.
"""

import re
from collections.abc import Callable

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.official import parse_revised_mig_bench_box
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


def to_official_line(item: BenchmarkItem, frame: str, line: dict,
                     sizes: list[tuple[int, int]], coordinates: Coordinates,
                     box_format: BoxFormat) -> dict:
    """The line with its boxes in the frame that the benchmark's own rule reads.

    Args:
        frame: as of `benchmarks.Rules`.
        line: a prediction, with a "response".
        sizes: (width, height) of the item's original images, pixels.
        coordinates: of the reply's boxes, in the image that it names, else in the target.
        box_format: the processor's limits, for absolute coordinates.
    Returns: the line with whole numbers of 0..1000 in "response"; for pixels with "pred_bbox",
        xyxy, [0, 0, 0, 0] for a reply without a box, and "format".
    """
    reply = line["response"]
    named = parse_named_box(reply)
    number = named.image if named.image in range(1, len(sizes) + 1) else item.target or 1
    size = coordinate_size(sizes[number - 1], coordinates, box_format)
    if frame == "pixels":
        box = named.box or parse_revised_mig_bench_box(reply)
        pixels = [0, 0, 0, 0] if box is None else list(rescale_box(box, size, sizes[0]))
        return line | {"pred_bbox": pixels, "format": "xyxy"}
    return line | {"response": rewrite_boxes(reply, lambda *box: tuple(
        max(round(value), 0) for value in rescale_box(tuple(map(float, box)), size, (1000, 1000))),
        in_place=frame == "thousandths")}
