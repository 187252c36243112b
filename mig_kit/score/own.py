"""Own data (see data/own_data.py) as a benchmark: any system's replies to one's own questions,
judged as `mig-kit eval --suite own` judges the kit's.
"""

from dataclasses import dataclass

from mig_kit.boxes import (
    Box,
    BoxFormat,
    Coordinates,
    coordinate_size,
    iou,
    matched_sum,
    rescale_box,
)
from mig_kit.prompts import LETTERS, parse_boxes, parse_reply
from mig_kit.score.annotations import Benchmark, BenchmarkItem
from mig_kit.score.choice_parsers import parse_choice_letter
from mig_kit.score.reply_boxes import parse_named_box, parse_named_boxes

THRESHOLD = 0.5


@dataclass(frozen=True)
class OwnItem(BenchmarkItem):
    """targets: (image, box) pairs, of which any answers or, with find_all, all do."""

    targets: tuple[tuple[int, Box], ...] = ()
    find_all: bool = False


def read_own(records: list[dict]) -> Benchmark:
    """The lines of an own-data file, which must be correct ones."""
    find_all = any("targets" in record or record.get("image", 0) is None for record in records)
    items = []
    for index, record in enumerate(records):
        boxes = [record["box"]] if "box" in record else record.get("boxes", [])
        targets = record.get("targets") or [{"image": record.get("image"), "box": box}
                                            for box in boxes if record.get("image")]
        pairs = tuple((target["image"], tuple(map(float, target["box"]))) for target in targets)
        options = tuple(record.get("options", ()))
        first_image, first_box = pairs[0] if pairs else (None, None)
        items.append(OwnItem(
            index, record.get("id", f"line-{index + 1}"), record.get("task", "own"),
            record["question"], tuple(record["images"]), first_box,
            Coordinates(record.get("coordinates", "pixels")), first_image, False,
            letter=record.get("letter", ""), options=LETTERS[:len(options)], choices=options,
            targets=pairs, find_all=find_all and not options))
    return Benchmark("own", "", tuple(items), None)


def judge_own(item: OwnItem, reply: str, protocol: str, coordinates: Coordinates,
              box_format: BoxFormat, sizes: dict[str, tuple[int, int]]) -> tuple[float, str]:
    """(IoU, or 1 for what is correct without one; problem) of a reply.

    protocol: strict reads the kit's answer format alone; free_text also a box or letter from any
    text that names its image. sizes: of the images, where coordinates are converted.
    """
    is_free, kit = protocol == "free_text", parse_reply(reply)
    if item.letter:
        letter = kit.letter or (parse_choice_letter(reply, item.options, item.choices)
                                if is_free else "")
        return float(letter == item.letter), "" if letter else "no option chosen"
    named = parse_boxes(reply) if item.find_all else [(kit.image, kit.box)]
    if is_free and not item.find_all:
        named = [parse_named_box(reply)]
    elif is_free and named is None:
        named = list(dict.fromkeys(parse_named_boxes(reply))) or None
    if named is None or any(box is None for _, box in named):
        return 0.0, "no box found"
    if is_free and len(item.images) == 1:
        named = [(image or 1, box) for image, box in named]
    if any(image is None for image, _ in named):
        return 0.0, "no image named"

    def overlap(image: int, box: Box, target: tuple[int, Box]) -> float:
        if image != target[0]:
            return 0.0
        size = sizes.get(item.images[image - 1], (1, 1))
        return iou(target[1], rescale_box(box, *(coordinate_size(size, measure, box_format)
                                                 for measure in (coordinates, item.coordinates))))

    overlaps = [[overlap(image, box, target) for target in item.targets] for image, box in named]
    if not item.find_all:
        is_wrong = named[0][0] not in {image for image, _ in item.targets}
        return max(overlaps[0]), "wrong image" if is_wrong else ""
    if len(named) != len(item.targets) or len(set(named)) != len(named):
        return 0.0, "another number of boxes than there are"
    reached = [[value >= THRESHOLD for value in row] for row in overlaps]
    return float(not named or matched_sum(reached) == len(named)), ""
