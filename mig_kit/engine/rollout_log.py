"""Replies to a few fixed prompts over the updates of a training, which
`recipe_trainer.KeepRollouts` keeps: written, read and plotted without a model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_atomically
from mig_kit.drawing import pictures
from mig_kit.sample import Sample

ROLLOUTS = "rollouts.jsonl"


def write_rollouts(folder: Path, rows: list[dict]) -> None:
    """Write the rows to a stage folder, atomically, in the place of those that it holds."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(folder / ROLLOUTS, lambda temporary: temporary.write_text(text))


def load_rollouts(folder: Path) -> list[dict]:
    """The rows that a stage folder holds, in order; [] where none were kept.

    A row is a reply: step (updates before it), prompt (the index of its sample) and what
    `KeepRollouts.describe` gives.
    """
    path = folder / ROLLOUTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def draw_first_rollouts(folder: Path, box_format: BoxFormat,
                        samples: Sequence[Sample]) -> Image | None:
    """The replies to the first of the prompts that asks for a box, over the updates; None where
    there are none.
    """
    rows = load_rollouts(folder)
    prompts = {row["prompt"]: samples[row["prompt"]] for row in rows}
    with_box = [index for index, sample in prompts.items() if sample.targets] or list(prompts)
    if not with_box:
        return None
    rows = [row for row in rows if row["prompt"] == with_box[0]]
    return pictures.draw_rollouts(prompts[with_box[0]], rows, box_format)
