"""Stages of a run: what makes one up to date, and how one begins and finishes.

A stage lives in runs/<run id>/NN_stage/. It is made in an attempt beside that folder (`attempts`),
whose run.json is written last. Then the attempt is renamed, so a failure leaves what has finished.
"""

import ast
import html
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import PACKAGE, digest_json, file_sha256, write_atomically, write_json
from mig_kit.image_files import IMAGE_FOLDER
from mig_kit.pipeline import attempts
from mig_kit.pipeline.joint_rules import check_run, validate_params
from mig_kit.pipeline.model_cards import CARD, write_cards
from mig_kit.pipeline.params import (
    EXECUTION_PARAMS,
    RUN_PARAMS,
    describe_edits,
    stage_parameters,
    trl_defaults,
)
from mig_kit.pipeline.run_facts import describe_control, describe_machine, package_versions
from mig_kit.pipeline.run_folders import (
    RECIPE,
    STAGES,
    find_owner,
    format_run_command,
    list_sources,
    load_branch,
    load_record,
    lock_run,
    require_own_stage,
    require_record,
    runs_root,
    stage_folder,
    start_branch,
    unlock_run,
    validate_run_id,
)
from mig_kit.pipeline.run_folders import has_cold_start as has_cold_start  # for stages
from mig_kit.pipeline.stage_keys import (
    describe_code,
    hash_named_files,
    input_stages,
    load_inputs,
    model_fingerprint,
    select_products,
    stage_facts,
    with_run_params,
)

DEFAULT_RUN = "default"  # which a new run of a notebook starts from
REPLY_KEYS = "reply_keys.json"
DRAWN_PARAMS = ("seed", "replies", "sampled_per_task")  # greedy replies do not follow from them
MIXED = "mixed"  # instead of a key: sampled by two attempts, on different servers or devices


def find_replaced_input(stage: str, run_id: str) -> str:
    """The name of an earlier stage that has made something else since this one read it, or ""."""
    for name, outputs in (load_record(stage, run_id) or {}).get("inputs", {}).items():
        now = load_record(name, run_id)
        if now is None or select_products(now.get("outputs", {})) != select_products(outputs):
            return name
    return ""


def is_up_to_date(stage: str, run_id: str, params: dict) -> bool:
    """False if the stage has to run; `describe_staleness` says why."""
    return not describe_staleness(stage, run_id, params)


def describe_staleness(stage: str, run_id: str, params: dict) -> str:
    """Why a stage has to run, in words; "" if it is up to date and its files are all there.

    Raises ValueError if an input is damaged, FileNotFoundError if an input is gone.
    """
    record = load_record(stage, run_id)
    if record is None:
        return "it has not finished"
    facts, folder = stage_facts(stage, run_id, params), stage_folder(stage, run_id)
    if record["key"] != facts["key"]:
        return f"{attempts.describe_change(folder, facts)} has changed"
    require_intact_inputs(stage, run_id, params)
    damaged = attempts.find_damaged(folder, record)
    return f"{damaged} is gone or damaged" if damaged else ""


def find_stale(run_id: str, planned: dict[str, dict] | None = None) -> dict[str, tuple[str, str]]:
    """Stale stage -> (the first stage that makes it stale, why), in a run and its source.

    planned: parameters by stage; a stage that is not planned keeps those of its record.
    """
    stale: dict[str, tuple[str, str]] = {}
    for stage in STAGES:
        try:
            if record := load_record(stage, run_id):
                values = (planned or {}).get(stage) or recorded_params(stage, record)
                reason = describe_staleness(stage, run_id, values)
                causes = [(stage, reason)] if reason else []
                causes += [stale[name] for name in input_stages(stage, run_id, values)
                           if name in stale]
                stale |= {stage: causes[0]} if causes else {}
        except (FileNotFoundError, ValueError) as error:  # what it was made from is gone or damaged
            stale[stage] = (stage, str(error))
    return stale


def find_stale_inputs(stage: str, run_id: str, params: dict) -> dict[str, str]:
    """Stale stage -> why, of the stages (its control run's, too) that this one would read."""
    stale, control = find_stale(run_id), params.get("control_run")
    causes = dict(stale[name] for name in input_stages(stage, run_id, params) if name in stale)
    if control and (cause := find_stale(control).get("03_merge")):
        causes[f"{cause[0]} of run '{control}'"] = cause[1]
    return causes


def stale_notes(stage: str, run_id: str) -> list[str]:
    """Sentences on why a stage's results are not those of the present code and parameters."""
    cause, reason = find_stale(run_id).get(stage, ("", ""))
    through = f" through {cause}" if cause != stage else ""
    notes = [f"{stage} of run '{run_id}' is stale{through}: {reason}"] if reason else []
    return notes + list_marks(RECIPE[:RECIPE.index(stage) + 1], run_id)


def list_marks(stages: Sequence[str], run_id: str) -> list[str]:
    """A sentence on each of these stages that was made from stale ones."""
    marks = {stage: (load_record(stage, run_id) or {}).get("stale_inputs") for stage in stages}
    return [f"{stage} of run '{run_id}' was made from stale stages: "
            f"{', '.join(f'{name} ({why})' for name, why in causes.items())}"
            for stage, causes in marks.items() if causes]


def recorded_params(stage: str, record: dict) -> dict:
    """The parameters that a finished stage had; new ones have their default, old ones are gone."""
    known, recorded = stage_parameters(stage), record["params"]
    params = {name: recorded.get(name, parameter.default) for name, parameter in known.items()}
    return params | {name: value for name, value in recorded.items()
                     if name not in (*known, *RUN_PARAMS) and name in trl_defaults(stage)}


def require_intact_inputs(stage: str, run_id: str, params: dict, is_thorough: bool = False) -> None:
    """ValueError with file and command if an earlier stage's output has changed since.

    is_thorough: also hash files of unchanged size and time (gigabytes in a second).
    """
    for name in input_stages(stage, run_id, params):
        owner, folder = find_owner(name, run_id), stage_folder(name, run_id)
        record = load_record(name, run_id)
        if damaged := record and attempts.find_damaged(folder, record, is_thorough):
            raise ValueError(f"{damaged} is not what {name} of run '{owner}' wrote: damaged or "
                             "changed since; make it again: "
                             f"{format_run_command(name, owner, '--force')}")


@dataclass
class Stage:
    """A running stage; attempt: the folder it writes to, params: its own and the run's.

    inputs: what the earlier stages had made when it started. marker: of `attempts.open_attempt`.
    """

    name: str
    run_id: str
    attempt: Path
    params: dict
    inputs: dict[str, dict[str, str]]
    marker: dict
    stale_inputs: dict[str, str] = field(default_factory=dict)
    control: dict = field(default_factory=dict)
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)
    is_finished: bool = False

    @property
    def folder(self) -> Path:
        """Where the stage writes; RuntimeError once it has finished."""
        if self.is_finished:
            raise RuntimeError(f"{self.name} of run '{self.run_id}' has finished; run the setup "
                               "cell again, and the cells show what is there")
        return self.attempt

    @property
    def box_format(self) -> BoxFormat:
        """How the run's model sees images and writes boxes."""
        params = self.params
        return BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])

    @property
    def final_folder(self) -> Path:
        """Where the stage lies once it has finished."""
        return runs_root() / self.run_id / self.name

    def input_path(self, stage: str, name: str = "") -> Path:
        """A file or folder that an earlier stage of this run, or of its source, has made."""
        return stage_folder(stage, self.run_id) / name

    def finish(self, metrics: dict, summary: str = "", **facts) -> None:
        """Write metrics.json, then run.json, and take the place of what had finished.

        summary: the result in a few words, for the command line. facts: more entries of run.json.
        """
        write_json(self.folder / "metrics.json", metrics)
        write_cards(self.name, self.folder, self.final_folder, self.params, metrics)
        # cells that only showed what has finished leave it as it is
        if self.marker["repeats"] and load_record(self.name, self.run_id):
            shutil.rmtree(self.folder)
            print(f"{self.name} of run '{self.run_id}' is as it was")
        else:
            files = {str(path.relative_to(self.folder)): path
                     for path in _output_files(self.folder)}
            started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started))
            write_json(self.folder / "run.json", {
                "stage": self.name, "run_id": self.run_id, "params": self.params,
                "key": self.marker["facts"]["key"], "inputs": self.inputs, "control": self.control,
                "branch": load_branch(self.run_id) if self.inputs else {},
                "outputs": {name: file_sha256(path) for name, path in files.items()},
                "stats": {name: attempts.file_facts(path) for name, path in files.items()},
                "summary": summary.replace(str(self.folder), str(self.final_folder)),
                **describe_machine(),
                "started": started, "command": os.environ.get(attempts.COMMAND, started),
                "stale_inputs": self.stale_inputs,
                "seconds": round(self.marker["spent"] + time.monotonic() - self.clock, 1),
                **facts})
            attempts.promote(self.folder, self.final_folder)
        self.is_finished = True
        unlock_run(self.final_folder.parent)


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path.suffix not in (".ipynb", ".tmp", ".log")
                  and path.name not in ("job.json", attempts.MARKER)  # these say how it ran
                  and "checkpoint" not in str(path.relative_to(folder))
                  and (path.name != CARD or path.parent == folder)  # no result follows from it
                  and path.parent != folder / IMAGE_FOLDER)  # IMAGE_MANIFEST lists these


def begin_stage(stage: str, names: dict) -> tuple[Stage, SimpleNamespace]:
    """Start a stage from its notebook; prints its parameters and returns the stage and them.

    names: the notebook's globals(). A run that does not exist becomes a branch of the notebook's
    own. Until the stage finishes, no other process can write this run. Raises for a kernel of
    another copy of the kit, an unknown parameter, and a damaged input.
    """
    _require_own_notebook()
    # whatever the cell assigns must be a parameter, or a mistyped -p would be ignored in silence
    assigned = set(stage_parameters(stage)) | _assigned_in_parameter_cells(names.get("In", []))
    values = {name: names[name] for name in sorted(assigned) if name in names}
    params = validate_params(values, stage)
    run_id = validate_run_id(params["run_id"])
    require_own_stage(stage, run_id)
    run = runs_root() / run_id
    is_branch = bool(STAGES[stage]) and not run.exists() and (runs_root() / DEFAULT_RUN).is_dir()
    check_run({stage: params}, DEFAULT_RUN if is_branch else run_id)
    if is_branch:
        start_branch(DEFAULT_RUN, run_id, stage)
        earlier = load_branch(run_id)["stages"]
        print(f"run '{run_id}' is new: {earlier[0]} to {earlier[-1]} are those of run "
              f"'{DEFAULT_RUN}'")
    stage_facts(stage, run_id, params)  # raises before anything is written
    require_intact_inputs(stage, run_id, params, is_thorough=True)
    lock_run(run, stage)
    facts = stage_facts(stage, run_id, params)  # nobody changes them from here on
    inputs = load_inputs(stage, run_id, params)
    from IPython.display import display  # not installed for scoring alone

    stale_inputs = find_stale_inputs(stage, run_id, params)
    for sentence in _list_warnings(stage, run_id, params, facts, stale_inputs, names):
        display(Warned(sentence))
    for sentence in attempts.set_others_aside(stage, run_id, facts):
        print(sentence)
    folder, marker = attempts.open_attempt(stage, run_id, facts)
    begun = Stage(stage, run_id, folder, with_run_params(stage, run_id, params), inputs, marker,
                  stale_inputs, describe_control(params.get("control_run", "")))
    _print_stage(begun)
    return begun, SimpleNamespace(**begun.params)


class Warned(str):
    """A sentence that a notebook shows in bold and red."""

    def _repr_html_(self) -> str:
        return f'<b style="color: #b00020">{html.escape(self)}</b>'


def _list_warnings(stage: str, run_id: str, params: dict, facts: dict,
                   stale_inputs: dict[str, str], names: dict) -> list[str]:
    """What whoever runs the setup cell has to know before anything is replaced."""
    record = load_record(stage, run_id)
    warnings = [f"{name} is stale, and this stage would build on it ({why}); run it again first, "
                "or what comes of it is marked" for name, why in stale_inputs.items()]
    if record and record["key"] != facts["key"]:
        differences = attempts.describe_change(stage_folder(stage, run_id), facts)
        branch = f", which then starts from run '{DEFAULT_RUN}'" if STAGES[stage] else ""
        warnings.insert(0, (
            f"Finishing this replaces {stage} of run '{run_id}' ({_describe_finished(record)}); "
            f"what differs is {differences}. What it replaces is kept, and mig-kit restore "
            f"{run_id} {stage[:2]} puts it back; for a run of your own give run_id a new name"
            f"{branch}"))
    cells = names.get("In", ())
    is_by_hand = not any(cell.startswith("# Parameters") for cell in cells)  # as papermill adds
    if cells and is_by_hand and (edits := describe_edits(stage, params, is_cell=True)):
        warnings.append(f"The parameters cell differs from the shipped one: {edits}; once saved, "
                        "these are the defaults of mig-kit run, too")
    return warnings


def _require_own_notebook() -> None:
    """RuntimeError if a notebook of another copy of the kit runs with this one."""
    here = Path.cwd()
    for folder in (here, here.parent):
        if (folder / "mig_kit" / "pipeline").is_dir() and folder.resolve() != PACKAGE.parent:
            raise RuntimeError(
                f"this notebook is of the kit in {folder}, and its kernel ({sys.executable}) "
                f"imports the one in {PACKAGE.parent}; choose the kernel that belongs to the "
                f"notebook, or start it with: {folder}/.venv/bin/jupyter lab")


def _assigned_in_parameter_cells(cells: list[str]) -> set[str]:
    nodes = (node for cell in cells if cell.lower().startswith("# parameters")
             for node in ast.walk(ast.parse(cell)))
    return {node.id for node in nodes
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _print_stage(stage: Stage) -> None:
    params = ", ".join(f"{name}={value}" for name, value in stage.params.items()
                       if name != "run_id")
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"{stage.name} of run '{stage.run_id}': {params}\nversions: {versions}")
    if stage.marker["repeats"]:
        record = require_record(stage.name, stage.run_id, stage.name)
        print(f"it has finished ({_describe_finished(record)}): the cells show what is there, and "
              "train nothing again")
    elif stage.marker["spent"] and not load_record(stage.name, stage.run_id):
        print(f"it goes on where it was stopped after {stage.marker['spent'] / 60:.1f} min")


def _describe_finished(record: dict) -> str:
    when = record["started"].replace("T", " ")[:16]
    return f"{record['summary'] or 'no summary'}; started {when} UTC"


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())


def take_replies(stage: Stage, models: dict[str, str | Path], hardware: str,
                 suites: tuple[str, ...]) -> dict[str, str]:
    """Copy the replies that a source of this run has already; returns "<system> <kind>" -> its run.

    models: system -> folder; hardware: what samples the replies, in words. The source must have
    finished this stage with the same models, files, code and parameters; DRAWN_PARAMS may differ
    for greedy replies.
    """
    folder = stage.folder / "replies"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {f"{system} {kind}": _reply_key(stage, model, hardware, kind)
            for system, model in models.items() for kind in ("greedy", "drawn")}
    before = _read_keys(folder)  # of an interrupted attempt, whose replies stay
    write_json(folder / REPLY_KEYS, {name: key if before.get(name, key) == key else MIXED
                                     for name, key in keys.items()})
    taken = {}
    for run_id in list_sources(stage.run_id)[1:]:
        source = stage_folder(stage.name, run_id) / "replies"
        source_keys = _read_keys(source) if load_record(stage.name, run_id) else {}
        for name, key in keys.items():
            system, kind = name.split()
            is_wanted = kind == "greedy" or stage.params["replies"]
            if is_wanted and name not in taken and source_keys.get(name) == key:
                paths = [source / f"{system}_{suite}_{kind}.jsonl" for suite in suites]
                for path in filter(Path.is_file, paths):
                    write_atomically(folder / path.name, partial(shutil.copyfile, path))
                taken[name] = run_id
    return taken


def _read_keys(folder: Path) -> dict[str, str]:
    path = folder / REPLY_KEYS
    return json.loads(path.read_text()) if path.is_file() else {}


def _reply_key(stage: Stage, model: str | Path, hardware: str, kind: str) -> str:
    left_out = {"run_id", "profile", "control_run", *EXECUTION_PARAMS} - {"server"}
    if kind == "greedy":
        left_out.update(DRAWN_PARAMS)
    params = {name: value for name, value in stage.params.items() if name not in left_out}
    code = describe_code(stage.name, ())["code"]
    questions = stage.inputs["01_synthesize"]["val.parquet"]  # of own data; else they are synthetic
    return digest_json([kind, model_fingerprint(str(model)), params, hash_named_files(params),
                        hardware, code, questions])
