"""What stages 02 and 05 share: LoRA settings, trackers, progress, and training that resumes from its last checkpoint."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from IPython import get_ipython
from IPython.display import HTML, display
from peft import LoraConfig
from transformers import TrainerCallback, TrainerState

from mig_kit import plots
from mig_kit.engine.models import LORA_TARGETS


class ProgressLines(TrainerCallback):
    """A printed line at every twentieth of a training, with the time left; a terminal sees no notebook widgets."""

    def __init__(self, names: tuple[str, ...]):
        self.names, self.start, self.first = names, time.monotonic(), None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Print step, the named figures and the minutes left."""
        self.first = state.global_step if self.first is None else self.first
        if not state.is_world_process_zero or not logs or "loss" not in logs or state.global_step % max(1, state.max_steps // 20):
            return
        done = max(1, state.global_step - self.first)
        left = (time.monotonic() - self.start) / done * (state.max_steps - state.global_step) / 60
        short = {name: name.split("/")[-2] if "/" in name else name for name in self.names if logs.get(name) is not None}
        figures = ", ".join(f"{word} {logs[name]:.3f}" for name, word in short.items())
        print(f"step {state.global_step}/{state.max_steps}: {figures}; {left:.1f} min left", flush=True)


class LiveCurves(TrainerCallback):
    """In a notebook, the curves of the training under way, drawn again at most every `seconds`; gone when it ends.

    rows: from the trainer's log history to rows of the figures named; the cell after the training shows the whole of them.
    """

    def __init__(self, rows: Callable[[list[dict]], list[dict]], names: tuple[str, ...], seconds: float = 60):
        self.rows, self.names, self.seconds, self.handle, self.drawn = rows, list(names), seconds, None, time.monotonic()

    def on_log(self, args, state, control, **kwargs):
        """Draw, where there is a notebook and it is time."""
        rows = self.rows(state.log_history)
        if get_ipython() is None or len(rows) < 2 or time.monotonic() - self.drawn < self.seconds:
            return
        figure = plots.plot_curves(rows, self.names, f"step {state.global_step} of {state.max_steps}")
        if self.handle:
            self.handle.update(figure)
        else:
            self.handle = display(figure, display_id=True)
        plots.plt.close(figure)
        self.drawn = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        """Make room for the finished curves."""
        if self.handle:
            self.handle.update(HTML(""))


def lora_config(rank: int, alpha: int, dropout: float = 0.0) -> LoraConfig:
    """LoRA on every projection of the language model."""
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS, bias="none",
                      task_type="CAUSAL_LM")


def tracker_args(track: str, folder: Path) -> dict:
    """The trainer's settings that send its curves to "trackio" or "wandb" as well, by the name of run and stage; "none": nowhere.

    Keys come from the tracker's own environment variables. Raises ValueError for another name, or where it is not installed.
    """
    if track == "none":
        return {"report_to": "none"}
    if track not in ("trackio", "wandb"):
        raise ValueError(f"track is '{track}'; use none, trackio or wandb")
    if importlib.util.find_spec(track) is None:
        raise ValueError(f"track is '{track}', which is not installed; run: pip install {track}")
    return {"report_to": track, "project": "mig-kit", "run_name": f"{folder.parent.name}/{folder.name}",
            "trackio_static_space_id": False}


class KeepAdapterDtype:
    """A trainer whose adapter is resumed in the numbers it is trained in: PEFT loads it as float32, TRL trains it in bfloat16
    on a 4-bit model, so a run that was killed would go on in others."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        kept = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(kept[name])


def use_one_device(config) -> None:
    """Let a process train on its own GPU alone: transformers would use all that it sees, in threads, which TRL refuses."""
    if config.n_gpu > 1:
        config._n_gpu = 1


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint under folder/checkpoints, to resume from, or None."""
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    whole = [p for p in found if (p / "trainer_state.json").is_file()]
    return str(whole[-1]) if whole else None


def train_or_resume(made, folder: Path) -> None:
    """Train, from the newest checkpoint under folder/checkpoints if there is one.

    One that was saved at the last step is only loaded: the trainer itself would take a step too many.
    """
    checkpoint = last_checkpoint(folder)
    if checkpoint:
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:
            made.state = state
            made._load_from_checkpoint(checkpoint)
            return
    made.train(resume_from_checkpoint=checkpoint)


class StopAfter(TrainerCallback):
    """Saves and stops after `steps` updates, as a kill would, but tidily; the next start resumes."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        """Ask the trainer to save and stop."""
        if state.global_step >= self.steps:
            control.should_save = control.should_training_stop = True
