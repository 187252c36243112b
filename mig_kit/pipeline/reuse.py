"""Replies that a branch copies from its source: the same model, parameters and code draw the same.
"""

import json
import shutil
from functools import partial
from pathlib import Path

from mig_kit.common import digest_json, write_atomically, write_json
from mig_kit.pipeline.dependencies import describe_code
from mig_kit.pipeline.fingerprints import hash_named_files, model_fingerprint
from mig_kit.pipeline.params import EXECUTION_PARAMS
from mig_kit.pipeline.run_folders import list_sources, load_record, stage_folder
from mig_kit.pipeline.store import Stage

REPLY_KEYS = "reply_keys.json"
DRAWN_PARAMS = ("seed", "replies", "sampled_per_task")  # greedy replies do not follow from them
MIXED = "mixed"  # instead of a key: two attempts drew them, on different servers or devices


def take_replies(stage: Stage, models: dict[str, str | Path], hardware: str,
                 suites: tuple[str, ...]) -> dict[str, str]:
    """Copy the replies that a source of this run has already; returns "<system> <kind>" -> its run.

    models: system -> folder; hardware: what draws, in words. The source must have finished this
    stage with the same models, files, code and parameters; greedy ones may differ in DRAWN_PARAMS.
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
                _copy_replies(source, folder, [f"{system}_{suite}_{kind}" for suite in suites])
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
    questions = stage.inputs["01_synthesize"]["val.parquet"]  # of own data; else they are drawn
    return digest_json([kind, model_fingerprint(str(model)), params, hash_named_files(params),
                        hardware, code, questions])


def _copy_replies(source: Path, target: Path, names: list[str]) -> None:
    for path in (source / f"{name}.jsonl" for name in names):
        if path.is_file():
            write_atomically(target / path.name, partial(shutil.copyfile, path))
