"""Stages of a run: how one begins, goes on after a kill, and finishes.

runs/<run id>/NN_stage/ holds a finished stage, whose outputs never change. A stage is made beside
it, in NN_stage.unfinished, whose started.json says what it follows from; run.json is written last,
then the folder is renamed. A stopped stage goes on there. Cells of a finished stage work in
NN_stage.shown, a copy that is deleted at their end.
"""

import atexit
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, file_sha256, write_json
from mig_kit.image_files import IMAGE_FOLDER, link_or_copy
from mig_kit.pipeline import run_folders, runs, stage_keys
from mig_kit.pipeline.cells import KernelCells
from mig_kit.pipeline.model_cards import CARD, write_card
from mig_kit.pipeline.params import default_params, validate_params
from mig_kit.pipeline.plan import check_run
from mig_kit.pipeline.processes import prepare_process
from mig_kit.pipeline.run_facts import describe_machine, package_versions, processor_seconds
from mig_kit.pipeline.runs import Run

DEFAULT_RUN = "default"  # which a new run of a notebook starts from
STARTED = "started.json"


@dataclass
class Stage:
    """A running stage; work: the folder it writes to, params: its own and the run's.

    facts: of `stage_facts`. cells: what its kernel has run. is_shown: whether it has finished
    before, and its cells only show it. spent: seconds before. edited: how what ran before differs
    from what would be recorded.
    """

    name: str
    run: Run
    work: Path
    params: dict
    facts: dict
    cells: KernelCells
    is_shown: bool = False
    spent: float = 0.0
    edited: str = ""
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    cpu_clock: float = field(default_factory=processor_seconds)
    is_finished: bool = False

    @property
    def run_id(self) -> str:
        """The name of its run."""
        return self.run.id

    @property
    def folder(self) -> Path:
        """Where the stage writes; UserError once it has finished."""
        if self.is_finished:
            raise UserError(f"{self.name} of run '{self.run_id}' has finished; run the setup "
                            "cell again, and the cells show what is there")
        return self.work

    @property
    def final_folder(self) -> Path:
        """Where the stage lies once it has finished."""
        return self.run.folder / self.name

    @property
    def box_format(self) -> BoxFormat:
        """How the run's model sees images and writes boxes."""
        return BoxFormat.of(self.params)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stages that it reads."""
        return self.run.inputs(self.name)

    def input_path(self, stage: str, name: str = "") -> Path:
        """A file or folder that an earlier stage of this run, or of its source, has made."""
        return self.run.stage_folder(stage) / name

    def finish(self, metrics: dict, summary: str = "", **facts) -> None:
        """Write metrics.json, then run.json, and rename the folder; a copy to show is deleted.

        summary: the result in a few words, for the command line. facts: more entries of run.json.
        """
        folder, final = self.folder, self.final_folder
        if self.is_shown:
            shutil.rmtree(folder)
            print(f"{self.name} of run '{self.run_id}' is as it was")
        else:
            write_json(folder / "metrics.json", metrics)
            write_card(self.name, folder, self.run, self.params)
            record = self._describe() | {"summary": summary.replace(str(folder), str(final))}
            if record["edited"]:
                print(f"warning: it is recorded as edited: {record['edited']}")
            write_json(folder / "run.json", record | facts)
            if final.exists():
                shutil.rmtree(final)
            folder.rename(final)
            (final / STARTED).unlink()
        self.is_finished = True
        run_folders.unlock_run(self.run.folder)

    def _describe(self) -> dict:
        """run.json of a stage that finishes now."""
        files = {str(path.relative_to(self.work)): path for path in _output_files(self.work)}
        # of a stage that was stopped before, only a part was seen
        used = None if self.spent else round(processor_seconds() - self.cpu_clock, 1)
        return {"stage": self.name, "run_id": self.run_id, "params": self.params,
                "facts": self.facts, "branch": self.run.branch,
                "edited": self.edited or self.cells.describe_edit(),
                "outputs": {name: file_sha256(path) for name, path in files.items()},
                "stats": {name: stage_keys.file_stats(path) for name, path in files.items()},
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "seconds": round(self.spent + time.monotonic() - self.clock, 1),
                "processor_seconds": used, **describe_machine()}


def begin_stage(stage: str, names: dict) -> tuple[Stage, SimpleNamespace]:
    """Start a stage from its notebook, go on with a stopped one, or show a finished one.

    Prints the parameters that differ from the defaults, and what is stale. A new run id becomes a
    branch of run `default`, if there is one. Until the stage finishes, no other process can write
    this run.

    Args:
        names: the notebook's globals().
    Returns: the stage, and its parameters.
    Raises: UserError as `validate_params` and `is_done`, and for a damaged input.
    """
    prepare_process()
    cells = KernelCells(stage, names)
    known = {*default_params(stage), *cells.list_parameters()}
    params = validate_params({name: names[name] for name in known & names.keys()}, stage)
    run = _open_run(stage, params)
    run.require_intact_inputs(stage)
    run_folders.lock_run(run.folder)
    try:
        begin = _show if is_done(run, stage, params) else _go_on
    except UserError:
        run_folders.unlock_run(run.folder)
        raise
    begun = begin(run, stage, params, cells)
    _print_stage(begun)
    return begun, SimpleNamespace(**begun.params)


def _open_run(stage: str, params: dict) -> Run:
    """The run of a stage that can begin in it; a new one becomes a branch, where there is a source.
    """
    run, source = Run(params["run_id"]), Run(DEFAULT_RUN)
    run.require_own(stage)
    has_source = run_folders.STAGES[stage] and not run.folder.exists() and source.folder.is_dir()
    check_run({stage: params}, source if has_source else run)
    if not has_source:
        return run
    earlier = runs.start_branch(source.id, run.id, stage)
    print(f"run '{run.id}' is new: {earlier[0]} to {earlier[-1]} are those of run '{source.id}'")
    return Run(run.id)


def is_done(run: Run, stage: str, params: dict) -> bool:
    """Whether the stage has finished with these parameters.

    Raises: UserError, with what differs and the ways out, if it has finished or was stopped with
        other ones.
    """
    started, record = read_started(run.unfinished_folder(stage)), run.record(stage)
    if started:
        begun_with = default_params(stage) | started["facts"]["parameter"]
        changes = stage_keys.list_changed_params(begun_with, params, "started")
        if not changes:
            return False
    if record:
        changes = stage_keys.list_changed_params(run.params(stage), params)
        if not changes:
            return True
    elif not started:
        return False
    state = "has finished" if record else "was stopped"
    number = stage[:2]
    source = f" --from {run.id}" if "02" <= number < "08" else ""
    raise UserError(f"{stage} of run '{run.id}' {state}, and stays as it is ({'; '.join(changes)})"
                    f"; for other results use another run (mig-kit run {number}{source} --run-id "
                    f"mine; in a notebook run_id = \"mine\"), or mig-kit run {number} --run-id "
                    f"{run.id} --force, which replaces it")


def _go_on(run: Run, stage: str, params: dict, cells: KernelCells) -> Stage:
    """The stage in the folder that it is made in, with what a stopped one has left there."""
    folder, facts = run.unfinished_folder(stage), run.stage_facts(stage, params)
    started, spent = read_started(folder), seconds_spent(folder)
    change = started and stage_keys.describe_change(started["facts"], facts)
    edited = f"{change} since it was begun" if change else started.get("edited", "")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, {"facts": facts, "spent": spent, "edited": edited})
    return Stage(stage, run, folder, run.with_run_params(stage, params), facts, cells, spent=spent,
                 edited=edited)


def _show(run: Run, stage: str, params: dict, cells: KernelCells) -> Stage:
    """A finished stage with a copy of its folder, for the cells that show it; the copy goes when
    this process ends.
    """
    final = run.stage_folder(stage)
    folder = final.with_name(f"{stage}.shown")
    shutil.rmtree(folder, ignore_errors=True)  # of a kernel that was killed

    def bring_along(path: str, target: str) -> None:
        # weights and images are never written in place, so a hard link will do
        is_fixed = path.endswith(".safetensors") or Path(path).parent.name == IMAGE_FOLDER
        (link_or_copy if is_fixed else shutil.copy2)(Path(path), Path(target))

    shutil.copytree(final, folder, copy_function=bring_along,
                    ignore=shutil.ignore_patterns("run.json", "*.ipynb"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Stage(stage, run, folder, run.params(stage) | params, run.record(stage)["facts"], cells,
                 is_shown=True)


def _print_stage(stage: Stage) -> None:
    defaults = default_params(stage.name)
    differences = [f"{name}: {json.dumps(value)}" for name, value in stage.params.items()
                   if defaults.get(name) != value]
    print("\n  ".join([f"{stage.name} of run '{stage.run_id}'", *differences]))
    print("versions:", ", ".join(f"{name} {version}"
                                 for name, version in package_versions().items()))
    if stage.is_shown:
        summary = stage.run.record(stage.name)["summary"] or "no summary"
        print(f"it has finished ({summary}): the cells show what is there, and train nothing again")
    elif stage.spent:
        print(f"it goes on where it was stopped after {stage.spent / 60:.1f} min")
    if edited := stage.edited or stage.cells.describe_edit() * (not stage.is_shown):
        print(f"warning: it will be recorded as edited: {edited}")
    marked = [stage.name] if stage.is_shown else stage.inputs
    notes = [note for name in marked for note in stage.run.describe_marks(name)]
    for note in dict.fromkeys(notes):
        print("warning: it is" if stage.is_shown else "warning: it builds on what is", note)


def read_started(folder: Path) -> dict:
    """started.json: {"facts" of `stage_facts`, "spent": seconds, "edited": of `Stage`}, else {}."""
    path = folder / STARTED
    return json.loads(path.read_text()) if path.is_file() else {}


def seconds_spent(folder: Path) -> float:
    """Seconds that went into an unfinished stage, up to the last file that is kept of it."""
    started = read_started(folder)
    if not started:
        return 0.0
    written = [path.stat().st_mtime for path in folder.rglob("*")
               if path.is_file() and path.suffix != ".log"]
    return round(started["spent"] + max(written) - (folder / STARTED).stat().st_mtime, 1)


def begin_again(folder: Path, facts: dict) -> None:
    """For --force: drop what was begun in an unfinished folder; the stage starts with these facts.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / STARTED, {"facts": facts, "spent": 0.0})


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path.suffix not in (".ipynb", ".tmp", ".log")
                  and path.name not in ("job.json", "run.json", STARTED)  # they say how it ran
                  and "checkpoints" not in path.relative_to(folder).parts
                  and (path.name != CARD or path.parent == folder)  # no result follows from it
                  and path.parent != folder / IMAGE_FOLDER)  # IMAGE_MANIFEST lists these


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())
