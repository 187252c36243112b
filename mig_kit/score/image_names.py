"""Which image a free text says its box is in, and whether it is an answer at all; every box of the
text is BOX.

Nothing is guessed: a JSON key names the image, else the text names exactly one by its number. A
text that denies, doubts or takes back what it says is no answer. Any string is read; none raises.
"""

import re
from bisect import bisect_left
from typing import NamedTuple

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BOX = "\u25a0"  # stands for a box
UNCLEAR = -1  # an image that is pointed at without its number: "the other image", "both images"
_CHINESE = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341"  # one to ten

_DIGITS = r"(?<!\d)\d{1,3}(?!\d|\.\d|[ -]?(?:st|nd|rd|th)\b)"
_WORD = rf"\b(?:{'|'.join(NUMBER_WORDS)})\b|[{_CHINESE}]"
_ORDINAL = (rf"(?:\b(?:{'|'.join(ORDINALS)})\b|(?<!\d)\d{{1,3}}[ -]?(?:st|nd|rd|th)\b"
            rf"|\u7b2c\s?(?:\d{{1,3}}|[{_CHINESE}]))")
# no picture frame, and no region picture, which MIG-Bench calls the crops of an image
_NOUN = (r"(?<![a-z])(?<!picture )(?<!photo )(?<!region )(?:(?:image|img|picture|pic|photo"
         r"|photograph|frame)s?(?![a-z]| frames?\b)|[\u56fe\u5716\u7167\u753b][\u7247\u50cf]?)")
_SINGULAR = "(?:image|img|picture|pic|photo|photograph|frame)"
_JOIN = (r"['\"`*]?\s?\(?(?:[,/&+|~\u2013\u548c\u6216\u3001-]|\b(?:and|or|plus|to|through|versus"
         r"|vs)\b){1,2}\s?(?:\(|in |the ){0,3}")
_SIGNS = r"[\s:#=*_`'\">}.\u00b0-]{0,8}"
# between "image" and its number
_LABEL = (rf"{_SIGNS}(?:(?:(?:with|at) )?(?:index|idx|number(?:ed)?|num|labell?ed|no|nr|id|n)"
          rf"(?![a-z]){_SIGNS})?")
# between an ordinal and "image"
_FILL = (rf"(?:\s?(?:\b(?:of|the|these|those|given|provided|shown|input)\b|-|{_DIGITS}|{_WORD}"
         r"|[\u5f20\u5f35\u5e45\u4e2a])){0,4}\s?")


def _listed(number: str) -> str:
    """A pattern of one such number, or of several joined ones; "image 2, two dogs" has one."""
    return rf"(?:{number})(?:{_JOIN}(?:{_NOUN}{_LABEL})?(?:{number})){{0,15}}"


_NAME = re.compile("|".join((
    # "image no. 2", "images 1, 2 and 3", "image (2)"
    rf"(?:{_NOUN}|\bfig(?:ure)?\b){_LABEL}(?:{_listed(_DIGITS)}|{_listed(_WORD)}"
    rf"|[(\[{{<]\s?(?:{_DIGITS}|{_WORD})\s?[)\]}}>])(?:{_JOIN}{_DIGITS}){{0,15}}",
    # "images (1, 2)", "image": [1, 2], "no. 2 image"
    rf"(?:images\s?\(|{_NOUN}[\"']?\s?[:=]\s?\[){_listed(_DIGITS)}[)\]]",
    rf"(?:\bno\.?|\bnumber|#)\s?{_DIGITS} {_NOUN}",
    # "the first and third of the six images", "the second one", "in the second:"
    rf"{_listed(_ORDINAL)}{_FILL}(?:{_NOUN}|\bone\b(?! from| in| of))",
    rf"\b(?:in|of|on|to) the {_ORDINAL}(?=\s?(?:[^\w\s]|at\b|is\b|\Z))",
    rf"\u7b2c\s?(?:\d{{1,3}}|[{_CHINESE}])[\u5f20\u5f35\u5e45]",
    rf"(?<!to )(?<!from )\b(?:last|final) (?={_SINGULAR}\b(?! but))")))
_ONE_NUMBER = re.compile(rf"{_ORDINAL}|{_DIGITS}|{_WORD}|last|final")
# unlike "First, BOX", which counts boxes
_BEFORE_BOX = re.compile(rf"(?<![\w-])({_ORDINAL})\s?[:-]\s?[\[(]{{0,2}}{BOX}")
# another image than the one with the number
_RELATIVE = re.compile(
    rf"(?<!no )\b(?:an)?other (?:{_SINGULAR}|one)\b"
    rf"|\b(?:last|final|previous|preceding|next|remaining) (?:{_SINGULAR}|one)\b"
    rf"|\b(?:latter|former)\b|\b(?:first|last) (?:{_WORD}) {_NOUN}|\b(?:to|from) (?:the )?last\b"
    rf"|{_NOUN} (?:before|after|following|next to|from the|to the)\b"
    rf"|\b(?:or|and) (?:in )?(?:another|the other|others|the {_ORDINAL})|\betc\b"
    r"|\b(?:every|any)where\b")
# beside a number these only describe
_VAGUE = re.compile(
    rf"\b(?:both|all|each|every|any|some|several|either|most|many|multiple|one)\b{_FILL}"
    rf"(?:{_NOUN}|\bthem\b)|[\u6bcf\u5404\u6709]{_FILL}{_NOUN}"
    r"|\b(?:left|right|leftmost|rightmost|middle|cent(?:er|re)|top|bottom|upper|lower|penultimate"
    rf"|reference|query|original) {_NOUN}|{_NOUN} (?:on the (?:left|right)|[b-h]|i{{2,3}}|i?v|vi)"
    r"\b")

# Denied, doubted or taken back.
_DENIES = re.compile(
    r"n't\b|[?\u2260]|!=|[\u4e0d\u6ca1\u6c92\u65e0\u7121\u672a\u9519\u731c]|\u53ef\u80fd"
    r"|\u4e5f\u8bb8|\u5927\u6982|\u6216\u8bb8|\u5982\u679c|\u5047\u8bbe|\u66f4\u6b63|\u64a4\u56de"
    r"|\bno\b(?!\.?\s?\d)|\b(?:not|never|none|neither|nor|cannot|nothing|nobody|nowhere|elsewhere"
    r"|nope|nil|absen(?:t|ce)|lack(?:s|ing)?|gone|hardly|unable|impossible|invisible|unseen|except"
    r"|unlike|either|maybe|perhaps|likely|might|may|could|unsure|unclear|unknown|unlikely"
    r"|apparently|chance|if|whether|unless|example|placeholder|dummy|errors?|false|invalid|oops"
    r"|sorry|wait|somewhere|hmm|nevermind|nonexistent|non.existent)\b"
    r"|\b(?:exclud|reject|fail|doubt|guess|random|arbitrar|tentativ|speculat|suppos|assum|hypothe"
    r"|(?:im)?probab|potential|possib|presum|conceivab|arguab|plausib|questionab|uncertain|hesitat"
    r"|suspect|seem|refus|declin|pretend|wrong|incorrect|mistak|erroneous|inaccura|correction"
    r"|retract|withdr|cancel|discard|disregard|ignor|apolog|reconsider|revis|rethink|hallucinat)"
    r"|\b(?:(?:is|are|was|be) missing|missing (?:from|in)|rul(?:e|ed|ing) out|other than|apart from"
    r"|(?:or )?rather|instead of|(?:anywhere|all|any|every image) but|used to be|(?:hard|difficult)"
    r" to|(?:would|should) have|had (?:it|there|been)|were it|forget (?:that|it)"
    r"|(?:take|scratch|strike) (?:that|it|this)|made (?:that |it )?up|on (?:second|reflection)"
    r"|hold on|try again|my mind|my bad|in my opinion|i think|i believe|i'd say|i would say"
    r"|as far as|appears to be|it looks like|looks (?:like it|empty)|or so|let's say|for instance"
    r"|low confidence|confidence[\"': ]*low|without it)\b")
_AFFIRMED = re.compile(r"\bnot only\b|\bno other\b|\b(?:no|without a?) ?doubt\b|\u4e0d\u540c")

# The name of an object may hold any word: {"label": "man without hat"}.
_DESCRIPTION = re.compile(
    r"[\"'](?:label|name|object|class|category|caption|phrase|text|desc|ref|reason|think)\w*[\"']"
    r"\s?:\s?(\"[^\"]{0,400}\"|'[^']{0,400}')", re.IGNORECASE)
_KEY = re.compile(
    r"(?:[\"']|(?<=[{,])\s?)((?:target|answer|correct|predicted|selected|result)[\s_-]?)?"
    r"(?:in[\s_-]?)?((?:image|img|picture|photo|frame)s?(?:[\s_-]?(?:ids?|idx|index|number|num|no"
    r"|name))?|(?<=target))[\"']?\s?[:=]\s?"
    r"(\[[^\[\]]{0,80}\]|\"[^\"]{0,400}\"|'[^']{0,400}'|[^,{}\[\]\"'\n]{1,40})", re.IGNORECASE)
_LETTERS = re.compile(r"[^\W\d_]+")
_BESIDE_NUMBERS = frozenset("image images img picture pictures photo photos photograph frame "
                            "frames the number no and or jpg jpeg png \u56fe \u56fe\u7247".split())


class Name(NamedTuple):
    """A place where a text names an image, or several joined ones, by their numbers."""

    start: int
    end: int
    numbers: set[int]


def _to_number(word: str) -> int:
    """The number of "2", "two", "2nd", "second" or of a Chinese one; 0 for none."""
    for words in (ORDINALS, NUMBER_WORDS):
        if word in words:
            return words.index(word) + 1
    digits = re.search(r"\d+", word)
    last = word[-1:]
    return int(digits[0]) if digits else _CHINESE.index(last) + 1 if last in _CHINESE else 0


def find_names(text: str, count: int = 0) -> list[Name]:
    """Every name of an image in a text, in order: "image (2)", "the first and third image". count:
    of the images, for "the last image".
    """
    names = []
    for match in _NAME.finditer(text.lower()):
        # of "second of six images" the ordinal counts
        words = re.findall(_ORDINAL, match[0]) or _ONE_NUMBER.findall(match[0])
        numbers = {count if word in ("last", "final") else _to_number(word) for word in words}
        if numbers := numbers - {0}:
            names.append(Name(*match.span(), numbers))
    return names


def find_images_of_boxes(text: str) -> list[set[int]]:
    """For every BOX of a text, in its order, the numbers of the image named last before it.

    In a sentence whose first box stands before its first name, the names follow their boxes.
    """
    names, numbers_by_box, start = find_names(text), [], 0
    places = [name.start for name in names]
    for sentence in re.split(r"(?<=[.!?])(?<![Nn]o\.)(?=\s|\Z)|(?<=[;\n\u3002])", text):
        end = start + len(sentence)
        boxes = [place for place in range(start, end) if text[place] == BOX]
        first, behind = bisect_left(places, start), bisect_left(places, end)
        follow = bool(boxes) and first < behind and boxes[0] < places[first]
        for box in boxes:
            at = bisect_left(places, box)  # the first name after the box
            chosen = at if follow and at < behind else max(at - 1, 0)
            numbers_by_box.append(names[chosen].numbers if names else set())
        start = end
    return numbers_by_box


def is_no_answer(text: str) -> bool:
    """Whether a text denies, doubts or takes back what it says, outside the name of an object."""
    text = _DESCRIPTION.sub(" ", text).lower()
    return bool(_DENIES.search(_AFFIRMED.sub(" ", text)))


def find_key_numbers(text: str) -> set[int]:
    """Image numbers that the JSON keys of a text give, UNCLEAR among them for "both"; keys that say
    "target" before others.
    """
    by_rank: dict[bool, set[int]] = {True: set(), False: set()}
    for target, key, value in _KEY.findall(text):
        value = value.lower()
        numbers = {_to_number(word) for word in _ONE_NUMBER.findall(value)} - {0}
        if re.search(r"\b(?:both|all|each|every|any)\b", value):
            numbers = {UNCLEAR}
        elif not _BESIDE_NUMBERS.issuperset(_LETTERS.findall(_ONE_NUMBER.sub(" ", value))):
            continue  # a number in "kitchen 2.jpg" is part of a file's name
        by_rank[bool(target or not key)] |= numbers
    return by_rank[True] or by_rank[False]


def find_image_numbers(text: str, count: int = 0) -> set[int]:
    """Numbers (from 1) of the images that a text names, UNCLEAR among them for one without a
    number.

    As in {"target": 2}, "image 3", "Picture (3)", "image two", "3rd image", "the third photo". A
    JSON key goes before the words in its braces. count: as of `find_names`.
    """
    keys = find_key_numbers(text)
    if keys and "{" in text:
        text = f"{text[:text.find('{')]} {text[text.rfind('}') + 1:]}"
    text = text.lower()
    names = find_names(text, count)
    numbers = keys.union(*(name.numbers for name in names))
    if not names:
        numbers |= {_to_number(word) for word in _BEFORE_BOX.findall(text)}
    if count:
        text = re.sub(rf"(?<!to )(?<!from )\b(?:last|final) (?={_SINGULAR}\b)", "", text)
    is_unclear = _RELATIVE.search(text) or not numbers and _VAGUE.search(text)
    return numbers | ({UNCLEAR} if is_unclear else set())
