"""Replies to a few fixed prompts over the updates of a training: reading and drawing them.

`rollout_keeper` writes them while 05 trains; reading needs no model.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from mig_kit import plots
from mig_kit.boxes import BoxFormat
from mig_kit.sample import Sample

ROLLOUTS = "rollouts.jsonl"


def load_rollouts(folder: Path) -> list[dict]:
    """The rows that a stage folder holds, in order; [] where none were kept.

    A row is a reply: step (updates before it), prompt (the index of its sample) and what
    `rollout_keeper.KeepRollouts.describe` gives.
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
    return plots.draw_rollouts(prompts[with_box[0]], rows, box_format)
