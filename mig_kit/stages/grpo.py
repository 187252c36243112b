"""Stage 05: rule-based reinforcement learning with GRPO (TRL's GRPOTrainer) from the merged model, with a new LoRA.

Deviations from the paper: it publishes no group size, rates or KL weight; the tiny values are ours, the full profiles'
are VLM-R1's and MG-Thinker's. `SharedPrefixGRPOTrainer` computes what TRL computes, reading each prompt once per group;
`share_prefix: false` is stock TRL.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl import GRPOConfig, GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.engine.generation import Sampling, count_prompts_at_once, draw_uniforms, generate_rollouts, kv_bytes_per_token
from mig_kit.engine.logprobs import completion_logps, packed_logps
from mig_kit.engine.models import Hardware, load_model, load_processor
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.engine.training import KeepAdapterDtype, LiveCurves, ProgressLines, tracker_args, train_or_resume, use_one_device
from mig_kit.prompts import chat_messages
from mig_kit.rewards import box_reward, choice_reward, cites_only_existing_images, format_reward, image_reward
from mig_kit.sample import Sample, read_samples
from mig_kit.stages.sanity_checks import StopIfNothingLearns


def reward_functions(samples: list[Sample], box_format: BoxFormat, missing_images: str = "format") -> list[Callable]:
    """The four rewards in TRL's form; the column `sample` is the index into `samples`.

    None where a reward does not apply: image and box of a multiple-choice sample, choice of any other. missing_images: what a
    reply loses whose reasoning cites an image that the prompt does not have: "nothing", the "format" reward, or "all" of them.
    """
    if missing_images not in ("nothing", "format", "all"):
        raise ValueError(f"missing_images is '{missing_images}'; use nothing, format or all")

    def over(function, applies):
        lost = missing_images == "all" or missing_images == "format" and function is format_reward

        def one(reply: str, sample: Sample) -> float | None:
            if not applies(sample):
                return None
            return 0.0 if lost and not cites_only_existing_images(reply, sample) else function(reply, sample)

        return lambda completions, sample, **_: [one(c[0]["content"], samples[i]) for c, i in zip(completions, sample)]

    found = [over(format_reward, lambda s: True), over(image_reward, lambda s: not s.options),
             over(partial(box_reward, box_format=box_format), lambda s: not s.options), over(choice_reward, lambda s: bool(s.options))]
    for function, name in zip(found, ("format", "image", "box", "choice")):
        function.__name__ = name
    return found


def grpo_rows(samples: list[Sample], box_format: BoxFormat, with_images: bool) -> Dataset:
    """A table of prompt and sample index; images only where TRL itself reads them."""
    return Dataset.from_list([
        {"prompt": chat_messages(s, box_format), "sample": i, **({"images": list(s.images)} if with_images else {})}
        for i, s in enumerate(samples)])


def group_advantages(rewards: torch.Tensor, group: int, scale: str = "group") -> tuple[torch.Tensor, torch.Tensor]:
    """(A, spread): A = (r - the group's mean) / (std + 1e-4), both (rows,). rewards: (rows,), groups in sequence.

    scale: whose std: "group" (DeepSeekMath, arXiv 2402.03300), "batch" (a group whose replies differ little then teaches little,
    however clear its order is) or "none" (no division). TRL's names and epsilon. spread: the std within the row's group.
    """
    grouped = rewards.view(-1, group)
    spread = grouped.std(1).repeat_interleave(group)
    centred = rewards - grouped.mean(1).repeat_interleave(group)
    return (centred if scale == "none" else centred / ((rewards.std() if scale == "batch" else spread) + 1e-4)), spread


class SharedPrefixGRPOTrainer(KeepAdapterDtype, GRPOTrainer):
    """GRPOTrainer that prefills every prompt once per group, in generation and in training.

    samples: what the column `sample` of the data set points into. A process's batch holds whole groups. held: replies whose
    graph is kept at a time (0: all of them); fewer need less memory, and one more forward pass.
    """

    def __init__(self, *args, samples: list[Sample], cache: PromptCache, autocast: bool, held: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples, self.cache, self.autocast_rollouts, self.held = samples, cache, autocast, held
        self._rows = None
        if self.args.per_device_train_batch_size % self.num_generations:
            raise ValueError("share_prefix needs batch_size to be a multiple of num_generations, so that groups stay whole")

    def _prepare_inputs(self, generation_batch):
        """As TRL's, which scatters the replies over the steps of an update; here groups stay whole, like lengths together."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before or len(self._buffered_inputs) == 1:
            return inputs
        parts = self._buffered_inputs
        rows = torch.cat([part["sample"] for part in parts])
        distinct = rows.unique().tolist()
        lengths = {i: len(p.ids) for i, p in zip(distinct, self.cache.get([self.samples[i] for i in distinct]))}
        order = torch.tensor(sorted(range(len(rows)), key=lambda r: (lengths[rows[r].item()], rows[r].item())), device=rows.device)
        whole = {name: torch.cat([part[name] for part in parts])[order] for name, value in parts[0].items() if value.ndim}
        self._buffered_inputs = [parts[0] | {name: value.chunk(len(parts))[i] for name, value in whole.items()}
                                 for i in range(len(parts))]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generate_and_score_completions(self, inputs):
        device, mode = self.accelerator.device, "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        owners = [row["sample"] for row in inputs][::group]
        prompts = self.cache.get([self.samples[i] for i in owners])
        rank, all_prompts = self.accelerator.process_index, len(prompts) * self.accelerator.num_processes
        draws = draw_uniforms(self.args.seed * 1_000_003 + self.state.global_step, all_prompts, group, self.max_completion_length)
        draws = draws[rank * len(prompts):(rank + 1) * len(prompts)]
        model = self.accelerator.unwrap_model(self.model)
        sampling = Sampling(self.temperature, self.top_p, self.max_completion_length, **self.args.generation_kwargs)
        model.eval()
        longest = max(len(prompt.ids) for prompt in prompts)
        at_once = count_prompts_at_once(len(prompts), longest, group, self.max_completion_length, kv_bytes_per_token(model))
        replies = [r for start in range(0, len(prompts), at_once)
                   for g in generate_rollouts(model, self.processing_class, prompts[start:start + at_once], group, sampling,
                                     draws[start:start + at_once], self.autocast_rollouts) for r in g]
        model.train(mode == "train")
        texts = self.processing_class.tokenizer.batch_decode(replies, skip_special_tokens=True)
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        per_function = self._calculate_rewards(inputs, [row["prompt"] for row in inputs], completions, replies)
        rewards = (per_function * self.reward_weights.to(device)).nansum(1)
        advantages, spread = group_advantages(rewards, group, self.scale_rewards)
        here = slice(rank * len(inputs), (rank + 1) * len(inputs))
        ids = torch.full((len(replies), pad_to_multiple(max(map(len, replies)))), self._tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for i, reply in enumerate(replies):
            ids[i, :len(reply)], mask[i, :len(reply)] = torch.tensor(reply, device=device), 1
        lengths = mask.sum(1).float()
        cut = torch.tensor([reply[-1] not in self.eos_token_ids for reply in replies], device=device)
        log = self._metrics[mode]
        for i, name in enumerate(self.reward_func_names):
            log[f"rewards/{name}/mean"].append(per_function[:, i].nanmean().item())
        log["reward"].append(rewards.mean().item())
        log["reward_std"].append(rewards.std().item())
        log["frac_reward_zero_std"].append((spread < 1e-6).float().mean().item())
        log["completions/mean_length"].append(self.accelerator.gather(lengths).mean().item())
        log["completions/clipped_ratio"].append(self.accelerator.gather(cut.float()).mean().item())
        rows = torch.tensor([row["sample"] for row in inputs], device=device)
        empty = torch.zeros(len(replies), 0, dtype=torch.long, device=device)
        output = {"prompt_ids": empty, "prompt_mask": empty, "completion_ids": ids, "completion_mask": mask,
                  "advantages": advantages[here], "sample": rows,
                  "num_items_in_batch": self.accelerator.gather(mask.sum()).sum()}
        again = self.num_iterations > 1 or self.args.steps_per_generation > self.args.gradient_accumulation_steps
        with torch.no_grad():
            if again:
                output["old_per_token_logps"] = self._logps(self.model, rows, ids, mask)[0]
            if self.beta != 0.0:
                with model.disable_adapter():
                    output["ref_per_token_logps"] = self._logps(self.model, rows, ids, mask)[0]
        return output

    def _logps(self, model, rows, ids, mask):
        """(log-probabilities, entropies) of completions (rows, tokens), `held` replies, or a step's, in memory at a time."""
        distinct, owner = rows.unique(return_inverse=True)
        prompts = self.cache.get([self.samples[i] for i in distinct.tolist()])
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))  # like lengths together: less padding
        owner = torch.tensor(order, device=owner.device).argsort()[owner]
        most = self.held or self.args.per_device_train_batch_size  # the reference's pass is over the replies of several steps
        at_once = max(1, most // self.num_generations)
        logps, entropies = torch.zeros(2, *ids.shape, device=ids.device)
        for start in range(0, len(prompts), at_once):
            there = ((owner >= start) & (owner < start + at_once)).nonzero()[:, 0]
            longest = min(ids.shape[1], pad_to_multiple(int(mask[there].sum(1).max())))
            given = (self.accelerator.unwrap_model(model), [prompts[i] for i in order[start:start + at_once]],
                     owner[there] - start, ids[there, :longest], mask[there, :longest],
                     self.processing_class.image_token_id, self.temperature)
            logps_of = packed_logps if self.args.gradient_checkpointing else completion_logps
            last = start + at_once >= len(prompts)  # whose backward pass comes first: its graph is in memory anyway
            with self.accelerator.autocast():
                found = (logps_of(*given) if last or not torch.is_grad_enabled()
                         else checkpoint(logps_of, *given, use_reentrant=False))
            rest = (0, ids.shape[1] - longest)
            logps, entropies = (whole.index_copy(0, there, pad(part, rest)) for whole, part in zip((logps, entropies), found))
        return logps, entropies

    def training_step(self, model, inputs, num_items_in_batch):
        """As TRL's; afterwards the processes' gradients are averaged, for the shared passes go around DDP, which would do it."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.num_processes > 1 and self.accelerator.sync_gradients:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.accelerator.num_processes
        return loss

    def _compute_loss(self, model, inputs):
        self._rows = inputs["sample"]
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        logps, entropies = self._logps(model, self._rows, input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:])
        return logps, entropies, None


def grpo_trainer(model, processor, samples: list[Sample], hw: Hardware, folder: Path, *, share_prefix: bool, adapter,
            num_generations: int, batch_size: int, held: int, gradient_accumulation: int, max_steps: int, learning_rate: float,
            schedule: str, warmup: int, scale_rewards: str, beta: float, temperature: float, max_new_tokens: int,
            weights: list[float], clip_low: float, clip_high: float, seed: int, save_steps: int,
            box_format: BoxFormat, missing_images: str = "format", checkpoint_layers: bool = False,
            min_new_tokens: int = 0, track: str = "none", processes: int = 1) -> GRPOTrainer:
    """The GRPO trainer over `samples`. batch_size counts replies; weights are those of format, image, box and choice.

    checkpoint_layers: only the layers' inputs are kept for the backward pass, with shared prefixes as without. processes: that
    train together, under `workers.beside`; they share the steps of an update, so that it is of as many replies as by one.
    """
    if len(samples) < (prompts := batch_size * gradient_accumulation // num_generations):
        raise ValueError(f"there are {len(samples)} prompts, and an update needs {prompts} different ones (batch_size x "
                         "gradient_accumulation / num_generations); lower gradient_accumulation, or widen lowest and highest in 04")
    if gradient_accumulation % processes:
        raise ValueError(f"{processes} processes cannot share {gradient_accumulation} steps of an update evenly; set "
                         f"gradient_accumulation to a multiple of processes")
    if hw.device == "cpu":  # sums over a group's rows would otherwise depend on which thread comes first
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    config = GRPOConfig(
        output_dir=str(folder / "checkpoints"), num_generations=num_generations, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation // processes, max_steps=max_steps, learning_rate=learning_rate,
        lr_scheduler_type=schedule, warmup_steps=warmup, scale_rewards=scale_rewards, beta=beta, temperature=temperature,
        max_completion_length=max_new_tokens, reward_weights=weights, generation_kwargs={"min_new_tokens": min_new_tokens},
        epsilon=clip_low, epsilon_high=clip_high, seed=seed,
        data_seed=seed, logging_steps=1, save_steps=save_steps, save_total_limit=1, **tracker_args(track, folder),
        use_cpu=hw.device == "cpu", bf16=hw.autocast or hw.dtype == torch.bfloat16,
        gradient_checkpointing=checkpoint_layers, gradient_checkpointing_kwargs={"use_reentrant": False},
        dataloader_pin_memory=False)
    use_one_device(config)
    common = dict(model=model, args=config, reward_funcs=reward_functions(samples, box_format, missing_images),
                  processing_class=processor,
                  train_dataset=grpo_rows(samples, box_format, with_images=not share_prefix), peft_config=adapter,
                  callbacks=[ProgressLines(("reward", *(f"rewards/{name}/mean" for name in ("format", "image", "box", "choice")),
                                       "entropy")), StopIfNothingLearns(),
                             LiveCurves(training_curves, ("reward", "image", "box", "choice"))])
    if not share_prefix:
        return GRPOTrainer(**common)
    return SharedPrefixGRPOTrainer(**common, samples=samples, autocast=hw.autocast, held=held,
                                   cache=PromptCache(model, processor, box_format, autocast=hw.autocast))


def train_as_worker(merged: Path, kept: Path, hw: Hardware, folder: Path, settings: dict) -> None:
    """What the other processes of a training do (`workers.beside`): train the merged model on `kept`; settings as of `trainer`."""
    model, processor = load_model(merged, hw), load_processor(merged, settings["box_format"])
    train_or_resume(grpo_trainer(model, processor, read_samples(kept), hw, folder, **settings), folder)


def training_curves(history: list[dict]) -> list[dict]:
    """Rows of a trainer's log history: step, rewards, length, entropy, KL (if any) and groups without signal."""
    names = {"reward": "reward", "rewards/format/mean": "format", "rewards/image/mean": "image", "rewards/box/mean": "box",
             "rewards/choice/mean": "choice", "completions/mean_length": "length", "entropy": "entropy", "kl": "kl",
             "frac_reward_zero_std": "no_signal", "completions/clipped_ratio": "cut"}
    found = [{"step": row["step"], **{new: row.get(old) for old, new in names.items()}} for row in history if "reward" in row]
    return [{key: None if value != value else value for key, value in row.items()} for row in found]  # NaN: no such sample


def length_collapse_warning(rows: list[dict], span: int = 10, share: float = 0.8) -> str:
    """One sentence if the replies of the last `span` updates have less than `share` of the first ones' tokens, else "".

    rows: of `curves`. Where listing what is in each image pays only later, this is how reinforcement fails in the tiny world.
    """
    if len(rows) < 2 * span:
        return ""
    first, last = (sum(row["length"] for row in part) / span for part in (rows[:span], rows[-span:]))
    if last >= share * first:
        return ""
    return (f"replies fell from {first:.0f} to {last:.0f} tokens: the model may have given up showing its evidence, and with it "
            "what there was to gain; lower learning_rate and look at 'length' again")
