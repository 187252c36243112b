"""Boxes read from any model's free text as the benchmarks' authors read them, quirks included, so
that numbers compare with published ones.

The strict rules, which ask for one answer in one place, are in `strict_parsers.py` (boxes) and
`image_names.py` (which image is named), letters in `choice_parsers.py`. All functions are pure and
take any string; none raises.
"""

import re

from mig_kit.boxes import Box

# Boxes as the authors' scripts read them.
_REAL = r"(\d+\.\d+)"
MIG_BENCH_PATTERNS = (
    re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"),
    re.compile(rf"\[{_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\]"),
    re.compile(rf"\({_REAL},{_REAL}\),\({_REAL},{_REAL}\)"),
    re.compile(rf"\({_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\)"),
    re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]"),
    re.compile(r"<box>(\d+)\s+(\d+)\s+(\d+)\s+(\d+)</box>"),
)
_WHOLE_PAIR = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_MAX_DIGITS = 300  # a number of more digits is none that a float can hold

_HIDDEN = re.compile(r"<(think|tool_call)>.*?(?:</\1>|\Z)", re.DOTALL)
TOOL_CALL = re.compile(r"<tool_call>.*?(?:</tool_call>|\Z)", re.DOTALL)


def _matches(text: str) -> list[tuple[str, ...]]:
    """All matches of the first MIG-Bench pattern that matches anything; four digit strings each."""
    for pattern in MIG_BENCH_PATTERNS:
        if matches := pattern.findall(text):
            return matches
    return []


def parse_mig_bench_box(text: str) -> Box | None:
    """The box that Migician's script scores, xyxy in 0..1; None where it reads none.

    Six patterns over the whole reply, thinking included; the first that matches anything wins, and
    of its matches the first box counts. A lone match divides every value >= 1 by 1000, several
    matches every value > 1: a literal 1 differs. Values are not checked: pixels are silently taken
    for 0..1000. Source: thunlp/Migician, eval/utils.py, extract_bbox.
    """
    matches = _matches(text)
    if not matches:
        return None
    values = [float(digits) for digits in matches[0]]
    if len(matches) == 1:
        return tuple(v / 1000 if v >= 1 else v for v in values)
    return tuple(v / 1000 if v > 1 else v for v in values)


def parse_revised_mig_bench_box(text: str) -> Box | None:
    """The box that UniVG-R1's script scores on the revised MIG-Bench, xyxy in 0..1000, or None.

    Migician's patterns, but values must be whole numbers: a reply whose first box has a decimal
    point scores nothing. Source: AMAP-ML/UniVG-R1, eval/MIG_bench/utils.py, extract_bbox.
    """
    matches = _matches(text)
    if not matches or any("." in digits or len(digits) > _MAX_DIGITS for digits in matches[0]):
        return None
    return tuple(float(digits) for digits in matches[0])


def parse_normalized_pair(text: str) -> Box | None:
    """The first "(x1,y1),(x2,y2)" of whole numbers, divided by 1000; None without one.

    White space is allowed everywhere. Source: AMAP-ML/UniVG-R1, eval/zero_shot (its LISA and ReVOS
    scripts).
    """
    match = _WHOLE_PAIR.search(text)
    if match is None or any(len(digits) > _MAX_DIGITS for digits in match.groups()):
        return None
    return tuple(int(digits) / 1000 for digits in match.groups())


def shown_text(text: str) -> str:
    """The text without its <think> and <tool_call> blocks, from the last </think> on."""
    return _HIDDEN.sub(" ", text).rpartition("</think>")[2]


def last_answer_block(text: str) -> str | None:
    """The inside of the last closed <answer> block that is no part of a <think> or <tool_call>
    block; None without one.
    """
    text = shown_text(text)
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>"):end] if start >= 0 else None


def contains_truth(text: str, truth: str) -> bool:
    """Whether the truth occurs anywhere in the text, the lax rule of Migician's multiple choice.

    Source: thunlp/Migician, eval/utils.py, calculate: white space, then dots, stripped from the
    truth; case counts.
    """
    return truth.strip().strip(".") in text
