"""Stage 05: rule-based RL with GRPO (TRL's GRPOTrainer) from the merged model, with a new LoRA.

Where this deviates from the paper, or fills a gap in it:
- The paper publishes no group size, rates or KL weight; the tiny values are ours, those of the full
  profiles VLM-R1's and MG-Thinker's.
- The loss is the mean over the tokens of an update (`loss_type` dapo, TRL's default), not the mean
  per reply of the GRPO paper (arXiv 2402.03300).
- An update learns once from its replies, so the ratio of new to old probabilities is exactly 1 and
  no clip can act; the kit has no parameter for one.
- `SharedPrefixGRPOTrainer` computes what TRL computes, reading each prompt once per group;
  `share_prefix: false` is stock TRL.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import Policy, check_adapters, choose_hardware, load_policy
from mig_kit.engine.own_rewards import compute_reward, load_rewards
from mig_kit.engine.sampling import make_cache
from mig_kit.engine.served_rollouts import SAMPLING_CURVES, ServedRollouts
from mig_kit.engine.shared_prefix_grpo import NOT_SHARED, SharedPrefixGRPOTrainer
from mig_kit.engine.training import (
    LiveCurves,
    ProgressLines,
    lora_config,
    save_adapter,
    train_or_resume,
    trainer_arguments,
    use_one_device,
)
from mig_kit.prompts import chat_messages
from mig_kit.rewards import Reward, cites_only_existing_images
from mig_kit.sample import Sample, read_samples
from mig_kit.stages.sanity_checks import StopIfNothingLearns

# TRL's name of a logged figure -> its name in the curves, which also hold every reward
CURVES = {
    "completions/mean_length": "length", "entropy": "entropy", "kl": "kl",
    "frac_reward_zero_std": "zero_std", "completions/clipped_ratio": "clipped_ratio"}


def reward_functions(rewards: dict[str, Reward], samples: Sequence[Sample], box_format: BoxFormat,
                     hallucinated_image_penalty: str = "format") -> list[Callable]:
    """The rewards in TRL's form, which logs each under its name.

    rewards: by name. TRL's column `sample` is the index into `samples`. hallucinated_image_penalty:
    what a reply loses whose reasoning cites an image that the prompt does not have: "none", the
    "format" reward, or "all" of them.
    """
    penalised = {"none": (), "format": ("format",), "all": tuple(rewards)}
    return [_trl_reward(name, reward, samples, box_format,
                        is_penalised=name in penalised[hallucinated_image_penalty])
            for name, reward in rewards.items()]


def _trl_reward(name: str, reward: Reward, samples: Sequence[Sample], box_format: BoxFormat,
                is_penalised: bool) -> Callable:
    def score(reply: str, sample: Sample) -> float | None:
        value = compute_reward(name, reward, reply, sample, box_format)
        if value is None:
            return None
        return 0.0 if is_penalised and not cites_only_existing_images(reply, sample) else value

    def score_all(completions, sample, **_) -> list[float | None]:
        replies = [completion[0]["content"] for completion in completions]
        return [score(reply, samples[index]) for reply, index in zip(replies, sample)]

    score_all.__name__ = name  # TRL logs a reward under its function's name
    return score_all


def grpo_rows(samples: Sequence[Sample], box_format: BoxFormat, with_images: bool) -> Dataset:
    """A table of prompt and sample index; with images only where TRL itself reads them.

    A row is made, and its images are decoded, when it is looked at.
    """
    table = Dataset.from_dict({"sample": range(len(samples))})
    return table.with_transform(partial(_make_rows, samples, box_format, with_images))


def _make_rows(samples: Sequence[Sample], box_format: BoxFormat, with_images: bool,
               columns: dict[str, list]) -> dict[str, list]:
    chosen = [samples[index] for index in columns["sample"]]
    rows = {"prompt": [chat_messages(sample, box_format) for sample in chosen],
            "sample": columns["sample"]}
    if with_images:
        rows["images"] = [list(sample.images) for sample in chosen]
    return rows


def grpo_trainer(policy: Policy, samples: Sequence[Sample], folder: Path, params: SimpleNamespace,
                 min_new_tokens: int = 0) -> GRPOTrainer:
    """The GRPO trainer over `samples`, with a new adapter on the policy.

    params: the stage's; those that GRPOConfig has are passed on. Raises ValueError where an update
    needs more prompts than there are.
    """
    hardware = policy.hardware
    if params.server and not params.share_prefix:
        raise ValueError("server needs share_prefix, because TRL's own trainer draws its replies "
                         "itself; set share_prefix to true or server to \"\"")
    _check_enough_prompts(params, len(samples))
    if hardware.device == "cpu":  # else sums over a group depend on which thread comes first
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    rewards = load_rewards(params.rewards, folder)
    weights = [params.reward_weights.get(name, 1.0) for name in rewards]
    arguments = trainer_arguments(
        GRPOConfig, SimpleNamespace(**vars(params) | {"reward_weights": weights}), hardware, folder,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        generation_kwargs={"min_new_tokens": min_new_tokens})
    if idle := sorted(NOT_SHARED & arguments.keys() if params.share_prefix else ()):
        raise ValueError(f"{idle[0]} does not act with share_prefix; take it out of the "
                         "parameters, or set share_prefix to false")
    config = GRPOConfig(**arguments)
    use_one_device(config)
    functions = reward_functions(rewards, samples, policy.box_format,
                                 params.hallucinated_image_penalty)
    logged = ("reward", *(f"rewards/{name}/mean" for name in rewards), "entropy")
    common = {
        "model": policy.model, "args": config, "processing_class": policy.processor,
        "reward_funcs": functions,
        "train_dataset": grpo_rows(samples, policy.box_format, not params.share_prefix),
        "peft_config": lora_config(params.lora_r, params.lora_alpha, params.lora_dropout),
        "callbacks": [ProgressLines(logged), StopIfNothingLearns(),
                      LiveCurves(training_curves, ("reward", *rewards))]}
    if not params.share_prefix:
        return GRPOTrainer(**common)
    served = None
    if params.server:
        served = ServedRollouts(policy.model.name_or_path, policy.box_format, folder, params)
        common["callbacks"].append(served)
    return SharedPrefixGRPOTrainer(
        **common, samples=samples, cache=make_cache(policy), autocast=hardware.autocast,
        micro_replies=params.micro_replies, served=served)


def _check_enough_prompts(params: SimpleNamespace, n_prompts: int) -> None:
    """ValueError where an update needs more prompts than there are."""
    steps, batch_size = params.gradient_accumulation_steps, params.per_device_train_batch_size
    needed = batch_size * steps // params.num_generations
    if n_prompts < needed:
        raise ValueError(
            f"there are {n_prompts} prompts, and an update needs {needed} different ones "
            "(per_device_train_batch_size x gradient_accumulation_steps / num_generations); lower "
            "gradient_accumulation_steps, or widen min_pass_rate and max_pass_rate in 04")


def train(folder: Path, params: SimpleNamespace, merged: str, kept: str) -> None:
    """Train the model of folder `merged` on the samples of file `kept`, or go on; save the adapter.

    The one job of all processes that train together. folder: the stage's; params: its parameters
    and the run's.
    """
    box_format = BoxFormat(params.min_pixels, params.max_pixels, params.coordinates)
    policy = load_policy(merged, choose_hardware(params.dtype, params.device), box_format)
    trainer = grpo_trainer(policy, read_samples(Path(kept)), folder, params)
    check_adapters(trainer.model)
    train_or_resume(trainer, folder)
    save_adapter(trainer, folder)


def training_curves(history: list[dict]) -> list[dict]:
    """Rows of a trainer's log history: step, reward, every single reward, and CURVES.

    None where a figure is missing, or NaN because no sample of the step has that reward.
    """
    updates = [row for row in history if "reward" in row]
    names = {name for row in updates for name in row
             if name.startswith("rewards/") and name.endswith("/mean")}
    # sorted, because a log that was read back after a kill has its names in another order
    single = {name: name.split("/")[1] for name in sorted(names)}
    served = {name: short for name, short in SAMPLING_CURVES.items()
              if any(name in row for row in updates)}
    curves = {"step": "step", "reward": "reward", **single, **CURVES, **served}
    rows = [{short: row.get(name) for name, short in curves.items()} for row in updates]
    return [{name: None if value != value else value for name, value in row.items()}
            for row in rows]


def length_collapse_warning(rows: list[dict], span: int = 10, share: float = 0.8) -> str:
    """One sentence if the last `span` updates' replies have less than `share` of the first ones'
    tokens, else "".

    rows: of `training_curves`. Where listing what is in each image pays only later, this is how RL
    fails in the tiny world.
    """
    if len(rows) < 2 * span:
        return ""
    first, last = (sum(row["length"] for row in part) / span
                   for part in (rows[:span], rows[-span:]))
    if last >= share * first:
        return ""
    return (f"replies fell from {first:.0f} to {last:.0f} tokens: the model may have given up "
            "listing its evidence, and with it what there was to gain; lower learning_rate and "
            "look at 'length' again")
