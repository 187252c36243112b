"""Replies that a branch need not draw: a run that it starts from has drawn them already.

The base and the SFT model of a branch are often those of its source, and replies follow from the
model, the parameters and the code alone, so that drawing them again would give the same file.
"""

import hashlib
import json
import shutil
from pathlib import Path

from mig_kit.common import write_atomically, write_json
from mig_kit.pipeline.dependencies import notebook_code, used_definitions
from mig_kit.pipeline.params import EXECUTION_PARAMS
from mig_kit.pipeline.run_folders import list_sources, load_record, stage_folder
from mig_kit.pipeline.store import Stage, model_fingerprint

REPLY_KEYS = "reply_keys.json"
DRAWN_PARAMS = ("seed", "replies", "sampled_per_task")  # greedy replies do not follow from them


def take_replies(stage: Stage, models: dict[str, str | Path], hardware: str,
                 names: tuple[str, ...]) -> dict[str, str]:
    """Copy the replies that a source of this run has already; "<system> <kind>" -> that run.

    models: system -> model folder; hardware: what draws, in words; names: of the suites; a kind is
    greedy or drawn (at temperature 1). The files replies/<system>_<suite>_*.jsonl of the source's
    same stage are taken if it has finished, with the same model, code and parameters; those that
    drawn replies alone follow from may differ for greedy ones.
    """
    folder = stage.folder / "replies"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {f"{system} {kind}": _reply_key(stage, model, hardware, kind)
            for system, model in models.items() for kind in ("greedy", "drawn")}
    write_json(folder / REPLY_KEYS, keys)
    taken = {}
    for run_id in list_sources(stage.run_id)[1:]:
        drawn = stage_folder(stage.name, run_id) / "replies"
        if load_record(stage.name, run_id) is None or not (drawn / REPLY_KEYS).is_file():
            continue
        drawn_keys = json.loads((drawn / REPLY_KEYS).read_text())
        for name, key in keys.items():
            system, kind = name.split()
            is_there = kind == "greedy" or stage.params["replies"]
            if is_there and name not in taken and drawn_keys.get(name) == key:
                _copy_replies(drawn, folder, tuple(f"{system}_{suite}_" for suite in names), kind)
                taken[name] = run_id
    return taken


def _reply_key(stage: Stage, model: str | Path, hardware: str, kind: str) -> str:
    left_out = {"run_id", "profile", "control_run", "kl_samples", *EXECUTION_PARAMS} - {"server"}
    if kind == "greedy":
        left_out.update(DRAWN_PARAMS)
    params = {name: value for name, value in stage.params.items() if name not in left_out}
    code = [used_definitions(stage.name), notebook_code(stage.name)]
    questions = stage.inputs["01_synthesize"]["val.parquet"]  # of own data; else they are drawn
    text = json.dumps([kind, model_fingerprint(str(model)), params, hardware, code, questions],
                      sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _copy_replies(source: Path, target: Path, prefixes: tuple[str, ...], kind: str) -> None:
    for path in sorted(source.glob("*.jsonl")):
        is_drawn = path.name.endswith("_drawn.jsonl")  # a real benchmark's replies are greedy, too
        if path.name.startswith(prefixes) and is_drawn == (kind == "drawn"):
            write_atomically(target / path.name,
                             lambda temporary, path=path: shutil.copyfile(path, temporary))
