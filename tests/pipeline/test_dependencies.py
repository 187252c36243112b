"""A stage is stale when a definition that it uses has changed, and only then."""

import ast
import json
import re
import shutil

import pytest

from mig_kit.common import PACKAGE, PROJECT_ROOT
from mig_kit.pipeline import dependencies, store


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the package and the notebooks whose code is looked at."""
    shutil.copytree(PACKAGE, tmp_path / "mig_kit",
                    ignore=shutil.ignore_patterns("tiny_base", "__pycache__"))
    shutil.copytree(PROJECT_ROOT / "notebooks", tmp_path / "notebooks")
    monkeypatch.setattr(dependencies, "PACKAGE", tmp_path / "mig_kit")
    monkeypatch.setattr(dependencies, "PROJECT_ROOT", tmp_path)
    return tmp_path


def code_of_stages():
    return {stage: (dependencies.used_definitions(stage), dependencies.notebook_code(stage))
            for stage in store.RECIPE}


@pytest.fixture(scope="module")
def unchanged_code():
    """The code of every stage of the recipe, as it is."""
    return code_of_stages()


@pytest.fixture
def stale_after(unchanged_code, project):
    """Call it with a change of the project: the stages of the recipe whose code is now another."""
    def compare(change, *arguments) -> set[str]:
        change(project, *arguments)
        code = code_of_stages()
        return {stage for stage in store.RECIPE if code[stage] != unchanged_code[stage]}

    return compare


def test_a_copy_of_the_project_has_the_same_code(stale_after):
    assert stale_after(lambda project: None) == set()


def change_definition(project, name):
    """Add a statement to the function of that name, or to the first method of the class."""
    pattern = re.compile(rf"^(?:async def|def|class) {name}\b", re.MULTILINE)
    modules = (project / "mig_kit").rglob("*.py")
    paths = [path for path in modules if pattern.search(path.read_text())]
    assert len(paths) == 1, f"{len(paths)} modules define {name}"
    lines = paths[0].read_text().splitlines(keepends=True)
    definitions = {node.name: node for node in ast.parse("".join(lines)).body
                   if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    node = definitions[name]
    if isinstance(node, ast.ClassDef):
        node = next(part for part in node.body if isinstance(part, ast.FunctionDef))
    last = node.body[-1]
    lines.insert(last.lineno - 1, " " * last.col_offset + "changed = True\n")
    paths[0].write_text("".join(lines))


def change_text(project, path, pattern, replacement):
    file = project / path
    text, count = re.subn(pattern, replacement, file.read_text(), count=1)
    assert count, f"{path} has no {pattern}"
    file.write_text(text)


def test_a_template_makes_its_stage_stale(stale_after):
    template = "mig_kit/stages/report.html.jinja"
    assert stale_after(change_text, template, "</", " </") == {"07_report"}


# what a researcher changes, and the number of every stage that uses it
USERS_OF_TEXT = (
    ("a colour", "mig_kit/palette.py", "#0072B2", "07"),
    ("the wording of the prompt", "mig_kit/prompts.py", "Think in", "01 02 03 04 05 06 07"),
    ("what a model teacher is told", "mig_kit/data/teacher_prompt.py", "You are", "01"),
    ("the words of a comparison", "mig_kit/stages/report.py", "RL over SFT", "07"),
)
USERS_OF_FUNCTION = (
    ("format_reward", "05 07"), ("image_reward", "05 07"), ("choice_reward", "05 07"),
    ("box_reward", "05 07"), ("names_letter", "04 05 06 07"),
    ("names_target_image", "05 06 07"), ("reply_iou", "01 04 05 06 07"),
    ("cites_only_existing_images", "05 07"),
    ("keep_good_traces", "01"), ("pass_at_k", "04 06"), ("bootstrap_interval", "06 07"),
    ("plot_curves", "07"), ("stage_folder", "07"))


@pytest.mark.parametrize(("label", "path", "text", "stages"), USERS_OF_TEXT)
def test_a_changed_text_makes_exactly_its_users_stale(stale_after, label, path, text, stages):
    stale = stale_after(change_text, path, re.escape(text), f"{text[:-1]}_")
    assert {stage[:2] for stage in stale} == set(stages.split())


@pytest.mark.parametrize(("name", "stages"), USERS_OF_FUNCTION)
def test_a_changed_function_makes_exactly_its_users_stale(stale_after, name, stages):
    stale = stale_after(change_definition, name)
    assert {stage[:2] for stage in stale} == set(stages.split())


@pytest.mark.parametrize("name", [
    "load_qlora_policy", "CompletionLossTrainer", "load_policy", "StillImageProcessor",
    "train_or_resume", "pad_to_multiple", "attention", "chat_messages", "smart_resize"])
def test_fine_tuning_is_stale_when_code_that_it_uses_has_changed(stale_after, name):
    assert "02_sft" in stale_after(change_definition, name)


@pytest.mark.parametrize("name", [
    "grpo_trainer", "merge_adapter", "reply_iou", "check_box_coordinates", "begin_stage"])
def test_fine_tuning_is_not_stale_when_other_code_has_changed(stale_after, name):
    assert "02_sft" not in stale_after(change_definition, name)


def test_a_scene_drawn_otherwise_makes_the_data_stale(stale_after):
    stale = stale_after(change_definition, "draw_scene")
    assert "01_synthesize" in stale and not stale & {"02_sft", "03_merge", "05_grpo"}


def test_docstrings_comments_and_layout_do_not_count(stale_after):
    def change_words(project):
        for path in (project / "mig_kit").rglob("*.py"):
            text = re.sub(r'(:\n +""")', r"\1Other words. ", path.read_text())
            path.write_text("# a comment\n\n" + text.replace("\ndef ", "\n# a comment\n\ndef "))
        assert "Other words" in (project / "mig_kit" / "stages" / "sft.py").read_text()

    assert stale_after(change_words) == set()


def change_cell(project, stage, old, new):
    path = project / "notebooks" / f"{stage}.ipynb"
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and old in source:
            cell["source"] = source.replace(old, new, 1)
            path.write_text(json.dumps(notebook))
            return
    raise AssertionError(f"{stage} has no cell with {old}")


def test_code_of_a_notebook_counts_but_not_its_comments_and_defaults(stale_after):
    assert stale_after(change_cell, "02_sft", "\n\nstage, p =", "\n# why\nstage, p =") == set()
    assert stale_after(change_cell, "02_sft", "lora_r: int = 32", "lora_r: int = 16") == set()
    assert stale_after(change_cell, "02_sft", "samples[:64]", "samples[:32]") == {"02_sft"}


def write_small_project(folder, modules, cell):
    (folder / "mig_kit").mkdir()
    (folder / "notebooks").mkdir()
    for name, text in modules.items():
        (folder / "mig_kit" / f"{name}.py").write_text(text)
    cells = [{"cell_type": "markdown", "source": ["from mig_kit.a import unused"], "metadata": {}},
             {"cell_type": "code", "source": [cell], "metadata": {}}]
    (folder / "notebooks" / "01_small.ipynb").write_text(json.dumps({"cells": cells}))


def test_used_definitions_of_a_small_package(tmp_path, monkeypatch):
    monkeypatch.setattr(dependencies, "PACKAGE", tmp_path / "mig_kit")
    monkeypatch.setattr(dependencies, "PROJECT_ROOT", tmp_path)
    write_small_project(tmp_path, {
        "a": '"""A module."""\nfrom mig_kit import b\nfrom mig_kit.c import passed_on\n'
             "SIZE, OTHER = 1, 2\ndef used():\n    return b.helper(SIZE)\n"
             "def unused():\n    return b.other_helper()\n",
        "b": "TABLE = {}\ndef helper(n):\n    from mig_kit.c import late\n    return late(TABLE)\n"
             "def other_helper():\n    pass\nTABLE['x'] = 1\n",
        "c": "from library import register\ndef late(n):\n    return n\ndef passed_on():\n"
             "    return 3\ndef hook():\n    pass\nregister(hook)\n",
    }, "%matplotlib inline\nfrom mig_kit import a\nfor x in a.used():\n    a.passed_on(await x)")
    assert list(dependencies.used_definitions("01_small")) == [
        "mig_kit.a.OTHER", "mig_kit.a.SIZE", "mig_kit.a.passed_on", "mig_kit.a.used",
        "mig_kit.b.TABLE", "mig_kit.b.helper", "mig_kit.c.<body>", "mig_kit.c.hook",
        "mig_kit.c.late", "mig_kit.c.passed_on"]


@pytest.mark.parametrize("stage", store.STAGES)
def test_every_name_that_a_notebook_takes_from_the_kit_exists(stage):
    source = "\n".join("".join(cell["source"]) for cell in dependencies.notebook_cells(stage))
    tree = dependencies._parse(source)
    references = dependencies._references(tree, dependencies._imports(tree))
    missing = [f"{module}.{name}" for module, name in sorted(references)
               if name not in dependencies._definitions(dependencies._module_path(module))]
    assert references and not missing
