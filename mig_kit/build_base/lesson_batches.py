"""The lessons of notebook 90 as batches: dialogues over pictures that the frozen tower has seen once and for all."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch

from mig_kit.build_base.lessons import KINDS, album, clip_to_image, locate_turns, survey_turn, text_turns, visual_turns
from mig_kit.build_base.vision import image_processor
from mig_kit.build_base.vocabulary import Writer
from mig_kit.common import progress_bar
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.world.scenes import draw_scene


@torch.no_grad()
def album_bank(tower, rng: random.Random, albums: int, autocast: bool = True, fewest: int = 5,
               alike: float = 0.0) -> list[list[tuple]]:
    """Pictures seen once and for all: per album a list of (scene, features (tokens, hidden) bf16, (rows, columns))."""
    bank, processor = [], image_processor()
    for _ in progress_bar(range(albums), "albums"):
        scenes = album(rng, fewest=fewest, alike=alike)
        inputs = processor([draw_scene(s) for s in scenes], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.to(torch.bfloat16)
        grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
        parts = features.split([h * w for h, w in grids])
        bank.append([(clip_to_image(s), f.clone(), g) for s, f, g in zip(scenes, parts, grids)])
    return bank


def position_ids(rows: list[list[int]], grids: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Qwen2.5-VL's three position ids per token (3, rows, longest row), for rows padded on the right.

    The rule of transformers' get_rope_index, without its per-token Python loops; a test holds the two together.
    """
    longest = pad_to_multiple(max(map(len, rows)))
    out = np.zeros((3, len(rows), longest), np.int64)
    for r, (ids, row_grids) in enumerate(zip(rows, grids)):
        at = now = 0
        for height, width in row_grids:
            start = ids.index(5, at)
            out[:, r, at:start] = np.arange(now, now + start - at)
            now += start - at
            end = start + height * width
            out[0, r, start:end] = now
            out[1, r, start:end] = now + np.repeat(np.arange(height), width)
            out[2, r, start:end] = now + np.tile(np.arange(width), height)
            now += max(height, width)
            at = end
        out[:, r, at:] = np.arange(now, now + longest - at)
    return torch.from_numpy(out)


@dataclass
class Batch:
    """Dialogues as rows: ids, weights, looks, homes and asks per token; grids (rows, columns) and features per picture."""

    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    looks: list[list[int]] = field(default_factory=list)
    homes: list[list[int]] = field(default_factory=list)
    asks: list[list[int]] = field(default_factory=list)
    grids: list[list[tuple[int, int]]] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)

    def add(self, row: tuple, grids: list[tuple[int, int]]) -> None:
        """Append one dialogue."""
        for store, part in zip((self.ids, self.weights, self.looks, self.homes, self.asks), row):
            store.append(part)
        self.grids.append(grids)

    def weight(self) -> float:
        """Of all tokens that are learned."""
        return sum(sum(row[1:]) for row in self.weights)

    def parts(self) -> list["Batch"]:
        """The batch, or short rows and long ones apart where that saves a fifth of it in padding."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        lengths = [pad_to_multiple(len(self.ids[row])) for row in order]
        cost, short = min((n * lengths[n - 1] + (len(order) - n) * lengths[-1], n) for n in range(1, len(order) + 1))
        if cost > 0.8 * len(order) * lengths[-1]:
            return [self]
        features = iter(self.features)
        pictures = [[next(features) for _ in grids] for grids in self.grids] if self.features else [[]] * len(order)
        found = []
        for rows in (order[:short], order[short:]):
            found.append(Batch())
            for r in rows:
                found[-1].add((self.ids[r], self.weights[r], self.looks[r], self.homes[r], self.asks[r]), self.grids[r])
                found[-1].features += pictures[r]
        return found


def visual_batch(bank, writer: Writer, rng: random.Random, rows: int, pictures: int, located: float = 0.0,
                 named: float = 1.0, worded: float = 0.0, surveyed: float = 0.0) -> Batch:
    """`rows` dialogues over `pictures` pictures of one album each.

    located: the share of dialogues that locate every thing; the others ask up to six questions. named: how much more a
    word of a name weighs than a digit of a box, of which there are many more. worded: see `visual_turns`. surveyed: the share
    that lists all pictures first, so that the model knows how many there are.
    """
    batch = Batch()
    for _ in range(rows):
        chosen = rng.sample(rng.choice(bank), pictures)
        scenes = [scene for scene, _, _ in chosen]
        if surveyed and rng.random() < surveyed:
            turns = [survey_turn(scenes), *locate_turns(rng, scenes, 1)]
        else:
            turns = locate_turns(rng, scenes) if rng.random() < located else visual_turns(rng, scenes, 6, worded)
        turns = [(q, [(text, w if "[" in text else named * w, look) for text, w, look in pieces]) for q, pieces in turns]
        batch.add(writer.dialogue(turns, [len(part) for _, part, _ in chosen]), [grid for _, _, grid in chosen])
        batch.features += [part for _, part, _ in chosen]
    return batch


def text_batch(writer: Writer, rng: random.Random, rows: int, babble: list[str], bank=(), kinds: tuple[str, ...] = KINDS,
               unfit: float = 0.75, lettered: float = 0.25) -> Batch:
    """`rows` dialogues of two puzzles, half of them with a task's question as mere text behind.

    With a bank, three of four stand behind up to five pictures that have nothing to do with them, as do most questions.
    """
    batch = Batch()
    for _ in range(rows):
        chosen = []
        if bank and rng.random() < 0.75:
            chosen = rng.sample(rng.choice(bank), rng.choice((1, 2, 2, 2, 3, 3, 4, 5)))
        turns = text_turns(rng, 2, kinds, babble if chosen else (), unfit, lettered)
        if babble and rng.random() < 0.5:
            turns.append((rng.choice(babble), [("", 0.0, None)]))
        row = writer.dialogue(turns, [len(part) for _, part, _ in chosen], user_weight=0.03)
        batch.add(row, [grid for _, _, grid in chosen])
        batch.features += [part for _, part, _ in chosen]
    return batch
