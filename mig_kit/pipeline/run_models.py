"""A run's models by name: "RUN" is what GRPO made in it, "RUN/sft" and "RUN/base" the others."""

from dataclasses import dataclass
from pathlib import Path

from mig_kit.boxes import BoxFormat
from mig_kit.common import model_folder, suggest_word
from mig_kit.pipeline import store
from mig_kit.pipeline.run_folders import list_runs

MODELS = {"base": "", "sft": "03_merge/merged", "grpo": "05_grpo/model"}


@dataclass(frozen=True)
class RunModel:
    """folder: of the model, or a base's hub name. evaluation: parameters of the run's 06, {} where
    that has not run.
    """

    folder: Path | str
    box_format: BoxFormat
    evaluation: dict


def find_run_model(text: str) -> RunModel | None:
    """The model that `text` names; None where it names no run, and for a model's own folder. A
    run's folder names the run.

    FileNotFoundError where the run has not made that model yet, and for one word that names nothing
    here: a hub name has two.
    """
    path = Path(text)
    if path.is_dir() and path.resolve().parent == store.runs_root().resolve():
        text = path.resolve().name
    run_id, _, system = text.partition("/")
    is_model = (path / "config.json").is_file() or text == "tiny" or not run_id.strip(".")
    if is_model or system not in ("", *MODELS):
        return None
    if run_id not in (runs := list_runs()):
        near = suggest_word(run_id, runs | {"tiny"}, 0.5)
        if not path.is_dir() and (near or not system):
            raise FileNotFoundError(f"there is no run and no folder '{text}'; "
                                    f"{near or 'a model of the hub is USER/NAME'}")
        return None
    params = store.run_params(run_id, "a run's model")
    box_format = BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
    evaluated = store.load_record("06_evaluate", run_id) or {"params": {}}
    if system == "base":
        folder = model_folder(params["base_model"])
        folder = folder if folder.is_dir() else params["base_model"]
    else:
        stage, _, name = MODELS[system or "grpo"].partition("/")
        store.require_record(stage, run_id, f"the model {text}")
        folder = store.stage_folder(stage, run_id) / name
    return RunModel(folder, box_format, evaluated["params"])
