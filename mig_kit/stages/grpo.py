"""Stage 05: rule-based RL with GRPO (TRL's GRPOTrainer) from the merged model, with a new LoRA.

Loss and, without a function of yours, advantages are TRL's (`training.recipe_trainer` says where).
The paper's abstracts say "rule-based RL". GRPO, group size, rates and KL weight are our choices;
the full profiles' are VLM-R1's and MG-Thinker's. The loss averages over an update's tokens (TRL's
`loss_type` dapo), not first over each reply as in GRPO's own paper (arXiv 2402.03300).
"""

import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.models.model_folders import check_model_folder
from mig_kit.models.processors import describe_other_format
from mig_kit.pipeline.runs import Run
from mig_kit.prompts import Answer, chat_messages, read_reply
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample, read_samples
from mig_kit.serving import served_rollouts
from mig_kit.shared_prefix.prefixes import PAD_MULTIPLE
from mig_kit.stages.sanity_checks import StopIfNothingLearns
from mig_kit.training import recipe_trainer, resuming
from mig_kit.training.reward_loading import Score, load_function, load_rewards, score_functions
from mig_kit.world.claims import count_claims, read_claims
from mig_kit.world.teacher import DETAILS, recognize_detail

ROLLOUT_STEPS = 25  # the replies to a few prompts are kept every so many updates
# TRL's name of a logged figure -> its name in the curves, which also hold every reward
CURVES = {
    "completions/mean_length": "length", "entropy": "entropy", "kl": "kl",
    "frac_reward_zero_std": "zero_std", "completions/clipped_ratio": "clipped_ratio",
    "sampling/sampling_logp_difference/mean": "logp_difference"}


def reward_functions(scores: dict[str, Score], samples: Sequence[Sample],
                     box_format: BoxFormat) -> list[Callable]:
    """The rewards in TRL's form; its column `sample` is the index into `samples`."""
    @lru_cache(4096)  # TRL calls one reward after the other
    def read(reply: str, index: int) -> Answer:
        return read_reply(reply, samples[index], box_format)

    return [_trl_reward(score, samples, read, logs_details=number == 0)
            for number, score in enumerate(scores.values())]


def _trl_reward(score: Score, samples: Sequence[Sample], read: Callable[[str, int], Answer],
                logs_details: bool) -> Callable:
    def score_all(completions, sample, log_metric=None, **given) -> list[float | None]:
        answers = [read(completion[0]["content"], index)
                   for completion, index in zip(completions, sample)]
        answered = [samples[index] for index in sample]
        if logs_details and log_metric:
            shares = detail_shares(answers, answered) | reasoning_shares(answers, answered)
            for name, share in shares.items():
                log_metric(f"detail/{name}", share)
        return score.score_batch(answers, answered, completions=completions, sample=sample,
                                 log_metric=log_metric, **given)

    score_all.__name__ = score.name  # TRL logs a reward under its function's name
    return score_all


def detail_shares(answers: Sequence[Answer], samples: Sequence[Sample]) -> dict[str, float]:
    """Share of the replies that reason at each of the teacher's DETAILS; {} for own data."""
    details = [recognize_detail(answer) for answer, sample in zip(answers, samples)
               if sample.notes]
    return {detail: details.count(detail) / len(details) for detail in DETAILS} if details else {}


def reasoning_shares(answers: Sequence[Answer], samples: Sequence[Sample]) -> dict[str, float]:
    """{"truth": true claims among judged ones, "coverage"} of all replies, 0..1.

    Judged by the samples' notes. A share of nothing is left out; {} for own data.
    """
    counts = [count_claims(answer, sample) for answer, sample in zip(answers, samples)]
    true, judged, _, listed, to_list = map(sum, zip(*counts))
    ratios = {"truth": (true, judged), "coverage": (listed, to_list)}
    return {name: part / total for name, (part, total) in ratios.items() if total}


def describe_answer(answer: Answer, sample: Sample, scores: dict[str, Score],
                    weights: dict[str, float]) -> dict:
    """The row of a rollout's log: reply, rewards, their weighted sum, correctness, boxes as
    (image number, box in pixels of the original) pairs, and (start, end) of its false claims.
    """
    rewards = {name: score(answer, sample) for name, score in scores.items()}
    total = sum(weights.get(name, 1.0) * value for name, value in rewards.items()
                if value is not None)
    return {"reply": answer.text, "reward": total, "rewards": rewards,
            "correct": is_correct(answer, sample),
            "boxes": [(answer.image, answer.box)] if answer.box else [],
            "detail": recognize_detail(answer) if sample.notes else "",
            "false": [(claim.start, claim.end) for claim in read_claims(answer.text, sample)
                      if claim.is_true is False]}


def grpo_rows(samples: Sequence[Sample], box_format: BoxFormat, with_images: bool) -> Dataset:
    """A table of prompts and indices of samples; a row is made when it is read.

    with_images: add images, which stock TRL reads; else the first message also holds the index.
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
    else:
        for index, prompt in zip(columns["sample"], rows["prompt"]):
            prompt[0]["sample"] = index
    return rows


def grpo_trainer(policy: loading.Policy, samples: Sequence[Sample], folder: Path,
                 params: SimpleNamespace) -> GRPOTrainer:
    """The GRPO trainer over `samples`, with a new adapter on the policy; params: the stage's."""
    hardware = policy.hardware
    if hardware.device == "cpu":  # else sums over a group depend on which thread comes first
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    rewards = load_rewards(params.rewards, folder)
    weights = [params.reward_weights.get(name, 1.0) for name in rewards]
    arguments = resuming.trainer_arguments(
        GRPOConfig, SimpleNamespace(**vars(params) | {"reward_weights": weights}), hardware, folder,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        generation_kwargs={},  # refused in `trl`, because a server would not get them
        **{"pad_to_multiple_of": PAD_MULTIPLE} if params.share_prefix else {})
    # a resumed training draws new replies, so a checkpoint comes after a batch's last update
    iterations = params.num_iterations
    arguments |= {"epsilon_high": params.epsilon_high or None,
                  "save_steps": -(-params.save_steps // iterations) * iterations}
    # of servers' replies; TRL's default weights each as a whole, and drops long ones
    config = GRPOConfig(**{"vllm_importance_sampling_mode": "token_truncate"} | arguments)
    resuming.use_one_device(config)
    scores = score_functions(rewards, policy.box_format, params.hallucinated_image_penalty)
    logged = ("reward", *(f"rewards/{name}/mean" for name in rewards), "entropy")
    describe = partial(describe_answer, scores=scores, weights=params.reward_weights)
    callbacks = [resuming.ProgressLines(logged), StopIfNothingLearns()]
    served = None
    if params.server:
        served = served_rollouts.ServedRollouts(policy.model.name_or_path, policy.box_format,
                                                folder, params)
        callbacks.append(served_rollouts.StopIfServerDiffers())
    common = {
        "model": policy.model, "args": config, "processing_class": policy.processor,
        "reward_funcs": reward_functions(scores, samples, policy.box_format),
        "train_dataset": grpo_rows(samples, policy.box_format, not params.share_prefix),
        "peft_config": resuming.lora_config(params.lora_r, lora_targets=params.lora_targets),
        "callbacks": callbacks}
    if params.share_prefix:
        # It computes what TRL computes and reads each prompt once per group. A step holds groups of
        # like lengths, where TRL mixes them; `bnpo` and `top_entropy_quantile`, which look at one
        # step at a time, depend on the number of processes.
        trainer = recipe_trainer.RecipeTrainer(
            **common, samples=samples, box_format=policy.box_format,
            micro_completions=params.micro_replies, served=served)
    else:
        trainer = recipe_trainer.ResumableGRPOTrainer(**common)  # stock TRL
    if params.advantage:
        trainer.advantage = load_function(params.advantage, folder)
    trainer.add_callback(recipe_trainer.KeepRollouts(  # draws before the first update, too
        trainer, policy, samples, folder, ROLLOUT_STEPS, describe))
    resuming.train_in_float32(trainer.model)
    return trainer


def one_group_trainer(policy: loading.Policy, sample: Sample, folder: Path,
                      params: SimpleNamespace) -> recipe_trainer.RecipeTrainer:
    """A trainer whose update is one prompt's group, for `recipe_trainer.draw_group` to look at.

    The loss is plain dapo, of replies that this process draws. Random states stay as they were.
    """
    plain = {
        "share_prefix": True, "server": "", "report_to": "none",
        "per_device_train_batch_size": params.num_generations, "gradient_accumulation_steps": 1,
        "loss_type": "dapo", "importance_sampling_level": "token", "num_iterations": 1,
        "mask_truncated_completions": False, "top_entropy_quantile": 1.0}
    with recipe_trainer.keep_global_state():
        trainer = grpo_trainer(policy, [sample], folder, SimpleNamespace(**vars(params) | plain))
    if params.gradient_checkpointing:  # as `train` would switch it on
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()  # a layer in evaluation keeps everything
    return trainer


def find_lesson_model(run_id: str) -> Path:
    """The folder of the run's SFT model, else of the one that ships; prints which."""
    run = Run(run_id)
    if run.record("03_merge"):
        print(f"the SFT model of run '{run_id}' learns")
        return run.stage_folder("03_merge") / "merged"
    print(f"run '{run_id}' has no SFT model, so the one that ships learns: tiny/sft")
    return loading.resolve_model("tiny/sft")


def resolve_start(params: SimpleNamespace, merged: Path) -> str | Path:
    """The model that RL starts from; raises as `check_model_folder` for a folder without one."""
    if params.start_from == "merged":
        return merged
    if params.start_from == "base":
        return loading.resolve_model(params.base_model)
    folder = loading.resolve_model(params.start_from)
    check_model_folder(folder)
    box_format = BoxFormat.of(vars(params))
    if difference := describe_other_format(folder, box_format):
        print(f"warning: {difference}", flush=True)
    return folder


def train(folder: Path, params: SimpleNamespace, kept: str, start: str) -> None:
    """Train an adapter on the samples of file `kept`, or resume, and save it.

    Every process that trains calls it. params: the stage's and the run's. start: the model.
    """
    box_format = BoxFormat.of(vars(params))
    hardware = loading.choose_hardware(params.dtype, params.device)
    policy = loading.load_policy(start, hardware, box_format)
    trainer = grpo_trainer(policy, read_samples(Path(kept)), folder, params)
    loading.check_adapters(trainer.model)
    if trainer.is_world_process_zero():
        trainer.model.print_trainable_parameters()
    resuming.train_or_resume(trainer, folder)
    resuming.save_adapter(trainer, folder)
    if trainer.is_world_process_zero():  # the adapters that servers drew replies with
        shutil.rmtree(folder / "checkpoints" / served_rollouts.SERVED_ADAPTERS, ignore_errors=True)


def training_curves(history: list[dict]) -> list[dict]:
    """Rows of a trainer's log history: step, reward, every single reward, and CURVES.

    A row is the update that first learns from a batch of replies; None for a missing figure.
    clip_ratio: of the last update that learns from the same replies, if a clip can act.
    """
    updates = []
    for row in history:
        if "reward" in row:
            updates.append(dict(row))
        elif updates and "loss" in row:
            updates[-1]["clip_ratio"] = row.get("clip_ratio/region_mean",
                                                row.get("cispo_clip_ratio"))
    # sorted, because a log that was read back after a kill has its names in another order
    names = sorted({name for row in updates for name in row})
    single = {name: name.split("/")[1] for name in names
              if name.startswith("rewards/") and name.endswith("/mean")}
    further = {f"detail/{name}": name for name in (*DETAILS, "truth", "coverage")} | {
        "clip_ratio": "clip_ratio"} | served_rollouts.SAMPLING_CURVES
    logged = {name for row in updates for name, value in row.items() if value is not None}
    curves = {"step": "step", "reward": "reward", **single, **CURVES,
              **{name: short for name, short in further.items() if name in logged}}
    return [{short: None if (value := row.get(name)) != value else value  # NaN is not itself
             for name, short in curves.items()} for row in updates]


def length_collapse_warning(rows: list[dict], span: int = 10, share: float = 0.8) -> str:
    """A sentence if the last `span` updates' replies have shrunk below `share`, or ""."""
    if len(rows) < 2 * span:
        return ""
    first, last = (sum(row["length"] for row in part) / span
                   for part in (rows[:span], rows[-span:]))
    if last >= share * first:
        return ""
    return (f"replies fell from {first:.0f} to {last:.0f} tokens: the model may have given up "
            "listing its evidence, and with it what there was to gain; lower learning_rate and "
            "look at 'length' again")
