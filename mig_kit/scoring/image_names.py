"""Which image a free text says its box is in, on texts in which every box is BOX.

Nothing is guessed: a JSON key names the image, else the text names exactly one; a text that denies,
doubts or takes back what it says is no answer.
"""

import re
from bisect import bisect_left

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BOX = "\u25a0"  # stands for a box
UNCLEAR = -1  # an image that is pointed at without its number: "the other image", "both images"

_CHINESE = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341"  # one to ten
_ORDINAL = rf"(?:\b(?:{'|'.join(ORDINALS)})\b|(?<!\d)\d{{1,3}}[ -]?(?:st|nd|rd|th)\b)"
_DIGITS = r"(?<!\d)\d{1,3}(?![\da-z%]|\.\d)"
_NUMBER = rf"(?:{_DIGITS}|\b(?:{'|'.join(NUMBER_WORDS)})\b(?! (?:can|could|may|might|sees?)\b))"
_ANY = re.compile(rf"{_ORDINAL}|{_NUMBER}|[{_CHINESE}]", re.IGNORECASE)
# Not a picture frame, and not a region picture, which MIG-Bench calls the crops of an image.
_NOUN = (r"(?<![a-z])(?<!picture[ -])(?<!photo[ -])(?<!region[ -])"
         r"(?:image|img|picture|pic|photo(?:graph)?|frame)s?(?![a-z])(?! frame)")
_LABEL = r"[\s_-]{0,4}(?:index|idx|number|num|no\b\.?|id)?[\s\"'`:#=*_>}-]{0,12}"
_AND = (r"\s{0,4}(?:[,/&~\u2013-]|\b(?:and|or|to|through|versus|vs\.?)\b)\s{0,4}"
        r"(?:\b(?:or|and|the|in)\s){0,3}")
_NAME = re.compile(
    rf"{_NOUN}{_LABEL}(?P<numbers>{_NUMBER}(?:{_AND}(?:{_NOUN}{_LABEL}{_NUMBER}|{_DIGITS})){{0,9}}"
    rf"|[(\[{{<]\s*{_NUMBER}\s*[)\]}}>])"
    rf"|(?P<ordinals>{_ORDINAL}(?:{_AND}{_ORDINAL}){{0,9}})\s+(?:(?:of the )?{_NOUN}"
    r"|one\b(?! from| in| of))"
    rf"|\b(?:no\.?|number|#) ?(?P<number>\d{{1,3}}) {_NOUN}"
    rf"|\b(?:in|of|on|to) the (?P<lone>{_ORDINAL})(?=\s*(?:[^\w\s]|at\b|is\b|$))"
    rf"|\u7b2c\s*(?P<counted>[{_CHINESE}]|\d{{1,3}})\s*[\u5f20\u5e45\u4e2a]?\s*[\u56fe\u7167]"
    rf"|[\u56fe\u7167][\u7247\u50cf]?\s*(?P<chinese>[{_CHINESE}]|\d{{1,3}}(?!\d))", re.IGNORECASE)
# "second: [...]", where nothing else names an image; "First, [...], then [...]" counts boxes
_BEFORE_BOX = re.compile(rf"(?<![\w-])(?P<lone>{_ORDINAL})(?=\s*[:-]\s*[\[(]?{BOX})", re.IGNORECASE)
_LAST = re.compile(rf"(?<!to )(?<!from )(?<![\w-])(?:last|final) {_NOUN}(?! but)", re.IGNORECASE)
# without a number: beside a name it is another image, but "of all images" is not
_RELATIVE = re.compile(
    rf"\b(?:(?<!no )other|another|latter|former|last|final|previous|preceding|next|remaining) "
    rf"(?:{_NOUN}(?<!s)|one\b)|\bthe (?:latter|former)\b|\bfirst {_NUMBER} {_NOUN}"
    rf"|{_NOUN}(?<=s) (?:{'|'.join(NUMBER_WORDS)})\b|{_ORDINAL}[ -](?:to|from)[ -](?:the[ -])?last"
    rf"|{_NOUN} (?:from the (?:right|end|last|back)|before|after|next to|following)\b",
    re.IGNORECASE)
_COLLECTIVE = re.compile(
    rf"\b(?:both|all|each|every|any|some|several|either|most|one of)\b"
    rf"(?: (?:of|the|these|those|{_NUMBER})){{0,5}} (?:{_NOUN}|them\b)", re.IGNORECASE)

# The name of an object may hold any word: {"label": "man without hat"}.
_LABEL_VALUE = re.compile(
    r"[\"'](?:label|name|object|class|category|caption|phrase|text|desc\w*|ref\w*|reason\w*"
    r"|think\w*)[\"']\s*:\s*(?:\"[^\"]*\"|'[^']*')", re.IGNORECASE)
_NO_ANSWER = re.compile(
    # denied
    r"n't\b|\b(?:not(?! only)|never|none|neither|nor|cannot|nothing|nobody|nowhere|elsewhere|n/a"
    r"|no(?! (?:other|doubt)| ?\.? ?\d)|absent|absence|lack(?:s|ing)?|devoid|gone|vanished|hardly"
    r"|(?:is|are|was|be) missing|missing (?:from|in)|unable|impossible|fail(?:s|ed)?|invisible"
    r"|exclud\w+|except|reject\w*|rul\w+ out|eliminat\w+|unlike|other than|apart from|rather than"
    r"|(?:any\w*|all|every|each)(?: \w+)? but|instead of|used to be"
    # in doubt, or only supposed
    r"|either|maybe|perhaps|possibly|probably|presumably|alternatively|likely|unlikely|might|may"
    r"|could be|un(?:sure|certain|clear|known)|doubt\w*|guess\w*|random\w*|tentativ\w+|speculat\w+"
    r"|(?:hard|difficult) to|if|whether|unless|suppos\w+|assum\w+|hypothetical\w*|would have"
    r"|had (?:it|there)|were it|for instance|example|placeholder"
    # taken back
    r"|wrong\w*|incorrect\w*|mistake\w*|errors?|erroneous\w*|false|invalid|inaccurate|correction"
    r"|retract\w*|withdr[ae]w\w*|cancel\w*|discard\w*|disregard\w*|ignor\w+|(?:scratch|strike) that"
    r"|never ?mind|take (?:that|it|this) back|made (?:that|it|this) up|kidding|sorry|oops"
    r"|apolog\w+|on (?:second thoughts?|reflection)|reconsider\w*|revis\w+|rethink|wait|hold on"
    r"|try again|chang\w+ my mind)\b(?<!no doubt)|\?|\u2260|!="
    # the same in Chinese; "different" is no denial
    r"|\u4e0d(?!\u540c)|[\u6ca1\u6c92\u65e0\u7121\u672a\u9519\u731c]|\u53ef\u80fd|\u4e5f\u8bb8"
    r"|\u5927\u6982|\u6216\u8bb8|\u5982\u679c|\u5047\u8bbe|\u66f4\u6b63|\u64a4\u56de",
    re.IGNORECASE)

# Keys of JSON: {"image": 2}, {"target_image_id": [2]}, {image: "second"}.
_KEY = re.compile(r"(?:[\"']([\w -]{1,40})[\"']|(?<=[{,])\s*(\w{1,40}))\s*[:=]\s*"
                  r"(\[[^\]]{0,40}\]|\"[^\"]{0,40}\"|'[^']{0,40}'|[^,}\]\n]{0,40})")
_IMAGE_KEY = re.compile(
    r"(target|answer|correct|predicted|selected|result)?(?:in)?(?:image|img|picture|photo|frame)"
    r"(?:id|idx|index|number|num|no|name)?|(target)(?:id|idx|index|number)?", re.I)
_BESIDE_NUMBERS = re.compile(rf"{_NOUN}|\b(?:the|number|no|one|and|or)\b|\.(?:jpe?g|png)\b|[\W_]",
                             re.IGNORECASE)


def _find_numbers(text: str) -> set[int]:
    """The numbers that "2", "2nd", "second", "two" or their Chinese numeral say in a text."""
    numbers = set()
    for word in map(str.lower, _ANY.findall(text)):
        places = [words.index(word) + 1 for words in (ORDINALS, NUMBER_WORDS, _CHINESE)
                  if word in words]
        numbers.add(places[0] if places else int(re.match(r"\d+", word)[0]))
    return numbers


def _find_names(text: str, pattern: re.Pattern = _NAME) -> list[tuple[int, set[int]]]:
    """(place, numbers) of every name of an image, or of several joined ones: "image 1 or 2"."""
    return [(match.start(), _find_numbers(match[match.lastgroup]))
            for match in pattern.finditer(text)]


def is_no_answer(text: str) -> bool:
    """Whether a text denies, doubts or takes back what it says, outside the name of an object."""
    return bool(_NO_ANSWER.search(_LABEL_VALUE.sub(" ", text)))


def find_key_numbers(text: str) -> set[int]:
    """Image numbers that the JSON keys of a text give; keys that say "target" before others."""
    by_rank: dict[bool, set[int]] = {True: set(), False: set()}
    for quoted, bare, value in _KEY.findall(text):
        key = _IMAGE_KEY.fullmatch(re.sub(r"[\s_-]", "", quoted or bare))
        if key and not _BESIDE_NUMBERS.sub("", _ANY.sub("", value)):
            by_rank[bool(key[1] or key[2])] |= _find_numbers(value)
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
    text = _LAST.sub(f"image {count}", text) if count else text
    names = _find_names(text) or _find_names(text, _BEFORE_BOX)
    numbers = keys.union(*(found for _, found in names))
    is_unclear = _RELATIVE.search(text) or not numbers and _COLLECTIVE.search(text)
    return numbers | {UNCLEAR} if is_unclear else numbers


def find_images_of_boxes(text: str) -> list[set[int]]:
    """For every BOX of a text, in its order, the numbers of the image named last before it.

    In a sentence whose first box stands before its first name, the names follow their boxes.
    """
    names = _find_names(text)
    starts = [start for start, _ in names]
    numbers_by_box = []
    for sentence in re.finditer(r"(?:[^.!?;\n\u3002]|[.!?](?!\s|$))+", text):
        start, end = sentence.span()
        places = [start + match.start() for match in re.finditer(BOX, sentence[0])]
        first, behind = bisect_left(starts, start), bisect_left(starts, end)
        follow = bool(places) and first < behind and places[0] < starts[first]
        for place in places:
            at = bisect_left(starts, place)  # the first name after the box
            chosen = at if follow and at < behind else max(at - 1, 0)
            numbers_by_box.append(names[chosen][1] if names else set())
    return numbers_by_box
