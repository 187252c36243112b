"""Attempts at a stage: each is made beside the finished stage, and replaces it at its end.

An attempt is the folder runs/<run id>/NN_stage.new-KEY; KEY is the start of the hash of all that
its results follow from. A stopped attempt goes on when the stage starts with the same key. The
stage that a finished attempt replaces is kept in NN_stage.before.
"""

import json
import os
import shutil
from pathlib import Path

from mig_kit.common import file_sha256, write_json
from mig_kit.image_files import IMAGE_FOLDER, IMAGE_MANIFEST, link_or_copy
from mig_kit.pipeline.run_folders import (
    STAGES,
    lock_run,
    read_record,
    require_own_stage,
    require_runs,
    runs_root,
    unlock_run,
)

COMMAND = "MIG_KIT_COMMAND"  # in the environment of a stage: the command that runs it
MARKER = "started.json"
SWAP = ".new-swap"  # a stage's folder while `restore` exchanges it
NOT_PRODUCTS = ("metrics.json", MARKER)  # they hold times and names of runs
WORTH_KEEPING = 60.0  # seconds; an attempt of less is no loss


def attempt_folder(stage: str, run_id: str, key: str) -> Path:
    """Where an attempt with this key is made."""
    return runs_root() / run_id / f"{stage}.new-{key[:8]}"


def list_attempts(stage: str, run_id: str) -> list[Path]:
    """The folders of attempts that have not finished."""
    folders = (runs_root() / run_id).glob(f"{stage}.new-*")
    return sorted(folder for folder in folders if not folder.name.endswith(SWAP))


def open_attempt(stage: str, run_id: str, facts: dict) -> tuple[Path, dict]:
    """The folder in which an attempt goes on or begins, and its marker.

    The marker is {"facts" of `stage_facts`, "spent": seconds of the same attempt before,
    "repeats": True if the stage has finished with this key; its files are then linked or copied}.
    """
    key = facts["key"]
    folder = attempt_folder(stage, run_id, key)
    before = read_marker(folder)
    if before and not before.get("repeats"):
        return folder, _write_marker(folder, facts, seconds_spent(folder))
    # left by a kernel that only showed a finished stage, or by a copy that was cut off
    shutil.rmtree(folder, ignore_errors=True)
    final = runs_root() / run_id / stage
    if _copy_finished(final, folder, key):
        return folder, _write_marker(folder, facts, repeats=True)
    replaced = _copy_finished(final.with_name(f"{stage}.before"), folder, key)
    return folder, _write_marker(folder, facts, replaced["seconds"] if replaced else 0.0)


def begin_again(stage: str, run_id: str, facts: dict) -> None:
    """An empty attempt with this key, even if one was stopped or has finished."""
    folder = attempt_folder(stage, run_id, facts["key"])
    shutil.rmtree(folder, ignore_errors=True)
    _write_marker(folder, facts)


def _write_marker(folder: Path, facts: dict, spent: float = 0.0, repeats: bool = False) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    marker = {"facts": facts, "spent": spent, "repeats": repeats}
    write_json(folder / MARKER, marker)
    return marker


def set_others_aside(stage: str, run_id: str, facts: dict) -> list[str]:
    """A sentence on each attempt with another key that cost minutes; cheaper ones are deleted."""
    sentences, new = [], attempt_folder(stage, run_id, facts["key"])
    for folder in list_attempts(stage, run_id):
        seconds = seconds_spent(folder)
        if folder != new and seconds < WORTH_KEEPING:
            shutil.rmtree(folder)
        elif folder != new:
            sentences.append(
                f"warning: an attempt that was stopped after {seconds / 60:.0f} min stays in "
                f"{folder}: what differs is {describe_change(folder, facts)}; to go on with it "
                "change that back, or delete it if it is of no use")
    return sentences


def promote(folder: Path, final: Path) -> None:
    """Let a finished attempt take its place; what was there is kept as .before."""
    before = final.with_name(f"{final.name}.before")
    if final.exists():
        shutil.rmtree(before, ignore_errors=True)
        final.rename(before)
    if folder.exists():  # else another process has renamed it meanwhile, in `load_record`
        folder.rename(final)


def restore(run_id: str, stage: str = "") -> list[str]:
    """Swap a stage with what it replaced; a second call undoes that. Returns the stages.

    stage: "" for all that the last command replaced. Raises FileNotFoundError if nothing is kept,
    RuntimeError if another process writes the run.
    """
    require_runs(run_id)
    require_own_stage(stage, run_id)
    run, last = runs_root() / run_id, {}  # last: the later of a stage's two records
    lock_run(run)
    try:
        for name in [stage] if stage else STAGES:
            aside, before = run / f"{name}{SWAP}", run / f"{name}.before"
            if aside.exists() and (run / name).exists() and not before.exists():  # a kill between
                aside.rename(before)
            if before := read_record(run / f"{name}.before" / "run.json"):
                last[name] = max(before, read_record(run / name / "run.json") or before,
                                 key=_order)
        if not last:
            raise FileNotFoundError(
                f"run '{run_id}' keeps nothing that {stage or 'a stage'} replaced; mig-kit status "
                f"{run_id} shows what it has")
        command = _command(max(last.values(), key=_order))
        chosen = [name for name, record in last.items() if _command(record) == command]
        for name in chosen:
            before, final, aside = (run / f"{name}{suffix}" for suffix in (".before", "", SWAP))
            if final.exists():
                final.rename(aside)  # which `load_record` brings back after a kill
            before.rename(final)
            if aside.exists():
                aside.rename(before)
    finally:
        unlock_run(run)
    return chosen


def _order(record: dict) -> tuple[str, str]:
    return record["started"], _command(record)  # the first has whole seconds


def _command(record: dict) -> str:
    return record.get("command", record["started"])


def read_marker(folder: Path) -> dict:
    """The marker of the attempt that a folder holds; {} if there is none, or a broken one."""
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return {}


def seconds_spent(folder: Path) -> float:
    """Seconds of the attempts that a folder holds, up to the last file that is kept of them."""
    marker = read_marker(folder)
    if not marker or marker.get("repeats"):
        return 0.0
    begun = (folder / MARKER).stat().st_mtime
    written = [path.stat().st_mtime for path in folder.rglob("*")
               if path.is_file() and path.suffix != ".log"]
    return round(marker["spent"] + max(written) - begun, 1)


def _copy_finished(source: Path, folder: Path, key: str) -> dict | None:
    """Link or copy what finished with this key into `folder`; its run.json, or None."""
    record = read_record(source / "run.json")
    if record is None or record["key"] != key or find_damaged(source, record):
        return None

    def bring_along(path: str, target: str) -> None:
        # never written in place, so a hard link will do
        is_fixed = path.endswith(".safetensors") or any(
            part in Path(path).parts for part in ("checkpoints", IMAGE_FOLDER))
        if is_fixed:
            link_or_copy(Path(path), Path(target))
        else:
            shutil.copy2(path, target)

    shutil.copytree(source, folder, copy_function=bring_along,
                    ignore=shutil.ignore_patterns("run.json", MARKER, "*.ipynb"))
    return record


def find_damaged(folder: Path, record: dict, is_thorough: bool = False,
                 hashes_images: bool = False) -> Path | None:
    """The first file, stored images included, that is gone or not what the stage wrote, or None.

    is_thorough: also hash files of unchanged size and time. hashes_images: hash images, too.
    """
    outputs, stats = record.get("outputs", {}), record.get("stats", {})
    for name, digest in outputs.items():
        path = folder / name
        if not path.is_file():
            return path
        is_as_it_was = stats.get(name) == file_facts(path) and not is_thorough
        if not is_as_it_was and file_sha256(path) != digest:
            return path
    images = folder / IMAGE_FOLDER
    listed = (folder / IMAGE_MANIFEST).read_text().split() if IMAGE_MANIFEST in outputs else ()
    stored = set(os.listdir(images)) if images.is_dir() else set()
    return next((images / name for name in listed if name not in stored
                 or (hashes_images and file_sha256(images / name) != Path(name).stem)), None)


def file_facts(path: Path) -> list[int]:
    """[bytes, time of the last change in ns], by which a file is taken to be the same."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def describe_change(folder: Path, facts: dict) -> str:
    """What differs between the attempt that a folder holds and `facts`."""
    return describe_differences(read_marker(folder).get("facts", {}), facts) or "its key"


def describe_differences(before: dict, now: dict) -> str:
    """What differs between two attempts' facts, as "the parameter x (1 -> 2)", at most three."""
    differences = []
    for kind in ("parameter", "file", "input"):
        old, new = before.get(kind, {}), now[kind]
        for name in sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
            change = f" ({old.get(name)} -> {new.get(name)})" if kind == "parameter" else ""
            differences.append(f"the {kind} {name}{change}")
    if before.get("code") != now["code"]:
        differences += _describe_code_differences(before, now) or ["the code"]
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return ", ".join(differences[:3]) + more


def _describe_code_differences(before: dict, now: dict) -> list[str]:
    """Cells and definitions that are other ones; one that was only moved is the same."""
    old_cells, old = before.get("cell", ()), before.get("definition", {})
    cells = [f"the cell '{cell.splitlines()[0]}'" for cell in now["cell"] if cell not in old_cells]
    if not cells and len(now["cell"]) < len(old_cells):
        cells = ["a cell that is gone"]
    new = now["definition"]
    names = [name for name in new if new[name] not in old.values()]
    names += [name for name in old if name not in new and old[name] not in new.values()]
    places = (name.rpartition(".") for name in names)
    return cells[:1] + [f"the definition {name} of {module}" for module, _, name in places]
