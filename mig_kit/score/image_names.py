"""Which images a text names: "image 2", "img_2", "the second picture". No string raises."""

import re
from typing import NamedTuple

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
            "tenth")

# Repetitions are bounded, so that no text takes long.
NOUN = r"(?<![a-z])(?:(?:image|img|picture|photo|frame)s?)"
_MARKS = r"[ \"'`*_#:=(\[{<-]{0,6}"
_LABEL = rf"{_MARKS}(?:(?:no|number|id|idx|index)(?![a-z])\.?{_MARKS})?"
_DIGITS = r"\d{1,3}(?!\d|\.\d|%|(?:st|nd|rd|th)\b|[a-z])"
_ORDINAL = rf"(?:\b(?:{'|'.join(ORDINALS)})|(?<!\d)\d{{1,3}}(?:st|nd|rd|th))\b"
_JOIN = r"\s?\(?(?:[,/&+~-]|\b(?:and|or|to)\b)\s?(?:in )?(?:the )?"
_NAME = re.compile(  # "images 1, 2 and 3" and "the first or the third image" are one name
    rf"{NOUN}{_LABEL}{_DIGITS}(?:{_JOIN}(?:{NOUN}{_LABEL})?{_DIGITS}){{0,9}}"
    rf"|{_ORDINAL}(?:{_JOIN}{_ORDINAL}){{0,9}}[ -]{{0,2}}{NOUN}")
_NUMBER = re.compile(rf"\d+|{'|'.join(ORDINALS)}")


class Name(NamedTuple):
    """A place where a text names an image, or several joined ones, by their numbers."""

    start: int
    end: int
    numbers: set[int]


def find_names(text: str) -> list[Name]:
    """Every name of an image in a text, in order; the numbers are from 1."""
    return [Name(*match.span(), {int(word) if word.isdecimal() else ORDINALS.index(word) + 1
                                 for word in _NUMBER.findall(match[0])})
            for match in _NAME.finditer(text.lower())]
