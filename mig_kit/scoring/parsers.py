"""Boxes and letters read from any model's free text: the first half of scoring.

Two kinds of rule live here and never mix. The official ones repeat what a benchmark's authors do,
quirks included, so that numbers compare with published ones. The strict ones ask for what the
question asks for: one answer, in one place. All functions are pure and take any string; none
raises.
"""

import math
import re
from dataclasses import dataclass

from mig_kit.boxes import Box

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

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

# Boxes and images as the strict rule reads them.
_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_POINT = rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)"
_FOUR = r"\s*,\s*".join(rf"({_NUMBER})" for _ in range(4))
_STRICT_BOX = re.compile(
    rf"{_POINT}\s*,?\s*{_POINT}"
    rf"|\[\s*{_FOUR}\s*\]|\(\s*{_FOUR}\s*\)"
    rf"|<box>\s*({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s+({_NUMBER})\s*</box>")
_NOUN = "(?:image|img|picture|photo|frame)"
_IMAGE_NUMBER = re.compile(
    rf"(?<![a-z]){_NOUN}[\s_-]*(?:index|idx|number|no\.?|id)?[\s\"':#=*-]*"
    r"(?:(\d{1,3})\b|\((\d{1,3})\))"
    rf"|\b(\d{{1,3}})(?:st|nd|rd|th)\s+{_NOUN}\b"
    rf"|\b({'|'.join(ORDINALS)})\s+{_NOUN}\b", re.IGNORECASE)

# Letters of multiple-choice questions.
_LONE_LETTER = re.compile(r"\W*([A-Za-z])\W*")
_LABEL = (r"(?:[Pp]oints?|[Bb]ox(?:es)?|[Oo]ptions?|[Pp]ictures?|[Ii]mages?|[Cc]hoices?"
          r"|[Cc]ircles?|[Aa]nswers?(?: is|:)?)")
_VERB = r"(?:is|has|was|does|seems|appears|looks|more|and|or|in|on|to|corresponds|matches)"
_NAMED_OPTION = re.compile(
    r"\(([A-Z])\)"
    rf"|\b{_LABEL}\s+\"?([A-Z])\b"
    rf"|(?<![\w'$\\.])A(?=\s+{_VERB}\b|\s*[),:;.\"]|\s*$)"
    r"|(?<![\w'$\\.])([B-H])(?![\w'$]|\.\w)")
_CONCLUSION = re.compile(
    r"\b(?:therefore|thus|hence|in conclusion"
    r"|based on (?:these|this|the (?:analysis|criteria))|answer(?: is|:)"
    r"|(?:correct|best|final|right|appropriate) (?:corresponding )?(?:answer|choice|option|point)"
    r"|(?:I|we)(?:'d| would| will| can| might)? "
    r"(?:choose|select|pick|go with|say|conclude|lean|suggest))\b", re.IGNORECASE)
_PREFERS = re.compile(
    r"\b(?:closer|nearer|more accurate(?:ly)?|darker|higher|best|better|stands out"
    r"|most (?:likely|similar|appropriate)|correspond(?:s|ing)?|match(?:es)?|shares)\b",
    re.IGNORECASE)
_REFUSES = re.compile(
    r"\b(?:none|neither|cannot|can't|unable|impossible|no (?:clear|direct|correct)"
    r"|not (?:possible|enough|sufficient))\b", re.IGNORECASE)
_NEGATES = re.compile(r"\b(?:not|less|none|neither|cannot|nor)\b|n't\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_AFTER_COLON = re.compile(r":\s*\n\s*\(([A-H])\)[^\n]*(?:\n+(?!\s*\([A-H]\))|$)")
_OPTION_LINE = re.compile(r"[\s*-]*\(?([A-H])\)")
_TWO_OPTIONS = re.compile(
    r"\(?\b([A-H])\b\)?(?: the \w+ image| Point [A-H])?,?\s+(?:or|and)\s+(?:\w+\s+)?\(?([A-H])\b")


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


@dataclass(frozen=True)
class StrictAnswer:
    """What the last <answer> block says.

    image: number from 1, or None. box: xyxy as written, or None. problem: why there is no box.
    """

    image: int | None
    box: Box | None
    problem: str = ""


def last_answer_block(text: str) -> str | None:
    """The inside of the last closed <answer> block; None without one."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>"):end] if start >= 0 else None


def find_image_numbers(text: str) -> set[int]:
    """Numbers (from 1) of all images that a text names.

    As in "image 3", "Picture (3)", "3rd image", "third photo" and {"target_image": 3}.
    """
    numbers = set()
    for *digits, ordinal in _IMAGE_NUMBER.findall(text):
        number = "".join(digits)  # at most one of the alternatives matches
        numbers.add(int(number) if number else ORDINALS.index(ordinal.lower()) + 1)
    return numbers


def parse_strict_answer(text: str) -> StrictAnswer:
    """The one box of the last <answer> block, and the image it names.

    Several boxes or several images count as none. Boxes may be written "(x1,y1),(x2,y2)",
    "[x1,y1,x2,y2]", "(x1,y1,x2,y2)" or "<box>x1 y1 x2 y2</box>", alone or in JSON.
    """
    block = last_answer_block(text)
    if block is None:
        return StrictAnswer(None, None, "no <answer> block")
    images = find_image_numbers(block)
    if len(images) > 1:
        return StrictAnswer(None, None, "several images")
    image = next(iter(images), None)
    matches = _STRICT_BOX.findall(block)
    if len(matches) != 1:
        return StrictAnswer(image, None, "several boxes" if matches else "no box")
    box = tuple(float(digits) for digits in matches[0] if digits)
    x1, y1, x2, y2 = box
    if not all(map(math.isfinite, box)) or x1 >= x2 or y1 >= y2:
        return StrictAnswer(image, None, "not a box: needs x1 < x2 and y1 < y2")
    return StrictAnswer(image, (x1, y1, x2, y2))


def find_option_letters(text: str, valid: str = "ABCDEFGH") -> list[str]:
    """Every naming of an option in order: "(B)", "Point B", "B" by itself.

    An article "A" names no option. valid: the letters that count.
    """
    letters = []
    for match in _NAMED_OPTION.finditer(text):
        letter = next(filter(None, match.groups()), "A")  # the alternative for A has no group
        if letter in valid:
            letters.append(letter)
    return letters


def parse_blink_letter(text: str, valid: str) -> str:
    """The only "(B)" that stands by itself among white space, or the only one of the last
    paragraph; "" where that decides nothing.

    Source: zeyofu/BLINK_Benchmark, eval/test_benchmark.py, analyze_answer, which then asks another
    model.
    """
    for part in (text, text.split("\n\n")[-1]):
        words = part.split()
        letters = [letter for letter in valid if f"({letter})" in words]
        if len(letters) == 1:
            return letters[0]
    return ""


def parse_choice_letter(text: str, valid: str = "ABCDEFGH") -> str:
    """The option a free text settles on, one letter of `valid`, or "" where it names none or
    several without choosing.

    Of an <answer> block only the last one is read, else what follows the last </think>. In order: a
    lone letter; the only option named; an option alone in the last or first line, or after a colon;
    what follows the last conclusion ("therefore", "the answer is"); the first sentence that prefers
    one ("A is closer to the camera than B"). The rules are ours, for where BLINK's and MMIU's
    authors ask another model.
    """
    block = last_answer_block(text)
    text = text.rpartition("</think>")[2] if block is None else block
    text = re.sub(r"</?s>", " ", text)
    if lone := _LONE_LETTER.fullmatch(text):
        letter = lone.group(1).upper()
        return letter if letter in valid else ""
    letters = find_option_letters(text, valid)
    if not letters:
        return ""
    if len(set(letters)) == 1:
        return letters[0]
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip(" \n*-.")]
    letter = _letter_of_own_line(text, sentences, valid) or _letter_after_colon(text, valid)
    if letter:
        return letter
    sentence, rest = _find_conclusion(text, valid)
    if sentence:
        chooses_none = _REFUSES.search(sentence) or _lists_options(rest, valid)
        return "" if chooses_none else _preferred_letter(sentence, valid)
    for sentence in sentences:
        is_preference = _PREFERS.search(sentence) and not _NEGATES.search(sentence)
        if is_preference and _names_one_or_two(sentence, valid):
            return _preferred_letter(sentence, valid)
    return ""


def _letter_of_own_line(text: str, sentences: list[str], valid: str) -> str:
    """The option that the last line or, before an explanation, the first line is about; else ""."""
    last = find_option_letters(sentences[-1], valid)
    if (_OPTION_LINE.match(sentences[-1]) and len(set(last)) == 1
            and not _lists_options(text, valid)):
        return last[0]
    first = find_option_letters(sentences[0], valid)
    if (_OPTION_LINE.match(sentences[0]) and len(set(first)) == 1 and len(sentences) > 1
            and not _OPTION_LINE.match(sentences[1]) and "\n" in text.strip()):
        return first[0]
    return ""


def _letter_after_colon(text: str, valid: str) -> str:
    """The last option that stands in the line after a colon, with no other below it; else ""."""
    letters = [letter for letter in _AFTER_COLON.findall(text) if letter in valid]
    return letters[-1] if letters else ""


def _find_conclusion(text: str, valid: str) -> tuple[str, str]:
    """(sentence, text from its cue on) of the last conclusion that names one or two options; else
    two empty strings.
    """
    for cue in reversed(list(_CONCLUSION.finditer(text))):
        rest = text[cue.start():]
        for sentence in _SENTENCE_END.split(rest):
            if _names_one_or_two(sentence, valid):
                return sentence, rest
    return "", ""


def _names_one_or_two(sentence: str, valid: str) -> bool:
    return 1 <= len(set(find_option_letters(sentence, valid))) <= 2


def _preferred_letter(sentence: str, valid: str) -> str:
    """The option a sentence prefers: the first in brackets, else the first; none of "B or D" and
    "A and C".
    """
    letters = [letter for letter in re.findall(r"\(([A-H])\)", sentence) if letter in valid]
    letters = letters or find_option_letters(sentence, valid)
    pair = _TWO_OPTIONS.search(sentence)
    is_undecided = pair and pair.group(1) == letters[0] and pair.group(2) in valid
    return "" if is_undecided else letters[0]


def _lists_options(text: str, valid: str) -> bool:
    """Whether the text ends in all options again, one a line, which chooses none."""
    lines = [line for line in text.splitlines() if line.strip()][-len(valid):]
    heads = [_OPTION_LINE.match(line) for line in lines]
    return all(heads) and len({head.group(1) for head in heads if head}) == len(valid)


def contains_truth(text: str, truth: str) -> bool:
    """Whether the truth occurs anywhere in the text, the lax rule of Migician's multiple choice.

    Source: thunlp/Migician, eval/utils.py, calculate: white space, then dots, stripped from the
    truth; case counts.
    """
    return truth.strip().strip(".") in text
