"""The cells that a kernel has run, beside those that its notebook is saved with."""

import ast
import json

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline.stage_keys import parse_cell


class KernelCells:
    """What the kernel of a stage has run; empty for a script, which has no cells.

    names: the notebook's globals(), in which IPython keeps its cells.
    """

    def __init__(self, stage: str, names: dict):
        from IPython.core.inputtransformer2 import TransformerManager  # comes with notebooks

        self.history = names.get("In", [])  # grows with every cell
        self.begun = len(self.history) - 1
        cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
        sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        transform = TransformerManager().transform_cell  # magics, as a kernel keeps them
        self.saved = list(filter(None, map(_normalize, map(transform, sources))))

    def list_parameters(self) -> set[str]:
        """Names that the `parameters` cell, and papermill's behind it, have assigned."""
        nodes = [node for source in self.history if _has_parameters(source)
                 for node in ast.parse(source).body]
        targets = [target for node in nodes for target in
                   getattr(node, "targets", [getattr(node, "target", None)])]
        return {target.id for target in targets if isinstance(target, ast.Name)}

    def describe_edit(self) -> str:
        """How what has run so far differs from the saved cells, in words; "" if it does not.

        The saved cells since the stage began must have run in their order; some may have run again.
        """
        executed = list(filter(None, map(_normalize, self.history)))
        foreign = [cell for cell in executed if cell not in self.saved]
        if foreign:
            lines = foreign[-1].splitlines()
            known = {line for cell in self.saved for line in cell.splitlines()}
            line = next((line for line in lines if line not in known), lines[0])
            return f"it ran {line!r}, which the saved notebook does not have"
        since = list(filter(None, map(_normalize, self.history[self.begun:])))
        bounds = [self.saved.index(cell) for cell in (since[:1] + since[-1:])]
        due = self.saved[bounds[0]:bounds[1] + 1] if bounds else []
        left = iter(since)
        skipped = [cell for cell in due if cell not in left]  # `in` moves on: the order counts
        return f"it did not run {skipped[0].splitlines()[0]!r} in its place" if skipped else ""


def _has_parameters(source: str) -> bool:
    return source.lower().startswith("# parameters\n")


def _normalize(source: str) -> str:
    """A cell's code without comments, layout and parameters; "" if it does not compile."""
    try:
        tree = parse_cell(source)
    except SyntaxError:
        return ""
    if _has_parameters(source):
        tree.body = [node for node in tree.body if not isinstance(node, ast.Assign | ast.AnnAssign)]
    return ast.unparse(tree)
