"""GRPO with shared prefixes: TRL's GRPOTrainer, reading every prompt once per group."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl import GRPOTrainer

from mig_kit.engine.generation import Sampling, draw_uniforms, generate_in_rounds
from mig_kit.engine.logprobs import completion_logps, packed_logps
from mig_kit.engine.models import protect_4bit_weights
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.prompt_cache import Prompt, PromptCache
from mig_kit.engine.served_rollouts import ServedRollouts
from mig_kit.engine.training import EpochRepeatSampler, KeepAdapterDtype
from mig_kit.sample import Sample

# parameters of GRPOConfig that `SharedPrefixGRPOTrainer` does not read
NOT_SHARED = {"top_k", "min_p", "repetition_penalty", "multi_objective_aggregation",
              "entropy_coef", "use_adaptive_entropy", "steps_per_generation",
              "generation_batch_size", "use_vllm", "log_completions", "chat_template_kwargs",
              "pad_to_multiple_of", "cache_implementation", "use_transformers_continuous_batching",
              "use_transformers_paged", "log_unique_prompts", "log_multimodal",
              "num_completions_to_print"}


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


class ResumableGRPOTrainer(KeepAdapterDtype, GRPOTrainer):
    """GRPOTrainer that goes on in any pass over the prompts as if nobody had interrupted it."""

    def _get_train_sampler(self, dataset=None):
        stock = super()._get_train_sampler(dataset)
        return EpochRepeatSampler(stock.data_source, stock.mini_repeat_count, stock.batch_size,
                                  stock.repeat_count, stock.shuffle, stock.seed)


class SharedPrefixGRPOTrainer(ResumableGRPOTrainer):
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

    def train(self, *args, **kwargs):
        """As TRL's. A server that it has started ends with it, also when it is interrupted."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.served:
                self.served.close()

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
        self._log_rollouts(mode, per_function, total, group_std, completions)
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
        protect_4bit_weights(model.eval())
        rollouts = generate_in_rounds(model, self.processing_class, prompts, group, sampling,
                                      uniforms, self.autocast_rollouts)
        model.train(mode == "train")
        return [completion for rollout in rollouts for completion in rollout]

    def _to_batch(self, inputs, completions: list[list[int]]) -> dict:
        """Completions as TRL's loss reads them, without prompts: the cache holds those.

        With `mask_truncated_completions` one without an end token has an empty mask, as in TRL.
        """
        device = self.accelerator.device
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        length = pad_to_multiple(max(map(len, completions)))
        ids = torch.full((len(completions), length), self._tokenizer.pad_token_id, device=device)
        mask = torch.zeros_like(ids)
        for row, completion in enumerate(completions):
            ids[row, :len(completion)] = torch.tensor(completion, device=device)
            is_left_out = self.mask_truncated_completions and completion[-1] not in ends
            mask[row, :len(completion)] = 0 if is_left_out else 1
        no_prompt = torch.zeros(len(completions), 0, dtype=torch.long, device=device)
        samples = torch.tensor([row["sample"] for row in inputs], device=device)
        return {"prompt_ids": no_prompt, "prompt_mask": no_prompt, "completion_ids": ids,
                "completion_mask": mask, "sample": samples,
                "num_items_in_batch": self.accelerator.gather(mask.sum()).sum()}

    def _log_rollouts(self, mode: str, per_function, total, group_std, completions) -> None:
        """Log the main figures of a batch of rollouts under TRL's names.

        frac_reward_zero_std is always per group; TRL's follows `scale_rewards`.
        """
        gather, log = self.accelerator.gather, self._metrics[mode]
        device = self.accelerator.device
        lengths = torch.tensor([float(len(completion)) for completion in completions],
                               device=device)
        is_cut = torch.tensor([completion[-1] not in self.eos_token_ids
                               for completion in completions], device=device)
        for column, name in enumerate(self.reward_func_names):
            log[f"rewards/{name}/mean"].append(per_function[:, column].nanmean().item())
        log["reward"].append(total.mean().item())
        log["reward_std"].append(total.std().item())
        log["frac_reward_zero_std"].append((group_std < 1e-6).float().mean().item())
        log["completions/mean_length"].append(gather(lengths).mean().item())
        log["completions/clipped_ratio"].append(gather(is_cut.float()).mean().item())
        self._log_metrics_of_rewards(mode)

    def _log_metrics_of_rewards(self, mode: str) -> None:
        """Log what reward functions gave to `log_metric`, a mean over the processes, as TRL does.
        """
        pending = self._pending_metrics
        for name in sorted(set(gather_object(list(pending)))):
            sums = torch.tensor([sum(pending.get(name, [])), len(pending.get(name, []))],
                                dtype=torch.float32, device=self.accelerator.device)
            total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
            self._metrics[mode][name].append(total / count)
        pending.clear()

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
        """(log-probabilities, entropies) of completions, (rows, tokens) each; 0 where masked.

        `micro_replies` replies, or a step's, are in memory at a time: the reference's pass is over
        the replies of several steps.
        """
        has_tokens = mask.any(1)
        if not has_tokens.all():
            return self._logps_of_rows(has_tokens.nonzero()[:, 0], model, rows, ids, mask)
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

    def _logps_of_rows(self, kept: torch.Tensor, model, rows, ids, mask):
        """As `_logps`, but only the rows `kept` are read; the others have no tokens."""
        if not len(kept):  # a loss needs something to differentiate
            return torch.zeros(2, *ids.shape, device=ids.device,
                               requires_grad=torch.is_grad_enabled()).unbind()
        values = self._logps(model, rows[kept], ids[kept], mask[kept])
        return tuple(torch.zeros(ids.shape, device=ids.device).index_copy(0, kept, value)
                     for value in values)

    def training_step(self, model, inputs, num_items_in_batch):
        """As TRL's; then average the processes' gradients, because shared passes go around DDP."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        processes = self.accelerator.num_processes
        if not self.accelerator.sync_gradients:
            return loss
        for parameter in model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:  # no completion was read: stock TRL has a gradient of 0
                parameter.grad = torch.zeros_like(parameter)
            if processes > 1:
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
