"""Letters of multiple-choice questions, where a reply says explicitly which option it chooses.

A short list of rules, tried in order. What no rule reads is unread: it counts wrong, is counted,
and a judge may be asked (judge.py). All functions take any string; none raises.
"""

import json
import re
import unicodedata

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.official import parse_blink_letter, shown_text, split_answer

_LABEL = r"(?i:option|choice|point|box|picture|letter)"
_SIGNS = r"[\s*_`\"'$(\[{:=]{0,9}"
# "answer is X", "choice: X", \boxed{X}; "X is the answer"; a last sentence that ends in "is X"
_CONCLUSION = re.compile(
    rf"(?:\b(?i:(?:answer|choice|option)[*_\"')\]]{{0,4}}(?:\s+is\b|\s*[:=]|\s[-\u2013]\s"
    rf"|(?<=r\*\*)\s|\s[^.!?:=\n]{{1,40}}?\bis\b))|\\boxed(?=\{{)){_SIGNS}(?:\\\w{{1,9}}\{{)?"
    rf"(?:{_LABEL}\s+)?{_SIGNS}(?P<letter>[A-Z])(?![\w'-])"
    r"|\b(?P<subject>[A-Z])[)*\"']{0,4} is (?:the )?(?:\w{1,20} )?(?:answer|choice|option)\b")
_END = re.compile(r"\bis:?\s+(?:\w{1,20}\s+)?\W{0,4}(?P<letter>[A-Z])\b\W{0,9}\Z")
DENIES = re.compile(r"\b(?:not?|none|nor|neither|never|cannot|unless|except|unlike|if)\b|n't",
                    re.IGNORECASE)
REJECTS = re.compile(r"\b(?:wrong|incorrect|false|exclude|eliminate|reject|rul(?:e|ed|ing) out"
                     r"|tempting|maybe|perhaps|distractor|decoy|retract)", re.IGNORECASE)
_SUPPOSES = re.compile(r"\b(?:would|could|might|format|example|template)\b", re.IGNORECASE)
_TURNS = re.compile(r"\b(?:actually|wait|hmm+|correction|sorry|mistake|rather|instead|thought"
                    r"|reflection|look|check)\b|\A\W*no\b", re.IGNORECASE)
_TURNS_ROUND = re.compile(r"(?:[.!?:]\s|\n)\W*(?:but )?(?:wait|hmm+|actually|correction|sorry|edit"
                          r"|on (?:second|reflection)|let me (?!know)|no[,.:])", re.IGNORECASE)
# what is said of a point or box that is not chosen, and what is not
_FAULTS = re.compile(r"\b(?:too|not|includ\w+|lighter|farther|further|background|differs|would)\b"
                     r"|n't", re.IGNORECASE)
_PRAISES = re.compile(r"\b(?:closer|nearer|darker|better|best|fits|correct)\b", re.IGNORECASE)
_OF_ANOTHER = re.compile(r"\b(?:first(?! choice)|second|other|another|alternative|runner\S*)\b",
                         re.IGNORECASE)
_NEXT_CHOICE = re.compile(r"\b(?:second|other|alternative) (?:choice|option)(?: is|:)\W{0,3}\Z",
                          re.IGNORECASE)
# the weight that an answer gives itself, if it is none
_NO_WEIGHT = re.compile(r"-.*|[0.]+\s*%?|none|no|false", re.IGNORECASE)
# a letter that is named, but as an option's first word, or to compare another with it
_NAMES = re.compile(r"(?<![\w'])(?<!^[B-Z][.:] )(?<!\b[B-Z]\) )([A-Z])(?![A-Za-z0-9_'-])",
                    re.ASCII | re.MULTILINE)
_COMPARES = re.compile(r"\b(?:than|compared (?:to|with)|while|whereas|unlike|over|versus)\s"
                       r"(?:the )?(?:\w+ )?\W{0,2}\Z|\n\s*[-*]\s+\W{0,4}\Z|\bnot\s\W{0,2}\Z",
                       re.IGNORECASE)
_BREAKS_OFF = re.compile(r"\b[a-z]+\s*\Z")
_LINE = re.compile(r"[\s*_>#-]*(?:\(([A-Z])\)|([A-Z])(?:[).:*]|(?=\s*$)))[\s*_.:]*.{0,60}$")
_MARK = re.compile(r"\(([A-Z])\)|\*\*\(?([A-Z])\)?[.:]?\*\*")
_CHECKED = re.compile(r"\[[xX]\][\s*_(]*([A-Z])\b")
_NAMED = re.compile(rf"[\"']([A-Z])[\"']|\b{_LABEL}\s+([A-Z])\b(?!')")
_IN_CHINESE = {"\u5de6": "left", "\u53f3": "right", "\u662f": "yes", "\u5426": "no"}
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
    before, inside, behind = split_answer(text) or ("", shown_text(text), "")
    final, more = _json_answer(inside)
    plain = unicodedata.normalize("NFKC", final)
    if len(bare := re.sub(r"[\s*_.()]", "", plain)) == 1 and bare not in choices:
        plain = plain.upper()
    verdicts = [part for part in more.split("\n") if len(part.split()) < 3]
    if is_taken_back(before, behind) or _TURNS_ROUND.search(more) or any(
            map(REJECTS.search, verdicts)):
        return "", ""

    def stands(letter: str) -> bool:  # what finds fault with other options takes nothing back
        rest = [part for part in re.split(r"[.;]\s|\n", f"{more} {behind}") if letter in part or (
            not _FAULTS.search(part) or re.search("but|right", part) or _PRAISES.search(part))]
        return _stands("\n".join([plain, *rest]).strip(), letter, valid, choices)

    letter = is_blink and parse_blink_letter(final, valid)
    if letter and _letters(_MARK, final.split("\n\n")[-1], valid) <= {letter}:
        return (letter, "BLINK's own rule") if stands(letter) else ("", "")
    for rule, read in (("a checked box", _read_checked), ("a conclusion", _conclude),
                       ("a line", _read_lines), ("an option's words", _read_words),
                       ("the only option marked", _read_mark)):
        if (letter := read(plain, valid, choices)) is not None:
            return (letter, rule) if letter and stands(letter) else ("", "")
    return "", ""


def read_item(item: BenchmarkItem, response: str, is_blink: bool = False) -> tuple[str, str]:
    """`read_choice` of a reply to an item."""
    return read_choice(response, item.options, item.choices or item.usual_choices, is_blink)


def read_strictly(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """The letter that is all of the last <answer>, and the rule's name; ("", "") without one."""
    before, inside, behind = split_answer(response) or ("", "", "")
    letter = inside.strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options and not is_taken_back(
        before, behind) and _stands(f"{letter}\n{behind}", letter, item.options, item.choices)
    return (letter, "the last <answer>") if is_option else ("", "")


def is_taken_back(before: str, behind: str) -> bool:
    """Whether the words around a closed answer deny it, only suppose it, or turn to another."""
    sentence = re.split(r"[.!?]\s|\n|</answer>", before)[-1]
    lead, follow = re.sub(r"\A\W*[Nn]o\b", "", sentence), behind.strip().split("\n")[0]
    return follow.startswith("?") or any(pattern.search(part) for pattern, part in (
        (_TURNS, behind), (REJECTS, behind), (DENIES, follow), (REJECTS, lead), (DENIES, lead),
        (_SUPPOSES, lead)))


def has_no_weight(values: dict) -> bool:
    """Whether an answer in JSON gives itself no confidence."""
    return any(key in values and _NO_WEIGHT.fullmatch(str(values[key]))
               for key in ("confidence", "score", "probability"))


def _json_answer(text: str) -> tuple[str, str]:
    """The answer of a text's JSON object, and what the object says after it; or the text, ""."""
    try:
        value = json.loads(text[text.index("{"):text.rindex("}") + 1])
    except (ValueError, RecursionError):
        return text, ""
    if not (key := next((key for key in ("answer", "choice") if key in value), "")):
        return text, ""
    names = list(value)
    later = {*names[names.index(key):], *filter(re.compile("answer|choice").search, names)}
    more = [json.dumps(value[name]) for name in names if name in later - {key}]
    return "" if has_no_weight(value) else str(value[key]), "\n".join(
        [*more, text[text.rindex("}") + 1:]])


def _letters(pattern: re.Pattern, text: str, valid: str) -> set[str]:
    return {next(filter(None, match)) for match in pattern.findall(text)} & set(valid)


def _stands(text: str, letter: str, valid: str, choices: tuple[str, ...]) -> bool:
    """Whether no other option is named after a letter that was read, and it is not rejected."""
    names = []
    for match in _NAMES.finditer(text):
        before = text[max(0, match.start() - 40):match.start()]
        if re.search(r"\b[Nn]ot\s\W{0,2}\Z", before) and match[1] == letter:
            return False
        if match[1] in valid and not _COMPARES.search(before) and not _NEXT_CHOICE.search(
                before) and not _is_dismissed(text, match, choices):
            names.append(match)
    if names and (names[-1][1] != letter or _TURNS_ROUND.search(text[names[-1].end():])):
        return False
    place = names[-1].start() if names else 0
    start = max(match.end() for match in re.finditer(r"\A|[.!?](?=\s)|\n", text[:place]))
    sentence = re.split(r"(?<=[.!?])\s|\n", text[start:])[0]
    return not REJECTS.search(sentence) and not sentence.rstrip().endswith("?")


def _is_dismissed(text: str, match: re.Match, choices: tuple[str, ...]) -> bool:
    """Whether a letter names a point or box of which its sentence says a fault, and no praise."""
    start, end = match.span()
    before = re.split(r"[.!?]\s|\n", text[max(0, start - 200):start])[-1]
    behind = re.split(r"[.!?](?:\s|$)|\n", text[end:end + 200])[0]
    thing = "point" if _tells_of_points(choices) else "box" if "Box A" in choices else None
    return bool(thing and re.search(rf"\b{thing} \Z", before, re.IGNORECASE)
                and not _TURNS.search(before) and _FAULTS.search(behind)
                and not _PRAISES.search(behind))


def _tells_of_points(choices: tuple[str, ...]) -> bool:
    return any(re.match(r"[A-Z] ", choice) for choice in choices)  # "A is closer"


def _is_cut(text: str) -> bool:
    """Whether a reply of several sentences breaks off, so that it may still change its mind."""
    return bool(re.search(r"[.!?]\s|\n", text.strip()) and _BREAKS_OFF.search(text[-40:]))


# Each rule gives a letter, "" where it leaves open which, None where there is nothing of its kind.
def _conclude(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    if not (matches := [*_CONCLUSION.finditer(text)] or [*_END.finditer(text)]):
        return None
    matches = [match for match in matches if not _NEXT_CHOICE.search(
        text[max(0, match.start() - 20):match.start(match.lastindex)])]
    if not matches:
        return ""
    start, letter = matches[-1].start(), matches[-1][matches[-1].lastindex]
    sentence = re.split(r"[.!?\n]", text[max(0, start - 200):start])[-1] + matches[-1][0]
    others = {match[match.lastindex] for match in matches} & set(valid) - {letter}
    is_open = others or DENIES.search(sentence) or _OF_ANOTHER.search(sentence)
    return "" if is_open or letter not in valid else letter


def _read_checked(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    """The only option of a list of tasks that is ticked off."""
    letters = _letters(_CHECKED, text, valid)
    return None if not letters else letters.pop() if len(letters) == 1 else ""


def _read_line(lines: list[str], valid: str) -> str:
    """The option that the first line is, with or without its words, unless the next is another."""
    here, beside = ([*map(_LINE.match, filter(str.strip, lines)), None, None])[:2]
    letter = here and (here[1] or here[2]) or " "
    is_list = beside and letter not in beside.groups()
    return letter if letter in valid and not is_list else ""


def _read_lines(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    lines = text.strip().split("\n")
    first, last = _read_line(lines, valid), _read_line(lines[::-1], valid)
    if not (letter := last or first):
        return None
    is_open = first not in ("", letter) or _letters(_MARK, lines[-1], valid) - {letter} or (
        not last and _is_cut(text))
    return "" if is_open else letter


def _read_words(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    """The reply, its first or last sentence is an option's words, or answers BLINK's question."""
    sentences = [re.sub(r"^the |[^\w ]", "", part.strip().lower())
                 for part in (text, *_SENTENCE.split(text.strip()))]
    sentences = [_IN_CHINESE.get(part, part) for part in sentences]
    if _tells_of_points(choices) and sum(choice.lower() in text.lower() for choice in choices) > 1:
        return None
    if any(part != "no" and _TURNS.search(part) for part in sentences[2:]):
        return None
    letters = set()
    for letter, choice in zip(valid, choices):
        words = re.escape(re.sub(r"^the |[^\w ]", "", choice.strip().lower()))
        stated = re.compile(
            rf"(?:(?:so|thus|hence|therefore) )?(?:the )?(?:{words}(?: more accurately .*)?|camera "
            rf"(?:is moving|moves|moved) (?:to the )?{words}(?: (?:counter)?clockwise)?"
            r"(?: when .*)?)")
        if _tells_of_points((choice,)):
            stated = re.compile(rf"(?:\w+ )?{words}(?: (?:to the camera|than|compared)\b.*)?")
        if any(stated.fullmatch(part) and (part == words or not DENIES.search(part))
               for part in (sentences[0], sentences[1], sentences[-1])):
            letters.add(letter)
    return letters.pop() if len(letters) == 1 else None


def _read_mark(text: str, valid: str, choices: tuple[str, ...]) -> str | None:
    letters = _letters(_MARK, text, valid)
    if not _tells_of_points(choices):
        letters |= _letters(_NAMED, text, valid)
    others = any(choice.lower() in text.lower() for letter, choice in zip(valid, choices)
                 if len(choice) > 3 and letter not in letters)
    is_open = len(letters) != 1 or others or DENIES.search(text) or _is_cut(text)
    return None if is_open else letters.pop()
