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
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl import GRPOConfig, GRPOTrainer

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.engine.generation import (
    Sampling,
    count_prompts_at_once,
    draw_uniforms,
    generate_rollouts,
    kv_bytes_per_token,
    max_kv_bytes,
)
from mig_kit.engine.logprobs import completion_logps, packed_logps
from mig_kit.engine.models import Policy, check_adapters, choose_hardware, load_policy
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.prompt_cache import Prompt, PromptCache
from mig_kit.engine.sampling import make_cache
from mig_kit.engine.served_rollouts import SAMPLING_CURVES, ServedRollouts
from mig_kit.engine.training import (
    KeepAdapterDtype,
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

# parameters of GRPOConfig that `SharedPrefixGRPOTrainer` does not read
NOT_SHARED = {"top_k", "min_p", "repetition_penalty", "mask_truncated_completions",
              "multi_objective_aggregation", "entropy_coef", "steps_per_generation",
              "generation_batch_size", "use_vllm", "log_completions"}


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


class SharedPrefixGRPOTrainer(KeepAdapterDtype, GRPOTrainer):
    """GRPOTrainer that reads every prompt once per group, in generation and in training.

    samples: what the column `sample` of the data set points into. A process's batch holds whole
    groups. micro_replies: replies whose graph is kept at a time (0: all of them); fewer need less
    memory, and one more forward pass. served: draws the completions from servers; None: in here.
    """

    def __init__(self, *args, samples: Sequence[Sample], cache: PromptCache, autocast: bool,
                 micro_replies: int = 0, served: ServedRollouts | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples, self.cache, self.micro_replies = samples, cache, micro_replies
        self.autocast_rollouts = autocast
        self.served = served
        self.use_vllm = served is not None  # read by TRL's loss alone: it applies the correction
        # The sample of every row of the step under way: TRL's loss asks for log-probabilities by
        # token ids alone, which do not say whose images they are about.
        self._step_samples = None
        self._step_inputs: dict = {}
        if self.args.per_device_train_batch_size % self.num_generations:
            raise ValueError("share_prefix needs per_device_train_batch_size to be a multiple of "
                             "num_generations, so that groups stay whole")

    def _prompts_of(self, indices: list[int]) -> list[Prompt]:
        return self.cache.get([self.samples[index] for index in indices])

    def _prepare_inputs(self, generation_batch):
        """As TRL's, but groups stay whole, and prompts of like lengths share a step.

        TRL scatters the replies over the steps of an update.
        """
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        steps = self._buffered_inputs
        if steps is before or len(steps) == 1:
            return inputs
        rows = torch.cat([step["sample"] for step in steps])
        distinct = rows.unique().tolist()
        lengths = {index: len(prompt.ids)
                   for index, prompt in zip(distinct, self._prompts_of(distinct))}
        by_length = sorted(range(len(rows)),
                           key=lambda row: (lengths[rows[row].item()], rows[row].item()))
        order = torch.tensor(by_length, device=rows.device)
        per_row = {name: torch.cat([step[name] for step in steps])[order].chunk(len(steps))
                   for name, value in steps[0].items() if value.ndim}
        self._buffered_inputs = [
            steps[0] | {name: chunks[number] for name, chunks in per_row.items()}
            for number in range(len(steps))]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs):
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        rank = self.accelerator.process_index
        completions = self._draw_completions(inputs, group, mode)
        tokenizer = self.processing_class.tokenizer
        replies = tokenizer.batch_decode(completions, skip_special_tokens=True)
        messages = [[{"role": "assistant", "content": reply}] for reply in replies]
        per_function = self._calculate_rewards(
            inputs, [row["prompt"] for row in inputs], messages, completions)
        weights = self.reward_weights.to(self.accelerator.device)
        total = (per_function * weights).nansum(1)
        advantages, group_std = group_advantages(total, group, self.scale_rewards)
        own_rows = slice(rank * len(inputs), (rank + 1) * len(inputs))
        output = self._to_batch(inputs, completions) | {"advantages": advantages[own_rows]}
        if self.served:
            output["sampling_per_token_logps"] = self.served.padded_logps(output["completion_ids"])
        self._log_rollouts(mode, per_function, total, group_std, completions, output)
        self._add_old_and_reference_logps(output)
        return output

    def _draw_completions(self, inputs, group: int, mode: str) -> list[list[int]]:
        """Token ids of `group` completions to each of this process's prompts, in sequence."""
        prompts = self._prompts_of([row["sample"] for row in inputs][::group])
        accelerator, length = self.accelerator, self.max_completion_length
        # one draw for all processes, so that N of them draw what one would
        uniforms = draw_uniforms(self.args.seed * 1_000_003 + self.state.global_step,
                                 len(prompts) * accelerator.num_processes, group, length)
        first = accelerator.process_index * len(prompts)
        uniforms = uniforms[first:first + len(prompts)]
        model = accelerator.unwrap_model(self.model)
        sampling = Sampling(self.temperature, self.top_p, length, **self.args.generation_kwargs)
        if self.served:
            samples = [self.samples[row["sample"]] for row in inputs][::group]
            return self.served.draw(self, samples, prompts, group, sampling)
        longest = max(len(prompt.ids) for prompt in prompts)
        at_once = count_prompts_at_once(len(prompts), longest, group, length,
                                        kv_bytes_per_token(model), max_kv_bytes(model.device))
        completions = []
        model.eval()
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            rollouts = generate_rollouts(model, self.processing_class, prompts[part], group,
                                         sampling, uniforms[part], self.autocast_rollouts)
            completions += [completion for rollout in rollouts for completion in rollout]
        model.train(mode == "train")
        return completions

    def _to_batch(self, inputs, completions: list[list[int]]) -> dict:
        """Completions as TRL's loss reads them, without prompts: the cache holds those."""
        device = self.accelerator.device
        length = pad_to_multiple(max(map(len, completions)))
        ids = torch.full((len(completions), length), self._tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for row, completion in enumerate(completions):
            ids[row, :len(completion)] = torch.tensor(completion, device=device)
            mask[row, :len(completion)] = 1
        no_prompt = torch.zeros(len(completions), 0, dtype=torch.long, device=device)
        samples = torch.tensor([row["sample"] for row in inputs], device=device)
        return {"prompt_ids": no_prompt, "prompt_mask": no_prompt, "completion_ids": ids,
                "completion_mask": mask, "sample": samples,
                "num_items_in_batch": self.accelerator.gather(mask.sum()).sum()}

    def _log_rollouts(self, mode: str, per_function, total, group_std, completions,
                      output) -> None:
        """Log the main figures of a batch of rollouts under TRL's names.

        frac_reward_zero_std is always per group; TRL's follows `scale_rewards`.
        """
        gather, log = self.accelerator.gather, self._metrics[mode]
        lengths = output["completion_mask"].sum(1).float()
        is_cut = torch.tensor([completion[-1] not in self.eos_token_ids
                               for completion in completions], device=lengths.device)
        for column, name in enumerate(self.reward_func_names):
            log[f"rewards/{name}/mean"].append(per_function[:, column].nanmean().item())
        log["reward"].append(total.mean().item())
        log["reward_std"].append(total.std().item())
        log["frac_reward_zero_std"].append((group_std < 1e-6).float().mean().item())
        log["completions/mean_length"].append(gather(lengths).mean().item())
        log["completions/clipped_ratio"].append(gather(is_cut.float()).mean().item())

    @torch.no_grad()
    def _add_old_and_reference_logps(self, output: dict) -> None:
        args = self.args
        arguments = (self.model, output["sample"], output["completion_ids"],
                     output["completion_mask"])
        learns_again = (self.num_iterations > 1
                        or args.steps_per_generation > args.gradient_accumulation_steps)
        if learns_again:
            output["old_per_token_logps"] = self._logps(*arguments)[0]
        if self.beta != 0.0:
            with self.accelerator.unwrap_model(self.model).disable_adapter():
                output["ref_per_token_logps"] = self._logps(*arguments)[0]

    def _logps(self, model, rows, ids, mask):
        """(log-probabilities, entropies) of completions, (rows, tokens) each.

        `micro_replies` replies, or a step's, are in memory at a time: the reference's pass is over
        the replies of several steps.
        """
        distinct, prompt_index = rows.unique(return_inverse=True)
        prompts = self._prompts_of(distinct.tolist())
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        prompts = [prompts[index] for index in order]  # like lengths together: less padding
        prompt_index = torch.tensor(order, device=prompt_index.device).argsort()[prompt_index]
        at_once = max(1, (self.micro_replies or self.args.per_device_train_batch_size)
                      // self.num_generations)
        compute = packed_logps if self.args.gradient_checkpointing else completion_logps
        logps, entropies = torch.zeros(2, *ids.shape, device=ids.device)
        for start in range(0, len(prompts), at_once):
            part = ((prompt_index >= start) & (prompt_index < start + at_once)).nonzero()[:, 0]
            length = min(ids.shape[1], pad_to_multiple(int(mask[part].sum(1).max())))
            arguments = (self.accelerator.unwrap_model(model), prompts[start:start + at_once],
                         prompt_index[part] - start, ids[part, :length], mask[part, :length],
                         self.processing_class.image_token_id, self.temperature)
            # the last part's backward pass comes first: its graph is in memory anyway
            is_last = start + at_once >= len(prompts)
            with self.accelerator.autocast():
                if is_last or not torch.is_grad_enabled():
                    values = compute(*arguments)
                else:
                    values = checkpoint(compute, *arguments, use_reentrant=False)
            padding = (0, ids.shape[1] - length)
            logps, entropies = (total.index_copy(0, part, pad(value, padding))
                                for total, value in zip((logps, entropies), values))
        return logps, entropies

    def training_step(self, model, inputs, num_items_in_batch):
        """As TRL's; then average the processes' gradients, because shared passes go around DDP."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        processes = self.accelerator.num_processes
        if processes > 1 and self.accelerator.sync_gradients:
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= processes
        return loss

    def _compute_loss(self, model, inputs):
        self._step_samples, self._step_inputs = inputs["sample"], inputs
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep,
                                           *args, **kwargs):
        logps, entropies = self._logps(model, self._step_samples, input_ids[:, -logits_to_keep:],
                                       attention_mask[:, -logits_to_keep:])
        if self.served:
            self.served.correct(self, self._step_inputs, logps.detach())
        return logps, entropies, None


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
        "peft_config": lora_config(params.lora_r, params.lora_alpha, params.lora_dropout),
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
