"""Stages 02 and 05 on the random model, as jobs for one process or several.

`python -m launched FOLDER` is `mig_kit.stages.launched_worker` with rewards that a random model
earns, too, and a lively float32 adapter; each process leaves what it drew and the first update's
gradients.
"""

import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerState

from mig_kit.boxes import BoxFormat
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.reward_names import list_own_functions
from mig_kit.sample import write_samples
from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer
from mig_kit.stages import grpo, launched_worker, sft, synthesize
from mig_kit.training import jobs, resuming, reward_loading
from mig_kit.world.tasks import TASKS, make_sample

TORCHRUN = "torchrun --standalone --nproc-per-node 2"
CHANGES = {
    "02_sft": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
               "num_train_epochs": 2.0, "max_samples": 18, "warmup_steps": 1},
    "05_grpo": {"num_generations": 4, "per_device_train_batch_size": 4, "max_steps": 2,
                "gradient_accumulation_steps": 4, "beta": 0.05, "max_completion_length": 8},
}
SHARED = {"dtype": "float32", "lora_r": 4, "save_steps": 1,
          "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "learning_rate": 1e-3}


class StopAfter(TrainerCallback):
    """Saves and stops after `steps` updates, as a tidy kill would; the next start resumes."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True


def run(stage: str, folder: Path, model: Path, launcher: str, **changes) -> TrainerState:
    """Train the random model in `folder`, with `launcher` or in this process."""
    box_format = BoxFormat()
    params = SimpleNamespace(
        **profile_params(stage) | vars(box_format) | SHARED | CHANGES[stage]
        | changes | {"launcher": launcher})
    folder.mkdir(parents=True, exist_ok=True)
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(2)]
    traces = synthesize.RuleBasedTraces(samples, 0, box_format, error_rate=0.0)
    write_samples(folder / "samples.parquet", samples, traces)
    reward_loading.copy_own_files(list_own_functions(vars(params)), folder)
    names = {"02_sft": ("base", "traces"), "05_grpo": ("start", "kept")}[stage]
    inputs = dict(zip(names, (model, folder / "samples.parquet")))
    with changed_training(folder):
        return jobs.run_job({"02_sft": sft, "05_grpo": grpo}[stage].train, stage, folder, params,
                            **inputs)


def set_random_adapter(model: torch.nn.Module) -> None:
    """Give a model's adapter float32 weights that change what it says."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # TRL makes it bfloat16 on 4-bit weights
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)


def changed_training(folder: Path) -> ExitStack:
    """While it lasts, training in this process is as this module's docstring says."""
    rank, drawn = os.environ.get("RANK", "0"), {"samples": [], "completions": []}
    stock = resuming.train_or_resume
    stock_rewards = SharedPrefixGRPOTrainer._calculate_rewards

    def calculate_rewards(trainer, inputs, prompts, replies, completions):
        drawn["samples"] += [row["sample"] for row in inputs]
        drawn["completions"] += completions
        rewards = stock_rewards(trainer, inputs, prompts, replies, completions)
        own = torch.tensor([float(sum(completion) % 7) for completion in completions])
        rewards[:, 0] = trainer.accelerator.gather(own)  # of all processes, as TRL's rewards are
        return rewards

    def train_or_resume(trainer, stage_folder):
        set_random_adapter(trainer.model)
        gradients = {}
        trainer.add_callback(RecordFirstGradients(gradients))
        stock(trainer, stage_folder)
        save_file(gradients, folder / f"gradients-{rank}.safetensors")
        (folder / f"drawn-{rank}.json").write_text(json.dumps(drawn))

    stack = ExitStack()
    for owner, name, replacement in (
            (resuming, "train_or_resume", train_or_resume),
            (SharedPrefixGRPOTrainer, "_calculate_rewards", calculate_rewards)):
        stack.enter_context(patch.object(owner, name, replacement))
    return stack


class RecordFirstGradients(TrainerCallback):
    def __init__(self, gradients: dict[str, torch.Tensor]):
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.gradients:
            self.gradients.update({name.removeprefix("module."): parameter.grad.clone()
                                   for name, parameter in model.named_parameters()
                                   if parameter.grad is not None})


if __name__ == "__main__":
    with changed_training(Path(sys.argv[1])):
        launched_worker.main()
