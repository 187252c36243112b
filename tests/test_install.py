"""Installing: ranges, lock and extras agree, the core needs no extra, a wheel works anywhere."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from fnmatch import fnmatch
from importlib.metadata import packages_distributions

import nbformat
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mig_kit.common import PACKAGE, PROJECT_ROOT

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [Requirement(text) for text in (*PROJECT["dependencies"], *sum(EXTRAS.values(), []))]
PYTHONS = ("3.11.7", "3.12.0", "3.13.0", "3.14.0")
# what `score` and `data check` import, and what `eval` does; without which packages
OF_NOTEBOOKS = ["bitsandbytes", "trl", "papermill", "ipywidgets", "IPython", "nbconvert",
                "nbformat"]
MODULES = {
    ("mig_kit.commands.main", "mig_kit.score.run_benchmark", "mig_kit.data.importers",
     "mig_kit.rewards", "mig_kit.data.inspection", "mig_kit.pipeline.status"): [
        *OF_NOTEBOOKS, "torch", "transformers", "peft", "datasets", "pandas", "pyarrow",
        "matplotlib", "seaborn", "openai", "jinja2", "psutil", "safetensors", "huggingface_hub"],
    ("mig_kit.evaluation.eval_model", "mig_kit.drawing.pictures"): OF_NOTEBOOKS}
OF_UNIX = ["pwd", "grp", "fcntl"]


def read_lock(python="3.11.7"):
    """Package name -> version in the lock, on Linux."""
    environment = {**default_environment(), "python_version": python.rpartition(".")[0],
                   "python_full_version": python}
    lines = (PROJECT_ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins
            if pin.marker is None or pin.marker.evaluate(environment)}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_is_within_the_ranges(python):
    lock = read_lock(python)
    for wanted in REQUIREMENTS:
        if wanted.name != "mig-kit":
            assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), wanted


def test_what_the_trainer_builds_on_is_capped_at_what_is_tested():
    lock, page = read_lock(), (PROJECT_ROOT / "notebooks/guide/trainer.md").read_text()
    for wanted in REQUIREMENTS:
        if wanted.name in ("trl", "transformers", "peft", "torch", "accelerate"):
            row = re.search(rf"^\| {wanted.name} \| ([\d.]+)", page, re.MULTILINE | re.IGNORECASE)
            newest = max(row[1], lock[wanted.name], key=Version)
            major, minor, _ = newest.split(".")
            assert wanted.specifier.contains(newest)
            assert not wanted.specifier.contains(f"{major}.{int(minor) + 1}.0")


def test_every_import_is_declared():
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    tests = {Requirement(text).name for text in EXTRAS["test"]}
    declared = {canonicalize_name(wanted.name) for wanted in REQUIREMENTS} - tests
    # they come with what is declared, whose types or exceptions these are
    declared |= {"beautifulsoup4", "ipython", "jupyter-client", "markupsafe", "nbclient",
                 "nbformat", "httpx", "pydantic", "tokenizers", "traitlets"}
    distributions = packages_distributions()
    for name in imported - set(sys.stdlib_module_names) - {"mig_kit"}:
        assert declared & {canonicalize_name(one) for one in distributions.get(name, [name])}, name
    assert not {"vllm", "ray"} & imported


def import_without(modules, blocked):
    """Standard error of importing modules without others; a finder hides torch from SciPy."""
    code = ("import sys\n"
            "class Hidden:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == 'torch' and 'torch' in {blocked!r}: raise ImportError(name)\n"
            "sys.meta_path.insert(0, Hidden())\n"
            f"sys.modules.update(dict.fromkeys(set({blocked!r}) - {{'torch'}}))\n"
            + "\n".join(f"import {module}" for module in modules))
    # filelock warns where it finds neither fcntl nor Windows
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize("modules", MODULES)
def test_what_needs_no_extra_imports_none_and_nothing_of_linux_alone(modules):
    assert not import_without(modules, [*MODULES[modules], *OF_UNIX])


@pytest.mark.nightly
def test_nothing_is_of_linux_alone():
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
               for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert not import_without(modules, OF_UNIX)


@pytest.mark.parametrize("code,lacking,sentence", [
    ("commands.main", "papermill",
     "mig-kit: papermill is not installed; what this needs comes with: "
     "pip install 'mig-kit[notebooks]'"),
    pytest.param("commands.main", "jinja2",
                 "mig-kit: jinja2 is not installed; what this needs comes with: "
                 "pip install 'mig-kit[eval]'", marks=pytest.mark.nightly),
    ("shared_prefix.trainer", "transformers",
     "ModuleNotFoundError: transformers is not installed; mig_kit.shared_prefix needs: "
     "pip install 'mig-kit[trainer]'")])
def test_a_missing_extra_is_named(code, lacking, sentence, tmp_path):
    if lacking in ("transformers", "jinja2"):
        pytest.importorskip("torch")  # else that is the first one missing
    words = {"papermill": ["run", "00"],
             "jinja2": ["eval", "--model", "tiny", "--out", "x"]}.get(lacking)
    code = (f"import sys; sys.modules[{lacking!r}] = None; sys.argv[1:] = {words or []!r}\n"
            f"import mig_kit.{code} as module; {'module.main()' if words else ''}")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             cwd=tmp_path, env={**os.environ, "MIG_KIT_RUNS": str(tmp_path)})
    assert process.stderr.strip().splitlines()[-1] == sentence


def test_every_file_of_the_package_goes_into_a_wheel():
    settings = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for path in PACKAGE.rglob("*"):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            name, patterns = str(path.relative_to(PACKAGE)), settings["package-data"]["mig_kit"]
            assert any(fnmatch(name, pattern) for pattern in patterns), name


@pytest.mark.nightly
def test_a_wheel_works_outside_the_repository(tmp_path, monkeypatch):
    venv.create(tmp_path / "venv")  # it sees the packages of this one, pip among them
    packages = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "shared.pth").write_text(os.path.dirname(os.path.dirname(nbformat.__file__)))
    python, clone = tmp_path / "venv" / "bin" / "python", tmp_path / "clone"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True,
                           check=True, text=True).stdout.split("\0")
    for name in filter(None, files):  # a clone has what is tracked
        if (PROJECT_ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            (clone / name).write_bytes((PROJECT_ROOT / name).read_bytes())
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("MIG_KIT_RUNS", raising=False)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w",
                    tmp_path, clone], check=True)
    wheel = next(tmp_path.glob("mig_kit-*.whl"))
    subprocess.run([python, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", wheel],
                   check=True)
    work = tmp_path / "work"
    work.mkdir()

    def run(*words):
        process = subprocess.run([python.with_name("mig-kit"), *words], cwd=work, text=True,
                                 capture_output=True)
        assert not process.returncode, process.stderr
        return process.stdout

    run("run", "01", "--profile", "smoke", "--run-id", "mine")
    assert (work / "runs" / "mine" / "01_synthesize" / "run.json").is_file()
    assert "01_synthesize" in run("status", "mine")
    assert "learning_rate" in run("params", "5", "--profile", "qwen2_5_vl_7b")
    assert "own_data.md" in run("data", "check", "--help")
    process = subprocess.run([python.with_name("mig-kit"), "run", "90"], cwd=work, text=True,
                             capture_output=True)
    assert "90_tiny_base comes with a clone of the repository alone" in process.stderr
