"""MGrounding-630k as published (Migician, arXiv 2501.05767) as lines of own data, nothing guessed.

Established from the authors' README and from a public converter of the data set:

- one JSON array of records, and archives of images that unpack below a nested home/ folder
- `images` as "./MGrounding-630k/<Subset>/..."
- `conversations` of several human/gpt turns, the first with an <image> tag per image
- boxes as <|box_start|>(x1,y1),(x2,y2)<|box_end|> in 0 to 1000 of the image they are in
- answers that name the image by an ordinal ("It's in the third image.")
- tracking answers of one box per frame of the video

Not established, because no tracking record could be read: how a shuffled video says so. What may be
one is left out, and counted, like all that stays unclear.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from mig_kit.boxes import Coordinates
from mig_kit.data.conversations import (
    BOX,
    box_numbers,
    check_image_tags,
    clean_question,
    read_turns,
    target_keys,
)
from mig_kit.data.image_mentions import asked_numbers, mentioned_numbers, numbers_of_boxes
from mig_kit.data.records import Problem
from mig_kit.image_files import BadImage, is_regular_file, resolve_under_root

NAME = "MGrounding-630k"
TRACKING = "Object_Tracking"
SHUFFLED = re.compile(
    r"shuffl|scrambl|disorder|unordered|out of order|not in order|random(?:ly)? order"
    r"|chronolog|temporal order", re.IGNORECASE)
FRAME_NUMBER = re.compile(r"([0-9]{1,12})\.[A-Za-z]+$")


def find_image_roots(root: Path) -> list[Path]:
    """Folders below `root` that stand for ./MGrounding-630k: the folder itself, root, and any below
    a nested home/.
    """
    nested = [folder for depth in range(5)
              for folder in sorted(root.glob("home/" + "*/" * depth + NAME))]
    return [root / NAME, root, *(folder for folder in nested if folder.is_dir())]


def locate_images(line: dict, root: Path, roots: list[Path]) -> dict:
    """The line with the paths of its images below `root`.

    roots: of `find_image_roots`. BadImage if a path leads out of `root` or is in none of them.
    """
    names = []
    for name in line["images"]:
        resolve_under_root(root, name)
        path_in_set = re.sub(f"^(?:\\./)?{NAME}/", "", name)
        paths = (resolve_under_root(root, f"{folder.relative_to(root).as_posix()}/{path_in_set}")
                 for folder in roots)
        path = next(filter(is_regular_file, paths), None)
        if path is None:
            raise BadImage("missing image", f"{name!r} is not below {root}; unpack its archive "
                                            "there")
        names.append(path.relative_to(root.resolve()).as_posix())
    return {**line, "images": names}


def record_lines(record: dict, unstated: dict[str, int] | None = None) -> list[dict | Problem]:
    """A record's questions as lines of own data without ids, with images as written, and why turns
    are left out; an answer with boxes in several images becomes a line per image.

    unstated: the image number to take, per subset, where neither question nor answer names one (for
    example {"Difference": 2}, MIG-Bench's convention; for this data set it is not stated). Problem
    where the whole record is left out.
    """
    images = record.get("images")
    _require(isinstance(images, list) and bool(images)
             and all(isinstance(name, str) and name for name in images), "record shape")
    turns = read_turns(record, [])
    check_image_tags([text for turn in turns for text in turn], len(images))
    parts = images[0].split("/")
    subset = parts[parts.index(NAME) + 1] if NAME in parts[:-2] else ""
    if subset == TRACKING:
        _require_time_order(images, turns)
    lines: list[dict | Problem] = []
    for asked, answered in turns:
        try:
            lines += _turn_lines(asked, answered, images, subset, unstated or {})
        except Problem as problem:
            lines.append(problem)
    return lines


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Problem(reason, reason)


def _turn_lines(asked: str, answered: str, images: list[str], subset: str,
                unstated: dict[str, int]) -> Iterator[dict]:
    references, boxes = _find_boxes(asked), _find_boxes(answered)
    _require(bool(boxes), "no box in the answer")
    _require(len(references) <= 1, "several reference boxes")
    if references:
        named = mentioned_numbers(asked[:references[0].start()], len(images))
        _require(named[-1] == 1 if named else len(images) == 1,
                 "reference box not said to be in the first image")
    question = clean_question(BOX.sub("{ref}", asked), len(images), 0)
    numbers = numbers_of_boxes(answered, [box.span() for box in boxes], len(images))
    numbers = numbers or _numbers_elsewhere(question, bool(references), len(images), subset,
                                            len(boxes), unstated)
    _require(all(1 <= number <= len(images) for number in numbers), "no such image")
    groups: dict[int, list[list]] = {}
    for number, box in zip(numbers, boxes):
        groups.setdefault(number, []).append(box_numbers(box))
    if groups.get(1) == [box_numbers(box) for box in references]:
        del groups[1]  # the answer repeats the box that the question gave
    _require(bool(groups), "answer given in the question")
    for number, group in groups.items():
        is_part = len(group) < len(boxes)
        line = {"images": images, "coordinates": str(Coordinates.NORMALIZED_1000),
                "question": question + f" Answer for image {number} only." * is_part,
                **target_keys([number] * len(group), group, "any")}
        line |= {"task": subset} if subset else {}
        yield line | ({"reference": box_numbers(references[0])} if references else {})


def _find_boxes(text: str) -> list[re.Match]:
    matches = list(BOX.finditer(text))
    _require(len(matches) == text.count("<|box_start|>") == text.count("<|box_end|>"),
             "box text cannot be read")
    return matches


def _numbers_elsewhere(question: str, has_reference: bool, image_count: int, subset: str,
                       box_count: int, unstated: dict[str, int]) -> list[int]:
    """The image numbers when the answer names none: one image, a box per frame of a video, the
    question's image, or `unstated`.
    """
    if image_count == 1:
        return [1] * box_count
    if subset == TRACKING and box_count > 1:
        _require(box_count == image_count, "tracking boxes do not fit the frames")
        return list(range(1, image_count + 1))
    of_reference = {1} if has_reference else set()
    numbers = set(asked_numbers(question, image_count)) - of_reference
    if len(numbers) == 1:
        return list(numbers) * box_count
    _require(subset in unstated and not set(mentioned_numbers(question, image_count))
             - of_reference, "image not named")
    return [unstated[subset]] * box_count


def _require_time_order(images: list[str], turns: list[tuple[str, str]]) -> None:
    """Problem unless the frames' numbers, if they have any, rise, and no question speaks of another
    order.
    """
    _require(not SHUFFLED.search(" ".join(asked for asked, _ in turns)), "shuffled video")
    matches = [FRAME_NUMBER.search(image) for image in images]
    times = [int(match.group(1)) for match in matches if match]
    _require(len(times) < len(images) or times == sorted(times), "frames out of time order")
