"""Letters of multiple-choice questions, where a reply says explicitly which option it chooses.

A short list of rules, tried in order. What no rule reads is unread: it counts wrong, is counted,
and a judge may be asked (judge.py). All functions take any string; none raises.
"""

import json
import re
import unicodedata

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.official import last_answer_block, parse_blink_letter, shown_text

_LABEL = r"(?i:option|choice|point|box|picture|letter)"
_SIGNS = r"[\s*_`\"'$(\[{:=]{0,9}"
# "answer is X", "choice: X", \boxed{X}; "X is the answer"; a last sentence that ends in "is X"
_CONCLUSION = re.compile(
    rf"(?:\b(?i:(?:answer|choice|option)[*_\"')\]]{{0,4}}(?:\s+is\b|\s*[:=]"
    rf"|\s[^.!?:=\n]{{1,40}}?\bis\b))|\\boxed(?=\{{)){_SIGNS}(?:\\\w{{1,9}}\{{)?"
    rf"(?:{_LABEL}\s+)?{_SIGNS}(?P<letter>[A-Z])(?![\w'-])"
    r"|\b(?P<subject>[A-Z])[)*\"']{0,4} is (?:the )?(?:\w{1,20} )?(?:answer|choice|option)\b")
_END = re.compile(r"\bis:?\s+(?:\w{1,20}\s+)?\W{0,4}(?P<letter>[A-Z])\b\W{0,9}\Z")
_ANOTHER = re.compile(r"(?:[,/&]|\b(?:or|and|nor)\b)\s*(?:the\s+)?(?:\w+\s+)?\W{0,2}([A-Z])\b")
_DENIES = re.compile(r"\b(?:not?|nor|neither|never|cannot|unless|except|unlike|if)\b|n't", re.I)
_OF_ANOTHER = re.compile(r"\b(?:wrong|incorrect|first|second|other|another|alternative"
                         r"|runner\S*)\b", re.IGNORECASE)
_DECIDES = re.compile(r"\b(?:answer|choice|correct|right|best)\b", re.IGNORECASE)
_LINE = re.compile(r"[\s*_>#-]*(?:\(([A-Z])\)|([A-Z])(?:[).:*]|(?=\s*$)))[\s*_.:]*(.{0,60})$")
_MARK = re.compile(r"\(([A-Z])\)|\*\*\(?([A-Z])\)?[.:]?\*\*")
_NAMED = re.compile(rf"[\"']([A-Z])[\"']|\b{_LABEL}\s+([A-Z])\b(?!')")
_SENTENCE = re.compile(r"(?<!\d)[.!?](?=\s|$)\s*(?=\S)|\n+")


def read_choice(text: str, valid: str = "ABCDEFGH", choices: tuple[str, ...] = (),
                is_blink: bool = False) -> tuple[str, str]:
    """The option that a reply explicitly chooses, and the rule that reads it, by rules of ours.

    Args:
        text: only its last <answer> block is read or, without one, what follows the reasoning.
        valid, choices: the options' letters, and what they stand for.
        is_blink: whether BLINK's own rule is tried.
    Returns: (letter, rule), or ("", "") for a reply that is not read.
    """
    block = last_answer_block(text)
    final = shown_text(text) if block is None else block
    if (value := _json_answer(final)) is not None:
        final, is_blink = value, False
    letter = is_blink and parse_blink_letter(final, valid)
    if letter and _letters(_MARK, final.split("\n\n")[-1], valid) <= {letter}:
        return letter, "BLINK's own rule"
    plain = unicodedata.normalize("NFKC", final)
    for rule, read in (("a conclusion", _conclude), ("a line", _read_lines),
                       ("an option's words", _read_words), ("the only option marked", _read_mark)):
        if (letter := read(plain, valid, choices)) is not None:
            return (letter, rule) if letter else ("", "")
    return "", ""


def read_item(item: BenchmarkItem, response: str, is_blink: bool = False) -> tuple[str, str]:
    """`read_choice` of a reply to an item."""
    return read_choice(response, item.options, item.choices or item.usual_choices, is_blink)


def read_strictly(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """The letter that is all of the last <answer>, and the rule's name; ("", "") without one."""
    letter = (last_answer_block(response) or "").strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options
    return (letter, "the last <answer>") if is_option else ("", "")


def _json_answer(text: str) -> str | None:
    try:
        value = json.loads(text[text.index("{"):text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return None
    return next((str(value[key]) for key in ("answer", "choice") if key in value), None)


def _letters(pattern: re.Pattern, text: str, valid: str) -> set[str]:
    return {next(filter(None, match)) for match in pattern.findall(text)} & set(valid)


def _turns(rest: str, letter: str, valid: str) -> bool:
    """Whether a later sentence speaks of another option as the answer."""
    return any(_DECIDES.search(part) and set(re.findall(r"\b[A-Z]\b", part)) & set(valid) - {letter}
               for part in re.split(r"[.!?]\s|\n", rest))


# Each rule gives a letter, "" where it leaves open which, None where there is nothing of its kind.
def _conclude(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    if not (matches := [*_CONCLUSION.finditer(text)] or [*_END.finditer(text)]):
        return None
    (start, end), letter = matches[-1].span(), matches[-1][matches[-1].lastindex]
    sentence = re.split(r"[.!?\n]", text[max(0, start - 200):start])[-1] + matches[-1][0]
    after = re.split(r"[.!?\n]", text[end:end + 200])[0]
    last = _read_line(text.strip().split("\n")[::-1], valid)
    others = {match[match.lastindex] for match in matches} & set(valid) - {letter}
    is_open = (letter not in valid or last not in ("", letter) or others or _DENIES.search(sentence)
               or _OF_ANOTHER.search(sentence) or _turns(text[end:], letter, valid)
               or set(_ANOTHER.findall(after)) & set(valid) - {letter})
    return "" if is_open else letter


def _read_line(lines: list[str], valid: str) -> str:
    """The option that the first line is, with or without its words, unless the next is another."""
    here, beside = ([*map(_LINE.match, filter(str.strip, lines)), None, None])[:2]
    letter = here and (here[1] or here[2]) or " "
    is_list = beside and letter not in beside.groups() or here and re.search(r"[A-Z][).:]", here[3])
    return letter if letter in valid and not is_list else ""


def _read_lines(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    lines = text.strip().split("\n")
    first, last = _read_line(lines, valid), _read_line(lines[::-1], valid)
    if not (letter := last or first):
        return None
    is_open = first not in ("", letter) or _letters(_MARK, lines[-1], valid) - {letter} or (
        not last and _turns(text.strip().partition("\n")[2], letter, valid))
    return "" if is_open else letter


def _read_words(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    """The reply, its first or last sentence is an option's words; "A is closer" may go on."""
    words = [re.sub(r"^the |[^\w ]", "", choice.strip().lower()) for choice in choices]
    sentences = [re.sub(r"^the |[^\w ]", "", part.strip().lower())
                 for part in (text, *_SENTENCE.split(text.strip()))]
    is_short = len(sentences) == 2 and all(len(word) > 3 and word.isalpha() for word in words)
    letters = set()
    for sentence in (sentences[0], sentences[1], sentences[-1]):
        places = [place for place, word in enumerate(words)
                  if re.search(rf"\b{re.escape(word)}\b", sentence)]
        if len(places) == 1 and (sentence == words[places[0]] or not _DENIES.search(sentence) and (
                is_short or re.match(rf"(?:\w+ )?{re.escape(words[places[0]])}\b", sentence)
                and re.match(r"[a-z] ", words[places[0]]))):
            letters.add(valid[places[0]])
    return letters.pop() if len(letters) == 1 else None


def _read_mark(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    letters = _letters(_MARK, text, valid)
    if not any(re.match(r"[A-Z] ", choice) for choice in choices):  # points of "A is closer"
        letters |= _letters(_NAMED, text, valid)
    return letters.pop() if len(letters) == 1 and not _DENIES.search(text) else None
