"""Importers: every format by hand, and what is left out with its place and remedy."""

import copy
import json

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from command_line import run_mig_kit
from data_files import GOOD, call, check, write_lines
from PIL import Image

from mig_kit.boxes import BoxFormat, rescale_box, seen_size
from mig_kit.data import importers, own_data
from mig_kit.data.importers import ImportRules
from mig_kit.image_files import encode_image

SWIFT = {"messages": [{"role": "system", "content": "You help."},
                      {"role": "user", "content": "<image><image>Find the <ref-object> that is "
                                                  "like <bbox> of the first image."},
                      {"role": "assistant", "content": "It is at <bbox>."}],
         "images": ["a.png", "b.png"],
         "objects": {"ref": ["cup"], "bbox": [[0, 0, 10, 10], [20, 30, 60, 90]],
                     "image_id": [0, 1]}}
LLAVA = {"id": "7", "image": "b.png", "conversations": [
    {"from": "human", "value": "<image>\nWhere is the cup?"},
    {"from": "gpt", "value": "[0.10, 0.30, 0.30, 0.90]"}]}
COCO = {"images": [{"id": 1, "file_name": "a.png", "width": 100, "height": 50},
                   {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 5, "name": "cup"}, {"id": 6, "name": "dog"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [10, 10, 20, 30]},
            {"id": 2, "image_id": 2, "category_id": 5, "bbox": [150, 10, 50, 30]},
            {"id": 3, "image_id": 2, "category_id": 6, "bbox": [0, 0, 9, 9]},
            {"id": 4, "image_id": 2, "category_id": 6, "bbox": [50, 0, 9, 9]}]}
MGROUNDING = {"images": ["./MGrounding-630k/Group/1.png", "./MGrounding-630k/Group/2.png"],
              "conversations": [
                  {"from": "human", "value": "<image>\n<image>\nWhere is "
                                             "<|object_ref_start|>a kite<|object_ref_end|>?"},
                  {"from": "gpt", "value": "It's in the second image. "
                                           "<|box_start|>(316,58),(764,999)<|box_end|>"}]}


def import_all(root, form, *records, path=None, **rules):
    """(lines of own data, sentences); the lines pass the checks of own data."""
    path = path or write_lines(root, *records, name="in.jsonl")
    converted = importers.iter_own_records(form, path, ImportRules(root, "in_file", **rules))
    lines, sentences = [], []
    for line in own_data.check_records(converted, root):
        if line.problems:
            sentences.append(f"{line.place}: {'; '.join(map(str, line.problems))}")
        else:
            lines.append(line.record)
    assert not any(check(write_lines(root, *lines, name="out.jsonl"), root))
    return lines, sentences


def changed(record, *path, to):
    """A copy of the record with another value at `path`; ... takes it out."""
    record = copy.deepcopy(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return record


def test_ms_swift(root):
    one = {"messages": [{"role": "user", "content": "Find the <ref-object>."},
                        {"role": "assistant", "content": "<bbox>"}],
           "images": [{"path": str(root / "b.png")}],
           "objects": {"ref": ["dog"], "bbox": [[0.1, 0.2, 0.3, 0.4]], "bbox_type": "norm1"}}
    lines, sentences = import_all(root, "swift", SWIFT, one)
    assert not sentences and lines[0] == {
        "id": "line-1", "images": ["a.png", "b.png"], "image": 2, "coordinates": "pixels",
        "question": "Find the cup that is like {ref} of the first image.",
        "box": [20, 30, 60, 90], "reference": [0, 0, 10, 10]}
    assert lines[1]["coordinates"] == "normalized_1" and lines[1]["images"] == ["b.png"]


def test_boxes_in_several_images_are_no_answer(root):
    record = changed(SWIFT, "messages", 2, "content", to="<bbox> and <bbox>")
    record = changed(record, "messages", 1, "content", to="<image><image>Find every <ref-object>.")
    for several in ("", "any"):
        lines, (sentence,) = import_all(root, "swift", record, several=several)
        assert not lines and "the answer has 2 boxes; add --several any" in sentence


@pytest.mark.parametrize("text", [
    "[10, 30, 60, 90]", "It is [10,30,60,90].", "<ref>cup</ref><box>(10,30),(60,90)</box>",
    "<|object_ref_start|>cup<|object_ref_end|><|box_start|>(10,30),(60,90)<|box_end|>",
    "<box>[[10, 30, 60, 90]]</box>",
    '```json\n[{"bbox_2d": [10, 30, 60, 90], "label": "cup"}]\n```'])
def test_boxes_of_one_image_in_texts(root, text):
    record = changed(LLAVA, "conversations", 1, "value", to=text)
    (line,), _ = import_all(root, "llava", record, coordinates="pixels")
    assert line["box"] == [10, 30, 60, 90] and line["image"] == 1
    assert line["question"] == "Where is the cup?"


def of_two_images(*turns):
    """A record of (question, answer) turns."""
    return {"images": ["a.png", "b.png"],
            "messages": [{"role": role, "content": text} for turn in turns
                         for role, text in zip(("user", "assistant"), turn)]}


@pytest.mark.parametrize("answer, number", [
    ('{"image": 2, "box": [1, 2, 30, 40]}', 2),
    ('<think>Look.</think><answer>{"image": 1, "box": [1, 2, 30, 40]}</answer>', 1),
    ("In the second image: [1, 2, 30, 40]", None), ("image 2: [1, 2, 30, 40]", None),
    ("[1, 2, 30, 40]", None)])
def test_an_index_says_which_of_several_images_a_box_is_in_and_no_prose_is_read(root, answer,
                                                                                number):
    record = of_two_images(("<image> and <image>: where in image 2 is it?", answer))
    lines, sentences = import_all(root, "llava", record, coordinates="pixels")
    assert [line["image"] for line in lines] == [number] * bool(number)
    assert number or "with several images an answer must say which one" in sentences[0]
    assert not lines or lines[0]["question"] == "and image 2: where in image 2 is it?"


def test_later_turns_are_left_out(root):
    record = {"image": "b.png", "messages": of_two_images(
        ("<image>Find the cup.", "[1, 2, 9, 9]"), ("And there?", "[5, 6, 30, 40]"))["messages"]}
    (line,), (sentence,) = import_all(root, "llava", record, coordinates="pixels")
    assert line["question"] == "Find the cup." and line["id"] == "line-1-turn-1"
    assert "may lean on the turns before it; write it as a question of its own" in sentence


@pytest.fixture
def unpacked(tmp_path):
    """Images of MGrounding-630k, unpacked."""
    folder = tmp_path / "MGrounding-630k/Group"
    folder.mkdir(parents=True)
    for number in (1, 2):
        Image.new("L", (200 * number, 100)).save(folder / f"{number}.png")
    return tmp_path


@pytest.mark.parametrize("answer, sentence", [
    ("", ""), ("image-2: <|box_start|>(316,58),(764,999)<|box_end|>", ""),
    ("It looks as in the first image: <|box_start|>(1,2),(3,4)<|box_end|>", "must say which"),
    ("<|box_start|>(1,2),(3,4)<|box_end|>", "must say which"),
    ("It's in the second image. <|box_start|>(1,2),(3,4)<|box_end|>, <|box_start|>(5,6),(7,8)"
     "<|box_end|>", "must say which"), ("A kite.", "no answer with a box"),
    ("It's in the fifth image. <|box_start|>(1,2),(30,40)<|box_end|>", "there are 2 images"),
    ("It's in the first image. <|box_start|>(5,2),(5,4)<|box_end|>", "x2 must be greater")])
def test_mgrounding_names_images_in_its_own_words(unpacked, answer, sentence):
    record = changed(MGROUNDING, "conversations", 1, "value", to=answer) if answer else MGROUNDING
    path = unpacked / "in.json"
    path.write_text(json.dumps([record]))
    lines, sentences = import_all(unpacked, "mgrounding", path=path)
    if sentence:
        assert not lines and sentence in sentences[0]
        return
    (sample,) = own_data.iter_samples(unpacked / "out.jsonl", unpacked)
    assert sample.question == "Where is a kite?" and sample.sizes == [(200, 100), (400, 100)]
    assert sample.targets[0].image == 2
    assert sample.targets[0].box == pytest.approx((126.4, 5.8, 305.6, 99.9))


def test_coco(root):
    path = root / "coco.json"
    path.write_text(json.dumps(COCO))
    lines, sentences = import_all(root, "coco", path=path)
    assert [line["question"] for line in lines] == ["Find the cup.", "Find the cup."]
    assert lines[0]["box"] == [10, 10, 30, 40] and lines[0]["id"] == "annotation-1"
    assert "the answer has 2 boxes; add --several any" in sentences[0]
    lines, _ = import_all(root, "coco", path=path, several="any")
    assert lines[2]["boxes"] == [[0, 0, 9, 9], [50, 0, 59, 9]]
    path.write_text(json.dumps(changed(COCO, "categories", 1, "name", to="Cup ")))
    lines, _ = import_all(root, "coco", path=path, several="any")
    assert len(lines) == 2 and len(lines[1]["boxes"]) == 3, "categories of one name are one"


@pytest.mark.parametrize("path, value, sentence", [
    (("annotations", 0, "bbox"), [1, 2, 3], "annotation 1: 'bbox' must be four numbers"),
    (("annotations", 0, "bbox"), [1, 2, 0, 4], "annotation 1: 'box' is [1.0, 2.0, 1.0, 6.0]: x2"),
    (("annotations", 0, "image_id"), 9, "annotation 1: its image_id or category_id is not in"),
    (("annotations", 0, "iscrowd"), 1, "annotation 1: a crowd has no single box"),
    (("annotations", 0, "bbox"), [90, 2, 30, 4], "annotation 1: [90.0, 2.0, 120.0, 6.0] leaves"),
    (("images", 0, "width"), 50, "the file says 50x50, the image has 100x50 pixels"),
    (("annotations",), [], "wrong.json: there is no list 'annotations'")])
def test_each_mistake_of_a_coco_file_has_its_place(root, path, value, sentence):
    (root / "wrong.json").write_text(json.dumps(changed(COCO, *path, to=value)))
    _, sentences = import_all(root, "coco", path=root / "wrong.json", several="any")
    assert any(sentence in problem for problem in sentences), sentences


def test_half_a_pixel_over_the_edge_is_cut(root):
    path = root / "edge.json"
    path.write_text(json.dumps(changed(changed(
        COCO, "annotations", 0, "bbox", to=[-0.6, -1, 30, 52]), "annotations", to=[
            {"id": 1, "image_id": 1, "category_id": 5, "bbox": [-0.6, -1, 30, 51.5]}])))
    (line,), _ = import_all(root, "coco", path=path)
    assert line["box"] == [0, 0, 29.4, 50]


def test_absolute_boxes_are_of_the_resized_image(root):
    box_format = BoxFormat(3136, 28 * 28 * 20)
    seen = seen_size((200, 100), box_format)
    box = [round(value) for value in rescale_box((20, 30, 60, 90), (200, 100), seen)]
    record = changed(LLAVA, "conversations", 1, "value", to=json.dumps({"bbox_2d": box}))
    (line,), _ = import_all(root, "llava", record, coordinates="absolute", box_format=box_format)
    assert line["box"] == pytest.approx([20, 30, 60, 90], abs=1) and line["coordinates"] == "pixels"
    (line,), _ = import_all(root, "own", {**GOOD, "box": box}, coordinates="absolute",
                            box_format=box_format)
    assert line["box"] == pytest.approx([20, 30, 60, 90], abs=1)
    code, text = call("import", "own", write_lines(root, {**GOOD, "box": box}), "--coordinates",
                      "absolute",
                      "--max-pixels", 28 * 28 * 20, "--out", root / "o.jsonl")
    assert code == 0 and "1 written" in text


@pytest.mark.parametrize("form, record, sentence", [
    ("swift", b"{", "the line is no JSON object"),
    ("swift", changed(SWIFT, "images", to=...), "a record without images"),
    ("swift", changed(SWIFT, "images", 0, to="http://x/a.png"), "an image is no path; download it"),
    ("swift", changed(SWIFT, "images", 0, to="none.png"), "'none.png' is not there"),
    ("swift", changed(SWIFT, "images", to=["a.png"]), "2 <image> tags and 1 images"),
    ("swift", changed(SWIFT, "messages", 1, "role", to="tool_call"), "other turns than of user"),
    ("swift", changed(SWIFT, "messages", 2, "content", to="Yes."), "must hold one <bbox> for"),
    ("swift", changed(SWIFT, "objects", "bbox", 0, to=[1, "x", 3, 4]), "must hold one <bbox> for"),
    ("swift", changed(SWIFT, "objects", "bbox", 0, to=[1e-9, 1, 3, 4]), "must hold one <bbox> for"),
    ("swift", changed(SWIFT, "messages", 1, "content", to="[1,2,3,4] <bbox>"), "must hold one <bb"),
    ("swift", changed(SWIFT, "objects", to="[]"), "as ms-swift 3 has it"),
    ("swift", changed(SWIFT, "objects", "image_id", to=...), "must say which image each box is in"),
    ("swift", changed(SWIFT, "objects", "image_id", to=[0, 2]), "there are 2 images"),
    ("swift", changed(SWIFT, "objects", "image_id", to=[1, 0]), "not in the first image"),
    ("swift", changed(SWIFT, "objects", "bbox_type", to="norm1000"), "another bbox_type"),
    ("swift", changed(SWIFT, "objects", "ref", to=[]), "more <ref-object> in the texts"),
    ("swift", changed(SWIFT, "objects", "bbox", 1, to=[1, 2, 900, 4]), "leaves image 2"),
    ("swift", {"problem": "Find it.", "answer": "x"}, "a record without images"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="A cup."), "no answer with a box"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="[10, 20, 30, 40]"), "outside"),
    ("llava", changed(LLAVA, "conversations", 0, "value", to="<image>"), "'question'"),
    ("llava", {"images": ["a.png"], "problem": "Find it."}, "a line of own data is {")])
def test_each_mistake_has_its_line_and_remedy(root, form, record, sentence):
    coordinates = "normalized_1" if form == "llava" else ""
    lines, (said,) = import_all(root, form, record, coordinates=coordinates)
    assert not lines and said.startswith("line 1: ") and sentence in said


@pytest.mark.parametrize("question, stripped", [
    ("<image>\n<image>\nFind it.", "Find it."), ("Find it. <image><image>", "Find it."),
    ("Is the cup of <image> in <image>?", "Is the cup of image 1 in image 2?")])
def test_tags_of_images_become_words(root, question, stripped):
    (line,), _ = import_all(root, "own", {**GOOD, "question": question})
    assert line["question"] == stripped


def test_one_split_is_taken(root):
    rows = [{**LLAVA, "split": split} for split in ("train", "val", "Train", None)]
    lines, sentences = import_all(root, "llava", *rows, coordinates="normalized_1")
    assert len(lines) == 3 and "of the split 'val'" in sentences[0]
    lines, sentences = import_all(root, "llava", *rows, coordinates="normalized_1", split="val")
    assert len(lines) == 1 and "--split asks for val, and the record has no 'split'" in (
        sentences[-1])


def test_tables_with_images_in_them(tmp_path):
    content = [encode_image(Image.new("RGB", (100, 100), colour)) for colour in ("red", "blue")]
    features = datasets.Features({
        "images": datasets.List(datasets.Image()), "question": datasets.Value("string"),
        "image": datasets.Value("int32"), "box": datasets.List(datasets.Value("float32")),
        "coordinates": datasets.Value("string"), "letter": datasets.Value("string")})
    row = {**GOOD, "images": [{"bytes": image, "path": None} for image in content], "letter": None}
    table = datasets.Dataset.from_list([row, {**row, "question": "Find the dog."}], features)
    table.to_parquet(tmp_path / "train.parquet")
    words = "import", "own", tmp_path / "train.parquet", "--out", tmp_path / "mine.jsonl"
    code, text = call(*words)
    assert code == 1 and "say with --split train that it is the part to train on" in text
    code, text = call(*words, "--split", "train")
    assert code == 0 and "2 questions, 2 correct, 0 wrong; 2 written" in text, text
    assert len(list((tmp_path / "mine_images").iterdir())) == 2
    sample, _ = own_data.iter_samples(tmp_path / "mine.jsonl", tmp_path)
    assert sample.targets == ((2, (10, 20, 60, 90)),) and sample.id == "row-1"
    assert np.array(sample.images[0])[0, 0].tolist() == [255, 0, 0]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(
        [{**row, "images": [{"bytes": b"no", "path": None}]}]), tmp_path / "bad.parquet")
    _, text = call("import", "own", tmp_path / "bad.parquet", "--out", tmp_path / "bad.jsonl",
                   "--split", "train")
    assert "the bytes of an image are none" in text


def test_the_command(root, tmp_path):
    path, out = write_lines(root, SWIFT, b"{", SWIFT), tmp_path / "own.jsonl"
    result = run_mig_kit("data", "import", "swift", str(path), "--out", str(out))
    assert result.returncode == 0 and "line 2: the line is no JSON object" in result.stdout
    assert "3 questions, 2 correct, 1 wrong; 2 written to" in result.stdout
    assert f"(image root: {root})" in result.stdout
    assert "give --coordinates" in call("import", "llava", path, "--out", out)[1]
    assert "in no folder that exists" in call("import", "swift", path, "--out", out / "no" / "b")[1]
    assert "name another file" in call("import", "swift", path, "--out", path)[1]
    out.write_text("kept")
    assert "1 wrong; nothing written" in call(
        "import", "swift", write_lines(root, b"{"), "--out", out)[1]
    assert out.read_text() == "kept" and not (tmp_path / "own.jsonl.tmp").exists()
    (root / "cut.json").write_text("[{}, ")
    assert "is cut or no JSON" in call("import", "swift", root / "cut.json", "--out", out)[1]
