"""Conversations of LLaVA, ms-swift and MGrounding-630k as lines of own data.

Which image a box is in, the format says, or the record has one image; no prose is read for it. Only
the first turn is read, since later ones may lean on it.
"""

import json
import re

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


def read_record(form: str, record: dict, several: str) -> list[dict | Problem]:
    """A record's first turn as a line of own data, or a Problem, and one for each later turn.

    form: swift, llava or mgrounding.
    """
    images = record.get("images", record.get("image"))
    images = images if isinstance(images, list) else [images] * (images is not None)
    require(bool(images), "a record without images")
    turns = _read_turns(record)
    n_tags = sum(text.count("<image>") for turn in turns for text in turn)
    require(n_tags in (0, len(images)), "another number of <image> tags than of images",
            f"there are {n_tags} <image> tags and {len(images)} images; write one per image")
    numbers: list[int] = []
    coordinates = {"coordinates": "normalized_1000"} if form == "mgrounding" else {}
    if form == "swift" and record.get("objects") is not None:
        turns, numbers, kind = _fill_objects(turns, record["objects"], len(images))
        coordinates = {"coordinates": kind}
    try:
        line = _make_line(form, *turns[0], images, numbers, several)
        lines: list[dict | Problem] = [line | coordinates]
    except Problem as problem:
        lines = [problem]
    return lines + [Problem("a later turn", "a later turn may lean on the turns before it; write "
                            "it as a question of its own", False)] * (len(turns) - 1)


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


def _read_mgrounding(answered: str, matches: list[re.Match]) -> list[int]:
    """The image before each box, as in "It's in the third image."; [] unless each has one."""
    starts = [0, *(match.end() for match in matches)]
    names = [MGROUNDING_IMAGE.fullmatch(TEXT_TAGS.sub("", answered[start:match.start()]))
             for start, match in zip(starts, matches)]
    return [] if None in names else [
        ORDINALS.index(name[1].lower()) + 1 if name[1] else int(name[2]) for name in names]


def _read_indices(answered: str, matches: list[re.Match]) -> list[int]:
    """The "image" of each JSON object of an answer; [] unless there is one per box."""
    text = re.sub(r"</?answer>|```(?:json)?", "", answered.rpartition("</think>")[2]).strip()
    try:
        data = json.loads(text if text.startswith("[") else f"[{text}]")
        numbers = [item["image"] for item in data]
    except (ValueError, TypeError, KeyError):
        return []
    return numbers if len(numbers) == len(matches) and all(type(n) is int for n in numbers) else []


def _fill_objects(turns: list[tuple[str, str]], objects: object, n_images: int
                  ) -> tuple[list[tuple[str, str]], list[int], Coordinates]:
    """ms-swift's turns with <ref-object> and <bbox> filled from `objects`, the number of the image
    of each box, and the boxes' coordinates.
    """
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
    values = {"<ref-object>": list(objects.get("ref") or []), "<bbox>": list(boxes)}

    def replace(match: re.Match) -> str:
        require(bool(values[match[0]]), f"more {match[0]} in the texts than 'objects' has")
        return str(values[match[0]].pop(0))

    filled = [tuple(PLACEHOLDER.sub(replace, text) for text in turn) for turn in turns]
    n_read = sum(len(BOX.findall(text)) for turn in filled for text in turn)
    require(n_read == len(boxes), "other boxes in the texts than in 'objects'", "the texts must "
            "hold one <bbox> for each four numbers of 'bbox' in 'objects', and no other box")
    return filled, [number + 1 for number in ids], SWIFT_COORDINATES[kind]


def _make_line(form: str, asked: str, answered: str, images: list, numbers: list[int],
               several: str) -> dict:
    """A turn as a line of own data; numbers: the image of each box, [] if the texts must tell."""
    references, matches = list(BOX.finditer(asked)), list(BOX.finditer(answered))
    if len(images) == 1:
        numbers = [1] * (len(references) + len(matches))
    elif not numbers:
        require(not references, "a box in the question", NO_IMAGE, False)
        numbers = (_read_mgrounding if form == "mgrounding" else _read_indices)(answered, matches)
    boxes = [(number, [float(value) for value in match.groups() if value is not None])
             for number, match in zip(numbers, references + matches)]
    require(len(boxes) >= len(references + matches), "no image of a box", NO_IMAGE, False)
    references, answers = boxes[:len(references)], boxes[len(references):]
    require([number for number, _ in references] in ([], [1]), "a box in the question",
            "the question has several boxes, or one that is not in the first image; write own data "
            "with 'reference'", False)
    require(not references or references[0] not in answers,
            "the answer stands in the question", is_fault=False)
    return {"images": images, **target_keys(answers, several),
            **({"reference": references[0][1]} if references else {}),
            "question": name_tags(TEXT_TAGS.sub("", BOX.sub("{ref}", asked)))}


def target_keys(boxes: list[tuple[int, list]], several: str) -> dict:
    """The keys of own data for the (image number, box) pairs of an answer."""
    require(bool(boxes), "no answer with a box", is_fault=False)
    numbers = {number for number, _ in boxes}
    require(len(boxes) == 1 or several == "any" and len(numbers) == 1, "several boxes",
            f"the answer has {len(boxes)} boxes; add --several any if any one of them, in one "
            "image, is correct", False)
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
