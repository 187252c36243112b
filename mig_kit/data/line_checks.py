"""What is wrong with a line of own data: types and keys by pydantic, its meaning by hand.

null is an absent value, as pandas and datasets write it, and 2.0 is 2.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size
from mig_kit.data.records import Problem
from mig_kit.image_files import BadImage, open_rgb, read_size, resolve_under_root
from mig_kit.prompts import LETTERS

MAX_SIZES = 100_000  # of images that are kept in memory
LEAVES = "boxes that leave their image"
INVERTED = "boxes with x2 <= x1 or y2 <= y1"
NOT_THERE = "an image that is not there"
ROUNDING = 1e-6  # of a share of the image, as floats write a whole one
# text that a tokenizer reads as a control token, or that stands for an image, a box or a name
TAG = re.compile(
    r"<\|[a-z0-9_]{1,40}\|>|</?(?:image|img|video|audio|bbox|box|ref|ref-object|obj|object|region"
    r"|point|loc|mask|quad|p)(?:[ _-]?\w{1,20})?\s?/?>|<img\b[^<>]{0,300}>", re.IGNORECASE)
CONTROL_TOKEN = re.compile(r"<\|[a-z0-9_]{1,40}\|>")
# an option's own letter or number, as in "B. a dog", "(B) a dog", "2. a dog", or "B" alone
OWN_LETTER = re.compile(r"\s*\(?(?:([A-Za-z]|\d\d?)[.):](?!\d)\s*|([A-Ha-h])\s*$)")


Text = Annotated[str, Field(pattern=r"\S")]
Word = Annotated[str, Field(pattern=r"^[^\pC\p{Zl}\p{Zp}]+$")]  # printable
ImagePath = Annotated[str, Field(min_length=1, max_length=4096)]
ImageNumber = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(allow_inf_nan=False, gt=-1e9, lt=1e9)]
BoxNumbers = tuple[Number, Number, Number, Number]


class OwnLine(BaseModel):
    """A line of own data; notebooks/guide/own_data.md explains its keys."""

    model_config = ConfigDict(extra="forbid")
    images: Annotated[list[ImagePath], Field(min_length=1, max_length=64)]
    question: Text
    image: ImageNumber | None = None
    box: BoxNumbers | None = None
    boxes: Annotated[list[BoxNumbers], Field(min_length=1)] | None = None
    coordinates: Literal["pixels", "normalized_1000", "normalized_1"] | None = None
    reference: BoxNumbers | None = None
    options: Annotated[list[Text], Field(min_length=2, max_length=len(LETTERS))] | None = None
    letter: Annotated[str, Field(pattern=f"^[{LETTERS}]$")] | None = None
    id: Word = ""
    task: Word = "own"
    reply: Text | None = None

    def places(self) -> list[tuple[str, int, tuple]]:
        """(words, image number, numbers) of every box; the reference is last."""
        if self.boxes is not None:
            places = [(f"'boxes' number {number}", self.image or 1, box)
                      for number, box in enumerate(self.boxes, 1)]
        else:
            places = [("'box'", self.image or 1, self.box)] * (self.box is not None)
        return places + [("'reference'", 1, self.reference)] * (self.reference is not None)


def parse_line(record: dict) -> tuple[OwnLine | None, list[Problem]]:
    """The line, None where types or keys are wrong, and what is wrong but for its image files."""
    try:
        line = OwnLine.model_validate({key: value for key, value in record.items()
                                       if value is not None})
    except ValidationError as error:
        return None, [_describe_error(part) for part in error.errors(include_url=False)]
    return line, _find_problems(line)


def _describe_error(error: dict) -> Problem:
    """pydantic's finding with the key in front."""
    where = " ".join(f"number {part + 1}" if isinstance(part, int) else repr(str(part)[:40])
                     for part in error["loc"])
    return Problem(f"{where}: {error['msg']}")


def _find_problems(line: OwnLine) -> list[Problem]:
    """What types and keys do not show: parts that go together, boxes, options, tags."""
    kinds = [name for name in ("box", "boxes", "options") if getattr(line, name) is not None]
    texts = {"'question'": line.question, **{
        f"'options' number {number}": text for number, text in enumerate(line.options or (), 1)}}
    tags = [(name, tag[0]) for name, text in texts.items() if (tag := TAG.search(text))]
    token = CONTROL_TOKEN.search(line.reply or "")
    named = max(map(int, re.findall(r"\bimage (\d{1,3})\b", line.question, re.IGNORECASE)),
                default=1)
    rules = [
        (len(kinds) == 1, "not one kind of answer", "give one of 'box', 'boxes' and 'options' with "
         f"'letter'; this line has {' and '.join(kinds) or 'none'}"),
        ((line.image is not None) == (line.box is not None or line.boxes is not None),
         "'image' goes with 'box' or 'boxes', and with nothing else", ""),
        ((line.options is None) == (line.letter is None), "'options' and 'letter' go together", ""),
        ((line.coordinates is not None) == bool(line.places()),
         "'coordinates' goes with boxes", "'coordinates' says what boxes are measured in; give it "
         "with boxes, and only with them: pixels, normalized_1000 or normalized_1"),
        (("{ref}" in line.question) == (line.reference is not None),
         "'{ref}' in the question and 'reference' go together; add the one that is missing", ""),
        (not tags, "a tag in a text", f"{tags and tags[0][0]} holds {tags and tags[0][1][:40]}, "
         "which is no word to the model: images stand before the question and are called image 1, "
         "image 2, and {ref} stands for the box 'reference'; take it out"),
        (named <= len(line.images), NOT_THERE, f"'question' names image {named}, but there are "
         f"{len(line.images)} images; the first is image 1"),
        (token is None, "a control token in 'reply'",
         f"'reply' holds {token and token[0]}, which the model reads as a control token")]
    if line.options and line.letter:
        rules += _option_rules(line.options, line.letter)
    for place in line.places():
        rules += _box_rules(*place, line)
    return [Problem(reason, sentence) for is_right, reason, sentence in rules if not is_right]


def _box_rules(words: str, number: int, box: tuple, line: OwnLine) -> list[tuple[bool, str, str]]:
    side = min(box[2] - box[0], box[3] - box[1])
    return [
        (side > 0, INVERTED, f"{words} is {list(box)}: x2 must be greater "
         "than x1 and y2 than y1 (is it x, y, width, height?)"),
        (side <= 0 or side >= 1 or line.coordinates == Coordinates.NORMALIZED_1,
         "boxes less than 1 wide", f"{words} is {list(box)}, less than 1 wide or high in "
         f"'{line.coordinates}'; are the coordinates 'normalized_1'?"),
        (number <= len(line.images), NOT_THERE, f"{words} is in image {number}, "
         f"but there are {len(line.images)} images; the first is number 1")]


def _option_rules(options: list[str], letter: str) -> list[tuple[bool, str, str]]:
    texts, letters = [" ".join(option.split()) for option in options], own_letters(options)
    return [
        (len({*texts}) == len(texts), "the same option twice", "two of the 'options' are the same; "
         "no letter is the correct one"),
        (letter in LETTERS[:len(texts)], "'letter' beyond the options", "'letter' must be that of "
         f"the correct option, A to {LETTERS[len(texts) - 1]}"),
        (letters in ("", LETTERS[:len(texts)]), "options with letters of another order", "the "
         f"options begin with letters or numbers of their own ({texts[0]!r} is option A), so which "
         "one 'letter' or a reply means is unclear; take them out")]


def own_letters(options: list[str]) -> str:
    """The letters or numbers with which the texts of all options begin, "" unless all begin so."""
    matches = [OWN_LETTER.match(option) for option in options]
    return "".join((match[1] or match[2]).upper() for match in matches) if all(matches) else ""


def find_file_problems(line: OwnLine, sizes: list) -> tuple[list[float], list[Problem]]:
    """How far each box reaches, as a share of its image's side, and what is wrong with the files.

    sizes: of the line's images, pixels, or a BadImage.
    """
    problems = [Problem(size.reason, f"image {number}: {size}")
                for number, size in enumerate(sizes, 1) if isinstance(size, BadImage)]
    reaches = []
    for words, number, box in line.places():
        size = sizes[number - 1] if number <= len(sizes) else None
        if not isinstance(size, tuple):
            continue
        width, height = coordinate_size(size, line.coordinates, BoxFormat())
        far = max(box[2] / width, box[3] / height)  # right or down, or from there left or up
        reaches.append(max(far, 1 - box[0] / width, 1 - box[1] / height) if min(box) < 0 else far)
        if reaches[-1] > 1 + ROUNDING:
            problems.append(Problem(LEAVES, f"{words} is {list(box)} and leaves image {number}, "
                                    f"which is {width}x{height} in '{line.coordinates}'"))
    return reaches, problems


def sizes_below(root: Path, decodes: bool = False) -> Callable[[str], tuple | BadImage]:
    """A function from an image's name to its size, or to a BadImage; it remembers MAX_SIZES.

    Args:
        root: the folder that names are relative to.
        decodes: also read all pixels, so that cut files are found.
    """
    @lru_cache(MAX_SIZES)
    def read(name: str) -> tuple[int, int] | BadImage:
        try:
            path = resolve_under_root(root, name)
            return open_rgb(path).size if decodes else read_size(path)
        except BadImage as error:
            return error.with_traceback(None)

    return read
