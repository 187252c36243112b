"""What the notebooks tell the reader to try: blocks of Python, and commands."""

import json
import re

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read_items(stage: str) -> list[tuple[str, str]]:
    """(language, text) of every block below a notebook's heading "Try this"."""
    path = PROJECT_ROOT / "notebooks" / f"{stage}.ipynb"
    cells = ("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
             if cell["cell_type"] == "markdown")
    return [block for text in cells if text.startswith("## Try this")
            for block in BLOCK.findall(text)]


def python_blocks(stage: str) -> list[str]:
    """The blocks of Python of a notebook."""
    return [text for language, text in read_items(stage) if language == "python"]


# (stage, command) of every line of every block of shell
COMMANDS = [(stage, line) for stage in store.STAGES for language, text in read_items(stage)
            if language == "sh" for line in text.splitlines() if line.strip()]
