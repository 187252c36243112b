"""Model cards, as the hub shows them, in the model folders of 03 and 05: README.md.

No result follows from a card, and `mig-kit eval --card` adds scores to it, so it is no output of
its stage.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from mig_kit.boxes import Coordinates
from mig_kit.common import PACKAGE, UserError, file_sha256, model_folder, write_atomically
from mig_kit.pipeline.run_facts import MODELS, name_data
from mig_kit.pipeline.run_folders import finished_params
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS
from mig_kit.world.suites import SUITES, suite_title

CARD = "README.md"
TEXT = """# {title}

Names the image and the box that answer a question on several images:
`<think>...</think><answer>{{"image": 2, "box": [x1,y1,x2,y2]}}</answer>`. From mig-kit, run {run}:
base {base}, trained on {data}, images of {low} to {high} pixels, boxes in {coordinates}.

`mig-kit ground --model FOLDER --image A --image B "QUESTION"` asks it with the right prompt, and
`mig-kit eval --model FOLDER --card` writes scores into the head of this file: percent, the 95 %
interval in `metric_args`.

Recipe ({stage}):

```json
{recipe}
```
"""


def write_card(stage: str, folder: Path, run_id: str, params: dict) -> None:
    """Write the card of a finishing stage's model, if it has one; params: of stage and run."""
    from huggingface_hub import ModelCard, ModelCardData  # of an extra

    name = next((path.split("/")[1] for path in MODELS.values() if path.startswith(stage)), "")
    if not (name and (folder / name).is_dir()):
        return
    trained = "02_sft" if stage == "03_merge" else stage
    before = finished_params(trained, run_id) if trained != stage else {}
    recipe = {name: _without_folders(value) for name, value in {**before, **params}.items()
              if name not in EXECUTION_PARAMS}
    base, data = str(params["base_model"]), name_data(run_id)
    is_of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not model_folder(base).is_dir()
    title = f"{run_id}, {'SFT' if stage == '03_merge' else 'GRPO'} model"
    head = ModelCardData(
        base_model=base if is_of_hub else None, license="apache-2.0" if base == "tiny" else None,
        library_name="transformers", pipeline_tag="image-text-to-text", model_name=title,
        tags=["mig-kit", "visual-grounding", *(["trl", "grpo"] if stage == "05_grpo" else [])])
    text = TEXT.format(
        title=_escape(title), run=_escape(run_id), stage=trained, low=params["min_pixels"],
        high=params["max_pixels"], coordinates=Coordinates(params["coordinates"]).description,
        base=_escape(base if is_of_hub else _without_folders(base)),
        data="drawn scenes" if data == "scenes" else _escape(Path(data).name),
        recipe=json.dumps(recipe, indent=1))
    card = ModelCard(f"---\n{head.to_yaml()}\n---\n{text}")
    write_atomically(folder / name / CARD, card.save)


def _without_folders(value):
    """The value; of an absolute path, also in a list, its last part alone."""
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _escape(text: str) -> str:
    """A user's words as plain text of Markdown."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(text.split()))


def require_card(folder: Path) -> None:
    """UserError unless the folder has a card that opens."""
    from huggingface_hub import ModelCard

    if folder.is_relative_to(PACKAGE) or not (folder / CARD).is_file():
        raise UserError(f"{folder} has no {CARD} that scores could be written into; the model "
                        "folders of stages 03 and 05 have one")
    ModelCard.load(folder / CARD)


def add_scores(folder: Path, scores: Mapping[str, Mapping[str, dict]],
               file: Path | None = None) -> None:
    """Add scores to a card's model-index; those of the same questions and protocol are replaced.

    scores: protocol -> suite -> summary, as of `mig-kit eval`. file: that the questions are from.
    """
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(folder / CARD)
    config, revision = (file.name, file_sha256(file)[:12]) if file else (None, None)
    results = {(result.dataset_name, result.dataset_config, result.dataset_revision,
                result.metric_name): result for result in card.data.eval_results or []}
    is_drawn = "official" not in scores  # a benchmark's own rule
    for protocol, by_suite in scores.items():
        for suite, summary in by_suite.items():
            figures = {"accuracy": summary["score"]} if "score" in summary else summary["avg"]
            metric = next(name for name in figures if name != "ci95")
            if figures[metric] is None:  # nothing was asked
                continue
            name, title = f"{metric}, {protocol}", suite_title(suite) if is_drawn else suite
            results[title, config, revision, name] = EvalResult(
                task_type="image-text-to-text", task_name="visual grounding in several images",
                dataset_type=f"{suite}_drawn" if is_drawn and suite in SUITES else suite,
                dataset_name=title, dataset_config=config, dataset_revision=revision,
                metric_type=metric, metric_name=name,
                metric_value=round(figures[metric], 2), metric_args={
                    "ci95": summary.get("ci95") or figures.get("ci95"), "n": summary["n"]})
    card.data.eval_results = list(results.values())
    write_atomically(folder / CARD, card.save)
