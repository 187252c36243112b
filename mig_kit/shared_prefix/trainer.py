"""GRPO with shared prefixes: a prompt and its images are read once per group, when completions are
drawn and when log-probabilities are computed, and an image goes through the frozen vision tower
once as long as its features fit in the cache. All else is TRL's.
"""

import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from copy import deepcopy
from inspect import signature
from math import gcd
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset, Image
from PIL import Image as Pictures
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from trl import GRPOTrainer
from trl.data_utils import is_conversational, prepare_multimodal_messages

from mig_kit.shared_prefix import obstacles
from mig_kit.shared_prefix.decoding import evaluation_mode
from mig_kit.shared_prefix.generation import (
    Completion,
    draw_completions,
    draw_uniforms,
    read_sampling_options,
    reading_bytes_per_token,
)
from mig_kit.shared_prefix.logprobs import KeptPrompts, completion_logps
from mig_kit.shared_prefix.obstacles import ROW
from mig_kit.shared_prefix.prefixes import pad_rows, pad_to_multiple
from mig_kit.shared_prefix.prompt_cache import (
    ImagePrompts,
    Prompt,
    PromptCache,
    PromptSource,
    describe_image,
    load_image_prompts,
    unwrap_peft,
)

IMAGE_COLUMNS = ("images", "image")
PAYS_FROM = 1.15  # times fewer tokens to read; on CPUs 1.07 was slower, 1.4 faster (trainer.md)
DRAWN_LOGPS = "drawn_logps"  # of the decoder's tokens, in a batch
KEPT_BYTES = 2 * 2**30  # of states of prompts' layers, for updates that learn from the draw's pass


class ReadRow(NamedTuple):
    """A completion of the update under way as it was learned: number of its prompt, (tokens,)."""

    number: int
    ids: torch.Tensor
    logps: torch.Tensor
    entropies: torch.Tensor


class SharedPrefixGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` that reads every prompt once per group.

    Arguments, data sets, rewards and logged figures are TRL's. What cannot be shared (another
    family of models, a trained vision tower, tools) is left to stock TRL, with a warning that says
    why; the metric `shared` is 1 or 0. A step holds groups of like lengths; TRL mixes the
    completions of an update. The decoder never draws vision tokens. The same seed, step, draw and
    row give the same tokens.

    Args:
        micro_completions: Completions whose graph is kept at a time, or 0 for those of a step.
            Fewer need less memory and one more forward pass.
        strict: Raise ValueError where a warning would say that prompts are not shared, or that
            others draw completions.
        check_every: Updates after which the self-check is repeated; 0: only at the first update
            of a training, resumed or not, where it costs one of stock TRL's, two updates later,
            and at prompts or completions of a new shape.
    """

    def __init__(self, model, reward_funcs=None, args=None, train_dataset=None, eval_dataset=None,
                 processing_class=None, *others, micro_completions: int = 0, strict: bool = False,
                 check_every: int = 200, **kwargs):
        self.strict, self.check_every, self.micro_completions = (
            strict, check_every, micro_completions)
        self.unshared = obstacles.find_early_obstacle(model, args)
        if self.unshared:  # before a model is loaded that may need more memory
            self._warn(f"prompts are not shared: {self.unshared}")
        if processing_class is None:
            processing_class = load_image_prompts(model, args)
        # by name, because another trainer of TRL's may stand between the two
        names = list(signature(GRPOTrainer.__init__).parameters)[7:]
        super().__init__(model=model, reward_funcs=reward_funcs, args=args,
                         train_dataset=train_dataset, eval_dataset=eval_dataset,
                         processing_class=processing_class, **dict(zip(names, others)), **kwargs)
        self.processor = (self.processing_class if self._is_vlm
                          else ImagePrompts(tokenizer=self._tokenizer))
        self.sources: dict[int, PromptSource] = {}  # prompts of the batch under way, by number
        self.training_numbers: set[int] = set()  # those that evaluation must not drop
        self.draws = Counter()  # by global step, and whether it was for training
        self.moved: list[tuple[dict, dict]] = []  # rows as TRL is given them, and as they were
        # as TRL has them: prompts of an update's completions, steps of a draw and of the update
        self.prompts, self.drawn_steps, self.trl_steps = [], [], []
        # of the update under way: completions by their place in `prompts`, and (by how much they
        # were drawn otherwise, -log p) of tokens; log-probabilities and entropies of the last pass
        self.read: dict[int, ReadRow] = {}
        self.drawn_tokens, self.last_pass = [], None
        self.next_check = 0  # global step from which the next self-check is due
        self.was_compared_whole, self.checked_shapes = False, set()
        # within a training step, whether prompts may be kept; what is kept until the update
        self.may_keep, self.kept = False, None
        if self.unshared:
            return
        self.unshared = obstacles.find_obstacle(self)
        if self.unshared:
            self._warn(f"prompts are not shared: {self.unshared}")
            return
        # bfloat16 products over float32 weights, which may be those of embeddings or head alone
        inner = unwrap_peft(self.model)
        ends = [inner.get_input_embeddings(), inner.lm_head][:2 - self.args.cast_lm_head_to_fp32]
        self.autocasts = self.args.bf16 and torch.float32 in [end.weight.dtype for end in ends]
        self.cache = self._make_cache()
        self.unsupported_sampling = ""
        self._find_sampling_obstacle()
        if self.args.per_device_train_batch_size % self.num_generations:
            warnings.warn(f"a step of {self.args.per_device_train_batch_size} completions splits "
                          "groups, and each part reads its prompt again; set per_device_train_"
                          "batch_size to a multiple of num_generations", stacklevel=2)

    def _warn(self, text: str) -> None:
        if self.strict:
            raise ValueError(f"{text}; strict=False goes on all the same")
        warnings.warn(text, stacklevel=3)

    def _stop_sharing(self, reason: str) -> None:
        """Go on as stock TRL, which draws again what was drawn for shared passes."""
        self.unshared, self._buffered_inputs = reason, None
        self._warn(f"prompts are not shared: {reason}")

    def _find_sampling_obstacle(self) -> None:
        """Look for options that the decoder lacks, which a callback may have set."""
        before = self.unsupported_sampling
        self.unsupported_sampling = obstacles.find_sampling_obstacle(self)
        if self.unsupported_sampling not in ("", before):
            self._warn(f"completions are drawn by transformers, prompt by prompt: "
                       f"{self.unsupported_sampling}; updates share prompts")

    def draws_elsewhere(self) -> bool:
        """Does vLLM or transformers draw the completions?"""
        return self.use_vllm or bool(self.unsupported_sampling)

    def draws_from_policy(self) -> bool:
        """Are completions drawn from the probabilities of the learner, no token or row left out?"""
        config = self.generation_config
        return (not self.draws_elsewhere() and self.num_iterations == 1
                and not self.mask_truncated_completions
                and self.args.steps_per_generation <= self.args.gradient_accumulation_steps
                and config.top_p in (None, 1.0) and not config.min_new_tokens)

    def _make_cache(self) -> PromptCache:
        """The cache of prompts and image features for the whole training."""
        return PromptCache(self.model, self.processor, autocast=self.autocasts)

    def _read_prompts(self, prompts: list) -> list[tuple[int, PromptSource]]:
        """For each prompt (messages with images, or a text) its number, and what it is made of."""
        first = max(self.sources, default=-1) + 1
        return [(first + row, self._to_source(prompt)) for row, prompt in enumerate(prompts)]

    def _to_source(self, prompt: list[dict] | str) -> PromptSource:
        if not is_conversational({"prompt": prompt}):
            return PromptSource((prompt, ()), lambda: prompt, (), (), lambda: ())
        messages = prepare_multimodal_messages(prompt) if self._is_vlm else prompt
        images = [part["image"] for message in messages if self._is_vlm
                  for part in message["content"] if part["type"] == "image"]
        text = self.processing_class.apply_chat_template(
            messages, tools=None, chat_template=self.chat_template, add_generation_prompt=True,
            tokenize=False, **self.chat_template_kwargs)
        image_processor = self.processor.image_processor
        images = image_processor.fetch_images(images)
        described = [describe_image(image, image_processor) for image in images]
        digests = tuple(digest for digest, _ in described)
        return PromptSource((text, digests), lambda: text, images, [size for _, size in described],
                            lambda: digests)

    def _prompts_of(self, numbers: Sequence[int]) -> list[Prompt]:
        if self.may_keep and self.kept and self.model.training and torch.is_grad_enabled():
            return [self.kept.prompts[number] for number in numbers]
        return self.cache.get([self.sources[number] for number in numbers])

    def _find_group_starts(self, count: int) -> list[int]:
        """Of this process's `count` rows, those that begin a group or its part of one."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        first = self.accelerator.process_index * count
        return [row for row in range(count) if row == 0 or (first + row) % group == 0]

    def _generate_and_score_completions(self, inputs):  # takes the images out of the rows
        rows, mode = inputs, "train" if self.model.training else "eval"
        if not self.unshared:
            kept = () if self.model.training and not self.read else self.training_numbers
            self.sources = {number: self.sources[number] for number in kept}
            if self.model.training:
                self._learn_from_kept()  # of an earlier draw of this update
            moved = [move_images(row) for row in inputs]
            self._check_sharing([row["prompt"] for row in moved])
            rows = inputs if self.unshared else moved
            self.moved = list(zip(rows, inputs))
        output = super()._generate_and_score_completions(rows)
        self._metrics[mode]["shared"].append(float(not self.unshared))
        if self.unshared:
            return output
        if not self.use_vllm and "sampling_per_token_logps" in output:  # TRL's are a server's
            output[DRAWN_LOGPS] = output.pop("sampling_per_token_logps")
        if self.model.training:
            self.training_numbers = set(self.sources)
            rows = torch.arange(len(self.prompts), device=self.accelerator.device)
            output[ROW] = rows[-len(inputs):]
        if self.log_multimodal and any(name in row for row in inputs for name in IMAGE_COLUMNS):
            self._logs["images"].extend(gather_object([list_images(row) for row in inputs]))
        return output

    def _check_sharing(self, prompts: list) -> None:
        """Stop sharing if passes cannot be stock TRL's, or would not be cheaper."""
        reason = obstacles.find_late_obstacle(self.model) or self._find_mixed_group(prompts)
        if reason := gather_reason(reason):  # processes go on alike
            return self._stop_sharing(reason)
        self._find_sampling_obstacle()

    def _find_loss(self) -> str:
        """Why sharing costs more than it saves with what was drawn, or ""."""
        numbers = [part.number for part in self.read.values()]
        drawn = sum(len(part.ids) for part in self.read.values())
        distinct = sorted(set(numbers))
        lengths = {number: len(prompt.ids)
                   for number, prompt in zip(distinct, self._prompts_of(distinct))}
        of_rows = sum(lengths[number] for number in numbers)
        gain = (of_rows + drawn) / (sum(lengths.values()) + drawn)
        return ("" if gain >= PAYS_FROM else
                f"prompts of {of_rows // len(numbers)} tokens are too short beside completions of "
                f"{drawn // len(numbers)}: sharing would read {gain:.2f} times fewer tokens, and "
                f"pays from {PAYS_FROM} on")

    def _generate(self, prompts: list):  # TRL has the prompts, and rewards' hooks get its columns
        for moved, row in self.moved:
            if moved is not row:
                moved.clear()
                moved.update(row)
        self.moved = []
        if self.model.training:
            self.prompts = [*(self.prompts if self.read else ()), *prompts]
        return super()._generate(prompts)

    def _find_mixed_group(self, prompts: list) -> str:
        """Why the first row of a group cannot stand for all, or ""."""
        starts = self._find_group_starts(len(prompts))
        for start, end in zip(starts, [*starts[1:], len(prompts)]):
            for prompt in prompts[start + 1:end]:
                if is_same(prompt, prompts[start]):
                    continue
                (_, own), (_, first) = self._read_prompts([prompt, prompts[start]])
                if own.key != first.key:
                    return ("the rows of a group have different prompts or images, as augmentation "
                            "or another sampler gives them; prepare images before, once a row")
        return ""

    def _tokenize_as_stock(self, prompt) -> tuple:
        """Ids of a prompt, its images or None, and further inputs, as TRL has them."""
        return super()._tokenize_prompts([prompt])

    def _stock_inputs(self, sources: Sequence[PromptSource]) -> tuple[list, list | None, dict]:
        """What TRL's `_tokenize_prompts` makes of these prompts: ids, images and further inputs."""
        images = [list(source.images) or None for source in sources]
        flat = [image for row in images if row for image in row]
        inputs = self.processor(text=[source.render() for source in sources], images=flat or None)
        return inputs.pop("input_ids"), images if flat else None, {
            name: value for name, value in inputs.items() if name != "attention_mask"}

    def score_as_stock(self, completions: dict[int, torch.Tensor]
                       ) -> Iterator[tuple[int, torch.Tensor]]:
        """(row, log-probabilities (tokens,) by TRL's own method) of completions, by row."""
        device, last, inputs = self.accelerator.device, None, None
        with obstacles.reading_images_once(self.model):
            for row, completion in sorted(completions.items()):
                if inputs is None or not is_same(self.prompts[row], last):
                    last = self.prompts[row]
                    inputs = self._tokenize_as_stock(last)
                    fields = {name: torch.as_tensor(np.array(value), device=device)
                              for name, value in inputs[2].items()}
                (prompt,), images, _ = inputs
                ids = torch.cat([torch.tensor(prompt, device=device), completion])[None]
                kinds = {name: pad(value, (0, len(completion)))
                         for name, value in fields.items() if name == "mm_token_type_ids"}
                yield row, super()._get_per_token_logps_and_entropies(
                    self.model, ids, torch.ones_like(ids), len(completion),
                    num_images=images and [len(images[0])], **fields | kinds)[0][0]

    def learn_as_stock(self) -> list[torch.Tensor]:
        """Put the gradients that TRL's own passes give this update in the place of those made.

        Returns: by how much the log-probabilities (tokens,) of each completion differ.
        """
        weights, completions, gaps = {}, {}, []
        for step in self.trl_steps:
            rows, width = step[ROW].tolist(), step["completion_ids"].shape[1]
            logps, entropies = (pad_rows([getattr(self.read[row], name) for row in rows], width)
                                for name in ("logps", "entropies"))
            loss = self._loss_as_stock(step, logps.requires_grad_(), entropies)
            weights |= dict(zip(rows, torch.autograd.grad(loss, logps)[0]))
            lengths = step["completion_mask"].sum(1).tolist()
            completions |= {row: ids[:length] for row, ids, length
                            in zip(rows, step["completion_ids"], lengths) if length}
        self.model.zero_grad()
        for row, logps in self.score_as_stock(completions):
            self.accelerator.backward((logps * weights[row][:len(logps)]).sum())
            pair = [logps.detach(), self.read[row].logps]
            stock, own = pad_rows(pair, max(map(len, pair)))
            gaps.append(stock - own)
        average_gradients(self.model, self.accelerator.num_processes)
        return gaps

    def _loss_as_stock(self, inputs: dict, logps, entropies) -> torch.Tensor:
        """TRL's loss of a step whose log-probabilities and entropies are known; logs nothing."""
        with (patch.object(self, "_get_per_token_logps_and_entropies",
                           lambda *_, **__: (logps, entropies, None)),
              patch.object(self, "_metrics", {"train": defaultdict(list)})):
            return super()._compute_loss(self.model, inputs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # copies, because rewards may draw on images, which a group's completions share
        return super()._calculate_rewards(copy_images(inputs), copy_images(prompts), completions,
                                          completion_ids_list)

    def _tokenize_prompts(self, prompts: list):  # a row's prompt becomes a number
        if self.unshared:
            return super()._tokenize_prompts(prompts)
        starts = self._find_group_starts(len(prompts))
        sources = self._read_prompts([prompts[row] for row in starts])
        self.sources.update(sources)
        lengths = np.diff([*starts, len(prompts)])
        if self.model.training:  # TRL counts the one number that it is given as prompt's tokens
            prompts_read = self._prompts_of([number for number, _ in sources])
            more = sum(int(rows) * (len(prompt.ids) - 1)
                       for rows, prompt in zip(lengths, prompts_read))
            more = self.accelerator.gather(torch.tensor([more], device=self.accelerator.device))
            self.state.num_input_tokens_seen += more.sum().item()
        numbers = [[number] for (number, _), rows in zip(sources, lengths) for _ in range(rows)]
        return numbers, None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations,
                              has_tool_images=False):
        if self.unshared:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields,
                                                 num_generations, has_tool_images)
        numbers = [number for number, in prompt_ids]
        if self.draws_elsewhere():
            ids, images, fields = self._stock_inputs([self.sources[number] for number in numbers])
            # vLLM puts as many tokens as an image needs in the place of each one that it is given
            if self.use_vllm and self.vllm_mode == "colocate" and images is not None:
                ids = [merge_image_tokens(row, self.processor.image_token_id) for row in ids]
            return super()._generate_single_turn(ids, images, fields, num_generations)
        drawn = self._draw_completions(numbers, num_generations)
        return [completion.ids for completion in drawn], [completion.logps for completion in drawn]

    def _draw_completions(self, numbers: list[int], group: int) -> list[Completion]:
        """A completion to each of this process's rows; numbers: of their prompts."""
        accelerator, count = self.accelerator, len(numbers)
        sampling, _ = read_sampling_options(*(config.to_dict() for config in (
            self.model.generation_config, self.generation_config)))
        draw = self.state.global_step, self.model.training
        seed = self.args.seed * 1_000_003 + self.state.global_step
        # a step's first draw adds 0; the factor fits in 32 bits, all that a CPU's generator reads
        seed += (2 * self.draws[draw] + (not self.model.training)) * 2_654_435_761
        self.draws = Counter({draw: self.draws[draw] + 1})
        # one draw for all processes, so that N of them draw what one would
        n_groups = -(-count * accelerator.num_processes // group)
        uniforms = draw_uniforms(seed, n_groups, group, sampling.max_new_tokens).flatten(0, 1)
        starts = self._find_group_starts(count)
        ends = [*starts[1:], count]
        most = max(end - start for start, end in zip(starts, ends))
        rows = (torch.tensor(starts)[:, None] + torch.arange(most)).clamp(max=count - 1)
        model = accelerator.unwrap_model(self.model)
        numbers = [numbers[row] for row in starts]
        prompts = self._prompts_of(numbers)
        if self.may_keep and self.model.training:
            prompts = self._keep_prompts(model, numbers, prompts)
        with evaluation_mode(model):
            rollouts = draw_completions(
                model, self.processor, prompts, most, sampling,
                uniforms[accelerator.process_index * count + rows], self.autocasts)
        return [completion for rollout, start, end in zip(rollouts, starts, ends)
                for completion in rollout[:end - start]]

    def _keep_prompts(self, model, numbers: list[int], prompts: list[Prompt]) -> list[Prompt]:
        """The prompts, read with the graph from which this update learns, if it fits in memory."""
        by_number = dict(zip(numbers, prompts))
        tokens = sum(len(prompt.ids) for prompt in by_number.values())
        n_layers = len(unwrap_peft(model).model.language_model.layers)
        # with its gradients' inputs a layer keeps about twice what it needs to compute
        if 2 * n_layers * tokens * reading_bytes_per_token(model) > KEPT_BYTES:
            return prompts
        with self.accelerator.autocast(), torch.enable_grad():
            self.kept = KeptPrompts(model, by_number)
        return [self.kept.prompts[number] for number in numbers]

    def _learn_from_kept(self) -> None:
        """Take the gradients of kept prompts to the weights, and let go of them."""
        kept, self.kept = self.kept, None
        if kept:
            kept.backward()

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep,
                                           *args, **kwargs):
        if self.unshared:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        mask = attention_mask[:, -logits_to_keep:]
        if (mask.diff() > 0).any():
            raise ValueError("completion_mask hides tokens before others, which then do not see "
                             "them; set tool_mask to 0 there, which takes them out of the loss")
        logps, entropies = self._logps(model, input_ids[:, -logits_to_keep - 1],
                                       input_ids[:, -logits_to_keep:], mask)
        self.last_pass = logps.detach(), entropies.detach()
        return logps, entropies, None

    def _logps(self, model, numbers, ids, mask):
        """(log-probabilities, entropies) of completions, (rows, tokens) each; 0 where masked."""
        # only rows with tokens are read, `micro_completions` or a step's at a time: the reference
        # reads completions of several steps
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
            arguments = (self.accelerator.unwrap_model(model, keep_torch_compile=False),
                         prompts[start:start + at_once],
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

    def _get_dataloader(self, dataset, *args, **kwargs):  # decodes a row's images once
        # a row that a transform makes may be another one each time
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":
            dataset = RowsOnce(dataset)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def _prepare_inputs(self, generation_batch):  # keeps groups together
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        steps = self._buffered_inputs
        if self.unshared or steps is before:
            return inputs
        self.drawn_steps = steps
        # these look at one step at a time, so that it keeps the completions that TRL gives it
        if len(steps) == 1 or self.loss_type == "bnpo" or self.top_entropy_quantile < 1:
            return inputs
        # TRL has scattered the completions over the steps, and an update keeps those that it has
        at_once = gcd(len(steps), self.args.gradient_accumulation_steps)
        self._buffered_inputs = [step for start in range(0, len(steps), at_once)
                                 for step in self._gather_groups(steps[start:start + at_once])]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _gather_groups(self, steps: list[dict]) -> list[dict]:
        """The completions of some steps, those of a prompt together, and prompts of like length."""
        rows = torch.cat([step["prompt_ids"][:, -1] for step in steps])
        distinct = rows.unique().tolist()
        lengths = {number: len(prompt.ids)
                   for number, prompt in zip(distinct, self._prompts_of(distinct))}
        keys = [(lengths[number], number, row) for row, number in enumerate(rows.tolist())]
        order = torch.tensor([row for _, _, row in sorted(keys)], device=rows.device)
        per_row = {name: torch.cat([step[name] for step in steps])[order].chunk(len(steps))
                   for name, value in steps[0].items() if torch.is_tensor(value) and value.ndim}
        return [steps[0] | {name: chunks[number] for name, chunks in per_row.items()}
                for number in range(len(steps))]

    def training_step(self, model, inputs, num_items_in_batch):  # shared passes go around DDP
        self.may_keep = not self.unshared and obstacles.can_learn_from_draw(self)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.may_keep = False
        if self.unshared:
            return loss
        place = (self._step - 1) % self.args.steps_per_generation
        self.trl_steps.append(self.drawn_steps[place])
        step = self._buffered_inputs[place]
        for row, number, length, *values in zip(
                step[ROW].tolist(), step["prompt_ids"][:, -1].tolist(),
                step["completion_mask"].sum(1).tolist(), step["completion_ids"], *self.last_pass):
            self.read[row] = ReadRow(number, *(value[:length] for value in values))
        if self.accelerator.sync_gradients:
            self._learn_from_kept()
            average_gradients(model, self.accelerator.num_processes)
            self._check_update()
            self._log_drawn_tokens()
            self.trl_steps, self.read = [], {}
        return loss

    def _compute_loss(self, model, inputs):  # keeps how the completions were drawn
        loss = super()._compute_loss(model, inputs)
        if DRAWN_LOGPS in inputs and self.model.training:
            logps, mask = self.last_pass[0], inputs["completion_mask"].bool()
            old = inputs.get("old_per_token_logps")
            gaps = ((logps if old is None else old) - inputs[DRAWN_LOGPS]).abs()
            self.drawn_tokens += torch.stack([gaps, -logps], -1)[mask].tolist()
        return loss

    def _log_drawn_tokens(self) -> None:
        """Log an update's differences by TRL's names, and -log p, whose mean is the entropy if
        tokens are drawn from the policy; of all processes.
        """
        tokens, self.drawn_tokens = torch.tensor(gather_object(self.drawn_tokens)), []
        if len(tokens):  # else others drew the completions
            gaps, surprises = tokens.unbind(1)
            difference = "sampling/sampling_logp_difference"
            for name, value in ((f"{difference}/mean", gaps.mean()),
                                (f"{difference}/max", gaps.max()),
                                ("sampling/mean_negative_logp", surprises.mean())):
                self._metrics["train"][name].append(value.item())

    def _check_update(self) -> None:
        """If it is time, compare this update with stock TRL's; if they differ, learn what TRL does
        and stop sharing.
        """
        step, is_first = self.state.global_step, not self.next_check
        if is_first and (reason := gather_reason(self._find_loss())):
            return self._stop_sharing(reason)
        # a table's end may cut an update, whose steps then had other completions in TRL
        is_cut = self.read.keys() != {row for part in self.trl_steps for row in part[ROW].tolist()}
        learns = any(part["advantages"].any().item() for part in self.trl_steps) and not is_cut
        is_whole = not self.was_compared_whole and any(gather_object([learns]))
        self.was_compared_whole |= is_whole
        is_due = is_whole or step >= self.next_check
        when = "the first update" if is_first else f"update {step}"
        reason = obstacles.run_self_check(self, when, is_whole, is_due)
        if is_due:
            self.next_check = step + (2 if is_first else self.check_every or math.inf)
        if reason := gather_reason(reason):
            if not is_cut:
                self.learn_as_stock()
            self._stop_sharing(reason)


def average_gradients(model: torch.nn.Module, processes: int) -> None:
    """Give every trained parameter its mean gradient over all processes, 0 where one has none.

    What no pass uses has none, so that weight decay leaves it alone: adapters that are not active,
    and in a single process all that is not reached, unless the update read no token at all.
    """
    reads_nothing = all(parameter.grad is None for parameter in model.parameters())
    inactive = [f".{name}." for name in getattr(model, "peft_config", {})
                if name not in model.active_adapters]
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or any(part in name for part in inactive):
            continue
        if parameter.grad is None and (processes > 1 or reads_nothing):
            parameter.grad = torch.zeros_like(parameter)
        if processes > 1:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= processes


def gather_reason(reason: str) -> str:
    """The first reason of any process, or ""."""
    return next(filter(None, gather_object([reason])), "")


def is_same(left, right) -> bool:
    """Are two prompts equal, with the very same images?"""
    if isinstance(left, (list, dict)) and type(left) is type(right) and len(left) == len(right):
        pairs = (zip(left, right) if isinstance(left, list) else
                 ((value, right.get(name)) for name, value in left.items()))
        return all(is_same(*pair) for pair in pairs)
    return left is right or isinstance(left, (str, int)) and left == right


class RowsOnce:
    """A data set that decodes a row once; TRL asks again for those that it learns from."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.rows = dataset, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        """The row at `index`, decoded anew."""
        return self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The rows at `indices`; equal ones share their images and nothing else."""
        self.rows = {index: self.rows[index] if index in self.rows else self.dataset[index]
                     for index in set(indices)}
        return [{name: value if name in IMAGE_COLUMNS else deepcopy(value)
                 for name, value in self.rows[index].items()} for index in indices]


def move_images(row: dict) -> dict:
    """The row with its images inside its prompt and without its columns of images, which TRL would
    hand to the processor once for every completion; one without images, or with a text for a
    prompt, as it is.
    """
    others = {name: value for name, value in row.items() if name not in IMAGE_COLUMNS}
    if len(others) == len(row) or not is_conversational(row):  # TRL refuses images beside a text
        return row
    return others | {"prompt": prepare_multimodal_messages(row["prompt"], images=list_images(row))}


def copy_images(value):
    """A value whose lists, dicts and images are copies; all else is the same object."""
    if isinstance(value, list):
        return [copy_images(part) for part in value]
    if isinstance(value, dict):
        return {name: copy_images(part) for name, part in value.items()}
    return deepcopy(value) if isinstance(value, Pictures.Image) else value


def list_images(row: dict) -> list:
    """The images of a row as TRL reads them. Encoded ones, which it refuses, are decoded."""
    images = row["images"] if "images" in row else [row.get("image")]
    return [] if images is None else [_decode_image(image) for image in images if image is not None]


def _decode_image(image):
    """An image, decoded if it is a file's bytes or what `datasets.Image(decode=False)` gives."""
    if isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    return Image().decode_example(image) if isinstance(image, dict) else image


def merge_image_tokens(ids: list[int], token: int) -> list[int]:
    """The ids with one image token, `token`, in the place of each run of it."""
    return [value for place, value in enumerate(ids)
            if value != token or not place or ids[place - 1] != token]
