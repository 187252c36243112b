"""A stage is stale when a module that it uses has changed, or an image of its data, and only then.
"""

import json
import re
import shutil

import pandas
import pytest
from PIL import Image

from mig_kit.common import NOTEBOOKS, PACKAGE
from mig_kit.image_files import ImageStore
from mig_kit.pipeline import stage_keys, store
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run
from mig_kit.stages import sources


def code_of_stages():
    return {stage: stage_keys.describe_code(stage) for stage in RECIPE}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project, whose code is looked at."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(PACKAGE, folder / "mig_kit",
                    ignore=shutil.ignore_patterns("tiny_base", "__pycache__"))
    shutil.copytree(NOTEBOOKS, folder / "notebooks", ignore=shutil.ignore_patterns("guide"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_keys, "PACKAGE", folder / "mig_kit")
        patch.setattr(stage_keys, "NOTEBOOKS", folder / "notebooks")
        yield folder


@pytest.fixture(scope="module")
def stale_after(project):
    """Call it with files and a change of their text, which it takes back: the numbers of the stages
    whose code is then another.
    """
    unchanged_code = code_of_stages()

    def compare(pattern, change) -> set[str]:
        before = {path: path.read_text() for path in project.glob(pattern)}
        for path, text in before.items():
            path.write_text(change(text))
        code = code_of_stages()
        for path, text in before.items():
            path.write_text(text)
        return {stage[:2] for stage in RECIPE if code[stage] != unchanged_code[stage]}

    return compare


def replace_text(old, new):
    def change(text):
        assert old in text, old
        return text.replace(old, new, 1)

    return change


# what a researcher changes, and the number of every stage that uses it
@pytest.mark.parametrize(("path", "text", "stages"), [
    ("drawing/palette.py", "#0072B2", "07"), ("evaluation/tables.py", "RL over SFT", "07"),
    ("prompts.py", "Think in", "00 01 02 03 04 05 06 07"),
    ("data/endpoint.py", "You are an", "01"), ("stats.py", "def pass_at_k", "04 05 06 07"),
    ("rewards.py", "floor: float = 0.1", "01 04 05 06 07"),
    ("stages/sft.py", "completion_only", "02"), ("stages/sanity_checks.py", "0.9", ""),
    ("pipeline/store.py", "started.json", "")])
def test_a_changed_module_makes_exactly_its_users_stale(stale_after, path, text, stages):
    stale = stale_after(f"mig_kit/{path}", replace_text(text, f"{text[:-1]}5"))
    assert stale == set(stages.split())


def test_docstrings_comments_and_layout_do_not_count(stale_after):
    def change_words(text):
        text = re.sub(r'(:\n +""")', r"\1Other words. ", text)
        return "# a comment\n\n" + text.replace("\ndef ", "\n# a comment\n\ndef ")

    assert "Other words" in change_words((PACKAGE / "stages" / "sft.py").read_text())
    assert stale_after("mig_kit/**/*.py", change_words) == set()


@pytest.mark.parametrize(("old", "new", "stages"), [
    ('"stage, p =', '"# why\\n", "stage, p =', ""), ("## 1.", "## One.", ""),
    ("lora_r: int = 83", "lora_r: int = 16", ""), ("samples[:64]", "samples[:32]", "02")])
def test_code_of_a_notebook_counts_but_no_text_comment_or_default(stale_after, old, new, stages):
    stale = stale_after("notebooks/02_sft.ipynb", replace_text(old, new))
    assert stale == set(stages.split())


def test_what_is_not_part_of_a_key_exists():
    for name in stage_keys.NOT_PART_OF_A_KEY:
        path = PACKAGE.joinpath(*name.split(".")[1:-1])
        assert path.is_dir() or path.with_suffix(".py").is_file(), f"{name} was renamed"


def write_escaped(lines, path):
    """As PHP and pandas write JSON lines."""
    path.write_text("".join(json.dumps(line).replace("/", "\\/") + "\n" for line in lines))


def write_parquet(lines, path):
    pandas.DataFrame(lines).to_parquet(path)


def export(folder, colour, write=write_escaped):
    """Six questions, each about a picture of this colour; new files under the old names."""
    (folder / "größe").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(6):
        path = folder / "größe" / f"{number}.png"
        Image.new("RGB", (140, 112 + number), colour).save(path.with_suffix(".new"), format="PNG")
        path.with_suffix(".new").replace(path)
        lines.append({"images": [f"größe/{path.name}"], "question": "Find it.", "image": 1,
                      "box": [20, 30, 51, 61], "coordinates": "pixels"})
    write(lines, folder / "mine.jsonl")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Parameters of 01 for questions about red pictures; runs lie in tmp_path/runs."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    export(tmp_path / "data", "red")
    return profile_params("01_synthesize") | {
        "run_id": "a", "data": str(tmp_path / "data/mine.jsonl"), "teacher": "none",
        "data_shares": [0.0, 0.5, 0.5]}


def synthesize(params):
    """The colours of the images that 01 stores."""
    stage, p = store.begin_stage("01_synthesize", params)
    sets, _ = sources.load_training_sets(p, stage.folder)
    colours = {sample.images[0].getpixel((0, 0)) for rows in sets.values() for sample in rows}
    stage.finish({})
    return colours


@pytest.mark.parametrize("write", [write_escaped, write_parquet])
def test_images_exported_again_under_their_names_are_another_run(own, tmp_path, write):
    export(tmp_path / "data", "red", write)
    assert synthesize(own) == {(255, 0, 0)}
    assert store.is_done(Run("a"), "01_synthesize", own)
    export(tmp_path / "data", "blue", write)
    assert store.is_done(Run("a"), "01_synthesize", own)
    assert Run("a").describe_marks("01_synthesize") == [
        "stale (01_synthesize: images of data have changed)"]
    assert synthesize(own | {"run_id": "b"}) == {(0, 0, 255)}


def test_images_that_are_gone_once_they_are_stored_change_nothing(own, tmp_path):
    synthesize(own)
    Image.new("RGB", (9, 9)).save(tmp_path / "data/größe/other.png")  # no question names it
    assert store.is_done(Run("a"), "01_synthesize", own)
    shutil.rmtree(tmp_path / "data/größe")
    assert store.is_done(Run("a"), "01_synthesize", own), "01 has stored what it needs"


def test_a_stored_link_whose_source_was_overwritten_is_not_taken_for_the_old_image(tmp_path):
    """Killed, exported over in place, and an old picture comes back under another name."""
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    Image.new("RGB", (9, 8), "red").save(first)
    red = first.read_bytes()
    stored = ImageStore(tmp_path / "images").add(first)
    Image.new("RGB", (9, 8), "blue").save(first)  # in place: the link changes, too
    second.write_bytes(red)
    again = ImageStore(tmp_path / "images").add(second)
    assert again == stored and again.open().getpixel((0, 0)) == (255, 0, 0)


def test_a_file_of_rewards_is_called_by_its_name():
    facts = {"parameter": {}, "cells": "", "images": "", "input": {},
             "code": {"mig_kit.rewards": 1}, "file": {"my_rewards.py:brief": 1}}
    now = facts | {"code": {"mig_kit.rewards": 2}, "file": {"my_rewards.py:brief": 2}}
    assert stage_keys.describe_change(facts, now) == (
        "my_rewards.py:brief has changed; rewards has changed")
