"""A stage is stale when a definition that it uses has changed, and only then."""

import ast
import json
import re
import shutil

import pytest

from mig_kit.common import NOTEBOOKS, PACKAGE
from mig_kit.pipeline import run_folders, stage_keys
from mig_kit.pipeline.run_folders import RECIPE


@pytest.fixture(scope="module")
def copied_project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PACKAGE, folder / "mig_kit",
                    ignore=shutil.ignore_patterns("tiny_base", "__pycache__"))
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns("guide"))
    return folder


@pytest.fixture
def project(copied_project, monkeypatch):
    """The copy, whose code is looked at; what a test changes in it is put back."""
    monkeypatch.setattr(stage_keys, "PACKAGE", copied_project / "mig_kit")
    monkeypatch.setattr(stage_keys, "NOTEBOOKS", copied_project / "notebooks")
    yield copied_project
    for folder, original in (("mig_kit", PACKAGE), ("notebooks", NOTEBOOKS)):
        for path in (copied_project / folder).rglob("*.*"):
            source = original / path.relative_to(copied_project / folder)
            if path.is_file() and path.stat().st_mtime_ns != source.stat().st_mtime_ns:
                shutil.copy2(source, path)


def code_of_stages():
    return {stage: stage_keys.describe_code(stage) for stage in RECIPE}


@pytest.fixture(scope="module")
def unchanged_code():
    return code_of_stages()


@pytest.fixture
def stale_after(unchanged_code, project):
    """Call it with a change of the project: the numbers of the stages whose code is now another."""
    def compare(change, *arguments) -> set[str]:
        change(project, *arguments)
        code = code_of_stages()
        return {stage[:2] for stage in RECIPE if code[stage] != unchanged_code[stage]}

    return compare


def change_definition(project, name):
    """Add a statement to the function, or to the first method of the class."""
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


# what a researcher changes, and the number of every stage that uses it
@pytest.mark.parametrize(("path", "text", "stages"), [
    ("drawing/palette.py", "#0072B2", "07"), ("stages/report.html.jinja", "</div", "07"),
    ("prompts.py", "Think in", "01 02 03 04 05 06 07"), ("data/endpoint.py", "You are an", "01"),
    ("stages/tables.py", "RL over SFT", "07")])
def test_a_changed_text_makes_exactly_its_users_stale(stale_after, path, text, stages):
    stale = stale_after(change_text, f"mig_kit/{path}", re.escape(text), f"{text[:-1]}_")
    assert stale == set(stages.split())


@pytest.mark.parametrize(("name", "stages"), [
    ("box_reward", "05 07"), ("names_letter", "04 05 06 07"), ("names_image", "01 05 06 07"),
    ("keep_good_traces", "01"), ("pass_at_k", "04 06"), ("plot_curves", "07"),
    ("stage_folder", ""), ("CompletionLossTrainer", "02"), ("attention", "00 02 03 04 05 06"),
    ("smart_resize", "01 02 03 04 05 06 07"), ("grpo_trainer", "05"), ("render_scene", "01 06 07"),
    ("check_box_coordinates", "")])
def test_a_changed_function_makes_exactly_its_users_stale(stale_after, name, stages):
    assert stale_after(change_definition, name) == set(stages.split())


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


@pytest.mark.parametrize(("number", "old", "new", "stages"), [
    ("02", "\n\nstage, p =", "\n# why\nstage, p =", ""),
    ("02", "lora_r: int = 83", "lora_r: int = 16", ""),
    ("02", "samples[:64]", "samples[:32]", ""),  # of a cell tagged lesson
    ("05", "smooth=10", "smooth=9", ""),  # of a cell tagged picture
    ("05", "training_curves(state", "training_curves(the_state", "05")])
def test_code_of_a_notebook_counts_but_not_its_comments_and_defaults(stale_after, number, old, new,
                                                                     stages):
    stage = next(stage for stage in RECIPE if stage.startswith(number))
    assert stale_after(change_cell, stage, old, new) == set(stages.split())


def test_what_is_not_part_of_a_key_exists():
    for name in stage_keys.NOT_PART_OF_A_KEY:
        path = PACKAGE.joinpath(*name.split(".")[1:])
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{name} was renamed"


def assigned_and_used(cell):
    """(names that a cell assigns, names that it takes from earlier cells)."""
    assigned, used = set(), set()
    for statement in stage_keys._parse("".join(cell["source"])).body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        is_simple = isinstance(statement, ast.Assign | ast.AugAssign | ast.AnnAssign)
        local = {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)
                 and not isinstance(node.ctx, ast.Load)} if is_simple else stored
        used |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - local - assigned
        assigned |= stored | {alias.asname or alias.name for node in ast.walk(statement)
                              if isinstance(node, ast.Import | ast.ImportFrom)
                              for alias in node.names}
        assigned |= {node.name for node in ast.walk(statement)
                     if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return assigned, used


@pytest.mark.parametrize("stage", run_folders.STAGES)
def test_no_cell_that_counts_uses_what_a_picture_or_a_lesson_assigns(stage):
    outside = {}  # name -> the cell outside the key that assigned it last
    for cell in stage_keys.notebook_cells(stage):
        assigned, used = assigned_and_used(cell)
        tags = set(cell["metadata"].get("tags", ()))
        if tags & {"picture", "lesson"}:
            outside |= dict.fromkeys(assigned, cell["id"])
            assert not re.search(r"\b(finish|write_(text|json|samples)|save|savefig|unlink)\(",
                                 "".join(cell["source"])), "a result of the stage"
            continue
        if "parameters" not in tags:
            wrong = {name: outside[name] for name in used & outside.keys()}
            assert not wrong, f"cell {cell['id']} uses what cells outside the key assign: {wrong}"
        outside = {name: number for name, number in outside.items() if name not in assigned}
