"""MGrounding-630k as own data, and the guide's scripts for other formats."""

import json
import re

import pytest
from data_files import call, check, write_lines
from PIL import Image

from mig_kit.common import NOTEBOOKS
from mig_kit.data import importers, own_data

SCRIPTS = re.findall(r"```python\n(.*?)```", (NOTEBOOKS / "guide/own_data.md").read_text(), re.S)
COCO = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 50},
                   {"id": 2, "file_name": "b.png", "width": 200, "height": 100}],
        "categories": [{"id": 5, "name": "cup"}, {"id": 6, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [-0.6, 10, 20.6, 40.5]},
            {"id": 2, "image_id": 2, "category_id": 6, "bbox": [0, 0, 9, 9]},
            {"id": 3, "image_id": 2, "category_id": 6, "bbox": [50, 0, 9, 9]},
            {"id": 4, "image_id": 2, "category_id": 5, "bbox": [1, 1, 9, 9], "iscrowd": 1}]}


def talk(images, *turns, key="conversations"):
    names = ("from", "value") if key == "conversations" else ("role", "content")
    return {"images": images, key: [dict(zip(names, (role, text))) for turn in turns
                                    for role, text in zip(("human", "gpt"), turn)]}


KITE = "<image>\n<image>\nWhere is <|object_ref_start|>a kite<|object_ref_end|>?"
FOUND = "It's in the second image. <|box_start|>(316,58),(764,999)<|box_end|>"
NAMES = ["./MGrounding-630k/Group/1.png", "./MGrounding-630k/Group/2.png"]


@pytest.fixture
def unpacked(tmp_path):
    """Images of MGrounding-630k, unpacked."""
    folder = tmp_path / "MGrounding-630k/Group"
    folder.mkdir(parents=True)
    for number in (1, 2):
        Image.new("L", (200 * number, 100)).save(folder / f"{number}.png")
    return tmp_path


def import_one(root, record):
    (root / "in.json").write_text(json.dumps([record]))
    (line,) = own_data.check_records(importers.iter_mgrounding(root / "in.json"), root)
    return line


@pytest.mark.parametrize("question, answer, words", [
    (KITE, FOUND, "Where is a kite?"),
    (KITE, FOUND.replace("It's in the second image.", "image-2:"), "Where is a kite?"),
    ("<image>\nIs the kite of <image> here?", FOUND, "Is the kite of image 2 here?")])
def test_mgrounding(unpacked, question, answer, words):
    sample = import_one(unpacked, talk(NAMES, (question, answer), ("And there?", FOUND))).sample
    assert sample.question == words and sample.sizes == [(200, 100), (400, 100)]
    ((image, box),) = sample.targets
    assert image == 2 and box == pytest.approx((126.4, 5.8, 305.6, 99.9))


@pytest.mark.parametrize("record, sentence", [
    (talk(NAMES, (KITE, f"As in the first image: {FOUND[26:]}")), "must name the image before"),
    (talk(NAMES, (KITE, FOUND[26:])), "must name the image before"),
    (talk(NAMES, (KITE, f"{FOUND}, {FOUND}")), "another number of boxes than one"),
    (talk(NAMES, (KITE, "A kite.")), "another number of boxes than one"),
    (talk(NAMES, (KITE, FOUND.replace("second", "fifth"))), "there are 2 images"),
    (talk(NAMES, (KITE, FOUND.replace("999", "58"))), "x2 must be greater"),
    (talk(NAMES, (f"{KITE} {FOUND}", FOUND)), "a box in the question"),
    (talk(NAMES[:1], (KITE, FOUND)), "images that its question does not show"),
    (talk(["none.png"] * 2, (KITE, FOUND)), "none.png' is not there"),
    ({"images": NAMES}, "no 'images' and 'conversations'"), (3, "the record is no JSON object")])
def test_a_record_of_mgrounding_that_is_left_out(unpacked, record, sentence):
    assert sentence in "; ".join(map(str, import_one(unpacked, record).problems))


def test_the_command(unpacked):
    path, out = unpacked / "in.json", unpacked / "own.jsonl"
    path.write_text(json.dumps([talk(NAMES, (KITE, FOUND)), {}]))
    code, text = call("import", "mgrounding", path, "--out", out)
    assert code == 0 and "record 2: no 'images'" in text and not any(check(out, unpacked))
    assert f"2 records, 1 correct, 1 wrong; 1 written to {out} (image root: {unpacked})" in text
    for name, sentence in ((path, "name another file"), (out / "no" / "b", "cannot be written")):
        assert sentence in call("import", "mgrounding", path, "--out", name)[1]
    path.write_text("[{}]")
    code, text = call("import", "mgrounding", path, "--out", out)
    assert code == 1 and "nothing written" in text and out.read_text(), "the old file stays"
    path.write_text("[{}, ")
    assert "in.json is cut or broken (" in call("import", "mgrounding", path, "--out", out)[1]


def run_script(number, root, monkeypatch):
    """The lines that a script of the guide writes, which are correct."""
    monkeypatch.chdir(root)
    exec(compile(SCRIPTS[number], "own_data.md", "exec"), {})
    path = root / "mine.jsonl"
    assert not any(check(path, root)), check(path, root)
    return list(map(json.loads, path.read_text().splitlines()))


def test_the_guides_script_for_coco(root, monkeypatch):
    (root / "instances.json").write_text(json.dumps(COCO))
    cup, dog = run_script(0, root, monkeypatch)
    assert cup == {"images": ["a.png"], "question": "Find the cup.", "image": 1,
                   "boxes": [[0, 10, 20, 50]], "coordinates": "pixels"}
    assert dog["boxes"] == [[0, 0, 9, 9], [50, 0, 59, 9]]
    far, turned = ({**COCO["annotations"][0], **change} for change in (
        {"bbox": [-40, 10, 60, 40]}, {"attributes": {"rotation": 30.0}}))
    (root / "instances.json").write_text(json.dumps(COCO | {"annotations": [far, turned]}))
    exec(compile(SCRIPTS[0], "own_data.md", "exec"), {})
    line, = map(json.loads, (root / "mine.jsonl").read_text().splitlines())
    assert line["boxes"] == [[-40, 10, 20, 50]], "data check names it"


def test_the_guides_script_for_conversations(root, monkeypatch, capsys):
    both, where = ["a.png", "b.png"], "<image>Where is it?"
    with_system = talk(both, (where, '<answer>{"image": 2, "box": [1, 2, 30, 40]}</answer>'),
                       ("And there?", "[5, 6, 7, 8]"), key="messages")
    with_system["messages"].insert(0, {"role": "system", "content": "Find boxes."})
    write_lines(root, json.dumps([
        {"id": "7", "image": "b.png"} | {"conversations": talk([], (where, "<ref>It</ref><box>(100,"
                                                               "300),(200,900)</box>"))[
            "conversations"]},
        with_system,
        talk(both, (where, "[1, 2, 30, 40]")), talk(["a.png"], (where, "[1,2,3,4],[5,6,7,8]")),
        talk(["a.png"], (f"{where} [1,2,3,4]", "[1,2,3,4]")), talk([], ("No image", "[1,2,3,4]"))
    ]).encode(), name="train.json")
    first, second = run_script(1, root, monkeypatch)
    assert first == {"images": ["b.png"], "question": "Where is it?", "image": 1,
                     "box": [100, 300, 200, 900], "coordinates": "normalized_1000"}
    assert (second["question"], second["image"], second["box"]) == (
        "Where is it?", 2, [1, 2, 30, 40])
    assert capsys.readouterr().out == "4 records left out\n"
