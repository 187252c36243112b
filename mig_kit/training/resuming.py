"""What stages 02 and 05 share: LoRA and trainer settings, progress, and training that resumes."""

import json
import os
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import LoraConfig
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from transformers.utils.notebook import NotebookProgressCallback
from trl.trainer.utils import RepeatSampler

from mig_kit.common import UserError, apply_umask, release_memory
from mig_kit.models.adapters import record_base
from mig_kit.models.loading import LORA_SCALE, LORA_TARGETS, Hardware


def lora_config(lora_r: int, lora_dropout: float = 0.0, lora_targets: str = "all") -> LoraConfig:
    """LoRA on the projections of the language model that LORA_TARGETS[lora_targets] matches."""
    return LoraConfig(r=lora_r, lora_alpha=LORA_SCALE * lora_r, lora_dropout=lora_dropout,
                      target_modules=LORA_TARGETS[lora_targets], bias="none",
                      task_type="CAUSAL_LM")


def trainer_arguments(config_class: type, params: SimpleNamespace, hardware: Hardware,
                      folder: Path, **own) -> dict:
    """Arguments of a TRL config: the stage's parameters that it knows, and the kit's own.

    Processes that train together divide gradient_accumulation_steps, so an update's rows stay.

    Args:
        folder: the stage's.
        own: arguments that the stage sets itself.
    Raises: UserError if a parameter would be overwritten, or if the steps do not divide evenly.
    """
    own |= tracker_arguments(params.report_to, folder) | {
        "output_dir": str(folder / "checkpoints"), "data_seed": params.seed, "logging_steps": 1,
        "save_total_limit": 1, "use_cpu": hardware.device == "cpu",
        "bf16": hardware.dtype == torch.bfloat16,
        "dataloader_pin_memory": False, "ddp_find_unused_parameters": False}
    names = {field.name for field in fields(config_class)} - {"report_to"}
    passed_on = {name: value for name, value in vars(params).items() if name in names} | params.trl
    if overwritten := sorted(passed_on.keys() & own.keys()):
        raise UserError(f"the kit sets {overwritten[0]} itself; take it out of the parameters")
    steps, processes = params.gradient_accumulation_steps, count_processes()
    if steps % processes:
        raise UserError(
            f"{processes} processes cannot share {steps} steps of an update evenly; set "
            "gradient_accumulation_steps to a multiple of the launcher's processes")
    return passed_on | own | {"gradient_accumulation_steps": steps // processes}


def count_processes() -> int:
    """Processes that train together, this one included, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def tracker_arguments(report_to: str, folder: Path) -> dict:
    """Arguments that send a trainer's curves to a tracker; keys come from the environment."""
    if report_to == "none":
        return {"report_to": "none"}
    stage, run = folder.stem, folder.parent.resolve()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run / "tensorboard" / stage))
    os.environ.setdefault("WANDB_DIR", str(run))
    return {"report_to": report_to, "project": "mig-kit", "run_name": f"{run.name}/{stage}",
            "trackio_static_space_id": False}


def use_one_device(config) -> None:
    """Let a process train on one GPU: transformers would use all of them, which TRL refuses."""
    if config.n_gpu > 1:
        config._n_gpu = 1


def train_in_float32(model: torch.nn.Module) -> None:
    """Make the adapter float32, as PEFT loads it when a training resumes.

    TRL makes that of a 4-bit model bfloat16, which rounds small updates away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def train_or_resume(trainer, folder: Path) -> None:
    """Train, from the newest checkpoint under folder/checkpoints if there is one."""
    for callback in (NotebookProgressCallback, PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)  # ProgressLines says it in fewer lines
    trainer.add_callback(SetSamplerEpoch())
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:  # the trainer itself would take a step too many
            trainer.state = state
            trainer._load_from_checkpoint(checkpoint)
            return
    trainer.train(resume_from_checkpoint=checkpoint)


def save_adapter(trainer, folder: Path) -> None:
    """Let the first process write the adapter and the record of its base to folder/adapter."""
    if not trainer.is_world_process_zero():
        return
    adapter = folder / "adapter"
    config, model = trainer.model.peft_config["default"], trainer.model
    base = config.base_model_name_or_path
    if os.path.isabs(base):  # made relative to the adapter, so that both may be moved together
        config.base_model_name_or_path = os.path.relpath(Path(base).resolve(), adapter.resolve())
    model.save_pretrained(adapter)
    record_base(adapter, base, getattr(model.config, "quantization_config", None) is not None)
    apply_umask(adapter)
    (adapter / "README.md").unlink(missing_ok=True)  # PEFT's card: empty but for the base's path


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint under folder/checkpoints, or None."""
    checkpoints = [path for path in (folder / "checkpoints").glob("checkpoint-*")
                   if _is_complete(path / "trainer_state.json")]
    newest = max(checkpoints, key=lambda path: int(path.name.split("-")[1]), default=None)
    return str(newest) if newest else None


def _is_complete(state: Path) -> bool:
    """Whether a checkpoint's last file exists and is whole; a full disk may have cut it."""
    try:
        return bool(json.loads(state.read_text()))
    except (OSError, ValueError):
        return False


class EpochRepeatSampler(RepeatSampler):
    """TRL's sampler of prompts, whose order in a pass depends on the seed and the pass alone."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the pass over the prompts, from 0; transformers calls this, also on resuming."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            # TRL's generator goes on from pass to pass, so after a resume it would give the first
            # pass's order. Seeded again, and moved on by one permutation for every earlier pass,
            # it gives the order of the pass that was interrupted.
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


class SetSamplerEpoch(TrainerCallback):
    """Tells the sampler which pass begins."""

    # transformers does so too, but not if several processes resume in the middle of a pass
    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Find the sampler below all batches and set its epoch."""
        batches = train_dataloader.batch_sampler
        while hasattr(batches, "batch_sampler"):
            batches = batches.batch_sampler
        batches.sampler.set_epoch(int(state.epoch))


class ProgressLines(TrainerCallback):
    """Prints a line at every twentieth of a training, with the time left by the steps since.

    On a CPU it also gives memory back that rows of many lengths have scattered, gigabytes in all.

    names: the logged figures to print; steps that do not log the first one are passed over.
    """

    def __init__(self, names: tuple[str, ...]):
        self.names, self.printed = names, (0, 0.0)  # step and time of the last line

    def on_train_begin(self, args, state, control, **kwargs):
        """Start the clock, so that the first step counts as well."""
        self.printed = state.global_step, time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        """Give memory back after every tenth update."""
        if args.device.type == "cpu" and state.global_step % 10 == 0:
            release_memory()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print the step, the named figures and the minutes left."""
        step, start = self.printed
        is_due = state.global_step - step >= max(1, state.max_steps // 20)
        is_update = bool(logs) and "loss" in logs and self.names[0] in logs
        if not state.is_world_process_zero or not is_update or not is_due:
            return
        self.printed = state.global_step, time.monotonic()
        pace = (self.printed[1] - start) / (state.global_step - step)
        minutes = pace * (state.max_steps - state.global_step) / 60
        figures = ", ".join(
            f"{name.removeprefix('rewards/').removesuffix('/mean')} {logs[name]:.3f}"
            for name in self.names if logs.get(name) is not None)
        print(f"step {state.global_step}/{state.max_steps}: {figures}; {minutes:.1f} min left",
              flush=True)
