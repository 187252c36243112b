"""The house: who may import whom, one number for notebook, module and test, and pinned packages."""

import ast
import tomllib
from graphlib import TopologicalSorter

import pytest
import yaml

from mig_kit.common import PACKAGE, PROJECT_ROOT
from mig_kit.pipeline import store

GROUND = {"boxes", "stats", "image_files", "common", "openai_client", "launchers"}
# a module of the hall -> the modules of the hall that it may import
HALL = {
    **{name: set() for name in GROUND},
    "sample": GROUND,
    "prompts": GROUND | {"sample"},
    "rewards": GROUND | {"sample", "prompts"},
    "filters": GROUND | {"sample", "prompts", "rewards"},
    "palette": set(),
    "pictures": GROUND | {"sample", "prompts", "rewards", "palette"},
    "plots": GROUND | {"palette", "pictures"},
    "score_plots": GROUND | {"sample", "palette", "pictures", "plots"},
    "widgets": GROUND | {"sample", "prompts", "rewards", "plots"},
    "lesson_plots": GROUND,
    "method_plots": GROUND | {"sample", "prompts", "rewards", "plots"},
    "token_plots": set(),
    "group_plots": {"plots"},
}
COMMAND_LINE = {"cli", "cli_data", "cli_models"}  # may import everything; nothing imports them
# a wing -> the wings that it may import besides the hall and itself
WINGS = {
    "world": set(), "data": set(), "engine": set(), "scoring": set(), "pipeline": set(),
    "stages": {"world", "data", "engine", "pipeline"},
    "speed": {"stages", "engine", "world", "pipeline", "data"},
    "build_base": {"stages", "engine", "world", "pipeline"},
}
# what stages share; train is what launchers start
STAGE_HELPERS = {"sources": set(), "sanity_checks": set(), "report_tables": set(),
                 "eval_tables": set(), "report_gallery": set(), "train": {"sft", "grpo"}}
# compare reads the results of finished ones; eval_model asks and judges as 06 does
READS_STAGES = {"compare": {"evaluate", "evaluated_runs", "report", "run_pairs"},
                "run_pairs": {"evaluated_runs"}, "evaluated_runs": {"evaluate"},
                "eval_model": {"evaluate", "report"}}
# the notebook-less 06 judges real benchmarks, and 06's key holds the images that they name
READS_SCORING = {"stages.eval_model", "pipeline.fingerprints"}
MODULE_OF_STAGE = {"08_benchmark": "speed/benchmark", "90_tiny_base": "build_base/tiny_base"}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_modules(name):
    """The modules of the kit that a module imports, anywhere in it."""
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
    """Whether the module `name` may import the module `other`."""
    wing, _, module = name.rpartition(".")
    other_wing, _, other_module = other.rpartition(".")
    if name in COMMAND_LINE:
        return True
    if not wing:
        return other in HALL[name]
    if name in READS_SCORING and other_wing == "scoring":
        return True
    if wing == other_wing == "stages":
        may_read = STAGE_HELPERS.get(module, set()) | READS_STAGES.get(module, set())
        return other_module in STAGE_HELPERS or other_module in may_read
    return other in HALL or other_wing == wing or other_wing in WINGS[wing]


def test_the_rules_themselves():
    assert is_allowed("stages.grpo", "stages.sanity_checks")
    assert is_allowed("stages.compare", "stages.report")
    assert is_allowed("speed.gpu_needs", "world.tasks")
    for name, other in (("stages.grpo", "stages.sft"), ("engine.models", "world.tasks"),
                        ("world.tasks", "engine.models"), ("stages.evaluate", "scoring.score"),
                        ("pipeline.store", "stages.sft"), ("boxes", "sample"),
                        ("rewards", "filters"), ("sample", "plots"), ("data.own_data", "cli"),
                        ("scoring.score", "data.own_data"), ("stages.report", "speed.benchmark")):
        assert not is_allowed(name, other), f"{name} -> {other}"


@pytest.mark.parametrize("name", [name for name in MODULES if name and name not in WINGS])
def test_imports_keep_to_the_layout(name):
    is_in_hall = name in COMMAND_LINE or name in HALL
    assert is_in_hall or name.partition(".")[0] in WINGS, "a module of no wing"
    refused = sorted(other for other in imported_modules(name) if not is_allowed(name, other))
    assert not refused, f"{name} imports {', '.join(refused)}"


def test_no_module_imports_itself_through_others():
    graph = {name: imported_modules(name) for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_vllm_and_ray_are_no_dependencies():
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    names = {pin.partition("==")[0].lower() for pins in (
        project["dependencies"], *project["optional-dependencies"].values()) for pin in pins}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.partition(".")[0])
    assert {"torch", "openai"} <= names and not {"vllm", "ray"} & names


def test_packages_are_the_wings():
    settings = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())
    packages = {f"mig_kit.{wing}" for wing in WINGS} | {"mig_kit"}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == WINGS.keys()


@pytest.mark.parametrize("stage", store.STAGES)
def test_one_number_one_notebook_one_module_one_test(stage):
    module = MODULE_OF_STAGE.get(stage, f"stages/{stage[3:]}")
    wing, _, name = module.partition("/")
    assert (PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").is_file()
    assert (PACKAGE / f"{module}.py").is_file()
    assert (PROJECT_ROOT / "tests" / wing / f"test_{name}.py").is_file()


def test_environment_and_pins_agree():
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    pins = project["dependencies"] + project["optional-dependencies"]["test"]
    assert all("==" in pin for pin in pins)
    torch = next(pin for pin in pins if pin.startswith("torch=="))
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == [torch, "-e .[test]"]
    assert torch in (PROJECT_ROOT / "Makefile").read_text()
    assert "python=3.11" in environment["dependencies"]
    assert project["requires-python"].startswith(">=3.11")
