"""Letters of multiple-choice questions, read from any model's free text."""

import re

from mig_kit.scoring.parsers import last_answer_block

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
