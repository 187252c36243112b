"""MGrounding-630k as own data, for `mig-kit data import mgrounding FILE`.

Only a record's first turn is read, since later ones may lean on it. With several images the answer
must name the image in the words of the data set, before its one box; no other prose is read.
"""

import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from mig_kit.data.records import Problem, iter_entries, refuse_unless

BOX = re.compile(r"<\|box_start\|>\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)<\|box_end\|>")
OBJECT_TAG = re.compile(r"<\|object_ref_(?:start|end)\|>")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
IMAGE = re.compile(rf"\W*(?:it'?s in |in )?(?:the )?(?:({'|'.join(ORDINALS)}) image"
                   r"|image[- ]?([0-9]{1,2}))\W*", re.IGNORECASE)


def iter_mgrounding(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("record 3", a line of own data, or the Problem for which it is none) of every record."""
    for place, record in iter_entries(path):
        try:
            if isinstance(record, Problem):
                raise record
            yield place, {"id": place.replace(" ", "-")} | _to_own_line(record)
        except Problem as problem:
            yield place, problem


def _to_own_line(record: dict) -> dict:
    """The first turn of a record as a line of own data."""
    images, turns = record.get("images"), record.get("conversations")
    refuse_unless(isinstance(images, list) and isinstance(turns, list) and len(turns) > 1
                  and all(isinstance(turn, dict) and isinstance(turn.get("value"), str)
                          for turn in turns[:2]),
                  "no 'images' and 'conversations' of MGrounding-630k")
    question, answer = (turn["value"] for turn in turns[:2])
    refuse_unless(question.count("<image>") in (0, len(images)),
                  "images that its question does not show")
    refuse_unless(not BOX.search(question), "a box in the question")
    boxes = list(BOX.finditer(answer))
    refuse_unless(len(boxes) == 1, "another number of boxes than one in the answer")
    name = IMAGE.fullmatch(OBJECT_TAG.sub("", answer[:boxes[0].start()]))
    refuse_unless(name is not None or len(images) == 1, "no image before the box",
                  "the answer must name the image before its box, as in "
                  "\"It's in the third image.\"")
    number = 1 if name is None else ORDINALS.index(name[1].lower()) + 1 if name[1] else int(name[2])
    return {"images": [image.removeprefix("./") if isinstance(image, str) else image
                       for image in images],
            "question": _name_images(OBJECT_TAG.sub("", question)), "image": number,
            "box": [int(value) for value in boxes[0].groups()], "coordinates": "normalized_1000"}


def _name_images(text: str) -> str:
    """The text without <image> tags at its start; the others become "image 2", in their order."""
    head, rest = re.fullmatch(r"((?:\s*<image>)*)(.*)", text, re.DOTALL).groups()
    numbers = count(head.count("<image>") + 1)
    return " ".join(re.sub("<image>", lambda _: f"image {next(numbers)}", rest).split())
