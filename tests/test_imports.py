"""The house: who may import whom, and one number for notebook, module and test."""

import ast
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from graphlib import TopologicalSorter

import pytest

from mig_kit.common import PACKAGE, PROJECT_ROOT
from mig_kit.pipeline import run_folders
from mig_kit.pipeline.processes import ENVIRONMENT

GROUND = {"boxes", "stats", "image_files", "common", "openai_client"}
# a module of the hall -> the modules of the hall that it may import
HALL = {
    **{name: {"common"} for name in GROUND},  # its UserError
    "sample": GROUND,
    "prompts": GROUND | {"sample"},
    "rewards": GROUND | {"sample", "prompts"},
    "filters": GROUND | {"sample", "prompts", "rewards"},
}
ENGINE = {"models", "serving", "training", "shared_prefix"}
# a wing -> the wings that it may import besides the hall and itself
WINGS = {
    "world": set(), "score": {"data"},  # own data are read by one reader
    "drawing": set(), "shared_prefix": set(),
    "models": {"shared_prefix"}, "serving": {"models", "shared_prefix", "pipeline", "drawing"},
    "training": {"models", "serving", "shared_prefix", "pipeline", "drawing"},
    "data": {"drawing", "models"}, "pipeline": {"world", "data"},
    "stages": {"world", "data", *ENGINE, "pipeline", "drawing"},
    "evaluation": {"world", "data", "score", *ENGINE, "pipeline", "drawing"},
    "commands": {"stages", "evaluation", "world", "data", "score", *ENGINE, "pipeline", "drawing"},
}
# what stages share; train is what launchers start
STAGE_HELPERS = {"sources": set(), "sanity_checks": set(), "launched_worker": {"sft", "grpo"}}
OTHER_HOMES = {  # module and test of a notebook that no module of `stages` belongs to
    "06_evaluate": ("mig_kit/evaluation/evaluate.py", "tests/evaluation/test_evaluate.py"),
    "07_report": ("mig_kit/evaluation/report.py", "tests/evaluation/test_report.py"),
    "08_benchmark": ("mig_kit/shared_prefix/compare.py", "tests/shared_prefix/test_trainer.py"),
    "90_tiny_base": ("notebooks/tiny_base/training.py", "tests/test_tiny_base.py")}


MODULES = {".".join(part for part in path.relative_to(PACKAGE).with_suffix("").parts
                    if part != "__init__"): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(name):
    imported = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("mig_kit.") for alias in node.names), name
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            package, _, module = node.module.partition(".")
            if package == "mig_kit":
                names = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                imported |= names & MODULES.keys() or {module}
    return imported


def is_allowed(name, other):
    wing, _, module = name.rpartition(".")
    other_wing, _, other_module = other.rpartition(".")
    if not wing:
        return other in HALL[name]
    if wing == other_wing == "stages":
        return other_module in STAGE_HELPERS or other_module in STAGE_HELPERS.get(module, ())
    return not other or other in HALL or other_wing == wing or other_wing in WINGS[wing]


def test_imports_keep_to_the_layout():
    names = [name for name in MODULES if name and name not in WINGS]
    assert [name for name in names if name not in HALL
            and name.partition(".")[0] not in WINGS] == [], "modules of no wing"
    assert [f"{name} imports {other}" for name in names for other in sorted(imported_modules(name))
            if not is_allowed(name, other)] == []


def test_no_module_imports_itself_through_others():
    graph = {name: imported_modules(name) for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_status_needs_no_plots():
    code = ("import sys, mig_kit.pipeline.status\n"
            "assert not {'matplotlib', 'seaborn', 'torch'} & sys.modules.keys()")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_packages_are_the_wings():
    settings = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == WINGS.keys()
    assert settings["tool"]["setuptools"]["packages"] == sorted(
        ["mig_kit", *(f"mig_kit.{name}" for name in (*folders, "notebooks", "params"))])


def test_one_number_one_notebook_one_module_one_test():
    for stage in run_folders.STAGES:
        module, test = OTHER_HOMES.get(stage, (f"mig_kit/stages/{stage[3:]}.py",
                                               f"tests/stages/test_{stage[3:]}.py"))
        for path in (f"notebooks/{stage}.ipynb", module, test):
            assert (PROJECT_ROOT / path).is_file(), path


IMPORT_ALL = """
import importlib, logging, os, pkgutil, warnings
# what these do when they are imported is theirs
import accelerate, bitsandbytes, datasets, matplotlib.pyplot, nbconvert, papermill, peft, seaborn
import torch, transformers, trl
import mig_kit

def describe_process():
    loggers = logging.root.manager.loggerDict.values()
    return (dict(os.environ), [str(entry) for entry in warnings.filters],
            [(logger.name, logger.level) for logger in loggers if getattr(logger, "level", 0)])

before = describe_process()
for module in pkgutil.walk_packages(mig_kit.__path__, "mig_kit."):
    importlib.import_module(module.name)
    assert describe_process() == before, module.name
from mig_kit.pipeline.processes import prepare_process
prepare_process()
assert all(map(lambda one, other: one != other, describe_process(), before))
"""


@pytest.mark.slow
def test_an_import_changes_nobodys_process():
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    subprocess.run([sys.executable, "-c", IMPORT_ALL], check=True, env=environment)


def test_a_name_means_one_thing():
    """But for `main`, and `train`, which the two training stages have alike."""
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                places[node.name].append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items()
            if len(where) > 1 and name not in ("main", "train")} == {}
