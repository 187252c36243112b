"""What a whole file tells: the frame and order of its boxes, and one reason that refuses much."""

import json
import random

import pytest
from data_files import GOOD, call, write_lines
from PIL import Image

from mig_kit.boxes import smart_resize

LARGE = [(1920, 1080), (4032, 3024), (1280, 1707), (2400, 1600)]
SMALL = [(640, 480), (800, 600), (512, 683), (720, 480)]
FRAMES = {
    "pixels": lambda w, h: (w, h), "percent": lambda w, h: (100, 100),
    "thousand": lambda w, h: (1000, 1000), "half": lambda w, h: (w / 2, h / 2),
    "resized": lambda w, h: smart_resize(w, h, max_pixels=1003520),
    "stretched": lambda w, h: (640, 640),
    "longest": lambda w, h: (1024 * w / max(w, h), 1024 * h / max(w, h))}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 24 photos of each list of sizes; call it with a frame for a file of boxes."""
    folder, rows = tmp_path_factory.mktemp("photos"), {}
    for key, sizes in (("large", LARGE), ("small", SMALL)):
        rng = random.Random(5)
        rows[key] = []
        for number in range(24):
            width, height = sizes[number % 4]
            Image.new("L", (width, height)).save(folder / f"{key}{number}.png")
            left, top = rng.uniform(0, 0.7), rng.uniform(0, 0.7)
            rows[key].append((f"{key}{number}.png", (width, height), [
                left, top, left + rng.uniform(0.08, 0.3), top + rng.uniform(0.08, 0.3)]))

    def write(key, frame, stated="pixels", order=lambda *box: box):
        def scale(size, box):
            return [round(value * side, 2) for value, side in zip(box, FRAMES[frame](*size) * 2)]

        lines = [{"images": [name], "question": f"Find thing {number}.", "image": 1,
                  "coordinates": stated, "box": order(*scale(size, box))}
                 for number, (name, size, box) in enumerate(rows[key])]
        return write_lines(folder, *lines)

    return write


@pytest.mark.parametrize("key, frame, stated, evidence", [
    ("large", "percent", "pixels", "all fit percent, 0 to 100"),
    ("large", "percent", "normalized_1000", "all fit percent, 0 to 100"),
    ("small", "percent", "pixels", "all fit percent, 0 to 100"),
    ("large", "thousand", "pixels", "all fit 0 to 1000 (normalized_1000)"),
    ("large", "stretched", "pixels", "all fit 0 to 640, as of images stretched to 640x640"),
    ("large", "longest", "pixels", "all fit pixels of the image with its longest side at 1024"),
    ("large", "resized", "pixels", "(--coordinates absolute --max-pixels 1003520)"),
    ("large", "half", "pixels", "they may be of smaller copies"),
    ("small", "half", "pixels", "they may be of smaller copies"),
    ("small", "pixels", "normalized_1000", "and all fit pixels"),
    ("small", "stretched", "pixels", "as 0 to 640, as of images stretched to 640x640 "),
    ("small", "longest", "pixels", "as pixels of the image with its longest side at 1024 all"),
    ("large", "pixels", "pixels", ""), ("small", "pixels", "pixels", ""),
    ("small", "thousand", "normalized_1000", ""), ("large", "thousand", "normalized_1000", "")])
def test_boxes_in_another_frame_than_stated(photos, key, frame, stated, evidence):
    text = call("check", photos(key, frame, stated))[1]
    assert evidence in text and ("remark: " in text) == bool(evidence), text


@pytest.mark.parametrize("name, order", [
    ("x, y, width, height", lambda x1, y1, x2, y2: [x1, y1, x2 - x1, y2 - y1]),
    ("centre x, centre y, width, height",
     lambda x1, y1, x2, y2: [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])])
def test_boxes_in_another_order_are_not_written(photos, tmp_path, name, order):
    path, out = photos("small", "pixels", order=order), tmp_path / "out.jsonl"
    for words in (("check", path), ("import", "own", path)):
        code, text = call(*words, "--out", out)
        assert code == 1 and "lines are refused for one reason" in text and not out.exists()
        assert f"as {name} all 24 boxes would lie in their images" in text, text


def test_boxes_with_y_first_get_a_remark(photos):
    path = photos("small", "pixels", order=lambda x1, y1, x2, y2: [y1, x1, y2, x2])
    assert "as y1, x1, y2, x2 all 24 boxes would lie in their images" in call("check", path)[1]


def test_corners_in_a_coco_file(tmp_path):
    rng, images, annotations = random.Random(3), [], []
    for number in range(20):
        Image.new("L", (640, 480)).save(tmp_path / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 640, "height": 480})
        x, y = rng.randrange(320, 500), rng.randrange(240, 400)
        annotations.append({"id": number, "image_id": number, "category_id": 1,
                            "bbox": [x, y, x + 90, y + 70]})
    (tmp_path / "coco.json").write_text(json.dumps({
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cup"}]}))
    code, text = call("import", "coco", tmp_path / "coco.json", "--out", tmp_path / "o.jsonl")
    assert code == 1 and "as two corners that were read as x, y, width, height all 20" in text


def test_images_counted_from_0(root):
    rows = [{**GOOD, "image": number % 2, "box": [10, 20, 60, 45], "question": f"Find {number}."}
            for number in range(20)]
    code, text = call("check", write_lines(root, *rows), "--out", root / "out.jsonl")
    assert code == 1 and "10 of 20 questions name image 0, so the file counts images from 0" in text
    assert not (root / "out.jsonl").exists()
    row = {**GOOD, "question": "Find in image 3 the cup of image 1."}
    assert "1 questions name an image that is not there (line 1)" in call(
        "check", write_lines(root, row))[1]


@pytest.mark.parametrize("is_upright, fits", [(False, (4, 8)), (True, (8, 4))])
def test_photos_that_are_turned_are_named_with_what_their_boxes_fit(tmp_path, is_upright, fits):
    exif, rows = Image.Exif(), []
    exif[0x0112] = 6
    for number in range(8):
        Image.new("RGB", (100, 60)).save(tmp_path / f"{number}.jpg", exif=exif)
        far = [40, 65, 55, 95] if is_upright else [65, 40, 95, 55]
        rows.append({"images": [f"{number}.jpg"], "question": f"Find {number}.", "image": 1,
                     "coordinates": "pixels", "box": far if number % 2 else [5, 5, 50, 50]})
    text = call("check", write_lines(tmp_path, *rows))[1]
    assert ("8 of 8 boxes are in photos that their EXIF data turn; boxes are of the upright "
            f"picture, which {fits[0]} of them fit, and {fits[1]} would fit the stored one") in text


@pytest.mark.parametrize("row, sentence", [
    ({**GOOD, "box": [100, 20, 160, 90]}, "(line 1 and line 2)"),
    ({**GOOD, "question": "find the  cup of image 1."}, ""),
    ({**GOOD, "image": 1, "box": [10, 20, 60, 40]}, "line 1 and"),
    ({**GOOD, "box": [12, 20, 60, 90]}, ""), ({**GOOD, "images": ["b.png", "b.png"]}, ""),
    ({**GOOD, "box": [50, 200, 300, 900], "coordinates": "normalized_1000"}, "")])
def test_questions_with_two_answers_get_a_remark(root, row, sentence):
    code, text = call("check", write_lines(root, GOOD, row))
    assert code == 0 and ("no reply is correct for both" in text) == bool(sentence), text
    assert sentence in text
