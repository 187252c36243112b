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
from mig_kit.sample import LESSONS, Sample

GROUNDING_INSTRUCTION = ('Think in <think></think>, then answer '
                         '<answer>{"image": number, "box": [x1,y1,x2,y2]}</answer>.')
CHOICE_INSTRUCTION = ("Think in <think></think>, then answer with the letter in "
                      "<answer></answer>.")
LETTERS = "ABCDEFGH"
LARGEST = 1e6  # a coordinate beyond it is no coordinate


@dataclass(frozen=True)
class Reply:
    """A model's reply, read.

    box: xyxy in the model's coordinates; image: from 1; None where the reply has none.
    well_formed: the whole reply is one <think> block followed by one <answer> block that holds one
    answer. names_none: likewise, but the answer holds neither a number nor a letter to choose.
    """

    thinking: str
    image: int | None
    box: Box | None
    letter: str
    well_formed: bool
    names_none: bool = False


def format_box(box: Box) -> str:
    """A box as the model reads and writes it: whole numbers, no spaces."""
    return "[" + ",".join(str(round(value)) for value in box) + "]"


def format_answer(image: int, box: Box) -> str:
    """The JSON inside <answer>; box in the model's coordinates of the image with that number."""
    return f'{{"image": {image}, "box": {format_box(box)}}}'


def format_question(sample: Sample, box_format: BoxFormat, with_instruction: bool = True) -> str:
    """The question with its reference box, in the model's coordinates, its options, and the
    instruction; a question of LESSONS has none.
    """
    text = sample.question
    if sample.reference:
        box = to_model_box(sample.reference, sample.sizes[0], box_format)
        text = text.replace("{ref}", format_box(box))
    text += "".join(f" {letter}. {option}" for letter, option in zip(LETTERS, sample.options))
    if not with_instruction or sample.suite == LESSONS:
        return text
    return f"{text} {CHOICE_INSTRUCTION if sample.options else GROUNDING_INSTRUCTION}"


def chat_messages(sample: Sample, box_format: BoxFormat) -> list[dict]:
    """The conversational prompt: every image under its number, in order, then the question."""
    content = []
    for number in range(1, len(sample.images) + 1):
        content += [{"type": "text", "text": f"Image {number}: "}, {"type": "image"}]
    content.append({"type": "text", "text": format_question(sample, box_format)})
    return [{"role": "user", "content": content}]


def parse_reply(text: str) -> Reply:
    """Read a reply; never raises.

    An answer that names several boxes, or two <answer> blocks, counts as none.
    """
    thinking = re.search(r"<think>(.*?)</think>", text, re.DOTALL)
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    image, box, letter = None, None, ""
    if len(answers) == 1:
        image, box = _parse_box(answers[0])
        letter = _parse_letter(answers[0])
    is_clean = _has_two_blocks(text)
    has_answer = box is not None or letter != ""
    names_none = is_clean and not letter and not re.search(r"\d", answers[0])
    return Reply(thinking.group(1).strip() if thinking else "", image, box, letter,
                 well_formed=is_clean and has_answer, names_none=names_none)


def _has_two_blocks(text: str) -> bool:
    """Whether the text is one <think> and one <answer> block and nothing else."""
    blocks = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    return (text.count("<think>") == text.count("<answer>") == 1
            and re.fullmatch(blocks, text, re.DOTALL) is not None)


def _parse_letter(answer: str) -> str:
    match = re.fullmatch(rf"\s*\(?([{LETTERS}])\)?\.?\s*", answer)
    return match.group(1) if match else ""


def _parse_box(answer: str) -> tuple[int | None, Box | None]:
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError):
        return None, None
    if not isinstance(data, dict):
        return None, None
    image, box = data.get("image"), data.get("box")
    if not isinstance(image, int) or isinstance(image, bool):
        return None, None
    if not isinstance(box, list) or len(box) != 4:
        return image, None
    if not all(type(value) in (int, float) and _is_coordinate(value) for value in box):
        return image, None
    return image, tuple(float(value) for value in box)


def _is_coordinate(value: float) -> bool:
    return -LARGEST < value < LARGEST and math.isfinite(value)


def cut_reasoning(reply: str) -> str:
    """The reply from its <answer> block on; all of it where it has none."""
    return reply[max(0, reply.find("<answer>")):]


def reply_box_in_original(sample: Sample, reply: Reply, box_format: BoxFormat) -> Box | None:
    """The reply's box in pixels of the original of the image that it names.

    None without a box, or where the sample has no such image.
    """
    if reply.box is None or reply.image is None or not 1 <= reply.image <= len(sample.images):
        return None
    return to_original_box(reply.box, sample.sizes[reply.image - 1], box_format)
