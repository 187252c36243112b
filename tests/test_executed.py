"""Executed notebooks: cells are those of the notebooks, outputs those of one run."""

import importlib.util
import json
import re

import nbformat
import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, SHIPPED, file_sha256, model_folder
from mig_kit.evaluation.evaluate import draw_test_samples
from mig_kit.models import loading
from mig_kit.models.adapters import WEIGHTS
from mig_kit.pipeline.run_facts import MODELS
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.serving.reply_files import greedy_replies

FOLDER = NOTEBOOKS / "executed"
FACTS = json.loads((FOLDER / "run.json").read_text())
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|tmp|work|Users|mnt|opt)/")
needs_adapters = pytest.mark.skipif(
    not model_folder("tiny/grpo").is_dir(), reason="no adapters yet; make executed ships them")


def load_tool():
    spec = importlib.util.spec_from_file_location("executed", PROJECT_ROOT / ".ci" / "executed.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def cells_of(path):
    """But those of parameters: the present one may have more, and the run had values of its own."""
    return [(cell.cell_type, cell.source) for cell in nbformat.read(path, 4).cells
            if not {"parameters", "injected-parameters"} & {*cell.metadata.get("tags", ())}]


def test_they_are_all_of_one_run():
    assert list(FACTS) == [*RECIPE, *load_tool().LESSONS]
    assert len({record["run_id"] for record in FACTS.values()}) == 1


@pytest.mark.parametrize("stage", FACTS)
def test_an_executed_notebook_is_what_a_run_left(stage):
    """Made again by make executed; a patched output or another cell fails."""
    path = FOLDER / f"{stage}.ipynb"
    tool = load_tool()
    present = [(kind, tool.move_links(text) if kind == "markdown" else text)
               for kind, text in cells_of(NOTEBOOKS / path.name)]
    assert cells_of(path) == present, "make executed-texts"
    notebook = nbformat.read(path, 4)
    assert tool.outputs_digest(notebook) == FACTS[stage]["outputs"]
    pictures = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            assert "Empty DataFrame" not in output.get("data", {}).get("text/plain", "")
            if picture := output.get("data", {}).get("image/png"):
                pictures.append(picture)
                output.data["image/png"] = ""
    assert len({*pictures}) == len(pictures), "a picture is shown twice"
    assert not MACHINE_PATH.search(nbformat.writes(notebook))


def test_the_adapters_that_ship_are_the_runs():
    for model, (trained_by, _) in load_tool().MADE_BY.items():
        path = model_folder(model) / WEIGHTS
        assert FACTS[trained_by].get("adapter") == (path.is_file() and file_sha256(path) or None)
        for config in path.parent.glob("*.json"):
            assert not MACHINE_PATH.search(config.read_text())


@needs_adapters
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="rounds otherwise")
def test_shipped_models_are_merged_to_the_runs_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for model, (_, merged_by) in load_tool().MADE_BY.items():
        weights = loading.resolve_model(model) / load_tool().MERGED
        assert file_sha256(weights) == FACTS[merged_by]["weights"]


@needs_adapters
@pytest.mark.slow
def test_shipped_models_reply_as_in_the_run():
    asked = json.loads((FOLDER / "replies.json").read_text())
    samples = [sample for part in draw_test_samples(asked).values() for sample in part]
    hardware = loading.choose_hardware("float32", "cpu")
    for system, name in zip(MODELS, SHIPPED):
        policy = loading.load_policy(loading.resolve_model(name), hardware, BoxFormat())
        replies = greedy_replies(policy, samples, asked["max_new_tokens"])
        assert dict(zip([sample.id for sample in samples], replies)) == asked["replies"][system]
