"""A question before it is drawn, and the notes that tell how it is answered.

Samples read from a file hold notes as text, so functions that read notes stand here too.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mig_kit.boxes import Box
from mig_kit.prompts import LETTERS
from mig_kit.world.scenes import Scene, World


@dataclass(frozen=True)
class SampleSpec:
    """A sample before it is drawn; see `sample.Sample` for the fields without a comment."""

    scenes: list[Scene]
    question: str
    answers: Sequence[tuple[int, str]] = ()  # (image number, name of the object)
    finding: str = ""
    notes: Sequence[str] = ()
    reference: str = ""  # name of an object in image 1
    options: tuple[str, ...] = ()
    letter: str = ""
    box: Box | None = None  # the target's, if it is not the object's own
    find_all: bool = False


TaskFunction = Callable[[random.Random, World], SampleSpec]


def list_image_note(number: int, scene: Scene) -> str:
    """A note that lists an image: "image 2: red star, blue ring."."""
    return f"image {number}: {', '.join(scene.names())}."


def list_image_notes(scenes: list[Scene]) -> list[str]:
    """A note for every image, in order."""
    return [list_image_note(number, scene) for number, scene in enumerate(scenes, 1)]


def reference_note(name: str) -> str:
    """A note that says what the reference box holds."""
    return f"image 1: the box holds {name}."


def names_in_note(note: str) -> list[str]:
    """The names in a note of `list_image_note`; any other note counts as one name."""
    return note.partition(": ")[2].removesuffix(".").split(", ")


def count_listed_objects(notes: Sequence[str]) -> int:
    """How many objects the notes of a sample list, over all images."""
    return sum(len(names_in_note(note)) for note in notes)


def shuffle_options(rng: random.Random, correct: str, wrong: list[str]) -> dict:
    """{"options", "letter"} of a `SampleSpec`: options in random order, and the correct letter."""
    return letter_options(rng.sample([correct, *wrong], 1 + len(wrong)), correct)


def letter_options(options: Sequence[str], correct: str) -> dict:
    """{"options", "letter"} of a `SampleSpec`, in this order."""
    return {"options": tuple(options), "letter": LETTERS[options.index(correct)]}
