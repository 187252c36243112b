"""Put the notebooks of a finished run into notebooks/executed: `make executed RUN_ID=default`.
Without a run it writes the present texts beside the outputs that are there: `make executed-texts`.

05b, which is no stage, is executed on that run. run.json beside them says of which run they are,
and holds a digest of each one's outputs. README's picture is the one that 07 keeps, and results.md
shows the head of the report, as Chromium draws it.
"""

import ast
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill

from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, write_json
from mig_kit.pipeline import run_folders
from mig_kit.pipeline.execute import ThisPython
from mig_kit.pipeline.run_facts import describe_machine

FOLDER = NOTEBOOKS / "executed"
BY_HAND = "05b_grpo_by_hand"
FACTS = ("run_id", "started", "seconds", "machine", "versions", "git")


def outputs_digest(notebook) -> str:
    """SHA-256 of all outputs of a notebook's cells."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def keep_notebook(path: Path) -> str:
    """Write an executed notebook into FOLDER, without this machine's paths; its outputs' digest."""
    text = path.read_text()
    for folder in (PROJECT_ROOT, PROJECT_ROOT.resolve()):
        text = text.replace(f"{folder}/", "")
    notebook = nbformat.reads(text, 4)
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "execution"):
            part.metadata.pop(name, None)
    nbformat.write(notebook, FOLDER / path.name)
    return outputs_digest(notebook)


def refresh_texts(path: Path) -> None:
    """Give the kept notebook at `path` the texts and comments of the present one.

    Raises: SystemExit where its code is another.
    """
    kept, present = (nbformat.read(folder / path.name, 4) for folder in (FOLDER, NOTEBOOKS))
    cells = [cell for cell in kept.cells
             if "injected-parameters" not in cell.metadata.get("tags", ())]
    for cell, now in zip(cells, present.cells, strict=True):
        if now.cell_type == "code" and parse_code(cell) != parse_code(now):
            sys.exit(f"{path.name} was run with other code; make executed after a run")
        cell.source = now.source
    nbformat.write(kept, path)


def parse_code(cell) -> str:
    """A cell's code without comments and layout."""
    return ast.dump(ast.parse(cell.source))


def run_by_hand(run_id: str) -> dict:
    """Execute 05b on the run and keep it; its facts."""
    started, machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), describe_machine()
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{BY_HAND}.ipynb"
        papermill.execute_notebook(NOTEBOOKS / path.name, path, {"run_id": run_id},
                                   cwd=str(NOTEBOOKS), kernel_manager_class=ThisPython)
        digest = keep_notebook(path)
    return {"run_id": run_id, "started": started, "seconds": round(time.monotonic() - clock, 1),
            **machine, "outputs": digest}


def copy_pictures(run_id: str) -> None:
    """Write guide/question.png and guide/report.png; the latter needs `chromium` on the path."""
    guide, report = NOTEBOOKS / "guide", run_folders.stage_folder("07_report", run_id)
    shutil.copy(report / "question.png", guide)
    if not (browser := shutil.which("chromium")):
        sys.exit("chromium is not on the path, so report.png is still of an earlier run; install it"
                 " and repeat make executed")
    subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars",
                    "--window-size=1100,1410", f"--screenshot={guide / 'report.png'}",
                    (report / "report.html").resolve().as_uri()], check=True, capture_output=True)


def main(run_id: str) -> None:
    """Write the notebooks of all stages that the run has finished."""
    FOLDER.mkdir(exist_ok=True)
    facts = {}
    for stage in run_folders.STAGES:
        path = run_folders.stage_folder(stage, run_id) / f"{stage}.ipynb"
        if path.is_file():
            record = run_folders.load_record(stage, run_id)
            facts[stage] = {name: record[name] for name in FACTS} | {
                "outputs": keep_notebook(path)}
    facts[BY_HAND] = run_by_hand(run_id)
    write_json(FOLDER / "run.json", facts)
    copy_pictures(run_id)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(sys.argv[1])
    else:
        for kept_notebook in sorted(FOLDER.glob("*.ipynb")):
            refresh_texts(kept_notebook)
