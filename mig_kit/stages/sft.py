"""Stage 02: supervised fine-tuning on the cold-start set, with QLoRA.

NF4 weights with double quantisation, LoRA on the language model only, loss on the reply only (TRL's
SFTTrainer). The paper publishes neither rank nor rates; rank and alpha of the full profiles are
VLM-R1's, those of the tiny profile are ours.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.functional import pad
from trl import SFTConfig, SFTTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import Hardware, Policy, check_adapters, choose_hardware
from mig_kit.engine.processors import check_image_grids, check_tokens, describe_other_format
from mig_kit.engine.qlora import load_four_bit_policy
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
from mig_kit.prompts import chat_messages, cut_reasoning
from mig_kit.sample import Sample, TableRows, read_replies, read_samples
from mig_kit.shared_prefix.prefixes import pad_to_multiple
from mig_kit.shared_prefix.prompt_cache import unwrap_peft
from mig_kit.stages.sanity_checks import StopIfNothingLearns


def shuffled_rows(count: int, seed: int, max_samples: int = 0) -> list[int]:
    """Which of `count` rows to learn from, in random order: `max_samples` at most, 0 for all."""
    return np.random.default_rng(seed).permutation(count)[:max_samples or count].tolist()


def sft_rows(samples: Sequence[Sample], replies: Sequence[str], box_format: BoxFormat) -> Dataset:
    """A table of prompt, completion and images as TRL reads it; a row per sample.

    A row is made, and its images are decoded, when it is looked at; the table itself holds `length`
    alone, about how many tokens the row has with images as large as the model sees them
    (`row_lengths`).
    """
    lengths = []
    for sample, reply in zip(samples, replies, strict=True):
        areas = (min(width * height, box_format.max_pixels) for width, height in sample.sizes)
        image_tokens = sum(areas) // 784
        lengths.append(image_tokens + (len(sample.question) + len(reply)) // 3)
    table = Dataset.from_dict({"row": range(len(lengths)), "length": lengths})
    return table.with_transform(partial(_make_rows, samples, replies, box_format))


def _make_rows(samples: Sequence[Sample], replies: Sequence[str], box_format: BoxFormat,
               columns: dict[str, list]) -> dict[str, list]:
    chosen = [(samples[row], replies[row]) for row in columns["row"]]
    return {
        "prompt": [chat_messages(sample, box_format) for sample, _ in chosen],
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": reply}]}]
                       for _, reply in chosen],
        "images": [list(sample.images) for sample, _ in chosen]}


def row_lengths(table: Dataset) -> list[int]:
    """The lengths of the rows of `sft_rows`; makes none of them."""
    return table.with_format(None)["length"][:]


def load_qlora_policy(base: str | Path, hardware: Hardware, box_format: BoxFormat,
                      lora: LoraConfig, seed: int) -> Policy:
    """The 4-bit base with a fresh adapter, ready to train.

    Raises ValueError if the adapter landed outside the language model.
    """
    torch.manual_seed(seed)
    policy = load_four_bit_policy(base, hardware, box_format)
    policy.model = get_peft_model(policy.model, lora)
    check_adapters(policy.model)
    return policy


class FilledRows(torch.utils.data.Dataset):
    """A table, and behind it rows without loss, up to a multiple of `multiple` rows.

    accelerate deals batches to several processes in turn, and would fill the last ones up with rows
    that teach twice. With these, each row teaches once per pass, as in one process.
    """

    def __init__(self, table: Dataset, multiple: int):
        self.table, self.lengths = table, row_lengths(table)
        missing = -len(table) % multiple
        self.shortest = min(range(len(table)), key=self.lengths.__getitem__)
        self.lengths += [self.lengths[self.shortest]] * missing

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict:
        """The row; one behind the table is the shortest one, marked `is_filler`."""
        if row < len(self.table):
            return self.table[row]
        return {**self.table[self.shortest], "is_filler": True}


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Rows in random order, those of one update sorted by length.

    The parts that an update is computed in are then padded little. Which rows an update learns from
    is as random as without the sorting. lengths: of the rows; size: rows of an update; fillers: how
    many of the last rows are to come last in every pass.
    """

    def __init__(self, lengths: list[int], size: int, seed: int, fillers: int = 0):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0
        self.fillers = fillers

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the pass over the rows, from 0; the trainer does, also when it resumes."""
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows = len(self.lengths) - self.fillers
        for update in torch.randperm(rows, generator=generator).split(self.size):
            yield from sorted(update.tolist(), key=lambda row: self.lengths[row])
        yield from range(rows, len(self.lengths))


class CompletionLossTrainer(KeepAdapterDtype, SFTTrainer):
    """TRL's trainer, in which every token of an update weighs the same.

    The model's class says that it cannot be told the number of tokens of the whole update, but it
    can; without it the mean of each part would weigh the same, and tokens of short rows more. Only
    states that a token with loss follows reach the head, which TRL computes for the whole prompt.
    The mask of these states is kept on the trainer during `compute_loss`, because TRL calls the
    model itself and a forward hook is the only place between the layers and the head.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs, self._is_scored = True, None
        unwrap_peft(self.model).model.register_forward_hook(self._keep_scored_states)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As TRL's; labels: (rows, tokens), -100 where no loss is."""
        labels = inputs["labels"][:, 1:]
        self._is_scored = labels != -100
        scored_labels = labels[self._is_scored][None]
        try:
            return super().compute_loss(
                model, {**inputs, "shift_labels": scored_labels}, *args, **kwargs)
        finally:
            self._is_scored = None

    def _keep_scored_states(self, module, inputs, output):
        """(rows, tokens, width) -> (1, tokens with loss, width), in a pass of `compute_loss`."""
        if self._is_scored is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self._is_scored][None]
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        args = self.args
        batches = args.gradient_accumulation_steps * args.world_size
        if batches == 1:
            return super()._get_train_sampler(train_dataset)
        size, rows = args.per_device_train_batch_size * batches, self.train_dataset
        if args.world_size == 1:
            return LengthGroupedSampler(row_lengths(rows), size, args.data_seed)
        fillers = len(rows) - len(rows.table)
        return LengthGroupedSampler(rows.lengths, size, args.data_seed, fillers)


def pad_collated_rows(collate: Callable, pad_token: int) -> Callable:
    """TRL's collator with rows padded on the right to few different lengths (`pad_to_multiple`).

    TRL's own `pad_to_multiple_of` does not work for prompts with images. Rows marked `is_filler`
    carry no loss.
    """
    values = {"input_ids": pad_token, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}

    def collate_and_pad(examples: list[dict]) -> dict:
        is_filler = torch.tensor([example.pop("is_filler", False) for example in examples])
        batch = collate(examples)
        batch["labels"][is_filler] = -100
        length = batch["input_ids"].shape[1]
        missing = pad_to_multiple(length) - length
        padded = {name: pad(batch[name], (0, missing), value=value)
                  for name, value in values.items()}
        return {**batch, **padded}

    return collate_and_pad


def sft_trainer(policy: Policy, table: Dataset, folder: Path,
                params: SimpleNamespace) -> SFTTrainer:
    """TRL's trainer on the rows of `table`.

    params: the stage's; those that SFTConfig has are passed on. Before anything is trained, the
    first batch's image tokens are compared with its image features, and the sizes at which its
    images are seen with those that boxes are computed for; ValueError if they disagree.
    """
    defaults = {"gradient_checkpointing": policy.hardware.device == "cuda"}
    arguments = trainer_arguments(SFTConfig, params, policy.hardware, folder, max_length=None,
                                  completion_only_loss=True, remove_unused_columns=False)
    # completion_only_loss: TRL's collator labels the prompt's tokens -100, which carry no loss
    config = SFTConfig(**defaults | arguments)
    use_one_device(config)
    callbacks = [ProgressLines(("loss", "mean_token_accuracy")), StopIfNothingLearns(),
                 LiveCurves(loss_curve, ("loss", "token_accuracy"))]
    trainer = CompletionLossTrainer(
        model=policy.model, args=config, train_dataset=table, callbacks=callbacks,
        processing_class=policy.processor)
    if config.world_size > 1:
        multiple = config.world_size * config.per_device_train_batch_size
        trainer.train_dataset = FilledRows(table, multiple)
    pad_token = policy.processor.tokenizer.pad_token_id
    trainer.data_collator = pad_collated_rows(trainer.data_collator, pad_token)
    rows = [table[i] for i in range(min(4, len(table)))]
    batch = trainer.data_collator(rows)
    check_tokens(policy.processor, batch)
    sizes = [image.size for row in rows for image in row["images"]]
    check_image_grids(policy.processor, policy.box_format, batch.get("image_grid_thw"), sizes)
    if int((batch["labels"] != -100).sum()) == 0:
        raise ValueError("no token of the first batch carries loss; the completion column is empty")
    return trainer


def read_traces(traces: str | Path, params: SimpleNamespace) -> tuple[TableRows, TableRows]:
    """(samples, replies) of the file `traces`, in the order and number that `params` says.

    Without `params.reasoning` a reply is its <answer> block alone.
    """
    samples, replies = read_samples(Path(traces)), read_replies(Path(traces))
    if not params.reasoning:
        replies = TableRows(Path(traces), _answer_from_row, ("reply",))
    rows = shuffled_rows(len(samples), params.seed, params.max_samples)
    return samples.select(rows), replies.select(rows)


def _answer_from_row(row: dict, folder: Path) -> str:
    return cut_reasoning(row["reply"])


def train(folder: Path, params: SimpleNamespace, base: str, traces: str) -> None:
    """Train an adapter on the 4-bit base on the file `traces`, or go on; save it.

    The one job of all processes that train together. folder: the stage's; params: its parameters
    and the run's.
    """
    box_format = BoxFormat(params.min_pixels, params.max_pixels, params.coordinates)
    table = sft_rows(*read_traces(traces, params), box_format)
    lora = lora_config(params.lora_r, params.lora_dropout, params.lora_targets)
    hardware = choose_hardware(params.dtype, params.device)
    policy = load_qlora_policy(base, hardware, box_format, lora, params.seed)
    trainer = sft_trainer(policy, table, folder, params)
    if trainer.is_world_process_zero():
        policy.model.print_trainable_parameters()
        if difference := describe_other_format(base, box_format):
            print(f"warning: {difference}", flush=True)
    train_or_resume(trainer, folder)
    save_adapter(trainer, folder)


def loss_curve(history: list[dict]) -> list[dict]:
    """Rows {step, loss, token_accuracy} of a trainer's log history."""
    return [{"step": row["step"], "loss": row["loss"],
             "token_accuracy": row.get("mean_token_accuracy")}
            for row in history if "loss" in row]


def learning_warning(curve: list[dict]) -> str:
    """One sentence where the mean loss of a run's last fifth is not below that of its first; "" if
    it is.

    curve: of `loss_curve`. A single update's loss is noise.
    """
    part = max(1, len(curve) // 5)
    first, last = (fmean(row["loss"] for row in rows) for rows in (curve[:part], curve[-part:]))
    if len(curve) > 1 and last < first:
        return ""
    return (f"the loss did not fall in {len(curve)} updates ({first:.2f} -> {last:.2f}); train "
            "longer or raise learning_rate")
