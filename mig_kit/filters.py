"""Stage 01, filter of a real teacher's traces: after synthesize.verdict, what MG-Thinker asks for on top (its section 3.2).

Traces that conclude up front or reveal the answer are dropped, and so are those that gain nothing over a direct answer.
MG-Thinker publishes these criteria but not its text rules; the patterns here are ours.
"""

import re

from mig_kit.boxes import QWEN2_5, BoxFormat, iou, rescale_box, to_model_box
from mig_kit.prompts import parse_reply, reply_box_in_original
from mig_kit.rewards import box_reward
from mig_kit.sample import Sample, Trace, best_iou

DROP_REASONS = ("format", "image", "box", "choice", "leak")


CONCLUDES = re.compile(
    r"\b(?:answer|target|object asked for|box)\b[^.]{0,60}\b(?:is|are|lies|sits)\b[^.]{0,60}"
    r"(?:\bimage\s*#?\d|\b(?:first|second|third|fourth|fifth|sixth|last)\s+image\b|[(\[]\s*\d)"
    r"|^\W*(?:therefore|thus|hence|in conclusion)\b|\b(?:the|final|correct)\s+answer\s+is\b", re.IGNORECASE)


MENTIONS_GIVEN_ANSWER = re.compile(
    r"\b(?:ground[\s-]?truth|(?:verified|given|provided|supplied|reference) answer|answer (?:was |is )?(?:given|provided))\b",
    re.IGNORECASE)


NUMBER = re.compile(r"(?<![A-Za-z0-9.])[0-9]{1,5}(?:\.[0-9]{1,6})?(?![0-9])")


BETWEEN = re.compile(r"[^A-Za-z0-9]{1,6}(?:(?:[xy][12]?|left|top|right|bottom)[^A-Za-z0-9]{0,6})?", re.IGNORECASE)


def concludes_up_front(thinking: str) -> bool:
    """True if the first sentence already concludes: names the answer, or says in which image it is."""
    return bool(CONCLUDES.search(re.split(r"(?<=[.!?])\s|\n", thinking.strip(), maxsplit=1)[0]))


def reveals_answer(thinking: str, sample: Sample, box_format: BoxFormat = QWEN2_5) -> bool:
    """True if the thinking mentions that an answer was given, or writes four numbers that meet a target with IoU >= 0.5.

    synthesize.leaks reads whole numbers in square brackets in the student's frame; a real teacher also writes pairs in
    parentheses, decimals, and boxes in 0-1, in 0-1000 or in pixels of the original.
    """
    if MENTIONS_GIVEN_ANSWER.search(thinking):
        return True
    found = list(NUMBER.finditer(thinking))
    for four in zip(found, found[1:], found[2:], found[3:]):
        if not all(BETWEEN.fullmatch(thinking, a.end(), b.start()) for a, b in zip(four, four[1:])):
            continue
        box = tuple(float(m.group()) for m in four)
        for n, target in sample.targets:
            size = sample.sizes[n - 1]
            frames = (target, to_model_box(target, size, box_format), rescale_box(target, size, (1000, 1000)), rescale_box(target, size, (1, 1)))
            if any(iou(box, framed) >= 0.5 for framed in frames):
                return True
    return False


def reasoning_helps(direct: float, reasoned: float) -> bool:
    """True if reasoning paid, both IoU in the right image: right stays right with 0.1 more, wrong becomes right or gains 0.2.

    MG-Thinker's rule, right being IoU >= 0.5. It says "10 %" and "20 %"; read here as points of IoU.
    """
    if direct >= 0.5:
        return reasoned - direct >= 0.1 - 1e-9
    return reasoned >= 0.5 or reasoned - direct >= 0.2 - 1e-9


def drop_reason_of_model_teacher(trace: Trace, direct: str, sample: Sample, box_format: BoxFormat = QWEN2_5) -> str:
    """"" if the trace may teach, else why not: synthesize.verdict's reasons, "no reply", "up front", "reveals" or "no gain".

    trace, direct: the two replies of endpoint.traces. The reasoned IoU is that of the trace's own answer, written with the
    truth at hand; whether MG-Thinker asks once more without it is not published. Multiple choice has no IoU: no gain needed.
    """
    if trace.error:
        return "no reply"
    if reason := drop_reason(trace.text, sample, box_format):
        return reason
    thinking = parse_reply(trace.text).thinking
    if concludes_up_front(thinking):
        return "up front"
    if reveals_answer(thinking, sample, box_format):
        return "reveals"
    if sample.options:
        return ""
    if not direct:
        return "no reply"
    return "" if reasoning_helps(box_reward(direct, sample, 0.0, box_format), box_reward(trace.text, sample, 0.0, box_format)) else "no gain"


def contains_target_box(thinking: str, sample: Sample, box_format: BoxFormat) -> bool:
    """True if a box written in the thinking meets a target with IoU >= 0.5 (pixels of the resized target image)."""
    for found in re.findall(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]", thinking):
        box = tuple(float(v) for v in found)
        if any(iou(box, to_model_box(target, sample.sizes[n - 1], box_format)) >= 0.5 for n, target in sample.targets):
            return True
    return False


def drop_reason(reply: str, sample: Sample, box_format: BoxFormat = QWEN2_5, threshold: float = 0.5) -> str:
    """"" if the reply may teach, else the first of REASONS that speaks against it."""
    read = parse_reply(reply)
    if not read.well_formed or (not read.letter if sample.options else read.box is None):
        return "format"
    if sample.options:
        leak = re.search(r"(?:^|\s)\(?[A-H][.)](?:\s|$)", read.thinking)
        return "choice" if read.letter != sample.letter else "leak" if leak else ""
    if read.image not in {n for n, _ in sample.targets}:
        return "image"
    if best_iou(sample, read.image, reply_box_in_original(sample, read, box_format)) < threshold:
        return "box"
    return "leak" if contains_target_box(read.thinking, sample, box_format) else ""
