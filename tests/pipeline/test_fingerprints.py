"""Images that were replaced under the same names, and files that were only copied or touched."""

import json
import os

import pytest
from PIL import Image, ImageDraw

from mig_kit.image_files import ImageStore
from mig_kit.pipeline import stage_keys, store
from mig_kit.pipeline.params import profile_params
from mig_kit.stages import sources


def export(folder, colour):
    """Six questions over two images each, one with a square; new files under the old names."""
    lines = []
    for number in range(6):
        names = [f"images/{number}{letter}.png" for letter in "ab"]
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.new("RGB", (140, 112), (240, 240, 200 + number))
            if name.endswith("a.png"):
                ImageDraw.Draw(image).rectangle([20, 30, 50, 60], fill=colour)
            image.save(path.with_suffix(".new"), format="PNG")
            path.with_suffix(".new").replace(path)
        lines.append({"images": names, "question": "Find the square.", "image": 1,
                      "box": [20, 30, 51, 61], "coordinates": "pixels"})
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Parameters of 01 for questions with red squares; runs lie in tmp_path/runs."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    export(tmp_path / "data", "red")
    return profile_params("01_synthesize") | {
        "run_id": "a", "data": str(tmp_path / "data/mine.jsonl"), "teacher": "none",
        "data_shares": [0.0, 0.5, 0.5]}


def synthesize(params):
    """The colours in the middle of the first images that 01 stores."""
    stage, p = store.begin_stage("01_synthesize", params)
    sets, _ = sources.load_training_sets(p, stage.folder)
    colours = {sample.images[0].getpixel((35, 45)) for rows in sets.values() for sample in rows}
    stage.finish({})
    return colours


def test_images_exported_again_under_their_names_are_stored_again(own, tmp_path):
    assert synthesize(own) == {(255, 0, 0)}
    assert store.is_up_to_date("01_synthesize", "a", own)
    export(tmp_path / "data", "blue")
    assert not store.is_up_to_date("01_synthesize", "a", own)
    assert synthesize(own) == {(0, 0, 255)}
    assert store.is_up_to_date("01_synthesize", "a", own)


def test_a_broken_image_that_was_copied_again_is_taken(own, tmp_path):
    path = tmp_path / "data/images/3a.png"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    synthesize(own)
    folder = store.stage_folder("01_synthesize", "a")
    assert "3a.png' is cut or broken; copy it again" in (folder / "left_out.txt").read_text()
    path.write_bytes(content)
    assert not store.is_up_to_date("01_synthesize", "a", own)
    synthesize(own)
    assert "left out 0" in (folder / "left_out.txt").read_text()


def image_digest(params):
    return stage_keys.hash_named_files(params).get("images", "")


def read_no_image(path):
    assert path.name == "mine.jsonl", "known images are not read again"
    return "its digest"


def test_a_touch_a_copy_and_what_no_question_names_change_nothing(own, tmp_path, monkeypatch):
    key = image_digest(own)
    for path in (tmp_path / "data/images").iterdir():
        os.utime(path, (1, 1))
    Image.new("RGB", (9, 9)).save(tmp_path / "data/images/other.png")
    assert image_digest(own) == key
    monkeypatch.setattr(stage_keys, "file_sha256", read_no_image)
    assert image_digest(own) == key
    for path in (tmp_path / "data/images").iterdir():
        path.unlink()
    assert image_digest(own) == key, "01 has stored what it needs"
    assert image_digest(own | {"data": "scenes"}) == ""


def test_a_damaged_cache_and_odd_lines_are_no_error(own, tmp_path):
    key = image_digest(own)
    (cache,) = (tmp_path / "runs").glob(".images_*.json")
    cache.write_text("{")
    assert image_digest(own) == key
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"1")
    (tmp_path / "data/mine.jsonl").write_bytes(
        b'{"images": ["../secret.png", "' + str(secret).encode() + b'", "\xff", "a\\u0000"]}\n"')
    image_digest(own)
    assert "secret" not in cache.read_text()
    (tmp_path / "data/mine.jsonl").write_bytes(b'"' + b'\\"' * 400_000)  # a string without an end
    image_digest(own)


def test_a_large_set_counts_by_size_and_time(own, tmp_path, monkeypatch):
    monkeypatch.setattr(stage_keys, "LARGE_SET", 100)
    monkeypatch.setattr(stage_keys, "file_sha256", read_no_image)
    key = image_digest(own)
    assert key == image_digest(own)
    os.utime(tmp_path / "data/images/0a.png", (1, 1))
    assert key != image_digest(own)


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
