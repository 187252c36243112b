"""Checks that stop a training which cannot teach what it should, before it starts or in its first steps, and say why.

A mixed-up image, a box in another frame or a reward that nobody can earn raises no error by itself: loss falls, curves move,
and the model learns to answer without looking. Token counts, padding and adapters are checked in `models`.
"""

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
from transformers import TrainerCallback

from mig_kit.boxes import BoxFormat
from mig_kit.engine.logprobs import reply_logps
from mig_kit.engine.prompt_cache import image_digest
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample


def check_box_coordinates(samples: list[Sample], replies: list[str], box_format: BoxFormat, share: float = 0.9) -> float:
    """Share of the replies with a box that meet their target (IoU >= 0.5); ValueError below `share`.

    Stage 01 lets only right replies through, so a miss means that it saw images of another size, or wrote another frame.
    """
    right = [is_correct(reply, sample, box_format=box_format) for reply, sample in zip(replies, samples, strict=True) if sample.targets]
    found = float(np.mean(right)) if right else 1.0
    if found < share:
        raise ValueError(f"only {sum(right)} of {len(right)} replies to learn from meet their targets with boxes read as "
                         f"'{box_format.coordinates}'; run 01 again with this run's coordinates, min_pixels and max_pixels")
    return found


def check_model_uses_images(model, processor, samples: list[Sample], replies: list[str], box_format: BoxFormat, fewest: int = 8) -> dict:
    """How much likelier the replies are with their own images than with another sample's of the same task.

    {"pairs", "gap" (mean difference in log-probability per reply), "error" (its standard error)}. Samples about the same images
    are no pair. Raises ValueError unless the gap is over two standard errors: then images and questions are mixed up, or the
    model does not see. With fewer than `fewest` pairs nothing is judged.
    """
    alike, pairs = defaultdict(list), []
    for sample, reply in zip(samples, replies, strict=True):
        alike[sample.task, len(sample.images)].append((sample, reply))
    for found in alike.values():
        for (sample, reply), (other, _) in zip(found, found[1:] + found[:1]):
            if sample.images and [image_digest(image) for image in sample.images] != [image_digest(image) for image in other.images]:
                pairs.append((sample, replace(sample, id=f"{sample.id} with other images", images=other.images), reply))
    if len(pairs) < fewest:
        return {"pairs": len(pairs), "gap": None, "error": None}
    texts, end = [reply for _, _, reply in pairs], 0
    own, others = (np.concatenate([
        reply_logps(model, processor, [pair[k] for pair in pairs[i:i + 16]], texts[i:i + 16], box_format).double()
        for i in range(0, len(pairs), 16)]) for k in (0, 1))
    gaps = []
    for text in texts:
        start, end = end, end + len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        gaps.append((own - others)[start:end].sum())
    gap, error = float(np.mean(gaps)), float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))
    if gap < 2 * error or gap <= 0:
        raise ValueError(f"the replies are no likelier with their own images than with others' (log-probability {gap:+.2f} +- "
                         f"{error:.2f}): the images and questions of the data are mixed up, or the model does not see; look at "
                         "the pictures above, or run: mig-kit data preview")
    return {"pairs": len(pairs), "gap": gap, "error": error}


class StopIfNothingLearns(TrainerCallback):
    """Stops a training whose logged figures say that nothing can be learnt.

    At any step: loss or gradient that is not finite. In the first `patience` steps, all of them: no reward, no box reward though
    images are right, no group with a spread.
    """

    def __init__(self, patience: int = 8):
        self.patience, self.rows = patience, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raise ValueError with one sentence, or do nothing."""
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise ValueError(f"{name} is {logs[name]} at step {state.global_step}; lower learning_rate, or use dtype float32")
        if "reward" not in logs or state.global_step > self.patience:
            return
        self.rows.append(logs)
        if len(self.rows) < self.patience:
            return
        steps = f"in all of the first {self.patience} steps"
        if all(row["frac_reward_zero_std"] == 1 for row in self.rows):
            same = "all replies to a prompt earned the same"
            same = same if any(row["reward"] for row in self.rows) else "no reply earned anything"
            raise ValueError(f"{same} {steps}, so nothing can be learnt; look at replies and rewards, or curate prompts with 04")
        boxes, images = ([row[name] for row in self.rows if row.get(name) is not None and not math.isnan(row[name])]
                         for name in ("rewards/box/mean", "rewards/image/mean"))  # TRL logs None where no sample has a reward
        if boxes and not any(boxes) and np.mean(images) > 0.3:
            raise ValueError(f"no box met its target {steps}, though {np.mean(images):.0%} of the images were right; boxes are "
                             "probably in another frame: check the parameters frame, min_pixels and max_pixels")
