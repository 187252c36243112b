"""Stage 01, filter of a real teacher's traces: after synthesize.verdict, what MG-Thinker asks for on top (its section 3.2).

Traces that conclude up front or reveal the answer are dropped, and so are those that gain nothing over a direct answer.
MG-Thinker publishes these criteria but not its text rules; the patterns here are ours.
"""

import re

from mig_kit import synthesize
from mig_kit.frames import QWEN2_5, View, iou, rescale, to_model
from mig_kit.prompts import parse
from mig_kit.records import Sample
from mig_kit.rewards import box_reward
from mig_kit.teacher import Trace

CONCLUDES = re.compile(
    r"\b(?:answer|target|object asked for|box)\b[^.]{0,60}\b(?:is|are|lies|sits)\b[^.]{0,60}"
    r"(?:\bimage\s*#?\d|\b(?:first|second|third|fourth|fifth|sixth|last)\s+image\b|[(\[]\s*\d)"
    r"|^\W*(?:therefore|thus|hence|in conclusion)\b|\b(?:the|final|correct)\s+answer\s+is\b", re.IGNORECASE)
GIVEN = re.compile(
    r"\b(?:ground[\s-]?truth|(?:verified|given|provided|supplied|reference) answer|answer (?:was |is )?(?:given|provided))\b",
    re.IGNORECASE)
NUMBER = re.compile(r"(?<![A-Za-z0-9.])[0-9]{1,5}(?:\.[0-9]{1,6})?(?![0-9])")
BETWEEN = re.compile(r"[^A-Za-z0-9]{1,6}(?:(?:[xy][12]?|left|top|right|bottom)[^A-Za-z0-9]{0,6})?", re.IGNORECASE)


def up_front(thinking: str) -> bool:
    """True if the first sentence already concludes: names the answer, or says in which image it is."""
    return bool(CONCLUDES.search(re.split(r"(?<=[.!?])\s|\n", thinking.strip(), maxsplit=1)[0]))


def reveals(thinking: str, sample: Sample, view: View = QWEN2_5) -> bool:
    """True if the thinking mentions that an answer was given, or writes four numbers that meet a target with IoU >= 0.5.

    synthesize.leaks reads whole numbers in square brackets in the student's frame; a real teacher also writes pairs in
    parentheses, decimals, and boxes in 0-1, in 0-1000 or in pixels of the original.
    """
    if GIVEN.search(thinking):
        return True
    found = list(NUMBER.finditer(thinking))
    for four in zip(found, found[1:], found[2:], found[3:]):
        if not all(BETWEEN.fullmatch(thinking, a.end(), b.start()) for a, b in zip(four, four[1:])):
            continue
        box = tuple(float(m.group()) for m in four)
        for n, target in sample.targets:
            size = sample.sizes[n - 1]
            frames = (target, to_model(target, size, view), rescale(target, size, (1000, 1000)), rescale(target, size, (1, 1)))
            if any(iou(box, framed) >= 0.5 for framed in frames):
                return True
    return False


def gained(direct: float, reasoned: float) -> bool:
    """True if reasoning paid, both IoU in the right image: right stays right with 0.1 more, wrong becomes right or gains 0.2.

    MG-Thinker's rule, right being IoU >= 0.5. It says "10 %" and "20 %"; read here as points of IoU.
    """
    if direct >= 0.5:
        return reasoned - direct >= 0.1 - 1e-9
    return reasoned >= 0.5 or reasoned - direct >= 0.2 - 1e-9


def verdict(trace: Trace, direct: str, sample: Sample, view: View = QWEN2_5) -> str:
    """"" if the trace may teach, else why not: synthesize.verdict's reasons, "no reply", "up front", "reveals" or "no gain".

    trace, direct: the two replies of endpoint.traces. The reasoned IoU is that of the trace's own answer, written with the
    truth at hand; whether MG-Thinker asks once more without it is not published. Multiple choice has no IoU: no gain needed.
    """
    if trace.error:
        return "no reply"
    if reason := synthesize.verdict(trace.text, sample, view):
        return reason
    thinking = parse(trace.text).thinking
    if up_front(thinking):
        return "up front"
    if reveals(thinking, sample, view):
        return "reveals"
    if sample.options:
        return ""
    if not direct:
        return "no reply"
    return "" if gained(box_reward(direct, sample, 0.0, view), box_reward(trace.text, sample, 0.0, view)) else "no gain"
