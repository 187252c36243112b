"""Importers: every format by hand, every mistake with its place and remedy."""

import copy
import json

import pyarrow.parquet
import pytest
from click.testing import CliRunner
from command_line import run_mig_kit
from data_files import call, write_lines
from PIL import Image

from mig_kit.commands.data import import_command
from mig_kit.data import importers, line_checks, own_data
from mig_kit.data.records import ImportRules

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
            {"id": 2, "image_id": 2, "category_id": 5, "bbox": [150, 10, 50.5, 30]},
            {"id": 3, "image_id": 2, "category_id": 6, "bbox": [0, 0, 9, 9]},
            {"id": 4, "image_id": 2, "category_id": 6, "bbox": [50, 0, 9, 9]}]}
REF = {"ref_id": 0, "ann_id": 2, "image_id": 2, "split": "train",
       "sentences": [{"sent": "the left cup"}, {"sent": "cup by the door"}]}
VLM_R1 = {"image": "b.png", "normal_caption": "the lady", "solution": [10.5, 20, 60, 90]}


@pytest.fixture(scope="module")
def root(root):
    (root / "coco.json").write_text(json.dumps(COCO))
    return root


def write(root, *records):
    return write_lines(root, *records, name="in.jsonl")


def import_all(root, form, path, coordinates="", padded=False, several="", instances=None):
    """(lines of own data, sentences); the lines pass the checks of own data."""
    sentences, out = [], root / "out.jsonl"
    rules = ImportRules(root, coordinates, padded, several, instances)
    if out != path:
        out.unlink(missing_ok=True)
    report = importers.import_file(form, path, out, rules, sentences.append)
    assert out.exists() == bool(report.kept)
    lines = []
    if out.exists():
        assert all(not problems for _, problems in own_data.check_file(out, root))
        lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert report.read == len(lines) + len(sentences) and report.kept == len(lines)
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
    old = {"query": "Find the <ref-object>.", "response": "<bbox>", "images": ["b.png"],
           "objects": {"ref": ["dog"], "bbox": [[1, 2, 3, 4]]}}
    lines, sentences = import_all(root, "swift", write(root, SWIFT, one, old))
    assert not sentences and lines[0] == {
        "id": "line-1", "images": ["a.png", "b.png"], "image": 2, "coordinates": "pixels",
        "question": "Find the cup that is like {ref} of the first image.",
        "box": [20, 30, 60, 90], "reference": [0, 0, 10, 10]}
    assert lines[1]["coordinates"] == "normalized_1" and lines[1]["images"] == ["b.png"]
    assert lines[2]["question"] == "Find the dog." and lines[2]["box"] == [1, 2, 3, 4]


@pytest.mark.parametrize("text, box", [
    ("[10, 30, 60, 90]", [10, 30, 60, 90]),
    ("It is [10.5,30,60,90].", [10.5, 30, 60, 90]),
    ("<|object_ref_start|>cup<|object_ref_end|><|box_start|>(10,30),(60,90)<|box_end|>",
     [10, 30, 60, 90]),
    ("<ref>cup</ref><box>(10,30),(60,90)</box>", [10, 30, 60, 90]),
    ("<box>[[10, 30, 60, 90]]</box>", [10, 30, 60, 90]),
    ('```json\n[{"bbox_2d": [10, 30, 60, 90], "label": "cup"}]\n```', [10, 30, 60, 90])])
def test_boxes_in_texts(root, text, box):
    record = changed(LLAVA, "conversations", 1, "value", to=text)
    (line,), _ = import_all(root, "llava", write(root, record), "pixels")
    assert line["box"] == box and line["question"] == "Where is the cup?" and line["image"] == 1


def of_two_images(*turns):
    """A record of (question, answer) turns."""
    return {"images": ["a.png", "b.png"],
            "messages": [{"role": role, "content": text} for turn in turns
                         for role, text in zip(("user", "assistant"), turn)]}


def test_conversations_of_several_images_and_turns(root):
    asked = "<image> and <image>: where in image 2 is the thing at [1, 2, 30, 40] of image 1?"
    path = root / "array.json"
    path.write_text(json.dumps([of_two_images(
        (asked, "In the second image: [10, 20, 30, 40]"), ("What is it?", "A cup."),
        ("And the dog?", '<answer>{"image": 1, "box": [1,2,9,9]}</answer>'))]))
    (first, second), sentences = import_all(root, "llava", path, "pixels")
    assert not sentences and first["id"] == "record-1-turn-1"
    assert first["question"] == "and image 2: where in image 2 is the thing at {ref} of image 1?"
    assert (first["image"], first["box"], first["reference"]) == (2, [10, 20, 30, 40],
                                                                  [1, 2, 30, 40])
    assert (second["image"], second["box"], second["question"]) == (1, [1, 2, 9, 9], "And the dog?")
    record = of_two_images(("<image>Where is the dog in image 1?", "[1, 2, 9, 9]"),
                           ("And in <image>, where is the cat?", "[5, 6, 30, 40]"))
    (_, later), _ = import_all(root, "llava", write(root, record), "pixels")
    assert later["question"] == "And in image 2, where is the cat?" and later["image"] == 2


@pytest.mark.parametrize("asked, answered, number", [
    ("Find the cup in image 2.", "[1, 2, 30, 40]", 2),
    ("Image 2: where is the cup?", "[1, 2, 30, 40]", 2),
    ("Find it at the left of the second image.", "[1, 2, 30, 40]", 2),
    ("Find the cup of image 1.", "The cup is at the top of image 2: [1, 2, 30, 40]", 2),
    ("Find it.", "The cup of image 1 is seen in image 2 at [1, 2, 30, 40]", 2),
    ("Find the cup of image 1.", "[1, 2, 30, 40]", None),
    ("Find the object marked in the first image in the other image.", "[1, 2, 30, 40]", None),
    ("The first image shows a dog. Find this dog in the other picture.", "[1, 2, 30, 40]", None),
    ("Which thing in image 1 is in both images?", "[1, 2, 30, 40]", None),
    ("Find it again.", "The cup of image 1 is seen again at [1, 2, 30, 40]", None)])
def test_an_image_that_only_describes_a_thing_is_not_taken_for_its_place(root, asked, answered,
                                                                         number):
    path = write(root, of_two_images((asked, answered)))
    lines, sentences = import_all(root, "llava", path, "pixels")
    assert [line["image"] for line in lines] == ([number] if number else [])
    assert not number == ("it is not said which of the 2 images" in "".join(sentences))


def test_what_a_file_says_stands_and_annotations_are_not_overwritten(root):
    _, (sentence,) = import_all(root, "swift", write(root, SWIFT), "normalized_1000")
    assert "says that boxes are pixels, and --coordinates normalized_1000" in sentence
    instances = root / "coco.json"
    with pytest.raises(ValueError, match="is .*coco.json itself"):
        importers.import_file("refcoco", write(root, REF), instances,
                              ImportRules(root, instances=instances), print)
    assert json.loads(instances.read_text()) == COCO


def test_boxes_of_the_padded_square(root):
    """LLaVA-1.5 pads 200 x 100 to 200 x 200, 50 above and below."""
    (line,), _ = import_all(root, "llava", write(root, LLAVA), "normalized_1", padded=True)
    assert line["box"] == pytest.approx([20, 10, 60, 100]) and line["coordinates"] == "pixels"


def test_coco(root):
    lines, sentences = import_all(root, "coco", root / "coco.json")
    assert [line["question"] for line in lines] == ["Find the cup.", "Find the cup."]
    assert lines[0]["box"] == [10, 10, 30, 40] and lines[0]["id"] == "annotation-1"
    assert lines[1]["box"] == [150, 10, 200, 40], "half a pixel over the edge is cut"
    assert sentences == ["annotation 3: the answer has 2 boxes; add --several any if any one of "
                         "them is correct, --several all if all are to be found, or write one "
                         "question for each"]
    lines, sentences = import_all(root, "coco", root / "coco.json", several="any")
    assert not sentences and lines[2]["boxes"] == [[0, 0, 9, 9], [50, 0, 59, 9]]
    lines, _ = import_all(root, "coco", root / "coco.json", several="all")
    assert lines[2]["targets"] == [{"image": 1, "box": [0, 0, 9, 9]},
                                   {"image": 1, "box": [50, 0, 59, 9]}]
    assert "box" in lines[0] and "image" not in lines[2]


def test_boxes_in_several_images_must_all_be_found(root):
    record = changed(SWIFT, "messages", 2, "content", to="<bbox> and <bbox>")
    record = changed(record, "messages", 1, "content", to="<image><image>Find every <ref-object>.")
    lines, _ = import_all(root, "swift", write(root, record), several="all")
    numbers = [number + 1 for number in SWIFT["objects"]["image_id"]]
    assert lines[0]["targets"] == [{"image": number, "box": box} for number, box
                                   in zip(numbers, SWIFT["objects"]["bbox"])]
    assert sorted(numbers) == [1, 2]
    lines, _ = import_all(root, "swift", write(root, record), several="any")
    assert [(line["image"], line["box"]) for line in lines] == list(
        zip(numbers, SWIFT["objects"]["bbox"])), "a question for each image"
    assert lines[0]["question"] == "Find every cup. Answer for image 1 only."


def test_refcoco(root):
    captioned = changed(COCO, "images", 0, "caption", to="the lady in red")
    path = root / "mdetr.json"
    path.write_text(json.dumps(changed(captioned, "annotations", to=COCO["annotations"][:1])))
    (line,), _ = import_all(root, "coco", path)
    assert line["question"] == "Find this: the lady in red."
    lines, _ = import_all(root, "refcoco", write(root, REF, VLM_R1),
                          instances=root / "coco.json")
    assert [line["question"] for line in lines] == [
        "Find this: the left cup.", "Find this: cup by the door.", "Find this: the lady."]
    assert lines[1]["images"] == ["b.png"] and lines[1]["box"] == [150, 10, 200, 40]
    assert lines[2]["box"] == [10.5, 20, 60, 90]
    row = {"question_id": "7", "question": "Describe the area.", "answer": ["cup", "left cup"],
           "bbox": [10, 20, 30, 40], "segmentation": [1.0], "iscrowd": 0, "file_name": "x_7.jpg",
           "image": {"bytes": (root / "b.png").read_bytes(), "path": None}}
    path = root / "val.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    lines, _ = import_all(root, "refcoco", path)
    assert [(line["question"], line["box"]) for line in lines] == [
        ("Find this: cup.", [10, 20, 40, 60]), ("Find this: left cup.", [10, 20, 40, 60])]


@pytest.mark.parametrize("form, record, sentence", [
    ("swift", changed(SWIFT, "objects", "bbox_type", to="norm1"), "outside 'normalized_1'"),
    ("swift", b"{", "the line is no JSON object"),
    ("swift", changed(SWIFT, "images", to=...), "'images' must list 1 to 64 paths"),
    ("swift", changed(SWIFT, "images", 0, to="http://x/a.png"), "download it and name the file"),
    ("swift", changed(SWIFT, "images", 0, to="none.png"), "'none.png' is not there"),
    ("swift", changed(SWIFT, "images", to=["a.png"]), "2 <image> tags and 1 images"),
    ("swift", changed(SWIFT, "messages", 1, "role", to="tool_call"), "must be of user and assist"),
    ("swift", changed(SWIFT, "messages", 1, "content", to=None), "must be a text of at most"),
    ("swift", changed(SWIFT, "messages", 1, "content", to="<image><image>{ref} <bbox>"),
     "holds {ref}"),
    ("swift", changed(SWIFT, "messages", 1, "content", to="<image><image><video> <bbox>"),
     "give the frames as images"),
    ("swift", changed(SWIFT, "messages", 2, "content", to="Yes."), "boxes more than there are"),
    ("swift", changed(SWIFT, "objects", to="[]"), "as ms-swift 3 has it"),
    ("swift", changed(SWIFT, "objects", "image_id", to=...), "it must say which one"),
    ("swift", changed(SWIFT, "objects", "image_id", to=[0, 2]), "an image that is not there"),
    ("swift", changed(SWIFT, "objects", "image_id", to=[1, 0]), "must be in the first image"),
    ("swift", changed(SWIFT, "objects", "bbox_type", to="norm1000"), "use real (pixels) or norm1"),
    ("swift", changed(SWIFT, "objects", "ref", to=[]), "more <ref-object> in the texts"),
    ("swift", changed(SWIFT, "objects", "bbox", 1, to=[615, 226]), "must be four numbers"),
    ("swift", changed(SWIFT, "objects", "bbox", 1, to=[1, 2, 900, 4]), "leaves image 2"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="A cup."), "no answer holds a box"),
    ("llava", changed(LLAVA, "image", to=["a.png", "b.png"]), "1 <image> tags and 2 images"),
    ("llava", changed(changed(LLAVA, "image", to=["a.png", "b.png"]), "conversations", 0, "value",
                      to="Where?"), "name it in the answer, as in: image 2"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="[1,2,3,4] [5,6,7,8]"),
     "the answer has 2 boxes; add --several any"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="[0.9, 0.1, 0.3, 0.4]"),
     "x2 must be greater than x1"),
    ("llava", changed(LLAVA, "conversations", 1, "value", to="[10, 20, 30, 40]"), "outside"),
    ("llava", changed(LLAVA, "conversations", 0, "value", to="<image>"), "write what is asked"),
    ("refcoco", REF, "give --instances"),
    ("refcoco", changed(VLM_R1, "normal_caption", to=3), "a phrase must be a text"),
    ("refcoco", changed(VLM_R1, "solution", to=[1, 2]), "must be four numbers"),
    ("refcoco", changed(REF, "sentences", to=[]), "'sentences' must be a list")])
def test_each_mistake_has_its_line_and_remedy(root, form, record, sentence):
    lines, sentences = import_all(
        root, form, write(root, record), "normalized_1" if form == "llava" else "")
    assert not lines and len(sentences) == 1
    assert sentences[0].startswith("line 1: ") and sentence in sentences[0]


@pytest.mark.parametrize("path, value, sentence", [
    (("annotations", 0, "bbox"), [1, 2, 3], "annotation 1: 'bbox' must be four numbers"),
    (("annotations", 0, "bbox"), [1, 2, 0, 4], "annotation 1: 'bbox' is [1, 2, 0, 4]: width and"),
    (("annotations", 0, "image_id"), 9, "annotation 1: its image 9 is not in 'images'"),
    (("annotations", 0, "image_id"), [], "annotation 1: 'image_id' and 'category_id' must be ids"),
    (("annotations", 0), 3, "annotation number 1: an annotation must be an object with an id"),
    (("annotations", 0, "iscrowd"), 1, "annotation 1: a crowd has no single box"),
    (("annotations", 0, "bbox"), [90, 2, 30, 4], "annotation 1: [90, 2, 120, 6] leaves image 1"),
    (("categories",), [], "annotation 1: category 5 has no name"),
    (("images", 0, "file_name"), None, "annotation 1: an image must be named by its path"),
    (("annotations",), [], "wrong.json: there is no list 'annotations'")])
def test_each_mistake_of_a_coco_file_has_its_place(root, path, value, sentence):
    (root / "wrong.json").write_text(json.dumps(changed(COCO, *path, to=value)))
    _, sentences = import_all(root, "coco", root / "wrong.json", several="any")
    assert any(problem.startswith(sentence) for problem in sentences), sentences


def test_sizes_that_the_file_states_are_those_of_the_upright_images(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(root / "turned.jpg", exif=exif)

    def import_coco(sides, *boxes):
        (root / "in.json").write_text(json.dumps({
            "images": [{"id": 1, "file_name": "turned.jpg", "width": sides[0], "height": sides[1]}],
            "categories": [{"id": 1, "name": "cup"}],
            "annotations": [{"id": number, "image_id": 1, "category_id": 1, "bbox": box}
                            for number, box in enumerate(boxes)]}))
        return import_all(root, "coco", root / "in.json", several="any")

    lines, (sentence,) = import_coco((100, 50), [1, 2, 30, 4])
    assert not lines and "says 100x50, the image has 50x100 pixels when it is upright" in sentence
    for sides in ((50, 100), (50.0, 100.0), (0, 0), (None, None)):
        ((line,), _) = import_coco(sides, [-0.6, -1, 30, 4])
        assert line["box"] == [0, 0, 29.4, 3], "cut at every side"
    lines, (sentence,) = import_coco((50, 100), [1, 2, 30, 4], [0, 0, 1e300, 5])
    assert not lines and sentence.startswith("annotation 1: 'bbox'"), "not the first of its image"


@pytest.mark.parametrize("changes, sentence", [
    ({"attributes": {"rotation": 45.0}}, "turned by 45"), ({"rotation": 45.0}, "turned by 45"),
    ({"attributes": {"rotation": "-30"}}, "by -30"), ({"angle": 0.5}, "turned by 0.5"),
    ({"attributes": {"rotation": 0.0, "angle": "front"}}, "")])
def test_a_turned_box_is_not_written_upright(root, changes, sentence):
    annotation = {**COCO["annotations"][0], **changes}
    (root / "in.json").write_text(json.dumps(changed(COCO, "annotations", to=[annotation])))
    for form, path in (("coco", root / "in.json"), ("refcoco", write(root, {**REF, "ann_id": 1}))):
        instances = root / "in.json" if form == "refcoco" else None
        lines, sentences = import_all(root, form, path, instances=instances)
        assert bool(sentence) != bool(lines) and sentence in "".join(sentences)


def test_one_question_has_one_answer(root):
    """Categories of one name, and an image that is listed twice, are one question."""
    for key, value in (("categories", [{"id": 5, "name": "cup"}, {"id": 6, "name": "Cup "}]),
                       ("images", [{"id": 1, "file_name": "b.png"}, COCO["images"][1]])):
        (root / "in.json").write_text(json.dumps(changed(COCO, key, to=value)))
        lines, sentences = import_all(root, "coco", root / "in.json")
        questions = [(line["images"][0], line["question"].lower()) for line in lines]
        assert len(set(questions)) == len(questions) and "has" in "".join(sentences)
        lines, _ = import_all(root, "coco", root / "in.json", several="any")
        assert max(len(line.get("boxes", [])) for line in lines) == 3 - (key == "images")


def test_one_split_is_taken(root, tmp_path):
    refs = [changed(REF, "split", to=split) for split in ("train", "val", "testA", "Train", None)]
    talks = [{**LLAVA, "id": split, "split": split} for split in ("train", "test")]
    verl = [{"images": ["b.png"], "problem": "<image>Find it.", "answer": "[1, 2, 30, 40]",
             "extra_info": {"split": split}} for split in ("train", "val")]
    coco = changed(changed(COCO, "annotations", to=COCO["annotations"][:2]), "images", to=[
        {**image, "split": split} for image, split in zip(COCO["images"], ("train", "val"))])
    for form, rows, n, kept, more in (
            ("refcoco", refs, 10, 6, ["--instances", root / "coco.json"]),
            ("coco", [coco], 2, 1, []), ("verl", verl, 2, 1, ["--coordinates", "pixels"]),
            ("llava", talks, 2, 1, ["--coordinates", "normalized_1"])):
        words = (form, write(root, *rows), "--out", tmp_path / "o.jsonl", *more)
        code, text = call("import", *words)
        assert f"{n} questions read, {kept} written" in text and f"{n - kept} left out" in text
        assert "  of the split '" in text and "takes: " in text
        code, text = call("import", *words, "--split", "val")
        assert (code == 0) == (form != "llava") and "split 'train', which --split train" in text


@pytest.mark.parametrize("question, is_kept", [
    ("And in the other image?", False), ("Where is it in image 2?", False), ("Is it here?", False),
    ("Where is that?", False), ("Find the same one again.", False), ("Give me its box.", False),
    ("Please provide the bounding box coordinates.", False), ("What about image 2?", False),
    ("Where else?", False), ("Find another cup.", False), ("它在哪里?", False),
    ("Find the red cup in image 2.", True), ("And the dog?", True), ("狗在哪里?", True),
    ("Now find the cat in the second picture.", True), ("The man with his dog", True),
    ("Provide the coordinate of the region this sentence describes: left cup", True),
    ("Which dog in image 2 is like the cup of the other image?", True)])
def test_a_later_turn_that_leans_on_history_is_left_out(root, question, is_kept):
    record = of_two_images(("Find the cup in image 1.", "In image 1: [1, 2, 9, 9]"),
                           (question, "In image 2: [5, 6, 30, 40]"))
    lines, sentences = import_all(root, "llava", write(root, record), "pixels")
    assert len(lines) == 1 + is_kept and lines[0]["question"] == "Find the cup in image 1."
    assert is_kept or "a later turn leans on the turns before it" in sentences[0]


@pytest.mark.parametrize("text, is_refused", [
    ("Boxes are y first.", True), ("Answer with [ymin, xmin, ymax, xmax].", True),
    ("Write each box as (x, y, w, h)", True), ("Give box_2d.", True),
    ("Use yxyx.", True), ("(top, left, bottom, right)", True),
    ("Boxes are [x1, y1, x2, y2] in 0 to 1000.", False),
    ("Give (x1, y1), (x2, y2): top-left, bottom-right corner in pixels, of width and height.",
     False)])
def test_what_a_system_turn_says_of_boxes_is_not_lost(root, text, is_refused):
    turns = [{"from": "system", "value": text}, *LLAVA["conversations"]]
    path = write(root, changed(LLAVA, "conversations", to=turns),
                 {**LLAVA, "id": 8, "system": text})
    code, said = call("import", "llava", path, "--coordinates", "normalized_1",
                      "--out", root / "o.jsonl")
    words = ("the boxes are not written as x1, y1, x2, y2" if is_refused else "remark: 2 questions "
             f"have a system turn that says how boxes are written ('{text[:20]}")
    assert words in said and code == is_refused


@pytest.mark.parametrize("form, path, rules, sentence", [
    ("llava", "in.jsonl", {}, "give --coordinates"),
    ("swift", "in.jsonl", {"coordinates": "pixels", "padded": True}, "add --coordinates norm"),
    ("swift", "out.jsonl", {}, "name another file"),
    ("coco", "coco.json", {"coordinates": "pixels"}, "the format coco says what its boxes are"),
    ("mgrounding", "in.json", {"several": "all"}, "leave --several out"),
    ("coco", "coco.json", {"instances": "coco.json"}, "--instances is for the format refcoco")])
def test_rules_that_do_not_go_together(root, form, path, rules, sentence):
    for name in ("out.jsonl", path):
        (root / name).touch()
    rules = {name: root / value if name == "instances" else value for name, value in rules.items()}
    with pytest.raises(ValueError) as error:
        import_all(root, form, root / path, **rules)
    assert sentence in str(error.value)


@pytest.mark.parametrize("content", [b"[", b"[{}, ", b"\xef\xbb\xbf[]", b"[1e999999]", b"",
                                     b"[" * 3000, b'{"images": [', b'{"annotations": [{"id": NaN}'])
def test_broken_files_end_with_a_sentence(root, content):
    (root / "broken.json").write_bytes(content)
    for form in importers.FORMATS:
        lines, sentences = import_all(root, form, root / "broken.json",
                                      "pixels" if form in ("swift", "llava", "verl") else "")
        assert not lines and all(": " in sentence for sentence in sentences)


def test_the_command(root, tmp_path):
    choices = {option.name: option.type for option in import_command.params}
    assert tuple(choices["form"].choices) == importers.FORMATS
    assert set(choices["coordinates"].choices) == set(line_checks.LIMITS)
    path = write(root, SWIFT, b"{", SWIFT)
    result = run_mig_kit("data", "import", "swift", str(path), "--out", str(tmp_path / "own.jsonl"))
    assert result.returncode == 0 and "line 2: the line is no JSON object" in result.stdout
    assert "3 questions read, 2 written to" in result.stdout and "1 left out" in result.stdout
    assert f"(image root: {root})" in result.stdout

    def call(form, out):
        result = CliRunner().invoke(import_command, [form, str(path), "--out", str(out)])
        return result.output + str(result.exception)

    assert "give --coordinates" in call("llava", tmp_path / "b.jsonl")
    assert "is in no folder that exists" in call("swift", tmp_path / "no" / "b")
    path, old = write(root, b"{"), tmp_path / "old.jsonl"
    old.write_text("kept")
    for out in (tmp_path / "new.jsonl", old):
        assert "nothing written, 1 left out" in call("swift", out)
    assert old.read_text() == "kept" and not (tmp_path / "new.jsonl").exists()
