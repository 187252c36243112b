"""A finished run's model as a folder for the Hugging Face Hub, with its card; sent only by `mig-kit push`.

The token comes from the environment (HF_TOKEN) and is written nowhere.
"""

import json
import os
import re
import shutil
from pathlib import Path

from mig_kit.boxes import Coordinates
from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store

NAMES = {"mig_bench": "MIG-Bench tasks (drawn)", "ood_grounding": "out-of-domain grounding (drawn)", "blink": "as BLINK (drawn)",
         "mmiu": "as MMIU (drawn)"}


def model_card(run_id: str) -> str:
    """The model card of a run's reinforced model: what it was made from, how, its scores with intervals, what it is not for.

    Raises FileNotFoundError for a run without finished 05_grpo and 06_evaluate, ValueError where the scores are not this model's.
    """
    records = {}
    for stage in ("02_sft", "05_grpo", "06_evaluate"):
        record = store.load_record(stage, run_id)
        if record is None:
            raise FileNotFoundError(f"run '{run_id}' has no finished {stage}; run: mig-kit run --run-id {run_id}")
        if anew := store.find_stale_input(stage, run_id):
            raise ValueError(f"{stage} of run '{run_id}' finished before {anew} was run anew; run: mig-kit run --run-id {run_id}, "
                             "with the --profile of that run")
        records[stage] = record
    metrics = json.loads((store.runs_root() / run_id / "06_evaluate" / "metrics.json").read_text())
    base, grpo = records["02_sft"]["params"]["base_model"], records["05_grpo"]["params"]
    seen = "it has only ever seen drawn scenes." if base == "tiny" else "it was measured on drawn scenes only, see above."
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not (PROJECT_ROOT / "notebooks" / base).exists()
    lines = ["---", "license: apache-2.0" if base == "tiny" else "license: other  # the base model's; name it before publishing",
             "library_name: transformers", "pipeline_tag: image-text-to-text",
             *([f"base_model: {base}"] if hub_name else []), "tags: [multi-image-grounding, grpo, mig-kit]", "---", "",
             f"# {run_id}", "",
             f"Made by mig-kit from `{base if hub_name else Path(base).name}` by the recipe of arXiv 2507.00748:",
             f"cold start, QLoRA, merge, rejection sampling, GRPO ({grpo['max_steps']} steps, seed {grpo['seed']}).", "",
             "Greedy scores in percent, 95 % intervals over test samples:", "", "| suite | SFT | this model | difference |",
             "|---|---|---|---|"]
    for suite, found in metrics["systems"]["grpo"].items():
        gap = metrics["deltas"]["grpo-sft"][suite]
        low, high = gap["ci95"]
        lines.append(f"| {NAMES[suite]} | {metrics['systems']['sft'][suite]['score']:.1f} | {found['score']:.1f} | "
                     f"{gap['value']:+.1f} ({low:+.1f} to {high:+.1f}) |")
    lines += ["", "Answers are `<think>` reasoning and, in `<answer>`, JSON with the image's number and a box in",
              f"{Coordinates(grpo['coordinates']).description}. Not for anything but research: {seen}", ""]
    return "\n".join(lines)


def prepare_upload(run_id: str, folder: Path) -> Path:
    """The reinforced model with its card, copied to `folder`, which must not exist yet."""
    text = model_card(run_id)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a folder that does not")
    shutil.copytree(store.runs_root() / run_id / "05_grpo" / "model", folder)
    (folder / "README.md").write_text(text)
    return folder


def hub_client():
    """An HfApi with the token of HF_TOKEN; ValueError where that is not set."""
    from huggingface_hub import HfApi

    if not os.environ.get("HF_TOKEN"):
        raise ValueError("HF_TOKEN is not set; put a token with write access into that environment variable")
    return HfApi(token=os.environ["HF_TOKEN"])


def upload(folder: Path, repository: str, private: bool, interface) -> str:
    """Upload a staged folder and return its address. interface: of `hub_interface`. OSError where the Hub cannot be reached."""
    try:
        address = interface.create_repo(repository, private=private, exist_ok=True)
        interface.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Model and card from mig-kit")
    except Exception as error:
        if isinstance(error, OSError | ValueError) or type(error).__module__.split(".")[0] not in ("httpx", "httpx2"):
            raise
        raise OSError(f"the Hub could not be reached ({type(error).__name__}); try again") from error
    return str(address)
