"""Data as people have it: each input is read, or named in one sentence with the way in."""

import base64
import gzip
import io
import json
import pickle
import random
import time
import zipfile
from contextlib import suppress

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from data_files import CHOICE, GOOD, call, problems_of, write_lines
from PIL import Image

from mig_kit.commands.data import data
from mig_kit.data import own_data
from mig_kit.data.conversations import clean_question
from mig_kit.data.line_checks import text_problem
from mig_kit.data.records import Problem


def write(root, content, name="mine.json"):
    path = root / name
    path.write_bytes(content)
    return path


def image_bytes(form="PNG", colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 100), colour).save(buffer, format=form)
    return buffer.getvalue()


def base64_text():
    return base64.b64encode(image_bytes()).decode()


@pytest.mark.parametrize("content", [
    json.dumps([GOOD]), json.dumps([GOOD], indent=2), "\ufeff" + json.dumps([GOOD]),
    "\n\n" + json.dumps([GOOD]), json.dumps([GOOD]).replace("}", "}\r\n"),
    json.dumps([GOOD]).replace(": 2", ": 2.0"), json.dumps(GOOD) + "\r\n"])
def test_lists_are_read(root, content):
    path = write(root, content.encode())
    assert call("check", path)[0] == 0, call("check", path)[1]
    (sample,) = own_data.iter_samples(path, root)
    assert sample.targets == ((2, (10, 20, 60, 90)),)
    assert sample.id in ("record-1", "line-1")


@pytest.mark.parametrize("content, sentence", [
    (json.dumps(GOOD, indent=2), "holds one JSON object over several lines; save its questions as"),
    (json.dumps({"data": [GOOD]}), "a list of questions under the key 'data'; save that list as"),
    (json.dumps([[GOOD]]), "record 1: the record is no JSON object; write one {...} per record"),
    (json.dumps([GOOD])[:-1], "is cut or no JSON"),
    (json.dumps([GOOD, 3]), "record 2: the record is no JSON object"),
    ('[{"question": "a \\ud83d"}]', "holds half an emoji, \\ud83d, after"),
    ("[]", "has no record; write one JSON object a line"),
    ("", "has no line; write one JSON object a line"),
    (str(GOOD), "is no JSON object (character 2"),
    (json.dumps([GOOD, {**GOOD, "image": 7}]), "record 2: 'image' is 7, but there are 2 images")])
def test_lists_that_are_wrong_are_named(root, content, sentence):
    code, text = call("check", write(root, content.encode()))
    assert code == 1 and sentence in text, text


@pytest.mark.parametrize("changes", [
    *({"images": [image, "b.png"]} for image in (
        {"path": "a.png", "bytes": None}, {"path": "{root}/a.png", "bytes": ""}, "./a.png",
        "file://{root}/a.png", "sub//c d.jpg", "{root}/sub/c d.jpg")),
    {"image": "2"}, {"image": 2.0}, {"image": " 2"}, {"box": ["10.0", "+20", "6e1", 90]},
    {"box": [0.1, "0.2", ".6", "0.9"], "coordinates": "normalized_1"}])
def test_images_are_found_and_numbers_as_text_are_read(root, changes):
    text = json.dumps({**GOOD, **changes}).replace("{root}", str(root))
    (sample,) = own_data.iter_samples(write_lines(root, text.encode()), root)
    assert sample.images[0].size in ((100, 50), (200, 100))
    assert sample.targets[0].image == 2 and type(sample.targets[0].image) is int


@pytest.mark.parametrize("question, stripped", [
    ("<image>\n<image>\nFind it.", "Find it."), ("Find it. <image><image>", "Find it."),
    ("Image 1: <image>\nImage 2: <image>\nFind it.", "Find it."),
    ("Find <image_1>'s cup in <image_2>.", "Find image 1's cup in image 2."),
    ("<image_1> shows a cup. Find it in <image_2>.",
     "image 1 shows a cup. Find it in image 2."),
    ("Is the cup of <image> in <image>?", "Is the cup of image 1 in image 2?"),
    ("Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nFind it.", "Find it."),
    ("<ImageHere><ImageHere>Find it.", "Find it."), ("[IMG][IMG]Find it.", "Find it."),
    ("<img src='a.png'><img src='b.png'/>Find it.", "Find it."),
    ("![](a.png)![x](b.png) Find it.", "Find it."), ("{image}{image}Find it.", "Find it."),
    ("<start_of_image><start_of_image>Find it.", "Find it."),
    ("<im_start><image><im_end><im_start><image><im_end>Find it.", "Find it."),
    ("<image 1>Find <image 2>", "image 1Find image 2"), ("<image/><image />Find it.", "Find it.")])
def test_tags_of_images_are_named_and_taken_out(root, question, stripped):
    row = {**GOOD, "question": question}
    problem = problems_of(root, row)
    assert "which is text to the model and costs points" in problem
    assert "mig-kit data import own FILE --out OUT takes such tags out" in problem
    out = root / "out.jsonl"
    code, text = call("import", "own", write_lines(root, row), "--out", out)
    assert code == 0, text
    assert json.loads(out.read_text())["question"] == stripped
    assert call("check", out)[0] == 0


def test_tags_in_options(root):
    row = {**CHOICE, "options": ["<image 1>", "a dog"]}
    assert "'options' number 1 holds <image 1>" in problems_of(root, row)
    call("import", "own", write_lines(root, row), "--out", root / "out.jsonl")
    assert json.loads((root / "out.jsonl").read_text())["options"] == ["image 1", "a dog"]


@pytest.mark.parametrize("question, sentence", [
    *((question, "") for question in (
        "Is a < b and b > c?", "Find the <title> of the page.", "Find image 1's cup.",
        "Where is it (image 2)?", "Find {ref}.", "Find the tag <a href='x'>.")),
    ("Is the <image> here?", "there are 1 <image> tags and 2 images; write one per image"),
    ("Find <bbox>.", "which is text to the model")])
def test_texts_without_tags_are_left_and_tags_that_stay_leave_the_question_out(root, question,
                                                                               sentence):
    reference = {"reference": [1, 2, 30, 40]} if "{ref}" in question else {}
    row = {**GOOD, "question": question, **reference}
    assert bool(problems_of(root, row)) == bool(sentence)
    code, text = call("import", "own", write_lines(root, row), "--out", root / "none.jsonl")
    assert code == bool(sentence) and sentence in text


@pytest.mark.parametrize("piece", [" ", "\n", "<", "<image", "<image> ", "<img", "![", "<im_",
                                   "[IMG", "<image_here", "Image 1: "])
def test_hostile_questions_take_no_time(piece):
    started = time.perf_counter()
    with suppress(Problem):
        clean_question(piece * 20_000 + "x", 2)
    text_problem("'question'", piece * 20_000)
    assert time.perf_counter() - started < 5


def draw_frames(size=(160, 120), n=3):
    return [Image.new("RGB", size, (60 * number, 0, 0)) for number in range(n)]


@pytest.mark.parametrize("name, options", [
    ("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {}),
    ("a.mpo", {"format": "MPO"}), ("renamed.jpg", {"format": "GIF"}), ("a.avif", {})])
def test_films_are_named_where_a_box_is_asked_for(tmp_path, name, options):
    first, *others = draw_frames()
    first.save(tmp_path / name, save_all=True, append_images=others, **options)
    row = {**GOOD, "images": [name], "image": 1}
    assert "holds several frames, and it is not said which one a box is in" in problems_of(
        tmp_path, row)
    assert problems_of(tmp_path, {**CHOICE, "images": [name]}) == "", "the first frame is shown"
    assert f"{tmp_path / name}\t" in call("duplicates", tmp_path, tmp_path)[1]
    first.save(tmp_path / name, **options)
    assert problems_of(tmp_path, row) == "", "one frame alone"


def test_a_phones_photo_with_its_preview_has_one_frame(tmp_path):
    first, second = draw_frames(n=1)[0], Image.new("RGB", (40, 30))
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert problems_of(tmp_path, {**GOOD, "images": ["a.jpg"], "image": 1}) == ""


def make_zip():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("mine.jsonl", json.dumps(GOOD))
    return buffer.getvalue()


@pytest.mark.parametrize("name, content", [
    ("a.jsonl.gz", gzip.compress(b"{}")), ("a.xlsx", make_zip()), ("a.pkl", pickle.dumps(GOOD)),
    ("a.arrow", b"\xff\xff\xff\xff"), ("a.csv", b"images,question\n"),
    ("a.json", json.dumps([GOOD]).encode("utf-16")), ("a.json", image_bytes()),
    ("a.json", b"\0")],
    ids=lambda value: "bytes" if isinstance(value, bytes) else None)  # they hold the time
def test_other_files_are_refused_with_the_way_in(root, name, content):
    path = write(root, content, name)
    for words in (("check",), ("preview", "--out", root / "p.html"),
                  ("import", "swift", "--out", root / "p.jsonl")):
        code, text = call(*words, path)
        assert code == 1 and f"{name} is neither JSON in UTF-8 nor parquet; unpack" in text
        assert text.count("\n") <= 1


ASKED, ANSWER = "Find the cup of image 1.", '{"image": 2, "box": [10, 20, 60, 90]}'
TAGGED, OBJECTS = f"<image><image>{ASKED}", {"bbox": [["10", "20", "60", 90]], "image_id": [1]}


def talk(asked=TAGGED, answered=ANSWER, role="assistant"):
    return [{"role": "user", "content": asked}, {"role": role, "content": answered}]


def parts(*images):
    """A user's text as a list of parts."""
    return [*images, {"type": "text", "text": ASKED}]


NAMED = [  # an importer and a record whose images stand under "images"
    ("verl", {"problem": TAGGED, "solution": f"<answer>{ANSWER}</answer>"}),
    ("verl", {"data_source": "x", "prompt": talk()[:1],
              "reward_model": {"style": "rule", "ground_truth": ANSWER}}),
    ("verl", {"prompt": ASKED, "answer": ANSWER}),
    ("llava", {"conversations": [{"from": "human", "value": TAGGED},
                                 {"from": "gpt", "value": ANSWER}]}),
    ("llava", {"messages": talk(parts({"type": "image"}, {"type": "image"}),
                                [{"type": "text", "text": ANSWER}])}),
    ("swift", {"messages": talk(answered="<bbox>"), "objects": {"ref": [], **OBJECTS}}),
    ("swift", {"query": ASKED, "response": "<bbox>", "objects": OBJECTS}),
    ("swift", {"messages": talk(ASKED)[:1], "solution": "<bbox>", "objects": OBJECTS})]


def import_one(form, path, out):
    coordinates = [] if form in ("own", "swift") else ["--coordinates", "pixels"]
    return call("import", form, path, "--out", out, *coordinates)


@pytest.mark.parametrize("form, record", [*NAMED, ("own", {**GOOD, "question": TAGGED})])
def test_tables_are_named_and_imported(tmp_path, form, record):
    images = [{"bytes": image_bytes(), "path": None},
              {"bytes": image_bytes("JPEG", "blue"), "path": "x.jpg"}]
    path, out = tmp_path / "train.parquet", tmp_path / "mine.jsonl"
    table = json.loads(json.dumps(record).replace('"10", "20", "60"', "10, 20, 60"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**table, "images": images}] * 2), path)
    code, text = call("check", path)
    assert code == 1 and "is a parquet table; mig-kit data import " in text
    code, text = import_one(form, path, out)
    assert code == 0 and "2 questions read, 2 written" in text, text
    assert call("check", out)[0] == 0 and len(list((tmp_path / "mine_images").iterdir())) == 2
    sample, _ = own_data.iter_samples(out, tmp_path)
    assert sample.question == ASKED and sample.id == "row-1"
    assert sample.targets == ((2, (10, 20, 60, 90)),)
    assert np.array(sample.images[0])[0, 0].tolist() == [255, 0, 0]


def test_a_table_of_the_library_datasets(tmp_path):
    features = datasets.Features({"images": datasets.List(datasets.Image()),
                                  "problem": datasets.Value("string"),
                                  "answer": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"images": [[Image.new("RGB", (64, 64), "red")]], "problem": ["<image>Find it."],
         "answer": ["[1, 2, 30, 40]"]}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    out = tmp_path / "elsewhere" / "mine.jsonl"
    out.parent.mkdir()
    import_one("verl", tmp_path / "a.parquet", out)
    (sample,) = own_data.iter_samples(out, out.parent)
    assert sample.images[0].size == (64, 64) and sample.targets == ((1, (1, 2, 30, 40)),)


@pytest.mark.parametrize("form, record", [
    *((form, {"images": images, **record}) for form, record in NAMED for images in (
        ["{root}/a.png", {"path": "b.png"}], [{"path": "a.png"}, {"bytes": base64_text()}])),
    ("llava", {"messages": talk(parts(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_text()}"}},
        {"type": "image_url", "image_url": {"url": "b.png"}}))}),
    ("llava", {"messages": talk(parts(
        {"type": "image", "image": "a.png"}, {"type": "image", "image": "file://{root}/b.png"}),
        [{"type": "text", "text": ANSWER}])}),
    ("llava", {"messages": talk(parts({"type": "input_image", "image_url": "a.png"},
                                      {"type": "image", "path": "b.png"}), role="model")})])
def test_layouts_of_others_are_named_and_imported(root, form, record):
    text = json.dumps(record).replace("{root}", str(root))
    path, out = write_lines(root, text.encode(), name="in.jsonl"), root / "out.jsonl"
    assert "is of another project's layout; mig-kit data import" in problems_of(root, text.encode())
    code, said = import_one(form, path, out)
    assert code == 0, said
    line = json.loads(out.read_text())
    assert line["question"] == ASKED and line["image"] == 2
    assert line["box"] == [10, 20, 60, 90] and call("check", out)[0] == 0


@pytest.mark.parametrize("row, sentence", [
    ({**GOOD, "box": [100, 20, 160, 90]}, "(line 1 and line 2)"),
    ({**GOOD, "question": "find the  cup of image 1."}, ""),
    ({**GOOD, "image": 1, "box": [10, 20, 60, 40]}, "line 1 and"),
    ({**GOOD, "box": [12, 20, 60, 90]}, ""), ({**GOOD, "images": ["b.png", "b.png"]}, ""),
    ({**GOOD, "box": [50, 200, 300, 900], "coordinates": "normalized_1000"}, ""),
    ({**GOOD, "boxes": [[10, 20, 60, 90], [1, 1, 5, 5]], "box": ...}, "")])
def test_questions_with_two_answers_get_a_remark(root, row, sentence):
    row = {key: value for key, value in row.items() if value is not ...}
    code, text = call("check", write_lines(root, GOOD, row))
    assert code == 0 and ("no reply is correct for both" in text) == bool(sentence), text
    assert sentence in text


@pytest.mark.parametrize("size, stated, whole, evidence", [
    ((2000, 1500), "pixels", (1000, 1000), "no box reaches beyond 1000 though all 24 images"),
    ((900, 1600), "pixels", (1000, 1000), "have boxes outside their coordinates, so the other"),
    ((640, 480), "normalized_1000", (640, 480), "as pixels though all 24 images are 640"),
    ((2000, 1500), "pixels", (2000, 1500), ""), ((640, 480), "normalized_1000", (1000, 1000), ""),
    ((640, 480), "pixels", (640, 480), ""), ((640, 480), "normalized_1", (1, 1), "")])
def test_a_whole_file_in_another_frame_gets_a_remark(tmp_path, size, stated, whole, evidence):
    rng, rows = random.Random(1), []
    for number in range(24):
        Image.new("L", size).save(tmp_path / f"{number}.png")
        left, top = rng.uniform(0, 0.7), rng.uniform(0, 0.7)
        box = [left * whole[0], top * whole[1], (left + 0.3) * whole[0], (top + 0.3) * whole[1]]
        rows.append({"images": [f"{number}.png"], "question": "Find it.", "image": 1, "box": box,
                     "coordinates": stated})
    path = write_lines(tmp_path, *rows)
    for words in (("check", path), ("import", "own", path, "--out", tmp_path / "out.jsonl")):
        text = call(*words)[1]
        assert evidence in text and ("remark: " in text) == bool(evidence), text


VERL = {"images": ["a.png"], "problem": "<image>Find it.", "answer": "[1, 2, 30, 40]"}


@pytest.mark.parametrize("form, record, sentence", [
    ("llava", {"messages": talk([{"type": "video", "video": "a"}])},
     "a part of a text is of the type 'video'; only texts and images can be used"),
    ("swift", {"images": ["a.png"], "messages": talk()[:1]}, "or the answer in response, solution"),
    ("verl", {**VERL, "problem": None}, "'messages' or 'conversations' must be a list of turns"),
    ("verl", {**VERL, "images": [{"bytes": "no"}]}, "the bytes of an image are none"),
    ("verl", {**VERL, "images": [{"path": None}]}, "an image must be named by its path")])
def test_layouts_of_others_that_are_wrong_are_named(root, form, record, sentence):
    code, text = import_one(form, write_lines(root, record, name="in.jsonl"), root / "none.jsonl")
    assert code == 1 and text.startswith("line 1: ") and sentence in text, text


def test_long_prompts_are_named(root):
    long = {**GOOD, "question": "Find the cup. " * 3000}
    path = write_lines(root, GOOD, long, CHOICE)
    assert call("check", path)[0] == 0, "no model is asked"
    code, text = call("check", path, "--profile", "tiny")
    assert code == 1 and text.startswith("line 2: the prompt takes ") and "3 lines, 2" in text
    assert "and the model reads 4096; shorten the question, take fewer images, or" in text
    assert "no profile 'x' in params/" in str(CliRunner().invoke(
        data, ["check", str(path), "--profile", "x"]).exception)
