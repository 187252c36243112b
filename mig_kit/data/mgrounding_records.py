"""What the records of MGrounding-630k say: questions with their images and boxes, nothing guessed.

Established from the authors' README (Migician, arXiv 2501.05767) and from a public converter of the
data set:

- `images` as "./MGrounding-630k/<Subset>/..."
- `conversations` of several human/gpt turns, the first with an <image> tag per image
- boxes as <|box_start|>(x1,y1),(x2,y2)<|box_end|> in 0 to 1000 of the image they are in
- answers that name the image by an ordinal ("It's in the third image.")
- tracking answers of one box per frame of the video

Not established, because no tracking record could be read: how a shuffled video says so. Here its
question must say it (SHUFFLED) and the numbers in the file names must give the order; its images
are then put into time order, which makes "the first image" true of the list as well. Whatever stays
unclear is left out and counted, never guessed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from mig_kit.boxes import Box
from mig_kit.image_files import SkipReport
from mig_kit.sample import Target

NAME = "MGrounding-630k"
TRACKING = "Object_Tracking"
MAX_TEXT = 20_000  # characters of a turn

BOX = re.compile(r"<\|box_start\|>\(([0-9.]{1,8}),\s?([0-9.]{1,8})\),"
                 r"\s?\(([0-9.]{1,8}),\s?([0-9.]{1,8})\)<\|box_end\|>")
ORDINAL_WORDS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth",
                 "ninth", "tenth")
NUMBER_OF_WORD = {word: number for number, word in enumerate(ORDINAL_WORDS, 1)}
ORDINAL = "(?:" + "|".join(ORDINAL_WORDS) + r"|last|[0-9]{1,3}(?:st|nd|rd|th))"
AND = r"\s{0,3}(?:,\s{0,3}|\b(?:and|or)\b\s{0,3}){1,2}(?:in\s{1,3})?(?:the\s{1,3})?"
IMAGE_WORD = "(?:image|picture|photo|frame)s?"
# "the first and second images", or "images 1, 2 or 3"
MENTION = re.compile(
    rf"\b{ORDINAL}(?:{AND}{ORDINAL}){{0,9}}\s{{1,3}}{IMAGE_WORD}\b"
    rf"|\b{IMAGE_WORD}[\s#_-]{{0,2}}[0-9]{{1,3}}(?:{AND}[0-9]{{1,3}}){{0,9}}\b", re.IGNORECASE)
MENTIONED_NUMBER = re.compile(ORDINAL + "|[0-9]{1,3}")
# what may stand between two boxes of one image
SAME_IMAGE = re.compile(
    r"(?:[\s,;.&]|\band\b|<\|object_ref_start\|>.{0,200}?<\|object_ref_end\|>)*",
    re.IGNORECASE | re.DOTALL)
SHUFFLED = re.compile(
    r"shuffl|scrambl|disorder|unordered|out of order|not in order|random(?:ly)? order"
    r"|chronolog|temporal order", re.IGNORECASE)
# what makes a mention of an image say nothing about where the box is
COMPARES = re.compile(
    r"compared|unlike|differ(?:s|ent|ently)? from|\bthan\b|instead|\bnot\b|n't\b|without|except",
    re.IGNORECASE)
# before a mention: of the image that something is described by, and of the one that it is in
DESCRIBES = re.compile(
    r"\b(?:of|from|(?:as|like)\s+in"
    r"|(?<!is )(?<!are )(?<!be )(?<!was )(?:shown|seen|marked|outlined|highlighted|given|depicted"
    r"|circled|boxed|described|taken|cropped)\s+(?:in|on))\s+(?:the\s+)?$", re.IGNORECASE)
AREA = re.compile(
    r"\b(?:left|right|top|bottom|cent(?:er|re)|middle|corner|side|part|half|edge|area"
    r"|foreground|background)\s+of\s+(?:the\s+)?$", re.IGNORECASE)
PLACE = re.compile(r"\b(?:in|on|within|inside)\s+(?:the\s+)?$", re.IGNORECASE)
OTHER_IMAGE = re.compile(
    r"\b(?:other|another|remaining|both|each|every|all)(?:\s+\w+)?\s+"
    rf"{IMAGE_WORD}\b", re.IGNORECASE)
OBJECT_TAG = re.compile(r"<\|object_ref_(?:start|end)\|>")
LEADING_IMAGE_TAGS = re.compile(r"^(?:\s*<image>)+")
FRAME_NUMBER = re.compile(r"([0-9]{1,12})\.[A-Za-z]+$")


@dataclass(frozen=True)
class GroundingQuestion:
    """One question of a record.

    images: paths as written, in prompt order. targets: all in one image, any of them is a correct
    answer. reference: a box in the first image, "{ref}" in the question. Boxes: xyxy in 0 to 1000
    of their image.
    """

    id: str
    subset: str
    images: tuple[str, ...]
    question: str
    targets: tuple[Target, ...]
    reference: Box | None


@dataclass(frozen=True)
class _Record:
    """A record of the expected shape. turns: (asked, answered); name: its own id."""

    name: str
    subset: str
    images: tuple[str, ...]
    turns: list[tuple[str, str]]


class _BoxInText(NamedTuple):
    """A box, and the span of text that writes it."""

    start: int
    end: int
    box: Box


class _Skip(Exception):
    """Why a turn is left out; caught in this module."""


def iter_questions(index: int, record: object, report: SkipReport,
                   unstated: dict[str, int] | None = None) -> Iterator[GroundingQuestion]:
    """The questions of one record; an answer with boxes in several images becomes one per image.

    index: the record's place in the file, from 0. unstated: the image number to take, per subset,
    where neither question nor answer names one (for example {"Difference": 2}, MIG-Bench's
    convention; for this data set it is not stated). Never raises: what cannot be used is counted in
    the report under its reason.
    """
    try:
        parsed = _parse_record(record)
    except _Skip as skip:
        report.add(str(skip), f"record {index}")
        return
    for number, (asked, answered) in enumerate(parsed.turns, 1):
        try:
            yield from _turn_questions(f"{index}-{number}", parsed, asked, answered, unstated or {})
        except _Skip as skip:
            report.add(str(skip), f"record {index} turn {number} ({parsed.name})")


def _parse_record(record: object) -> _Record:
    if not isinstance(record, dict):
        raise _Skip("record shape")
    images, turns = record.get("images"), record.get("conversations")
    if not _is_list_of(str, images) or not all(images):
        raise _Skip("record shape")
    if not _is_list_of(dict, turns) or not _is_list_of(str, [turn.get("value") for turn in turns]):
        raise _Skip("record shape")
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise _Skip("turns not human and gpt in turn")
    texts = [turn["value"] for turn in turns]
    if any(len(text) > MAX_TEXT or "{ref}" in text for text in texts):
        raise _Skip("text too long or with {ref}")
    if [text.count("<image>") for text in texts] != [len(images)] + [0] * (len(texts) - 1):
        raise _Skip("image tags do not fit the images")
    return _Record(str(record.get("id", "")), _subset_name(images[0]), tuple(images),
                   list(zip(texts[::2], texts[1::2])))


def _is_list_of(kind: type, values: object) -> bool:
    """True for a list, not empty, of such values."""
    return (isinstance(values, list) and bool(values)
            and all(isinstance(value, kind) for value in values))


def _subset_name(path: str) -> str:
    parts = path.split("/")
    return parts[parts.index(NAME) + 1] if NAME in parts[:-2] else ""


def _turn_questions(name: str, record: _Record, asked: str, answered: str,
                    unstated: dict[str, int]) -> Iterator[GroundingQuestion]:
    """The questions of one turn, one per image that the answer has boxes in."""
    images, is_shuffled = record.images, False
    if record.subset == TRACKING:
        images, is_shuffled = _sort_frames(record)
    boxes = _find_boxes(answered)
    if not boxes:
        raise _Skip("no box in the answer")
    question, reference = _parse_question(asked, len(images))
    numbers = _numbers_in_answer(answered, boxes, len(images))
    if numbers is None:
        numbers = _numbers_elsewhere(question, reference is not None, len(images), record.subset,
                                     len(boxes), is_shuffled, unstated)
    targets = _group_by_image(numbers, boxes, len(images))
    if reference is not None and targets.get(1) == [Target(1, reference)]:
        del targets[1]  # the answer repeats the box that the question gave
    if not targets:
        raise _Skip("answer given in the question")
    for number, targets_in_image in targets.items():
        id_, text = name, question
        if len(targets_in_image) < len(boxes):
            id_, text = f"{name}-{number}", f"{question} Answer for image {number} only."
        yield GroundingQuestion(id_, record.subset, images, text, tuple(targets_in_image),
                                reference)


def _group_by_image(numbers: list[int], boxes: list[_BoxInText],
                    image_count: int) -> dict[int, list[Target]]:
    """The answer's boxes by the number of their image."""
    if any(not 1 <= number <= image_count for number in numbers):
        raise _Skip("no such image")
    for _, _, box in boxes:
        _require_valid_box(box)
    targets: dict[int, list[Target]] = {}
    for number, (_, _, box) in zip(numbers, boxes):
        targets.setdefault(number, []).append(Target(number, box))
    return targets


def _find_boxes(text: str) -> list[_BoxInText]:
    matches = list(BOX.finditer(text))
    if not len(matches) == text.count("<|box_start|>") == text.count("<|box_end|>"):
        raise _Skip("box text cannot be read")
    try:
        return [_BoxInText(match.start(), match.end(), tuple(map(float, match.groups())))
                for match in matches]
    except ValueError:
        raise _Skip("box text cannot be read") from None


def _require_valid_box(box: Box) -> None:
    if not all(0 <= value <= 1000 for value in box):
        raise _Skip("box outside 0-1000")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _Skip("degenerate box")


def mentioned_numbers(text: str, image_count: int) -> list[int]:
    """The numbers of the images that a text names, in the order of the text."""
    return [number for mention in MENTION.finditer(text)
            for number in _numbers_of(mention, image_count)]


def answered_numbers(text: str, image_count: int) -> list[int]:
    """Those that an answer says a box is in: not the image "of", "from" or "marked in" which
    something is, unless it says where in that image ("at the left of image 2").
    """
    return [number for mention in MENTION.finditer(text)
            if _is_no_description(text[:mention.start()])
            for number in _numbers_of(mention, image_count)]


def asked_numbers(text: str, image_count: int) -> list[int]:
    """Those that a question asks about, "in image 2" or, at its start, "Image 2:"; none where it
    compares or speaks of other images, too.
    """
    if COMPARES.search(text) or OTHER_IMAGE.search(text):
        return []
    numbers = []
    for mention in MENTION.finditer(text):
        before, after = text[:mention.start()], text[mention.end():]
        is_heading = not before.strip() and after.lstrip().startswith((":", ","))
        is_place = PLACE.search(before) or AREA.search(before)
        if is_heading or (is_place and _is_no_description(before)):
            numbers += _numbers_of(mention, image_count)
    return numbers


def _is_no_description(before: str) -> bool:
    return not DESCRIBES.search(before) or bool(AREA.search(before))


def _numbers_of(mention: re.Match, image_count: int) -> list[int]:
    numbers = []
    for word in MENTIONED_NUMBER.findall(mention.group().lower()):
        if word == "last":
            numbers.append(image_count)
        elif word in NUMBER_OF_WORD:
            numbers.append(NUMBER_OF_WORD[word])
        else:
            numbers.append(int(re.match("[0-9]+", word).group()))
    return numbers


def _parse_question(asked: str, image_count: int) -> tuple[str, Box | None]:
    """The question as plain text, and its reference box, which must be in the first image."""
    boxes = _find_boxes(asked)
    if len(boxes) > 1:
        raise _Skip("several reference boxes")
    reference = None
    if boxes:
        start, end, reference = boxes[0]
        _require_valid_box(reference)
        numbers = mentioned_numbers(asked[:start], image_count)
        is_in_first = numbers[-1] == 1 if numbers else image_count == 1
        if not is_in_first:
            raise _Skip("reference box not said to be in the first image")
        asked = f"{asked[:start]}{{ref}}{asked[end:]}"
    asked = LEADING_IMAGE_TAGS.sub("", asked)
    first_tag = image_count - asked.count("<image>") + 1
    for number in range(first_tag, image_count + 1):  # a tag inside the text stands for its image
        asked = asked.replace("<image>", f"image {number}", 1)
    text = " ".join(OBJECT_TAG.sub("", asked).split())
    if not text or "<|" in text:
        raise _Skip("question text cannot be read")
    return text, reference


def _numbers_in_answer(text: str, boxes: list[_BoxInText], image_count: int) -> list[int] | None:
    """The image number of every box, said before the boxes or after them.

    None if the answer names no image.
    """
    starts = [0, *(end for _, end, _ in boxes)]
    ends = [*(start for start, _, _ in boxes), len(text)]
    gaps = [text[start:end] for start, end in zip(starts, ends)]
    numbers_in_gaps = [sorted(set(answered_numbers(gap, image_count))) for gap in gaps]
    if not any(numbers_in_gaps):
        return None
    if any(numbers and COMPARES.search(gap) for gap, numbers in zip(gaps, numbers_in_gaps)):
        raise _Skip("image of a box unclear")
    before, *after = numbers_in_gaps
    if not before and all(len(numbers) == 1 for numbers in after):
        return [numbers[0] for numbers in after]
    if len(before) != 1:
        raise _Skip("image of a box unclear")
    result = list(before)
    for gap, numbers in zip(gaps[1:-1], after[:-1]):
        if len(numbers) == 1:
            result.append(numbers[0])
        elif not numbers and SAME_IMAGE.fullmatch(gap):
            result.append(result[-1])
        else:
            raise _Skip("image of a box unclear")
    return result


def _numbers_elsewhere(question: str, has_reference: bool, image_count: int, subset: str,
                       box_count: int, is_shuffled: bool, unstated: dict[str, int]) -> list[int]:
    """The image numbers when the answer names none: one image, a box per frame of a video, the
    question's image, or `unstated`.
    """
    if image_count == 1:
        return [1] * box_count
    if subset == TRACKING and box_count > 1:
        if is_shuffled:
            raise _Skip("shuffled video, order of the boxes unclear")
        if box_count != image_count:
            raise _Skip("tracking boxes do not fit the frames")
        return list(range(1, image_count + 1))
    numbers = set(asked_numbers(question, image_count))
    if has_reference:
        numbers -= {1}
    if len(numbers) == 1:
        return list(numbers) * box_count
    mentioned = set(mentioned_numbers(question, image_count)) - ({1} if has_reference else set())
    if subset in unstated and not mentioned:
        return [unstated[subset]] * box_count
    raise _Skip("image not named")


def _sort_frames(record: _Record) -> tuple[tuple[str, ...], bool]:
    """The frames in time order, and whether the video was shuffled."""
    images = record.images
    matches = [FRAME_NUMBER.search(image) for image in images]
    is_one_folder = len({image.rsplit("/", 1)[0] for image in images}) == 1
    is_numbered = is_one_folder and all(matches)
    times = [int(match.group(1)) for match in matches] if is_numbered else []
    is_in_order = times == sorted(times)
    if not SHUFFLED.search(" ".join(asked for asked, _ in record.turns)):
        if not is_in_order:
            raise _Skip("frames out of time order, which no question says")
        return images, False
    if len(set(times)) != len(images):
        raise _Skip("shuffled video, order in time unknown")
    return tuple(image for _, image in sorted(zip(times, images))), not is_in_order
