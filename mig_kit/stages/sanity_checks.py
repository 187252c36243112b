"""Checks that stop a training which cannot teach what it should, and say why.

Mixed-up images, boxes in other coordinates or a reward that nobody can earn raise no error by
themselves: loss falls, and the model learns to answer without looking.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import TrainerCallback

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.image_files import image_digests
from mig_kit.models.loading import Policy
from mig_kit.models.sample_prompts import reply_logps
from mig_kit.prompts import read_reply
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample
from mig_kit.training.reward_loading import RL_NEEDS


def check_box_coordinates(samples: Sequence[Sample], replies: Sequence[str], box_format: BoxFormat,
                          lowest_share: float = 0.9) -> float:
    """Share of the replies with a box that meet their target (IoU >= 0.5).

    Raises UserError below `lowest_share`: 01 keeps only correct replies, so a miss means that it
    saw images of another size, or wrote boxes in other coordinates.
    """
    correct = [is_correct(read_reply(reply, sample, box_format), sample)
               for reply, sample in zip(replies, samples, strict=True) if sample.targets]
    share = float(np.mean(correct)) if correct else 1.0
    if share < lowest_share:
        raise UserError(
            f"only {sum(correct)} of {len(correct)} replies to learn from meet their targets with "
            f"boxes read as '{box_format.coordinates}'; run 01 again with this run's coordinates, "
            "min_pixels and max_pixels")
    return share


def check_model_uses_images(policy: Policy, samples: Sequence[Sample], replies: Sequence[str],
                            fewest_pairs: int = 8) -> dict:
    """How much likelier the replies are with their own images than with another sample's.

    Returns: {"pairs", "gap": mean difference in log-probability per reply, "error": its standard
    error}; gap and error are None for fewer pairs than `fewest_pairs`.
    Raises: UserError if the gap is below two standard errors.
    """
    pairs = _pair_with_other_images(samples, replies)
    if len(pairs) < fewest_pairs:
        return {"pairs": len(pairs), "gap": None, "error": None}
    texts = [reply for _, _, reply in pairs]
    own, others = (reply_logps(policy.model, policy.processor, [pair[side] for pair in pairs],
                               texts, policy.box_format) for side in (0, 1))
    gaps = [(a.double() - b.double()).numpy().sum() for a, b in zip(own, others)]
    gap, error = float(np.mean(gaps)), float(np.std(gaps, ddof=1) / math.sqrt(len(gaps)))
    if gap < 2 * error or gap <= 0:
        raise UserError(
            "the replies are no likelier with their own images than with others' (log-probability "
            f"{gap:+.2f} +- {error:.2f}): the images and questions of the data are mixed up, or "
            "the model does not see; look at the images above, or at the sheet that mig-kit data "
            "check FILE draws")
    return {"pairs": len(pairs), "gap": gap, "error": error}


def _pair_with_other_images(samples: list[Sample],
                            replies: list[str]) -> list[tuple[Sample, Sample, str]]:
    """(sample, the same with the next sample's images, reply), by task and number of images."""
    alike = defaultdict(list)
    for sample, reply in zip(samples, replies, strict=True):
        alike[sample.task, len(sample.images)].append((sample, reply))
    pairs = []
    for rows in alike.values():
        for (sample, reply), (other, _) in zip(rows, rows[1:] + rows[:1]):
            if image_digests(sample.images) != image_digests(other.images):
                name = f"{sample.id} with other images"
                pairs.append((sample, replace(sample, id=name, images=other.images), reply))
    return pairs


class StopIfNothingLearns(TrainerCallback):
    """Stops a training whose logged figures say that nothing can be learnt."""

    def __init__(self, patience: int = 8):
        self.patience, self.rows = patience, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Raise UserError with one sentence, or do nothing."""
        if not logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise UserError(f"{name} is {logs[name]} at step {state.global_step}; lower "
                                "learning_rate, or use dtype float32")
        is_resumed = not self.rows and state.global_step > 1
        # an update that learns again from the same replies logs no reward
        if "reward" not in logs or is_resumed or len(self.rows) == self.patience:
            return
        self.rows.append(logs)
        if len(self.rows) == self.patience:
            self._stop_without_task_reward()
            if all(row["frac_reward_zero_std"] == 1 for row in self.rows):
                raise UserError("all replies to a prompt earned the same in all of the first "
                                f"{self.patience} steps, so nothing can be learnt; look at replies "
                                "and rewards, or curate prompts with 04")
            self._stop_without_box_reward()

    def _stop_without_task_reward(self) -> None:
        names = [name.split("/")[1] for name in sorted(self.rows[0])
                 if name.startswith("rewards/") and name.endswith("/mean")]
        earned = {name: means for name in names
                  if name != "format" and (means := self._logged(name))}
        for is_choice in (False, True):  # one kind of question does not speak for another
            names = [name for name in earned if (name == "choice") == is_choice]
            if names and not any(any(earned[name]) for name in names):
                raise UserError(f"no reply earned anything for {', '.join(names)} in all of the "
                                f"first {self.patience} steps: {RL_NEEDS}")

    def _stop_without_box_reward(self) -> None:
        boxes, images = self._logged("box"), self._logged("image")
        if boxes and images and not any(boxes) and np.mean(images) > 0.3:
            raise UserError(
                f"no box met its target in all of the first {self.patience} steps, though "
                f"{np.mean(images):.0%} of the images were correct; boxes are probably in other "
                "coordinates: check the parameters coordinates, min_pixels and max_pixels of 01")

    def _logged(self, reward: str) -> list[float]:
        """A reward's means; TRL logs None or NaN for a step in which it applies to no sample."""
        values = [row.get(f"rewards/{reward}/mean") for row in self.rows]
        return [value for value in values if value is not None and not math.isnan(value)]
