"""Which images a free text names: "image 2", "img_2", "the second image", also in Chinese.

Every box of the text is BOX. Nothing is guessed: "the other image" names none. No string raises.
"""

import re
from bisect import bisect_left
from typing import NamedTuple

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
BOX = "\u25a0"  # stands for a box
_CHINESE = "一二三四五六七八九十"

# Repetitions are bounded, so that no text takes long.
_NOUN = r"(?<![a-z])(?:(?:image|img|picture|photo|frame)s?|\u56fe[\u7247\u50cf]?)"
_MARKS = r"[ \"'`*_#:=(\[{<-]{0,6}"
_LABEL = rf"{_MARKS}(?:(?:no|number|id|idx|index)(?![a-z])\.?{_MARKS})?"
_DIGITS = r"\d{1,3}(?!\d|\.\d|%|(?:st|nd|rd|th)\b)"
_ORDINAL = rf"(?:\b(?:{'|'.join(ORDINALS)})|(?<!\d)\d{{1,3}}(?:st|nd|rd|th))\b"
_JOIN = r"\s?\(?(?:[,/&+~\u548c\u6216-]|\b(?:and|or|to)\b)\s?(?:in )?(?:the )?"
_NAME = re.compile(  # "images 1, 2 and 3" and "the first or the third image" are one name
    rf"{_NOUN}{_LABEL}{_DIGITS}(?:{_JOIN}(?:{_NOUN}{_LABEL})?{_DIGITS}){{0,9}}"
    rf"|{_ORDINAL}(?:{_JOIN}{_ORDINAL}){{0,9}}[ -]{{0,2}}{_NOUN}"
    rf"|\u7b2c(?:\d{{1,3}}|[{_CHINESE}])\u5f20")
_NUMBER = re.compile(rf"\d+|{'|'.join(ORDINALS)}|[{_CHINESE}]")
_KEY = re.compile(
    r"[\"'](?:target_?)?(?:image|img)(?:_?(?:id|idx|index|number|no))?[\"']\s?:\s?"
    r"(\[[^\]]{0,80}\]|\"[^\"]{0,80}\"|'[^']{0,80}'|[^\s,}]{1,20})")


class Name(NamedTuple):
    """A place where a text names an image, or several joined ones, by their numbers."""

    start: int
    end: int
    numbers: set[int]


def _to_number(word: str) -> int:
    if word.isdecimal():
        return int(word)
    return (ORDINALS.index(word) if word in ORDINALS else _CHINESE.index(word)) + 1


def find_names(text: str) -> list[Name]:
    """Every name of an image in a text, in order; the numbers are from 1."""
    return [Name(*match.span(), set(map(_to_number, _NUMBER.findall(match[0]))))
            for match in _NAME.finditer(text.lower())]


def find_images_of_boxes(text: str) -> list[set[int]]:
    """For every BOX of a text, the numbers of the last image that is named before it.

    In a sentence whose first box stands before its first name, each box belongs to the next name.
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


def find_key_numbers(text: str) -> set[int]:
    """The image numbers that JSON keys give: {"image": 2}, {"img_idx": [1, 2]}."""
    values = [value.strip("\"'") for value in _KEY.findall(text.lower())]
    return {number for value in values for name in find_names(f"image {value} image")
            for number in name.numbers}


def find_image_numbers(text: str) -> set[int]:
    """The numbers (from 1) of all images that a text names; a JSON key goes before its words."""
    numbers = find_key_numbers(text)
    if numbers:
        text = f"{text.partition('{')[0]} {text.rpartition('}')[2]}"
    return numbers.union(*(name.numbers for name in find_names(text)))


# A strict answer may name its image in any wording. "image three", "the last" and "3:" are first
# rewritten as "image 3". Other words about an image give NOT_READ, as they name one: "image C".
NOT_READ = 0  # in place of a number
_COUNT = rf"(?:\d{{1,3}}|[{_CHINESE}])(?![\d{_CHINESE}])"
_JOINS = "to|through|thru|until|till|plus|versus|vs|as well as|nor|then"
# words of other lists and languages that become "image"
_SYNONYM = re.compile(r"(?<![a-z])(?:pic|photograph|screenshot|snapshot|bild|imagen|imagem|foto"
                      r"|immagine|画像|이미지)(s?)(?![a-z])")
_NUMBERED = re.compile(  # images only in front of a number or a letter
    rf"(?<![a-z])(?:fig(?:ure)?|view|panel|slide|shot|scene|page|camera)s?\b\.?(?={_LABEL}"
    rf"(?:-?\d|(?:{'|'.join(NUMBER_WORDS)}|[b-h]|[ivx]{{1,4}})\b|a(?=[^\w\s])))")
_PLACE = re.compile(  # "the third image", "the second to last one"
    rf"(?:(?P<back>next|penultimate|{_ORDINAL})(?:(?<=penultimate)|[ -](?:to[ -])?(?:the )?last)\b"
    rf"|(?P<word>{_ORDINAL}|\blast\b(?! but)|\bfinal(?= one|[ -]?{_NOUN})))"
    r"(?:(?: (?:input|given|provided|target|original|of (?:the|these|those|all)(?: \w{1,12})?))?"
    rf"[ -]{{0,2}}{_NOUN}|(?: one)?"
    rf"(?=[ -]?(?:[^\w\s]|$|\n)| ?\b(?:is|has|shows|contains|and|or|{_JOINS})\b))")
_CHINESE_PLACE = re.compile(  # the same, and "image 3"
    rf"(?:(?P<last>最后一?)|(?P<back>倒数)?第?(?P<count>(?<=第){_COUNT}))(?:[张張幅帧副]\s?"
    r"(?:[图圖][片像]?|照片)?|个?\s?(?:[图圖][片像]?|照片)|个?(?=\W|$))"
    rf"|[图圖][片像]?\s?(?P<number>{_COUNT})")
# a number alone in front of a box or behind it: "3: BOX"
_ALONE = (rf"(?:(?:in|the|no|nr|number)\b\.?)?[^\w-]{{0,9}}(-?\d{{1,3}}"
          rf"|(?:{'|'.join(NUMBER_WORDS)})\b)(?!\.\d)")
_HEADING = re.compile(rf"^(?:[^\w{BOX}-]|- )*{_ALONE}\W{{0,9}}{BOX}"
                      rf"|{BOX}[^\w-]{{0,9}}{_ALONE}\W{{0,9}}$")
_SPOKEN_KEY = re.compile(  # of JSON: the value of "target_image" and the like
    r"[\"'](?:(?:target|answer|selected|chosen|which|in|final|predicted|correct|result|output)"
    r"[ _-]?)?(?:image|img|picture|pic|photo|frame|fig(?:ure)?)s?"
    r"(?:[ _-]?(?:id|idx|index|number|num|no|nr)s?)?[\"']\s?:\s?"
    r"(\[[^\]]{0,80}\]|\"[^\"]{0,80}\"|'[^']{0,80}'|\{[^}]{0,80}|[^\s,}{]{1,20})")

# What speaks of images without a number.
_ASIDE = re.compile(  # numbers and words that say nothing about images
    r"[\"']?\b\w{0,12}(?:score|conf|prob|count|size|width|height|total|num_|area|category|class|label"
    r"|object|box|region|rotation|angle|rank)\w{0,12}[\"'*]*[ :=#]{0,3}"
    r"(?:-?[\d.]+%?|\"[^\"]*\"|'[^']*'|\[[^\]]*\])"
    r"|[\"'](?:name|desc\w{0,12}|caption|text|reason\w{0,9}|type|colou?r)[\"']\s?:\s?\"[^\"]*\""
    r"|\b0(?:\.0)?\s?(?:-|to|and|,)\s?1(?:000|\.0)?\b|^\s*1[.)] (?=[a-z])")
# words beside "image" that say nothing about which one
_BEFORE = frozenset("the this that a an same target source region given input provided in of on "
                    "current original whole entire per".split()) | {""}
_AFTER = frozenset("at is are was has have shows contains the it its we you there and as by box "
                   "bbox bounding coordinates located location frame frames".split()) | {""}
_BARE = re.compile(  # "image" with the words before and after it
    r"(?:([^\W\d_]{1,20})[ _-])?(?<![a-z])(?:image|img|picture|photo)(?![a-z])"
    r"(?:[ _-]*(?:(?:a|i|an) (?!(?:shows|contains|has|is)\b)(?=\w)"
    r"|in the (?:source|target|original)\b|([^\W_]{1,20})))?")
_SEVERAL = re.compile(  # "all images", "both"
    rf"\b(?:all|both|each|every|any|either)(?: (?:of|the|these|those|single"
    rf"|\w{{1,12}}(?= {_NOUN}s))){{0,4}}"
    rf" {_NOUN}|\b(?:in|for|(?:{'|'.join(NUMBER_WORDS)}|some) of)"
    r"(?: (?:the|these|those|given|input|\w{1,12}(?= (?:image|picture|photo)s))){0,3}"
    rf" (?:image|img|picture|photo)s(?![a-z])|(?:image|img|picture|photo)s\W{{0,9}}{BOX}"
    rf"|^\W{{0,9}}(?:both|all|each|every)(?: one| of \w{{1,12}})?\W{{0,9}}{BOX}")
_OTHER = re.compile(  # "the other image", "none of the images", "after image 1", "image 1b"
    rf"\b(?:after|before|following|preceding|next to|opposite(?: to)?|beside|other than|except"
    rf"|besides|but|not(?: in| on)?) (?:the )?(?:{_NOUN}|{_ORDINAL})"
    rf"|{_NOUN}{_LABEL}\d+(?:\+|[b-wyz]\b| ?(?:on)?wards\b| \d+\s?:)"
    rf"|\b(?:other|another|next|previous|following|preceding|opposite|neither|no) {_NOUN}(?<!s)\b"
    rf"|\bnone of\b[\w ]{{1,20}}{_NOUN}|{_NOUN}[ \d]{{0,5}} from (?:the )?(?:end|last|back|right)"
    rf"|\b(?:other|another|latter|former)(?: ones?)?\b(?=\W{{0,9}}$|\W{{0,9}}{BOX})|\blast but\b"
    rf"|第|另|其[他它]")
_PLURAL = re.compile(r"(?:image|img|picture|photo|frame)s")
_UNCLEAR = re.compile(  # a letter, "the former", "top left", a number in JSON
    rf"^\W{{0,9}}(?:(?:option|choice|letter) )?(?:[a-h]|[ivx]{{1,4}})\W{{0,9}}{BOX}"
    rf"|{BOX}\W{{0,9}}[a-h]\W{{0,9}}$"
    rf"|\b(?:other|latter|former|both|neither|none)(?: ones?| of \w{{1,12}})?\b(?=\W{{0,9}}$"
    rf"|\W{{0,9}}{BOX})"
    r"|^\W{0,9}(?:(?:in|on) )?(?:the )?(?:far )?(?:left|right|top|bottom|upper|lower|middle"
    rf"|cent(?:er|re))(?:most)?(?: ones?)?\W{{0,9}}{BOX}"
    rf"|{_ORDINAL}(?= (?:of|in|from|to|with|on|at|by)\b)"
    r"|(?:^|[\n{,;|])[\s\"'*]{0,9}(?:image|img|picture|photo)[\s\"'*]{0,9}[:=][\s\"'*]{0,9}[^\W_]"
    r"|[\"']\s?:\s?[\"']?-?\d{1,3}[\"']?\s?[,}\]\n]|^\W{0,9}(?:it is )?(?:in )?the one (?:on|at"
    r"|to)\b|(?:image|img|picture|photo)[\"'*:= ]{0,3}\?|[图圖张張幅帧枚番]|照片")
_LONE_NUMBER = re.compile(r"(?<![\w.])-?\d{1,3}(?![\w%]|\.\d)")


def find_spoken_images(text: str, count: int = 0) -> set[int]:
    """The numbers (from 1) of the images that an answer names, NOT_READ for one without a number.

    A JSON key goes before the words in its braces. count: of the question's images, 0 if unknown.
    """
    text = text.lower()
    values = [value.strip("\"' ") for value in _SPOKEN_KEY.findall(text)]
    if not values:
        return _find_in_words(text, count)
    outside = f"{text.partition('{')[0]} {text.rpartition('}')[2]}"
    return {number for value in values
            for number in _find_in_words(f"image {value} image", count) or {NOT_READ}}.union(
                *(name.numbers for name in find_names(_write_numbers(outside, count))))


def _find_in_words(text: str, count: int) -> set[int]:
    text = _write_numbers(text, count)
    names = find_names(text)
    numbers = {number for name in names for number in name.numbers}
    if count == 1:
        return numbers
    if len(numbers) < 2 and (_OTHER.search(text) or any(
            len(name.numbers) == 1 and _PLURAL.match(text, name.start) for name in names)):
        numbers.add(NOT_READ)
    if numbers:
        return numbers
    text = _ASIDE.sub(" ", text)
    if _SEVERAL.search(text):
        return set(range(1, max(count, 2) + 1))
    is_spoken_of = _UNCLEAR.search(text) or any(
        before not in _BEFORE or after not in _AFTER for before, after in _BARE.findall(text)) or (
        any(int(number) <= (count or 99) for number in _LONE_NUMBER.findall(text)))
    return {NOT_READ} if is_spoken_of else set()


def _write_numbers(text: str, count: int) -> str:
    """The text with "image 3" in place of what means it, "image 0" where the number is none."""
    def number_of(word: str) -> int:
        if digits := re.match(r"-?\d+", word):
            return max(int(digits[0]), NOT_READ)
        row = next(row for row in (NUMBER_WORDS, ORDINALS, _CHINESE) if word in row)
        return row.index(word) + 1

    def write_place(match: re.Match) -> str:
        word = match["word"] or match["back"]
        if match["word"]:
            number = count if word in ("last", "final") else number_of(word)
        else:
            number = count - (1 if word in ("next", "penultimate") else number_of(word) - 1)
        return f"image {max(number, NOT_READ)} "

    def write_chinese(match: re.Match) -> str:
        number = count if match["last"] else number_of(match["count"] or match["number"])
        return f" image {count + 1 - number if match['back'] else number} "

    def write_heading(match: re.Match) -> str:
        start = BOX if match[2] else ""
        return f"{start}image {number_of(match[1] or match[2])} {'' if start else BOX}"

    text = re.sub("[\u2010-\u2015]", "-", text)
    text = re.sub(r"[(\[]\s?\d+[ -]?(?:based|indexed|(?:-|to)\s?\d+)[)\]](?=\W{0,3}[:=])", " ",
                  text)  # "index (1-based):", "(1-4):"
    text = re.sub(rf"({_ORDINAL}|\blast) (?:fig(?:ure)?|view|panel|shot|scene|slide|page|camera"
                  r"|input|candidate|crop)\b", r"\1 image", text)
    text = _CHINESE_PLACE.sub(write_chinese, text)
    text = _NUMBERED.sub("image", _SYNONYM.sub(r"image\1", text))
    word = rf"({'|'.join(NUMBER_WORDS)})\b(?! (?:can|may|could|of the)\b)"
    for pattern in (rf"({_NOUN}{_LABEL}){word}",  # "image three", "1 and three"
                    rf"(\d[ ,/&+-]{{1,3}}(?:(?:and|or|{_JOINS}) )?){word}"):
        text = re.sub(pattern, lambda match: f"{match[1]}{number_of(match[2])}", text)
    text = _PLACE.sub(write_place, text)
    text = re.sub(rf"({_NOUN}[\"'`*_#:=(\[{{< ]{{1,6}})-(?=\d)", r"\g<1>0 : ", text)
    text = re.sub(rf"({_NOUN}{_LABEL}\d+)\.0+(?!\d)", r"\1", text)
    text = re.sub(rf"({_NOUN})[\"'*]* (?:is|was)[ :\"'*]+(?:(?:number|no\.?) )?(?=\d|image)",
                  r"\1 ", text)  # "the image is number 3"
    text = re.sub(rf"(?<![\d/])(\d{{1,3}})\s?(?:/|(?:out )?of)\s?(?:the )?{count}(?![\d/.])",
                  r"\1 ", text)  # "image 2 of 3"
    text = re.sub(rf"(\d)\s*(?:\b(?:{_JOINS})\b|[;|至到与及]|\.\.+|…)\s*(?:the )?"
                  rf"(?=(?:{_NOUN}{_LABEL})?\d)", r"\1 and ", text)
    return _HEADING.sub(write_heading, text)
