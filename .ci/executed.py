"""Put the notebooks of a finished run into notebooks/executed: `make executed RUN_ID=default`.

run.json beside them says of which run they are, and holds a digest of each one's outputs.
"""

import hashlib
import json
import sys

import nbformat

from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, write_json
from mig_kit.pipeline import store

FOLDER = NOTEBOOKS / "executed"
FACTS = ("run_id", "started", "seconds", "machine", "versions", "git")


def outputs_digest(notebook) -> str:
    """SHA-256 of all outputs of a notebook's cells."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def main(run_id: str) -> None:
    """Write the notebooks of all stages that the run has finished."""
    FOLDER.mkdir(exist_ok=True)
    facts = {}
    for stage in store.STAGES:
        path = store.stage_folder(stage, run_id) / f"{stage}.ipynb"
        if not path.is_file():
            continue
        text = path.read_text()
        for folder in (PROJECT_ROOT, PROJECT_ROOT.resolve()):  # paths of this machine
            text = text.replace(f"{folder}/", "")
        notebook = nbformat.reads(text, 4)
        notebook.metadata.pop("papermill", None)
        for cell in notebook.cells:
            cell.metadata.pop("papermill", None)
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, FOLDER / path.name)
        record = store.load_record(stage, run_id)
        facts[stage] = {name: record[name] for name in FACTS} | {
            "outputs": outputs_digest(notebook)}
    write_json(FOLDER / "run.json", facts)


if __name__ == "__main__":
    main(sys.argv[1])
