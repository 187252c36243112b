"""Stages of a run: how one begins, goes on after a kill, and finishes.

runs/<run id>/NN_stage/ holds a finished stage, which never changes. A stage is made beside it, in
NN_stage.unfinished, whose started.json says what it follows from; run.json is written last, then
the folder is renamed. A stopped stage goes on there if it follows from the same. Cells of a
finished stage work in NN_stage.shown, a copy that is deleted at their end.
"""

import ast
import atexit
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, file_sha256, write_json
from mig_kit.image_files import IMAGE_FOLDER, IMAGE_MANIFEST, link_or_copy
from mig_kit.pipeline import run_folders, stage_keys
from mig_kit.pipeline.model_cards import CARD, write_card
from mig_kit.pipeline.params import default_params, validate_params
from mig_kit.pipeline.plan import check_run
from mig_kit.pipeline.run_facts import describe_machine, package_versions, processor_seconds

DEFAULT_RUN = "default"  # which a new run of a notebook starts from
STARTED = "started.json"


def describe_staleness(stage: str, run_id: str, params: dict) -> str:
    """How a finished stage differs from what it would be now, in words; "" if it does not."""
    record = run_folders.load_record(stage, run_id)
    now = stage_keys.stage_facts(stage, run_id, params)
    damaged = find_damaged(run_folders.stage_folder(stage, run_id), record)
    return stage_keys.describe_change(record["facts"], now) or (
        f"{damaged} is gone or damaged" if damaged else "")


def find_stale(run_id: str) -> dict[str, str]:
    """Stale stage -> "STAGE: why" of the first stage that makes it so, in a run and its source."""
    stale: dict[str, str] = {}
    for stage in run_folders.STAGES:
        if record := run_folders.load_record(stage, run_id):
            try:
                reason = describe_staleness(stage, run_id, recorded_params(stage, record))
            except UserError as error:  # what it was made from is gone
                reason = str(error)
            causes = [f"{stage}: {reason}"] if reason else [
                stale[name] for name in run_folders.input_stages(stage, run_id) if name in stale]
            if causes:
                stale[stage] = causes[0]
    return stale


def require_fresh_inputs(stage: str, run_id: str) -> None:
    """UserError if a stage that this one reads is stale, as of `find_stale`."""
    stale = find_stale(run_id)
    for name in run_folders.input_stages(stage, run_id):
        if name in stale:
            raise UserError(f"{stage} would build on what is stale in run '{run_id}' "
                            f"({stale[name]}); run that again, or add --force: what comes of it "
                            "is then stale, too")


def stale_notes(stage: str, run_id: str) -> list[str]:
    """Sentences on why a stage's results are not those of the present code and parameters."""
    return [f"{stage} of run '{run_id}' is stale ({reason})"
            for name, reason in find_stale(run_id).items() if name == stage]


def recorded_params(stage: str, record: dict) -> dict:
    """The parameters that a finished stage had; new ones have their default, old ones are gone."""
    return {name: record["params"].get(name, default)
            for name, default in default_params(stage).items()}


def require_intact_inputs(stage: str, run_id: str) -> None:
    """UserError with file and command if an earlier stage's output has other bytes than it had."""
    for name in run_folders.input_stages(stage, run_id):
        owner, folder = run_folders.find_owner(name, run_id), run_folders.stage_folder(name, run_id)
        record = run_folders.load_record(name, run_id)
        if damaged := record and find_damaged(folder, record, is_thorough=True):
            raise UserError(f"{damaged} is not what {name} of run '{owner}' wrote: damaged or "
                            "changed since; make it again: "
                            f"{run_folders.format_run_command(name, owner, ' --force')}")


def find_damaged(folder: Path, record: dict, is_thorough: bool = False) -> Path | None:
    """The first output that is gone or changed, or stored image that is gone; None if all is well.

    is_thorough: also hash files of unchanged size and time.
    """
    outputs = record["outputs"]
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file():
            return path
        is_as_it_was = record["stats"].get(name) == stage_keys.file_stats(path) and not is_thorough
        if not is_as_it_was and file_sha256(path) != digest:
            return path
    images = folder / IMAGE_FOLDER
    listed = (folder / IMAGE_MANIFEST).read_text().split() if IMAGE_MANIFEST in outputs else ()
    stored = {path.name for path in images.glob("*")}
    return next((images / name for name in listed if name not in stored), None)


def unfinished_folder(stage: str, run_id: str) -> Path:
    """Where the stage of a run is made."""
    return run_folders.runs_root() / run_id / f"{stage}.unfinished"


def read_started(folder: Path) -> dict:
    """started.json: {"facts" of `stage_facts`, "spent": seconds before, "is_forced"}, else {}."""
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


def begin_again(stage: str, run_id: str, facts: dict) -> None:
    """For --force: drop what was begun, and let the stage start with these facts."""
    folder = unfinished_folder(stage, run_id)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / STARTED, {"facts": facts, "spent": 0.0, "is_forced": True})


def is_done(stage: str, run_id: str, params: dict) -> bool:
    """Whether the stage has finished with these parameters, inputs and code.

    Raises: UserError, with what differs and the ways out, if it has finished or was stopped with
        others, or if one of its files is damaged.
    """
    record = run_folders.load_record(stage, run_id)
    started = read_started(unfinished_folder(stage, run_id))
    difference = started and stage_keys.describe_change(
        started["facts"], stage_keys.stage_facts(stage, run_id, params), "started")
    if not difference and (started or not record):
        return False
    if record and not (difference := describe_staleness(stage, run_id, params)):
        return True
    state = "has finished" if record else "was stopped"
    number = stage[:2]
    source = f" --from {run_id}" if "02" <= number < "08" else ""
    raise UserError(f"{stage} of run '{run_id}' {state}, and stays as it is ({difference}); for "
                    f"other results use another run (mig-kit run {number}{source} --run-id mine; "
                    f"in a notebook run_id = \"mine\"), or mig-kit run {number} --run-id {run_id} "
                    "--force, which replaces it")


@dataclass
class Stage:
    """A running stage; work: the folder it writes to, params: its own and the run's.

    facts: of `stage_facts`. inputs: the stages that it reads. is_shown: whether it has finished
    before, and its cells only show it. spent: seconds before.
    """

    name: str
    run_id: str
    work: Path
    params: dict
    facts: dict
    inputs: tuple[str, ...]
    is_shown: bool
    spent: float
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    cpu_clock: float = field(default_factory=processor_seconds)
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        """Where the stage writes; UserError once it has finished."""
        if self.is_finished:
            raise UserError(f"{self.name} of run '{self.run_id}' has finished; run the setup "
                            "cell again, and the cells show what is there")
        return self.work

    @property
    def box_format(self) -> BoxFormat:
        """How the run's model sees images and writes boxes."""
        params = self.params
        return BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])

    @property
    def final_folder(self) -> Path:
        """Where the stage lies once it has finished."""
        return run_folders.runs_root() / self.run_id / self.name

    def input_path(self, stage: str, name: str = "") -> Path:
        """A file or folder that an earlier stage of this run, or of its source, has made."""
        return run_folders.stage_folder(stage, self.run_id) / name

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
            write_card(self.name, folder, self.run_id, self.params)
            files = {str(path.relative_to(folder)): path for path in _output_files(folder)}
            write_json(folder / "run.json", {
                "stage": self.name, "run_id": self.run_id, "params": self.params,
                "facts": self.facts, "branch": run_folders.load_branch(self.run_id),
                "outputs": {name: file_sha256(path) for name, path in files.items()},
                "stats": {name: stage_keys.file_stats(path) for name, path in files.items()},
                "summary": summary.replace(str(folder), str(final)), **describe_machine(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
                "seconds": round(self.spent + time.monotonic() - self.clock, 1),
                # of a stage that was stopped before, only a part was seen
                "processor_seconds": None if self.spent else round(
                    processor_seconds() - self.cpu_clock, 1), **facts})
            if final.exists():
                shutil.rmtree(final)
            folder.rename(final)
            (final / STARTED).unlink()
        self.is_finished = True
        run_folders.unlock_run(final.parent)


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path.suffix not in (".ipynb", ".tmp", ".log")
                  and path.name not in ("job.json", "run.json", STARTED)  # they say how it ran
                  and "checkpoints" not in path.relative_to(folder).parts
                  and (path.name != CARD or path.parent == folder)  # no result follows from it
                  and path.parent != folder / IMAGE_FOLDER)  # IMAGE_MANIFEST lists these


def begin_stage(stage: str, names: dict) -> tuple[Stage, SimpleNamespace]:
    """Start a stage from its notebook, go on with a stopped one, or show a finished one.

    Prints the parameters that differ from the defaults. A new run id becomes a branch of run
    `default`, if there is one. Until the stage finishes, no other process can write this run.

    Args:
        names: the notebook's globals().
    Returns: the stage, and its parameters.
    Raises: UserError as `validate_params`, `is_done` and `require_fresh_inputs`, and for a damaged
        input.
    """
    known = {*default_params(stage), *_names_in_parameters_cells(names)}
    params = validate_params({name: names[name] for name in known & names.keys()}, stage)
    run_id = params["run_id"]
    run_folders.require_own_stage(stage, run_id)
    root, inputs = run_folders.runs_root(), run_folders.STAGES[stage]
    run = root / run_id
    is_branch = bool(inputs) and not run.exists() and (root / DEFAULT_RUN).is_dir()
    check_run({stage: params}, DEFAULT_RUN if is_branch else run_id)
    if is_branch:
        earlier = run_folders.start_branch(DEFAULT_RUN, run_id, stage)
        print(f"run '{run_id}' is new: {earlier[0]} to {earlier[-1]} are those of run "
              f"'{DEFAULT_RUN}'")
    facts = stage_keys.stage_facts(stage, run_id, params)
    require_intact_inputs(stage, run_id)
    run_folders.lock_run(run)
    started = read_started(unfinished_folder(stage, run_id))
    try:
        is_shown = is_done(stage, run_id, params)
        if not is_shown and not started.get("is_forced"):
            require_fresh_inputs(stage, run_id)
    except UserError:
        run_folders.unlock_run(run)
        raise
    folder = _open_copy(stage, run_id) if is_shown else unfinished_folder(stage, run_id)
    spent = 0.0 if is_shown else seconds_spent(folder)
    if not is_shown:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / STARTED, {"is_forced": False, **started, "facts": facts,
                                      "spent": spent})
    begun = Stage(stage, run_id, folder, stage_keys.with_run_params(stage, run_id, params), facts,
                  run_folders.input_stages(stage, run_id), is_shown, spent)
    _print_stage(begun)
    return begun, SimpleNamespace(**begun.params)


def _names_in_parameters_cells(names: dict) -> set[str]:
    """What a notebook's `parameters` cell, and papermill's behind it, have assigned.

    names: the notebook's globals(), in which IPython keeps the cells that were run.
    """
    cells = [source for source in names.get("In", ())
             if source.lower().startswith("# parameters\n")]
    targets = [target for source in cells for node in ast.parse(source).body
               for target in getattr(node, "targets", [getattr(node, "target", None)])]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _open_copy(stage: str, run_id: str) -> Path:
    """A copy of a finished stage, for the cells that show it; it goes when this process ends."""
    final = run_folders.runs_root() / run_id / stage
    folder = final.with_name(f"{stage}.shown")
    shutil.rmtree(folder, ignore_errors=True)  # of a kernel that was killed

    def bring_along(path: str, target: str) -> None:
        # weights and images are never written in place, so a hard link will do
        is_fixed = path.endswith(".safetensors") or Path(path).parent.name == IMAGE_FOLDER
        (link_or_copy if is_fixed else shutil.copy2)(Path(path), Path(target))

    shutil.copytree(final, folder, copy_function=bring_along,
                    ignore=shutil.ignore_patterns("run.json", "*.ipynb"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _print_stage(stage: Stage) -> None:
    defaults = default_params(stage.name)
    differences = [f"{name}: {json.dumps(value)}" for name, value in stage.params.items()
                   if defaults.get(name) != value]
    print("\n  ".join([f"{stage.name} of run '{stage.run_id}'", *differences]))
    print("versions:", ", ".join(f"{name} {version}"
                                 for name, version in package_versions().items()))
    if stage.is_shown:
        record = run_folders.require_record(stage.name, stage.run_id, stage.name)
        print(f"it has finished ({record['summary'] or 'no summary'}): the cells show what is "
              "there, and train nothing again")
    elif stage.spent:
        print(f"it goes on where it was stopped after {stage.spent / 60:.1f} min")


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())
