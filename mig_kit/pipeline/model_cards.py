"""Model cards, as the hub shows them, in the model folders of 03 and 05: README.md.

No result follows from a card, which names the run, so it is no output of its stage.
"""

import json
import re
from pathlib import Path

from mig_kit import __version__
from mig_kit.common import model_folder, write_atomically
from mig_kit.pipeline.run_facts import MODELS, name_data
from mig_kit.pipeline.run_folders import finished_params
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS

CARD = "README.md"
TEXT = """# {title}

Names the image and the box that answer a question on several images:
`<think>...</think><answer>{{"image": 2, "box": [x1,y1,x2,y2]}}</answer>`. Made with
mig-kit {version}; `mig-kit ground --model FOLDER --image A --image B "QUESTION"` asks it
with the right prompt.

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
    is_sft, base = stage == "03_merge", params["base_model"]
    facts = {"data": name_data(run_id), **(finished_params("02_sft", run_id) if is_sft else {}),
             **params}
    recipe = json.dumps({name: value for name, value in facts.items()
                         if name not in EXECUTION_PARAMS}, indent=1)
    recipe = re.sub(r'"/[^"]*/', '"', recipe)  # of absolute paths the last part alone
    is_of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not model_folder(base).is_dir()
    title = f"{run_id}, {'SFT' if is_sft else 'GRPO'} model"
    head = ModelCardData(
        base_model=base if is_of_hub else None, license="apache-2.0" if base == "tiny" else None,
        library_name="transformers", pipeline_tag="image-text-to-text", model_name=title,
        tags=["mig-kit", "visual-grounding", *(() if is_sft else ("trl", "grpo"))])
    # within a block of code, JSON's strings need no escape from Markdown
    text = TEXT.format(title=title, version=__version__, recipe=recipe)
    write_atomically(folder / name / CARD, ModelCard(f"---\n{head.to_yaml()}\n---\n{text}").save)
