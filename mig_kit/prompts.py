"""Prompts and answers: how a sample is put to the model, and how its reply is read.

Parameter `prompt` of 01 puts other words around a question. The reply format is MG-Thinker's:
reasoning in `<think>`, then one JSON object in `<answer>`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mig_kit.boxes import Box, BoxFormat, to_model_box, to_original_box
from mig_kit.sample import Sample

GROUNDING_INSTRUCTION = ('Think in <think></think>, then answer '
                         '<answer>{"image": number, "box": [x1,y1,x2,y2]}</answer>.')
CHOICE_INSTRUCTION = ("Think in <think></think>, then answer with the letter in "
                      "<answer></answer>.")
NO_BOX = '{"image": 0}'  # also says that nothing in the images answers
LETTERS = "ABCDEFGH"
LARGEST = 1e6  # a coordinate beyond it is no coordinate


@dataclass(frozen=True)
class Answer:
    """A model's reply, read; image, box and letter are empty if it has none.

    Args:
        text: the whole reply. thinking: what its `<think>` block holds.
        image: number of the image, from 1; the sample may have fewer images.
        box: xyxy, pixels of that original (`parse_reply`: as it is written); None without one.
        has_box: it gives a box, be it in an image that the sample does not have.
        well_formed: it is one `<think>` and one `<answer>` block with one answer, nothing else.
        names_none: likewise, but the answer has no digit and is no option's letter, or is NO_BOX.
    """

    text: str
    thinking: str
    image: int | None
    box: Box | None
    has_box: bool
    letter: str
    well_formed: bool
    names_none: bool

    def states(self, options: Sequence[str]) -> bool:
        """Whether it gives what a question asks for: a letter if it has options, else a box."""
        return bool(self.letter) if options else self.has_box


def format_box(box: Box) -> str:
    """A box as the model reads and writes it: whole numbers, no spaces."""
    return "[" + ",".join(str(round(value)) for value in box) + "]"


def format_answer(image: int, box: Box) -> str:
    """The JSON inside `<answer>`; box: in the model's coordinates of image number `image`."""
    return f'{{"image": {image}, "box": {format_box(box)}}}'


def correct_answers(sample: Sample, box_format: BoxFormat) -> list[str]:
    """Every correct inside of `<answer>`: the letter, or the box of each target."""
    if sample.options:
        return [sample.letter]
    return [format_answer(image, to_model_box(box, sample.sizes[image - 1], box_format))
            for image, box in sample.targets] or ["none"]


def correct_answer(sample: Sample, box_format: BoxFormat) -> str:
    """The first of `correct_answers`."""
    return correct_answers(sample, box_format)[0]


def format_question(sample: Sample, box_format: BoxFormat, with_instruction: bool = True) -> str:
    """The question with its reference box, in the model's coordinates, options and instruction."""
    text = sample.question
    if sample.reference:
        box = to_model_box(sample.reference, sample.sizes[0], box_format)
        text = text.replace("{ref}", format_box(box))
    text += "".join(f" {letter}. {option}" for letter, option in zip(LETTERS, sample.options))
    if not with_instruction:
        return text
    instruction = CHOICE_INSTRUCTION if sample.options else GROUNDING_INSTRUCTION
    return box_format.prompt.replace("{instruction}", instruction).replace("{question}", text)


def image_label(number: int, size: tuple[int, int] | None = None) -> str:
    """The text before image number `number`, from 1; size: (width, height), pixels, to be told."""
    note = f" ({size[0]} x {size[1]} pixels)" if size else ""
    return f"Image {number}{note}: "


def chat_messages(sample: Sample, box_format: BoxFormat) -> list[dict]:
    """The prompt as TRL's messages: every image's number and its place, then the question."""
    content = []
    for number in range(1, len(sample.images) + 1):
        content += [{"type": "text", "text": image_label(number)}, {"type": "image"}]
    content.append({"type": "text", "text": format_question(sample, box_format)})
    return [{"role": "user", "content": content}]


def read_reply(text: str, sample: Sample, box_format: BoxFormat) -> Answer:
    """Read a reply to a sample, its box in pixels of the original that it names."""
    answer = parse_reply(text)
    if not answer.box:
        return answer
    if not 1 <= answer.image <= len(sample.images):
        return replace(answer, box=None)
    size = sample.sizes[answer.image - 1]
    return replace(answer, box=to_original_box(answer.box, size, box_format))


def parse_reply(text: str) -> Answer:
    """Read a reply without its sample; never raises.

    Several boxes or `<answer>` blocks count as no answer.

    >>> answer = parse_reply('<think>A.</think><answer>{"image": 2, "box": [1, 2, 9, 9]}</answer>')
    >>> answer.thinking, answer.image, answer.box, answer.well_formed
    ('A.', 2, (1.0, 2.0, 9.0, 9.0), True)
    """
    thinking, answers = _find_blocks(text, "think"), _find_blocks(text, "answer")
    image, box, letter = None, None, ""
    if len(answers) == 1:
        image, box = _parse_box(answers[0])
        letter = _parse_letter(answers[0])
    is_clean = _has_two_blocks(text)
    has_answer = box is not None or letter != ""
    names_none = is_clean and not letter and (
        answers[0].strip() == NO_BOX or not re.search(r"\d", answers[0]))
    return Answer(text, thinking[0].strip() if thinking else "", image, box, box is not None,
                  letter, well_formed=is_clean and has_answer, names_none=names_none)


def _find_blocks(text: str, tag: str) -> list[str]:
    """The insides of all closed blocks of a tag; linear in the text, as a pattern would not be."""
    opening, closing, blocks = f"<{tag}>", f"</{tag}>", []
    start = text.find(opening)
    while start >= 0 and (end := text.find(closing, start)) >= 0:
        blocks.append(text[start + len(opening):end])
        start = text.find(opening, end)
    return blocks


def _has_two_blocks(text: str) -> bool:
    blocks = r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*"
    return (text.count("<think>") == text.count("<answer>") == 1
            and re.fullmatch(blocks, text, re.DOTALL) is not None)


def _parse_letter(answer: str) -> str:
    match = re.fullmatch(rf"\s*\(?([{LETTERS}])\)?\.?\s*", answer)
    return match.group(1) if match else ""


def _parse_box(answer: str) -> tuple[int | None, Box | None]:
    """(image number, box) of an answer's object; each None if missing or malformed."""
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
    if not all(type(value) in (int, float) and -LARGEST < value < LARGEST for value in box):
        return image, None
    return image, tuple(float(value) for value in box)


def cut_reasoning(reply: str) -> str:
    """The reply from its `<answer>` block on; all of it if it has none."""
    return reply[max(0, reply.find("<answer>")):]
