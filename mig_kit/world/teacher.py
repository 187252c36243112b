"""The tiny profile's teacher: writes chain-of-thought traces from the scene graph, and errs.

Like a real teacher it knows more than its student and does not say how much of its way to write down: some traces list the
evidence, some give only the finding, some name only the method. Which of them a small student can use is what reinforcement
learning has to find out. Too many of the last two, which a small student cannot follow, cost it what the base could do.
"""

import random

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import format_answer, format_box
from mig_kit.sample import Sample, Trace

METHOD = {"new": "Compare.", "in all": "List.", "the same": "Track.", "the part": "Search.", "same colour": "Associate.",
          "same shape": "Associate.", "things": "List."}  # what is to be found -> how; "red star: image 2" is a matter of "Find."


DETAILS = ("evidence", "finding", "method")


ERRORS = ("wrong object", "wrong image", "sloppy box", "leaked answer", "broken format")


def write_reasoning(sample: Sample, detail: str) -> str:
    """The reasoning at one of the three levels of DETAILS; the method's name comes first in all of them."""
    parts = [METHOD.get(sample.finding.partition(":")[0], "Find.")]
    if detail == "evidence":
        parts += sample.notes
    if detail != "method":
        parts.append(sample.finding)
    return " ".join(parts)


def write_trace(sample: Sample, rng: random.Random, box_format: BoxFormat, mix: tuple[float, float, float] = (1, 1, 1),
                error_rate: float = 0.2, jitter: float = 0.7) -> Trace:
    """One trace. mix: weights of DETAILS; error_rate: share of traces with one of ERRORS.

    jitter: standard deviation of every box edge, pixels of the resized image; a "sloppy box" has five times as much.
    """
    detail = rng.choices(DETAILS, mix)[0]
    error = rng.choice(ERRORS) if rng.random() < error_rate else ""
    thought = write_reasoning(sample, detail)
    if sample.options:
        return _write_choice_trace(sample, rng, detail, error, thought)
    number, box = sample.targets[0]
    if error == "wrong image":
        number = rng.choice([n for n in range(1, len(sample.images) + 1) if n != number] or [number + 1])
    size = sample.sizes[min(number, len(sample.sizes)) - 1]
    seen = to_model_box(box, size, box_format)
    if error == "wrong object":
        shift = rng.choice((-1, 1)) * 28
        seen = tuple(max(0.0, v + shift) for v in seen)
    spread = jitter * (5 if error == "sloppy box" else 1)
    seen = tuple(max(0.0, v + rng.gauss(0, spread)) for v in seen)
    if error == "leaked answer":
        thought = f"{thought} {format_box(seen)}"
    answer = format_answer(number, seen)
    if error == "broken format":
        return Trace(rng.choice([f"{thought} <answer>{answer}</answer>", f"<think>{thought}</think>{answer}",
                                 f"<think>{thought}</think><answer>{answer}"]), detail, error)
    return Trace(f"<think>{thought}</think><answer>{answer}</answer>", detail, error)


def _write_choice_trace(sample: Sample, rng: random.Random, detail: str, error: str, thought: str) -> Trace:
    letter = sample.letter
    if error in ("wrong object", "wrong image", "sloppy box"):
        error = "wrong choice"
        letter = rng.choice([other for other in "ABCDEFGH"[:len(sample.options)] if other != letter])
    if error == "leaked answer":
        thought = f"{letter}. {thought}"
    if error == "broken format":
        return Trace(f"{thought} <answer>{letter}</answer>", detail, error)
    return Trace(f"<think>{thought}</think><answer>{letter}</answer>", detail, error)
