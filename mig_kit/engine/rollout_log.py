"""Replies to a few fixed prompts over the updates of a training: kept, read and plotted.

They are an extra draw: always with the same random numbers, so that what changes is the model, and
with a cache of its own, so that the training's replies stay as they were.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import extract_model_from_parallel
from PIL.Image import Image
from transformers import TrainerCallback

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_atomically
from mig_kit.drawing import pictures
from mig_kit.engine.models import Policy
from mig_kit.engine.sample_prompts import make_cache
from mig_kit.sample import Sample
from mig_kit.shared_prefix.decoding import train_mode_for_4bit_layers
from mig_kit.shared_prefix.generation import SamplingOptions, draw_uniforms, generate_rollouts

ROLLOUTS = "rollouts.jsonl"
PROMPTS, REPLIES = 4, 4
SEED = 748  # of the random numbers, the same at every step


def pick_prompts(n_samples: int) -> list[int]:
    """Indices of PROMPTS samples, evenly spaced, because a table is often sorted by task."""
    count = min(PROMPTS, n_samples)
    return [n_samples * number // count for number in range(count)]


class KeepRollouts(TrainerCallback):
    """Draws REPLIES replies to each of the prompts before the first update, every `every` updates
    and after the last one, and writes them to the stage's folder.

    describe: from a reply and its sample to the rest of its row. A step that is drawn again after a
    kill takes the place of its rows and of all later ones.
    """

    def __init__(self, policy: Policy, samples: Sequence[Sample], folder: Path, every: int,
                 sampling: SamplingOptions, describe: Callable[[str, Sample], dict]):
        self.policy, self.folder, self.every = policy, folder, every
        self.samples = {index: samples[index] for index in pick_prompts(len(samples))}
        self.sampling, self.describe = sampling, describe
        self.cache = make_cache(policy)
        self.uniforms = draw_uniforms(SEED, len(self.samples), REPLIES, sampling.max_new_tokens)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Draw from the model as RL finds it."""
        if state.global_step == 0 and state.is_world_process_zero:
            self._keep(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Draw where it is due."""
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if is_due and state.is_world_process_zero:
            self._keep(state.global_step, model)

    def _keep(self, step: int, model) -> None:
        model = extract_model_from_parallel(model)
        was_training = model.training
        train_mode_for_4bit_layers(model.eval())
        rollouts = generate_rollouts(
            model, self.policy.processor, self.cache.get(list(self.samples.values())), REPLIES,
            self.sampling, self.uniforms, self.policy.hardware.autocast)
        model.train(was_training)
        decode = self.policy.processor.batch_decode
        rows = [row for row in load_rollouts(self.folder) if row["step"] < step]
        for (index, sample), completions in zip(self.samples.items(), rollouts):
            rows += [{"step": step, "prompt": index, **self.describe(reply, sample)}
                     for reply in decode(completions, skip_special_tokens=True)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.folder / ROLLOUTS, lambda temporary: temporary.write_text(text))


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
