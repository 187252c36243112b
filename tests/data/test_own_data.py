"""Own data: what each mistake is called, on which line, and the reader under fuzz."""

import json
import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.data import own_data

GOOD = {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2, "box": [10, 20, 60, 90], "unit": "pixels"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    Image.new("RGB", (100, 50), "white").save(folder / "a.png")
    Image.effect_noise((200, 100), 80).save(folder / "b.png")
    Image.new("RGB", (900, 3)).save(folder / "long.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def changed(**keys):
    return {k: v for k, v in {**GOOD, **keys}.items() if v is not ...}


def test_a_right_file_and_its_samples_in_each_unit(root):
    path = write(root, GOOD, changed(unit="0-1000", box=..., boxes=[[0, 0, 500, 1000], [500, 0, 1000, 1000]], id="x", task="diff"),
                 changed(unit="0-1", box=[0, 0, 0.5, 1], question="Like {ref}?", reference=[0, 0, 0.5, 1]))
    assert [wrong for _, wrong in own_data.check_file(path, root)] == [[], [], []]
    found = list(own_data.iter_samples(path, root))
    assert found[0].targets == ((2, (10.0, 20.0, 60.0, 90.0)),) and found[0].id == "line-1"
    assert found[1].targets == ((2, (0.0, 0.0, 100.0, 100.0)), (2, (100.0, 0.0, 200.0, 100.0))) and found[1].task == "diff"
    assert found[2].reference == (0.0, 0.0, 50.0, 50.0) and found[2].targets == ((2, (0.0, 0.0, 100.0, 100.0)),)
    assert len(list(own_data.iter_samples(path, root, limit=2))) == 2


@pytest.mark.parametrize("row,sentence", [
    (b"", "no JSON object"), (b"{", "no JSON object"), (b"[1]", "no JSON object"), (b"\xff{}", "not UTF-8"),
    (b"[" * 20000, "no JSON object"), (b'{"images": 1' + b"1" * 5000 + b"}", "no JSON object"),
    (b'{"x": "' + b"y" * (1 << 20) + b'"}', "longer than"),
    (changed(box=...), "give either 'box' or 'boxes'"), (changed(boxes=[[1, 2, 3, 4]]), "give either 'box' or 'boxes'"),
    (changed(unit=...), "'unit' is missing"), (changed(quesion="x"), "did you mean 'question'"),
    (changed(zzz=1), "unknown key 'zzz'"),
    (changed(images=[]), "'images' must be"), (changed(images="a.png"), "'images' must be"),
    (changed(question=" "), "'question' must"),
    (changed(question="\ud800"), "'question' must"), (changed(image=0), "from 1"), (changed(image=3), "there are 2 images"),
    (changed(image=True), "from 1"), (changed(image="2"), "from 1"), (changed(unit="px"), "'unit' must be"),
    (changed(unit=[]), "'unit' must be"), (changed(box=[1, 2, 3]), "four numbers"), (changed(box=[1, 2, 3, None]), "four numbers"),
    (changed(box=[1, 2, 3, True]), "four numbers"), (changed(box=[1, 2, 3, float("nan")]), "four numbers"),
    (changed(box=[1, 2, 3, float("inf")]), "four numbers"), (changed(box=[60, 20, 10, 90]), "x2 must be greater"),
    (changed(box=[0.1, 0.2, 0.5, 0.6]), "is the unit '0-1'?"), (changed(unit="0-1"), "outside '0-1'"),
    (changed(unit="0-1000", box=[1, 2, 3, 1001]), "outside '0-1000'"), (changed(box=[1, 2, 300, 4]), "leaves image 2"),
    (changed(box=[-1, 2, 3, 4]), "outside 'pixels'"), (changed(box=..., boxes=[]), "list of boxes"),
    (changed(box=..., boxes=[[1, 2, 3, 4], 5]), "'boxes' number 2 must be four numbers"),
    (changed(id=""), "'id' must be printable"),
    (changed(id="\x1b[2J"), "'id' must be printable"), (changed(task=7), "'task' must be printable"),
    (changed(question="{ref}"), "go together"), (changed(reference=[1, 2, 3, 4]), "go together"),
    (changed(question="{ref}", reference=[1, 2, 3]), "'reference' must be four numbers"),
    (changed(question="{ref}", reference=[1, 2, 103, 40]), "leaves image 1"),
    (changed(images=["a.png", "none.png"]), "is not there"),
    (changed(images=["a.png", "broken.png"]), "no readable image"),
    (changed(images=["a.png", "/etc/passwd"]), "below the image root"),
    (changed(images=["a.png", "../b.png"]), "below the image root"), (changed(images=["a.png", "long.png"]), "up to 200 to 1"),
])
def test_each_mistake_has_its_sentence_and_line(root, row, sentence):
    path = write(root, GOOD, row, GOOD)
    found = list(own_data.check_file(path, root))
    assert [n for n, _ in found] == [1, 2, 3] and not found[0][1] and not found[2][1]
    assert any(sentence in s for s in found[1][1]), found[1]
    with pytest.raises(own_data.OwnDataError, match="line 2"):
        list(own_data.iter_samples(path, root))


def test_all_mistakes_of_a_line_and_ids_there_twice(root):
    path = write(root, changed(id="x"), changed(id="x"), changed(image=9, unit="px", question=""))
    found = dict(own_data.check_file(path, root))
    assert "id 'x' is there twice" in found[2][0] and len(found[3]) == 3


def test_a_mark_at_the_start_and_windows_line_ends(root):
    path = root / "bom.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n" + json.dumps(GOOD).encode())
    assert [wrong for _, wrong in own_data.check_file(path, root)] == [[], []]


def test_a_line_of_any_length_takes_bounded_memory(root, tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"x" * (1 << 20))
        file.write(b"\n" + json.dumps(GOOD).encode())
    tracemalloc.start()
    found = list(own_data.check_file(path, root))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [bool(wrong) for _, wrong in found] == [True, False] and peak < 8 << 20


values = st.recursive(st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=20),
                      lambda v: st.lists(v, max_size=5) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=10)
number = st.integers(-2, 1001) | st.floats(-1, 1001)
boxes = st.lists(number, min_size=4, max_size=4) | values
rows = st.fixed_dictionaries(
    {"images": st.lists(st.sampled_from(["a.png", "b.png", "long.png"]), min_size=1, max_size=3) | values,
     "question": st.sampled_from(["Find it.", "As {ref}?"]) | values, "image": st.integers(0, 3) | values,
     "unit": st.sampled_from(list(own_data.UNITS)) | values},
    optional={"box": boxes, "boxes": st.lists(boxes, max_size=3) | values, "reference": boxes, "id": values, "task": values,
              "x": values})


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1500)), deadline=None, suppress_health_check=list(HealthCheck))
@given(rows.map(lambda row: json.dumps(row).encode()) | values.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=200))
def test_any_line_is_a_sample_inside_the_rules_or_has_sentences(root, line):
    path = root / "fuzz.jsonl"
    path.write_bytes(line)
    wrong = [sentence for _, sentences in own_data.check_file(path, root) for sentence in sentences]
    assert all(isinstance(s, str) and s for s in wrong)
    try:
        found = list(own_data.iter_samples(path, root))
    except own_data.OwnDataError:
        assert wrong
        return
    assert not wrong
    for sample in found:
        for k, box in [*sample.targets, *([(1, sample.reference)] if sample.reference else [])]:
            width, height = sample.sizes[k - 1]
            assert 0 <= box[0] < box[2] <= width + 1e-6 and 0 <= box[1] < box[3] <= height + 1e-6


def test_preview_draws_boxes_and_escapes_text(root, tmp_path):
    path = write(root, changed(question="<script>alert(1)</script> & Find\nit", id="<b>"), GOOD)
    page = tmp_path / "p.html"
    assert own_data.write_preview(own_data.iter_samples(path, root), page) == 2
    text = page.read_text()
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Find it" in text and "<h2>&lt;b&gt;</h2>" in text
    assert own_data.write_preview(own_data.iter_samples(path, root), tmp_path / "p.png") == 2
    colours = Image.open(tmp_path / "p.png").convert("RGB").getcolors(1 << 20)
    assert any(colour == (0, 0x9E, 0x73) and n > 100 for n, colour in colours)  # the target's green
    with pytest.raises(ValueError, match="must end in .png or .html"):
        own_data.write_preview(own_data.iter_samples(path, root), tmp_path / "p.gif")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        own_data.write_preview(own_data.iter_samples(path, root), page)


def call(*words):
    return subprocess.run([sys.executable, "-c", "from mig_kit.cli import main; main()", "data", *map(str, words)],
                          capture_output=True, text=True)


def test_the_commands(root, tmp_path):
    path = write(root, GOOD, changed(image=7), GOOD)
    result = call("check", path)
    assert result.returncode == 1 and "3 lines, 2 right, 1 wrong" in result.stdout and not result.stderr
    assert "line 2: 'image' is 7, but there are 2 images" in result.stdout
    result = call("preview", path, "--out", tmp_path / "a.png")
    assert result.returncode == 1 and "line 2" in result.stderr and "Traceback" not in result.stderr
    path = write(root, GOOD)
    assert call("check", path, "--root", root).returncode == 0
    assert "1 questions drawn" in call("preview", path, "--out", tmp_path / "a.png").stdout
    for name in ("train", "held"):
        (tmp_path / name).mkdir()
    Image.open(root / "b.png").save(tmp_path / "train" / "x.png")
    Image.open(root / "b.png").resize((150, 80)).save(tmp_path / "held" / "y.jpg")
    (tmp_path / "held" / "z.jpg").write_bytes(b"no image")
    result = call("duplicates", tmp_path / "train", tmp_path / "held")
    assert result.returncode == 1 and "1 against 1 images: 1 pairs" in result.stdout and "z.jpg" in result.stdout
    (tmp_path / "mg.json").write_text('[{"a": 1}]')
    result = call("mgrounding", tmp_path / "mg.json", "--root", tmp_path, "--unstated", "Difference", "2")
    assert result.returncode == 1 and "record shape: record 0" in result.stdout
