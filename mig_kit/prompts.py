"""Prompts and answers: how a sample is put to the model, and how its reply is read.

Edit GROUNDING_INSTRUCTION or CHOICE_INSTRUCTION to try another prompt. The reply format is
MG-Thinker's: reasoning in <think>, then one JSON object in <answer>, with the image number and the
box in the coordinates of the model's BoxFormat.
"""

import json
import math
import re
from dataclasses import dataclass

from mig_kit.boxes import Box, BoxFormat, to_model_box, to_original_box
from mig_kit.sample import Sample

GROUNDING_INSTRUCTION = 'Think in <think></think>, then answer <answer>{"image": number, "box": [x1,y1,x2,y2]}</answer>.'


CHOICE_INSTRUCTION = "Think in <think></think>, then answer with the letter in <answer></answer>."


@dataclass(frozen=True)
class Reply:
    """A model's reply, read. box: xyxy in the model's frame; image: from 1; None where the reply
    has none.

    well_formed: the whole reply is one <think> block followed by one <answer> block that holds one
    answer. names_none: as well-formed, but the answer holds neither a number nor a letter to
    choose: nothing was found.
    """

    thinking: str
    image: int | None
    box: Box | None
    letter: str
    well_formed: bool
    names_none: bool = False


def format_box(box: Box) -> str:
    """A box as the model reads and writes it: whole numbers, no spaces."""
    return "[" + ",".join(str(round(v)) for v in box) + "]"


def format_answer(image: int, box: Box) -> str:
    """The JSON inside <answer>; box in the model's frame of the image numbered `image`."""
    return f'{{"image": {image}, "box": {format_box(box)}}}'


def format_question(sample: Sample, box_format: BoxFormat) -> str:
    """The question with its reference box in the model's frame, its options, and the instruction.
    """
    text = sample.question
    if sample.reference:
        text = text.replace("{ref}", format_box(to_model_box(sample.reference, sample.sizes[0], box_format)))
    if sample.options:
        text += "".join(f" {letter}. {option}" for letter, option in zip("ABCDEFGH", sample.options))
    return f"{text} {CHOICE_INSTRUCTION if sample.options else GROUNDING_INSTRUCTION}"


def chat_messages(sample: Sample, box_format: BoxFormat) -> list[dict]:
    """The conversational prompt: every image announced by its number, in order, then the question.
    """
    content = []
    for number in range(1, len(sample.images) + 1):
        content += [{"type": "text", "text": f"Image {number}: "}, {"type": "image"}]
    content.append({"type": "text", "text": format_question(sample, box_format)})
    return [{"role": "user", "content": content}]


def parse_reply(text: str) -> Reply:
    """Read a reply; never raises. An answer that names several boxes, or two <answer> blocks,
    counts as none.
    """
    thinking = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    blocks = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    whole = re.fullmatch(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", text, re.DOTALL)
    clean = bool(whole) and text.count("<think>") == 1 == text.count("<answer>")
    image, box, letter = None, None, ""
    if len(blocks) == 1:
        image, box = _read_box(blocks[0])
        choice = re.fullmatch(r"\s*\(?([A-H])\)?\.?\s*", blocks[0])
        letter = choice.group(1) if choice else ""
    return Reply(thinking.group(1).strip() if thinking else "", image, box, letter,
                 clean and (box is not None or letter != ""), clean and not letter and not re.search(r"\d", blocks[0]))


def _read_box(block: str) -> tuple[int | None, Box | None]:
    try:
        data = json.loads(block)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(data, dict):
        return None, None
    image, box = data.get("image"), data.get("box")
    if not isinstance(image, int) or isinstance(image, bool):
        return None, None
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        return image, None
    if not all(-1e6 < v < 1e6 and math.isfinite(v) for v in box):
        return image, None
    return image, tuple(float(v) for v in box)


def reply_box_in_original(sample: Sample, reply: Reply, box_format: BoxFormat) -> Box | None:
    """The reply's box in pixels of the original of the image it names; None without box or with no
    such image.
    """
    if reply.box is None or reply.image is None or not 1 <= reply.image <= len(sample.images):
        return None
    return to_original_box(reply.box, sample.sizes[reply.image - 1], box_format)
