"""A few shared-prefix GRPO steps, in one process or several, whose adapter goes to a file.

In a module of its own, because the spawned processes of test_grpo and test_parallel import it.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import Hardware, load_policy
from mig_kit.pipeline.params import profile_params
from mig_kit.stages import grpo
from mig_kit.world.tasks import TASKS, make_sample

PARAMS = SimpleNamespace(**profile_params("05_grpo") | {
    "lora_r": 4, "lora_alpha": 8, "num_generations": 4, "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4, "max_steps": 2, "learning_rate": 1e-2,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "beta": 0.05,
    "max_completion_length": 8, "save_steps": 100})


def train(folder: Path, random_folder: Path, processes: int) -> None:
    """Train two updates of four prompts with four replies each.

    Writes the adapter and the first update's gradients to folder/<processes>-<rank>.safetensors,
    with the samples, completions and steps as metadata. The second process fails if `folder` holds
    a file `fail`.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank and (folder / "fail").exists():
        raise KeyError("no such thing in the second process")
    hardware = Hardware("cpu", torch.float32, False, "sdpa", "float32 for tests")
    samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)]
    torch.manual_seed(0)
    policy = load_policy(random_folder, hardware, BoxFormat())
    trainer = grpo.grpo_trainer(policy, samples, folder, PARAMS, processes)
    sample_indices, completions_seen = _vary_rewards(trainer)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    gradients = _record_first_gradients(trainer)
    trainer.train()
    tensors = {f"adapter {name}": parameter.detach().contiguous()
               for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    tensors |= {f"gradient {name}": gradient for name, gradient in gradients.items()}
    save_file(tensors, folder / f"{processes}-{rank}.safetensors",
              {"samples": str(sample_indices), "completions": str(completions_seen),
               "steps": str(trainer.state.global_step)})


def _vary_rewards(trainer) -> tuple[list[int], list[list[int]]]:
    """Let every completion's format reward depend on its tokens, for a random model earns nothing.

    Returns the lists that this process's sample indices and completions are added to.
    """
    sample_indices, completions_seen = [], []
    stock = trainer._calculate_rewards

    def calculate_rewards(inputs, prompts, replies, completions):
        sample_indices.extend(row["sample"] for row in inputs)
        completions_seen.extend(completions)
        rewards = stock(inputs, prompts, replies, completions)
        own = torch.tensor([float(sum(completion) % 7) for completion in completions])
        rewards[:, 0] = trainer.accelerator.gather(own)  # of all processes, as TRL's rewards are
        return rewards

    trainer._calculate_rewards = calculate_rewards
    return sample_indices, completions_seen


def _record_first_gradients(trainer) -> dict[str, torch.Tensor]:
    """The dict that the first update's gradients will be added to, by parameter."""
    gradients: dict[str, torch.Tensor] = {}
    stock = trainer.create_optimizer

    def record(*_):
        if not gradients:
            gradients.update({name: parameter.grad.clone()
                              for name, parameter in trainer.model.named_parameters()
                              if parameter.requires_grad})

    def create_optimizer(*args, **kwargs):
        optimizer = stock(*args, **kwargs)
        optimizer.register_step_pre_hook(record)
        return optimizer

    trainer.create_optimizer = create_optimizer
    return gradients
