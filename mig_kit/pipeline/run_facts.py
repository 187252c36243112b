"""What a run's models are, and on what machine and with which packages it was made."""

import importlib.metadata
import os
import platform
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mig_kit import __version__
from mig_kit.boxes import BoxFormat
from mig_kit.common import IS_CLONE, PROJECT_ROOT, SHIPPED, UserError, suggest_word
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import list_runs
from mig_kit.pipeline.runs import Run

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets",
            "accelerate", "papermill", "numpy", "pillow")
EVALUATE = "06_evaluate"
ASKED = ("eval_seed", "suites", "max_new_tokens", "dtype")  # of 06: what a model is asked, and how
# a model's name in a run -> the stage that makes it, and its folder there
MODELS = {"base": ("", ""), "sft": ("03_merge", "merged"), "grpo": ("05_grpo", "model")}


@dataclass(frozen=True)
class RunModel:
    """A model, named as `loading.resolve_model` takes it, and its box format; evaluation: ASKED of
    its run's 06, as finished or as its profile has it."""

    folder: Path | str
    box_format: BoxFormat
    evaluation: dict
    stage: str = ""
    run_id: str = ""


def find_run_model(text: str) -> RunModel | None:
    """The model that "RUN", "RUN/sft" or "RUN/base" names; None for others.

    Raises UserError if the run lacks that model, or if a single word names nothing here.
    """
    run_id, _, system = text.partition("/")
    if system not in ("", *MODELS):
        if run_id in list_runs() and not Path(text).is_dir():
            raise UserError(f"run '{run_id}' has no model '{system}'; its models are "
                            f"{', '.join(f'{run_id}/{name}' for name in MODELS)}")
        return None
    if run_id not in (runs := list_runs()):
        if text in SHIPPED or Path(text).is_dir():
            return None
        near = suggest_word(run_id, runs | {"tiny"}, 0.5)
        raise UserError(f"there is no run and no folder '{text}'; "
                        f"{near or 'a model of the hub is USER/NAME'}")
    run = Run(run_id)
    params = run.run_params("a run's model")
    box_format = BoxFormat.of(params)
    stage, name = MODELS[system or "grpo"]
    folder = params["base_model"]
    if stage:
        run.require(stage, f"the model {text}")
        folder = run.stage_folder(stage) / name
    params = run.params(EVALUATE) or profile_params(EVALUATE, run.profile or "tiny")
    asked = {name: value for name, value in params.items() if name in ASKED}
    return RunModel(folder, box_format, asked, stage, run_id)


def describe_machine() -> dict:
    """{"versions" of packages, "machine": its CPU, "git": the project's commit} for run.json."""
    import torch  # not at the top: a command that only looks at runs need not wait for it

    # what rounds sums otherwise, with other digits: the instructions, as processors of one name may
    # have others, and the number of threads
    facts = torch.cpu.get_capabilities()
    name = facts.get("cpu_name") or platform.machine()
    kernels = torch.backends.cpu.get_cpu_capability() + " with AMX" * bool(facts.get("amx_bf16"))
    machine = (f"{name} ({kernels}), {platform.system()}, {torch.get_num_threads()} of "
               f"{os.cpu_count()} cores")
    return {"versions": package_versions(), "machine": machine, "git": _read_commit()}


def processor_seconds() -> float:
    """Of this process and of all that it has waited for."""
    return sum(os.times()[:4])


def _read_commit() -> str:
    """The project's commit, "+" for a changed tree; "" if there is no clone or no git."""
    # named, a clone may be another user's, and a repository around it is not asked
    command = ["git", "--git-dir", ".git", "--work-tree", ".", "describe", "--always",
               "--exclude=*", "--abbrev=40", "--dirty=+"]
    with suppress(OSError):
        if IS_CLONE:
            return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True,
                                  text=True).stdout.strip()
    return ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    versions = {"python": platform.python_version(), "mig-kit": __version__}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # of an extra
            versions[name] = importlib.metadata.version(name)
    return versions
