"""Run by test_grpo.py under torchrun: a few shared-prefix steps of one process among several, then its adapter to a file."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from mig_kit import grpo, models, sft
from mig_kit.frames import View
from mig_kit.tasks import TASKS, make


def main(folder: Path, random_folder: Path) -> None:
    """Train two steps on this process's half of every batch."""
    hw = models.Hardware("cpu", torch.float32, False, "sdpa", "float32 for tests")
    samples = [make(task, "rl", i) for task in TASKS for i in range(2)]
    torch.manual_seed(0)
    trainer = grpo.trainer(
        models.load_model(random_folder, hw), models.load_processor(random_folder), samples, hw, folder, share_prefix=True,
        adapter=sft.adapter(4, 8), num_generations=4, batch_size=4, held=0, gradient_accumulation=1, max_steps=2,
        learning_rate=1e-2, schedule="constant_with_warmup", warmup=1, scale_rewards="group", beta=0.05, temperature=1.0,
        max_new_tokens=8, weights=[0.2, 0.3, 1.0, 1.3], clip_low=0.2, clip_high=0.28, seed=0, save_steps=100, view=View())
    seen = []
    stock = trainer._calculate_rewards

    def varied(inputs, prompts, completions, ids):
        """A random model earns nothing; rewards that tell its replies apart, as the real ones would, gathered as TRL does."""
        seen.append(sorted({row["sample"] for row in inputs}))
        found = stock(inputs, prompts, completions, ids)
        lengths = torch.tensor([float(sum(reply) % 7) for reply in ids])
        found[:, 0] = trainer.accelerator.gather(lengths)
        return found

    trainer._calculate_rewards = varied
    trainer.train()
    rank = trainer.accelerator.process_index
    found = {name: p.detach().contiguous() for name, p in trainer.model.named_parameters() if p.requires_grad}
    save_file(found, folder / f"adapter{rank}.safetensors", {"samples": str(seen), "steps": str(trainer.state.global_step)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
