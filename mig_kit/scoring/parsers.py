"""Boxes and letters read from any model's free text: the first half of scoring.

Two kinds of rule live here and never mix. The official ones repeat what a benchmark's authors do, quirks included, so that
numbers compare with published ones. The strict ones ask for what the question asks for: one answer, in one place.
All functions are pure and take any string; none raises.
"""

import math
import re
from dataclasses import dataclass

from mig_kit.boxes import Box

_REAL = r"(\d+\.\d+)"


MIG_BENCH_PATTERNS = tuple(re.compile(p) for p in (
    r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)",
    rf"\[{_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\]",
    rf"\({_REAL},{_REAL}\),\({_REAL},{_REAL}\)",
    rf"\({_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\)",
    r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]",
    r"<box>(\d+)\s+(\d+)\s+(\d+)\s+(\d+)</box>"))


_PAIR = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")


def _matches(text: str) -> list[tuple[str, ...]]:
    """All matches of the first MIG-Bench pattern that matches anything; four digit strings each."""
    return next((found for found in (pattern.findall(text) for pattern in MIG_BENCH_PATTERNS) if found), [])


def parse_mig_bench_box(text: str) -> Box | None:
    """The box that Migician's script scores, xyxy in its 0..1 frame; None where it finds none.

    Six patterns over the whole reply, thinking included; the first that matches anything wins, and of its matches the first
    box counts. A lone match divides every value >= 1 by 1000, several matches every value > 1: a literal 1 differs. Values are
    not checked: pixels are silently taken for thousandths. Source: thunlp/Migician, eval/utils.py, extract_bbox.
    """
    found = _matches(text)
    if not found:
        return None
    values = [float(digits) for digits in found[0]]
    if len(found) == 1:
        return tuple(v / 1000 if v >= 1 else v for v in values)
    return tuple(v / 1000 if v > 1 else v for v in values)


def parse_revised_mig_bench_box(text: str) -> Box | None:
    """The box that UniVG-R1's script scores on the revised MIG-Bench, xyxy in its 0..1000 frame; None where it finds none.

    Migician's patterns, but values must be whole numbers: a reply whose first box has a decimal point scores nothing.
    Source: AMAP-ML/UniVG-R1, eval/MIG_bench/utils.py, extract_bbox.
    """
    found = _matches(text)
    if not found or any("." in digits or len(digits) > 300 for digits in found[0]):
        return None
    return tuple(float(digits) for digits in found[0])


def parse_normalized_pair(text: str) -> Box | None:
    """The first "(x1,y1),(x2,y2)" of whole numbers, divided by 1000; None without one.

    White space is allowed everywhere. Source: AMAP-ML/UniVG-R1, eval/zero_shot (its LISA and ReVOS scripts).
    """
    found = _PAIR.search(text)
    if found is None or any(len(digits) > 300 for digits in found.groups()):
        return None
    return tuple(int(digits) / 1000 for digits in found.groups())


@dataclass(frozen=True)
class StrictAnswer:
    """What the last <answer> block says. image: number from 1, or None; box: xyxy as written, or None; problem: why no box."""

    image: int | None
    box: Box | None
    problem: str = ""


_NUMBER = r"[-+]?\d+(?:\.\d+)?"


_FOUR = r"\s*,\s*".join(rf"({_NUMBER})" for _ in range(4))


_BOXES = re.compile(
    rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)\s*,?\s*\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
    rf"|\[\s*{_FOUR}\s*\]|\(\s*{_FOUR}\s*\)|<box>\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*</box>")


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


_NOUN = "(?:image|img|picture|photo|frame)"


_IMAGE = re.compile(rf"(?<![a-z]){_NOUN}[\s_-]*(?:index|idx|number|no\.?|id)?[\s\"':#=*-]*(?:(\d{{1,3}})\b|\((\d{{1,3}})\))"
                    rf"|\b(\d{{1,3}})(?:st|nd|rd|th)\s+{_NOUN}\b|\b({'|'.join(ORDINALS)})\s+{_NOUN}\b", re.IGNORECASE)


def last_answer_block(text: str) -> str | None:
    """The inside of the last closed <answer> block; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>"):end] if start >= 0 else None


def find_image_numbers(text: str) -> set[int]:
    """Numbers (from 1) of all images a text names: "image 3", "Picture (3)", "3rd image", "third photo", {"target_image": 3}."""
    return {int(number) if (number := a or b or c) else ORDINALS.index(word.lower()) + 1 for a, b, c, word in _IMAGE.findall(text)}


def parse_strict_answer(text: str) -> StrictAnswer:
    """The one box of the last <answer> block, and the image it names; several boxes or several images count as none.

    Boxes may be written "(x1,y1),(x2,y2)", "[x1,y1,x2,y2]", "(x1,y1,x2,y2)" or "<box>x1 y1 x2 y2</box>", alone or in JSON.
    """
    block = last_answer_block(text)
    if block is None:
        return StrictAnswer(None, None, "no <answer> block")
    images = find_image_numbers(block)
    if len(images) > 1:
        return StrictAnswer(None, None, "several images")
    image = next(iter(images), None)
    found = [tuple(float(v) for v in match if v) for match in _BOXES.findall(block)]
    if len(found) != 1:
        return StrictAnswer(image, None, "several boxes" if found else "no box")
    x1, y1, x2, y2 = found[0]
    if not (all(math.isfinite(v) for v in found[0]) and x1 < x2 and y1 < y2):
        return StrictAnswer(image, None, "not a box: needs x1 < x2 and y1 < y2")
    return StrictAnswer(image, found[0])


_ALONE = re.compile(r"\W*([A-Za-z])\W*")


_LABEL = r"(?:[Pp]oints?|[Bb]ox(?:es)?|[Oo]ptions?|[Pp]ictures?|[Ii]mages?|[Cc]hoices?|[Cc]ircles?|[Aa]nswers?(?: is|:)?)"


_VERB = r"(?:is|has|was|does|seems|appears|looks|more|and|or|in|on|to|corresponds|matches)"


_NAMED = re.compile(
    r"\(([A-Z])\)"
    rf"|\b{_LABEL}\s+\"?([A-Z])\b"
    rf"|(?<![\w'$\\.])A(?=\s+{_VERB}\b|\s*[),:;.\"]|\s*$)"
    r"|(?<![\w'$\\.])([B-H])(?![\w'$]|\.\w)")


_CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence|in conclusion|based on (?:these|this|the (?:analysis|criteria))|answer(?: is|:)"
    r"|(?:correct|best|final|right|appropriate) (?:corresponding )?(?:answer|choice|option|point)"
    r"|(?:I|we)(?:'d| would| will| can| might)? (?:choose|select|pick|go with|say|conclude|lean|suggest))\b", re.IGNORECASE)


_PICKS = re.compile(
    r"\b(?:closer|nearer|more accurate(?:ly)?|darker|higher|best|better|stands out|most (?:likely|similar|appropriate)"
    r"|correspond(?:s|ing)?|match(?:es)?|shares)\b", re.IGNORECASE)


_REFUSES = re.compile(
    r"\b(?:none|neither|cannot|can't|unable|impossible|no (?:clear|direct|correct)|not (?:possible|enough|sufficient))\b",
    re.IGNORECASE)


_NEGATES = re.compile(r"\b(?:not|less|none|neither|cannot|nor)\b|n't\b", re.IGNORECASE)


_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


_INTRODUCED = re.compile(r":\s*\n\s*\(([A-H])\)[^\n]*(?:\n+(?!\s*\([A-H]\))|$)")


_OPTION_LINE = re.compile(r"[\s*-]*\(?([A-H])\)")


def find_option_letters(text: str, valid: str = "ABCDEFGH") -> list[str]:
    """Every naming of an option in order: "(B)", "Point B", "B" by itself; an article "A" is no option."""
    found = [next((g for g in match.groups() if g), "A") for match in _NAMED.finditer(text)]
    return [letter for letter in found if letter in valid]


def parse_blink_letter(text: str, valid: str) -> str:
    """The only "(B)" that stands by itself among white space, or the only one of the last paragraph; "" where that decides nothing.

    Source: zeyofu/BLINK_Benchmark, eval/test_benchmark.py, analyze_answer, which then asks another model.
    """
    every, last = ({letter for letter in valid if f"({letter})" in part.split()} for part in (text, text.split("\n\n")[-1]))
    return next((found.pop() for found in (every, last) if len(found) == 1), "")


def parse_choice_letter(text: str, valid: str = "ABCDEFGH") -> str:
    """The option a free text settles on, one letter of `valid`, or "" where it names none or several without choosing.

    Of an <answer> block only the last one is read, else what follows the last </think>. In order: a lone letter; the only
    option named; an option alone in the last or first line, or after a colon; what follows the last conclusion ("therefore", "the
    answer is"); the first sentence that prefers one ("A is closer to the camera than B"). The rules are ours, for where BLINK's
    and MMIU's authors ask another model.
    """
    block = last_answer_block(text)
    text = re.sub(r"</?s>", " ", text.rpartition("</think>")[2] if block is None else block)
    alone = _ALONE.fullmatch(text)
    if alone:
        return alone.group(1).upper() if alone.group(1).upper() in valid else ""
    named = find_option_letters(text, valid)
    if not named:
        return ""
    if len(set(named)) == 1:
        return named[0]
    sentences = [s for s in _SENTENCE.split(text) if s.strip(" \n*-.")]
    last = find_option_letters(sentences[-1], valid)
    if _OPTION_LINE.match(sentences[-1]) and len(set(last)) == 1 and not _lists_options(text, valid):
        return last[0]
    opening = _OPTION_LINE.match(sentences[0]) and set(find_option_letters(sentences[0], valid))
    if opening and len(opening) == 1 and len(sentences) > 1 and not _OPTION_LINE.match(sentences[1]) and "\n" in text.strip():
        return opening.pop()
    introduced = [x for x in _INTRODUCED.findall(text) if x in valid]
    if introduced:
        return introduced[-1]
    for cue in reversed(list(_CONCLUSION.finditer(text))):
        tail = text[cue.start():]
        said = next((s for s in _SENTENCE.split(tail) if 1 <= len(set(find_option_letters(s, valid))) <= 2), "")
        if said:
            return "" if _REFUSES.search(said) or _lists_options(tail, valid) else _preferred(said, valid)
    picks = [s for s in sentences if _PICKS.search(s) and not _NEGATES.search(s) and 1 <= len(set(find_option_letters(s, valid))) <= 2]
    return _preferred(picks[0], valid) if picks else ""


def _preferred(sentence: str, valid: str) -> str:
    """The option a sentence prefers: the first in brackets, else the first; none of "B or D" and "A and C"."""
    letters = [x for x in re.findall(r"\(([A-H])\)", sentence) if x in valid] or find_option_letters(sentence, valid)
    joined = re.search(r"\(?\b([A-H])\b\)?(?: the \w+ image| Point [A-H])?,?\s+(?:or|and)\s+(?:\w+\s+)?\(?([A-H])\b", sentence)
    return "" if joined and joined.group(1) == letters[0] and joined.group(2) in valid else letters[0]


def _lists_options(text: str, valid: str) -> bool:
    """Whether the text ends in all options again, one a line, which chooses none."""
    lines = [line for line in text.splitlines() if line.strip()][-len(valid):]
    heads = [_OPTION_LINE.match(line) for line in lines]
    return all(heads) and len({head.group(1) for head in heads if head}) == len(valid)


def contains_truth(text: str, truth: str) -> bool:
    """Whether the truth occurs anywhere in the text, the lax rule of Migician's multiple-choice scoring.

    Source: thunlp/Migician, eval/utils.py, calculate: white space, then dots, stripped from the truth; case counts.
    """
    return truth.strip().strip(".") in text
