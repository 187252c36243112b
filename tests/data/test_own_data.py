"""Own data: what each mistake is called, on which line, and the reader under fuzz."""

import json
import os
import tracemalloc

import pytest
from command_line import run_mig_kit
from data_files import CHOICE, GOOD, call, changed, write_lines
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.data import line_checks, own_data
from mig_kit.data.inspection import write_preview


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


def asking_all(*targets, **keys):
    """GOOD with 'targets' in place of 'image' and 'box'."""
    boxes = [{"image": image, "box": box} for image, box in targets]
    return changed(**{"image": ..., "box": ..., "targets": boxes, **keys})


NOTHING = changed(image=None, box=...)
TAGS_OF_BOXES = ["Find <bbox>.", "Find <ref-object>.", "<ref>cup</ref>", "Find <obj_2>.",
                 "Find {bbox}.", "<video>Find it.", "Find <BBOX>."]
CONTROL_TOKENS = ["<|im_start|>", "<|image_pad|>", "<|endoftext|>", "<|box_start|>"]


def test_none_one_or_several_boxes(root):
    path = write_lines(
        root, GOOD, asking_all((1, [0, 0, 500, 1000]), (2, [0, 0, 500, 1000]),
                               coordinates="normalized_1000"),
        NOTHING, changed(image=None, box=..., coordinates=...),
        changed(image=None, box=None, question="Like {ref}?", reference=[1, 2, 3, 4]),
        asking_all(), asking_all(coordinates=...), asking_all((2, [1, 2, 3, 4])))
    assert all(not problems for _, problems in own_data.check_file(path, root))
    samples = list(own_data.iter_samples(path, root))
    assert all(sample.find_all for sample in samples)  # else the prompt would tell the number
    assert [len(sample.targets) for sample in samples] == [1, 2, 0, 0, 0, 0, 0, 1]
    assert samples[1].targets == ((1, (0, 0, 50, 50)), (2, (0, 0, 100, 100)))
    (first,) = own_data.iter_samples(path, root, limit=1)
    assert first.find_all and first.targets == ((2, (10, 20, 60, 90)),)
    path = write_lines(root, GOOD, changed(task="targets or null"))
    assert not any(sample.find_all for sample in own_data.iter_samples(path, root))
    alternatives = changed(box=..., boxes=[[1, 2, 3, 4]])
    path = write_lines(root, alternatives, NOTHING)
    problems = dict(own_data.check_file(path, root))
    assert "other lines ask for all boxes; write 'targets'" in problems[1][0] and not problems[2]
    path = write_lines(root, alternatives, GOOD)
    assert not any(problems for _, problems in own_data.check_file(path, root))


@pytest.mark.parametrize("row,sentence", [
    (asking_all(image=1), "'image' does not go with 'targets'"),
    (changed(image=None), "'box' does not go with 'targets' or with 'image': null"),
    (asking_all((3, [1, 2, 3, 4])), "'targets' number 1: 'image' is 3, but there are 2"),
    (asking_all((1, [1, 2, 3, 4]), (0, [1, 2, 3, 4])), "number 2: 'image' must be the number"),
    (asking_all((1, [1, 2, 3, 4]), (1, [1, 2, 3, 4])), "'targets' number 2 is there twice"),
    (asking_all((1, [5, 2, 3, 4])), "the box of 'targets' number 1 is [5, 2, 3, 4]: x2 must be"),
    (asking_all((1, "here")), "the box of 'targets' number 1 must be four numbers"),
    (asking_all((1, [1, 2, 300, 4])), "leaves image 1, which is 100x50"),
    (asking_all(targets=None), "'targets' must be a list"),
    (asking_all(targets=[{"image": 1, "box": [1, 2, 3, 4], "x": 1}]), "'targets' must be a list"),
    (asking_all(*[(1, [1, 2, 3, 4])] * 101), "holds 101 boxes; an answer has at most 100"),
    (asking_all((1, [1, 2, 3, 4]), coordinates=...), "'coordinates' is missing"),
    (changed(image=None, box=..., coordinates=..., question="{ref}", reference=[1, 2, 3, 4]),
     "'coordinates' is missing"),
    (b"", "the line is empty; delete it"),
    (b"{", "no JSON object"),
    (b"\xff{}", "not UTF-8"),
    (b"[" * 20000, "no JSON object"),
    (b'{"images": 1' + b"1" * 5000 + b"}", "no JSON object"),
    (b'{"x": "' + b"y" * (1 << 20) + b'"}', "longer than"),
    (changed(box=...), "give either 'box' or 'boxes'"),
    (changed(boxes=[[1, 2, 3, 4]]), "give either 'box' or 'boxes'"),
    (changed(coordinates=...), "'coordinates' is missing"),
    (changed(coordinates="0-1"), "'coordinates' must be one of pixels, normalized_1000"),
    (changed(coordinates=[]), "'coordinates' must be one of"),
    (changed(quesion="x"), "did you mean 'question'"),
    (changed(zzz=1), "unknown key 'zzz'"),
    (changed(images="a.png"), "'images' must be"),
    (changed(question=" "), "'question' must"),
    (changed(question="\ud83d"), "'question' holds half an emoji, \\ud83d, which no"),
    (changed(reply="a\0"), "'reply' holds the character \\u0000"),
    (changed(id="\ude00"), "'id' holds half an emoji"),
    (changed(images=["a.png", "\ud83d.png"]), "the path of an image holds half an emoji"),
    (changed(image=0), "from 1; null says that no image shows it"),
    (changed(box="[1, 2, 3, 4]"), "four numbers [x1, y1, x2, y2], not text in quotes"),
    (changed(box=["one", 2, 3, 4]), "four numbers [x1, y1, x2, y2], not text in quotes"),
    (changed(image=3), "there are 2 images"),
    (changed(image="2.5"), "from 1"),
    (changed(box=[1, 2, 3]), "four numbers"),
    (changed(box=[1, 2, 3, True]), "four numbers"),
    (changed(box=[1, 2, 3, float("nan")]), "four numbers"),
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
    (changed(question="{ref}"), "go together"),
    (changed(reference=[1, 2, 3, 4]), "go together"),
    (changed(question="{ref}", reference=[1, 2, 3]), "'reference' must be four numbers"),
    (changed(question="{ref}", reference=[1, 2, 103, 40]), "leaves image 1"),
    (changed(images=["a.png", "none.png"]), "is not there"),
    (changed(images=["a.png", "broken.png"]), "no readable image"),
    (changed(images=["a.png", "../b.png"]), "below the image root; write it relative to the root, "
                                            "with / and without '..'"),
    (changed(images=["a.png", "long.png"]), "up to 200 to 1"),
    *((changed(CHOICE, **changes), sentence) for changes, sentence in (
        ({"letter": "C"}, "'letter' must be that of the correct option, A to B"),
        ({"letter": 1}, "A to B"), ({"letter": ...}, "'letter' is missing"),
        ({"options": ...}, "'options' is missing"), ({"options": ["a"]}, "a list of 2 to 8 texts"),
        ({"options": list("abcdefghi")}, "2 to 8"),
        ({"options": ["a", " "]}, "'options' number 2 must be text"),
        ({"options": ["a", "<|im_end|>"]}, "'options' number 2 holds <|im_end|>"),
        ({"options": ["a  b", "a b"]}, "are the same; no letter is the correct one"),
        ({"box": [1, 2, 3, 4]}, "'box' does not go with 'options'"),
        ({"coordinates": "pixels"}, "'coordinates' and 'reference' go together"))),
    *((changed(row, images=[]), "'images' is empty; questions are divided into sets, and read "
       "together, by their images: leave those without one out") for row in (
           GOOD, CHOICE, {"question": "Is it?", "image": None})),
    *((changed(images=["a.png", image]), sentence) for image, sentence in (
        ({"bytes": "aGk="}, "an image is in the file itself; mig-kit data import own"),
        ("data:image/png;base64,aGk=", "an image is in the file itself; mig-kit data import own"),
        ("https://x.org/a.png", "an image is an address; download it, and give the path"),
        ("file:///etc/passwd", "'/etc/passwd' is not below the image root"),
        ("sub\\c.jpg", "with / and without '..'"), ("A.PNG", "'A.PNG' is not there"),
        ({"path": None}, "'images' must be a list of 1 to 64 paths"),
        (None, "'images' must be a list of 1 to 64 paths"))),
    *((changed(image=image), "from 1") for image in ("2nd", True, "NaN", "2\u001f")),
    *((changed(box=box), "must be four numbers") for box in (
        "10,20,60,90", ["10px", 20, 60, 90], ["1_0", 20, 60, 90])),
    *((changed(question=question), "write {ref} for the box 'reference', else take it out")
      for question in TAGS_OF_BOXES),
    *((changed(**{key: f"Find {token} it."}), f"'{key}' holds {token}")
      for token in CONTROL_TOKENS for key in ("question", "reply")),
    *((row, "mig-kit data import") for row in (
        {"images": ["a.png"], "annotations": [], "categories": []}, {"sentences": [], "ann_id": 1},
        {"file_name": "a.png", "objects": {"bbox": [[1, 2, 3, 4]], "categories": [0]}},
        {"question": "x", "answer": ["a cup"], "bbox": [1, 2, 3, 4]},
        {"image": "a.png", "normal_caption": "x", "solution": [1, 2, 3, 4]})),
    (changed(images=[{"bytes": "A" * (1 << 20)}, "b.png"]),
     "put one question on a line, and images into files of their own"),
])
def test_each_mistake_has_its_sentence_and_line(root, row, sentence):
    path = write_lines(root, GOOD, row, GOOD)
    problems = dict(own_data.check_file(path, root))
    assert list(problems) == [1, 2, 3] and not problems[1] and not problems[3]
    assert any(sentence in problem for problem in problems[2]), problems[2]
    with pytest.raises(ValueError, match="line 2"):
        list(own_data.iter_samples(path, root))


def test_multiple_choice(root):
    with_reference = {**CHOICE, "question": "What is at {ref}?", "reference": [0, 0, 0.5, 1],
                      "coordinates": "normalized_1"}
    path = write_lines(root, CHOICE, with_reference)
    assert [problems for _, problems in own_data.check_file(path, root)] == [[], []]
    plain, referring = own_data.iter_samples(path, root)
    assert plain.options == ("a cup", "a dog") and plain.letter == "B" and plain.targets == ()
    assert referring.reference == (0.0, 0.0, 50.0, 50.0)
    assert write_preview(own_data.iter_samples(path, root), root / "choice.html") == 2
    page = (root / "choice.html").read_text()
    assert "What is it? A. a cup B. a dog (correct: B)" in page


def test_a_model_obeys_the_control_tokens_that_are_refused(processor):
    assert set(CONTROL_TOKENS) <= processor.tokenizer.get_vocab().keys()


def test_images_that_are_cut_short_are_found(root):
    noise = Image.effect_noise((200, 100), 80)
    for suffix in ("png", "jpg"):
        noise.save(root / f"whole.{suffix}")
        content = (root / f"whole.{suffix}").read_bytes()
        (root / f"cut.{suffix}").write_bytes(content[:len(content) * 2 // 3])
    path = write_lines(root, changed(images=["cut.png", "b.png"]),
                       changed(images=["b.png", "cut.jpg"]), GOOD)
    problems = [problems for _, problems in own_data.check_file(path, root)]
    assert problems == [["image 1: 'cut.png' is cut or broken; copy it again"],
                        ["image 2: 'cut.jpg' is cut or broken; copy it again"], []]


def test_all_mistakes_of_a_line_and_ids_there_twice(root):
    path = write_lines(root, changed(id="line-2"), GOOD,
                       changed(image=9, coordinates="px", question=""))
    problems = dict(own_data.check_file(path, root))
    assert problems[2] == ["id 'line-2' is there twice"] and len(problems[3]) == 3


def test_a_line_of_any_length_takes_bounded_memory(root, tmp_path):
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b"{")
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
     "image": st.integers(0, 3) | st.none() | VALUES,
     "coordinates": st.sampled_from([*line_checks.LIMITS, "0-1000", "absolute"]) | VALUES},
    optional={"options": st.lists(st.text(max_size=5), max_size=9) | VALUES,
              "letter": st.sampled_from("ABCI") | VALUES, "reply": VALUES,
              "box": BOXES, "boxes": st.lists(BOXES, max_size=3) | VALUES, "reference": BOXES,
              "targets": st.lists(st.fixed_dictionaries(
                  {"image": st.integers(0, 3), "box": BOXES}), max_size=3) | VALUES,
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
        results = list(own_data.check_file(path, root))
    except ValueError as error:  # it begins as a file of another kind does
        assert str(path) in str(error) and line[:2] not in (b'{"', b"[{")
        return
    problems = [problem for _, problems in results for problem in problems]
    assert all(isinstance(problem, str) and problem for problem in problems)
    try:
        samples = list(own_data.iter_samples(path, root))
    except ValueError:
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
    path, page = write_lines(root, hostile, GOOD), tmp_path / "p.html"
    assert write_preview(own_data.iter_samples(path, root), page) == 2
    text = page.read_text()
    assert "<script>" not in text and "<h2>&lt;b&gt;</h2>" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Find\nit (correct: 1 drawn" in text
    assert text.count('<img alt="" src="data:image/png;base64,') == 2
    assert "default-src 'none'; img-src data:" in text
    with pytest.raises(ValueError, match="must end in .html"):
        write_preview(own_data.iter_samples(path, root), tmp_path / "p.png")
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty, or has no"):
        write_preview(own_data.iter_samples(path, root), page)
    assert list(tmp_path.iterdir()) == [page]


def test_the_commands(root, tmp_path):
    path = write_lines(root, GOOD, *[changed(image=7)] * 12, GOOD)
    result = run_mig_kit("data", "check", str(path))
    assert result.returncode == 1 and not result.stderr
    assert "14 lines, 2 correct, 12 wrong" in result.stdout
    assert "line 2: 'image' is 7, but there are 2 images" in result.stdout
    code, text = call("preview", path, "--out", tmp_path / "a.html")
    assert code == 1 and "2 questions drawn, 12 wrong left out" in text and "line 12:" not in text
    path = write_lines(root, GOOD)
    assert call("check", path, "--root", root)[0] == 0
    assert "1 questions drawn" in call("preview", path, "--out", tmp_path / "a.html")[1]
    for name in ("train", "held", "none"):
        (tmp_path / name).mkdir()
    Image.open(root / "b.png").save(tmp_path / "train" / "x.png")
    Image.open(root / "b.png").resize((150, 80)).save(tmp_path / "held" / "y.jpg")
    (tmp_path / "held" / "z.jpg").write_bytes(b"no image")
    code, text = call("duplicates", tmp_path / "train", tmp_path / "held")
    assert code == 1 and "1 against 1 images: 1 pairs" in text
    assert "left out, unreadable image: 1 (z.jpg)" in text
    code, text = call("duplicates", tmp_path / "train", tmp_path / "none")
    assert code == 1 and "no image that can be read below" in text


REPLY = '<think>It is left of the dog.</think><answer>{"image": %s, "box": %s}</answer>'


def test_check_reads_replies_and_writes_the_correct_lines(root):
    replies = {REPLY % (2, "[10, 20, 60, 90]"): "", REPLY % (2, "[50, 200, 300, 900]"): "",
               REPLY % (2, '["10", "20", "60", "90"]'): "numbers without quotes",
               REPLY % (1, "[10, 20, 60, 90]"): "it names another image",
               REPLY % (2, "[160, 20, 199, 90]"): "its box is not on the target",
               "On the left.": "it must end in <answer>"}
    path, out = write_lines(root, *[changed(reply=reply) for reply in replies]), root / "good.jsonl"
    code, text = call("check", path, "--out", out)
    assert code == 1 and "6 lines, 2 correct, 4 wrong; the correct ones are in" in text
    for number, sentence in enumerate(replies.values(), 1):
        assert f"line {number}: " not in text if not sentence else sentence in text
    assert call("check", out)[0] == 0 and len(out.read_text().splitlines()) == 2
    assert "is FILE itself" in call("check", path, "--out", path)[1]


def test_a_missing_root_is_one_sentence_and_a_run_counts_the_wrong_lines(root, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    path = write_lines(folder, *[GOOD] * 30)
    code, text = call("check", path)
    assert code == 1 and text.count("is not there") == 2 and "with --root (line 1: " in text
    path = write_lines(root, GOOD, changed(image=0), GOOD, changed(box=[1, 2]))
    with pytest.raises(ValueError, match="has 2 wrong of 4 lines; line 2: 'image' must be"):
        own_data.require_correct_lines(path, root)
