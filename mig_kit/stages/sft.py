"""Stage 02: supervised fine-tuning on the cold-start set, with QLoRA.

NF4 weights with double quantisation, LoRA on the language model only, loss on the reply only (TRL's SFTTrainer). The paper
publishes neither rank nor rates; rank and alpha of the full profiles are VLM-R1's, those of the tiny one are ours.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.nn.functional import pad
from trl import SFTConfig, SFTTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import Hardware, check_adapters, check_tokens, load_model, unwrap_peft
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.training import KeepAdapterDtype, LiveCurves, ProgressLines, tracker_args, use_one_device
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.stages.sanity_checks import StopIfNothingLearns


def sft_rows(samples: list[Sample], replies: list[str], box_format: BoxFormat) -> Dataset:
    """A table of conversational prompt, completion and images, as TRL reads it, and about how many tokens; a row per sample."""
    rows = [{"prompt": chat_messages(s, box_format), "completion": [{"role": "assistant", "content": [{"type": "text", "text": r}]}],
             "images": list(s.images), "length": sum(w * h for w, h in s.sizes) // 784 + (len(s.question) + len(r)) // 3}
            for s, r in zip(samples, replies, strict=True)]
    return Dataset.from_list(rows)


def load_qlora_model(base: str | Path, hw: Hardware, lora: LoraConfig, seed: int):
    """The 4-bit base with a fresh adapter, ready to train; raises ValueError if the adapter landed elsewhere.

    On a CPU whose products are in bfloat16 so is what passes between the language model's layers, as what enters
    its products is anyway: in float32 a quarter of a step goes into converting it to and fro. The vision tower,
    which locates, keeps float32.
    """
    torch.manual_seed(seed)
    model = prepare_model_for_kbit_training(load_model(base, hw, four_bit=True), use_gradient_checkpointing=hw.device == "cuda")
    if hw.autocast:
        for name, parameter in model.named_parameters():
            if parameter.dtype == torch.float32 and "visual" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    model = get_peft_model(model, lora)
    check_adapters(model)
    return model


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Rows in random order, those of one update sorted by length, so that the parts it is computed in are padded little.

    lengths: of the rows; size: rows of an update. Which rows an update learns from is as random as without the sorting.
    """

    def __init__(self, lengths: list[int], size: int, seed: int):
        self.lengths, self.size, self.seed, self.epoch = lengths, size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Which pass over the rows comes next, from 0; the trainer says it, also when it resumes."""
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        for update in torch.randperm(len(self.lengths), generator=generator).split(self.size):
            yield from sorted(update.tolist(), key=lambda row: self.lengths[row])


class CompletionLossTrainer(KeepAdapterDtype, SFTTrainer):
    """TRL's, with `LikeLengths` where an update is computed in parts, in which every token then weighs the same.

    The model's class says it could not be told the number of tokens of the whole update, but it can; without it each part's
    mean would weigh the same, and tokens of short rows more. Only states that a token with loss follows reach the head, which
    on a CPU TRL would compute for the whole prompt.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs, self._scored = True, None
        unwrap_peft(self.model).model.register_forward_hook(self._keep_scored)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """TRL's; labels: (rows, tokens), -100 where no loss is."""
        labels = inputs["labels"][:, 1:]
        self._scored = labels != -100
        try:
            return super().compute_loss(model, {**inputs, "shift_labels": labels[self._scored][None]}, *args, **kwargs)
        finally:
            self._scored = None

    def _keep_scored(self, module, given, output):
        """(rows, tokens, width) -> (1, tokens with loss, width), in a pass of `compute_loss`."""
        if self._scored is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self._scored][None]
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        data, args = self.train_dataset if train_dataset is None else train_dataset, self.args
        if args.gradient_accumulation_steps == 1:
            return super()._get_train_sampler(train_dataset)
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return LengthGroupedSampler(data["length"], size, args.data_seed)


def pad_collated_rows(collate: Callable, pad_token: int) -> Callable:
    """TRL's collator, its rows padded on the right to a `rounded` number of tokens; TRL itself cannot for prompts with images."""
    values = {"input_ids": pad_token, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}

    def collated(examples: list[dict]) -> dict:
        batch = collate(examples)
        more = pad_to_multiple(batch["input_ids"].shape[1]) - batch["input_ids"].shape[1]
        return {**batch, **{name: pad(batch[name], (0, more), value=value) for name, value in values.items()}}

    return collated


def sft_trainer(model, processor, data: Dataset, hw: Hardware, folder: Path, *, epochs: float, batch_size: int,
            gradient_accumulation: int, learning_rate: float, warmup: float, seed: int, save_steps: int,
            track: str = "none") -> SFTTrainer:
    """TRL's trainer on `data`; the first batch's image tokens and features are compared before anything is trained."""
    config = SFTConfig(
        output_dir=str(folder / "checkpoints"), num_train_epochs=epochs, per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation, learning_rate=learning_rate, lr_scheduler_type="cosine",
        warmup_steps=warmup, logging_steps=1, save_steps=save_steps, save_total_limit=1, **tracker_args(track, folder), seed=seed,
        data_seed=seed, max_length=None, completion_only_loss=True, use_cpu=hw.device == "cpu",
        bf16=hw.autocast or hw.dtype == torch.bfloat16, gradient_checkpointing=hw.device == "cuda",
        dataloader_pin_memory=False, remove_unused_columns=False)
    use_one_device(config)
    made = CompletionLossTrainer(model=model, args=config, train_dataset=data, processing_class=processor,
                   callbacks=[ProgressLines(("loss", "mean_token_accuracy")), StopIfNothingLearns(),
                              LiveCurves(loss_curve, ("loss", "token_accuracy"))])
    made.data_collator = pad_collated_rows(made.data_collator, processor.tokenizer.pad_token_id)
    batch = made.data_collator([data[i] for i in range(min(4, len(data)))])
    check_tokens(processor, batch)
    if int((batch["labels"] != -100).sum()) == 0:
        raise ValueError("no token of the first batch carries loss; the completion column is empty")
    return made


def loss_curve(history: list[dict]) -> list[dict]:
    """Rows {step, loss, mean_token_accuracy} of a trainer's log history."""
    return [{"step": row["step"], "loss": row["loss"], "token_accuracy": row.get("mean_token_accuracy")}
            for row in history if "loss" in row]
