"""The lessons of notebook 90 as batches: dialogues over images that the frozen tower saw once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mig_kit.common import progress_bar
from mig_kit.shared_prefix.prefixes import pad_to_multiple
from mig_kit.world.scenes import Scene, render_scene
from tiny_base.lessons import (
    Turn,
    album,
    clip_to_image,
    locate_turns,
    survey_turn,
    text_turns,
    visual_turns,
)
from tiny_base.puzzles import KINDS
from tiny_base.vision import image_processor
from tiny_base.vocabulary import TokenRow, Writer


class SeenImage(NamedTuple):
    """A scene as the frozen tower saw it."""

    scene: Scene
    features: torch.Tensor  # (tokens, hidden), bfloat16
    grid: torch.Tensor  # (3,): 1, rows and columns of its patches, of which four become a token


@dataclass(frozen=True)
class Dialogue:
    """A dialogue as tokens, with the images that stand before it."""

    row: TokenRow
    images: list[SeenImage]


Batch = list[Dialogue]


@torch.no_grad()
def encode_albums(tower, rng: random.Random, albums: int, fewest: int = 5,
                  alike: float = 0.0) -> list[list[SeenImage]]:
    """Albums of six images with their features; fewest and alike: as in `album`."""
    processor = image_processor()
    encoded = []
    for _ in progress_bar(range(albums), "albums"):
        scenes = album(rng, fewest=fewest, alike=alike)
        inputs = processor([render_scene(scene) for scene in scenes], return_tensors="pt")
        grids = inputs["image_grid_thw"]
        features = tower(inputs["pixel_values"], grid_thw=grids).pooler_output
        parts = features.to(torch.bfloat16).split((grids.prod(1) // 4).tolist())
        encoded.append([SeenImage(clip_to_image(scene), part.clone(), grid)
                        for scene, part, grid in zip(scenes, parts, grids)])
    return encoded


def total_weight(batch: Batch) -> float:
    """Of all tokens that are learned."""
    return sum(sum(dialogue.row.weights[1:]) for dialogue in batch)


def split_by_length(batch: Batch) -> list[Batch]:
    """Short dialogues and long ones apart, where that saves a fifth of the batch in padding."""
    ordered = sorted(batch, key=lambda dialogue: len(dialogue.row.ids))
    lengths = [pad_to_multiple(len(dialogue.row.ids)) for dialogue in ordered]
    rows, longest = len(ordered), lengths[-1]
    tokens, short = min((count * lengths[count - 1] + (rows - count) * longest, count)
                        for count in range(1, rows + 1))
    if tokens > 0.8 * rows * longest:
        return [batch]
    return [ordered[:short], ordered[short:]]


def visual_batch(albums: list[list[SeenImage]], writer: Writer, rng: random.Random, rows: int,
                 images: int, *, located: float = 0.0, name_weight: float = 1.0,
                 worded: float = 0.0, surveyed: float = 0.0) -> Batch:
    """`rows` dialogues, each over `images` images of one album.

    Args:
        located: share of dialogues that locate every object; the others ask up to six questions.
        name_weight: weight of a word of a name, relative to a digit of a box.
        worded: as in `visual_turns`.
        surveyed: share that lists all images first, so that the model knows their number.
    """
    batch = []
    for _ in range(rows):
        chosen = rng.sample(rng.choice(albums), images)
        scenes = [image.scene for image in chosen]
        if surveyed and rng.random() < surveyed:
            turns = [survey_turn(scenes), *locate_turns(rng, scenes, 1)]
        elif rng.random() < located:
            turns = locate_turns(rng, scenes)
        else:
            turns = visual_turns(rng, scenes, 6, worded)
        turns = _weigh_names(turns, name_weight)
        batch.append(_write_dialogue(writer, turns, chosen))
    return batch


def _weigh_names(turns: list[Turn], weight: float) -> list[Turn]:
    """The turns with a multiple of the weight on every piece that holds no box."""
    return [(question, [(text, old if "[" in text else weight * old, subject)
                        for text, old, subject in pieces])
            for question, pieces in turns]


def text_batch(writer: Writer, rng: random.Random, rows: int, unrelated_text: Sequence[str],
               albums: Sequence[list[SeenImage]] = (), *, kinds: tuple[str, ...] = KINDS,
               unfit: float = 0.75, lettered: float = 0.25) -> Batch:
    """`rows` dialogues of two puzzles, half of them with an unanswered question of a task behind.

    With albums, three of four stand behind up to five unrelated images, as do most task questions.
    kinds, unfit, lettered: as in `text_turns`.
    """
    batch = []
    for _ in range(rows):
        chosen = []
        if albums and rng.random() < 0.75:
            chosen = rng.sample(rng.choice(albums), rng.choice((1, 2, 2, 2, 3, 3, 4, 5)))
        turns = text_turns(rng, 2, kinds, unrelated_text if chosen else (), unfit, lettered)
        if unrelated_text and rng.random() < 0.5:
            turns.append((rng.choice(unrelated_text), [("", 0.0, None)]))
        batch.append(_write_dialogue(writer, turns, chosen, user_weight=0.03))
    return batch


def _write_dialogue(writer: Writer, turns: list[Turn], images: list[SeenImage],
                    user_weight: float = 0.0) -> Dialogue:
    image_tokens = [len(image.features) for image in images]
    return Dialogue(writer.write_dialogue(turns, image_tokens, user_weight), images)
