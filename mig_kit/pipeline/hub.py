"""A finished run's model with its card, for the Hugging Face Hub; only `mig-kit push` sends it.

The token comes from the environment (HF_TOKEN) and is written nowhere.
"""

import os
import re
import shutil
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData

from mig_kit.boxes import Coordinates
from mig_kit.common import model_folder
from mig_kit.pipeline import store
from mig_kit.pipeline.joint_rules import NEEDS_SFT
from mig_kit.pipeline.run_facts import name_data
from mig_kit.pipeline.run_folders import run_command
from mig_kit.plots import SYSTEM_LABELS, suite_name

CARD = """---
{metadata}
---

# {run_id}

Made by mig-kit from `{base}` by the recipe of arXiv 2507.00748:
{recipe} ({steps} steps, seed {seed}).

Greedy scores in percent, with 95 % intervals over test samples:

| suite | {start} | this model | difference |
|---|---|---|---|
{rows}

Replies hold reasoning in `<think>` and, in `<answer>`, JSON with the image's number and a box in
{coordinates}. For research only: {seen}
"""

RECIPES = {  # by start_from of 05
    "merged": "cold start, QLoRA, merge, rejection sampling, GRPO",
    "adapter": "cold start, QLoRA, rejection sampling, GRPO of the same adapter",
    "base": "rejection sampling and GRPO from the base, without a cold start",
}


def model_card(run_id: str) -> str:
    """The model card of a run's GRPO model: origin, recipe, scores and what it is not for.

    Raises FileNotFoundError for a run without finished 05_grpo and 06_evaluate, ValueError where
    the scores are not this model's.
    """
    has_sft, data = store.has_cold_start(run_id), name_data(run_id)
    records = {stage: _require_fresh_record(stage, run_id)
               for stage in ("02_sft", "05_grpo", "06_evaluate") if has_sft or stage > "03"}
    metrics = store.read_metrics(store.stage_folder("06_evaluate", run_id))
    params = records["05_grpo"]["params"]
    base = params["base_model"]
    is_on_hub = (re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None
                 and not model_folder(base).exists())
    is_tiny, start = base == "tiny", params.get("start_from", "merged")
    before = "sft" if has_sft and start in NEEDS_SFT else "base"
    before = "start" if "start" in metrics["systems"] else before
    metadata = ModelCardData(
        license="apache-2.0" if is_tiny else "other", library_name="transformers",
        pipeline_tag="image-text-to-text", base_model=base if is_on_hub else None,
        tags=["multi-image-grounding", "grpo", "mig-kit"])
    return CARD.format(
        metadata=metadata.to_yaml(), run_id=run_id, base=base if is_on_hub else Path(base).name,
        steps=params["max_steps"], seed=params["seed"], 
        rows="\n".join(_score_rows(metrics, before)),
        coordinates=Coordinates(params["coordinates"]).description,
        start=SYSTEM_LABELS[before],
        recipe=RECIPES.get(start if has_sft else "base", "GRPO from another model's folder"),
        seen=_describe_data(is_tiny, data))


def _describe_data(is_tiny: bool, data: str) -> str:
    if data == "scenes":
        seen = ("it has only ever seen drawn scenes" if is_tiny
                else "RL and its measurement saw drawn scenes only")
    else:
        seen = f"trained on other data than drawn scenes ({data}), whose licence may bind it"
    return f"{seen}." if is_tiny else f"{seen}; name the base model's licence first."


def _require_fresh_record(stage: str, run_id: str) -> dict:
    record = store.load_record(stage, run_id)
    if record is None:
        raise FileNotFoundError(f"run '{run_id}' has no finished {stage}; "
                                f"run: {run_command(stage, run_id)}")
    if stale_input := store.find_stale_input(stage, run_id):
        raise ValueError(f"{stage} of run '{run_id}' finished before {stale_input} was run again; "
                         f"run: {run_command(stage, run_id)}")
    return record


def _score_rows(metrics: dict, start: str) -> list[str]:
    rows = []
    for suite, result in metrics["systems"]["grpo"].items():
        before = metrics["systems"][start][suite]["score"]
        difference = metrics["deltas"][f"grpo-{start}"][suite]
        low, high = difference["ci95"]
        rows.append(f"| {suite_name(suite)} | {before:.1f} | {result['score']:.1f} | "
                    f"{difference['value']:+.1f} ({low:+.1f} to {high:+.1f}) |")
    return rows


def prepare_upload(run_id: str, folder: Path) -> Path:
    """Copy the GRPO model with its card to `folder`, which must not exist yet."""
    card = model_card(run_id)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a folder that does not")
    shutil.copytree(store.stage_folder("05_grpo", run_id) / "model", folder)
    (folder / "README.md").write_text(card)
    return folder


def hub_client() -> HfApi:
    """An HfApi with the token of HF_TOKEN; ValueError where that is not set."""
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("HF_TOKEN is not set; put a token with write access into that "
                         "environment variable")
    return HfApi(token=os.environ["HF_TOKEN"])


def upload(folder: Path, repository: str, private: bool, client: HfApi) -> str:
    """Upload a prepared folder and return its address.

    Raises OSError where the Hub cannot be reached.
    """
    try:
        address = client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=str(folder),
                             commit_message="Model and card from mig-kit")
    except Exception as error:
        # the Hub's client lets errors of its HTTP library through, whichever that is
        is_connection_error = type(error).__module__.split(".")[0] in ("httpx", "httpx2")
        if isinstance(error, OSError | ValueError) or not is_connection_error:
            raise
        raise OSError(f"the Hub could not be reached ({type(error).__name__}); "
                      "try again") from error
    return str(address)
