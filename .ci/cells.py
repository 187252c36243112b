"""Write the parameters of `mig_kit.pipeline.stage_params` into the notebooks: `make cells`."""

import json
from typing import Literal, get_origin

import nbformat

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline.stage_params import MODELS, stage_fields


def parameters_cell(stage: str) -> str:
    """The source of a notebook's `parameters` cell."""
    lines = ["# parameters"]
    for name, field in stage_fields(stage).items():
        kind = field.annotation
        kind = (str if get_origin(kind) is Literal else get_origin(kind) or kind).__name__
        is_json = kind in ("str", "list", "dict")
        line = f"{name}: {kind} = {json.dumps(field.default) if is_json else field.default}"
        words = f"# {field.description}"
        lines += [f"{line}  {words}"] if len(line + words) < 99 else [words, line]
    return "\n".join(lines)


def main() -> None:
    """Write the cell of every stage."""
    for stage in MODELS:
        path = NOTEBOOKS / f"{stage}.ipynb"
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if "parameters" in cell.metadata.get("tags", ()):
                cell.source = parameters_cell(stage)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
