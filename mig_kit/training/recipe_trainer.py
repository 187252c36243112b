"""The trainers of stage 05: TRL's, made resumable, and the shared-prefix one over samples; and what
keeps a few of its replies.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback
from trl import GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.models.loading import Policy
from mig_kit.models.processors import check_image_grids
from mig_kit.models.sample_prompts import make_cache, prompt_source
from mig_kit.sample import Sample
from mig_kit.serving.served_rollouts import ServedRollouts
from mig_kit.serving.stored_replies import load_rollouts, write_rollouts
from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import SamplingOptions, draw_uniforms, generate_rollouts
from mig_kit.shared_prefix.prompt_cache import PromptCache, PromptSource
from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer
from mig_kit.training.resuming import EpochRepeatSampler, KeepAdapterDtype

PROMPTS, REPLIES = 4, 4  # of KeepRollouts
SEED = 748  # of its random numbers, the same at every step


def group_advantages(reward: torch.Tensor, group: int,
                     scale: str = "group") -> tuple[torch.Tensor, torch.Tensor]:
    """(A, group_std): A = (r - mean of the group) / (std + 1e-4), both (rows,).

    reward: (rows,), groups in sequence. scale: whose std divides, "group" (DeepSeekMath, arXiv
    2402.03300), "batch" (a group whose replies differ little then teaches little, however clear its
    order is) or "none". Names and epsilon are TRL's. group_std: the std within the row's group.
    """
    grouped = reward.view(-1, group)
    group_std = grouped.std(1).repeat_interleave(group)
    centred = reward - grouped.mean(1).repeat_interleave(group)
    if scale == "none":
        return centred, group_std
    std = reward.std() if scale == "batch" else group_std
    return centred / (std + 1e-4), group_std


class _ResumableOrder(KeepAdapterDtype):
    """Mixin: prompts come in the same order after a kill, in any pass over them. All else that a
    resumed training needs is in `training.train_or_resume`.
    """

    def _get_train_sampler(self, dataset=None):
        stock = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(stock.data_source, stock.mini_repeat_count, stock.batch_size,
                                  stock.repeat_count, stock.shuffle, stock.seed)


class ResumableGRPOTrainer(_ResumableOrder, GRPOTrainer):
    """Stock TRL, resumable."""


class RecipeTrainer(_ResumableOrder, SharedPrefixGRPOTrainer):
    """The shared-prefix trainer of the recipe. The loss itself is TRL's `_compute_loss`.

    samples: what the key "sample" of a prompt's first message points into. box_format: how the
    model sees images. autocast: bfloat16 products over float32 weights. served: draws the
    completions from servers; None: the kit's decoder does. Advantages are computed by
    `group_advantages`, which the lesson shows; TRL's are equal but for rounding.
    """

    def __init__(self, *args, samples: Sequence[Sample], box_format: BoxFormat, autocast: bool,
                 served: ServedRollouts | None = None, **kwargs):
        self.samples, self.box_format, self.served = samples, box_format, served
        super().__init__(*args, **kwargs)
        if self.unshared:
            raise ValueError(f"prompts cannot be shared: {self.unshared}, or set share_prefix to "
                             "false")
        self.autocasts = self.cache.autocast = autocast  # a 4-bit model does not tell
        # TRL then weights the loss by the ratio of the learner's to the servers' probabilities
        self.use_vllm = served is not None

    def train(self, *args, **kwargs):
        """As TRL's. A server that it has started ends with it, also when it is interrupted."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.served:
                self.served.close()

    def _make_cache(self) -> PromptCache:
        check_grids = partial(check_image_grids, self.processing_class, self.box_format)
        return PromptCache(self.model, self.processing_class, check_grids=check_grids)

    def _read_prompts(self, prompts: list) -> list[tuple[int, PromptSource]]:
        numbers = [prompt[0]["sample"] for prompt in prompts]
        make_source = partial(prompt_source, self.processing_class, self.box_format)
        return [(number, make_source(self.samples[number])) for number in numbers]

    def _stop_sharing(self, reason: str) -> None:
        # stock TRL cannot go on: the rows hold no images
        raise RuntimeError(f"prompts cannot be shared: {reason.partition(';')[0]}; set "
                           "share_prefix to false")

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)
        return self.rewards

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        total = (self.rewards * self.reward_weights.to(self.rewards.device)).nansum(1)
        advantages, group_std = group_advantages(total, group, self.scale_rewards)
        # whatever `scale_rewards` divides by, a group without spread teaches nothing
        no_spread = (group_std < 1e-6).float().mean().item()
        self._metrics[mode]["frac_reward_zero_std"][-1] = no_spread
        if not self.rewards.isnan().all(1).any():  # else TRL leaves rows out
            start = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantages[start:start + len(inputs)]
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations,
                              has_tool_images=False):
        if self.served is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields,
                                                 num_generations, has_tool_images)
        numbers = [number for number, in prompt_ids][::num_generations]
        sampling = SamplingOptions(self.temperature, self.top_p, self.max_completion_length,
                                   **self.args.generation_kwargs or {})
        return self.served.draw(self, [self.samples[number] for number in numbers],
                                self._prompts_of(numbers), num_generations, sampling)


def pick_prompts(n_samples: int) -> list[int]:
    """Indices of PROMPTS samples, evenly spaced, because a table is often sorted by task."""
    count = min(PROMPTS, n_samples)
    return [n_samples * number // count for number in range(count)]


class KeepRollouts(TrainerCallback):
    """Draws REPLIES replies to each of the prompts before the first update, every `every` updates
    and after the last one, and writes them to the stage's folder.

    They are an extra draw: always with the same random numbers, so that what changes is the model,
    and with a cache of its own, so that the training's replies stay as they were.
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
        with evaluation_mode(model):
            rollouts = generate_rollouts(
                model, self.policy.processor, self.cache.get(list(self.samples.values())), REPLIES,
                self.sampling, self.uniforms, self.policy.hardware.autocast)
        decode = self.policy.processor.batch_decode
        rows = [row for row in load_rollouts(self.folder) if row["step"] < step]
        for (index, sample), completions in zip(self.samples.items(), rollouts):
            rows += [{"step": step, "prompt": index, **self.describe(reply, sample)}
                     for reply in decode(completions, skip_special_tokens=True)]
        write_rollouts(self.folder, rows)
