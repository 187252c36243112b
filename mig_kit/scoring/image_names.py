"""Which image a free text means by its box, where it may name several.

A JSON key that names the image wins; else the image named nearest to the box, as a person reads it:
"The dog of image 1 appears in image 2 at [...]" means image 2. Works on text in which every box is
BOX and every name of an image becomes a token, so that the rules below are about short phrases.
"""

import re
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BOX = "\u25a0"  # stands for a box
_NEAR = 100  # letters before or after a name that say what it is

_ORDINAL = rf"(?:{'|'.join(ORDINALS)}|\d{{1,3}}(?:st|nd|rd|th))"
_WORD = rf"(?:{'|'.join(NUMBER_WORDS)})"
# Not a picture frame, and not a region picture, which MIG-Bench calls the crops of an image.
_NOUN = (r"(?<![a-z])(?<!picture[ -])(?<!photo[ -])(?<!region[ -])"
         r"(?:images?|imgs?|pictures?|photo(?:graph)?s?|frames?)(?![a-z])(?! frame)")
_LABEL = r"[\s_-]*(?:index|idx|number|num|no\b\.?|id)?[\s\"'`:#=*_>-]*"
_NAME = re.compile(
    rf"{_NOUN}{_LABEL}(?:(?P<after>\d{{1,3}})\b|[(\[](?P<bracket>\d{{1,3}})[)\]]"
    rf"|(?P<word>{_WORD})\b(?! can\b| could\b| sees?\b| may\b| might\b))"
    rf"|\b(?P<before>{_ORDINAL})(?:\s+{_NOUN}|\s+one\b(?! from| in| of))"
    rf"|(?:(?<=in the )|(?<=of the )|(?<=on the )|(?<=to the ))(?P<lone>{_ORDINAL})"
    rf"(?=\s*(?:[^\w\s]|at\b|is\b|$))"
    rf"|\b(?:last|final|other|latter|source) {_NOUN}", re.IGNORECASE)
# "second: [...]": an ordinal and a mark before a box, where nothing else names an image; "First,
# [...], then [...]" counts boxes
_BARE_ORDINAL = re.compile(rf"(?<![\w-])({_ORDINAL})(?=\s*[:-]\s*[\[(]?{BOX})", re.I)
_TOKEN = re.compile(r"\u2039(\d*)\u203a")
_SECOND_NUMBER = re.compile(r"(?<=\u203a)(\s*(?:and|or|/|&)\s*)(\d{1,2})\b")
_FIRST_ORDINAL = re.compile(rf"\b({_ORDINAL})(?=\s*(?:and|or|/|,)\s*(?:the\s+)?\u2039)", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[;\n\u3002]")
_CLAUSE_END = re.compile(rf"[\u203a{BOX}]|{_SENTENCE_END.pattern}")

# What a name's surroundings say. `$`: directly before it; `^`: directly after it.
_DENIED = re.compile(
    r"(?:\b(?:not|never|neither|nor|unlike|without|than|except|instead of|comparing|between"
    r"|compared? (?:to|with|against)|relative to|versus|vs\.?|absent from|missing (?:in|from)"
    r"|differs? from|reference|query|template)\b|n't\b)(?:(?!\bbut\b|\brather\b)[^.,;:\n])*$"
    r"|\b(?:reference|query|template)[\s_]*$", re.I)
_DENIES = re.compile(r"\s*(?:does(?:n't| not)|is(?:n't| not)|differ|(?:has|shows|contains) no|lacks"
                     r"|cannot|can't)", re.I)
_PREPOSITION = r"(?:in|of|from|on|inside|within|by)\s+(?:the\s+)?$"
_VERB = (r"(?:is|are|was|were|be|been|can|could|appears?|lies|sits|stands|occurs|corresponds"
         r"|matches|has|have|shows?|contains?|found|located|seen|it)")
_PLACE = r"(?:location|position|coordinates?|box|bbox|place|difference|answer|counterpart|match)"
_REFERS = re.compile(
    rf"\b(?:the|an?|this|that|same|its|their)\s+(?:(?!{_VERB}\b|{_PLACE}\b)[\w'-]+\s+){{1,6}}"
    rf"{_PREPOSITION}"
    r"|\b(?:marked|outlined|highlighted|shown|given|depicted|indicated|circled|boxed|described"
    rf"|mentioned|taken)\s+{_PREPOSITION}"
    r"|\b(?:as|like|with|using|from|based on|similar to|same as|matching|corresponding to"
    r"|corresponds to|according to|looking at|look at)\s+(?:in\s+)?(?:the\s+)?$", re.I)
_RELATIVE = re.compile(r"\b(?:that|which|what|who|whose)\b[^,;:]*$", re.I)
_TOPIC = re.compile(r"(?:^|[,:(]|\b(?:and|but|while|then|so|thus))\s*"
                    r"(?:in|on|within|for|inside)\s+(?:the\s+)?$", re.I)
_SHOWS = re.compile(r"\s*(?:has|have|shows?|contains?|depicts?)\b", re.I)
_SUBJECT = re.compile(rf"\s*(?:(?:it )?{_VERB}\b|only\b|being\b|serves?\b|just\b)", re.I)
_LINK_BEFORE = re.compile(r"[^\w,.;]*,?\s*"
                          r"(?:(?:located|found|lying|positioned|with|the|its|here)\s+)*"
                          r"(?:at|within|inside|around|by|here|box|bbox|bounding box"
                          r"|coordinates?|position)*[^\w,.;]*", re.I)
_LINK_AFTER = re.compile(r"[^\w.;]*(?:(?:which|that) )?(?:(?:is|are|located|found|lies|all) )*"
                         r"(?:(?:in|on|of|for|within|inside|from)\s+)?(?:the\s+)?", re.I)
_CLOSES = re.compile(r"\s*(?:[)\]}.,;]|$)")
_AND = (r"\s*[,(]?\s*(?:and|or|nor|/|&)\s*"
        r"(?:(?:maybe|perhaps|possibly|even|also|in|on|of)\s*)*(?:the\s+)?")
_LISTED = re.compile(rf"{_AND}|\s*,\s*(?:the\s+)?", re.I)
_COMPARED = re.compile(rf"{_AND}|\s*(?:with|to|against|versus|vs\.?)\s*(?:the\s+)?", re.I)
_HEDGED = re.compile(r"\b(?:or|maybe|perhaps|possibly|alternatively|might|could|may|either)\b"
                     r"[^,;]{0,25}$", re.I)

# Keys of JSON: {"image": 2}, {"target_image_id": [2]}, {image: "second"}.
_KEY = re.compile(r"(?:[\"']([\w -]{1,40})[\"']|(?<=[{,])\s*(\w{1,40}))\s*[:=]\s*"
                  r"(\[[^\]]{0,40}\]|\"[^\"]{0,40}\"|'[^']{0,40}'|[^,}\]\n]{0,40})")
_IMAGE_KEY = re.compile(
    r"(target|answer|correct|predicted|selected|result)?(?:in)?(?:image|img|picture|photo|frame)"
    r"(?:id|idx|index|number|num|no|name)?|(target)(?:id|idx|index|number)?", re.I)
_VALUE = re.compile(rf"(?:\W|_|the|{_NOUN}|number|no)*?(?:({_ORDINAL}|\d{{1,3}})|({_WORD}))"
                    r"(?:\W|_|images?|pictures?|one)*(?:\.\w+\W*)?", re.I)


def to_number(word: str) -> int:
    """The number that "2", "2nd", "second" or "two" says."""
    word = word.lower()
    for words in (ORDINALS, NUMBER_WORDS):
        if word in words:
            return words.index(word) + 1
    return int(re.match(r"\d+", word).group())


def mark_images(text: str) -> str:
    """The text with every name of an image as a token that holds its number, or none for an image
    named without one ("the last image").
    """
    def token(match: re.Match) -> str:
        word = next(filter(None, match.groups()), "")
        return f"\u2039{to_number(word) if word else ''}\u203a"

    text, count = _NAME.subn(token, re.sub("[\u2039\u203a]", " ", text))
    if not count:
        return _BARE_ORDINAL.sub(token, text)
    text = _SECOND_NUMBER.sub(lambda match: f"{match[1]}\u2039{int(match[2])}\u203a", text)
    return _FIRST_ORDINAL.sub(token, text)


def find_key_numbers(text: str) -> set[int]:
    """Image numbers that the JSON keys of a text give; keys that say "target" before others."""
    by_rank: dict[bool, set[int]] = {True: set(), False: set()}
    for quoted, bare, value in _KEY.findall(text):
        key = _IMAGE_KEY.fullmatch(re.sub(r"[\s_-]", "", quoted or bare))
        if not key:
            continue
        parts = value.strip("[]").split(",") if value.startswith("[") else [value]
        numbers = [_VALUE.fullmatch(part.strip()) for part in parts]
        by_rank[bool(key[1] or key[2])] |= {to_number(number[1] or number[2])
                                          for number in numbers if number}
    return by_rank[True] or by_rank[False]


def find_image_numbers(text: str) -> set[int]:
    """Numbers (from 1) of the images that a text says its box is in; several where it does not
    settle on one, none where it names none.

    text: with every box as BOX; without one, all images named count. As in {"target": 2},
    "image 3", "Picture (3)", "image two", "3rd image", "the third photo". An image that is denied
    ("not image 1") or compared with is not named.
    """
    if keys := find_key_numbers(text):
        return keys
    text = mark_images(text)
    names = _find_names(text)
    places = [match.start() for match in re.finditer(BOX, text)]
    if not places:
        return {name.number for name in names if name.number}
    numbers = set()
    for place in places:
        numbers |= _numbers_at(text, names, place)
    return numbers


def find_images_of_boxes(text: str) -> list[set[int]]:
    """For every BOX of a text, in its order: the numbers as of `find_image_numbers`, of its
    surroundings alone; keys are read as words.

    In a sentence whose first box stands before its first name, the names follow their boxes.
    """
    text = mark_images(text)
    names = _find_names(text)
    ends = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    numbers_by_box = []
    for start, end in zip(ends, ends[1:]):
        places = [start + match.start() for match in re.finditer(BOX, text[start:end])]
        inside = [name for name in names if start <= name.start < end]
        follow = bool(places and inside) and places[0] < inside[0].start
        numbers_by_box += [_numbers_after(text, inside, place) if follow
                           else _numbers_at(text, names, place) for place in places]
    return numbers_by_box


def _numbers_after(text: str, names: list["_Name"], place: int) -> set[int]:
    """Numbers of the first image named after the box at a place, with its rivals; else of the last
    one before it. names: of the sentence.
    """
    chosen = next((name for name in names if name.start > place), names[-1])
    rivals = {name.number for name in names if name.number and _are_rivals(text, chosen, name)}
    return rivals | ({chosen.number} if chosen.number else set())


@dataclass(frozen=True)
class _Name:
    """A token: its place, number (None without one), and the text around it, of its clause."""

    start: int
    end: int
    number: int | None
    before: str
    after: str


def _find_names(text: str) -> list[_Name]:
    """The names of images that are not denied, in order; "between image 1 and 2" denies both."""
    names, denied_end = [], -1
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        before = _CLAUSE_END.split(text[max(0, start - _NEAR):start])[-1]
        after = text[end:end + _NEAR]
        is_joined = denied_end >= 0 and _COMPARED.fullmatch(text[denied_end:start][:_NEAR])
        if is_joined or _DENIED.search(before) or _DENIES.match(after):
            denied_end = end
        else:
            names.append(_Name(start, end, int(match[1]) if match[1] else None, before, after))
            denied_end = -1
    return names


def _numbers_at(text: str, names: list[_Name], place: int) -> set[int]:
    """Numbers of the images that the box at a place is said to be in: by the box's own sentence,
    else the nearest before it that names an image, else the first after it.
    """
    if not names:
        return set()
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    own = bisect_right(ends, place)
    by_sentence = defaultdict(list)
    for name in names:
        by_sentence[bisect_right(ends, name.start)].append(name)
    earlier = [sentence for sentence in by_sentence if sentence <= own]
    inside = by_sentence[max(earlier) if earlier else min(by_sentence)]
    chosen = max(inside, key=lambda name: (_strength(text, name, place), -_distance(name, place)))
    rivals = {name.number for name in names
              if name.number not in (chosen.number, None) and _are_rivals(text, chosen, name)}
    return rivals | ({chosen.number} if chosen.number else set())


def _distance(name: _Name, place: int) -> int:
    return place - name.end if name.end <= place else name.start - place


def _strength(text: str, name: _Name, place: int) -> float:
    """How surely a name near the box at a place says where the box is."""
    refers = bool(_REFERS.search(name.before) or name.after.startswith("'s"))
    if name.end <= place:
        if _LINK_BEFORE.fullmatch(text[name.end:place][:_NEAR]):
            return 2.5 if refers else 4
        is_subject = not name.before.strip() and _SHOWS.match(name.after)
        if _TOPIC.search(name.before) or is_subject:
            return 3
    else:
        gap = text[place + 1:name.start][:_NEAR]
        has_preposition = bool(re.search(r"\w", gap))
        if _LINK_AFTER.fullmatch(gap) and (has_preposition or _CLOSES.match(name.after)):
            return 4
        refers = refers or bool(_SUBJECT.match(name.after))
    if _RELATIVE.search(name.before):
        return 0
    return 1 if refers else 2


def _are_rivals(text: str, chosen: _Name, other: _Name) -> bool:
    """Whether the text leaves open which of two images it means: "image 1 or image 2"."""
    first, second = sorted((chosen, other), key=lambda name: name.start)
    is_listed = _LISTED.fullmatch(text[first.end:second.start][:_NEAR])
    return bool(is_listed or _HEDGED.search(other.before))
