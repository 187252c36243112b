"""Run folders, and what makes a stage up to date.

A stage lives in runs/<run id>/NN_stage/. Its run.json is written last and by renaming, so a stage
that was killed never looks finished. What a killed stage left behind is kept for resuming as long
as parameters, inputs and code are the same. In a branch, earlier stages are those of another run.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from mig_kit.boxes import BoxFormat
from mig_kit.common import (
    PROJECT_ROOT,
    file_sha256,
    model_folder,
    split_function_name,
    write_json,
)
from mig_kit.image_files import IMAGE_FOLDER, IMAGE_MANIFEST
from mig_kit.pipeline.dependencies import STAGES_OF_PICTURES, notebook_code, used_definitions
from mig_kit.pipeline.params import (
    EXECUTION_PARAMS,
    NAMES_OF_RUNS,
    RUN_PARAMS,
    RUN_PARAMS_STAGE,
    stage_parameters,
    validate_params,
)
from mig_kit.pipeline.run_facts import describe_control
from mig_kit.pipeline.run_folders import (
    find_owner,
    load_record,
    read_record,
    refresh_branch,
    require_own_stage,
    run_command,
    runs_root,
    stage_folder,
    validate_run_id,
)
from mig_kit.pipeline.run_lock import lock_run, unlock_run

STAGES = {
    "00_preflight": (), "01_synthesize": (), "02_sft": ("01_synthesize",), "03_merge": ("02_sft",),
    "04_rejection_sampling": ("01_synthesize", "03_merge"),
    "05_grpo": ("03_merge", "04_rejection_sampling"),
    "06_evaluate": ("01_synthesize", "03_merge", "05_grpo"),
    "07_report": ("01_synthesize", "02_sft", "03_merge", "04_rejection_sampling", "05_grpo",
                  "06_evaluate"),
    "08_benchmark": (), "09_compare": (), "90_tiny_base": (),
}
RECIPE = tuple(stage for stage in STAGES if stage < "08")
COLD_START = ("02_sft", "03_merge")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate",
            "papermill", "numpy", "pillow")
LARGE_FILE = 2**26  # bytes; larger files of a model folder are compared by size and time


def run_params(run_id: str, needed_by: str) -> dict:
    """RUN_PARAMS of a run, which its stage 01 has set; FileNotFoundError with the command if that
    has not finished.

    One that an older version did not have yet has its default.
    """
    params = require_record(RUN_PARAMS_STAGE, run_id, needed_by)["params"]
    defaults = stage_parameters(RUN_PARAMS_STAGE)
    return {name: params.get(name, defaults[name].default) for name in RUN_PARAMS}


def input_stages(stage: str, run_id: str, params: dict) -> tuple[str, ...]:
    """The stages that a stage of this run builds on: those of STAGES but, where the run has no
    cold start, 02 and 03; 02 also where 05 goes on with its adapter.
    """
    if stage <= COLD_START[-1] or has_cold_start(run_id):
        adapter = ("02_sft",) if params.get("start_from") == "adapter" else ()
        return adapter + STAGES[stage]
    return tuple(name for name in STAGES[stage] if name not in COLD_START)


def has_cold_start(run_id: str) -> bool:
    """False where 01 had no teacher, unless 02 and 03 have run all the same, on a `traces_file`."""
    record = load_record(RUN_PARAMS_STAGE, run_id)
    return (record is None or record["params"].get("teacher") != "none"
            or load_record(COLD_START[-1], run_id) is not None)


def with_run_params(stage: str, run_id: str, params: dict) -> dict:
    """The stage's parameters and, where it builds on earlier stages, those of the whole run."""
    return {**params, **run_params(run_id, stage)} if STAGES[stage] else params


def stage_key(stage: str, run_id: str, params: dict) -> str:
    """Hash of all that a stage's results follow from.

    These are its parameters but for EXECUTION_PARAMS and names of runs, the files, model and run
    that they name, what the stages before it made, and the code that it uses.
    """
    params = with_run_params(stage, run_id, params)
    inputs = {name: require_record(name, run_id, stage)["outputs"]
              for name in input_stages(stage, run_id, params)}
    if stage not in STAGES_OF_PICTURES:
        inputs = {name: _stage_products(outputs) for name, outputs in inputs.items()}
    files = hash_named_files(params)
    files |= {name: file_sha256(split_function_name(name)[0])
              for name in params.get("rewards", ()) if ":" in name}
    if params.get("base_model"):
        files["base_model"] = model_fingerprint(params["base_model"])
    if params.get("start_from"):
        files["start_from"] = model_fingerprint(params["start_from"])
    if params.get("control_run"):
        files["control_run"] = _control_outputs(params, run_id, stage)
    for group in params.get("groups", ()):
        members = str(group).rpartition("=")[2].split(",")
        files |= {f"group {name}": _member_digest(name) for name in map(str.strip, members)}
    code = [used_definitions(stage), notebook_code(stage)]
    params = {name: value for name, value in params.items()
              if name not in (*EXECUTION_PARAMS, *NAMES_OF_RUNS)}
    text = json.dumps([params, files, inputs, code], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_named_files(params: dict) -> dict[str, str]:
    """SHA-256 of the files that parameters ending in "_file" name, where they are there."""
    return {name: file_sha256(PROJECT_ROOT / value) for name, value in params.items()
            if name.endswith("_file") and value and (PROJECT_ROOT / value).is_file()}


def _member_digest(name: str) -> str:
    """SHA-256 of what a comparison reads of a run, or of a recorded run's file; "" without it."""
    is_recorded = name.endswith(".json")
    path = (PROJECT_ROOT / name if is_recorded
            else stage_folder("06_evaluate", validate_run_id(name)) / "run.json")
    return file_sha256(path) if path.is_file() else ""


def _control_outputs(params: dict, run_id: str, stage: str) -> dict[str, str]:
    control = validate_run_id(params["control_run"])
    outputs = require_record("03_merge", control, stage)["outputs"]
    other = run_params(control, stage)
    if different := [name for name in RUN_PARAMS if other[name] != params[name]]:
        name = different[0]
        raise ValueError(f"control_run '{control}' has another {name} ({other[name]}) than run "
                         f"'{run_id}' ({params[name]}); compare runs of one model and box format")
    return _stage_products(outputs)


def model_fingerprint(model: str) -> dict[str, str]:
    """What tells a model folder's weights and settings from others; {} for a hub name. Large files
    by their size and time.
    """
    folder = model_folder(model)
    files = [path for kind in ("*.safetensors", "*.json", "*.jinja") for path in folder.glob(kind)]
    return {path.name: _file_fingerprint(path) for path in sorted(files) if path.is_file()}


def _file_fingerprint(path: Path) -> str:
    facts = path.stat()
    is_large = facts.st_size > LARGE_FILE
    return f"{facts.st_size} {facts.st_mtime_ns}" if is_large else file_sha256(path)


def require_record(stage: str, run_id: str, by: str) -> dict:
    """The run.json of a stage that another needs; FileNotFoundError with the command if it has not
    finished.
    """
    record = load_record(stage, run_id)
    if record is None:
        owner = find_owner(stage, run_id)
        raise FileNotFoundError(f"{by} needs {stage} of run '{owner}', which has not finished; "
                                f"run: {run_command(stage, owner)}")
    return record


def find_stale_input(stage: str, run_id: str) -> str:
    """Name of an upstream stage that was re-run after this one finished (its outputs are stale), or
    "".
    """
    record = load_record(stage, run_id) or {}
    for name, outputs in record.get("inputs", {}).items():
        now = load_record(name, run_id)
        if now is None or _stage_products(now.get("outputs", {})) != _stage_products(outputs):
            return name
    return ""


def _stage_products(outputs: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in outputs.items()
            if name not in ("metrics.json", "started.json")}


def outputs_exist(folder: Path, record: dict) -> bool:
    """True if all that a finished stage made is still there, the images that it lists too."""
    outputs = record.get("outputs", ())
    if not all((folder / name).is_file() for name in outputs):
        return False
    if IMAGE_MANIFEST not in outputs:
        return True
    images = folder / IMAGE_FOLDER
    names = set(os.listdir(images)) if images.is_dir() else set()
    return names.issuperset((folder / IMAGE_MANIFEST).read_text().split())


def is_up_to_date(stage: str, run_id: str, params: dict) -> bool:
    """True if the stage finished with these parameters, inputs and code, and all that it made is
    still there.
    """
    record = load_record(stage, run_id)
    if record is None or record["key"] != stage_key(stage, run_id, params):
        return False
    return outputs_exist(stage_folder(stage, run_id), record)


def set_aside_outputs(stage: str, run_id: str) -> None:
    """Keep what a finished stage made in NN_stage.before, until the stage has finished again: the
    next attempt may fail.
    """
    folder = runs_root() / run_id / stage
    if (folder / "run.json").is_file():
        before = folder.with_name(f"{stage}.before")
        if before.exists():
            shutil.rmtree(before)
        folder.rename(before)


def restore_outputs(stage: str, run_id: str, params: dict) -> bool:
    """Bring back what `set_aside_outputs` kept if it is what these parameters ask for; True if so.

    What an interrupted run with --force has begun anew goes on instead.
    """
    folder = runs_root() / run_id / stage
    before = folder.with_name(f"{stage}.before")
    record, key = read_record(before / "run.json"), stage_key(stage, run_id, params)
    if record is None or record["key"] != key or _read_marker(folder).get("key") == key:
        return False
    if not outputs_exist(before, record):
        return False
    if folder.exists():
        shutil.rmtree(folder)
    before.rename(folder)
    return True


def git_revision() -> str:
    """The commit of the project, with "+" if the tree has changes; "" outside git."""
    try:
        head, status = (subprocess.run(["git", "-C", str(PROJECT_ROOT), *arguments],
                                       capture_output=True, text=True, timeout=20)
                        for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain"]))
    except (OSError, subprocess.SubprocessError):  # no git, or a slow one
        return ""
    if head.returncode:
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **versions}


@dataclass
class Stage:
    """A running stage. folder: where it writes; params: its validated parameters and those of the
    whole run. inputs: what the earlier stages had made when it started; branch: of `load_branch`;
    control: of `describe_control`; spent: seconds of the interrupted attempts that this one goes on
    from; at_least: those that the stage took when it last finished with this key.
    """

    name: str
    run_id: str
    folder: Path
    params: dict
    key: str
    inputs: dict[str, dict[str, str]]
    branch: dict
    control: dict = field(default_factory=dict)
    spent: float = 0.0
    at_least: float = 0.0
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)

    @property
    def box_format(self) -> BoxFormat:
        """How the run's model sees images and writes boxes."""
        params = self.params
        return BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])

    def input_path(self, stage: str, name: str = "") -> Path:
        """A file or folder that an earlier stage made, in this run or the one that it starts from.
        """
        return stage_folder(stage, self.run_id) / name

    def finish(self, metrics: dict, summary: str = "", **facts) -> None:
        """Write metrics.json, then run.json; only now does the stage count as finished.

        summary: the result in a few words, for the command line. facts: more entries of run.json.
        """
        write_json(self.folder / "metrics.json", metrics)
        outputs = {str(path.relative_to(self.folder)): file_sha256(path)
                   for path in _output_files(self.folder)}
        write_json(self.folder / "run.json", {
            "stage": self.name, "run_id": self.run_id, "key": self.key, "params": self.params,
            "inputs": self.inputs, "branch": self.branch,
            "control": self.control,
            "outputs": outputs, "summary": summary,
            "versions": package_versions(), "machine": describe_cpu(), "git": git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": self._count_seconds(), **facts})
        shutil.rmtree(self.folder.with_name(f"{self.name}.before"), ignore_errors=True)
        unlock_run(self.folder.parent)

    def _count_seconds(self) -> float:
        """Of all attempts: one that found everything done already does not count as the stage's
        time.
        """
        return round(max(self.at_least, self.spent + time.monotonic() - self.clock), 1)


def describe_cpu() -> str:
    """The CPU and how many of its cores compute: with others, sums are rounded otherwise, and the
    same seed gives other digits.
    """
    import torch  # not at the top: a command that only looks at runs need not wait for it

    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {platform.system()}, {torch.get_num_threads()} of {os.cpu_count()} cores"


def _output_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path.suffix not in (".ipynb", ".tmp", ".log")
                  and path.name not in ("job.json", "started.json")  # these say how it ran
                  and "checkpoint" not in str(path.relative_to(folder))
                  and path.parent != folder / IMAGE_FOLDER)  # IMAGE_MANIFEST lists these


def begin_stage(stage: str, names: dict) -> tuple[Stage, SimpleNamespace]:
    """Start a stage from its notebook; gives the stage and its parameters, and prints them.

    names: globals(), where the parameters cell left its values. Whatever a parameters cell assigns
    must be a parameter of the stage, or a mistyped `-p` would be ignored in silence. Until the
    stage finishes, no other process can write this run. Leftovers of an interrupted run with the
    same key stay for resuming, all others are removed; what a finished stage made with another key
    is set aside until this one has finished.
    """
    assigned = set(stage_parameters(stage)) | _assigned_in_parameter_cells(names.get("In", []))
    values = {name: names[name] for name in sorted(assigned) if name in names}
    params = validate_params(values, stage)
    run_id = validate_run_id(params["run_id"])
    require_own_stage(stage, run_id)
    lock_run(runs_root() / run_id)
    inputs = {name: require_record(name, run_id, stage)["outputs"]
              for name in input_stages(stage, run_id, params)}
    key = stage_key(stage, run_id, params)
    branch = refresh_branch(run_id) if inputs else {}
    folder = runs_root() / run_id / stage
    record = load_record(stage, run_id)
    if record and record["key"] != key:
        set_aside_outputs(stage, run_id)
    marker = _read_marker(folder)
    is_resumable = marker.get("key") == key
    spent = _seconds_spent(folder, marker) if is_resumable and not record else 0.0
    if folder.exists() and not is_resumable:
        _remove_leftovers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    write_json(folder / "started.json", {"key": key, "spent": spent})
    begun = Stage(stage, run_id, folder, with_run_params(stage, run_id, params), key, inputs,
                  branch, describe_control(params.get("control_run", "")), spent,
                  record.get("seconds", 0.0) if record and record["key"] == key else 0.0)
    _print_stage(begun)
    return begun, SimpleNamespace(**begun.params)


def _read_marker(folder: Path) -> dict:
    """{"key", "spent"} of the attempt that a folder holds; {} where there is none."""
    path = folder / "started.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _seconds_spent(folder: Path, marker: dict) -> float:
    """Seconds of the attempts that a folder holds, up to the last file that is kept of them."""
    begun = (folder / "started.json").stat().st_mtime
    written = [path.stat().st_mtime for path in folder.rglob("*")
               if path.is_file() and path.suffix not in (".ipynb", ".log")]
    return round(marker.get("spent", 0.0) + max(written) - begun, 1)


def _assigned_in_parameter_cells(cells: list[str]) -> set[str]:
    names = set()
    for cell in cells:
        if not cell.lower().startswith("# parameters"):
            continue
        for node in ast.parse(cell).body:
            if isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets}
            elif isinstance(node, ast.AnnAssign):
                names.add(node.target.id)
    return names


def _remove_leftovers(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".ipynb":
            path.unlink()


def _print_stage(stage: Stage) -> None:
    params = ", ".join(f"{name}={value}" for name, value in stage.params.items()
                       if name != "run_id")
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    print(f"{stage.name} of run '{stage.run_id}': {params}\nversions: {versions}")


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())
