"""A random Qwen2.5-VL of some 200,000 parameters with the shipped tokenizer, and a smoke run."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import command_line
import pytest
import torch
from filelock import FileLock
from local_server import LocalServer
from published import format_of
from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration
from try_blocks import write_with_blocks

from mig_kit.boxes import BoxFormat
from mig_kit.common import NOTEBOOKS
from mig_kit.models import loading
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.world.tasks import TASKS, make_sample
from tiny_base.config import tiny_config

pytest_plugins = ["published"]  # folders laid out as the families are published


def pytest_collection_modifyitems(items):
    """Tests of the smoke run last; one of several processes begins with them, another with slow."""
    of_smoke = [item for item in items if "smoke_runs" in item.fixturenames]
    others = [item for item in items if item not in of_smoke]
    if "PYTEST_XDIST_WORKER" not in os.environ:
        items[:] = others + of_smoke
        return
    slow = [item for item in others if item.get_closest_marker("slow")]
    quick = [item for item in others if item not in slow]
    start = max(0, len(items) // 2 - len(of_smoke))
    items[:] = of_smoke + quick[:start] + slow + quick[start:]


@pytest.fixture(scope="session")
def stage_params():
    """Call it with a stage and changes: its parameters, as its notebook has them but for these."""
    def change(stage: str, **changes) -> SimpleNamespace:
        defaults = profile_params(stage)
        unknown = set(changes) - set(defaults)
        assert not unknown, f"{stage} has no parameters {unknown}"
        return SimpleNamespace(**{**defaults, **changes})

    return change


@pytest.fixture(autouse=True)
def stop_servers():
    yield
    while LocalServer.running:
        LocalServer.running.pop().stop()


@pytest.fixture(scope="session")
def float32():
    """Float32 on the CPU, whatever this CPU does best: the exactness tests need it."""
    return loading.Hardware("cpu", torch.float32, "sdpa", "float32 for tests")


@pytest.fixture
def first_gradients():
    """Call it with a trainer for a dict that will hold the first update's gradients by name."""
    from launched import RecordFirstGradients  # which imports TRL

    def record(trainer) -> dict[str, torch.Tensor]:
        gradients: dict[str, torch.Tensor] = {}
        trainer.add_callback(RecordFirstGradients(gradients))
        return gradients

    return record


@pytest.fixture(scope="session")
def processor():
    return loading.load_processor(loading.TINY_BASE, BoxFormat())


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """Call it with a name and a function that fills a new folder, once in all test processes."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, fill):
        folder = shared / name
        with FileLock(f"{folder}.lock"):
            if not folder.with_suffix(".filled").exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                folder.with_suffix(".filled").touch()
        return folder

    return make


@pytest.fixture(scope="session")
def random_folder(make_once, processor):
    """A folder with a random model of some 200,000 parameters, loadable like any other."""
    def save(folder):
        torch.manual_seed(0)
        config = tiny_config(640, hidden=64, layers=2, vision_hidden=64, vision_layers=2)
        model = Qwen2_5_VLForConditionalGeneration._from_config(config)
        # livelier than the default, so that differences show
        for parameter in model.model.language_model.parameters():
            if parameter.ndim > 1:
                parameter.data *= 4
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return make_once("random-model", save)


@pytest.fixture(scope="session")
def smoke_runs(make_once):
    """A folder of runs with a smoke run, "smoke", 08 too, and what they wrote in stderr.txt.

    Behind its own cells each notebook runs what it tells its reader to try, all in one process.
    """
    def run(root):
        notebooks = root.with_name("notebooks")
        notebooks.mkdir(exist_ok=True)
        write_with_blocks(notebooks, *RECIPE, "08_benchmark")
        path = os.pathsep.join([str(NOTEBOOKS), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, command_line.__file__, notebooks, "--profile", "smoke",
                   "--run-id", "smoke"]
        with (root / "stderr.txt").open("w") as errors:
            process = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=errors, env={
                **os.environ, "MIG_KIT_RUNS": str(root), "PYTHONPATH": path})
        assert not process.returncode, (root / "stderr.txt").read_text()[-3000:]

    return make_once("smoke-runs", run)


@pytest.fixture(scope="session")
def relatives(make_once, published, float32):
    """The random models of `published`, livelier and as transformers saves them, by model_type."""
    def save(root):
        for family, base in published.items():
            policy = loading.load_policy(base, float32, format_of(family))
            for parameter in policy.model.parameters():
                if parameter.ndim > 1:
                    parameter.data *= 4
            policy.model.generation_config = GenerationConfig(
                bos_token_id=0, eos_token_id=2, pad_token_id=0)
            policy.model.save_pretrained(root / family)
            policy.processor.save_pretrained(root / family)

    root = make_once("relatives", save)
    return {family: root / family for family in published}


@pytest.fixture
def random_model(random_folder, float32):
    return loading.load_model(random_folder, float32)


@pytest.fixture
def random_policy(random_model, processor, float32):
    return loading.Policy(random_model, processor, float32, BoxFormat())


@pytest.fixture(scope="session")
def samples():
    """One sample per task: 2 to 6 images, several sizes, with and without reference boxes."""
    return [make_sample(task, "val", 3) for task in TASKS]
