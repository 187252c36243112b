"""A question before it is drawn, and the notes that tell how it is answered.

`teacher` writes the notes into its traces. Samples read back from a file hold them as text only, so
the functions that read a note stand beside those that write it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mig_kit.boxes import Box
from mig_kit.prompts import LETTERS
from mig_kit.world.scenes import Scene, World


@dataclass(frozen=True)
class SampleSpec:
    """A sample before it is drawn.

    answers: (image number, name of the object) pairs. reference: the name of an object in image 1,
    "" for none. box: the target's box where it is not the object's own. find_all and the rest: see
    `sample.Sample`.
    """

    scenes: list[Scene]
    question: str
    answers: Sequence[tuple[int, str]] = ()
    finding: str = ""
    notes: Sequence[str] = ()
    reference: str = ""
    options: tuple[str, ...] = ()
    letter: str = ""
    box: Box | None = None
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
    """The names that a note of `list_image_note` lists; any other note counts as one name."""
    return note.partition(": ")[2].removesuffix(".").split(", ")


def count_listed_objects(notes: Sequence[str]) -> int:
    """How many objects the notes of a sample list, over all images."""
    return sum(len(names_in_note(note)) for note in notes)


def shuffle_options(rng: random.Random, correct: str, wrong: list[str]) -> dict:
    """{"options", "letter"} of a `SampleSpec`, in random order; the letter is the correct one's."""
    return letter_options(rng.sample([correct, *wrong], 1 + len(wrong)), correct)


def letter_options(options: Sequence[str], correct: str) -> dict:
    """{"options", "letter"} of a `SampleSpec`, in this order."""
    return {"options": tuple(options), "letter": LETTERS[options.index(correct)]}
