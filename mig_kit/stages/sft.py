"""Stage 02: supervised fine-tuning on the cold-start set, with QLoRA.

NF4 weights with double quantisation, LoRA on the language model only, loss on the reply only (TRL's
SFTTrainer). The paper publishes neither rank nor rates; rank and alpha of the full profiles are
VLM-R1's, those of the tiny profile are ours.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.functional import pad
from trl import SFTConfig, SFTTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import (
    Hardware,
    Policy,
    check_adapters,
    load_policy,
    run_tower_without_graph,
    unwrap_peft,
)
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.processors import check_image_grids, check_tokens
from mig_kit.engine.training import (
    KeepAdapterDtype,
    LiveCurves,
    ProgressLines,
    trainer_arguments,
    use_one_device,
)
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.stages.sanity_checks import StopIfNothingLearns


def sft_rows(samples: list[Sample], replies: list[str], box_format: BoxFormat) -> Dataset:
    """A table of prompt, completion and images as TRL reads it; a row per sample.

    length: about how many tokens the row has, with images as large as the model sees them.
    """
    rows = []
    for sample, reply in zip(samples, replies, strict=True):
        content = [{"type": "text", "text": reply}]
        areas = (min(width * height, box_format.max_pixels) for width, height in sample.sizes)
        image_tokens = sum(areas) // 784
        rows.append({"prompt": chat_messages(sample, box_format),
                     "completion": [{"role": "assistant", "content": content}],
                     "images": list(sample.images),
                     "length": image_tokens + (len(sample.question) + len(reply)) // 3})
    return Dataset.from_list(rows)


def load_qlora_policy(base: str | Path, hardware: Hardware, box_format: BoxFormat,
                      lora: LoraConfig, seed: int) -> Policy:
    """The 4-bit base with a fresh adapter, ready to train.

    On a CPU that multiplies in bfloat16, what passes between the language model's layers is
    bfloat16, too: in float32, a quarter of a step goes into conversions. The vision tower, which
    locates, keeps float32. With hardware.dtype bfloat16 it is bfloat16, too. Raises ValueError if
    the adapter landed outside the language model.
    """
    torch.manual_seed(seed)
    policy = load_policy(base, hardware, box_format, four_bit=True)
    model = prepare_model_for_kbit_training(
        policy.model, use_gradient_checkpointing=hardware.device == "cuda")
    run_tower_without_graph(model)
    if hardware.autocast or hardware.dtype == torch.bfloat16:
        for name, parameter in model.named_parameters():
            keeps_float32 = hardware.autocast and "visual" in name
            if parameter.dtype == torch.float32 and not keeps_float32:
                parameter.data = parameter.data.to(torch.bfloat16)
    policy.model = get_peft_model(model, lora)
    check_adapters(policy.model)
    return policy


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Rows in random order, those of one update sorted by length.

    The parts that an update is computed in are then padded little. Which rows an update learns from
    is as random as without the sorting. lengths: of the rows; size: rows of an update.
    """

    def __init__(self, lengths: list[int], size: int, seed: int):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Set the pass over the rows, from 0; the trainer does, also when it resumes."""
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for update in order.split(self.size):
            yield from sorted(update.tolist(), key=lambda row: self.lengths[row])


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
        if args.gradient_accumulation_steps == 1:
            return super()._get_train_sampler(train_dataset)
        table = self.train_dataset if train_dataset is None else train_dataset
        size = (args.per_device_train_batch_size * args.gradient_accumulation_steps
                * args.world_size)
        return LengthGroupedSampler(table["length"], size, args.data_seed)


def pad_collated_rows(collate: Callable, pad_token: int) -> Callable:
    """TRL's collator with rows padded on the right to few different lengths (`pad_to_multiple`).

    TRL's own `pad_to_multiple_of` does not work for prompts with images.
    """
    values = {"input_ids": pad_token, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}

    def collate_and_pad(examples: list[dict]) -> dict:
        batch = collate(examples)
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
    config = SFTConfig(**defaults | arguments)
    use_one_device(config)
    callbacks = [ProgressLines(("loss", "mean_token_accuracy")), StopIfNothingLearns(),
                 LiveCurves(loss_curve, ("loss", "token_accuracy"))]
    trainer = CompletionLossTrainer(
        model=policy.model, args=config, train_dataset=table, callbacks=callbacks,
        processing_class=policy.processor)
    pad_token = policy.processor.tokenizer.pad_token_id
    trainer.data_collator = pad_collated_rows(trainer.data_collator, pad_token)
    rows = [table[i] for i in range(min(4, len(table)))]
    batch = trainer.data_collator(rows)
    check_tokens(policy.processor, batch)
    sizes = [image.size for row in rows for image in row["images"]]
    check_image_grids(policy.processor, batch.get("image_grid_thw"), sizes, policy.box_format)
    if int((batch["labels"] != -100).sum()) == 0:
        raise ValueError("no token of the first batch carries loss; the completion column is empty")
    return trainer


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
