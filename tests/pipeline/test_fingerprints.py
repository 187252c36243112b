"""Images that were replaced under the same names, and files that were only copied or touched."""

import json
import shutil

import pytest
from PIL import Image

from mig_kit.common import UserError
from mig_kit.image_files import ImageStore
from mig_kit.pipeline import store
from mig_kit.pipeline.params import profile_params
from mig_kit.stages import sources


def export(folder, colour):
    """Six questions, each about a picture of this colour; new files under the old names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(6):
        path = folder / "images" / f"{number}.png"
        Image.new("RGB", (140, 112 + number), colour).save(path.with_suffix(".new"), format="PNG")
        path.with_suffix(".new").replace(path)
        lines.append({"images": [f"images/{path.name}"], "question": "Find it.", "image": 1,
                      "box": [20, 30, 51, 61], "coordinates": "pixels"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


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


def test_images_exported_again_under_their_names_are_another_run(own, tmp_path):
    assert synthesize(own) == {(255, 0, 0)}
    assert store.is_done("01_synthesize", "a", own)
    export(tmp_path / "data", "blue")
    with pytest.raises(UserError, match="stays as it is .images of data have changed"):
        store.is_done("01_synthesize", "a", own)
    assert synthesize(own | {"run_id": "b"}) == {(0, 0, 255)}


def test_images_that_are_gone_once_they_are_stored_change_nothing(own, tmp_path):
    synthesize(own)
    Image.new("RGB", (9, 9)).save(tmp_path / "data/images/other.png")  # no question names it
    assert store.is_done("01_synthesize", "a", own)
    shutil.rmtree(tmp_path / "data/images")
    assert store.is_done("01_synthesize", "a", own), "01 has stored what it needs"


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
