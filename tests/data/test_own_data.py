"""Own data: what each mistake is called, on which line, and the reader under fuzz."""

import json
import os

import numpy
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from command_line import run_mig_kit
from data_files import CHOICE, GOOD, call, changed, check, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.common import UserError
from mig_kit.data import own_data


def test_a_correct_file_and_its_samples_in_all_coordinates(root):
    path = write_lines(
        root, GOOD,
        changed(coordinates="normalized_1000", box=..., id="x", task="diff",
                boxes=[[0, 0, 500, 1000], [500, 0, 1000, 1000]]),
        changed(coordinates="normalized_1", box=[0, 0, 0.5, 1], question="Like {ref}?",
                reference=[0, 0, 0.5, 1]))
    assert check(path, root) == [[], [], []]
    first, second, third = own_data.iter_samples(path, root)
    assert first.targets == ((2, (10.0, 20.0, 60.0, 90.0)),) and first.id == "line-1"
    assert second.targets == ((2, (0.0, 0.0, 100.0, 100.0)), (2, (100.0, 0.0, 200.0, 100.0)))
    assert second.task == "diff" and second.id == "x"
    assert third.targets == ((2, (0.0, 0.0, 100.0, 100.0)),)
    assert third.reference == (0.0, 0.0, 50.0, 50.0)
    assert len(list(own_data.iter_samples(path, root, limit=2))) == 2


@pytest.mark.parametrize("row, sentence", [
    (changed(image=None, box=None), "this line has none"),
    (b"", "no JSON object"), (b"{", "no JSON object (Expecting property name"),
    (b"\xff{}", "no JSON object ('utf-8' codec can't decode byte 0xff"),
    (b"[" * 20000, "no JSON object"), (b"3", "no JSON object"),
    (changed(box=...), "give one of 'box', 'boxes' and 'options'"),
    (changed(boxes=[[1, 2, 3, 4]]), "this line has box and boxes"),
    (changed(coordinates=...), "'coordinates' says what boxes are measured in"),
    (changed(coordinates="0-1"), "'coordinates': Input should be 'pixels', 'normalized_1000' or"),
    (changed(quesion="x"), "'quesion': Extra inputs are not permitted"),
    (changed(images=[]), "'images': List should have at least 1 item"),
    (changed(question=" "), "'question'"), (changed(question="\ud83d"), "'question'"),
    (changed(image=0), "'image': Input should be greater than or equal to 1"),
    (changed(image=3), "'box' is in image 3, but there are 2 images"),
    (changed(box=[1, 2, 3, float("nan")]), "'box' number 4: Input should be a finite number"),
    (changed(box=[60, 20, 10, 90]), "x2 must be greater than x1 and y2 than y1 (is it x, y, width"),
    (changed(box=[0.1, 0.2, 0.5, 0.6]), "are the coordinates 'normalized_1'?"),
    (changed(coordinates="normalized_1000", box=[1, 2, 3, 1001]), "1000x1000 in 'normalized_1000'"),
    (changed(box=[1, 2, 300, 4]), "leaves image 2"), (changed(box=[-1, 2, 3, 4]), "leaves image 2"),
    (changed(id="\x1b[2J"), "'id': String should match pattern"),
    (changed(question="{ref}"), "go together"), (changed(reference=[1, 2, 3, 4]), "go together"),
    (changed(question="{ref}", reference=[1, 2, 103, 40]), "leaves image 1"),
    (changed(images=["a.png", "broken.png"]), "cannot identify image file"),
    (changed(images=["a.png", "../b.png"]), "below the image root; write it relative to the root, "
                                            "with / and without '..'"),
    (changed(images=["a.png", "long.png"]), "up to 200 to 1"),
    (changed(images=["a.png", {"bytes": "aGk="}]), "'images' number 2: Input should be a valid st"),
    (changed(images=["a.png", "https://x.org/a.png"]), "x.org/a.png' is not there; copy it below"),
    (changed(images=["a.png", "file:///etc/passwd"]), "'/etc/passwd' is not below the image root"),
    *((changed(question=f"Find {tag} it."), f"holds {tag}") for tag in (
        "<image>", "<image_1>", "<bbox>", "<ref>", "<video>", "<|im_start|>", "<img src='a.png'>",
        "<image 2>", "</box>", "<BBOX>")),
    (changed(reply="<|im_end|>"), "'reply' holds <|im_end|>"),
    ({"messages": []}, "'images': Field required"),
    *((changed(CHOICE, **changes), sentence) for changes, sentence in (
        ({"letter": "C"}, "'letter' must be that of the correct option, A to B"),
        ({"letter": ...}, "'options' and 'letter' go together"),
        ({"options": list("abcdefghi")}, "'options': List should have at most 8"),
        ({"options": ["a", "<|im_end|>"]}, "'options' number 2 holds <|im_end|>"),
        ({"options": ["a  b", "a b"]}, "are the same; no letter is the correct one"),
        ({"options": ["B", "A"]}, "which one 'letter' or a reply means is unclear"),
        ({"options": ["A. a dog", "J. a cup"]}, "'A. a dog' is option A), so which one 'letter'"),
        ({"options": ["1. a cup", "2. a dog"]}, "letters or numbers of their own ('1. a cup' is"),
        ({"box": [1, 2, 3, 4]}, "this line has box and options"),
        ({"coordinates": "pixels"}, "'coordinates' says what boxes are measured in")))])
def test_each_mistake_has_its_sentence_and_line(root, row, sentence):
    path = write_lines(root, GOOD, row, GOOD)
    first, wrong, last = check(path, root)
    assert not first and not last and any(sentence in problem for problem in wrong), wrong
    with pytest.raises(UserError, match="line 2"):
        list(own_data.iter_samples(path, root))


@pytest.mark.parametrize("options", [["A. a cup", "B. a dog"], ["(A) a cup", "(B) a dog"],
                                     ["a) a cup", "b) a dog"]])
def test_options_with_letters_of_their_own_have_them_once(root, options):
    path = write_lines(root, {**CHOICE, "options": options})
    (sample,) = own_data.iter_samples(path, root)
    assert sample.options == ("a cup", "a dog") and sample.letter == "B"
    for plain in (("A cup", "1. a dog"), ("1.5 m", "2.5 m"), ("12", "13"), ("X", "Y")):
        path = write_lines(root, {**CHOICE, "options": plain})
        assert next(own_data.iter_samples(path, root)).options == plain


def test_multiple_choice(root):
    with_reference = {**CHOICE, "question": "What is at {ref}?", "reference": [0, 0, 0.5, 1],
                      "coordinates": "normalized_1"}
    path = write_lines(root, CHOICE, with_reference)
    assert check(path, root) == [[], []]
    plain, referring = own_data.iter_samples(path, root)
    assert plain.options == ("a cup", "a dog") and plain.letter == "B" and plain.targets == ()
    assert referring.reference == (0.0, 0.0, 50.0, 50.0)
    assert "look at 2 questions" in call("check", path, "--sheet", root / "choice.html")[1]
    assert "What is it? A. a cup B. a dog (correct: B)" in (root / "choice.html").read_text()


def test_images_that_are_cut_short_are_found(root):
    noise = Image.effect_noise((200, 100), 80)
    for suffix in ("png", "jpg"):
        noise.save(root / f"whole.{suffix}")
        content = (root / f"whole.{suffix}").read_bytes()
        (root / f"cut.{suffix}").write_bytes(content[:len(content) * 2 // 3])
    path = write_lines(root, changed(images=["cut.png", "b.png"]),
                       changed(images=["b.png", "cut.jpg"]), GOOD)
    (first,), (second,), third = check(path, root)
    assert first.startswith("image 1: 'cut.png': ") and not third
    assert second.startswith("image 2: 'cut.jpg': image file is truncated")


def test_all_mistakes_of_a_line_and_ids_there_twice(root):
    path = write_lines(root, changed(id="line-2"), GOOD,
                       changed(image="x", coordinates="px", question=""))
    _, second, third = check(path, root)
    assert second == ["id 'line-2' is there twice"] and len(third) == 3
    with pytest.raises(UserError, match="has 2 wrong of 3 lines; line 2: id 'line-2' is there tw"):
        own_data.require_correct_lines(path, root)


def test_tables_of_own_data(root):
    path = root / "list.json"
    for encoding in ("utf-8", "utf-8-sig"):  # the second with a byte order mark
        path.write_text(json.dumps([GOOD, CHOICE]), encoding)
        assert check(path, root) == [[], []]
        (root / "mark.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(CHOICE)}\n", encoding)
        assert check(root / "mark.jsonl", root) == [[], []]
    columns = dict.fromkeys(GOOD | CHOICE)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([columns | GOOD, columns | CHOICE]),
                                root / "t.parquet")
    assert check(root / "t.parquet", root) == [[], []]


NEITHER = "is neither JSON in UTF-8 nor parquet; own data are JSON lines, a JSON list or parquet"
ANOTHER = "not both of images and question; own data are JSON lines, a JSON list or parquet"


@pytest.mark.parametrize(("name", "content", "sentence"), [
    ("a.jsonl.gz", b"\x1f\x8b", NEITHER), ("b.json", b"\0", NEITHER),
    ("yolo.txt", b"0 0.5 0.5 0.2 0.2\n", NEITHER), ("a.tsv", b"images\tquestion\n", NEITHER),
    ("label_studio.json", b'[{"id": 1, "data": {"image": "a.png"}, "annotations": []}]',
     f"its first record has the keys 'id', 'data', 'annotations', {ANOTHER}"),
    ("wide.json", json.dumps(GOOD, indent=1).encode(), "is JSON over several lines, and no list"),
    ("coco.json", b'{"images": [], "annotations": [], "categories": []}', ANOTHER),
    ("deep.json", b"[" * 200_000, "is cut or broken (maximum recursion depth exceeded"),
    ("latin.json", '["ü"]'.encode("latin-1"), "is cut or broken ('utf-8' codec can't decode")])
def test_a_file_of_another_kind_is_one_sentence(root, name, content, sentence):
    (root / name).write_bytes(content)
    code, text = call("check", root / name)
    assert code == 1 and sentence in text and "\n" not in text


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=5)
    | st.dictionaries(st.text(max_size=8), values, max_size=4), max_leaves=10)
NUMBERS = st.integers(-2, 1001) | st.floats(-1, 1001)
BOXES = st.lists(NUMBERS, min_size=4, max_size=4) | VALUES
PATHS = st.sampled_from(["a.png", "b.png", "long.png"])
ROWS = st.fixed_dictionaries(
    {"images": st.lists(PATHS, min_size=1, max_size=3) | VALUES,
     "question": st.sampled_from(["Find it.", "As {ref}?"]) | VALUES,
     "image": st.integers(0, 3) | st.none() | VALUES,
     "coordinates": st.sampled_from(["pixels", "normalized_1000", "normalized_1", "0-1000"])
     | VALUES},
    optional={"options": st.lists(st.text(max_size=5), max_size=9) | VALUES,
              "letter": st.sampled_from("ABCI") | VALUES, "reply": VALUES,
              "box": BOXES, "boxes": st.lists(BOXES, max_size=3) | VALUES, "reference": BOXES,
              "id": VALUES, "task": VALUES, "unit": VALUES, "x": VALUES})
LINES = (ROWS.map(lambda row: json.dumps(row).encode())
         | VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 300)), deadline=None,
          suppress_health_check=list(HealthCheck))
@given(LINES)
def test_any_line_is_a_sample_inside_the_rules_or_has_sentences(root, line):
    path = root / "fuzz.jsonl"
    path.write_bytes(line)
    try:
        problems = [problem for problems in check(path, root) for problem in problems]
    except UserError as error:  # no file of lines: one sentence about the file
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert all(problems)
    try:
        samples = list(own_data.iter_samples(path, root))
    except UserError:
        assert problems
        return
    assert not problems
    for sample in samples:
        boxes = list(sample.targets)
        if sample.reference:
            boxes.append((1, sample.reference))
        for number, box in boxes:
            width, height = sample.sizes[number - 1]
            assert 0 <= box[0] < box[2] <= width + 1e-6
            assert 0 <= box[1] < box[3] <= height + 1e-6


MANY = "so many that others are probably wrong, too"


def test_what_pandas_saves_beside_the_columns_is_not_read(root):
    rows = [GOOD | {"box": numpy.array(GOOD["box"])}, CHOICE]
    table = pandas.DataFrame(rows * 3).sample(frac=1, random_state=0)
    table.to_parquet(root / "shuffled.parquet")
    assert "__index_level_0__" in pyarrow.parquet.read_schema(root / "shuffled.parquet").names
    assert check(root / "shuffled.parquet", root) == [[]] * 6
    table = table.rename_axis("Unnamed: 0.1").reset_index()
    table.to_json(root / "lines.jsonl", orient="records", lines=True)
    assert check(root / "lines.jsonl", root) == [[]] * 6


@pytest.mark.parametrize("write", [str, json.dumps], ids=["pandas", "json"])
def test_a_csv_is_refused_with_lines_that_read_it(root, write):
    lines = changed(id=1), changed(CHOICE, id=2), changed(
        box=..., boxes=[GOOD["box"]], id=3, question="Like {ref}?", reference=[1, 2, 9, 8])
    rows = [{key: write(value) if isinstance(value, list) else value for key, value in row.items()}
            for row in lines]
    pandas.DataFrame(rows).to_csv(root / "mine.csv")
    code, text = call("check", root / "mine.csv")
    first, *script = text.splitlines()
    assert code == 1 and first.endswith("write it as JSON lines with")
    exec("\n".join(script), {})  # as it is pasted
    assert check(root / "mine.jsonl", root) == [[], [], []]


def test_most_boxes_speak_against_the_others(root, tmp_path):
    """Of x, y, width, height a few pass for corners; --out does not write them."""
    lines = [changed(box=[60, 40, 20, 30])] * 20 + [changed(box=[10, 10, 60, 40])] * 4
    path, out = write_lines(root, *lines), tmp_path / "out.jsonl"
    text = call("check", path, "--out", out)[1]
    assert "20 are inverted" in text and MANY in text and "nothing written" in text
    assert not out.exists()
    path = write_lines(root, *lines[:1], *lines[20:] * 6)
    text = call("check", path, "--out", out)[1]
    assert "24 written to" in text and MANY not in text


LONG = {**GOOD, "question": "Find the cup. " * 3000}
HALF = "no box of 24 passes half of its image"
IN_A_CORNER = [changed(box=[1, 2, 30, 40])] * 24


@pytest.mark.parametrize("rows, words, sentences", [
    ([changed(box=[-500, 20, 60, 90])], (), ["the furthest reaches 350 % of its image's width"]),
    (IN_A_CORNER, (), [HALF]),
    ([*IN_A_CORNER[1:], changed(box=[1, 2, 190, 40])], (), [f"not {HALF}"]),
    ([changed(box=[0, 0, 1.0000001, 0.5], coordinates="normalized_1")], (), ["1 correct, 0 wrong"]),
    ([changed(question="Find the cup of image 3.")], (),
     ["'question' names image 3, but there are 2 images"]),
    ([GOOD, LONG, CHOICE], (), ["3 lines, 3 correct"]),  # no model is asked
    ([GOOD, LONG, CHOICE], ("--profile", "tiny"),
     ["line 2: the prompt takes ", "3 lines, 2", "and the model reads 4096; shorten the question, "
      "take fewer images, or"])])
def test_what_a_check_says_of_boxes_questions_and_prompts(root, rows, words, sentences):
    code, text = call("check", write_lines(root, *rows), *words)
    assert code == ("0 wrong" not in text)
    for sentence in sentences:
        assert (sentence.removeprefix("not ") in text) != sentence.startswith("not ")


def test_the_sheet_draws_boxes_and_escapes_text(root):
    hostile = changed(question="<script>alert(1)</script> & Find\nit", id="<b>")
    path = write_lines(root, hostile, changed(box=[10, 20, 160, 130]), changed(image=7),
                       *[changed(question=f"Find {number}.") for number in range(20)])
    text = call("check", path)[1]
    assert ("1 of 22 boxes leave their image; the furthest reaches 130 % of its image's width or "
            "height (line 2)") in text and MANY not in text
    assert f"look at 12 questions with their boxes: {root}/data.sheet.html" in text
    page = (root / "data.sheet.html").read_text()
    assert page.count('<img alt="" src="data:image/png;base64,') == 12
    assert "default-src 'none'; img-src data:" in page
    assert MANY in call("check", write_lines(root, hostile, changed(box=[10, 20, 160, 130])))[1]
    page = (root / "data.sheet.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Find\nit" in page
    assert "(correct: 1 drawn in green)" in page and "leaves image 2, which is 200x100" in page
    assert "must end in .html" in call("check", path, "--sheet", path)[1]


def test_a_file_none_of_whose_images_is_found_is_one_line(root, tmp_path):
    path = write_lines(tmp_path, *[GOOD] * 26)
    code, text = call("check", path)
    assert code == 1 and text.startswith(f"none of the images of {path} is in {tmp_path}, which is")
    outside = write_lines(tmp_path, *[changed(images=["/a.png", "../b.png"])] * 26, name="o.jsonl")
    assert call("check", outside)[1].startswith(f"none of the images of {outside} is in {tmp_path}")
    assert call("check", path, "--root", root)[0] == 0
    write_lines(tmp_path, GOOD, changed(images=["none.png", "b.png"]), GOOD)
    text = call("check", path, "--root", root)[1]
    assert f"line 2: image 1: '{root}/none.png' is not there" in text


def test_the_commands(root):
    path = write_lines(root, GOOD, *[changed(image=7)] * 12, GOOD)
    result = run_mig_kit("data", "check", str(path))
    assert result.returncode == 1 and not result.stderr
    assert "14 lines, 2 correct, 12 wrong" in result.stdout
    assert "line 2: 'box' is in image 7, but there are 2 images" in result.stdout
    assert "     12  an image that is not there" in result.stdout
    path.write_bytes(b"")
    assert "has no line" in call("check", path)[1]


def test_check_writes_the_correct_lines(root):
    path, out = write_lines(root, GOOD, changed(image=3), GOOD, GOOD, GOOD), root / "good.jsonl"
    code, text = call("check", path, "--out", out)
    assert code == 1 and "5 lines, 4 correct, 1 wrong; 4 written to" in text
    assert call("check", out)[0] == 0 and len(out.read_text().splitlines()) == 4
    assert "is FILE itself" in call("check", path, "--out", path)[1]
