"""The trainers of stage 05, what keeps a few of their replies, and one group to look at.

For each draw TRL calls `_generate_and_score_completions` (adds rewards and advantages), and in it
`_generate_single_turn` (the base class or servers draw completions); for each step `_compute_loss`.
Before the first update `KeepRollouts` draws a few replies, too.
"""

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback
from trl import GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_json_lines
from mig_kit.models.loading import Policy
from mig_kit.models.processors import check_image_grids
from mig_kit.models.sample_prompts import make_cache, prompt_source
from mig_kit.prompts import Answer, read_reply
from mig_kit.sample import Sample
from mig_kit.serving.served_rollouts import ServedRollouts
from mig_kit.serving.stored_replies import ROLLOUTS, load_rollouts
from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import (
    draw_uniforms,
    generate_rollouts,
    read_sampling_options,
)
from mig_kit.shared_prefix.prompt_cache import PromptCache, PromptSource
from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer
from mig_kit.training.resuming import EpochRepeatSampler

# of KeepRollouts, whose random numbers are the same at every step
PROMPTS, REPLIES, SEED = 4, 4, 748


class _ResumableOrder:
    """Mixin: prompts come in the same order after a kill; see `resuming`."""

    def _get_train_sampler(self, dataset=None):
        stock = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(stock.data_source, stock.mini_repeat_count, stock.batch_size,
                                  stock.repeat_count, stock.shuffle, stock.seed)


def own_advantages(function: Callable, rewards: torch.Tensor) -> torch.Tensor:
    """What a function of one's own makes of rewards.

    Args:
        rewards: (prompts, group), the weighted sums of all processes; NaN where no reward applies.
    Returns: (prompts, group), 0 where no reward applies.
    Raises: UserError for another shape and for a value that is not finite.
    """
    values = torch.as_tensor(function(rewards.clone()), dtype=rewards.dtype, device=rewards.device)
    if values.shape != rewards.shape:
        raise UserError(f"the function of advantage gave values of shape {tuple(values.shape)} for "
                        f"rewards of shape {tuple(rewards.shape)} (prompts, group); return one per "
                        "reply")
    values = values.where(~rewards.isnan(), 0.0)
    if not values.isfinite().all():
        raise UserError("the function of advantage gave a value that is not finite; do not divide "
                        "by 0, and leave out rewards that are NaN")
    return values


class _OwnAdvantage:
    """Mixin: where TRL has computed advantages, `advantage` replaces them, if there is one.

    TRL gives the advantages on and not the rewards, so `_calculate_rewards` keeps them.
    """

    advantage: Callable | None = None

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)
        return self.rewards

    def _group_rewards(self) -> torch.Tensor:
        """(prompts, group) weighted sums of the last rewards of all processes; 0 for none."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        weighted = self.rewards * self.reward_weights.to(self.rewards.device)
        return weighted.nansum(1).view(-1, group)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.advantage is None:
            return output
        rewards = self._group_rewards()
        applies = ~self.rewards.isnan().all(1).view_as(rewards)
        values = own_advantages(self.advantage, rewards.where(applies, torch.nan)).flatten()
        self._logs["advantages"].extend(values.tolist())  # TRL's fall out of this queue
        count = len(output["advantages"])  # rewards are gathered
        first = self.accelerator.process_index * count
        return output | {"advantages": values[first:first + count]}


class ResumableGRPOTrainer(_ResumableOrder, _OwnAdvantage, GRPOTrainer):
    """Stock TRL, resumable."""


class RecipeTrainer(_ResumableOrder, _OwnAdvantage, SharedPrefixGRPOTrainer):
    """The shared-prefix trainer of the recipe; its prompts are made of samples, by number.

    Args:
        samples: the questions; the key "sample" of a prompt's first message is an index into them.
        box_format: how the model sees images.
        served: draws the completions from servers; None for the kit's decoder.
    """

    def __init__(self, *args, samples: Sequence[Sample], box_format: BoxFormat,
                 served: ServedRollouts | None = None, **kwargs):
        self.samples, self.box_format, self.served = samples, box_format, served
        super().__init__(*args, **kwargs)
        if self.unshared:
            raise UserError(f"prompts cannot be shared: {self.unshared}, or set share_prefix to "
                            "false")
        if served and self.unsupported_sampling:
            raise UserError(f"servers are not asked for {self.unsupported_sampling}; take it out "
                            "of trl, or set server to \"\"")
        # TRL then weights the loss by the ratio of the learner's to the servers' probabilities
        self.use_vllm = served is not None

    def _make_cache(self) -> PromptCache:
        check_grids = partial(check_image_grids, self.processing_class, self.box_format)
        return PromptCache(self.model, self.processing_class, check_grids=check_grids)

    def _read_prompts(self, prompts: list) -> list[tuple[int, PromptSource]]:
        numbers = [prompt[0]["sample"] for prompt in prompts]
        make_source = partial(prompt_source, self.processing_class, self.box_format)
        return [(number, make_source(self.samples[number])) for number in numbers]

    def _tokenize_as_stock(self, prompt: list[dict]) -> tuple:
        return self._stock_inputs([source for _, source in self._read_prompts([prompt])])

    def _stop_sharing(self, reason: str) -> None:
        # stock TRL cannot go on: the rows hold no images
        raise UserError(f"prompts cannot be shared: {reason.partition(';')[0]}; set "
                        "share_prefix to false")

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        # a group without spread teaches nothing, whatever `scale_rewards` divides by
        no_spread = (self._group_rewards().std(1) < 1e-6).float().mean().item()
        self._metrics[mode]["frac_reward_zero_std"][-1] = no_spread
        return output

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations,
                              has_tool_images=False):
        if self.served is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields,
                                                 num_generations, has_tool_images)
        numbers = [number for number, in prompt_ids][::num_generations]
        return self.served.draw(self, [self.samples[number] for number in numbers],
                                self._prompts_of(numbers), num_generations,
                                read_sampling_options(self.generation_config.to_dict())[0])


class KeepRollouts(TrainerCallback):
    """Writes REPLIES replies to a few prompts to the stage's folder while a model is trained.

    They are drawn before the training's first rollout, every `every` updates and after the last,
    with the training's sampling options and always the same random numbers, and change nothing in
    it. Nothing is kept where the kit's decoder lacks one of these options.

    describe: makes the rest of a row from an answer and its sample.
    """

    def __init__(self, trainer: GRPOTrainer, policy: Policy, samples: Sequence[Sample],
                 folder: Path, every: int, describe: Callable[[Answer, Sample], dict]):
        self.trainer, self.policy = trainer, policy
        self.folder, self.every, self.describe = folder, every, describe
        count = min(PROMPTS, len(samples))  # evenly spaced, because a table is often sorted by task
        places = [len(samples) * number // count for number in range(count)]
        self.samples = {index: samples[index] for index in places}
        self.cache = make_cache(policy)  # not the trainer's

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Draw from the model as RL finds it."""
        if state.global_step == 0 and state.is_world_process_zero:
            self._keep(0, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Draw if it is time."""
        is_due = state.global_step % self.every == 0 or state.global_step == state.max_steps
        if is_due and state.is_world_process_zero:
            self._keep(state.global_step, model)

    def _keep(self, step: int, model) -> None:
        sampling, lacking = read_sampling_options(self.trainer.generation_config.to_dict())
        if lacking:
            return
        prompts, processor = self.cache.get(list(self.samples.values())), self.policy.processor
        uniforms = draw_uniforms(SEED, len(prompts), REPLIES, sampling.max_new_tokens)
        with evaluation_mode(model := extract_model_from_parallel(model)):
            rollouts = generate_rollouts(model, processor, prompts, REPLIES, sampling, uniforms)
        # after a kill, a step that is drawn again replaces its rows and all later ones
        rows = [row for row in load_rollouts(self.folder) if row["step"] < step]
        for (index, sample), completions in zip(self.samples.items(), rollouts):
            replies = processor.batch_decode(completions, skip_special_tokens=True)
            answers = [read_reply(reply, sample, self.policy.box_format) for reply in replies]
            rows += [{"step": step, "prompt": index, **self.describe(answer, sample)}
                     for answer in answers]
        write_json_lines(self.folder / ROLLOUTS, rows)


@contextmanager
def keep_global_state() -> Iterator[None]:
    """Restores random states, environment and deterministic mode, which a new trainer changes."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def draw_group(trainer: RecipeTrainer) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Draws `num_generations` replies to the trainer's first prompt.

    Returns: (replies, batch). batch is the input of the loss: prompt_ids (replies, 1), the prompt's
    number; completion_ids and completion_mask (replies, tokens), padded on the right; and more.
    """
    rows = [trainer.train_dataset[0] for _ in range(trainer.num_generations)]
    batch = trainer._generate_and_score_completions(rows)
    decode = trainer.processing_class.batch_decode
    return decode(batch["completion_ids"], skip_special_tokens=True), batch


def token_logps(trainer: RecipeTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(replies, tokens) log-probabilities of a batch's tokens, with gradients; 0 for padding."""
    # detach them rather than use no_grad, under which a bfloat16 product rounds otherwise
    return trainer._logps(trainer.model, batch["prompt_ids"][:, -1], batch["completion_ids"],
                          batch["completion_mask"])[0]


def trainer_loss(trainer: RecipeTrainer, batch: dict[str, torch.Tensor],
                 advantages: torch.Tensor, old_logps: torch.Tensor | None = None,
                 ref_logps: torch.Tensor | None = None, loss_type: str = "dapo",
                 beta: float = 0.0) -> torch.Tensor:
    """The loss of this batch as the trainer computes it, with TRL's code.

    Args:
        advantages: (replies,).
        old_logps: (replies, tokens) of the model that drew the replies; None for this model.
        ref_logps: (replies, tokens) of the reference; a beta needs it.
    """
    inputs = batch | {"advantages": advantages, "old_per_token_logps": old_logps,
                      "ref_per_token_logps": ref_logps}
    trainer.loss_type, trainer.beta = loss_type, beta
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    trainer.model.train()
    return trainer._compute_loss(trainer.model, inputs)
