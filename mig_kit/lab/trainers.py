"""Stock TRL's GRPO trainer and the kit's, on copies of one model, ready for single steps."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import GRPOTrainer

from mig_kit.lab.workload import BOX_FORMAT, Workload, load_stock_model, make_questions
from mig_kit.models.loading import Hardware, Policy, load_model
from mig_kit.models.processors import load_processor
from mig_kit.pipeline.params import profile_params
from mig_kit.sample import Sample
from mig_kit.stages.grpo import grpo_trainer


@dataclass(frozen=True)
class Side:
    """One of the two trainers. is_kit: it reads every prompt once per group."""

    trainer: GRPOTrainer
    samples: list[Sample]
    load: Workload
    is_kit: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the first prompt of the last rollout; of the kit's trainer only."""
        return len(self.trainer._prompts_of([0])[0].ids)

    def roll_out(self) -> dict:
        """Replies and rewards of a step, from an empty cache, and advantages that are not all 0."""
        if self.is_kit:
            self.trainer.cache.clear()
        data = self.trainer.train_dataset
        rows = [data[index] for index in range(self.load.prompts) for _ in range(self.load.group)]
        batch = self.trainer._generate_and_score_completions(rows)
        advantages = torch.linspace(-1, 1, self.load.group, device=batch["completion_ids"].device)
        return {**batch, "advantages": advantages.repeat(self.load.prompts)}

    def learn(self, batch: dict) -> None:
        """Log-probabilities, loss and gradients of a batch."""
        trainer = self.trainer
        trainer.model.zero_grad()
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()

    def step(self) -> None:
        """A whole GRPO step."""
        self.learn(self.roll_out())
        self.trainer.optimizer.step()

    def gradients(self) -> torch.Tensor:
        """Those of all adapters, as one vector."""
        return torch.cat([parameter.grad.flatten().float()
                          for parameter in self.trainer.model.parameters()
                          if parameter.grad is not None])


def make_sides(model: str | Path, hardware: Hardware, load: Workload,
               folder: Path) -> tuple[Side, Side]:
    """(stock, kit)."""
    return tuple(make_side(model, hardware, load, folder, is_kit) for is_kit in (False, True))


def make_side(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
              is_kit: bool) -> Side:
    """A trainer of `load`, with an adapter that does something; scratch files go below `folder`."""
    processor = load_processor(model, BOX_FORMAT)
    samples = make_questions(load, load.prompts)
    weights = load_model(model, hardware) if is_kit else load_stock_model(model, hardware)
    policy = Policy(weights, processor, hardware, BOX_FORMAT)
    torch.manual_seed(0)
    params = SimpleNamespace(**profile_params("05_grpo") | {
        "share_prefix": is_kit, "num_generations": load.group,
        "per_device_train_batch_size": load.prompts * load.group,
        "gradient_accumulation_steps": 1, "max_completion_length": load.tokens, "max_steps": 1,
        "learning_rate": 1e-4, "warmup_steps": 1, "scale_rewards": "group", "save_steps": 100,
        "seed": 0})
    trainer = grpo_trainer(policy, samples, folder / str(is_kit), params,
                           min_new_tokens=load.tokens)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    trainer.create_optimizer()
    if hardware.device == "cuda":  # or stock TRL keeps every layer of every reply
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return Side(trainer, samples, load, is_kit)


def same_batches(stock: Side) -> tuple[dict, dict]:
    """(stock's, the kit's): the same replies; the kit's prompts are numbers of samples."""
    batch = stock.roll_out()
    ids = batch["completion_ids"]
    numbers = torch.arange(stock.load.prompts, device=ids.device)
    prompt_ids = numbers.repeat_interleave(stock.load.group)[:, None]
    return batch, {**batch, "prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids)}


def gradient_error(stock: Side, kit: Side) -> float:
    """For the same replies, the norm of the gradients' difference over the norm of stock TRL's."""
    kit.roll_out()  # reads the prompts
    for side, batch in zip((stock, kit), same_batches(stock)):
        side.learn(batch)
    return float((stock.gradients() - kit.gradients()).norm() / stock.gradients().norm())
