"""A run as it lies on the disk: whose its stages are, what has finished, and what is stale.

A branch has a branch.json, {"from": source, "stages": [stage]}: these stages are the source's, by
reference. A source may be a branch itself.
"""

import json
from collections import ChainMap
from functools import cached_property
from pathlib import Path

from mig_kit.common import UserError, file_sha256, suggest_word, write_json
from mig_kit.image_files import IMAGE_FOLDER, IMAGE_MANIFEST
from mig_kit.pipeline import run_folders, stage_keys
from mig_kit.pipeline.params import default_params, merge_mappings
from mig_kit.pipeline.run_folders import COLD_START, RECIPE, STAGES, runs_root
from mig_kit.pipeline.stage_params import RUN_PARAMS, RUN_PARAMS_STAGE

BRANCH_FILE = "branch.json"
PROFILE_FILE = "profile.txt"
MARKS = ("stale", "edited")


class Run:
    """A run's folder, branch and records, each read once; what finishes later, a new Run sees."""

    def __init__(self, run_id: str):
        self.id = run_id
        self.folder = runs_root() / run_id
        self._records: dict[str, dict | None] = {}

    @cached_property
    def branch(self) -> dict:
        """Its branch.json, {} if it has none."""
        path = self.folder / BRANCH_FILE
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def lineage(self) -> list["Run"]:
        """This run, the run that it is a branch of, and so on."""
        return [self, *(Run(self.branch["from"]).lineage if self.branch else ())]

    @property
    def profile(self) -> str:
        """The profile of its commands, that of its source if it has none; "" if unknown."""
        files = [run.folder / PROFILE_FILE for run in self.lineage]
        return next((file.read_text().strip() for file in files if file.is_file()), "")

    def owner(self, stage: str) -> "Run":
        """The run whose folder holds the stage: itself, or its source."""
        return next(run for run in self.lineage if stage not in run.branch.get("stages", ()))

    def stage_folder(self, stage: str) -> Path:
        """Where a stage lies once it has finished."""
        return self.owner(stage).folder / stage

    def unfinished_folder(self, stage: str) -> Path:
        """Where a stage is made."""
        return self.folder / f"{stage}.unfinished"

    def record(self, stage: str) -> dict | None:
        """The run.json of a finished stage, or None."""
        if stage not in self._records:
            path = self.stage_folder(stage) / "run.json"
            self._records[stage] = json.loads(path.read_text()) if path.is_file() else None
        return self._records[stage]

    def require(self, stage: str, by: str) -> dict:
        """The run.json of a stage that `by` needs; UserError if it has not finished."""
        if record := self.record(stage):
            return record
        owner = self.owner(stage)
        need, command = f"{by} needs {stage} of run '{owner.id}'", command_for(stage, owner.id)
        if not owner.folder.is_dir():
            hint = (suggest_word(owner.id, run_folders.list_runs(), 0.5)
                    or "mig-kit status lists the runs")
            raise UserError(f"{need}, and there is no such run in {runs_root()}; {hint} (to make "
                            f"it: {command})")
        if run_folders.is_locked_elsewhere(owner.folder):
            raise UserError(f"{need}, which has not finished, and a process is running in that "
                            "run; wait until it has ended")
        raise UserError(f"{need}, which has not finished; run: {command}")

    def require_own(self, stage: str) -> None:
        """UserError with the commands if the run takes the stage from its source."""
        if stage in self.branch.get("stages", ()):
            source = self.branch["from"]
            raise UserError(
                f"{stage} of run '{self.id}' is that of run '{source}'; run it there, or start "
                f"another branch: mig-kit run {stage[:2]} --from {source} --run-id NAME")

    def params(self, stage: str) -> dict:
        """The parameters that a stage has finished with, {} if it has not; one that its record
        lacks has its default.
        """
        if not self.record(stage):
            return {}
        defaults, params = default_params(stage), self.record(stage)["params"]
        return defaults | {name: merge_mappings(defaults.get(name), value)
                           for name, value in params.items()}

    def run_params(self, needed_by: str) -> dict:
        """RUN_PARAMS, set by stage 01; UserError if that has not finished."""
        self.require(RUN_PARAMS_STAGE, needed_by)
        return {name: self.params(RUN_PARAMS_STAGE)[name] for name in RUN_PARAMS}

    def with_run_params(self, stage: str, params: dict) -> dict:
        """A stage's parameters; if it builds on earlier stages, also those of the whole run."""
        return params | self.run_params(stage) if STAGES[stage] else params

    @property
    def data(self) -> str:
        """`data` of 01, "scenes" if that has not finished."""
        return self.params(RUN_PARAMS_STAGE).get("data", "scenes")

    @property
    def has_cold_start(self) -> bool:
        """False if 01 had no teacher."""
        return self.params(RUN_PARAMS_STAGE).get("teacher") != "none"

    def inputs(self, stage: str) -> tuple[str, ...]:
        """The stages that this one reads. A run without a cold start has no 02 and 03."""
        if stage <= COLD_START[-1] or self.has_cold_start:
            return STAGES[stage]
        return tuple(name for name in STAGES[stage] if name not in COLD_START)

    def stage_facts(self, stage: str, params: dict) -> dict:
        """What would come of a stage now, as `stage_keys.stage_facts`; params: its own."""
        params = self.with_run_params(stage, params)
        outputs = {name: self.require(name, stage)["outputs"] for name in self.inputs(stage)}
        return stage_keys.stage_facts(stage, params, outputs)

    @cached_property
    def marks(self) -> dict[str, dict[str, str]]:
        """Finished stage -> {one of MARKS: "STAGE: why", its own, else that of its first input}."""
        marks: dict[str, dict[str, str]] = {}
        for stage in filter(self.record, STAGES):
            reasons = {"stale": self._describe_staleness(stage),
                       "edited": self.record(stage).get("edited")}
            own = {word: f"{stage}: {reason}" for word, reason in reasons.items() if reason}
            of_inputs = (marks.get(name, {}) for name in self.inputs(stage))
            marks[stage] = dict(ChainMap(own, *of_inputs))
        return marks

    def describe_marks(self, stage: str) -> list[str]:
        """"stale (STAGE: why)" and the like, of a finished stage."""
        return [f"{word} ({cause})" for word, cause in self.marks.get(stage, {}).items()]

    def notes(self, stage: str) -> list[str]:
        """`describe_marks` as sentences that name the stage."""
        return [f"{stage} of run '{self.id}' is {mark}" for mark in self.describe_marks(stage)]

    def _describe_staleness(self, stage: str) -> str:
        """How a finished stage differs from what it would be now, in words; "" if it does not."""
        record = self.record(stage)
        try:
            now = self.stage_facts(stage, record["params"])
        except UserError as error:  # what it was made from is gone
            return str(error)
        damaged = find_damaged(self.stage_folder(stage), record)
        return stage_keys.describe_change(record["facts"], now) or (
            f"{damaged} is gone or damaged" if damaged else "")

    def require_intact_inputs(self, stage: str) -> None:
        """UserError with file and command if an earlier stage's output has other bytes than it had.
        """
        for name in filter(self.record, self.inputs(stage)):
            if damaged := find_damaged(self.stage_folder(name), self.record(name), True):
                owner = self.owner(name).id
                raise UserError(f"{damaged} is not what {name} of run '{owner}' wrote: damaged or "
                                "changed since; make it again: "
                                f"{command_for(name, owner, ' --force')}")


def command_for(stage: str, run_id: str, options: str = "") -> str:
    """The command that makes this stage of a run, for error messages."""
    return f"mig-kit run {stage[:2]} --run-id {run_id}{options}, with every -p of that run"


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


def check_branch(source: str, run_id: str, stages: list[str]) -> list[str]:
    """The stages before `stages` that a branch takes from `source`; [] if it has them already.

    Raises UserError if the run cannot be that branch.
    """
    run_folders.require_runs(run_folders.validate_run_id(source))
    origin, run = Run(source), Run(run_id)
    if run_id in [ancestor.id for ancestor in origin.lineage]:
        raise UserError(f"run '{source}' is '{run_id}' or starts from it; use another --run-id")
    if run.branch:
        if run.branch["from"] != source:
            raise UserError(f"run '{run_id}' starts from '{run.branch['from']}' already, not from "
                            f"'{source}'; use another --run-id")
        return []
    first = min((stage for stage in stages if stage in RECIPE[1:]), default="")
    if first <= "02":
        raise UserError("--from gives the stages before those that you run, so name stages from "
                        "02 to 07, such as: mig-kit run 05 06 07 --from default --run-id NAME")
    inherited = [stage for stage in RECIPE[1:] if stage < first
                 and (stage not in COLD_START or origin.has_cold_start)]
    if own := [stage for stage in RECIPE[1:] if (run.folder / stage).is_dir()]:
        raise UserError(f"run '{run_id}' has its own {own[0]}, so it is no branch; use another "
                        "--run-id")
    for stage in inherited:
        origin.require(stage, f"run '{run_id}'")
    return inherited


def start_branch(source: str, run_id: str, *stages: str) -> list[str]:
    """Make the run a branch, if it is not yet; what it takes and raises is as in `check_branch`."""
    if inherited := check_branch(source, run_id, list(stages)):
        folder = runs_root() / run_id
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BRANCH_FILE, {"from": source, "stages": inherited})
    return inherited
