"""Model cards, as the hub shows them, in the model folders of 03 and 05: README.md.

No result follows from a card, which names the run, so it is no output of its stage.
"""

import json
import re
from pathlib import Path

from mig_kit import __version__
from mig_kit.common import SHIPPED, model_folder
from mig_kit.pipeline.run_facts import MODELS
from mig_kit.pipeline.runs import Run
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS

CARD = "README.md"
TEXT = """---
{source}library_name: transformers
pipeline_tag: image-text-to-text
tags: [mig-kit, visual-grounding{tags}]
---
# {run_id}, {system} model

Names the image and the box that answer a question on several images:
`<think>...</think><answer>{{"image": 2, "box": [x1,y1,x2,y2]}}</answer>`. Made with
mig-kit {version}; `mig-kit ground --model FOLDER --image A --image B "QUESTION"` asks it
with the right prompt.

```json
{recipe}
```
"""


def write_card(stage: str, folder: Path, run: Run, params: dict) -> None:
    """Write the card of a finishing stage's model, if it has one; params: of stage and run."""
    name = dict(MODELS.values()).get(stage)
    if not name or not (folder / name).is_dir():
        return
    is_sft, base = stage == "03_merge", params["base_model"]
    facts = {"data": run.data, **(run.params("02_sft") if is_sft else {}), **params}
    recipe = json.dumps({name: value for name, value in facts.items()
                         if name not in EXECUTION_PARAMS}, indent=1)
    is_of_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not model_folder(base).is_dir()
    (folder / name / CARD).write_text(TEXT.format(
        source=("license: apache-2.0\n" if base in SHIPPED else
                f"base_model: {base}\n" if is_of_hub else ""),
        tags="" if is_sft else ", trl, grpo", run_id=run.id, system="SFT" if is_sft else "GRPO",
        version=__version__,
        # of absolute paths the last part alone; JSON's strings need no escape in a block of code
        recipe=re.sub(r'"/[^"]*/', '"', recipe)))
