"""Which image a free text says its box is in, and whether it is an answer at all; every box of the
text is BOX.

A text is read word by word against the lists below. Nothing is guessed: a JSON key names the image,
else the text names exactly one by its number. A text that denies, doubts or takes back what it says
is no answer. Any string is read; none raises.
"""

import re
from bisect import bisect_left

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BOX = "\u25a0"  # stands for a box
UNCLEAR = -1  # an image that is pointed at without its number: "the other image", "both images"

_CHINESE = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341"  # one to ten
# "2nd", "no. 2" and the Chinese "number 2" are one word each; every sign is a word
_WORD = re.compile(
    rf"\u7b2c\s?(?:\d{{1,3}}|[{_CHINESE}])|\d+[ -]?(?:st|nd|rd|th)\b|\d+(?:\.\d+)?"
    r"|\bno\b\.?(?=\s?\d)|[a-z\u00c0-\u024f]+(?:'[a-z]+)?|[.!?](?=\s|\Z)|\n|\S")
_SENTENCE_ENDS = frozenset(".!?;\n\u3002")

_SINGULAR = frozenset("image img picture pic photo photograph frame \u56fe \u5716 "
                      "\u7167 \u753b".split())
_PLURAL = frozenset("images imgs pictures pics photos photographs frames".split())
_NOUNS = _SINGULAR | _PLURAL
# between "image" and its number
_LABELS = frozenset("index idx number numbered labelled labeled num no no. nr id n \u00b0 . # : = "
                    "* _ ` ' \" > } - \u7247 \u50cf".split())
_JOINERS = frozenset(", / & + | ~ - \u2013 and or plus to through versus vs".split())
# between an ordinal, or a word such as "all", and "images"
_FILLERS = frozenset("of the these those given provided shown input - \u5f20 \u5f35 \u5e45 "
                     "\u4e2a".split())
_COLLECTIVE = frozenset("both all each every any some several either most many multiple "
                        "\u6bcf \u5404 \u6709".split())
_DESCRIBED = frozenset("left right leftmost rightmost middle center centre top bottom upper lower "
                       "penultimate reference query original".split())
_LETTERS = frozenset("b c d e f g h ii iii iv vi".split())
# "I" stands for a noun, "N" for a number word; another image than the one with the number
_RELATIVE = tuple(f" {phrase} " for phrase in (
    "other I", "another I", "latter", "former", "last I", "final I", "previous I", "preceding I",
    "next I", "remaining I", "other one", "another one", "last one", "next one", "previous one",
    "first N Is", "last N Is", "Is N", "to last", "from last", "to the last", "from the last",
    "I before", "I after", "I following", "I next to", "I from the", "I to the", "or another",
    "or the other", "or others", "and others", "etc", "everywhere", "anywhere"))
_NOT_RELATIVE = (" no other I ", " no other one ")

# Doubted, denied or taken back, word by word; the same as beginnings of words, and as phrases.
_DENIALS = frozenset("""
    not never none neither nor cannot nothing nobody nowhere elsewhere somewhere nope no nil absent
    absence lack lacks lacking devoid gone vanished hardly unable impossible invisible unseen except
    unlike dont cant isnt doesnt nonexistent either maybe perhaps possibly presumably alternatively
    likely might may could unsure unclear unknown unlikely apparently undecided dubious chance if
    whether unless example placeholder dummy error errors false invalid bogus typo
    oops sorry kidding wait hmm lied nevermind""".split())
_DENIAL_STEMS = (
    "exclud", "reject", "eliminat", "fail", "doubt", "guess", "random", "arbitrar", "tentativ",
    "speculat", "suppos", "assum", "hypothe", "probab", "improbab", "potential", "conceivab",
    "arguab", "plausib", "questionab", "debatab", "uncertain", "hesitat", "suspect", "seem",
    "refus", "declin", "pretend", "wrong", "incorrect", "mistak", "misread", "misspoke",
    "misident", "erroneous", "inaccura", "correction", "retract", "withdr", "cancel", "discard",
    "disregard", "ignor", "apolog", "reconsider", "revis", "rethink", "fabricat", "hallucinat")
_DENIAL_PHRASES = tuple(f" {phrase} " for phrase in (
    "is missing", "are missing", "was missing", "be missing", "missing from", "missing in",
    "rule out", "ruled out", "ruling out", "other than", "apart from", "rather than", "or rather",
    "instead of", "anywhere but", "all but", "any but", "every image but", "used to be", "hard to",
    "difficult to", "would have", "should have", "had it", "had there", "had been", "were it",
    "scratch that", "strike that", "scrap that", "forget that", "forget it", "my bad",
    "take that back", "take it back", "take this back", "made that up", "made it up", "made up",
    "on second thought", "on second thoughts", "on reflection", "hold on", "try again", "my mind",
    "i think", "i believe", "i'd say", "i would say", "as far as", "in my opinion",
    "appears to be", "looks like it", "it looks like", "looks empty", "or so", "let's say",
    "for instance", "low confidence", "confidence low", "without it", "non existent", "e g",
    "n a"))
_AFFIRMED = (" not only ", " no other ", " no doubt ", " without doubt ", " without a doubt ")
_DENIAL_SIGNS = ("?", "\u2260", "!=", *"\u4e0d\u6ca1\u6c92\u65e0\u7121\u672a\u9519\u731c",
                 "\u53ef\u80fd", "\u4e5f\u8bb8", "\u5927\u6982", "\u6216\u8bb8", "\u5982\u679c",
                 "\u5047\u8bbe", "\u66f4\u6b63", "\u64a4\u56de")

# A key of JSON, quoted or after a brace, and its value.
_KEY = re.compile(r"(?:[\"']([\w -]{1,40})[\"']|(?<=[{,])\s*(\w{1,40}))\s*[:=]\s*"
                  r"(\[[^\[\]]{0,80}\]|\"[^\"]{0,400}\"|'[^']{0,400}'|[^,{}\[\]\"'\n]{1,40})")
_IMAGE_KEYS = ("image", "img", "picture", "photo", "frame")
_TARGETS = ("target", "answer", "correct", "predicted", "selected", "result")
_KEY_ENDS = ("", "s", "id", "ids", "idx", "index", "number", "num", "no", "name")
# the name of an object may hold any word: {"label": "man without hat"}
_DESCRIPTIONS = ("label", "name", "object", "class", "category", "caption", "phrase", "text",
                 "desc", "ref", "reason", "think")
_BESIDE_NUMBERS = _NOUNS | frozenset("the number no no. one and or jpg jpeg png".split())


def split_words(text: str) -> list[str]:
    """The words, numbers and signs of a text in lower case, line breaks among them."""
    return _WORD.findall(text.lower())


def _read_number(word: str) -> int | None:
    """The number that "2", "two" or a Chinese numeral says; else None."""
    if word.isdecimal() and len(word) <= 3:
        return int(word)
    if word in NUMBER_WORDS:
        return NUMBER_WORDS.index(word) + 1
    return _CHINESE.index(word) + 1 if word in _CHINESE else None


def _read_ordinal(word: str) -> int | None:
    """The number that "2nd", "second" or its Chinese says; else None."""
    if word in ORDINALS:
        return ORDINALS.index(word) + 1
    if word[0] == "\u7b2c":
        return _read_number(word[1:].strip())
    return _read_number(word[:-2].rstrip(" -")) if word[0].isdecimal() else None


def _skip(words: list[str], at: int, skipped: frozenset[str], step: int = 1) -> int:
    """The next place from `at` on whose word is none of `skipped`; step -1 goes backwards."""
    while 0 <= at < len(words) and words[at] in skipped:
        at += step
    return at


def _word(words: list[str], at: int) -> str:
    """The word at a place; "" beyond the ends."""
    return words[at] if 0 <= at < len(words) else ""


def _is_noun(words: list[str], at: int) -> bool:
    """Whether the word means an image: no picture frame, and no region picture, which MIG-Bench
    calls the crops of an image.
    """
    return (_word(words, at) in _NOUNS and _word(words, at + 1) not in ("frame", "frames")
            and _word(words, at - 1) not in ("picture", "photo", "region"))


def _numbers_after(words: list[str], at: int) -> tuple[set[int], int]:
    """(numbers after a noun, place behind them): "image no. 2", "image (2)", "images 2, 3 and 4",
    "image 2 or image 3".
    """
    is_plural = words[at] in _PLURAL
    at = _skip(words, at + 1, _LABELS)
    if _word(words, at) in ("with", "at") and _word(words, at + 1) in ("index", "number", "id"):
        at = _skip(words, at + 1, _LABELS)
    if is_bracketed := _word(words, at) in ("(", "[", "{", "<"):
        at += 1
    numbers: set[int] = set()
    first = _word(words, at)
    while at < len(words) and (number := _read_number(words[at])) is not None:
        numbers.add(number)
        start = at = _skip(words, at + 1, frozenset("\"'`*"))
        while _word(words, at) in _JOINERS or _word(words, at) in ("(", "the", "in"):
            at += 1
        if _JOINERS.isdisjoint(words[start:at]):
            break
        if _is_noun(words, at):
            at = _skip(words, at + 1, _LABELS)
        elif "or" in words[start:at] and at < len(words) and _read_ordinal(words[at]):
            numbers.add(_read_ordinal(words[at]))  # "image 2 or the third"
        elif _word(words, at).isdecimal() != first.isdecimal():
            break  # "image 2, two dogs"
        elif is_bracketed and not is_plural:
            return set(), start  # "the image (100, 200)"
    if is_bracketed and not is_plural and _word(words, at) not in (")", "]", "}", ">"):
        return set(), at
    return numbers, at


def _ordinals_before(words: list[str], at: int) -> set[int]:
    """The numbers of the ordinals before a noun: "the first and third of the images", "no. 2
    image".
    """
    numbers: set[int] = set()
    at = _skip(words, at - 1, _FILLERS, -1)
    if _word(words, at - 1) in ("no", "no.", "number", "#"):
        return {_read_number(words[at])} - {None}
    if at > 0 and _read_number(words[at]) and words[at - 1] in _FILLERS:  # "second of six images"
        at = _skip(words, at - 1, _FILLERS, -1)
    while at >= 0 and (number := _read_ordinal(words[at])) is not None:
        numbers.add(number)
        at = _skip(words, at - 1, _JOINERS | _FILLERS, -1)
    return numbers


def find_names(words: list[str]) -> list[tuple[int, set[int]]]:
    """(place, numbers) of every name of an image, or of several joined ones, in order."""
    names, end = [], 0
    for at, word in enumerate(words):
        numbers: set[int] = set()
        if at < end:
            continue
        if _is_noun(words, at) or word in ("figure", "fig"):
            numbers, end = _numbers_after(words, at)
            if not numbers:
                end = at
                numbers = _ordinals_before(words, at) if word in _NOUNS else numbers
        elif word[0] == "\u7b2c" and _word(words, at + 1) in ("\u5f20", "\u5f35", "\u5e45"):
            numbers = {_read_ordinal(word)} - {None}
        elif word == "one" and _word(words, at + 1) not in ("from", "in", "of"):
            numbers = _ordinals_before(words, at)
        elif (_word(words, at - 1) == "the" and _word(words, at - 2) in ("in", "of", "on", "to")
                and not _word(words, at + 1).isalpha() | (_word(words, at + 1) in ("at", "is"))):
            numbers = {_read_ordinal(word)} - {None}
        if numbers:
            names.append((at, numbers))
    return names


def _names_before_boxes(words: list[str]) -> set[int]:
    """The numbers of ordinals that stand alone before a box, as in "second: BOX"; "First, BOX"
    counts boxes.
    """
    numbers = set()
    for at, word in enumerate(words):
        box = _skip(words, at + 2, frozenset("[("))
        if _word(words, at + 1) in (":", "-") and _word(words, box) == BOX and (
                _word(words, at - 1) != "-"):
            numbers.add(_read_ordinal(word))
    return numbers - {None}


def find_images_of_boxes(text: str) -> list[set[int]]:
    """For every BOX of a text, in its order, the numbers of the image named last before it.

    In a sentence whose first box stands before its first name, the names follow their boxes.
    """
    words = split_words(text)
    names = find_names(words)
    places = [at for at, _ in names]
    ends = [at for at, word in enumerate(words) if word in _SENTENCE_ENDS]
    numbers_by_box = []
    for start, end in zip([0, *ends], [*ends, len(words)]):
        boxes = [at for at in range(start, end) if words[at] == BOX]
        first, behind = bisect_left(places, start), bisect_left(places, end)
        follow = bool(boxes) and first < behind and boxes[0] < places[first]
        for box in boxes:
            at = bisect_left(places, box)  # the first name after the box
            chosen = at if follow and at < behind else max(at - 1, 0)
            numbers_by_box.append(names[chosen][1] if names else set())
    return numbers_by_box


def _is_unclear(words: list[str], has_number: bool) -> bool:
    """Whether the words point at an image without its number: "the other image"; beside a number
    "all images" and "the left image" only describe.
    """
    kinds = ["I" if word in _SINGULAR else "Is" if word in _PLURAL else
             "N" if word in NUMBER_WORDS and word != "one" else word for word in words
             if word.isalnum()]
    text = f" {' '.join(kinds)} "
    for phrase in _NOT_RELATIVE:
        text = text.replace(phrase, " ")
    if any(phrase in text for phrase in _RELATIVE):
        return True
    if has_number:
        return False
    if " I on the left " in text or " I on the right " in text:
        return True
    for at, word in enumerate(words):
        if _is_noun(words, at) or word == "them":
            before = _word(words, _skip(words, at - 1, _FILLERS.union(NUMBER_WORDS[1:]), -1))
            after = _word(words, at + 1)
            if before in _COLLECTIVE or before in _DESCRIBED or after in _LETTERS or (
                    before == "one" and _word(words, at - 1) != "one"):
                return True
    return False


def is_no_answer(text: str) -> bool:
    """Whether a text denies, doubts or takes back what it says, outside the name of an object."""
    for match in _KEY.finditer(text):
        if (match[1] or "").lower().startswith(_DESCRIPTIONS):
            text = text.replace(match[3], " ")
    words = split_words(text)
    words = [word for word, after in zip(words, [*words[1:], ""]) if word[0].isalpha()
             and not (word in ("no", "no.") and after.isdecimal())]
    spoken = f" {' '.join(words)} "
    for phrase in _AFFIRMED:
        spoken = spoken.replace(phrase, " ")
    text = text.replace("\u4e0d\u540c", "")  # "different" is no denial
    return (any(phrase in spoken for phrase in _DENIAL_PHRASES)
            or any(sign in text for sign in _DENIAL_SIGNS)
            or any(word in _DENIALS or word.endswith("n't") or word.startswith(_DENIAL_STEMS)
                   for word in spoken.split()))


def find_key_numbers(text: str) -> set[int]:
    """Image numbers that the JSON keys of a text give, UNCLEAR among them for "both"; keys that say
    "target" before others.
    """
    by_rank: dict[bool, set[int]] = {True: set(), False: set()}
    for quoted, bare, value in _KEY.findall(text):
        key = "".join(filter(str.isalpha, (quoted or bare).lower()))
        head = key.removesuffix(next((end for end in sorted(_KEY_ENDS, key=len, reverse=True)
                                      if key.endswith(end)), ""))
        target = next((word for word in _TARGETS if head.startswith(word)), "")
        if head.removeprefix(target).removeprefix("in") not in _IMAGE_KEYS and head != "target":
            continue
        words = [word for word in split_words(value) if word.isalnum()]
        numbers = {_read_number(word) or _read_ordinal(word) for word in words} - {None}
        if all(_read_number(word) or _read_ordinal(word) or word in _BESIDE_NUMBERS
               for word in words):
            by_rank[bool(target)] |= numbers
        elif not _COLLECTIVE.isdisjoint(words):
            by_rank[bool(target)].add(UNCLEAR)
    return by_rank[True] or by_rank[False]


def find_image_numbers(text: str, count: int = 0) -> set[int]:
    """Numbers (from 1) of the images that a text names, UNCLEAR among them for one without a
    number.

    As in {"target": 2}, "image 3", "Picture (3)", "image two", "3rd image", "the third photo". A
    JSON key goes before the words in its braces. count: of the images, for "the last image".
    """
    keys = find_key_numbers(text)
    if keys and "{" in text:
        text = f"{text[:text.find('{')]} {text[text.rfind('}') + 1:]}"
    words = split_words(text)
    for at in range(1, len(words)):
        if count and words[at] in _SINGULAR and words[at - 1] in ("last", "final") and (
                _word(words, at - 2) not in ("to", "from", "-") and _word(words, at + 1) != "but"):
            words[at - 1:at + 1] = words[at], str(count)
    names = find_names(words)
    numbers = keys.union(*(numbers for _, numbers in names)) if names else (
        keys | _names_before_boxes(words))
    return numbers | ({UNCLEAR} if _is_unclear(words, bool(numbers)) else set())
