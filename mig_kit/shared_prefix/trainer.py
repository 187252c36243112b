"""GRPO with shared prefixes: TRL's GRPOTrainer, reading every prompt once per group.

    from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer

takes what `trl.GRPOTrainer` takes and logs what it logs. Only this is another way to the same
numbers: a prompt and its images are read once per group, when completions are drawn and when
log-probabilities are computed, and an image goes through the frozen vision tower once per run.
"""

import warnings
from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl import GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages

from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import SamplingOptions, draw_uniforms, generate_rollouts
from mig_kit.shared_prefix.logprobs import completion_logps
from mig_kit.shared_prefix.prefixes import pad_to_multiple
from mig_kit.shared_prefix.prompt_cache import (
    Prompt,
    PromptCache,
    PromptSource,
    pixel_digest,
    unwrap_peft,
)
from mig_kit.shared_prefix.rows import (
    IMAGES,
    RowsOnce,
    list_images,
    merge_image_tokens,
    move_images,
    restore_images,
)

# whose passes are known to be shareable
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
# By how much log-probabilities may differ from stock TRL's at the first batch. In bfloat16 a logit
# of 16 to 32 is rounded to a multiple of 1/8: random models of the 3B's and the 7B's shape differ
# by 0.02 to 0.06 in the mean. A lost image or a wrong mask moves single tokens by whole units.
MAX_DIFFERENCE_FLOAT32, MEAN_DIFFERENCE_16_BITS = 1e-4, 0.15


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` that reads every prompt once per group; arguments, data sets, rewards and
    logged figures are TRL's.

    Completions are drawn by the kit's decoder, or by vLLM or transformers where the config asks for
    those or for a sampling option that the decoder lacks. What cannot be shared at all (another
    family of models, a trained vision tower, tools) is left to stock TRL, with a warning that says
    why. At the first batch the log-probabilities of two completions are compared with stock TRL's;
    if they differ, training goes on without sharing.

    Deviations from TRL: a step holds whole groups of like lengths, where TRL mixes them; `bnpo` and
    `top_entropy_quantile` look at one step at a time. The decoder never draws vision tokens. Drawn
    tokens are a function of seed, step and row, so that a resumed training draws the same ones.

    micro_completions: completions whose graph is kept at a time (0: those of a step); fewer need
    less memory and one more forward pass.

    TRL 1.16's methods that are overridden: `_generate_and_score_completions` (takes the images out
    of the rows), `_calculate_rewards` (gives them back), `_tokenize_prompts` (a row's prompt
    becomes a number, in place of its token ids), `_generate_single_turn`,
    `_get_per_token_logps_and_entropies` (reads prompts by that number), `_get_dataloader` (decodes
    a row's images once), `_prepare_inputs` (keeps groups together) and `training_step` (averages
    gradients, because shared passes go around DDP).
    """

    def __init__(self, *args, micro_completions: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        self.micro_completions = micro_completions
        self.sources: dict[int, PromptSource] = {}  # prompts of the batch under way, by number
        self.is_checked = False
        self.unshared = self._find_obstacle(kwargs)
        if self.unshared:
            warnings.warn(f"prompts are not shared: {self.unshared}", stacklevel=2)
            return
        # bfloat16 products over float32 weights
        self.autocasts = self.args.bf16 and unwrap_peft(self.model).dtype == torch.float32
        self.cache = self._make_cache()
        self.unsupported_sampling = self._find_sampling_obstacle()
        if self.unsupported_sampling and not self.use_vllm:
            warnings.warn(f"completions are drawn by transformers, prompt by prompt: "
                          f"{self.unsupported_sampling}; updates share prompts", stacklevel=2)

    def _find_obstacle(self, arguments: dict) -> str:
        """Why no pass can be shared, with a remedy; "" if all can."""
        model = unwrap_peft(self.model)
        family, attention = model.config.model_type, model.config._attn_implementation
        used = [name for name in ("tools", "environment_factory", "rollout_func")
                if arguments.get(name)]
        if family not in FAMILIES:
            return f"{family} is none of {', '.join(FAMILIES)}"
        if any(parameter.requires_grad for parameter in model.model.visual.parameters()):
            return ("the vision tower is trained; freeze it with "
                    "model.model.visual.requires_grad_(False)")
        if used:
            return f"{used[0]} adds tokens to completions"
        if "flash" in str(attention):
            return f"{attention} takes no mask of groups; load the model with sdpa"
        if self.aux_loss_enabled:
            return ("the load-balancing loss of experts needs whole rows; do without it with "
                    "router_aux_loss_coef 0.0")
        if self._entropy_bonus_enabled:
            return "entropy_coef and use_adaptive_entropy need gradients of entropies"
        if any(getattr(self._tokenizer, name, None)
               for name in ("response_template", "response_schema")):
            return "the tokenizer parses responses with their prompts"
        return ""

    def _find_sampling_obstacle(self) -> str:
        """A sampling option that the kit's decoder lacks; "" if there is none."""
        args, extra = self.args, set(self.args.generation_kwargs or {}) - {"min_new_tokens"}
        options = {"top_k": args.top_k, "min_p": args.min_p,
                   "repetition_penalty": args.repetition_penalty != 1,
                   "cache_implementation": args.cache_implementation,
                   "use_transformers_continuous_batching":
                       self.use_transformers_continuous_batching}
        return ", ".join([name for name, is_set in options.items() if is_set] + sorted(extra))

    def _make_cache(self) -> PromptCache:
        """The cache of prompts and image features for the whole training."""
        return PromptCache(self.model, self.processing_class, autocast=self.autocasts)

    def _read_prompts(self, prompts: list) -> list[tuple[int, PromptSource]]:
        """For each prompt a number that tells it from the others, and what it is made of.

        prompts: messages that hold their images, or texts.
        """
        first = max(self.sources, default=-1) + 1
        return [(first + row, self._to_source(prompt)) for row, prompt in enumerate(prompts)]

    def _to_source(self, prompt: list[dict] | str) -> PromptSource:
        if not is_conversational({"prompt": prompt}):
            return PromptSource((prompt, ()), lambda: prompt, (), (), lambda: ())
        messages = prepare_multimodal_messages(prompt)
        images = [part["image"] for message in messages for part in message["content"]
                  if part["type"] == "image"]
        text = self.processing_class.apply_chat_template(
            messages, tools=None, chat_template=self.chat_template, add_generation_prompt=True,
            tokenize=False, **self.chat_template_kwargs)
        digests = tuple(map(pixel_digest, images))
        return PromptSource((text, digests), lambda: text, images,
                            [image.size for image in images], lambda: digests)

    def _prompts_of(self, numbers: Sequence[int]) -> list[Prompt]:
        return self.cache.get([self.sources[number] for number in numbers])

    def _generate_and_score_completions(self, inputs):
        if self.unshared:
            return super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.sources = {}
        rows = [move_images(row) for row in inputs]
        output = super()._generate_and_score_completions(rows)
        if self.log_multimodal and any(IMAGES in row for row in rows):
            self._logs["images"].extend(gather_object([list_images(row) for row in inputs]))
        if not self.is_checked and self.model.training:
            self.is_checked = True
            self.unshared = self._compare_with_stock(output)
            if self.unshared:
                warnings.warn(f"prompts are not shared: {self.unshared}", stacklevel=2)
                for log in (self._metrics["train"], *self._logs.values()):
                    log.clear()
                return super()._generate_and_score_completions(inputs)
        return output

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rows = list(map(restore_images, inputs))
        return super()._calculate_rewards(rows, prompts, completions, completion_ids_list)

    def _tokenize_prompts(self, prompts: list):
        if self.unshared:
            return super()._tokenize_prompts(prompts)
        is_training = self.model.training
        group = self.num_generations if is_training else self.num_generations_eval
        sources = self._read_prompts(prompts[::group])
        self.sources.update(sources)
        numbers = [number for number, _ in sources for _ in range(group)]
        if is_training:  # TRL counts the one number that it is given as the prompt's tokens
            prompts_read = self._prompts_of([number for number, _ in sources])
            more = group * sum(len(prompt.ids) - 1 for prompt in prompts_read)
            more = self.accelerator.gather(torch.tensor([more], device=self.accelerator.device))
            self.state.num_input_tokens_seen += more.sum().item()
        return [[number] for number in numbers], None, {"prompts": prompts}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations,
                              has_tool_images=False):
        if self.unshared:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields,
                                                 num_generations, has_tool_images)
        numbers = [number for number, in prompt_ids]
        if self.use_vllm or self.unsupported_sampling:
            ids, images, fields = super()._tokenize_prompts(multimodal_fields["prompts"])
            # vLLM puts as many tokens as an image needs in the place of each one that it is given
            if self.use_vllm and self.vllm_mode == "colocate" and images is not None:
                ids = [merge_image_tokens(row, self.processing_class.image_token_id) for row in ids]
            return super()._generate_single_turn(ids, images, fields, num_generations)
        prompts = self._prompts_of(numbers[::num_generations])
        return self._draw_completions(prompts, num_generations), None

    def _draw_completions(self, prompts: list[Prompt], group: int) -> list[list[int]]:
        """Token ids of `group` completions to each of this process's prompts, in sequence."""
        accelerator, length = self.accelerator, self.max_completion_length
        # one draw for all processes, so that N of them draw what one would
        uniforms = draw_uniforms(self.args.seed * 1_000_003 + self.state.global_step,
                                 len(prompts) * accelerator.num_processes, group, length)
        first = accelerator.process_index * len(prompts)
        uniforms = uniforms[first:first + len(prompts)]
        model = accelerator.unwrap_model(self.model)
        sampling = SamplingOptions(self.temperature, self.top_p, length,
                                   **self.args.generation_kwargs or {})
        with evaluation_mode(model):
            rollouts = generate_rollouts(model, self.processing_class, prompts, group, sampling,
                                         uniforms, self.autocasts)
        return [completion for rollout in rollouts for completion in rollout]

    @torch.no_grad()
    def _compare_with_stock(self, batch: dict) -> str:
        """"", or by how much two completions of a group differ in log-probability from stock TRL.
        """
        numbers = batch["prompt_ids"][:, -1]
        source = self.sources[int(numbers[0])]
        group = numbers == numbers[0]
        numbers, ids, mask = (values[group] for values in (
            numbers, batch["completion_ids"], batch["completion_mask"]))
        rows = torch.tensor([0, len(ids) - 1], device=ids.device)
        images = [list(source.images)] * 2 if len(source.images) else None
        inputs = self.processing_class(images=images, text=[source.render()] * 2, padding=True,
                                       return_tensors="pt").to(ids.device)
        token_types = inputs.pop("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
        prompt_ids, prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        with evaluation_mode(self.model):  # without dropout
            stock, _, _ = super()._get_per_token_logps_and_entropies(
                self.model, torch.cat([prompt_ids, ids[rows]], 1),
                torch.cat([prompt_mask, mask[rows]], 1), ids.shape[1],
                mm_token_type_ids=pad(token_types, (0, ids.shape[1])),
                num_images=[len(source.images)] * 2, **inputs)
            own = self._logps(self.model, numbers, ids, mask)[0][rows]
        difference = (own - stock).abs()[mask[rows].bool()]
        if not len(difference):  # both are masked, as too long
            return ""
        in_16_bits = self.args.bf16 or self.args.fp16 or unwrap_peft(self.model).dtype.itemsize == 2
        worst = difference.mean() if in_16_bits else difference.max()
        limit = MEAN_DIFFERENCE_16_BITS if in_16_bits else MAX_DIFFERENCE_FLOAT32
        return "" if worst <= limit else (
            f"log-probabilities at the first batch are {worst:.2g} from stock TRL's, more than "
            f"{limit}; training goes on with stock passes")

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep,
                                           *args, **kwargs):
        if self.unshared:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        logps, entropies = self._logps(model, input_ids[:, -logits_to_keep - 1],
                                       input_ids[:, -logits_to_keep:],
                                       attention_mask[:, -logits_to_keep:])
        return logps, entropies, None

    def _logps(self, model, numbers, ids, mask):
        """(log-probabilities, entropies) of completions, (rows, tokens) each; 0 where masked.

        numbers: (rows,) of the prompts. Only rows with tokens are read. `micro_completions`
        completions, or a step's, are in memory at a time: the reference's pass is over the
        completions of several steps.
        """
        with_tokens = mask.any(1).nonzero()[:, 0]
        # a loss needs something to differentiate
        needs_leaf = torch.is_grad_enabled() and not len(with_tokens)
        logps, entropies = torch.zeros(2, *ids.shape, device=ids.device,
                                       requires_grad=needs_leaf).unbind()
        distinct, prompt_index = numbers[with_tokens].unique(return_inverse=True)
        prompts = self._prompts_of(distinct.tolist())
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
        prompts = [prompts[index] for index in order]  # like lengths together: less padding
        prompt_index = torch.tensor(order, device=prompt_index.device).argsort()[prompt_index]
        at_once = max(1, (self.micro_completions or self.args.per_device_train_batch_size)
                      // self.num_generations)
        for start in range(0, len(prompts), at_once):
            is_part = (prompt_index >= start) & (prompt_index < start + at_once)
            rows = with_tokens[is_part]
            length = min(ids.shape[1], pad_to_multiple(int(mask[rows].sum(1).max())))
            arguments = (self.accelerator.unwrap_model(model), prompts[start:start + at_once],
                         prompt_index[is_part] - start, ids[rows, :length], mask[rows, :length],
                         self.temperature)
            # the last part's backward pass comes first: its graph is in memory anyway
            is_last = start + at_once >= len(prompts)
            with self.accelerator.autocast():
                if is_last or not torch.is_grad_enabled():
                    values = completion_logps(*arguments)
                else:
                    values = checkpoint(completion_logps, *arguments, use_reentrant=False)
            padding = (0, ids.shape[1] - length)
            logps, entropies = (total.index_copy(0, rows, pad(value, padding))
                                for total, value in zip((logps, entropies), values))
        return logps, entropies

    def _get_dataloader(self, dataset, *args, **kwargs):
        if isinstance(dataset, Dataset):
            dataset = RowsOnce(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        steps = self._buffered_inputs
        if self.unshared or steps is before or len(steps) == 1:
            return inputs
        # TRL has scattered the completions over the steps of an update
        rows = torch.cat([step["prompt_ids"][:, -1] for step in steps])
        distinct = rows.unique().tolist()
        lengths = {number: len(prompt.ids)
                   for number, prompt in zip(distinct, self._prompts_of(distinct))}
        by_length = sorted(range(len(rows)),
                           key=lambda row: (lengths[rows[row].item()], rows[row].item()))
        order = torch.tensor(by_length, device=rows.device)
        per_row = {name: torch.cat([step[name] for step in steps])[order].chunk(len(steps))
                   for name, value in steps[0].items() if torch.is_tensor(value) and value.ndim}
        self._buffered_inputs = [
            steps[0] | {name: chunks[number] for name, chunks in per_row.items()}
            for number in range(len(steps))]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def training_step(self, model, inputs, num_items_in_batch):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.unshared and self.accelerator.sync_gradients:
            average_gradients(model, self.accelerator.num_processes)
        return loss


def average_gradients(model: torch.nn.Module, processes: int) -> None:
    """Give every trained parameter its mean gradient over all processes, as DDP would.

    A process that has read no completion has none, and counts 0.
    """
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if processes > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes
