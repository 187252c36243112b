"""Run folders, parameters and what makes a stage up to date.

A stage lives in runs/<run id>/NN_stage/. Its run.json is written last and by renaming, so a stage that was killed never
looks finished; what it left behind is kept for resuming as long as parameters, inputs and code are the same.
"""

import ast
import fcntl
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

from mig_kit.common import PACKAGE, PROJECT_ROOT, file_sha256, write_json
from mig_kit.pipeline.dependencies import STAGES_OF_PICTURES, notebook_cells, used_definitions
from mig_kit.pipeline.params import params_file, read_params_file, validate_params

STAGES = {
    "00_preflight": (), "01_synthesize": (), "02_sft": ("01_synthesize",), "03_merge": ("02_sft",),
    "04_rejection_sampling": ("01_synthesize", "03_merge"), "05_grpo": ("03_merge", "04_rejection_sampling"),
    "06_evaluate": ("03_merge", "05_grpo"),
    "07_report": ("01_synthesize", "02_sft", "03_merge", "04_rejection_sampling", "05_grpo", "06_evaluate"),
    "08_benchmark": (), "90_tiny_base": (),
}


RECIPE = tuple(stage for stage in STAGES if stage < "08")


PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate", "papermill", "numpy", "pillow")


LARGE_FILE = 2**26  # bytes; larger ones of a model folder are not read whole to tell whether they are the same


def runs_root() -> Path:
    """Where run folders are kept: $MIG_KIT_RUNS (relative to the project), else runs/ beside the package."""
    return PROJECT_ROOT / os.environ.get("MIG_KIT_RUNS", "runs")


def validate_run_id(run_id: str) -> str:
    """`run_id`, or ValueError if it is no plain name of a folder."""
    if not run_id or run_id.startswith(".") or any(c in run_id for c in "/\\"):
        raise ValueError(f"run_id is '{run_id}'; use letters, digits, '-' and '_'")
    return run_id


def stage_key(stage: str, run_id: str, params: dict) -> str:
    """What a finished stage stands for: parameters, the files, model and run they name, what the stages before made, its code."""
    inputs = {name: require_record(name, run_id, stage)["outputs"] for name in STAGES[stage]}
    if stage not in STAGES_OF_PICTURES:
        inputs = {name: _stage_products(outputs) for name, outputs in inputs.items()}
    data = {name: file_sha256(PROJECT_ROOT / value) for name, value in params.items()
            if name.endswith("_file") and value and (PROJECT_ROOT / value).is_file()}
    if params.get("base_model"):
        data["base_model"] = model_fingerprint(params["base_model"])
    if params.get("control_run"):
        data["control_run"] = require_record("03_merge", validate_run_id(params["control_run"]), stage)["outputs"]
    cells = [cell["source"] for cell in notebook_cells(stage) if "parameters" not in cell["metadata"].get("tags", ())]
    text = json.dumps([params, data, inputs, used_definitions(stage), cells], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def model_fingerprint(model: str) -> dict[str, str]:
    """What tells a model folder's weights and settings from others; {} for a hub name. Large files by their size and time."""
    folder = PACKAGE / "tiny_base" if model == "tiny" else PROJECT_ROOT / "notebooks" / model  # where notebooks run
    files = sorted(p for kind in ("*.safetensors", "*.json", "*.jinja") for p in folder.glob(kind) if p.is_file())
    large = {p: p.stat() for p in files if p.stat().st_size > LARGE_FILE}
    return {p.name: f"{large[p].st_size} {large[p].st_mtime_ns}" if p in large else file_sha256(p) for p in files}


def load_record(stage: str, run_id: str) -> dict | None:
    """The run.json of a finished stage, or None; ValueError with a remedy if that file is broken."""
    return _read_record(runs_root() / run_id / stage / "run.json")


def _read_record(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record:
        raise ValueError(f"{path} is broken; delete it, and the stage counts as not finished")
    return record


def require_record(stage: str, run_id: str, by: str) -> dict:
    """The run.json of a stage that another needs; FileNotFoundError with the command if it has not finished."""
    record = load_record(stage, run_id)
    if record is None:
        raise FileNotFoundError(f"{by} needs {stage} of run '{run_id}', which has not finished; run: mig-kit run {stage} --run-id "
                                f"{run_id}, with the --profile of that run")
    return record


def find_stale_input(stage: str, run_id: str) -> str:
    """The earlier stage that was run anew since this one finished, whose results are thus of something else; "" if none was."""
    record = load_record(stage, run_id) or {}
    for name, outputs in record.get("inputs", {}).items():
        now = load_record(name, run_id)
        if now is None or _stage_products(now.get("outputs", {})) != _stage_products(outputs):
            return name
    return ""


def _stage_products(outputs: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in outputs.items() if name not in ("metrics.json", "started.json")}


def outputs_exist(folder: Path, record: dict) -> bool:
    """True if all that a finished stage made is still there."""
    return all((folder / name).is_file() for name in record.get("outputs", ()))


def is_up_to_date(stage: str, run_id: str, params: dict) -> bool:
    """True if the stage finished with these parameters, inputs and code, and all it made is there."""
    record = load_record(stage, run_id)
    return record is not None and record["key"] == stage_key(stage, run_id, params) and outputs_exist(runs_root() / run_id / stage, record)


def set_aside_outputs(stage: str, run_id: str) -> None:
    """Keep what a finished stage made in NN_stage.before, until the stage has finished anew: the next may fail."""
    folder = runs_root() / run_id / stage
    if (folder / "run.json").is_file():
        before = folder.with_name(f"{stage}.before")
        if before.exists():
            shutil.rmtree(before)
        folder.rename(before)


def restore_outputs(stage: str, run_id: str, params: dict) -> bool:
    """Bring back what `set_aside` kept if that is what is wanted now; True if so."""
    folder = runs_root() / run_id / stage
    before = folder.with_name(f"{stage}.before")
    record = _read_record(before / "run.json")
    if record is None or record["key"] != stage_key(stage, run_id, params) or not outputs_exist(before, record):
        return False
    if folder.exists():
        shutil.rmtree(folder)
    before.rename(folder)
    return True


def git_revision() -> str:
    """The commit of the project, with "+" if the tree has changes; "" outside git."""
    try:
        run = [subprocess.run(["git", "-C", str(PROJECT_ROOT), *args], capture_output=True, text=True, timeout=20)
               for args in (["rev-parse", "HEAD"], ["status", "--porcelain"])]
    except (OSError, subprocess.SubprocessError):  # no git, or a slow one
        return ""
    return run[0].stdout.strip() + ("+" if run[1].stdout.strip() else "") if run[0].returncode == 0 else ""


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


_LOCKS: dict[Path, object] = {}  # open lock files of the runs that this process writes


def lock_run(run: Path, patience: float = 5.0) -> None:
    """Keep other processes from writing this run until `unlock` or the end of this process.

    Raises RuntimeError if another has it for longer than `patience` seconds (a notebook whose caller was killed ends within one).
    """
    if run in _LOCKS:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = (run / "lock").open("a+")
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > until:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise RuntimeError(f"run '{run.name}' is being written by {holder}; wait for it, shut its notebook down, or use "
                                   "another --run-id") from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    _LOCKS[run] = file


def unlock_run(run: Path) -> None:
    """Let others write the run again."""
    if run in _LOCKS:
        _LOCKS.pop(run).close()


@dataclass
class Stage:
    """A running stage. folder: where it writes; params: checked parameters."""

    name: str
    run_id: str
    folder: Path
    params: dict
    key: str
    started: float = field(default_factory=time.time)
    clock: float = field(default_factory=time.monotonic)

    def before(self, stage: str, name: str = "") -> Path:
        """A file or folder that an earlier stage of this run made."""
        return runs_root() / self.run_id / stage / name

    def finish(self, metrics: dict, **facts) -> None:
        """Write metrics.json, then run.json; only now does the stage count as finished."""
        write_json(self.folder / "metrics.json", metrics)
        files = sorted(p for p in self.folder.rglob("*") if p.is_file() and p.suffix not in (".ipynb", ".tmp")
                       and "checkpoint" not in str(p.relative_to(self.folder)))
        write_json(self.folder / "run.json", {
            "stage": self.name, "run_id": self.run_id, "key": self.key, "params": self.params,
            "inputs": {name: load_record(name, self.run_id)["outputs"] for name in STAGES[self.name]},
            "outputs": {str(p.relative_to(self.folder)): file_sha256(p) for p in files}, "versions": package_versions(),
            "machine": f"{platform.machine()} {platform.system()}, {os.cpu_count()} CPUs", "git": git_revision(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.started)),
            "seconds": round(time.monotonic() - self.clock, 1), **facts})
        shutil.rmtree(self.folder.with_name(f"{self.name}.before"), ignore_errors=True)
        unlock_run(self.folder.parent)


def begin_stage(stage: str, names: dict) -> Stage:
    """Start a stage from a notebook: `names` is globals(), where the parameters cell left its values.

    What the parameter cells assign must be a parameter of the stage: a mistyped `-p` would otherwise be ignored in silence.
    Until it finishes, no other process can write this run.
    Leftovers of an interrupted run with the same key stay for resuming, all others are removed; what a finished stage made with
    another key is set aside until this one has finished.
    """
    given = set(read_params_file(params_file(stage)))
    for cell in names.get("In", []):
        if cell.lower().startswith("# parameters"):
            given |= {target.id for node in ast.parse(cell).body if isinstance(node, ast.Assign | ast.AnnAssign)
                      for target in (node.targets if isinstance(node, ast.Assign) else [node.target])}
    params = validate_params({name: names[name] for name in sorted(given) if name in names}, stage)
    run_id = validate_run_id(params["run_id"])
    lock_run(runs_root() / run_id)
    key = stage_key(stage, run_id, params)
    folder = runs_root() / run_id / stage
    marker = folder / "started.json"
    if (record := load_record(stage, run_id)) and record["key"] != key:
        set_aside_outputs(stage, run_id)
    if folder.exists() and (not marker.is_file() or json.loads(marker.read_text())["key"] != key):
        for path in folder.iterdir():
            if path.suffix != ".ipynb":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").unlink(missing_ok=True)
    write_json(marker, {"key": key})
    return Stage(stage, run_id, folder, params, key)


def show_stage(stage: Stage) -> None:
    """Print the stage's parameters and the versions of what computes it."""
    print(f"{stage.name} of run '{stage.run_id}':", ", ".join(f"{k}={v}" for k, v in stage.params.items() if k != "run_id"))
    print("versions:", ", ".join(f"{k} {v}" for k, v in package_versions().items()))


def read_metrics(folder: Path) -> dict:
    """metrics.json of a stage folder."""
    return json.loads((folder / "metrics.json").read_text())
