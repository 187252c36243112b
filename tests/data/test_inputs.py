"""Data as people have it: each input is read, or named in one sentence with the way in."""

import base64
import gzip
import io
import json
import pickle
import time
import zipfile
from contextlib import suppress

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from click.testing import CliRunner
from PIL import Image

from mig_kit.data import own_data
from mig_kit.data.commands import data
from mig_kit.data.conversations import clean_question
from mig_kit.data.line_checks import text_problem
from mig_kit.data.preview import write_preview
from mig_kit.data.records import Problem

GOOD = {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
        "box": [10, 20, 60, 90], "coordinates": "pixels"}
CHOICE = {"images": ["a.png"], "question": "What is it?", "options": ["a cup", "a dog"],
          "letter": "B"}
TALK = [{"role": "user", "content": "<image><image>Where is the cup in image 2?"},
        {"role": "assistant", "content": "[10, 20, 60, 90]"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "sub").mkdir()
    Image.new("RGB", (100, 50), "white").save(folder / "a.png")
    Image.effect_noise((200, 100), 80).save(folder / "b.png")
    Image.effect_noise((200, 100), 80).save(folder / "sub" / "c d.jpg")
    return folder


def call(*words):
    """(exit code, everything that the command says)."""
    result = CliRunner().invoke(data, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, ValueError | SystemExit)
    text = result.output
    if isinstance(result.exception, ValueError):
        text += str(result.exception)
    return result.exit_code, text


def write(root, content, name="mine.jsonl"):
    path = root / name
    if not isinstance(content, bytes):
        content = b"\n".join(json.dumps(row).encode() for row in content)
    path.write_bytes(content)
    return path


def problems_of(root, row):
    """What is said of a line, or of a line as it is written."""
    path = write(root, row if isinstance(row, bytes) else [row])
    ((_, problems),) = own_data.check_file(path, root)
    return "; ".join(problems)


def image_bytes(form="PNG", colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", (100, 100), colour).save(buffer, format=form)
    return buffer.getvalue()


def base64_text():
    return base64.b64encode(image_bytes()).decode()


@pytest.mark.parametrize("content", [
    json.dumps([GOOD]), json.dumps([GOOD], indent=2), "\ufeff" + json.dumps([GOOD]),
    "\n\n" + json.dumps([GOOD]), json.dumps([GOOD]).replace("}", "}\r\n"),
    json.dumps([GOOD], indent="\t"), json.dumps([GOOD], ensure_ascii=False),
    json.dumps([GOOD]).replace(": 2", ": 2.0"), json.dumps([{**GOOD, "id": "x"}]),
    json.dumps([{**GOOD, "question": "\u627e\u5230\u676f\u5b50"}]), json.dumps(GOOD) + "\r\n"])
def test_lists_are_read(root, content):
    path = write(root, content.encode(), "mine.json")
    assert call("check", path) == (0, call("check", path)[1]), call("check", path)[1]
    (sample,) = own_data.iter_samples(path, root)
    assert sample.targets == ((2, (10, 20, 60, 90)),)
    assert sample.id in ("record-1", "line-1", "x")


@pytest.mark.parametrize("content, sentence", [
    (json.dumps(GOOD, indent=2), "holds one JSON object over several lines; save its questions as"),
    (json.dumps({"data": [GOOD]}), "a list of questions under the key 'data'; save that list as"),
    (json.dumps({"train": [GOOD]}), "a list of questions under the key 'train'"),
    (json.dumps([[GOOD]]), "record 1: the record is no JSON object; write one {...} per record"),
    (json.dumps([GOOD])[:-1], "is cut or no JSON"),
    (json.dumps([GOOD, 3]), "record 2: the record is no JSON object"),
    (json.dumps([GOOD]).replace("{", "{,"), "is cut or no JSON"),
    ("[]", "has no record; write one JSON object a line"),
    ("", "has no line; write one JSON object a line"),
    (str(GOOD), "is no JSON object (character 2"),
    (json.dumps([GOOD, {**GOOD, "image": 7}]), "record 2: 'image' is 7, but there are 2 images")])
def test_lists_that_are_wrong_are_named(root, content, sentence):
    code, text = call("check", write(root, content.encode(), "mine.json"))
    assert code == 1 and sentence in text, text


KEPT = ["{root}/a.png", {"path": "a.png"}, {"path": "a.png", "bytes": None},
        {"path": "{root}/a.png", "bytes": ""}, "./a.png", "file://{root}/a.png",
        {"bytes": None, "path": "sub/c d.jpg"}, "sub/c d.jpg", "sub//c d.jpg", "{root}/sub/c d.jpg"]


@pytest.mark.parametrize("image", KEPT)
def test_images_are_found(root, image):
    text = json.dumps({**GOOD, "images": [image, "b.png"]}).replace("{root}", str(root))
    assert problems_of(root, text.encode()) == ""
    path = root / "mine.jsonl"
    (sample,) = own_data.iter_samples(path, root)
    assert sample.images[0].size in ((100, 50), (200, 100))


@pytest.mark.parametrize("image, sentence", [
    ({"path": "a.png", "bytes": base64_text()}, "mig-kit data import own FILE --out OUT writes"),
    ({"bytes": base64_text()}, "an image is in the file itself; mig-kit data import own"),
    (f"data:image/png;base64,{base64_text()}", "an image is in the file itself; mig-kit data"),
    ("https://x.org/a.png", "an image is an address; download it, and give the path of the file"),
    ("s3://bucket/a.png", "an image is an address; download it"),
    ("/etc/passwd", "'/etc/passwd' is not below the image root"),
    ("file:///etc/passwd", "'/etc/passwd' is not below the image root"),
    ("sub\\c.jpg", "with / and without '..'"), ("../a.png", "with / and without '..'"),
    ("sub", "'sub' is not there"), ("A.PNG", "'A.PNG' is not there"),
    ({"path": None}, "'images' must be a list of 1 to 64 paths"),
    (["a.png"], "'images' must be a list of 1 to 64 paths"),
    (None, "'images' must be a list of 1 to 64 paths")])
def test_images_that_are_not_found_are_named(root, image, sentence):
    assert sentence in problems_of(root, {**GOOD, "images": ["a.png", image]})


@pytest.mark.parametrize("changes", [
    {"image": "2"}, {"image": 2.0}, {"image": " 2"}, {"box": ["10.0", 20.0, "60.", 90]},
    {"box": ["1e1", 20, 60, 90]}, {"box": ["+10", 20, 60, 90]},
    {"box": [0.1, "0.2", ".6", "0.9"], "coordinates": "normalized_1"},
    {"box": ["100", "200", 600, 900.0], "coordinates": "normalized_1000"}])
def test_numbers_as_text_are_read(root, changes):
    assert problems_of(root, {**GOOD, **changes}) == ""
    (sample,) = own_data.iter_samples(root / "mine.jsonl", root)
    assert sample.targets[0].image == 2 and type(sample.targets[0].image) is int
    assert len(sample.targets[0].box) == 4


@pytest.mark.parametrize("changes", [
    {"image": "2nd"}, {"image": True}, {"image": "0"}, {"image": "2,0"}, {"image": "NaN"},
    {"image": "2\u001f"}, {"box": ["10", "20", "60", "x"]}, {"box": "10,20,60,90"},
    {"box": ["10px", 20, 60, 90]}, {"box": ["1_0", 20, 60, 90]}, {"box": ["", 20, 60, 90]}])
def test_text_that_is_no_number_is_named(root, changes):
    assert any(words in problems_of(root, {**GOOD, **changes})
               for words in ("from 1", "must be four numbers"))


def test_keys_that_are_there_twice_are_named(root):
    for key in ("images", "id", "x"):
        line = f'{{"{key}": 1, "{key}": 1, ' + json.dumps(GOOD)[1:]
        sentence = f"the key '{key}' is there twice; leave one out"
        assert sentence in problems_of(root, line.encode())
        path = write(root, f"[{line}, {json.dumps(GOOD)}]".encode())
        assert [sentence in problems for _, problems in own_data.check_file(path, root)] == [
            True, False]
    deeper = json.dumps({"images": ["a.png"], "question": "Find it."})[:-1]
    assert "twice" in problems_of(root, (deeper + ', "targets": [{"image": 1, "image": 2}]}')
                                  .encode())


def test_options_that_are_the_same_are_named(root):
    for options in (["a", "b", "a"], ["a", "a "], ["a  b", "a b"], ["a\nb", "a b"],
                    ["\u676f\u5b50", "\u676f\u5b50"], ["a", "b", "c", "d", "e", "f", "g", "g"]):
        assert "are the same; no letter is the correct one" in problems_of(
            root, {**CHOICE, "options": options, "letter": "A"})


@pytest.mark.parametrize("question, stripped", [
    ("<image><image>Find it.", "Find it."), ("<image>\n<image>\nFind it.", "Find it."),
    ("Image 1: <image>\nImage 2: <image>\nFind it.", "Find it."),
    ("Find it. <image><image>", "Find it."),
    ("<image_1><image_2>Find it.", "Find it."),
    ("Find <image_1>'s cup in <image_2>.", "Find image 1's cup in image 2."),
    ("<image_1> shows a cup. Find it in <image_2>.",
     "image 1 shows a cup. Find it in image 2."),
    ("Is the cup of <image> in <image>?", "Is the cup of image 1 in image 2?"),
    ("<img>a.png</img><img>b.png</img>Find it.", "Find it."),
    ("Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nFind it.", "Find it."),
    ("<ImageHere><ImageHere>Find it.", "Find it."), ("<IMAGE><Image>Find it.", "Find it."),
    ("[IMG][IMG]Find it.", "Find it."), ("<img src='a.png'><img src='b.png'/>Find it.", "Find it."),
    ("![](a.png)![x](b.png) Find it.", "Find it."), ("{image}{image}Find it.", "Find it."),
    ("<start_of_image><start_of_image>Find it.", "Find it."),
    ("<im_start><image><im_end><im_start><image><im_end>Find it.", "Find it."),
    ("<image 1>Find <image 2>", "image 1Find image 2"), ("<image>Find it.", "Find it."),
    ("<image/><image />Find it.", "Find it."), ("<picture><photo>Find it.", "Find it.")])
def test_tags_of_images_are_named_and_taken_out(root, question, stripped):
    row = {**GOOD, "question": question}
    problem = problems_of(root, row)
    assert "which is text to the model and costs points" in problem
    assert "mig-kit data import own FILE --out OUT takes such tags out" in problem
    out = root / "out.jsonl"
    code, text = call("import", "own", write(root, [row]), "--out", out)
    assert code == 0, text
    assert json.loads(out.read_text())["question"] == stripped
    assert call("check", out)[0] == 0


@pytest.mark.parametrize("question", [
    "Find <bbox>.", "Find <box>.", "Find <ref-object>.", "<ref>cup</ref>", "Find <region1>.",
    "Find <obj_2>.", "Find {bbox}.", "<p>cup</p>", "<video>Find it.", "Find <BBOX>.",
    "<audio>Find it.", "Find <point>."])
def test_tags_of_boxes_are_named(root, question):
    row = {**GOOD, "question": question}
    assert "write {ref} for the box 'reference', else take it out" in problems_of(root, row)
    if not question.startswith(("<ref>", "<p>")):  # tags that only frame a text are taken out
        code, text = call("import", "own", write(root, [row]), "--out", root / "none.jsonl")
        assert code == 1 and "which is text to the model" in text


@pytest.mark.parametrize("question", [
    "Is a < b and b > c?", "Find the <title> of the page.", "Find the box.", "Find image 1's cup.",
    "Find [1] of it.", "Where is it (image 2)?", "Find {ref}.", "Find the 'img' sign.", "x<y>z?",
    "Find the tag <a href='x'>."])
def test_texts_without_tags_are_left(root, question):
    reference = {"reference": [1, 2, 30, 40]} if "{ref}" in question else {}
    assert problems_of(root, {**GOOD, "question": question, **reference}) == ""


def test_a_tag_that_names_no_image_is_left_out(root):
    row = {**GOOD, "question": "Is the <image> here?"}
    code, text = call("import", "own", write(root, [row]), "--out", root / "none.jsonl")
    assert code == 1 and "there are 1 <image> tags and 2 images; write one per image" in text


@pytest.mark.parametrize("piece", [" ", "\n", "<", "<image", "<image> ", "<img", "![", "<im_",
                                   "[IMG", "<image_here", "Image 1: "])
def test_hostile_questions_take_no_time(piece):
    started = time.perf_counter()
    with suppress(Problem):
        clean_question(piece * 20_000 + "x", 2)
    text_problem("'question'", piece * 20_000)
    assert time.perf_counter() - started < 5


def test_tags_in_options(root):
    row = {**CHOICE, "options": ["<image 1>", "a dog"]}
    assert "'options' number 1 holds <image 1>" in problems_of(root, row)
    call("import", "own", write(root, [row]), "--out", root / "out.jsonl")
    assert json.loads((root / "out.jsonl").read_text())["options"] == ["image 1", "a dog"]


@pytest.mark.parametrize("row", [
    {**GOOD, "images": []}, {**CHOICE, "images": []},
    {"images": [], "question": "2 + 2?", "options": ["3", "4"], "letter": "B"},
    {"images": [], "question": "Is it?", "image": None},
    {"images": [], "question": "All?", "targets": []}])
def test_questions_without_an_image_are_named(root, row):
    assert ("'images' is empty; questions are divided into sets, and read together, by their "
            "images: leave those without one out") in problems_of(root, row)


def draw_frames(size=(160, 120), n=3):
    return [Image.new("RGB", size, (60 * number, 0, 0)) for number in range(n)]


FILMS = [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {}),
         ("a.mpo", {"format": "MPO"}), ("a.tiff", {"compression": "tiff_lzw"}),
         ("renamed.jpg", {"format": "GIF"}), ("a.jpeg", {"format": "MPO"}),
         ("none", {"format": "WEBP"}), ("a.apng", {"format": "PNG"}), ("a.avif", {})]


@pytest.mark.parametrize("name, options", FILMS)
def test_films_are_named_where_a_box_is_asked_for(tmp_path, name, options):
    first, *others = draw_frames()
    first.save(tmp_path / name, save_all=True, append_images=others, **options)
    row = {**GOOD, "images": [name], "image": 1}
    assert "holds several frames, and it is not said which one a box is in" in problems_of(
        tmp_path, row)
    assert problems_of(tmp_path, {**CHOICE, "images": [name]}) == "", "the first frame is shown"
    assert call("duplicates", tmp_path, tmp_path)[1].startswith(f"{tmp_path / name}\t")
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


@pytest.mark.parametrize("name, content, sentence", [
    ("a.jsonl.gz", gzip.compress(b"{}"), "is compressed by gzip; unpack it first: gunzip -k"),
    ("a.jsonl", gzip.compress(b"{}"), "is compressed by gzip"),
    ("a.bz2", b"BZh91AY", "is compressed or an archive; unpack it"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is compressed or an archive"),
    ("a.tar", b"a.json", "is compressed or an archive"),
    ("a.zip", make_zip(), "is a zip archive or an Excel table; unpack it"),
    ("a.xlsx", make_zip(), "or save the table with one JSON object a line"),
    ("a.pkl", pickle.dumps(GOOD), "is a pickle, which can hold code, and the kit opens none"),
    ("a.arrow", b"\xff\xff\xff\xff", "is an Arrow file; save it as parquet"),
    ("a.csv", b"images,question\n", "is no JSON; save it with one JSON object a line"),
    ("a.tsv", b"images\tquestion\n", "orient='records', lines=True"),
    ("a.xml", b"<annotation>", "is no JSON; save it"), ("a.yaml", b"- a", "is no JSON; save it"),
    ("a.json", json.dumps([GOOD]).encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ("a.json", image_bytes(), "is an image or a page; give the file of questions"),
    ("a.db", b"SQLite format 3\0", "is no JSON; save it")],
    ids=lambda value: "bytes" if isinstance(value, bytes) else None)  # they hold the time
def test_other_files_say_what_they_are(root, name, content, sentence):
    path = write(root, content, name)
    for words in (("check",), ("preview", "--out", root / "p.html"),
                  ("import", "swift", "--out", root / "p.jsonl")):
        code, text = call(*words, path)
        assert code == 1 and f"{name} is " in text and sentence in text and text.count("\n") <= 1


def write_table(root, rows, name="train.parquet"):
    path = root / name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


IMAGES = [{"bytes": image_bytes(), "path": None}, {"bytes": image_bytes("JPEG", "blue"),
                                                   "path": "x.jpg"}]
ANSWER = '{"image": 2, "box": [10, 20, 60, 90]}'


@pytest.mark.parametrize("form, row", [
    ("own", {**GOOD, "images": IMAGES}),
    ("own", {**GOOD, "images": IMAGES, "question": "<image><image>Find the cup of image 1."}),
    ("verl", {"images": IMAGES, "problem": "<image><image>Find the cup of image 1.",
              "answer": ANSWER}),
    ("verl", {"images": IMAGES, "problem": "<image><image>Find the cup of image 1.",
              "solution": f"<answer>{ANSWER}</answer>"}),
    ("verl", {"images": IMAGES, "data_source": "x", "ability": "ground",
              "prompt": [{"role": "user", "content": "<image><image>Find the cup of image 1."}],
              "reward_model": {"style": "rule", "ground_truth": ANSWER}}),
    ("verl", {"images": IMAGES, "prompt": [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "<image><image>Find the cup of image 1."}],
        "reward_model": {"ground_truth": {"image": 2, "box": [10, 20, 60, 90]}}}),
    ("llava", {"images": IMAGES, "messages": [
        {"role": "user", "content": "<image><image>Find the cup of image 1."},
        {"role": "assistant", "content": ANSWER}]}),
    ("llava", {"images": IMAGES, "conversations": [
        {"from": "human", "value": "<image><image>Find the cup of image 1."},
        {"from": "gpt", "value": ANSWER}]}),
    ("swift", {"images": IMAGES, "messages": [
        {"role": "user", "content": "<image><image>Find the cup of image 1."},
        {"role": "assistant", "content": "<bbox>"}],
        "objects": {"ref": [], "bbox": [[10, 20, 60, 90]], "image_id": [1]}}),
    ("swift", {"images": IMAGES, "query": "<image><image>Find the cup of image 1.",
               "response": "<bbox>", "objects": {"bbox": [[10, 20, 60, 90]], "image_id": [1]}})])
def test_tables_are_named_and_imported(tmp_path, form, row):
    path, out = write_table(tmp_path, [row, row]), tmp_path / "mine.jsonl"
    code, text = call("check", path)
    assert code == 1 and f"is a parquet table; mig-kit data import {form} {path} --out" in text
    coordinates = ["--coordinates", "pixels"] if form in ("llava", "verl") else []
    code, text = call("import", form, path, "--out", out, *coordinates)
    assert code == 0 and "2 questions read, 2 written" in text, text
    assert call("check", out)[0] == 0 and len(list((tmp_path / "mine_images").iterdir())) == 2
    sample, _ = own_data.iter_samples(out, tmp_path)
    assert sample.question == "Find the cup of image 1." and sample.id == "row-1"
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
    call("import", "verl", tmp_path / "a.parquet", "--coordinates", "pixels", "--out", out)
    (sample,) = own_data.iter_samples(out, out.parent)
    assert sample.images[0].size == (64, 64) and sample.targets == ((1, (1, 2, 30, 40)),)


@pytest.mark.parametrize("row, sentence", [
    ({"images": [{"bytes": b"no image"}]}, "the bytes of an image are none"),
    ({"images": [{"bytes": None, "path": None}]}, "an image must be named by its path"),
    ({"images": [{"path": "none.png"}]}, "'none.png' is not there"),
    ({"answer": "A"}, "no answer holds a box; a question of own data needs one, or the keys"),
    ({"problem": None}, "'messages' or 'conversations' must be a list of turns"),
    ({"answer": None}, "or the answer in response, solution, answer or reward_model"),
    ({"answer": "[1, 2]"}, "no answer holds a box"),
    ({"images": None}, "'images' must list 1 to 64 paths; this record has none"),
    ({"problem": "<image><image>Find it."}, "there are 2 <image> tags and 1 images"),
    ({"answer": "[1, 2, 3000, 40]"}, "leaves image 1, which is 100x100 pixels")])
def test_rows_that_are_wrong_are_named(tmp_path, row, sentence):
    good = {"images": IMAGES[:1], "problem": "<image>Find it.", "answer": "[1, 2, 30, 40]"}
    path = write_table(tmp_path, [{**good, **row}])
    code, text = call("import", "verl", path, "--coordinates", "pixels", "--out",
                      tmp_path / "out.jsonl")
    assert code == 1 and text.startswith("row 1: ") and sentence in text, text


def parts(*kinds):
    """A user's text as a list of parts, with the two images."""
    images = iter(kinds)
    return [next(images), next(images), {"type": "text", "text": "Find the cup of image 1."}]


@pytest.mark.parametrize("form, record", [
    ("llava", {"messages": [{"role": "user", "content": parts(
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64_text()}"}},
        {"type": "image_url", "image_url": {"url": "b.png"}})},
        {"role": "assistant", "content": ANSWER}]}),
    ("llava", {"messages": [{"role": "user", "content": parts(
        {"type": "image", "image": "a.png"}, {"type": "image", "image": "file://{root}/b.png"})},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}]}),
    ("llava", {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": parts(
        {"type": "image"}, {"type": "image"})}, {"role": "assistant", "content": ANSWER}]}),
    ("llava", {"messages": [{"role": "user", "content": parts(
        {"type": "input_image", "image_url": "a.png"}, {"type": "image", "path": "b.png"})},
        {"role": "model", "content": ANSWER}]}),
    ("llava", {"image": ["a.png", "b.png"], "conversations": [
        {"from": "human", "value": "Find the cup of image 1."}, {"from": "gpt", "value": ANSWER}]}),
    ("verl", {"images": ["a.png", "b.png"], "prompt": "Find the cup of image 1.",
              "answer": ANSWER}),
    ("verl", {"images": [{"path": "a.png"}, {"bytes": base64_text()}],
              "messages": [{"role": "user", "content": "<image><image>Find the cup of image 1."}],
              "solution": ANSWER}),
    ("swift", {"images": ["a.png", {"path": "b.png"}], "query": "Find the cup of image 1.",
               "response": "<bbox>", "objects": {"bbox": [["10", "20", "60", "90"]],
                                                 "image_id": [1]}}),
    ("swift", {"images": ["{root}/a.png", "{root}/b.png"], "solution": "<bbox>", "messages": [
        {"role": "user", "content": "Find the cup of image 1."}],
        "objects": {"bbox": [[10, 20, 60, 90]], "image_id": [1]}}),
    ("swift", {"images": ["a.png", "b.png"], "messages": [
        {"role": "user", "content": "<image><image>Find the cup of image 1."},
        {"role": "assistant", "content": "[10, 20, 60, 90] in image 2"}]})])
def test_layouts_of_others_are_named_and_imported(root, form, record):
    text = json.dumps(record).replace("{root}", str(root))
    path, out = write(root, text.encode(), "in.jsonl"), root / "out.jsonl"
    problem = problems_of(root, text.encode())
    assert "is of another project's layout; mig-kit data import" in problem
    coordinates = [] if form == "swift" and "objects" in record else ["--coordinates", "pixels"]
    code, said = call("import", form, path, "--out", out, *coordinates)
    assert code == 0, said
    line = json.loads(out.read_text())
    assert line["question"] == "Find the cup of image 1." and line["image"] == 2
    assert line["box"] == [10, 20, 60, 90] and call("check", out)[0] == 0


@pytest.mark.parametrize("form, record, sentence", [
    ("llava", {"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]},
     "a part of a text is of the type 'video'; only texts and images can be used"),
    ("llava", {"messages": [{"role": "user", "content": ["text"]}]},
     "a part of a text must be an object with its type"),
    ("llava", {"messages": [{"role": "user", "content": parts(
        {"type": "image_url", "image_url": {"url": "https://x.org/a.png"}},
        {"type": "image", "image": "b.png"})}, {"role": "assistant", "content": ANSWER}]},
     "is an address; download it and name the file"),
    ("llava", {"image": "a.png", "messages": [{"role": "tool", "content": "x"}]},
     "turns must be of user and assistant"),
    ("llava", {"messages": TALK}, "'images' must list 1 to 64 paths; this record has none"),
    ("swift", {"images": ["a.png"], "messages": TALK[:1]}, "or the answer in response, solution"),
    ("swift", {"images": ["a.png"], "messages": TALK, "objects": "[]"}, "2 <image> tags and 1"),
    ("swift", {"images": ["a.png", "b.png"], "messages": TALK, "objects": [1]},
     "'objects' must be an object with 'ref' and 'bbox', as ms-swift 3 has it"),
    ("swift", {"instruction": "x", "output": "y", "images": ["a.png"]},
     "'messages' or 'conversations' must be a list of turns"),
    ("verl", {"images": ["a.png"], "problem": "Find it.", "answer": "42"},
     "no answer holds a box; a question of own data needs one, or the keys options and letter")])
def test_layouts_of_others_that_are_wrong_are_named(root, form, record, sentence):
    path = write(root, [record], "in.jsonl")
    code, text = call("import", form, path, "--out", root / "none.jsonl", *(
        [] if "objects" in record else ["--coordinates", "pixels"]))
    assert code == 1 and sentence in text, text


@pytest.mark.parametrize("keys", [
    {"images": ["a.png"], "annotations": [], "categories": []}, {"sentences": [], "ann_id": 1},
    {"image": "a.png", "normal_caption": "x", "solution": [1, 2, 3, 4]}])
def test_other_layouts_name_their_importer(root, keys):
    assert "mig-kit data import" in problems_of(root, keys)


def test_long_prompts_are_named(root):
    long = {**GOOD, "question": "Find the cup. " * 3000}
    path = write(root, [GOOD, long, CHOICE])
    assert call("check", path)[0] == 0, "no model is asked"
    code, text = call("check", path, "--profile", "tiny")
    assert code == 1 and text.startswith("line 2: the prompt takes ") and "3 lines, 2" in text
    assert "and the model reads 4096; shorten the question, take fewer images, or" in text
    code, text = call("check", write(root, [{**GOOD, "images": ["b.png"] * 64}]),
                      "--profile", "tiny")
    assert code == 1 or "1 correct" in text
    assert "no profile 'x' in params/" in str(CliRunner().invoke(
        data, ["check", str(path), "--profile", "x"]).exception)


def test_a_line_that_is_too_long_says_where_images_go(root):
    row = {**GOOD, "images": [{"bytes": "A" * (1 << 20)}, "b.png"]}
    assert "put one question on a line, and images into files of their own" in problems_of(root,
                                                                                           row)


def test_preview_draws_what_it_can(root):
    wrong = [{**GOOD, "image": 7}] * 12
    path, out = write(root, [GOOD, *wrong, CHOICE]), root / "p.html"
    code, text = call("preview", path, "--out", out)
    assert code == 1 and "line 2: 'image' is 7, but there are 2 images" in text
    assert "2 questions drawn, 12 wrong left out" in text and "line 12:" not in text
    assert out.read_text().count("<img ") == 2
    code, text = call("preview", write(root, wrong), "--out", out)
    assert code == 1 and "line 1: 'image' is 7" in text and "or has no correct line" in text


@pytest.mark.parametrize("question, is_there", [
    ("Find the cup.", True), ("Trouve la tasse, s'il te pla\u00eet.", True),
    ("\u041d\u0430\u0439\u0434\u0438 \u0447\u0430\u0448\u043a\u0443.", True),
    ("\u0392\u03c1\u03b5\u03c2 \u03c4\u03bf.", True), ("Find \u2265 2 cups \u2192 1.", True),
    ("\u05de\u05e6\u05d0", True), ("\u627e\u5230\u676f\u5b50", False),
    ("\u30ab\u30c3\u30d7", False), ("\ucef5\uc744", False), ("\u0915\u092a", False),
    ("\U0001f375", False)])
def test_letters_that_no_font_has_are_named(root, monkeypatch, question, is_there):
    from mig_kit.drawing import pictures

    fonts = pictures.font_manager.fontManager
    monkeypatch.setattr(fonts, "ttflist",
                        [font for font in fonts.ttflist if font.name == "DejaVu Sans"])
    pictures._find_font.cache_clear()
    path = write(root, [{**GOOD, "question": question}])
    _, note = write_preview(own_data.iter_samples(path, root), root / "p.png")
    assert (note == "") == is_there
    if not is_there:
        assert question[0] in note and "as Noto Sans CJK for Chinese" in note
    assert write_preview(own_data.iter_samples(path, root), root / "p.html") == (1, "")
    pictures._find_font.cache_clear()


def test_a_font_that_has_the_letters_is_taken():
    from mig_kit.drawing import pictures

    assert "DejaVuSans.ttf" in pictures.text_font(14, "\u010d").path
    assert "DejaVuSans.ttf" not in pictures.text_font(14, "\u2312").path
    assert not pictures.missing_letters("a \u2312") and pictures.missing_letters("\U00020000")


def test_help_points_to_the_guide():
    for command in ("check", "preview"):
        text = " ".join(call(command, "--help")[1].split())
        assert "notebooks/guide/own_data.md, says what is in" in text and ".py" not in text
