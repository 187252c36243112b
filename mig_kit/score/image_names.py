"""Which images a free text names: "image 2", "img_2", "the second image", also in Chinese.

Every box of the text is BOX. Nothing is guessed: "the other image" names none. Any string is read;
none raises.
"""

import re
from bisect import bisect_left
from typing import NamedTuple

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")
BOX = "\u25a0"  # stands for a box
_CHINESE = "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341"  # one to ten

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
    """For every BOX of a text, the numbers of the image named last before it.

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
