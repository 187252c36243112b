"""Own data: what each mistake is called, on which line, and the reader under fuzz."""

import json
import os
import tracemalloc

import pytest
from command_line import run_mig_kit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.data import own_data
from mig_kit.data.preview import write_preview

GOOD = {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
        "box": [10, 20, 60, 90], "coordinates": "pixels"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    Image.new("RGB", (100, 50), "white").save(folder / "a.png")
    Image.effect_noise((200, 100), 80).save(folder / "b.png")
    Image.new("RGB", (900, 3)).save(folder / "long.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def write_lines(folder, *rows):
    path = folder / "data.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def changed(**keys):
    """GOOD with these values; ... takes a key out."""
    return {key: value for key, value in {**GOOD, **keys}.items() if value is not ...}


def with_unit(unit):
    return changed(coordinates=..., unit=unit)


def test_a_correct_file_and_its_samples_in_all_coordinates(root):
    path = write_lines(
        root, GOOD,
        changed(coordinates="normalized_1000", box=..., id="x", task="diff",
                boxes=[[0, 0, 500, 1000], [500, 0, 1000, 1000]]),
        changed(coordinates="normalized_1", box=[0, 0, 0.5, 1], question="Like {ref}?",
                reference=[0, 0, 0.5, 1]))
    assert [problems for _, problems in own_data.check_file(path, root)] == [[], [], []]
    first, second, third = own_data.iter_samples(path, root)
    assert first.targets == ((2, (10.0, 20.0, 60.0, 90.0)),) and first.id == "line-1"
    assert second.targets == ((2, (0.0, 0.0, 100.0, 100.0)), (2, (100.0, 0.0, 200.0, 100.0)))
    assert second.task == "diff" and second.id == "x"
    assert third.targets == ((2, (0.0, 0.0, 100.0, 100.0)),)
    assert third.reference == (0.0, 0.0, 50.0, 50.0)
    assert len(list(own_data.iter_samples(path, root, limit=2))) == 2


@pytest.mark.parametrize("row,sentence", [
    (b"", "no JSON object"),
    (b"{", "no JSON object"),
    (b"[1]", "no JSON object"),
    (b"\xff{}", "not UTF-8"),
    (b"[" * 20000, "no JSON object"),
    (b'{"images": 1' + b"1" * 5000 + b"}", "no JSON object"),
    (b'{"x": "' + b"y" * (1 << 20) + b'"}', "longer than"),
    (changed(box=...), "give either 'box' or 'boxes'"),
    (changed(boxes=[[1, 2, 3, 4]]), "give either 'box' or 'boxes'"),
    (changed(coordinates=...), "'coordinates' is missing"),
    (with_unit("pixels"), "'unit' is now called 'coordinates': \"pixels\""),
    (with_unit("0-1000"), "'unit' is now called 'coordinates': \"normalized_1000\""),
    (with_unit("0-1"), "'unit' is now called 'coordinates': \"normalized_1\""),
    (with_unit("px"), "called 'coordinates': one of pixels, normalized_1000, normalized_1"),
    (with_unit([]), "'unit' is now called 'coordinates': one of"),
    (changed(unit="pixels"), "'unit' is now called 'coordinates'"),
    (changed(coordinates="0-1000"), "'0-1000' is now called 'normalized_1000'"),
    (changed(coordinates="0-1"), "'0-1' is now called 'normalized_1'"),
    (changed(coordinates="absolute"), "'coordinates' must be one of pixels,"),
    (changed(coordinates="px"), "'coordinates' must be one of pixels, normalized_1000"),
    (changed(coordinates=[]), "'coordinates' must be one of"),
    (changed(quesion="x"), "did you mean 'question'"),
    (changed(zzz=1), "unknown key 'zzz'"),
    (changed(images=[]), "'images' must be"),
    (changed(images="a.png"), "'images' must be"),
    (changed(question=" "), "'question' must"),
    (changed(question="\ud800"), "'question' must"),
    (changed(image=0), "from 1"),
    (changed(image=3), "there are 2 images"),
    (changed(image=True), "from 1"),
    (changed(image="2"), "from 1"),
    (changed(box=[1, 2, 3]), "four numbers"),
    (changed(box=[1, 2, 3, None]), "four numbers"),
    (changed(box=[1, 2, 3, True]), "four numbers"),
    (changed(box=[1, 2, 3, float("nan")]), "four numbers"),
    (changed(box=[1, 2, 3, float("inf")]), "four numbers"),
    (changed(box=[60, 20, 10, 90]), "x2 must be greater"),
    (changed(box=[0.1, 0.2, 0.5, 0.6]), "are the coordinates 'normalized_1'?"),
    (changed(coordinates="normalized_1"), "outside 'normalized_1'"),
    (changed(coordinates="normalized_1000", box=[1, 2, 3, 1001]), "outside 'normalized_1000'"),
    (changed(box=[1, 2, 300, 4]), "leaves image 2"),
    (changed(box=[-1, 2, 3, 4]), "outside 'pixels'"),
    (changed(box=..., boxes=[]), "list of boxes"),
    (changed(box=..., boxes=[[1, 2, 3, 4], 5]), "'boxes' number 2 must be four numbers"),
    (changed(id=""), "'id' must be printable"),
    (changed(id="\x1b[2J"), "'id' must be printable"),
    (changed(task=7), "'task' must be printable"),
    (changed(reply=" "), "'reply' must be text"),
    (changed(reply=7), "'reply' must be text"),
    (changed(question="{ref}"), "go together"),
    (changed(reference=[1, 2, 3, 4]), "go together"),
    (changed(question="{ref}", reference=[1, 2, 3]), "'reference' must be four numbers"),
    (changed(question="{ref}", reference=[1, 2, 103, 40]), "leaves image 1"),
    (changed(images=["a.png", "none.png"]), "is not there"),
    (changed(images=["a.png", "broken.png"]), "no readable image"),
    (changed(images=["a.png", "/etc/passwd"]), "below the image root"),
    (changed(images=["a.png", "../b.png"]), "below the image root"),
    (changed(images=["a.png", "long.png"]), "up to 200 to 1"),
])
def test_each_mistake_has_its_sentence_and_line(root, row, sentence):
    path = write_lines(root, GOOD, row, GOOD)
    problems = dict(own_data.check_file(path, root))
    assert list(problems) == [1, 2, 3] and not problems[1] and not problems[3]
    assert any(sentence in problem for problem in problems[2]), problems[2]
    with pytest.raises(own_data.OwnDataError, match="line 2"):
        list(own_data.iter_samples(path, root))


def test_an_old_key_is_one_problem(root):
    path = write_lines(root, with_unit("0-1"))
    ((_, problems),) = own_data.check_file(path, root)
    assert len(problems) == 1


def test_all_mistakes_of_a_line_and_ids_there_twice(root):
    path = write_lines(root, changed(id="x"), changed(id="x"),
                       changed(image=9, coordinates="px", question=""))
    problems = dict(own_data.check_file(path, root))
    assert "id 'x' is there twice" in problems[2][0] and len(problems[3]) == 3


def test_a_mark_at_the_start_and_windows_line_ends(root):
    path = root / "bom.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + good)
    assert [problems for _, problems in own_data.check_file(path, root)] == [[], []]


def test_a_line_of_any_length_takes_bounded_memory(root, tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    problems = [problems for _, problems in own_data.check_file(path, root)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [bool(sentences) for sentences in problems] == [True, False] and peak < 8 << 20


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
     "image": st.integers(0, 3) | VALUES,
     "coordinates": st.sampled_from([*own_data.LIMITS, "0-1000", "absolute"]) | VALUES},
    optional={"box": BOXES, "boxes": st.lists(BOXES, max_size=3) | VALUES, "reference": BOXES,
              "id": VALUES, "task": VALUES, "unit": VALUES, "x": VALUES})
LINES = (ROWS.map(lambda row: json.dumps(row).encode())
         | VALUES.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=200))


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1500)), deadline=None,
          suppress_health_check=list(HealthCheck))
@given(LINES)
def test_any_line_is_a_sample_inside_the_rules_or_has_sentences(root, line):
    path = root / "fuzz.jsonl"
    path.write_bytes(line)
    problems = [problem for _, problems in own_data.check_file(path, root) for problem in problems]
    assert all(isinstance(problem, str) and problem for problem in problems)
    try:
        samples = list(own_data.iter_samples(path, root))
    except own_data.OwnDataError:
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


def test_preview_draws_boxes_and_escapes_text(root, tmp_path):
    hostile = changed(question="<script>alert(1)</script> & Find\nit", id="<b>")
    path = write_lines(root, hostile, GOOD)
    page, sheet = tmp_path / "p.html", tmp_path / "p.png"
    assert write_preview(own_data.iter_samples(path, root), page) == 2
    text = page.read_text()
    assert "<script>" not in text and "<h2>&lt;b&gt;</h2>" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Find it" in text
    assert text.count('<img alt="" src="data:image/png;base64,') == 2
    assert "default-src 'none'; img-src data:" in text
    assert write_preview(own_data.iter_samples(path, root), sheet) == 2
    colours = Image.open(sheet).convert("RGB").getcolors(1 << 20)
    target_green = (0, 0x9E, 0x73)
    assert any(colour == target_green and count > 100 for count, colour in colours)
    with pytest.raises(ValueError, match="must end in .png or .html"):
        write_preview(own_data.iter_samples(path, root), tmp_path / "p.gif")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        write_preview(own_data.iter_samples(path, root), page)
    assert sorted(tmp_path.iterdir()) == [page, sheet]


def run_data(*words):
    return run_mig_kit("data", *map(str, words))


def test_the_commands(root, tmp_path):
    path = write_lines(root, GOOD, changed(image=7), GOOD)
    result = run_data("check", path)
    assert result.returncode == 1 and not result.stderr
    assert "3 lines, 2 correct, 1 wrong" in result.stdout
    assert "line 2: 'image' is 7, but there are 2 images" in result.stdout
    result = run_data("preview", path, "--out", tmp_path / "a.png")
    assert result.returncode == 1 and "line 2" in result.stderr
    assert "Traceback" not in result.stderr
    path = write_lines(root, GOOD)
    assert run_data("check", path, "--root", root).returncode == 0
    result = run_data("preview", path, "--out", tmp_path / "a.png")
    assert "1 questions drawn" in result.stdout
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
    Image.open(root / "b.png").save(tmp_path / "train" / "x.png")
    Image.open(root / "b.png").resize((150, 80)).save(tmp_path / "held" / "y.jpg")
    (tmp_path / "held" / "z.jpg").write_bytes(b"no image")
    result = run_data("duplicates", tmp_path / "train", tmp_path / "held")
    assert result.returncode == 1 and "1 against 1 images: 1 pairs" in result.stdout
    assert "z.jpg" in result.stdout
    (tmp_path / "mg.json").write_text('[{"a": 1}]')
    result = run_data("mgrounding", tmp_path / "mg.json", "--root", tmp_path,
                      "--unstated", "Difference", "2")
    assert result.returncode == 1 and "record shape: record 0" in result.stdout
