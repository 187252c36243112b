"""What a model teacher is asked; edit RULES to try another prompt. The wording is ours.

As in MG-Thinker (section 3.2, appendix B), the teacher must not reveal the verified answer it gets.
"""

from PIL import Image

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.image_files import to_data_url
from mig_kit.prompts import (
    ALL_INSTRUCTION,
    CHOICE_INSTRUCTION,
    GROUNDING_INSTRUCTION,
    correct_answers,
    format_question,
    image_label,
)
from mig_kit.sample import Sample

KINDS = ("trace", "direct")
RULES = ("Inside <think>, reason from what is visible, step by step: note what is characteristic "
         "of what is asked for, go through the images one by one, say what they share and where "
         "they differ, rule out what is only alike, and come to the conclusion last. Do not write "
         "coordinates there, and do not mention that an answer was given to you. Boxes are in "
         "{coordinates}.")
COORDINATES_IN_RULES = {
    "absolute": "pixels of the images as you see them",
    "normalized_1000": "thousandths of an image's width and height",
}
DIRECT_INSTRUCTION = ('Do not reason. Reply with nothing but '
                      '<answer>{"image": number, "box": [x1,y1,x2,y2]}</answer>.')
DIRECT_CHOICE_INSTRUCTION = "Do not reason. Reply with nothing but the letter in <answer></answer>."


def teacher_prompt(sample: Sample, kind: str, box_format: BoxFormat) -> str:
    """The text after the images; kind: "trace", or "direct": no truth, no request to think."""
    question = format_question(sample, box_format)
    if kind == "direct":
        if sample.find_all:
            more = ALL_INSTRUCTION.removeprefix(GROUNDING_INSTRUCTION)
            return question.removesuffix(ALL_INSTRUCTION) + DIRECT_INSTRUCTION + more
        question = question.removesuffix(CHOICE_INSTRUCTION).removesuffix(GROUNDING_INSTRUCTION)
        return question + (DIRECT_CHOICE_INSTRUCTION if sample.options else DIRECT_INSTRUCTION)
    truth = " or ".join(correct_answers(sample, box_format))
    rules = RULES.format(coordinates=COORDINATES_IN_RULES[box_format.coordinates])
    return ("You are an expert at reading several images together.\n\n"
            f"Question: {question}\n\n{rules}\n\n"
            "Only to check your conclusion, and never to be mentioned: "
            f"the verified answer is {truth}.")


def teacher_messages(sample: Sample, kind: str, box_format: BoxFormat) -> list[dict]:
    """The chat in OpenAI's form: numbered images with their sizes, as JPEG, then the text."""
    content: list[dict] = []
    for number, image in enumerate(sample.images, 1):
        size = seen_size(image.size, box_format)
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        url = to_data_url(resized, "JPEG", quality=95, subsampling=0)
        content += [{"type": "text", "text": image_label(number, size)},
                    {"type": "image_url", "image_url": {"url": url}}]
    content.append({"type": "text", "text": teacher_prompt(sample, kind, box_format)})
    return [{"role": "user", "content": content}]
