"""Conversations of LLaVA, ms-swift and MGrounding-630k as lines of own data.

Which image a box is in, the format says, or the record has one image; no prose is read for it. Only
the first turn is read, since later ones may lean on it.
"""

import json
import re
from dataclasses import dataclass

from mig_kit.boxes import Coordinates
from mig_kit.data.line_checks import EXAMPLE
from mig_kit.data.records import Problem, require

USERS, ASSISTANTS = ("human", "user"), ("gpt", "assistant", "model")
SWIFT_COORDINATES = {"real": Coordinates.PIXELS, "norm1": Coordinates.NORMALIZED_1}  # bbox_type
PLACEHOLDER = re.compile(r"<ref-object>|<bbox>")
_NUMBER = r"\s{0,3}(-?[0-9]{1,7}(?:\.[0-9]{1,17})?)\s{0,3}"
# [x1,y1,x2,y2] or (x1,y1),(x2,y2), with the tags and brackets that may stand around it
BOX = re.compile(
    r"(?:<\|box_start\|>|<box>)?(?:\[\s{0,3})?"
    rf"(?:\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
    rf"|\({_NUMBER},{_NUMBER}\)\s{{0,3}},?\s{{0,3}}\({_NUMBER},{_NUMBER}\))"
    r"(?:\s{0,3}\])?(?:<\|box_end\|>|</box>)?")
TEXT_TAGS = re.compile(r"<\|object_ref_(?:start|end)\|>|</?(?:ref|p)>")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
# the words in which an answer of MGrounding-630k names an image, before a box
MGROUNDING_IMAGE = re.compile(
    rf"\W*(?:it'?s in |in )?(?:the )?(?:({'|'.join(ORDINALS)}) image|image[- ]?([0-9]{{1,2}}))\W*",
    re.IGNORECASE)
NO_IMAGE = ("with several images an answer must say which one a box is in, as "
            f"{{\"image\": 2, \"box\": [x1, y1, x2, y2]}}; else write own data: {EXAMPLE}")
Boxes = list[tuple[int | None, list]]  # (image number from 1, None where unclear; box)


@dataclass(frozen=True)
class Turn:
    """A question and the boxes of its text and of its answer."""

    question: str
    references: Boxes
    answers: Boxes


def read_record(form: str, record: dict, several: str) -> list[dict | Problem]:
    """A record's first turn as a line of own data, or a Problem, and one for each later turn.

    form: swift, llava or mgrounding.
    """
    images = record.get("images", record.get("image"))
    images = images if isinstance(images, list) else [images] * (images is not None)
    require(bool(images), "a record without images")
    texts = _read_turns(record)
    n_tags = sum(text.count("<image>") for turn in texts for text in turn)
    require(n_tags in (0, len(images)), "another number of <image> tags than of images",
            f"there are {n_tags} <image> tags and {len(images)} images; write one per image")
    coordinates = {"coordinates": "normalized_1000"} if form == "mgrounding" else {}
    if form == "swift" and record.get("objects") is not None:
        turn, coordinates = _read_objects(texts, record["objects"], len(images))
    else:
        turn = _read_texts(form, *texts[0], len(images))
    try:
        lines: list[dict | Problem] = [_make_line(turn, images, several) | coordinates]
    except Problem as problem:
        lines = [problem]
    return lines + [Problem("a later turn", "a later turn may lean on the turns before it; write "
                            "it as a question of its own", False)] * (len(texts) - 1)


def _read_turns(record: dict) -> list[tuple[str, str]]:
    """(asked, answered) of every turn but the system's."""
    messages = record.get("messages") or record.get("conversations")
    require(isinstance(messages, list) and all(isinstance(turn, dict) for turn in messages),
            "no list of turns", f"'messages' or 'conversations' must be a list of turns; {EXAMPLE}")
    turns = [(turn.get("role", turn.get("from")), _to_text(turn.get("content", turn.get("value"))))
             for turn in messages]
    turns = [turn for turn in turns if turn[0] != "system"]
    roles = [USERS, ASSISTANTS] * (len(turns) // 2)
    require(len(roles) == len(turns) > 0
            and all(role in allowed for (role, _), allowed in zip(turns, roles)),
            "other turns than of user and assistant")
    texts = [text for _, text in turns]
    require(all(isinstance(text, str) and "{ref}" not in text for text in texts),
            "a turn that is no text, or holds {ref}")
    return list(zip(texts[::2], texts[1::2]))


def _to_text(content: object) -> object:
    """A turn's text; parts of text and images are joined."""
    if not isinstance(content, list):
        return content
    return "".join(part.get("text") or "<image>" if isinstance(part, dict) else ""
                   for part in content)


def _read_texts(form: str, asked: str, answered: str, n_images: int) -> Turn:
    """The turn of these texts."""
    def to_box(match: re.Match) -> list[float]:
        return [float(number) for number in match.groups() if number is not None]

    only = 1 if n_images == 1 else None
    matches = list(BOX.finditer(answered))
    numbers = [only] * len(matches)
    if n_images > 1:
        numbers = (_read_mgrounding(answered, matches) if form == "mgrounding" else
                   _read_indices(answered, len(matches))) or numbers
    return Turn(BOX.sub("{ref}", asked), [(only, to_box(match)) for match in BOX.finditer(asked)],
                list(zip(numbers, map(to_box, matches))))


def _read_mgrounding(answered: str, matches: list[re.Match]) -> list[int]:
    """The image before each box, as in "It's in the third image."; [] unless each has one."""
    starts = [0, *(match.end() for match in matches)]
    names = [MGROUNDING_IMAGE.fullmatch(TEXT_TAGS.sub("", answered[start:match.start()]))
             for start, match in zip(starts, matches)]
    return [] if None in names else [
        ORDINALS.index(name[1].lower()) + 1 if name[1] else int(name[2]) for name in names]


def _read_indices(answered: str, count: int) -> list[int]:
    """The "image" of each JSON object of an answer; [] unless there is one per box."""
    text = re.sub(r"</?answer>|```(?:json)?", "", answered.rpartition("</think>")[2]).strip()
    try:
        data = json.loads(text if text.startswith("[") else f"[{text}]")
        numbers = [item["image"] for item in data]
    except (ValueError, TypeError, KeyError):
        return []
    return numbers if len(numbers) == count and all(type(n) is int for n in numbers) else []


def _read_objects(texts: list[tuple[str, str]], objects: object, n_images: int
                  ) -> tuple[Turn, dict]:
    """ms-swift's first turn with <ref-object> and <bbox> filled from `objects`, in order."""
    require(isinstance(objects, dict) and isinstance(objects.get("bbox"), list)
            and isinstance(objects.get("ref") or [], list),
            "'objects' that is not ms-swift 3's", "'objects' must hold lists 'ref' and 'bbox', as "
            f"ms-swift 3 has it; {EXAMPLE}")
    kind, boxes = objects.get("bbox_type") or "real", objects["bbox"]
    require(kind in SWIFT_COORDINATES, "another bbox_type than real (pixels) or norm1 (0 to 1)")
    ids = objects.get("image_id")
    ids = [0] * len(boxes) if ids is None and n_images == 1 else ids
    require(isinstance(ids, list) and len(ids) == len(boxes)
            and all(type(number) is int and 0 <= number < n_images for number in ids),
            "no image_id for each box", "'image_id' of 'objects' must say which image each box is "
            f"in, from 0; there are {n_images} images")
    values = {"<ref-object>": list(objects.get("ref") or []),
              "<bbox>": [(number + 1, box) for number, box in zip(ids, boxes)]}

    def fill(text: str) -> tuple[str, Boxes]:
        own_boxes: Boxes = []

        def replace(match: re.Match) -> str:
            require(bool(values[match[0]]), f"more {match[0]} in the texts than 'objects' has")
            value = values[match[0]].pop(0)
            if match[0] == "<ref-object>":
                return str(value)
            own_boxes.append(value)
            return "{ref}"

        return PLACEHOLDER.sub(replace, text), own_boxes

    turn = Turn(*fill(texts[0][0]), fill(texts[0][1])[1])
    require(len(texts) > 1 or not values["<bbox>"],
            "more boxes in 'objects' than <bbox> in the texts")
    return turn, {"coordinates": SWIFT_COORDINATES[kind]}


def _make_line(turn: Turn, images: list, several: str) -> dict:
    """A turn as a line of own data."""
    require(None not in (number for number, _ in turn.answers), "no image of a box", NO_IMAGE,
            False)
    require([number for number, _ in turn.references] in ([], [1]), "a box in the question",
            "the question has several boxes, or one that is not in the first image; write own data "
            "with 'reference'", False)
    require(not turn.references or turn.references[0] not in turn.answers,
            "the answer stands in the question", is_fault=False)
    reference = {"reference": turn.references[0][1]} if turn.references else {}
    return {"images": images, **target_keys(turn.answers, several), **reference,
            "question": name_tags(TEXT_TAGS.sub("", turn.question))}


def target_keys(boxes: Boxes, several: str) -> dict:
    """The keys of own data for the boxes of an answer."""
    require(bool(boxes), "no answer with a box", is_fault=False)
    if several == "all" and len(boxes) > 1:
        return {"targets": [{"image": number, "box": box} for number, box in boxes]}
    numbers = {number for number, _ in boxes}
    require(len(boxes) == 1 or several == "any" and len(numbers) == 1, "several boxes",
            f"the answer has {len(boxes)} boxes; add --several any if "
            "any one of them, in one image, is correct, or --several all if all are to be found",
            False)
    key = {"box": boxes[0][1]} if len(boxes) == 1 else {"boxes": [box for _, box in boxes]}
    return {"image": boxes[0][0], **key}


def name_tags(text: str) -> str:
    """The text without <image> tags at its start; the others become "image 2", in their order."""
    text, n_before = text.strip(), 0
    while text.startswith("<image>"):
        text, n_before = text.removeprefix("<image>").lstrip(), n_before + 1
    while "<image>" in text:
        n_before += 1
        text = text.replace("<image>", f"image {n_before}", 1)
    return " ".join(text.split())
