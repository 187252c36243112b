"""Conversations of other projects as lines of own data, in the forms that these projects document.

A turn of question and answer becomes a line, or one for every image that its boxes are in. What
stays unclear, such as a later turn that needs the turns before it, is a Problem, never guessed.
"""

import json
import re
from dataclasses import dataclass
from itertools import chain

from mig_kit.boxes import Coordinates
from mig_kit.data.image_mentions import asked_numbers, is_follow_up, numbers_of_boxes
from mig_kit.data.line_checks import BOXES_ALONE, IMAGE_TAG
from mig_kit.data.records import ImportRules, Problem, require

MAX_TEXT = 20_000  # characters of a turn
USERS, ASSISTANTS = ("human", "user"), ("gpt", "assistant", "model")
TALKS = ("messages", "conversations", "prompt", "problem", "query")
ANSWERS = ("response", "solution", "answer")  # beside a conversation, as in EasyR1's files
# ms-swift's bbox_type; no file of the LLaVA kind, whose boxes stand in the text, states its own
SWIFT_COORDINATES = {"real": Coordinates.PIXELS, "norm1": Coordinates.NORMALIZED_1}

_NUMBER = r"\s{0,3}(-?[0-9]{1,7}(?:\.[0-9]{1,17})?)\s{0,3}"
# [x1,y1,x2,y2] or (x1,y1),(x2,y2), with the tags and brackets that may stand around it
BOX = re.compile(
    r"(?:<\|box_start\|>|<box>)?(?:\[\s{0,3})?"
    rf"(?:\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]"
    rf"|\({_NUMBER},{_NUMBER}\)\s{{0,3}},?\s{{0,3}}\({_NUMBER},{_NUMBER}\))"
    r"(?:\s{0,3}\])?(?:<\|box_end\|>|</box>)?")
TEXT_TAGS = re.compile(r"<\|object_ref_(?:start|end)\|>|</?(?:ref|p)>")
SPEAKS_OF_BOXES = re.compile(
    r"box|coordinate|normali[sz]ed|pixel|\b1000\b|\b[xy][ _-]?(?:min|max|1|2|first)\b",
    re.IGNORECASE)
# boxes that are not x1, y1, x2, y2: y first, or a corner or centre and a size
OTHER_ORDER = re.compile(
    r"\by(?:\s|-)*(?:comes\s+)?first\b|\by[\s_]?(?:min|1|0)[\s,;\"'/]{1,4}x[\s_]?(?:min|1|0)\b"
    r"|[\[({<]\W{0,2}(?:y|top\W{0,2},\s?left)\W{0,2},|\byxyx\b|\bc?xywh\b|(?<!b)box_2d"
    r"|cent(?:er|re)[\s_-]x\b|\b(?:c?x|left|x_?\w{1,6})\W{1,4}(?:c?y|top|y_?\w{1,6})\W{1,4}"
    r"(?:and\s+)?w(?:idth)?\b", re.IGNORECASE)
PLACEHOLDER = re.compile(r"<ref-object>|<bbox>")
TAGS_AT_START = re.compile(r"(?:\s*(?:(?:image|picture)[\s-]?[0-9]{1,3}\s?:?)?\s*"
                           r"<image(?: [0-9]{1,3})?>)+", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    references: list[tuple[int | None, list]]  # (image number from 1 or None, box)
    answers: list[tuple[int | None, list]]  # as references
    coordinates: str


def conversation_lines(record: dict, rules: ImportRules) -> list[dict | Problem]:
    """A record's turns as lines of own data without ids, or as Problems; may raise Problem."""
    images = record.get("images", record.get("image"))
    images = images if isinstance(images, list) else [] if images is None else [images]
    texts = read_turns(record, images)
    require(0 < len(images) <= 64, "'images' must list 1 to 64 paths; this record has "
                                   f"{len(images) or 'none'}")
    check_image_tags([text for pair in texts for text in pair], len(images))
    objects = record.get("objects")
    if objects is not None:
        turns = _swift_turns(texts, objects, rules, len(images))
    else:
        turns = [read_turn(*text, rules.coordinates) for text in texts]
        require(bool(rules.coordinates) or not any(turn.answers for turn in turns),
                "the file does not say what its boxes are measured in; give --coordinates")
    require(any(turn.answers for turn in turns), "no answer holds a box; a question of own data "
                                                 "needs one, or the keys options and letter")
    rule = _box_rule(record)
    for text in [rule, *chain(*texts)]:
        require_usual_order(text)
    lines: list[dict | Problem] = []
    earlier_tags = 0
    for number, (turn, text) in enumerate(zip(turns, texts)):
        try:
            lines += [line | ({"box_rule": rule} if rule else {}) for line in turn_lines(
                turn, images, rules.several, number > 0, earlier_tags)] if turn.answers else []
        except Problem as problem:
            lines.append(problem)
        earlier_tags += "".join(text).count("<image>")
    return lines


def _box_rule(record: dict) -> str:
    """What a record's system says of boxes, on one line; "" if nothing."""
    turns = chain(*(record[key] for key in TALKS if isinstance(record.get(key), list)))
    texts = [record.get("system"), *(
        turn.get("content", turn.get("value")) for turn in turns
        if isinstance(turn, dict) and turn.get("role", turn.get("from")) == "system")]
    text = " ".join(" ".join(str(_content_text(text, [])) for text in texts if text).split())
    return text if SPEAKS_OF_BOXES.search(text) or OTHER_ORDER.search(text) else ""


def require_usual_order(text: str) -> None:
    """Raise as `require` where a text says that boxes are not written x1, y1, x2, y2."""
    match = OTHER_ORDER.search(text)
    require(match is None, "the boxes are not written as x1, y1, x2, y2, which alone is read; "
                           f"rewrite them, and take {match and match[0]!r} out of the texts")


def read_turns(record: dict, images: list) -> list[tuple[str, str]]:
    """(asked, answered) of every turn but the system's; adds images in the texts to `images`."""
    messages = next((record[key] for key in TALKS if record.get(key)), None)
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    require(isinstance(messages, list) and bool(messages), BOXES_ALONE if "objects" in record else
            "'messages' or 'conversations' must be a list of turns")
    require(all(isinstance(message, dict) for message in messages),
            "a turn must be an object with its role and text")
    turns = [(message.get("role", message.get("from")),
              _content_text(message.get("content", message.get("value")), images))
             for message in messages]
    turns = [turn for turn in turns if turn[0] != "system"]
    answer = _separate_answer(record)
    if len(turns) % 2 and turns[-1][0] in USERS and answer is not None:
        turns.append((ASSISTANTS[0], answer))
    roles = [USERS, ASSISTANTS] * (len(turns) // 2)
    require(bool(turns) and len(roles) == len(turns)
            and all(isinstance(role, str) and role in allowed
                    for (role, _), allowed in zip(turns, roles)),
            "turns must be of user and assistant (human and gpt) by turns, or the answer in "
            f"{', '.join(ANSWERS)} or reward_model")
    texts = [text for _, text in turns]
    require(all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts),
            f"a turn's text must be a text of at most {MAX_TEXT} characters")
    require(not any("{ref}" in text for text in texts),
            "a text holds {ref}, which stands for a box here; take it out")
    return list(zip(texts[::2], texts[1::2]))


def _content_text(content: object, images: list) -> object:
    """A turn's text; of a list of parts, the images become tags and are added to `images`."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        require(isinstance(part, dict), "a part of a text must be an object with its type")
        if isinstance(part.get("text"), str):
            texts.append(part["text"])
            continue
        kind = str(part.get("type"))
        require("image" in kind, f"a part of a text is of the type {kind[:20]!r}; only texts and "
                                 "images can be used")
        image = part.get("image_url", part.get("image", part.get("path", part.get("url"))))
        image = image["url"] if isinstance(image, dict) and "url" in image else image
        images += [] if image is None else [image]
        texts.append("<image>")
    return "".join(texts)


def _separate_answer(record: dict) -> object:
    """The answer that stands beside a conversation; None without one."""
    answer = next((record[key] for key in ANSWERS if record.get(key)), None)
    if answer is None and isinstance(record.get("reward_model"), dict):
        answer = record["reward_model"].get("ground_truth")
    return json.dumps(answer) if isinstance(answer, list | dict) else answer


def check_image_tags(texts: list[str], image_count: int) -> None:
    """Raise as `require` unless the texts have an <image> tag for every image, or none."""
    found_tags = sum(text.count("<image>") for text in texts)
    require(found_tags in (0, image_count),
            f"there are {found_tags} <image> tags and {image_count} images; write one per image")
    require(not any(tag in text for text in texts for tag in ("<video>", "<audio>")),
            "videos and sound cannot be used; give the frames as images")


def _swift_turns(texts: list[tuple[str, str]], objects: object, rules: ImportRules,
                 image_count: int) -> list[Turn]:
    """The turns with <ref-object> and <bbox> replaced by what `objects` has for them, in order."""
    require(isinstance(objects, dict), "'objects' must be an object with 'ref' and 'bbox', as "
                                       "ms-swift 3 has it")
    refs, boxes = objects.get("ref", []), objects.get("bbox", [])
    require(isinstance(refs, list) and isinstance(boxes, list),
            "'ref' and 'bbox' of 'objects' must be lists")
    kind = objects.get("bbox_type") or "real"
    require(isinstance(kind, str) and kind in SWIFT_COORDINATES,
            f"'bbox_type' is {str(kind)[:20]!r}; use real (pixels) or norm1 (0 to 1)")
    coordinates = SWIFT_COORDINATES[kind]
    require(rules.coordinates in ("", coordinates),
            f"'bbox_type' says that boxes are {coordinates}, and --coordinates "
            f"{rules.coordinates}; leave the latter out, or correct the file")
    image_ids = objects.get("image_id")
    if image_ids is None:
        require(image_count == 1 or not boxes,
                f"'image_id' of 'objects' is missing; with {image_count} images it must say which "
                "one each box is in, from 0")
        image_ids = [0] * len(boxes)
    require(isinstance(image_ids, list) and len(image_ids) == len(boxes)
            and all(type(number) is int for number in image_ids),
            "'image_id' must be a list with a number, from 0, for every box")
    require(all(0 <= number < image_count for number in image_ids),
            f"'image_id' names an image that is not there; there are {image_count}, from 0")
    unused_refs = list(refs)
    unused_boxes = [(number + 1, box) for number, box in zip(image_ids, boxes)]
    turns = []
    for asked, answered in texts:
        question, references = _fill_placeholders(asked, unused_refs, unused_boxes, "{ref}")
        _, answers = _fill_placeholders(answered, unused_refs, unused_boxes, "")
        turns.append(Turn(question, references, answers, coordinates))
    require(not unused_boxes, f"'objects' has {len(unused_boxes)} boxes more than there are <bbox> "
                              "in the texts; write one <bbox> per box")
    return turns


def _fill_placeholders(text: str, refs: list, boxes: list, box_word: str) -> tuple[str, list]:
    """The filled text, each <bbox> being `box_word`, and its boxes; takes from `refs`, `boxes`."""
    own_boxes = []

    def fill(match: re.Match) -> str:
        is_box = match.group() == "<bbox>"
        values = boxes if is_box else refs
        require(bool(values), f"there are more {match.group()} in the texts than 'objects' has "
                              f"{'boxes' if is_box else 'texts'}; add the missing ones")
        value = values.pop(0)
        require(is_box or isinstance(value, str), "'ref' of 'objects' must be a list of texts")
        own_boxes.extend([value] if is_box else [])
        return box_word if is_box else value

    return PLACEHOLDER.sub(fill, text), own_boxes


def read_turn(asked: str, answered: str, coordinates: str) -> Turn:
    """The turn of these texts; Problem if it is unclear which images the answer's boxes are in."""
    def to_box(match: re.Match) -> list[float]:
        return [float(number) for number in match.groups() if number is not None]

    matches = list(BOX.finditer(answered))
    numbers = numbers_of_boxes(answered, [match.span() for match in matches])
    return Turn(BOX.sub("{ref}", asked), [(None, to_box(match)) for match in BOX.finditer(asked)],
                list(zip(numbers or [None] * len(matches), map(to_box, matches), strict=True)),
                coordinates)


def target_keys(numbers: list[int], boxes: list[list], several: str) -> dict:
    """The keys of own data for the boxes of an answer, each in the image of its number."""
    require(len(boxes) == 1 or bool(several),
            f"the answer has {len(boxes)} boxes; add --several any if any one of them is correct, "
            "--several all if all are to be found, or write one question for each")
    if len(boxes) == 1:
        return {"image": numbers[0], "box": boxes[0]}
    if several == "all":
        return {"targets": [{"image": number, "box": box}
                            for number, box in zip(numbers, boxes, strict=True)]}
    return {"image": numbers[0], "boxes": boxes}


def turn_lines(turn: Turn, images: list[str], several: str, is_later: bool,
               earlier_tags: int = 0) -> list[dict]:
    """The turn as one line of own data or, if any box is correct, one per image that has boxes.

    earlier_tags: <image> tags in the turns before. Raises Problem for a later turn that cannot be
    read alone.
    """
    question = clean_question(turn.question, len(images), earlier_tags)
    require(not (is_later and is_follow_up(question, len(images))),
            f"a later turn leans on the turns before it; write out what {question[:60]!r} asks for")
    numbers = [number for number, _ in turn.answers]
    if None in numbers:
        asked = asked_numbers(question) - ({1} if turn.references else set())
        asked = {1} if len(images) == 1 else asked
        require(set(numbers) == {None} and len(asked) == 1,
                f"it is not said which of the {len(images)} images the box is in; name it in the "
                "answer, as in: image 2")
        numbers = list(asked) * len(numbers)
    line = {"images": images, "coordinates": str(turn.coordinates)}
    if turn.references:
        require(len(turn.references) == 1, "the question has several boxes; it may have one")
        number, line["reference"] = turn.references[0]
        require(number in (None, 1), "the question's box must be in the first image; put that "
                                     "image first")
    boxes = [box for _, box in turn.answers]
    if several != "any" or len(set(numbers)) == 1:
        return [{**line, "question": question, **target_keys(numbers, boxes, several)}]
    lines = []
    for number in sorted(set(numbers)):
        group = [box for own, box in zip(numbers, boxes) if own == number]
        lines.append({**line, "question": f"{question} Answer for image {number} only.",
                      **target_keys([number] * len(group), group, several)})
    return lines


def clean_question(text: str, image_count: int, earlier_tags: int | None = None) -> str:
    """The question without tags; one inside the text becomes "image 2". Raises Problem.

    earlier_tags: how many the turns before hold; None if the question must hold one per image.
    """
    text = " ".join(IMAGE_TAG.sub(_plain_tag, TEXT_TAGS.sub("", text)).split())
    tags = (earlier_tags or 0) + text.count("<image>")
    at_start = TAGS_AT_START.match(text)
    run = at_start.group() if at_start else ""
    if "<image " not in run or run.count("<image") == image_count:
        text = text[len(run):]
    if text.count("<image>") == image_count:
        text = re.sub(r"(?:\s*<image>)+\s*$", "", text)
    n_inside = text.count("<image>")
    require(not n_inside or tags == image_count or earlier_tags is not None,
            f"there are {tags} <image> tags and {image_count} images; write one per image")
    for number in range(tags - n_inside + 1, tags + 1):
        text = text.replace("<image>", f"image {number}", 1)
    text = " ".join(name_images(text).split())
    require(bool(text), "the question has no text besides its images; write what is asked")
    return text


def name_images(text: str) -> str:
    """The text with "image 2" in place of tags that have a number."""
    return re.sub("<(image [0-9]+)>", r"\1", IMAGE_TAG.sub(_plain_tag, text))


def _plain_tag(tag: re.Match) -> str:
    """An image's tag as <image> or <image 2>; "" for one that closes or frames another."""
    if number := next(filter(None, tag.groups()), ""):
        return f"<image {int(number)}>"
    is_frame = re.search("^</|[_-](?:start|end)>$|end_of", tag.group(), re.IGNORECASE)
    return "" if is_frame else "<image>"
