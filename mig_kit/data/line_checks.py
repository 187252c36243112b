"""What is wrong with the texts, the options and the image files of a line of own data."""

import re
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


def text_problem(name: str, text: object) -> str:
    """A sentence on a text that cannot stand in a prompt or reply; "" if it can.

    name: what the sentence calls it.
    """
    if not isinstance(text, str) or not text.strip() or _is_unwritable(text):
        return f"{name} must be text"
    if token := CONTROL_TOKEN.search(text):
        return (f"{name} holds {token.group()}, which the model reads as a control token and not "
                "as text; take it out")
    return ""


def _is_unwritable(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" or character == "\0" for character in text)


def choice_problems(options: object, letter: object) -> list[str]:
    """Sentences on the options of a multiple-choice question and its correct letter."""
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        return [f"'options' must be a list of 2 to {len(LETTERS)} texts"]
    problems = [text_problem(f"'options' number {number}", option)
                for number, option in enumerate(options, 1)]
    if not isinstance(letter, str) or letter not in list(LETTERS[:len(options)]):
        problems.append(f"'letter' must be that of the correct option, A to "
                        f"{LETTERS[len(options) - 1]}")
    return [problem for problem in problems if problem]


class ImageSizes:
    """Sizes of upright images below a root, read once each; the last MAX_SIZES are kept.

    orientation: one of ORIENTATIONS. decodes: whether an image's pixels are read, too, so that one
    that is cut short is found.
    """

    def __init__(self, root: Path, orientation: str = "upright", decodes: bool = False):
        self.root, self.orientation, self.decodes = root, orientation, decodes
        self.by_name: dict[str, tuple[int, int] | BadImage] = {}

    def __call__(self, name: str) -> tuple[int, int] | BadImage:
        """(width, height), pixels, of the image of this name, or what is wrong with it."""
        if name not in self.by_name:
            if len(self.by_name) >= MAX_SIZES:
                self.by_name.clear()
            try:
                self.by_name[name] = self._read(name)
            except BadImage as error:
                return error
        return self.by_name[name]

    def _read(self, name: str) -> tuple[int, int]:
        path = resolve_under_root(self.root, name)
        if not is_regular_file(path):
            raise BadImage("missing image", f"{name!r} is not there; copy it below the image root, "
                                            "or correct its path")
        size = read_size(path, self.orientation)
        if self.decodes:
            check_decodes(path.read_bytes(), path.name)
        return size
