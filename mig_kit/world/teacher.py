"""The tiny profile's teacher: writes chain-of-thought traces from the scene graph, with errors.

Some traces list the evidence, some give only the finding, some only the method. A small student
cannot follow the last two: too many cost it skills, and RL finds out which it can use.
"""

import random

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, to_model_box
from mig_kit.prompts import LETTERS, Answer, format_answer, format_box
from mig_kit.sample import Sample, Trace
from mig_kit.world.scenes import CELL

# The first words of a finding -> the method that leads to it. Samples read back from a file hold
# the finding as text only. A finding that starts with a name ("red star: image 2") has none here.
METHOD = {"new": "Compare.", "in all": "List.", "the same": "Track.", "the part": "Search.",
          "same colour": "Associate.", "same shape": "Associate.", "things": "List."}
DEFAULT_METHOD = "Find."
DETAILS = ("evidence", "finding", "method")
NO_REASONING = "none"
ERRORS = ("wrong object", "wrong image", "sloppy box", "leaked answer", "broken format")


def write_reasoning(sample: Sample, detail: str) -> str:
    """The reasoning at one level of DETAILS; each begins with the method's name."""
    parts = [METHOD.get(sample.finding.partition(":")[0], DEFAULT_METHOD)]
    if detail == "evidence":
        parts += sample.notes
    if detail != "method":
        parts.append(sample.finding)
    return " ".join(parts)


def recognize_detail(answer: Answer) -> str:
    """The one of DETAILS at which a reply reasons, by its number of statements ("name: value");
    NO_REASONING for a reply without a closed block of reasoning.

    "method" has no statement, "finding" one, "evidence" several.
    """
    if not answer.thinking:
        return NO_REASONING
    return ("method", "finding", "evidence")[min(answer.thinking.count(": "), 2)]


def write_trace(sample: Sample, rng: random.Random, box_format: BoxFormat,
                mix: tuple[float, float, float] = (1, 1, 1), error_rate: float = 0.2,
                jitter: float = 0.7) -> Trace:
    """Write one trace of a sample, at a random detail and with some errors.

    Args:
        mix: weights of DETAILS.
        error_rate: share of traces with one of ERRORS.
        jitter: standard deviation of box edges, pixels as the model sees them; 5x if "sloppy box".
    """
    detail = rng.choices(DETAILS, mix)[0]
    error = rng.choice(ERRORS) if rng.random() < error_rate else ""
    thought = write_reasoning(sample, detail)
    if sample.options:
        return _write_choice_trace(sample, rng, detail, error, thought)
    image, target_box = sample.targets[0]
    if error == "wrong image":
        others = [number for number in range(1, len(sample.images) + 1) if number != image]
        image = rng.choice(others or [image + 1])
    size = sample.sizes[min(image, len(sample.sizes)) - 1]
    box = _misplace_box(target_box, size, rng, box_format, error, jitter)
    if error == "leaked answer":
        thought = f"{thought} {format_box(box)}"
    return _write_reply(rng, thought, format_answer(image, box), detail, error)


def _write_reply(rng: random.Random, thought: str, answer: str, detail: str, error: str) -> Trace:
    """The trace with its tags, of which a "broken format" lacks some."""
    if error == "broken format":
        text = rng.choice([f"{thought} <answer>{answer}</answer>",
                           f"<think>{thought}</think>{answer}",
                           f"<think>{thought}</think><answer>{answer}"])
        return Trace(text, detail, error)
    return Trace(f"<think>{thought}</think><answer>{answer}</answer>", detail, error)


def _pixel_of(size: tuple[int, int], box_format: BoxFormat) -> tuple[float, float]:
    """(width, height), in the model's coordinates, of a pixel of the image as the model sees it."""
    width, height = coordinate_size(size, box_format.coordinates, box_format)
    seen_width, seen_height = coordinate_size(size, Coordinates.ABSOLUTE, box_format)
    return width / seen_width, height / seen_height


def _misplace_box(box: Box, size: tuple[int, int], rng: random.Random, box_format: BoxFormat,
                  error: str, jitter: float) -> Box:
    """The box in the model's coordinates with jittered edges, a cell away for a "wrong object"."""
    box, pixel = to_model_box(box, size, box_format), _pixel_of(size, box_format)
    if error == "wrong object":
        shift = rng.choice((-1, 1)) * CELL
        box = tuple(max(0.0, value + shift * step) for value, step in zip(box, pixel * 2))
    std = jitter * (5 if error == "sloppy box" else 1)
    return tuple(max(0.0, value + rng.gauss(0, std) * step) for value, step in zip(box, pixel * 2))


def _write_choice_trace(sample: Sample, rng: random.Random, detail: str, error: str,
                        thought: str) -> Trace:
    """A trace that answers with a letter; errors about objects and boxes become "wrong choice"."""
    letter = sample.letter
    if error in ("wrong object", "wrong image", "sloppy box"):
        error = "wrong choice"
        letters = LETTERS[:len(sample.options)]
        letter = rng.choice([other for other in letters if other != sample.letter])
    if error == "leaked answer":
        thought = f"{letter}. {thought}"
    return _write_reply(rng, thought, letter, detail, error)
