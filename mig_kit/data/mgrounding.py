"""MGrounding-630k (Migician, arXiv 2501.05767) as lines of own data, by its README and a converter.

One JSON array of conversations; boxes are in 0 to 1000 of their image, and ordinals name images. No
tracking record could be read, so what may be a shuffled video is left out.
"""

import re
from dataclasses import replace
from pathlib import Path

from mig_kit.boxes import Coordinates
from mig_kit.data.conversations import (
    BOX,
    Turn,
    check_image_tags,
    read_turn,
    read_turns,
    turn_lines,
)
from mig_kit.data.records import Problem, require
from mig_kit.image_files import BadImage, is_regular_file, resolve_under_root
from mig_kit.score.image_names import find_names

NAME = "MGrounding-630k"
TRACKING = "Object_Tracking"
SHUFFLED = re.compile(
    r"shuffl|scrambl|disorder|unordered|out of order|not in order|random(?:ly)? order"
    r"|chronolog|temporal order", re.IGNORECASE)
FRAME_NUMBER = re.compile(r"([0-9]{1,12})\.[A-Za-z]+$")


def find_image_roots(root: Path) -> list[Path]:
    """The folders that ./MGrounding-630k may mean: `root`, or one below a nested home/."""
    nested = [folder for depth in range(5)
              for folder in sorted(root.glob("home/" + "*/" * depth + NAME))]
    return [root / NAME, root, *(folder for folder in nested if folder.is_dir())]


def locate_images(line: dict, root: Path, roots: list[Path]) -> dict:
    """The line with image paths below `root`; BadImage if one leaves it or is in no root."""
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


def record_lines(record: dict) -> list[dict | Problem]:
    """A record's turns as lines of own data, one per image of an answer, or as Problems."""
    images = record.get("images")
    require(isinstance(images, list) and bool(images)
            and all(isinstance(name, str) and name for name in images), "record shape")
    texts = read_turns(record, [])
    check_image_tags([text for turn in texts for text in turn], len(images))
    parts = images[0].split("/")
    subset = parts[parts.index(NAME) + 1] if NAME in parts[:-2] else ""
    if subset == TRACKING:
        _require_time_order(images, texts)
    lines: list[dict | Problem] = []
    for number, (asked, answered) in enumerate(texts):
        try:
            require(all(len(BOX.findall(text)) == text.count("<|box_start|>")
                        == text.count("<|box_end|>") for text in (asked, answered)),
                    "box text cannot be read")
            turn = read_turn(asked, answered, Coordinates.NORMALIZED_1000)
            turn = _without_reference(turn, asked, len(images), subset)
            lines += [line | ({"task": subset} if subset else {})
                      for line in turn_lines(turn, images, "any", number > 0)]
        except Problem as problem:
            lines.append(problem)
    return lines


def _without_reference(turn: Turn, asked: str, image_count: int, subset: str) -> Turn:
    """The turn without an answer that repeats the question's box; a video's boxes are by frame."""
    answers = turn.answers
    require(bool(answers), "no box in the answer")
    if subset == TRACKING and len(answers) == image_count and answers[0][0] is None:
        answers = [(number, box) for number, (_, box) in enumerate(answers, 1)]
    for _, reference in turn.references:
        names = find_names(asked[:asked.index("<|box_start|>")])
        require(names[-1].numbers == {1} if names else image_count == 1,
                "reference box not said to be in the first image")
        repeated = [(1, reference), *([(None, reference)] if image_count == 1 else [])]
        answers = [answer for answer in answers if answer not in repeated]
    require(bool(answers), "answer given in the question")
    return replace(turn, answers=answers)


def _require_time_order(images: list[str], turns: list[tuple[str, str]]) -> None:
    """Problem unless the frames' numbers rise, and no question speaks of another order."""
    require(not SHUFFLED.search(" ".join(asked for asked, _ in turns)), "shuffled video")
    matches = [FRAME_NUMBER.search(image) for image in images]
    times = [int(match.group(1)) for match in matches if match]
    require(len(times) < len(images) or times == sorted(times), "frames out of time order")
