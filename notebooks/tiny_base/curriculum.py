"""The four courses in which the tiny base's language model learns (notebook 90)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageDraw

from mig_kit.drawing.palette import FRAME, INK
from mig_kit.drawing.pictures import stack
from mig_kit.world.scenes import Scene, grid_size, render_scene
from tiny_base.puzzles import HARD_KINDS, KINDS, LOOSE_KINDS


class Mix(NamedTuple):
    """What visual dialogues are drawn at a time; the last two as in `visual_batch`."""

    max_images: int
    located: float
    name_weight: float


@dataclass(frozen=True)
class Curriculum:
    """A course of lessons; fields without a comment are as in `visual_batch` and `text_turns`."""

    name: str  # of its checkpoint and curve
    learning_rate: float
    warmup_steps: int
    fewest: int  # appearances that an album draws from, at least
    supervises_questions: bool
    plan: Callable[[float], Mix]  # share of the course that is done -> mix
    worded: float = 0.0
    surveyed: float = 0.0
    puzzles_have_images: bool = False  # most text puzzles stand behind images
    kinds: tuple[str, ...] = KINDS
    unfit: float = 0.75
    lettered: float = 0.25
    alike: float = 0.0  # share of albums whose scenes show the same objects
    puzzle_factor: int = 1  # how many times the usual number of puzzles


def _plan_seeing(done: float) -> Mix:
    max_images = 1 if done < 0.235 else 3 if done < 0.5 else 6
    return Mix(max_images, 0.6, 1.0) if done < 0.4 else Mix(max_images, 0.3, 3.0)


def _plan_all_images(done: float) -> Mix:
    return Mix(6, 0.3, 3.0)


# One image a dialogue for the first quarter, up to three until half, then up to six: with several
# from the start the model sits on a plateau, reading none of them. Boxes come first; after two
# fifths names weigh more.
SEEING = Curriculum("seeing", 1.5e-3, 100, fewest=5, supervises_questions=False, plan=_plan_seeing)

# After the first course the model reads one image but mixes up several. Here an album's images hold
# the same few objects, so that the image number decides.
TELLING_APART = Curriculum("telling_apart", 1.5e-3, 50, fewest=3, supervises_questions=True,
                           plan=_plan_all_images)

# Now it sees, and it solves puzzles over lists, but images before them distract it. Here they stand
# before most puzzles, and lists are worded as a puzzle's.
COMBINING = Curriculum("combining", 1e-3, 50, fewest=3, supervises_questions=True,
                       plan=_plan_all_images, worded=0.6, puzzles_have_images=True,
                       kinds=LOOSE_KINDS)

# The hardest puzzles again, more of them behind their own question, half with options to choose
# from by letter; albums whose images all show the same objects; and all images listed in turn, for
# before it did not know how many there are.
CONCLUDING = Curriculum("concluding", 1e-3, 50, fewest=3, supervises_questions=True,
                        plan=_plan_all_images, worded=0.6, surveyed=0.25, puzzles_have_images=True,
                        kinds=HARD_KINDS, unfit=0.5, lettered=0.5, alike=0.35, puzzle_factor=2)

COURSES = (SEEING, TELLING_APART, COMBINING, CONCLUDING)


def draw_cells(scenes: list[Scene]) -> Image.Image:
    """Scenes side by side, each cut into the cells that become one token."""
    tiles, height = [], 210
    for scene in scenes:
        width = round(scene.width * height / scene.height)
        tile = render_scene(scene).resize((width, height), Image.Resampling.LANCZOS)
        pen, (columns, rows) = ImageDraw.Draw(tile), grid_size(scene.width, scene.height)
        for column in range(1, columns):
            pen.line((column * width / columns, 0, column * width / columns, height), fill=FRAME)
        for row in range(1, rows):
            pen.line((0, row * height / rows, width, row * height / rows), fill=FRAME)
        pen.rectangle((0, 0, width - 1, height - 1), outline=INK)
        tiles.append(tile)
    return stack(tiles, across=True, gap=12)
