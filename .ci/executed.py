"""Put the notebooks of a finished run into notebooks/executed: `make executed RUN_ID=default`.
Without a run it writes the present texts beside the outputs that are there: `make executed-texts`.

Lessons, which are no stages, are executed on that run; `.ci/executed.py RUN_ID LESSON` makes one
of them again, as 10 after new records. run.json beside them says of which run they are, and holds a
digest of each one's outputs. README's picture is the one that 07 keeps, and results.md shows the
head of the report, as Chromium draws it. The run's adapters become tiny/sft and tiny/grpo;
replies.json holds some of the replies that its models gave in 06, and those of the base lie beside
it.
"""

import ast
import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill

from mig_kit.boxes import BoxFormat
from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, file_sha256, model_folder, write_json
from mig_kit.evaluation.evaluate import draw_test_samples, first_per_task
from mig_kit.evaluation.report import export_page
from mig_kit.models.adapters import WEIGHTS
from mig_kit.models.shipped import AS_THE_RUN, STARTS, merge_shipped
from mig_kit.pipeline.execute import ThisPython
from mig_kit.pipeline.processes import prepare_process
from mig_kit.pipeline.run_facts import EVALUATE, MODELS, describe_machine
from mig_kit.pipeline.run_folders import RECIPE, STAGES
from mig_kit.pipeline.runs import Run
from mig_kit.serving import reply_files, shipped_replies
from mig_kit.serving.stored_replies import load_replies, reply_file

FOLDER = NOTEBOOKS / "executed"
LESSONS = ("05b_grpo_by_hand", "10_what_makes_it_work", "11_break_it", "12_credit")
FACTS = ("run_id", "started", "seconds", "machine", "versions", "git")
# a shipped model -> the stages that trained its adapter and merged it
MADE_BY = {"tiny/sft": ("02_sft", "03_merge"), "tiny/grpo": ("05_grpo", "05_grpo")}
MERGED = "model.safetensors"
REPLIES_PER_TASK = 2
GROUND = re.compile(r"(<!-- executed ground -->\n```text\n).*?(```\n<!-- end -->)", re.DOTALL)


def move_links(text: str) -> str:
    """A text of notebooks/ with its links as they are read in FOLDER."""
    def move(match: re.Match) -> str:
        name = match[1].removeprefix("executed/").partition("#")[0]
        is_here = name.removesuffix(".ipynb") in (*RECIPE, *LESSONS)
        return f"]({match[1].removeprefix('executed/') if is_here else f'../{match[1]}'})"
    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", move, text)


def outputs_digest(notebook) -> str:
    """SHA-256 of all outputs of a notebook's cells."""
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def keep_notebook(path: Path) -> str:
    """Write an executed notebook into FOLDER, without this machine's paths; its outputs' digest."""
    text = path.read_text()
    # the environment may lie beside another clone
    for folder in (PROJECT_ROOT, PROJECT_ROOT.resolve(), Path(sys.prefix).parent):
        text = text.replace(f"{folder}/", "")
    notebook = nbformat.reads(text, 4)
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "execution"):
            part.metadata.pop(name, None)
        if "page" in part.metadata.get("tags", ()):  # a gallery of megabytes
            part.outputs = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = move_links(cell.source)
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
        if "parameters" in now.metadata.get("tags", ()):
            continue  # the run had those that are kept
        if now.cell_type == "code" and parse_code(cell) != parse_code(now):
            sys.exit(f"{path.name} was run with other code; make executed after a run")
        cell.source = move_links(now.source) if now.cell_type == "markdown" else now.source
    nbformat.write(kept, path)


def parse_code(cell) -> str:
    """A cell's code without comments and layout."""
    return ast.dump(ast.parse(cell.source))


def run_lesson(lesson: str, run_id: str) -> dict:
    """Execute a lesson on the run and keep it; its facts."""
    started, machine = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), describe_machine()
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{lesson}.ipynb"
        papermill.execute_notebook(NOTEBOOKS / path.name, path, {"run_id": run_id},
                                   cwd=str(NOTEBOOKS), kernel_manager_class=ThisPython)
        digest = keep_notebook(path)
    return {"run_id": run_id, "started": started, "seconds": round(time.monotonic() - clock, 1),
            **machine, "outputs": digest}


def copy_pictures(run_id: str) -> None:
    """Write guide/question.png, and guide/report.png with `draw_report`."""
    shutil.copy(Run(run_id).stage_folder("07_report") / "question.png", NOTEBOOKS / "guide")
    draw_report(run_id)


def draw_report(run_id: str) -> None:
    """Write guide/report.png, the head of the kept 07's page; needs `chromium` on the path."""
    if not (browser := shutil.which("chromium")):
        sys.exit("chromium is not on the path, so report.png is still of an earlier run; install it"
                 " and repeat make executed")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(export_page(run_id, nbformat.read(FOLDER / "07_report.ipynb", 4).cells))
        subprocess.run([browser, "--headless", "--no-sandbox", "--hide-scrollbars",
                        "--window-size=1100,1500",
                        f"--screenshot={NOTEBOOKS / 'guide' / 'report.png'}", page.as_uri()],
                       check=True, capture_output=True)


def ship_adapters(run_id: str, facts: dict) -> None:
    """Write the run's adapters beside the tiny base, and their digests into the stages' facts.

    Raises: SystemExit if the merged weights are not the run's.
    """
    for model, (trained_by, merged_by) in MADE_BY.items():
        source = Run(run_id).stage_folder(trained_by) / "adapter"
        folder = model_folder(model)
        folder.mkdir(exist_ok=True)
        shutil.copyfile(source / WEIGHTS, folder / WEIGHTS)
        config = json.loads((source / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = STARTS[model][0]  # not a path of this machine
        write_json(folder / "adapter_config.json", config)
        facts[trained_by]["adapter"] = file_sha256(folder / WEIGHTS)
        merged = Run(run_id).stage_folder(merged_by) / dict(MODELS.values())[merged_by]
        facts[merged_by]["weights"] = file_sha256(merged / MERGED)
        if file_sha256(merge_shipped(model) / MERGED) != facts[merged_by]["weights"]:
            sys.exit(f"{model} is another model than {merged}; was the run made by this version, "
                     "on a CPU, from tiny?")


def keep_replies(run_id: str, path: Path) -> None:
    """Write the greedy replies of all models to the first questions of every task of 06."""
    params = Run(run_id).params(EVALUATE)
    asked = {"eval_seed": params["eval_seed"], "max_new_tokens": params["max_new_tokens"],
             "suites": dict.fromkeys(params["suites"], REPLIES_PER_TASK)}
    folder, replies = Run(run_id).stage_folder(EVALUATE) / "replies", {}
    for suite, samples in draw_test_samples(asked).items():
        for system in MODELS:
            stored = load_replies(reply_file(folder, system, suite))
            replies.setdefault(system, {}).update(
                {sample.id: stored[sample.id][0] for sample in samples})
    write_json(path, {**asked, "replies": replies})


def ship_base_replies(run_id: str) -> None:
    """Put the base's replies to the questions of 06 beside the base, so that others take them."""
    run = Run(run_id)
    folder, params = run.stage_folder(EVALUATE), SimpleNamespace(**run.params(EVALUATE))
    samples = draw_test_samples(vars(params))
    drawn = {suite: first_per_task(part, params.sampled_per_task)
             for suite, part in samples.items()}
    box_format = BoxFormat.of(vars(params))
    keys = reply_files.list_reply_keys(samples, drawn, AS_THE_RUN.dtype, box_format, params)
    shipped_replies.ship_replies({key: reply_file(folder / "replies", "base", *of)
                                  for of, key in keys.items()})


def show_ground(page: Path) -> None:
    """Write what the page's `mig-kit ground` prints into the block below it."""
    text = page.read_text()
    command = re.search(r"^mig-kit (ground .*)$", text, re.MULTILINE)[1]
    words = shlex.split(command, comments=True)
    with tempfile.TemporaryDirectory() as folder:
        output = subprocess.run([Path(sys.executable).with_name("mig-kit"), *words], cwd=folder,
                                capture_output=True, text=True, check=True).stdout
    page.write_text(GROUND.sub(lambda match: f"{match[1]}{output}{match[2]}", text))


def main(run_id: str) -> None:
    """Write the notebooks of all stages that the run has finished."""
    prepare_process()
    FOLDER.mkdir(exist_ok=True)
    facts = {}
    for stage in STAGES:
        path = Run(run_id).stage_folder(stage) / f"{stage}.ipynb"
        if path.is_file():
            record = Run(run_id).record(stage)
            facts[stage] = {name: record[name] for name in FACTS} | {
                "outputs": keep_notebook(path)}
    ship_adapters(run_id, facts)
    keep_replies(run_id, FOLDER / "replies.json")
    ship_base_replies(run_id)
    show_ground(PROJECT_ROOT / "README.md")
    facts |= {lesson: run_lesson(lesson, run_id) for lesson in LESSONS}
    write_json(FOLDER / "run.json", facts)
    copy_pictures(run_id)


def renew_lesson(run_id: str, lesson: str) -> None:
    """Execute one lesson again on the run whose notebooks are there."""
    prepare_process()
    path = FOLDER / "run.json"
    facts = json.loads(path.read_text())
    write_json(path, facts | {lesson: run_lesson(lesson, run_id)})


if __name__ == "__main__":
    if sys.argv[2:]:
        renew_lesson(*sys.argv[1:])
    elif sys.argv[1:]:
        main(sys.argv[1])
    else:
        for kept_notebook in sorted(FOLDER.glob("*.ipynb")):
            refresh_texts(kept_notebook)
