"""MGrounding-630k's quirks, by hand, and the reader under fuzz."""

import json
from collections import Counter

import pytest
from PIL import Image

from mig_kit.data import importers, own_data
from mig_kit.data.mgrounding import record_lines
from mig_kit.data.records import ImportRules, Problem, iter_records

PHOTO = "./MGrounding-630k/Group_Grounding/SA-1B/sa_{}.jpg"
FRAME = "./MGrounding-630k/Object_Tracking/GOT-10k/train/GOT_1/{:08d}.jpg"
BOX = (1, 2, 3, 4)


def format_box(*values):
    return "<|box_start|>({},{}),({},{})<|box_end|>".format(*values)


BOX_TEXT = format_box(*BOX)


def make_record(*turns, images=None, image_count=3):
    images = images or [PHOTO.format(number) for number in range(1, image_count + 1)]
    conversation = []
    for number, (asked, answered) in enumerate(turns):
        tags = "<image>\n" * len(images) if number == 0 else ""
        conversation += [{"from": "human", "value": tags + asked},
                         {"from": "gpt", "value": answered}]
    return {"id": "a", "images": images, "conversations": conversation, "type": "gg_train"}


def make_video(asked, answer, order=(1, 2, 3)):
    return make_record((asked, answer), images=[FRAME.format(number) for number in order])


def read(record):
    """The record's questions, and how often each reason left something out."""
    try:
        lines = record_lines(record)
    except Problem as problem:
        lines = [problem]
    problems = [line for line in lines if isinstance(line, Problem)]
    lines = [line for line in lines if not isinstance(line, Problem)]
    for line in lines:
        problems += map(Problem, own_data.find_problems(line))
    return lines if not problems else [], dict(Counter(map(str, problems)))


def image_numbers(lines):
    return [[line["image"]] * len(line.get("boxes", [line.get("box")])) for line in lines]


def test_several_turns_with_ordinals_and_reference_tags():
    statue = f"It's in the third image. {format_box(316, 58, 764, 999)}"
    kite = f"It's in the first image. {format_box(408, 656, 578, 997)}"
    questions, skipped = read(make_record(
        ("Where is <|object_ref_start|>a statue<|object_ref_end|>?", statue),
        ("And a red kite?", kite)))
    assert not skipped
    first, second = questions
    assert first["task"] == "Group_Grounding" and first["question"] == "Where is a statue?"
    assert (first["image"], first["box"]) == (3, [316, 58, 764, 999])
    assert second["image"] == 1 and first["images"][2] == PHOTO.format(3)


@pytest.mark.parametrize("answer,expected", [
    (f"in the 2nd picture {BOX_TEXT}", [[2]]),
    (f"Image-3: {BOX_TEXT}", [[3]]),
    (f"{BOX_TEXT} in the first image and {format_box(5, 6, 7, 8)} in the second image",
     [[1], [2]]),
    (f"first image: {BOX_TEXT}, third image: {format_box(5, 6, 7, 8)}", [[1], [3]]),
    (f"In image 2: {BOX_TEXT}, {format_box(5, 6, 7, 8)} and {format_box(5, 6, 7, 9)}.",
     [[2, 2, 2]]),
])
def test_how_an_answer_names_its_image(answer, expected):
    questions, skipped = read(make_record(("Find them.", answer)))
    assert not skipped and image_numbers(questions) == expected
    if len(expected) > 1:
        assert [question["question"] for question in questions] == [
            f"Find them. Answer for image {numbers[0]} only." for numbers in expected]


@pytest.mark.parametrize("asked,answer,reason", [
    ("Find it.", "A red kite.", "no box in the answer"),
    ("Find it.", BOX_TEXT, "it is not said which of"),
    ("Find it in the second or in the third image.", BOX_TEXT, "it is not said which of"),
    ("Find it.", f"It matches the dog of image 1: {BOX_TEXT}", "it is not said which of"),
    ("Find it.", f"fifth image {BOX_TEXT}", "there are 3 images"),
    ("Find it.", f"first image {format_box(5, 2, 5, 4)}", "x2 must be greater than x1"),
    ("Find it.", f"first image {format_box(5, 2, 1001, 4)}", "outside 'normalized_1000'"),
    ("Find it.", "first image <|box_start|>(1,2),(3,4)", "box text cannot be read"),
    ("Find it.", "first image " + format_box("1.2.3", 2, 3, 4), "box text cannot be read"),
    ("Find it.", f"Unlike the first image, the second image has {BOX_TEXT}",
     "image of a box unclear"),
    ("Find it.", f"first image {BOX_TEXT}, elsewhere {BOX_TEXT}", "image of a box unclear"),
    (f"As {BOX_TEXT} and {BOX_TEXT}", f"first image {BOX_TEXT}", "reference box not said to"),
    (f"As {BOX_TEXT}", f"second image {BOX_TEXT}",
     "reference box not said to be in the first image"),
    (f"As in the second image {BOX_TEXT}", f"first image {BOX_TEXT}",
     "reference box not said to be in the first image"),
    ("Find <image>", f"first image {BOX_TEXT}", "there are 4 <image> tags and 3 images"),
])
def test_what_is_left_out_and_why(asked, answer, reason):
    questions, reasons = read(make_record((asked, answer)))
    assert not questions and len(reasons) == 1 and reason in str(reasons)


def test_an_answer_that_repeats_the_box_of_a_question_about_one_image_teaches_nothing():
    questions, reasons = read(make_record((f"What is at {BOX_TEXT}?", BOX_TEXT), image_count=1))
    assert not questions and "answer given in the question" in str(reasons)


@pytest.mark.parametrize("record", [
    {}, {"images": [1], "conversations": []},
    {"images": ["a"], "conversations": [{"from": "human"}]},
    {"images": ["a"]}])
def test_records_of_another_shape(record):
    (reason,) = read(record)[1]
    assert reason == "record shape" or "turns" in reason


def test_reference_box_and_the_questions_image():
    reference = format_box(100, 200, 300, 400)
    asked = f"For the thing in the first image ({reference}), locate it in the second image."
    (question,), skipped = read(make_record((asked, BOX_TEXT), image_count=2))
    assert not skipped and (question["image"], question["box"]) == (2, [*BOX])
    assert question["reference"] == [100, 200, 300, 400]
    assert question["question"] == (
        "For the thing in the first image ({ref}), locate it in the second image.")


def test_tracking_one_box_per_frame():
    boxes = [format_box(number, 10, number + 50, 90) for number in (1, 2, 3)]
    asked = f"Track the thing in the first image {boxes[0]}."
    questions, skipped = read(make_video(asked, ", ".join(boxes)))
    assert not skipped and [(question["image"], question["box"][0]) for question in questions] == [
        (2, 2), (3, 3)]  # the question gives frame 1
    assert [question["question"].split(". ")[1] for question in questions] == [
        "Answer for image 2 only.", "Answer for image 3 only."]
    assert "it is not said which" in str(read(make_video("Track it.", ", ".join(boxes[:2])))[1])


@pytest.mark.parametrize("asked,order,reason", [
    ("Shuffled frames: track it.", (1, 2, 5), "shuffled video"),
    ("Track it.", (9, 2, 5), "frames out of time order")])
def test_what_order_stays_unclear(asked, order, reason):
    answer = ", ".join([BOX_TEXT] * 3)
    assert read(make_video(asked, answer, order)) == ([], {reason: 1})


@pytest.fixture
def dataset(tmp_path):
    """A small copy of the data set as its archives unpack, one subset below a nested home/."""
    nested = tmp_path / "home/someone/data/MGrounding-630k/Group_Grounding/SA-1B"
    plain = tmp_path / "MGrounding-630k/Object_Tracking/GOT-10k/train/GOT_1"
    for folder in (nested, plain):
        folder.mkdir(parents=True)
    for number in (1, 2, 3):
        Image.new("RGB", (200 * number, 100), "white").save(nested / f"sa_{number}.jpg")
        Image.new("L", (80, 80)).save(plain / f"{number:08d}.jpg")
    turn = ("Find it.", f"It's in the third image. {format_box(500, 100, 1000, 1000)}")
    photos = [PHOTO.format(number) for number in (1, 2)]
    records = [make_record(turn),
               make_video("Where is it?", f"first image {format_box(0, 0, 500, 500)}"),
               {"bad": 1},
               make_record(turn, images=[*photos, PHOTO.format(77)]),
               make_record(turn, images=["../secret.jpg", *photos])]
    (tmp_path / "MGrounding-630k.json").write_text(json.dumps(records))
    return tmp_path


def import_all(dataset):
    """(samples of the data set as own data, the report, what was said)."""
    sentences, out = [], dataset / "own.jsonl"
    report = importers.import_file("mgrounding", dataset / "MGrounding-630k.json", out,
                                   ImportRules(dataset), sentences.append)
    return list(own_data.iter_samples(out, dataset)), report, sentences


def test_samples_from_nested_folders_in_pixels(dataset):
    (photo, video), report, sentences = import_all(dataset)
    assert sentences[0] == "record 3: record shape" and "sa_77.jpg' is not below" in sentences[1]
    assert "1  missing image: record 4" in report.summarize()
    assert photo.sizes == [(200, 100), (400, 100), (600, 100)] and video.sizes == [(80, 80)] * 3
    assert photo.targets == ((3, (300.0, 10.0, 600.0, 100.0)),)
    assert video.targets == ((1, (0.0, 0.0, 40.0, 40.0)),)
    assert (photo.id, video.id) == ("record-1", "record-2") and video.task == "Object_Tracking"
    assert all(image.mode == "RGB" for sample in (photo, video) for image in sample.images)
    assert report.read == 5 and report.kept == 2
    assert dict(report.counts) == {"record shape": 1, "missing image": 1, "outside root": 1}


def test_a_file_that_is_cut_gives_the_questions_before_the_cut(dataset):
    path = dataset / "MGrounding-630k.json"
    path.write_bytes(path.read_bytes()[:-30])
    samples, _, sentences = import_all(dataset)
    assert len(samples) == 2 and "download it again" in sentences[-1]
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is nested over 32 deep"):
        list(iter_records(path))
