"""All boxes of a free text, each with the image that it is in: for questions that ask for every box
of models that do not keep to the kit's answer format.
"""

import json
from collections.abc import Iterator

from mig_kit.boxes import Box
from mig_kit.scoring.convert_boxes import FENCE
from mig_kit.scoring.image_names import find_image_numbers, find_images_of_boxes, find_key_numbers
from mig_kit.scoring.parsers import last_answer_block, shown_text
from mig_kit.scoring.strict_parsers import find_boxes, mark_boxes, plain_text

NamedBox = tuple[int | None, Box]


def parse_named_boxes(reply: str) -> list[NamedBox]:
    """The (image, box) of every box in a reply, in its order; image: a number from 1, or None where
    the text leaves it open.

    Only the last <answer> is read, or, without one, the text after </think>. JSON whose keys name
    images is read as JSON; else a box is in the image that its sentence, or one before it, names
    for it. Any string is read; none raises.
    """
    block = last_answer_block(reply)
    text = shown_text(reply) if block is None else block
    named = _read_json(text)
    if any(image is not None for image, _ in named):
        return named
    text = plain_text(text)
    written = find_boxes(text)
    images = find_images_of_boxes(mark_boxes(text, written))
    return [(_only(numbers), box.box) for numbers, box in zip(images, written, strict=True)]


def _only(numbers: set[int]) -> int | None:
    return next(iter(numbers)) if len(numbers) == 1 else None


def _read_json(text: str) -> list[NamedBox]:
    """The boxes of a text that is JSON, objects with commas between, or has one fenced block; []
    for any other.
    """
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
        numbers = _flat_numbers(value)
        if len(numbers) == 4:
            yield image, (numbers[0], numbers[1], numbers[2], numbers[3])
        else:
            for item in value:
                yield from _walk(item, image)
    elif isinstance(value, dict):
        flat = json.dumps({key: item for key, item in value.items() if not _is_nested(item)})
        if numbers_named := find_key_numbers(flat):
            image = _only(numbers_named)
        yield from ((image, box.box) for box in find_boxes(flat))
        for key, item in value.items():
            if _is_nested(item):
                yield from _walk(item, _only(find_image_numbers(key)) or image)


def _is_nested(item: object) -> bool:
    """Whether an object's entry may hold boxes of its own; "image": [2] holds none."""
    return isinstance(item, dict) or isinstance(item, list) and len(item) > 1


def _flat_numbers(value: list) -> list[float]:
    """The numbers of [x1, y1, x2, y2] or [[x1, y1], [x2, y2]]; [] for other lists."""
    if len(value) == 2 and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = [*value[0], *value[1]]
    is_box = len(value) == 4 and all(type(number) in (int, float) for number in value)
    return [float(number) for number in value] if is_box else []
