"""Installing: ranges, lock and extras agree, the core needs no extra, a wheel works anywhere."""

import ast
import os
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions

import nbformat
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mig_kit.common import PACKAGE, PROJECT_ROOT

PROJECT = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = ("3.11.7", "3.12.0", "3.13.0", "3.14.0")
# what the command line of `score`, `data` and `eval` imports
CORE_MODULES = ("mig_kit.cli", "mig_kit.stages.eval_model", "mig_kit.score.run_benchmark",
                "mig_kit.data.importers", "mig_kit.data.preview", "mig_kit.pipeline.status")
OF_UNIX = ["pwd", "grp", "fcntl"]


def read_lock(python="3.11.7"):
    """Package name -> version in the lock on Linux with a version of Python."""
    environment = {**default_environment(), "python_version": python.rpartition(".")[0],
                   "python_full_version": python}
    lines = (PROJECT_ROOT / "requirements.lock").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins
            if pin.marker is None or pin.marker.evaluate(environment)}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_lock_is_within_the_ranges(python):
    lock = read_lock(python)
    for text in (*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["test"]):
        wanted = Requirement(text)
        assert wanted.specifier.contains(lock[canonicalize_name(wanted.name)]), text


def test_what_overrides_private_methods_is_capped_at_what_is_tested():
    lock = read_lock()
    for text in (*PROJECT["dependencies"], *EXTRAS["notebooks"]):
        wanted = Requirement(text)
        if wanted.name in ("trl", "transformers"):
            major, minor, _ = lock[wanted.name].split(".")
            assert not wanted.specifier.contains(f"{major}.{int(minor) + 1}.0")


def test_every_import_is_declared():
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    declared = {canonicalize_name(Requirement(text).name)
                for text in (*PROJECT["dependencies"], *EXTRAS["notebooks"])}
    # they come with what is declared, whose types or exceptions these are
    declared |= {"beautifulsoup4", "ipython", "jupyter-client", "markupsafe", "nbformat", "httpx",
                 "pydantic", "tokenizers", "traitlets"}
    distributions = packages_distributions()
    for name in imported - set(sys.stdlib_module_names) - {"mig_kit"}:
        assert declared & {canonicalize_name(one)
                           for one in distributions.get(name, [name])}, name
    assert not {"vllm", "ray"} & imported


def import_without(modules, blocked):
    """Import modules in a process that lacks others; what it wrote to standard error."""
    code = (f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
            + "\n".join(f"import {module}" for module in modules))
    # filelock warns where it finds neither fcntl nor Windows
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True,
                          text=True).stderr


@pytest.mark.slow
def test_the_core_imports_no_extra_and_nothing_of_linux_alone():
    extras = ["bitsandbytes", "trl", "papermill", "ipywidgets", "IPython", "nbconvert", "nbformat"]
    assert not import_without(CORE_MODULES, [*extras, *OF_UNIX])


@pytest.mark.slow
def test_nothing_is_of_linux_alone():
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
               for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    assert not import_without(modules, OF_UNIX)


def test_a_missing_extra_is_named(tmp_path):
    code = ("import sys; sys.modules['papermill'] = None; sys.argv[1:] = ['run', '00']\n"
            "from mig_kit.cli import main; main()")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                             env={**os.environ, "MIG_KIT_RUNS": str(tmp_path)})
    sentence = process.stderr.strip().splitlines()[-1]
    assert sentence == ("mig-kit: papermill is not installed; what the stages need comes with: "
                        "pip install 'mig-kit[notebooks]'")


def make_venv(folder):
    """A venv that sees the packages of this one, pip among them, after its own; its Python."""
    venv.create(folder)
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "shared.pth").write_text(os.path.dirname(os.path.dirname(nbformat.__file__)))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_a_wheel_works_outside_the_repository(tmp_path, monkeypatch):
    python, clone = make_venv(tmp_path / "venv"), tmp_path / "clone"
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
