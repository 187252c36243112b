"""What a stage's results follow from, as digests: parameters, inputs, files and code.

A change of these makes a stage stale. Its code is the notebook's code cells and every module of
the kit that they lead to by imports. Docstrings, comments, markdown and what only keeps runs,
draws, tabulates or checks do not count.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from mig_kit import common
from mig_kit.common import (
    NOTEBOOKS,
    PACKAGE,
    PROJECT_ROOT,
    UserError,
    digest_json,
    file_sha256,
)
from mig_kit.data.records import iter_image_names
from mig_kit.image_files import is_regular_file
from mig_kit.pipeline.reward_names import list_own_files, list_own_functions
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS

NOT_PRODUCTS = ("metrics.json",)  # they hold times and names of runs
MODEL_PARAMS = ("base_model", "model", "start_from")  # each names a folder, a model or a word
LARGE_FILE = 2**26  # bytes; larger files of a model folder are compared by size and time
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")

BASE_CODE = "tiny_base"  # what made the tiny base, beside notebook 90
PLUMBING = "mig_kit.pipeline."
# what no result follows from: packages and modules that keep runs, show something or check it
NOT_PART_OF_A_KEY = (
    PLUMBING, "mig_kit.drawing.", "mig_kit.evaluation.tables.", "mig_kit.stages.sanity_checks.")
STAGES_OF_PICTURES = {"07_report", "08_benchmark"}  # all of that counts but PLUMBING


def stage_facts(stage: str, params: dict, outputs: dict[str, dict[str, str]]) -> dict:
    """What a stage's results follow from: kind -> name -> value or digest.

    A finished stage is stale if `describe_change` has something to say about the two, or an
    output is damaged, or a stage that it reads is stale (`Run.marks`).

    Args:
        params: the stage's, and the run's if it builds on earlier stages.
        outputs: of each stage that it reads, file name -> digest.
    """
    files = hash_named_files(params)
    images = files.pop("images", None)
    files |= {path.name: file_sha256(path) for path in list_own_files(list_own_functions(params))}
    files |= {name: model_fingerprint(params[name]) for name in MODEL_PARAMS if params.get(name)}
    params = {name: value for name, value in params.items() if name not in EXECUTION_PARAMS}
    left_out = () if stage in STAGES_OF_PICTURES else NOT_PRODUCTS
    inputs = {name: {file: digest for file, digest in digests.items() if file not in left_out}
              for name, digests in outputs.items()}
    return {"parameter": params,
            "file": {name: digest_json(value) for name, value in files.items()},
            "input": {name: digest_json(digests) for name, digests in inputs.items()},
            "images": digest_json(images) if images else "", **describe_code(stage)}


def list_changed_params(before: dict, now: dict, verb: str = "finished") -> list[str]:
    """Parameters that both have, in two values, as "max_steps: 60, finished with 125"."""
    names = sorted(before.keys() & now.keys() - set(EXECUTION_PARAMS))
    return [f"{name}: {now[name]!r}, {verb} with {before[name]!r}" for name in names
            if digest_json(before[name]) != digest_json(now[name])]


def describe_change(before: dict, now: dict) -> str:
    """What differs between two stages' facts, at most three; "" if nothing does."""
    differences = list_changed_params(before["parameter"], now["parameter"])
    for kind in ("file", "input", "code"):
        old, new = before.get(kind, {}), now[kind]
        differences += [f"{name.rpartition('.')[2] if kind == 'code' else name} has changed"
                        for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    differences += ["a cell of its notebook has changed"] * (before["cells"] != now["cells"])
    # once 01 has stored the images that it needs, they may go
    differences += ["images of data have changed"] * (now["images"] not in ("", before["images"]))
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def model_fingerprint(model: str) -> dict[str, str]:
    """File name -> digest, of a model folder's weights and settings; {} for a hub name."""
    folder = common.model_folder(model)
    files = [path for kind in MODEL_FILES for path in folder.glob(kind)]
    return {path.name: (str(file_stats(path)) if path.stat().st_size > LARGE_FILE
                        else file_sha256(path)) for path in sorted(files) if path.is_file()}


def file_stats(path: Path) -> list[int]:
    """[bytes, time of the last change in ns], by which a file is taken to be the same."""
    return [path.stat().st_size, path.stat().st_mtime_ns]


def hash_named_files(params: dict) -> dict:
    """{"data": SHA-256, "images": size and time by name} of 01's own data; {} without own data."""
    path = PROJECT_ROOT / params.get("data", "scenes")
    if path == PROJECT_ROOT / "scenes" or not path.is_file():
        return {}
    root = PROJECT_ROOT / params["image_root"] if params["image_root"] else path.parent
    try:
        names = set(iter_image_names(path))
    except UserError:  # which 01 will say
        names = set()
    images = {name: file_stats(root / name) for name in names if is_regular_file(root / name)}
    return {"data": file_sha256(path), "images": images}


def describe_code(stage: str) -> dict:
    """The code of a stage: {"code": module -> digest, "cells": one of all but its parameters}."""
    left_out = (PLUMBING,) if stage in STAGES_OF_PICTURES else NOT_PART_OF_A_KEY
    cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    trees = [parse_cell("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"
             and "parameters" not in cell["metadata"].get("tags", ())]
    todo, digests = set().union(*map(_imported_modules, trees)), {}
    while todo:
        module = todo.pop()
        if module not in digests and not f"{module}.".startswith(left_out):
            path = _module_path(module)
            digests[module], imported = _read_module(path, path.stat().st_mtime_ns)
            todo |= imported
    return {"code": digests, "cells": digest_json([ast.dump(tree) for tree in trees if tree.body])}


def _module_path(module: str) -> Path:
    root, *parts = module.split(".")
    folder = NOTEBOOKS / root if root == BASE_CODE else PACKAGE
    return folder.joinpath(*parts).with_suffix(".py")


@cache
def _read_module(path: Path, modified: int) -> tuple[str, set[str]]:
    """(digest of a module's code, modules that it imports)."""
    tree = parse_cell(path.read_text())
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16], _imported_modules(tree)


def parse_cell(source: str) -> ast.Module:
    """The syntax tree of a module or of a notebook's cell, without docstrings and magics."""
    lines = ("" if line.startswith(("%", "!")) else line for line in source.splitlines())
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree = compile("\n".join(lines), "<source>", "exec", flags)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _imported_modules(tree: ast.Module) -> set[str]:
    """The modules of the kit, and of what made the tiny base, that a tree imports anywhere."""
    names = {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
             for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))}
    return {name for name in names
            if name.startswith(("mig_kit.", f"{BASE_CODE}.")) and _module_path(name).is_file()}
