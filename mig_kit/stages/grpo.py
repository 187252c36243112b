"""Stage 05: rule-based RL with GRPO (TRL's GRPOTrainer) from the merged model, with a new LoRA.

With `start_from` it starts elsewhere: from the base (no cold start), from another model's folder,
or from 02's adapter, which it goes on training on the 4-bit base (no merge).

Where this deviates from the paper, or fills a gap in it:
- The paper publishes no group size, rates or KL weight; the tiny values are ours, those of the full
  profiles VLM-R1's and MG-Thinker's.
- The loss is the mean over the tokens of an update (`loss_type` dapo, TRL's default), not the mean
  per reply of the GRPO paper (arXiv 2402.03300).
- By default an update learns once from its replies, so the ratio of new to old probabilities is
  exactly 1 and no clip can act; with `num_iterations` 2 or more `epsilon` acts from the second
  update on. `mig_kit.pipeline.loss_params` refuses what could not act.
- Steps hold whole groups of like lengths, where TRL's are mixed: `bnpo` and `top_entropy_quantile`
  look at a step at a time (the latter at the steps of all processes side by side), so their results
  depend on what shares a step, and on the number of processes.
- `SharedPrefixGRPOTrainer` computes what TRL computes, reading each prompt once per group;
  `share_prefix: false` is stock TRL.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from trl import GRPOConfig, GRPOTrainer

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.common import model_folder
from mig_kit.engine.model_folders import check_model_folder
from mig_kit.engine.models import (
    Hardware,
    Policy,
    check_adapters,
    choose_hardware,
    load_policy,
    resolve_model,
)
from mig_kit.engine.qlora import load_adapter_policy
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
from mig_kit.sample import Sample, read_samples
from mig_kit.stages.sanity_checks import StopIfNothingLearns

# TRL's name of a logged figure -> its name in the curves, which also hold every reward
CURVES = {
    "completions/mean_length": "length", "entropy": "entropy", "kl": "kl",
    "frac_reward_zero_std": "zero_std", "completions/clipped_ratio": "clipped_ratio"}


def reward_functions(samples: Sequence[Sample], box_format: BoxFormat,
                     hallucinated_image_penalty: str = "format") -> list[Callable]:
    """The rewards in TRL's form, in the order of `reward_weights`.

    A line of the table is a reward: the name under which it is logged, a function of reply and
    sample, and the samples that it applies to; it is None for any other. TRL's column `sample` is
    the index into `samples`. hallucinated_image_penalty: what a reply loses whose reasoning cites
    an image that the prompt does not have: "none", the "format" reward, or "all" of them.
    """
    table = {
        "format": (rewards.format_reward, _is_any),
        "image": (rewards.image_reward, _asks_for_a_box),
        "box": (partial(rewards.box_reward, box_format=box_format), _asks_for_a_box),
        "choice": (rewards.choice_reward, _asks_for_a_letter),
    }
    penalised = {"none": (), "format": ("format",), "all": tuple(table)}
    return [_trl_reward(name, reward, applies_to, samples,
                        is_penalised=name in penalised[hallucinated_image_penalty])
            for name, (reward, applies_to) in table.items()]


def _is_any(sample: Sample) -> bool:
    return True


def _asks_for_a_box(sample: Sample) -> bool:
    return not sample.options


def _asks_for_a_letter(sample: Sample) -> bool:
    return bool(sample.options)


def _trl_reward(name: str, reward: Callable, applies_to: Callable, samples: Sequence[Sample],
                is_penalised: bool) -> Callable:
    def score(reply: str, sample: Sample) -> float | None:
        if not applies_to(sample):
            return None
        if is_penalised and not rewards.cites_only_existing_images(reply, sample):
            return 0.0
        return reward(reply, sample)

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
    arguments = trainer_arguments(
        GRPOConfig, params, hardware, folder,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        generation_kwargs={"min_new_tokens": min_new_tokens})
    arguments |= _multi_step_arguments(params)
    if idle := sorted(NOT_SHARED & arguments.keys() if params.share_prefix else ()):
        raise ValueError(f"{idle[0]} does not act with share_prefix; take it out of the "
                         "parameters, or set share_prefix to false")
    config = GRPOConfig(**arguments)
    use_one_device(config)
    functions = reward_functions(samples, policy.box_format, params.hallucinated_image_penalty)
    names = [function.__name__ for function in functions]
    logged = ("reward", *(f"rewards/{name}/mean" for name in names), "entropy")
    common = {
        "model": policy.model, "args": config, "processing_class": policy.processor,
        "reward_funcs": functions,
        "train_dataset": grpo_rows(samples, policy.box_format, not params.share_prefix),
        "peft_config": _new_adapter(policy, params),
        "callbacks": [ProgressLines(logged), StopIfNothingLearns(),
                      LiveCurves(training_curves, ("reward", *names))]}
    if not params.share_prefix:
        return GRPOTrainer(**common)
    served = None
    if params.server:
        served = ServedRollouts(policy.model.name_or_path, policy.box_format, folder, params)
        common["callbacks"].append(served)
    return SharedPrefixGRPOTrainer(
        **common, samples=samples, cache=make_cache(policy), autocast=hardware.autocast,
        micro_replies=params.micro_replies, served=served)


def _multi_step_arguments(params: SimpleNamespace) -> dict:
    """GRPOConfig's form of the parameters of learning several times from the same replies.

    Checkpoints come when all updates of a batch of replies are done: a training that goes on draws
    new replies.
    """
    iterations = params.num_iterations
    return {"epsilon_high": params.epsilon_high or None,
            "save_steps": -(-params.save_steps // iterations) * iterations}


def _new_adapter(policy: Policy, params: SimpleNamespace) -> LoraConfig | None:
    """None for a policy that brings its adapter along."""
    if isinstance(policy.model, PeftModel):
        return None
    return lora_config(params.lora_r, params.lora_alpha, params.lora_dropout, params.lora_targets)


def _check_enough_prompts(params: SimpleNamespace, n_prompts: int) -> None:
    """ValueError where an update needs more prompts than there are."""
    steps, batch_size = params.gradient_accumulation_steps, params.per_device_train_batch_size
    needed = batch_size * steps // params.num_generations
    if n_prompts < needed:
        raise ValueError(
            f"there are {n_prompts} prompts, and an update needs {needed} different ones "
            "(per_device_train_batch_size x gradient_accumulation_steps / num_generations); lower "
            "gradient_accumulation_steps, or widen min_pass_rate and max_pass_rate in 04")


def resolve_start(params: SimpleNamespace, merged: Path, adapter: Path) -> dict[str, str | Path]:
    """What `train` starts from: {"start": a model}, and "adapter" where it goes on with 02's.

    params: the stage's and the run's. merged: of 03; adapter: of 02. FileNotFoundError where
    `start_from` is no folder of a model; ValueError for what cannot act with 02's adapter.
    """
    if params.start_from == "merged":
        return {"start": merged}
    if params.start_from == "base":
        return {"start": resolve_model(params.base_model)}
    if params.start_from == "adapter":
        _check_goes_with_adapter(params, LoraConfig.from_pretrained(adapter))
        return {"start": resolve_model(params.base_model), "adapter": adapter}
    folder = model_folder(params.start_from)
    if not folder.is_dir():
        raise FileNotFoundError(f"start_from is '{params.start_from}'; use merged, base or "
                                "adapter, or the folder of a model")
    check_model_folder(folder)
    return {"start": folder}


def _check_goes_with_adapter(params: SimpleNamespace, config: LoraConfig) -> None:
    """ValueError for a parameter that contradicts 02's adapter, or cannot act on a 4-bit base."""
    own = lora_config(params.lora_r, params.lora_alpha, lora_targets=params.lora_targets)
    for name, value, due in (("lora_r", own.r, config.r),
                             ("lora_alpha", own.lora_alpha, config.lora_alpha),
                             ("lora_targets", own.target_modules, config.target_modules)):
        if value != due:
            raise ValueError(f"start_from is 'adapter', which has another {name}; set {name} to "
                             "that of 02_sft")
    if params.beta:
        raise ValueError("beta needs the model that RL starts from as its reference, and without "
                         "its adapter a 4-bit model is the base; set beta to 0, or start_from to "
                         "merged")
    if params.server:
        raise ValueError("a server holds the full weights, not the 4-bit ones that start_from "
                         "'adapter' trains on; set server to \"\", or start_from to merged")


def load_start(hardware: Hardware, box_format: BoxFormat, start: str | Path,
               adapter: str | Path = "", lora_dropout: float = 0.0) -> Policy:
    """The model that RL starts from; start, adapter: of `resolve_start`."""
    if adapter:
        return load_adapter_policy(start, Path(adapter), hardware, box_format, lora_dropout)
    return load_policy(start, hardware, box_format)


def train(folder: Path, params: SimpleNamespace, kept: str, start: str, adapter: str = "") -> None:
    """Train the model `start` on the samples of file `kept`, or go on; save the adapter.

    The one job of all processes that train together. folder: the stage's; params: its parameters
    and the run's. adapter: goes on being trained, on the 4-bit `start`; "" for a new one.
    """
    box_format = BoxFormat(params.min_pixels, params.max_pixels, params.coordinates)
    hardware = choose_hardware(params.dtype, params.device)
    policy = load_start(hardware, box_format, start, adapter, params.lora_dropout)
    trainer = grpo_trainer(policy, read_samples(Path(kept)), folder, params)
    check_adapters(trainer.model)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    train_or_resume(trainer, folder)
    save_adapter(trainer, folder)


def training_curves(history: list[dict]) -> list[dict]:
    """Rows of a trainer's log history: step, reward, every single reward, and CURVES.

    A row is the update that first learns from a batch of replies. None where a figure is missing,
    or NaN because no sample of the step has that reward. clip_ratio: the share of clipped ratios in
    the last update that learns from the same replies; only where a clip can act.
    """
    updates = []
    for row in history:
        if "reward" in row:
            updates.append(dict(row))
        elif updates and "loss" in row:
            updates[-1]["clip_ratio"] = row.get("clip_ratio/region_mean",
                                                row.get("cispo_clip_ratio"))
    names = {name for row in updates for name in row
             if name.startswith("rewards/") and name.endswith("/mean")}
    # sorted, because a log that was read back after a kill has its names in another order
    single = {name: name.split("/")[1] for name in sorted(names)}
    served = {name: short for name, short in SAMPLING_CURVES.items()
              if any(name in row for row in updates)}
    has_clip = any(row.get("clip_ratio") is not None for row in updates)
    clip = {"clip_ratio": "clip_ratio"} if has_clip else {}
    curves = {"step": "step", "reward": "reward", **single, **CURVES, **clip, **served}
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
