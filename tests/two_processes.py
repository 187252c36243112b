"""Used by test_grpo.py: a few shared-prefix steps of one process, alone or among several, then its adapter to a file."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from mig_kit.boxes import BoxFormat
from mig_kit.engine import models, training
from mig_kit.stages import grpo
from mig_kit.world.tasks import TASKS, make_sample


def train(folder: Path, random_folder: Path, processes: int) -> None:
    """Train two updates of four prompts, four replies each; fails in the second process if a file `fail` is in the folder."""
    rank = int(os.environ.get("RANK", 0))
    if rank and (folder / "fail").exists():
        raise KeyError("no such thing in the second process")
    hw = models.Hardware("cpu", torch.float32, False, "sdpa", "float32 for tests")
    samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)]
    torch.manual_seed(0)
    trainer = grpo.grpo_trainer(
        models.load_model(random_folder, hw), models.load_processor(random_folder, box_format=BoxFormat()), samples, hw, folder, share_prefix=True,
        adapter=training.lora_config(4, 8), num_generations=4, batch_size=4, held=0, gradient_accumulation=4, max_steps=2,
        learning_rate=1e-2, schedule="constant_with_warmup", warmup=1, scale_rewards="batch", beta=0.05, temperature=1.0,
        max_new_tokens=8, weights=[0.2, 0.3, 1.0, 1.3], clip_low=0.2, clip_high=0.28, seed=0, save_steps=100, box_format=BoxFormat(),
        processes=processes)
    seen, said = [], []
    stock = trainer._calculate_rewards

    def varied(inputs, prompts, completions, ids):
        """A random model earns nothing; rewards that tell its replies apart, as the real ones would, gathered as TRL does."""
        seen.extend(row["sample"] for row in inputs)
        said.extend(ids)
        found = stock(inputs, prompts, completions, ids)
        lengths = torch.tensor([float(sum(reply) % 7) for reply in ids])
        found[:, 0] = trainer.accelerator.gather(lengths)
        return found

    trainer._calculate_rewards = varied
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    first = {}
    stepped = trainer.create_optimizer

    def watched(*args, **kwargs):
        """Keep the gradients of the first update."""
        optimizer = stepped(*args, **kwargs)
        optimizer.register_step_pre_hook(lambda *_: first.update(
            first or {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}))
        return optimizer

    trainer.create_optimizer = watched
    trainer.train()
    found = {f"adapter {name}": p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    found |= {f"gradient {name}": gradient for name, gradient in first.items()}
    save_file(found, folder / f"{processes}-{rank}.safetensors",
              {"samples": str(seen), "said": str(said), "steps": str(trainer.state.global_step)})
