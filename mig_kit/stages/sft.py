"""Stage 02: supervised fine-tuning on the cold-start set, with QLoRA.

NF4 weights with double quantisation, LoRA on the language model only, loss on the reply only. The
paper's abstracts name LoRA; rank and alpha of the full profiles are VLM-R1's (arXiv 2504.07615).
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer
from trl.data_utils import apply_chat_template

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.models.processors import StillImageProcessor, describe_other_format
from mig_kit.models.sample_prompts import SampleCache, make_cache
from mig_kit.prompts import chat_messages, cut_reasoning
from mig_kit.sample import Sample, TableRows, read_replies, read_samples
from mig_kit.shared_prefix.logprobs import completion_states
from mig_kit.shared_prefix.prefixes import pad_rows
from mig_kit.shared_prefix.prompt_cache import unwrap_peft
from mig_kit.shared_prefix.trainer import average_gradients
from mig_kit.stages.sanity_checks import StopIfNothingLearns
from mig_kit.training import resuming


def sft_row(sample: Sample, reply: str, box_format: BoxFormat) -> dict:
    """Prompt and completion as messages, and images, as TRL reads them."""
    return _messages(sample, reply, box_format) | {"images": list(sample.images)}


def completion_ids(sample: Sample, reply: str, processor: StillImageProcessor,
                   box_format: BoxFormat) -> torch.Tensor:
    """Token ids, (tokens,), of a reply as the chat template writes it; all of them carry loss."""
    text = apply_chat_template(_messages(sample, reply, box_format), processor)["completion"]
    return torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def _messages(sample: Sample, reply: str, box_format: BoxFormat) -> dict:
    completion = [{"role": "assistant", "content": [{"type": "text", "text": reply}]}]
    return {"prompt": chat_messages(sample, box_format), "completion": completion}


def sft_table(samples: Sequence[Sample], replies: Sequence[str], box_format: BoxFormat,
              multiple: int = 1) -> Dataset:
    """A row per question: `rows`, the numbers of its samples, one for each of its replies, and
    `length`, about how many tokens they have; decodes no image.

    Copies of the shortest row, marked `is_filler` for they carry no loss, fill it up to a multiple
    of rows: accelerate would fill up the last processes' batches with rows that then teach twice.
    """
    questions: dict[tuple[str, str], list[int]] = {}
    lengths: dict[tuple[str, str], int] = {}
    for row, (sample, reply) in enumerate(zip(samples, replies, strict=True)):
        key = sample.suite, sample.id
        questions.setdefault(key, []).append(row)
        areas = (min(width * height, box_format.max_pixels) for width, height in sample.sizes)
        of_prompt = sum(areas) // 784 + len(sample.question) // 3
        lengths[key] = lengths.get(key, of_prompt) + len(reply) // 3
    keys = list(questions)
    fillers = [min(keys, key=lengths.__getitem__)] * (-len(keys) % multiple)
    return Dataset.from_dict({"rows": [questions[key] for key in keys + fillers],
                              "length": [lengths[key] for key in keys + fillers],
                              "is_filler": [False] * len(keys) + [True] * len(fillers)})


def load_qlora_policy(base: str | Path, hardware: loading.Hardware, box_format: BoxFormat,
                      lora: LoraConfig, seed: int) -> loading.Policy:
    """The 4-bit base with a fresh adapter; ValueError if it landed outside the language model."""
    torch.manual_seed(seed)
    policy = loading.load_four_bit_policy(base, hardware, box_format)
    policy.model = get_peft_model(policy.model, lora)
    loading.check_adapters(policy.model)
    return policy


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Rows in random order, but sorted by length within an update, so that processes side by side
    have about as many tokens to read.

    Args:
        lengths: tokens of each row.
        size: rows of an update.
        fillers: number of last rows, which come last in every pass.
        batch: rows of a batch.
        processes: number of processes that take batches in turn.
    """

    def __init__(self, lengths: list[int], size: int, seed: int, fillers: int = 0, batch: int = 1,
                 processes: int = 1):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0
        self.fillers, self.batch, self.processes = fillers, batch, processes

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the pass over the rows, from 0; the trainer calls it, also when it resumes."""
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = len(self.lengths) - self.fillers
        for update in torch.randperm(rows, generator=generator).split(self.size):
            in_order = sorted(update.tolist(), key=lambda row: self.lengths[row])
            side_by_side = self.batch * self.processes
            for start in range(0, len(in_order), side_by_side):
                together = in_order[start:start + side_by_side]
                for process in range(self.processes):  # those side by side get similar lengths
                    yield from together[process::self.processes]
        yield from range(rows, len(self.lengths))


class CompletionLossTrainer(SFTTrainer):
    """TRL's trainer, with its loss and figures, in which every token of an update weighs the same.

    A prompt is read once for all its replies, and only states that a reply's token follows reach
    the head. Column `rows` numbers `samples` and `replies`.
    """

    def __init__(self, *args, cache: SampleCache, samples: Sequence[Sample],
                 replies: Sequence[str], **kwargs):
        self.cache, self.samples, self.replies = cache, samples, replies
        self.completions: dict[int, torch.Tensor] = {}  # token ids by row
        # of this process since the last update: entropy, correct, reply and prompt tokens
        self.sums = torch.zeros(4, dtype=torch.float64)
        super().__init__(*args, data_collator=self.collate, **kwargs)
        # Qwen's class wrongly reports that it takes no `num_items_in_batch`. Without it every
        # part of an update would weigh the same, and tokens of short replies more than others
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False

    def collate(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """row: (replies,); labels: (replies, tokens) of completions, -100 for padding, fillers.

        >>> trainer = SimpleNamespace(completions={4: torch.tensor([7, 8]), 5: torch.tensor([9])})
        >>> CompletionLossTrainer.collate(trainer, [{"rows": [4, 5], "is_filler": False}])
        {'row': tensor([4, 5]), 'labels': tensor([[   7,    8],
                [   9, -100]])}
        """
        rows = [row for example in examples for row in example["rows"]]
        for row in {*rows} - self.completions.keys():
            self.completions[row] = completion_ids(self.samples[row], self.replies[row],
                                                   self.cache.processor, self.cache.box_format)
        completions = [self.completions[row] for row in rows]
        labels = pad_rows(completions, max(map(len, completions)), -100)
        labels[[example["is_filler"] for example in examples for _ in example["rows"]]] = -100
        return {"row": torch.tensor(rows), "labels": labels}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over num_items_in_batch tokens, those of all parts of the update."""
        mask = inputs["labels"] != -100
        has_loss = mask.any(1)
        if not has_loss.any():  # of several processes one has fillers alone
            return torch.zeros((), device=mask.device, requires_grad=True)
        ids, mask = inputs["labels"][has_loss].clamp(min=0), mask[has_loss]
        samples = [self.samples[row] for row in inputs["row"][has_loss].tolist()]
        questions = {(sample.suite, sample.id): sample for sample in samples}
        numbers = {key: number for number, key in enumerate(questions)}
        prompt_index = torch.tensor([numbers[sample.suite, sample.id] for sample in samples],
                                    device=ids.device)
        prompts = self.cache.get(list(questions.values()))
        model = unwrap_peft(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            states = completion_states(model, prompts, prompt_index, ids, mask)
            logits = model.lm_head(states).float()
        loss = cross_entropy(logits, ids[mask], reduction="sum")
        loss = loss / (num_items_in_batch or len(logits))
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        self._add_figures(logits.detach(), ids[mask], sum(len(prompt.ids) for prompt in prompts))
        return loss

    def _add_figures(self, logits: torch.Tensor, targets: torch.Tensor, prompt_tokens: int) -> None:
        """Add a part's entropy and correct tokens to those of its update."""
        logps = logits.log_softmax(-1)
        self.sums += torch.stack([-(logps.exp() * logps).sum(),
                                  (logits.argmax(-1) == targets).sum(),
                                  logps.new_tensor(len(targets)),
                                  logps.new_tensor(prompt_tokens)]).double().cpu()

    def log_figures(self) -> None:
        """Log an update's mean entropy and share of correct tokens, over all its tokens."""
        sums = self.accelerator.gather(self.sums.to(self.accelerator.device)[None]).sum(0).tolist()
        self.sums.zero_()
        entropy, n_correct, n_targets, prompt_tokens = sums
        logged = self._metrics["train"]
        logged["entropy"].append(entropy / n_targets)
        logged["mean_token_accuracy"].append(n_correct / n_targets)
        self._total_train_tokens += int(prompt_tokens + n_targets)
        logged["num_tokens"] = [self._total_train_tokens]

    def training_step(self, *args, **kwargs):
        """As TRL's, but gradients are averaged here, because the passes go around DDP."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            average_gradients(self.model, self.accelerator.num_processes)
            self.log_figures()
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        args = self.args
        batches = args.gradient_accumulation_steps * args.world_size
        if batches == 1:
            return super()._get_train_sampler(train_dataset)
        batch, table = args.per_device_train_batch_size, self.train_dataset
        return LengthGroupedSampler(table["length"][:], batch * batches, args.data_seed,
                                    sum(table["is_filler"]), batch, args.world_size)


def sft_trainer(policy: loading.Policy, samples: Sequence[Sample], replies: Sequence[str],
                folder: Path, params: SimpleNamespace) -> CompletionLossTrainer:
    """TRL's trainer on samples and their replies; SFTConfig takes its fields from `params`.

    Raises: ValueError if an image's tokens do not match its features, or its size its boxes.
    """
    defaults = {"gradient_checkpointing": policy.hardware.device == "cuda"}
    arguments = resuming.trainer_arguments(
        SFTConfig, params, policy.hardware, folder, max_length=None, completion_only_loss=True,
        remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True})
    config = SFTConfig(**defaults | arguments)
    resuming.use_one_device(config)
    callbacks = [resuming.ProgressLines(("loss", "mean_token_accuracy")), StopIfNothingLearns()]
    cache = make_cache(policy)
    cache.get(samples[:4])  # raises before anything is trained
    rows_side_by_side = config.world_size * config.per_device_train_batch_size
    table = sft_table(samples, replies, policy.box_format,
                      rows_side_by_side if config.world_size > 1 else 1)
    trainer = CompletionLossTrainer(
        model=policy.model, args=config, train_dataset=table, callbacks=callbacks, cache=cache,
        samples=samples, replies=replies, processing_class=policy.processor)
    resuming.train_in_float32(trainer.model)
    return trainer


def read_traces(traces: str | Path, params: SimpleNamespace) -> tuple[TableRows, TableRows]:
    """(samples, replies) of a trace file, in the order and number that `params` says; replies are
    their <answer> block alone without `params.reasoning`.
    """
    samples = read_samples(Path(traces))
    replies = read_replies(Path(traces), str if params.reasoning else cut_reasoning)
    rows = np.random.default_rng(params.seed).permutation(len(samples)).tolist()
    rows = rows[:params.max_samples or None]  # 0: all
    return samples.select(rows), replies.select(rows)


def train(folder: Path, params: SimpleNamespace, base: str, traces: str) -> None:
    """Train an adapter on the 4-bit base, or resume, and save it; each process of a job calls it.

    folder: the stage's, which gets the adapter; params: its and the run's parameters; base: model
    folder or hub name; traces: a parquet file.
    """
    box_format = BoxFormat.of(vars(params))
    samples, replies = read_traces(traces, params)
    lora = resuming.lora_config(params.lora_r, params.lora_dropout, params.lora_targets)
    hardware = loading.choose_hardware(params.dtype, params.device)
    policy = load_qlora_policy(base, hardware, box_format, lora, params.seed)
    trainer = sft_trainer(policy, samples, replies, folder, params)
    if trainer.is_world_process_zero():
        policy.model.print_trainable_parameters()
        if difference := describe_other_format(base, box_format):
            print(f"warning: {difference}", flush=True)
    resuming.train_or_resume(trainer, folder)
    resuming.save_adapter(trainer, folder)


def loss_curve(history: list[dict]) -> list[dict]:
    """Rows {step, loss, token_accuracy} of a trainer's log history."""
    return [{"step": row["step"], "loss": row["loss"],
             "token_accuracy": row.get("mean_token_accuracy")}
            for row in history if "loss" in row]


def learning_warning(curve: list[dict]) -> str:
    """A sentence if the loss did not fall from a curve's first to its last fifth, else ""."""
    part = max(1, len(curve) // 5)
    first, last = (fmean(row["loss"] for row in rows) for rows in (curve[:part], curve[-part:]))
    if len(curve) > 1 and last < first:
        return ""
    return (f"the loss did not fall in {len(curve)} updates ({first:.2f} -> {last:.2f}); train "
            "longer or raise learning_rate")
