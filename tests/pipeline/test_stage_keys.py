"""A stage is stale when a module that it uses has changed, and only then."""

import re
import shutil

import pytest

from mig_kit.common import NOTEBOOKS, PACKAGE
from mig_kit.pipeline import stage_keys
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


def change_text(project, path, old, new):
    file = project / path
    assert old in file.read_text(), f"{path} has no {old}"
    file.write_text(file.read_text().replace(old, new, 1))


# what a researcher changes, and the number of every stage that uses it
@pytest.mark.parametrize(("path", "text", "stages"), [
    ("drawing/palette.py", "#0072B2", "07"), ("stages/tables.py", "RL over SFT", "07"),
    ("prompts.py", "Think in", "00 01 02 03 04 05 06 07"),
    ("data/endpoint.py", "You are an", "01"), ("stats.py", "def pass_at_k", "04 05 06 07"),
    ("rewards.py", "floor: float = 0.1", "01 04 05 06 07"),
    ("stages/sft.py", "completion_only", "02"), ("stages/sanity_checks.py", "0.9", ""),
    ("pipeline/store.py", "started.json", "")])
def test_a_changed_module_makes_exactly_its_users_stale(stale_after, path, text, stages):
    stale = stale_after(change_text, f"mig_kit/{path}", text, f"{text[:-1]}5")
    assert stale == set(stages.split())


def test_docstrings_comments_and_layout_do_not_count(stale_after):
    def change_words(project):
        for path in (project / "mig_kit").rglob("*.py"):
            text = re.sub(r'(:\n +""")', r"\1Other words. ", path.read_text())
            path.write_text("# a comment\n\n" + text.replace("\ndef ", "\n# a comment\n\ndef "))
        assert "Other words" in (project / "mig_kit" / "stages" / "sft.py").read_text()

    assert stale_after(change_words) == set()


@pytest.mark.parametrize(("old", "new", "stages"), [
    ('"stage, p =', '"# why\\n", "stage, p =', ""), ("## 1.", "## One.", ""),
    ("lora_r: int = 83", "lora_r: int = 16", ""), ("samples[:64]", "samples[:32]", "02")])
def test_code_of_a_notebook_counts_but_no_text_comment_or_default(stale_after, old, new, stages):
    stale = stale_after(change_text, "notebooks/02_sft.ipynb", old, new)
    assert stale == set(stages.split())


def test_what_is_not_part_of_a_key_exists():
    for name in stage_keys.NOT_PART_OF_A_KEY:
        path = PACKAGE.joinpath(*name.split(".")[1:-1])
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{name} was renamed"
