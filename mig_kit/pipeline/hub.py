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
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.pipeline import store
from mig_kit.pipeline.joint_rules import NEEDS_SFT
from mig_kit.pipeline.run_facts import name_data
from mig_kit.pipeline.run_folders import require_record
from mig_kit.world.suites import suite_title

CARD = """---
{metadata}
---

# {run_id}

Made by mig-kit from `{base}` by the recipe of arXiv 2507.00748:
GRPO of {start_from}, {steps} updates, seed {seed}.

Greedy scores in percent, with 95 % intervals over test samples:

| suite | {start} | this model | difference |
|---|---|---|---|
{rows}

Replies hold reasoning in `<think>` and, in `<answer>`, JSON with the image's number and a box in
{coordinates}. For research only: {seen}
"""

STARTS = {  # by start_from of 05
    "merged": "the merged SFT model", "adapter": "the SFT adapter",
    "base": "the base, without a cold start"}


def model_card(run_id: str) -> str:
    """The model card of a run's GRPO model: origin, recipe, scores and what it is not for.

    Raises FileNotFoundError for a run without finished 05_grpo and 06_evaluate, ValueError where
    the scores are not this model's.
    """
    params = require_record("05_grpo", run_id, "the model card")["params"]
    require_record("06_evaluate", run_id, "the model card")
    if replaced := store.find_replaced_input("06_evaluate", run_id):
        raise ValueError(f"06_evaluate of run '{run_id}' finished before {replaced} was run again; "
                         f"run: {store.format_run_command('06_evaluate', run_id)}")
    metrics = store.read_metrics(store.stage_folder("06_evaluate", run_id))
    base, start_from = params["base_model"], params.get("start_from", "merged")
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not model_folder(base).exists()
    before = "start" if "start" in metrics["systems"] else (
        "sft" if start_from in NEEDS_SFT else "base")
    metadata = ModelCardData(
        license="apache-2.0" if base == "tiny" else "other", library_name="transformers",
        pipeline_tag="image-text-to-text", base_model=base if is_on_hub else None,
        tags=["multi-image-grounding", "grpo", "mig-kit"])
    return CARD.format(
        metadata=metadata.to_yaml(), run_id=run_id, base=base if is_on_hub else Path(base).name,
        start_from=STARTS.get(start_from, "another model's folder"), steps=params["max_steps"],
        seed=params["seed"], start=SYSTEM_LABELS[before],
        rows="\n".join(_score_rows(metrics, before)), seen=_describe_data(base, run_id),
        coordinates=Coordinates(params["coordinates"]).description)


def _describe_data(base: str, run_id: str) -> str:
    data = name_data(run_id)
    seen = ("trained on synthetic scenes" if data == "scenes"
            else f"trained on other data than synthetic scenes ({data}), whose licence may bind it")
    return f"{seen}." if base == "tiny" else f"{seen}; name the base model's licence first."


def _score_rows(metrics: dict, start: str) -> list[str]:
    rows = []
    for suite, result in metrics["systems"]["grpo"].items():
        difference = metrics["deltas"][f"grpo-{start}"][suite]
        low, high = difference["ci95"]
        rows.append(f"| {suite_title(suite)} | {metrics['systems'][start][suite]['score']:.1f} | "
                    f"{result['score']:.1f} | {difference['value']:+.1f} "
                    f"({low:+.1f} to {high:+.1f}) |")
    return rows


def prepare_upload(run_id: str, folder: Path) -> Path:
    """Copy the GRPO model with its card to `folder`, which must not exist yet."""
    card = model_card(run_id)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a folder that does not")
    shutil.copytree(store.stage_folder("05_grpo", run_id) / "model", folder)
    (folder / "README.md").write_text(card)
    return folder


def upload(folder: Path, repository: str, private: bool) -> str:
    """Upload a prepared folder and return its address.

    ValueError where HF_TOKEN is not set, OSError where the Hub cannot be reached.
    """
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("HF_TOKEN is not set; put a token with write access into that "
                         "environment variable")
    client = HfApi(token=os.environ["HF_TOKEN"])
    try:
        address = client.create_repo(repository, private=private, exist_ok=True)
        client.upload_folder(repo_id=repository, folder_path=folder,
                             commit_message="Model and card from mig-kit")
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):  # of its client
            raise
        raise OSError(f"the Hub could not be reached ({type(error).__name__}); "
                      "try again") from error
    return str(address)
