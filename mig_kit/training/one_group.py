"""One group of replies to look at: what the trainer draws, log-probabilities, and its own loss."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from mig_kit.training.recipe_trainer import RecipeTrainer


@contextmanager
def keep_global_state() -> Iterator[None]:
    """Restore random states, environment and deterministic mode, which making a trainer changes."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    environment = dict(os.environ)
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def draw_group(trainer: RecipeTrainer) -> tuple[list[str], dict[str, torch.Tensor]]:
    """(replies, batch): `num_generations` replies to the trainer's first prompt; its loss's input.

    batch: prompt_ids (replies, 1), the prompt's number; completion_ids and completion_mask
    (replies, tokens), padded on the right; and more.
    """
    rows = [trainer.train_dataset[0] for _ in range(trainer.num_generations)]
    batch = trainer._generate_and_score_completions(rows)
    decode = trainer.processing_class.batch_decode
    return decode(batch["completion_ids"], skip_special_tokens=True), batch


def token_logps(trainer: RecipeTrainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(replies, tokens) log-probabilities of a batch's tokens, with gradients; 0 for padding."""
    # to be detached, not computed under no_grad: there a bfloat16 product rounds otherwise
    return trainer._logps(trainer.model, batch["prompt_ids"][:, -1], batch["completion_ids"],
                          batch["completion_mask"])[0]


def trainer_loss(trainer: RecipeTrainer, batch: dict[str, torch.Tensor],
                 advantages: torch.Tensor, old_logps: torch.Tensor | None = None,
                 ref_logps: torch.Tensor | None = None, loss_type: str = "dapo",
                 beta: float = 0.0) -> torch.Tensor:
    """The loss that the trainer itself, with TRL's code, computes for this batch alone.

    Args:
        advantages: (replies,).
        old_logps: (replies, tokens) of the model that drew the replies; None for this model.
        ref_logps: (replies, tokens) of the reference; a beta needs it.
    """
    inputs = batch | {"advantages": advantages, "old_per_token_logps": old_logps,
                      "ref_per_token_logps": ref_logps}
    trainer.loss_type, trainer.beta = loss_type, beta
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    trainer.model.train()
    return trainer._compute_loss(trainer.model, inputs)
