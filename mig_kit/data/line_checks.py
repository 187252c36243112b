"""What is wrong with the texts, the options and the image files of a line of own data."""

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from mig_kit.image_files import (
    BadImage,
    check_decodes,
    is_regular_file,
    read_size,
    resolve_under_root,
)
from mig_kit.prompts import LETTERS

MAX_SIZES = 100_000  # of images whose sizes are kept in memory
# <|im_start|>, <|image_pad|> and the like: text that a tokenizer reads as a control token
CONTROL_TOKEN = re.compile(r"<\|[a-z0-9_]{1,40}\|>")
# what other projects write where an image stands, with its number if it has one: <image>, <image_1>
IMAGE_TAG = re.compile(
    r"<img>[^<>\n]{1,300}</img>|</?\s?(?:(?:start|end)_of_)?(?:image|img|im|picture|photo|frame)"
    r"(?:[\s_-]?(?:soft|here|token|pad|placeholder|patch|start|end))*(?:[\s_#-]{0,2}([0-9]{1,3}))?"
    r"\s?/?>|<img\b[^<>\n]{1,300}>|!\[[^\[\]\n]{0,99}\]\([^()\n]{1,300}\)"
    r"|\[(?:IMG|IMAGE)(?:[\s_]?([0-9]{1,3}))?\]|\{(?:image|img)(?:[\s_]?([0-9]{1,3}))?\}",
    re.IGNORECASE)
# where a box, a region, its name, a video or a sound stands
BOX_TAG = re.compile(r"</?(?:bbox|box|ref|ref-object|object|obj|region|point|loc|mask|seg|quad|p"
                     r"|video|audio)(?:[\s_-]?[0-9]{1,4})?\s?/?>|\{(?:bbox|box)\}", re.IGNORECASE)


def text_problem(name: str, text: object, may_hold_tags: bool = False) -> str:
    """A sentence on a text that cannot stand in a prompt or reply; "" if it can.

    name: what the sentence calls it. may_hold_tags: whether it is the writer's matter what stands
    in pointed brackets, as in a reply.
    """
    if not isinstance(text, str) or not text.strip() or _is_unwritable(text):
        return f"{name} must be text"
    if token := CONTROL_TOKEN.search(text):
        return (f"{name} holds {token.group()}, which the model reads as a control token and not "
                "as text; take it out")
    if not may_hold_tags and (tag := IMAGE_TAG.search(text)):
        return (f"{name} holds {tag.group()[:40]}, which is text to the model and costs points: "
                "images stand before the question, in their order, and are called image 1, image "
                "2; mig-kit data import own FILE --out OUT takes such tags out")
    if not may_hold_tags and (tag := BOX_TAG.search(text)):
        return (f"{name} holds {tag.group()}, which is text to the model and costs points: write "
                "{ref} for the box 'reference', else take it out")
    return ""


def _is_unwritable(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" or character == "\0" for character in text)


def choice_problems(options: object, letter: object) -> list[str]:
    """Sentences on the options of a multiple-choice question and its correct letter."""
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        return [f"'options' must be a list of 2 to {len(LETTERS)} texts"]
    problems = [text_problem(f"'options' number {number}", option)
                for number, option in enumerate(options, 1)]
    texts = [" ".join(str(option).split()) for option in options]
    problems += [f"'options' number {texts.index(text) + 1} and {number} are the same; no letter "
                 "is the correct one" for number, text in enumerate(texts, 1)
                 if texts.index(text) + 1 < number]
    if not isinstance(letter, str) or letter not in list(LETTERS[:len(options)]):
        problems.append(f"'letter' must be that of the correct option, A to "
                        f"{LETTERS[len(options) - 1]}")
    return [problem for problem in problems if problem]


def read_sizes_below(root: Path, orientation: str = "upright", decodes: bool = False
                     ) -> Callable[..., tuple[int, int] | BadImage]:
    """A function that gives the (width, height), pixels, of the upright image of a name below the
    root, or what is wrong with it; the last MAX_SIZES are kept.

    orientation: one of ORIENTATIONS. decodes: whether an image's pixels are read, too, so that one
    that is cut short is found. The function's takes_frames: whether the image may be a film, whose
    first frame is shown.
    """
    @lru_cache(MAX_SIZES)
    def read(name: str, takes_frames: bool = False) -> tuple[int, int] | BadImage:
        try:
            path = resolve_under_root(root, name)
            if not is_regular_file(path):
                raise BadImage("missing image", f"{name!r} is not there; copy it below the image "
                                                "root, or correct its path")
            size = read_size(path, orientation, takes_frames=takes_frames)
            if decodes:
                check_decodes(path.read_bytes(), path.name)
        except BadImage as error:
            return error.with_traceback(None)
        return size

    return read
