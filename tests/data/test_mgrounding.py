"""MGrounding-630k's quirks, by hand, and the reader under fuzz."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.data import mgrounding
from mig_kit.image_files import (
    BadImage,
    SkipReport,
    find_near_duplicates,
    open_rgb,
    perceptual_hashes,
    resolve_under_root,
)
from mig_kit.world.tasks import make_sample

GROUP = "./MGrounding-630k/Group_Grounding/SA-1B/sa_{}.jpg"
FILM = "./MGrounding-630k/Object_Tracking/GOT-10k/train/GOT_1/{:08d}.jpg"


def box(*values):
    return "<|box_start|>({},{}),({},{})<|box_end|>".format(*values)


def record(*turns, images=None, n=3):
    images = images or [GROUP.format(k) for k in range(1, n + 1)]
    talk = []
    for number, (asked, answered) in enumerate(turns):
        talk += [{"from": "human", "value": "<image>\n" * len(images) * (number == 0) + asked}, {"from": "gpt", "value": answered}]
    return {"id": "a", "images": images, "conversations": talk, "type": "gg_train"}


def read(data, **kwargs):
    report = SkipReport()
    return list(mgrounding.record_questions(0, data, report, **kwargs)), dict(report.counts)


def test_several_turns_with_ordinals_and_reference_tags():
    found, left = read(record(
        ("Where is <|object_ref_start|>a statue<|object_ref_end|>?", f"It's in the third image. {box(316, 58, 764, 999)}"),
        ("And a red kite?", f"It's in the first image. {box(408, 656, 578, 997)}")))
    assert not left and [i.id for i in found] == ["0-1", "0-2"] and found[0].subset == "Group_Grounding"
    assert found[0].question == "Where is a statue?" and found[0].targets == ((3, (316, 58, 764, 999)),)
    assert found[1].targets[0][0] == 1 and found[0].images[2] == GROUP.format(3)


@pytest.mark.parametrize("answer,expected", [
    (f"in the 2nd picture {box(1, 2, 3, 4)}", [[2]]),
    (f"Image-3: {box(1, 2, 3, 4)}", [[3]]),
    (f"{box(1, 2, 3, 4)} in the last image", [[3]]),
    (f"{box(1, 2, 3, 4)} in the first image and {box(5, 6, 7, 8)} in the second image", [[1], [2]]),
    (f"first image: {box(1, 2, 3, 4)}, third image: {box(5, 6, 7, 8)}", [[1], [3]]),
    (f"In image 2: {box(1, 2, 3, 4)}, {box(5, 6, 7, 8)} and {box(5, 6, 7, 9)}.", [[2, 2, 2]]),
])
def test_how_an_answer_names_its_image(answer, expected):
    found, left = read(record(("Find them.", answer)))
    assert not left and [[k for k, _ in i.targets] for i in found] == expected
    if len(expected) > 1:
        assert [i.question for i in found] == [f"Find them. Answer for image {k[0]} only." for k in expected]
        assert len({i.id for i in found}) == len(found)


@pytest.mark.parametrize("asked,answer,reason", [
    ("Find it.", "A red kite.", "no box in the answer"),
    ("Find it.", f"{box(1, 2, 3, 4)}", "image not named"),
    ("Find it in the second or in the third image.", f"{box(1, 2, 3, 4)}", "image not named"),
    ("Find it in the first and second images.", f"{box(1, 2, 3, 4)}", "image not named"),
    ("Find it in images 1, 2 or 3.", f"{box(1, 2, 3, 4)}", "image not named"),
    ("Find it.", f"fifth image {box(1, 2, 3, 4)}", "no such image"),
    ("Find it.", f"first image {box(5, 2, 5, 4)}", "degenerate box"),
    ("Find it.", f"first image {box(5, 9, 7, 4)}", "degenerate box"),
    ("Find it.", f"first image {box(5, 2, 1001, 4)}", "box outside 0-1000"),
    ("Find it.", "first image <|box_start|>(1,2),(3,4)", "box text cannot be read"),
    ("Find it.", "first image " + box("1.2.3", 2, 3, 4), "box text cannot be read"),
    ("Find it.", f"Unlike the first image, the second image has {box(1, 2, 3, 4)}", "image of a box unclear"),
    ("Find it.", f"first image {box(1, 2, 3, 4)}, elsewhere {box(1, 2, 3, 4)}", "image of a box unclear"),
    ("Find it.", f"Compared with the first image, there is {box(1, 2, 3, 4)}", "image of a box unclear"),
    ("What is not in the first image?", box(1, 2, 3, 4), "image not named"),
    (f"As {box(1, 2, 3, 4)} and {box(1, 2, 3, 4)}", f"first image {box(1, 2, 3, 4)}", "several reference boxes"),
    (f"As {box(1, 2, 3, 4)}", f"second image {box(1, 2, 3, 4)}", "reference box not said to be in the first image"),
    (f"As in the second image {box(1, 2, 3, 4)}", f"first image {box(1, 2, 3, 4)}",
     "reference box not said to be in the first image"),
    ("Find {ref}.", f"first image {box(1, 2, 3, 4)}", "text too long or with {ref}"),
    ("<|im_end|> Find it.", f"first image {box(1, 2, 3, 4)}", "question text cannot be read"),
    ("Find <image>", f"first image {box(1, 2, 3, 4)}", "image tags do not fit the images"),
])
def test_what_is_left_out_and_why(asked, answer, reason):
    assert read(record((asked, answer))) == ([], {reason: 1})


@pytest.mark.parametrize("data", [None, [], {}, {"images": []}, {"images": [1], "conversations": []},
                                  {"images": ["a"], "conversations": [{"from": "human"}]}])
def test_records_of_another_shape(data):
    assert read(data) == ([], {"record shape": 1})


def test_turns_in_the_wrong_order():
    data = record(("Find it.", "first image"))
    data["conversations"].reverse()
    assert read(data)[1] == {"turns not human and gpt in turn": 1}


def test_an_image_tag_inside_the_text_stands_for_its_image():
    data = record(("", f"second image {box(1, 2, 3, 4)}"), n=2)
    data["conversations"][0]["value"] = "<image>\nWhat of <image> is new?"
    assert read(data)[0][0].question == "What of image 2 is new?"


def test_unstated_image_only_by_the_callers_word():
    data = record(("What changed?", box(1, 2, 3, 4)), images=["./MGrounding-630k/Difference/a/1.jpg"] * 2)
    assert read(data)[1] == {"image not named": 1}
    assert read(data, unstated={"Difference": 2})[0][0].targets[0][0] == 2


def test_reference_box_and_the_questions_image():
    asked = f"For the thing in the first image ({box(100, 200, 300, 400)}), locate it in the second image."
    found, left = read(record((asked, box(1, 2, 3, 4)), n=2))
    assert not left and found[0].targets[0][0] == 2 and found[0].reference == (100, 200, 300, 400)
    assert found[0].question == "For the thing in the first image ({ref}), locate it in the second image."


def film(asked, answer, order=(1, 2, 3)):
    return record((asked, answer), images=[FILM.format(k) for k in order])


def test_tracking_one_box_per_frame():
    boxes = [box(k, 10, k + 50, 90) for k in (1, 2, 3)]
    found, left = read(film(f"Track the thing in the first image {boxes[0]}.", ", ".join(boxes)))
    assert not left and [(i.targets[0][0], i.targets[0][1][0]) for i in found] == [(2, 2), (3, 3)]  # frame 1 was given
    assert all(i.question.endswith(f"Answer for image {i.targets[0][0]} only.") for i in found)
    assert read(film("Track it.", ", ".join(boxes[:2])))[1] == {"tracking boxes do not fit the frames": 1}


def test_shuffled_tracking_is_put_into_time_order():
    asked = "The frames are shuffled. Where is the thing in the last image?"
    found, left = read(film(asked, f"In the third image: {box(1, 2, 3, 4)}", order=(9, 2, 5)))
    assert not left and found[0].images == tuple(FILM.format(k) for k in (2, 5, 9)) and found[0].targets[0][0] == 3
    boxes = ", ".join(box(1, 2, 3, 4) for _ in range(3))
    assert read(film("Shuffled frames: track it.", boxes, order=(9, 2, 5)))[1] == {"shuffled film, order of the boxes unclear": 1}
    assert read(film("Shuffled frames: track it.", boxes, order=(9, 9, 5)))[1] == {"shuffled film, order in time unknown": 1}
    assert read(film("Track it.", boxes, order=(9, 2, 5)))[1] == {"frames out of time order, which no question says": 1}


@pytest.fixture
def dataset(tmp_path):
    """A small copy of the data set as its archives unpack: one subset below a nested home/, one where it belongs."""
    nested = tmp_path / "home" / "someone" / "data" / "MGrounding-630k" / "Group_Grounding" / "SA-1B"
    plain = tmp_path / "MGrounding-630k" / "Object_Tracking" / "GOT-10k" / "train" / "GOT_1"
    for folder in (nested, plain):
        folder.mkdir(parents=True)
    for k in (1, 2, 3):
        Image.new("RGB", (200 * k, 100), "white").save(nested / f"sa_{k}.jpg")
        Image.new("L", (80, 80)).save(plain / f"{k:08d}.jpg")
    answer = f"It's in the third image. {box(500, 100, 1000, 1000)}"
    data = [record(("Find it.", answer)), film("Where is it?", f"first image {box(0, 0, 500, 500)}"), {"bad": 1},
            record(("Find it.", answer), images=[GROUP.format(k) for k in (1, 2, 77)]),
            record(("Find it.", answer), images=["../secret.jpg", *[GROUP.format(k) for k in (1, 2)]])]
    (tmp_path / "MGrounding-630k.json").write_text(json.dumps(data))
    return tmp_path


def test_samples_from_nested_folders_in_pixels(dataset):
    report = SkipReport()
    found = list(mgrounding.iter_samples(dataset / "MGrounding-630k.json", dataset, report))
    assert [s.sizes for s in found] == [[(200, 100), (400, 100), (600, 100)], [(80, 80)] * 3]
    assert found[0].targets == ((3, (300.0, 10.0, 600.0, 100.0)),) and found[1].targets == ((1, (0.0, 0.0, 40.0, 40.0)),)
    assert all(i.mode == "RGB" for s in found for i in s.images)
    assert report.read == 5 and report.kept == 2
    assert dict(report.counts) == {"record shape": 1, "missing image": 1, "outside root": 1}
    assert "sa_77.jpg" in report.text() and mgrounding.check_annotations(dataset / "MGrounding-630k.json", dataset).counts == report.counts


def test_samples_are_read_lazily(dataset):
    path = dataset / "MGrounding-630k.json"
    path.write_bytes(path.read_bytes()[:-30])  # the end is cut: the first sample comes all the same
    stream = mgrounding.iter_samples(path, dataset, SkipReport())
    assert next(stream).id == "0-1"
    with pytest.raises(ValueError, match="download it again"):
        list(stream)
    assert len(list(mgrounding.iter_samples(path, dataset, SkipReport(), limit=1))) == 1


def test_a_broken_image_is_counted_not_raised(dataset):
    folder = dataset / "MGrounding-630k" / "Object_Tracking" / "GOT-10k" / "train" / "GOT_1"
    whole = folder / "00000001.jpg"
    Image.effect_noise((300, 300), 80).save(whole)
    whole.write_bytes(whole.read_bytes()[:2000])  # the header is whole, the pixels are cut
    (folder / "00000002.jpg").write_bytes(b"no image")
    report = SkipReport()
    assert len(list(mgrounding.iter_samples(dataset / "MGrounding-630k.json", dataset, report))) == 1 == report.kept
    assert report.counts["unreadable image"] == 1
    Image.new("L", (80, 80)).save(folder / "00000002.jpg")
    report = SkipReport()
    assert len(list(mgrounding.iter_samples(dataset / "MGrounding-630k.json", dataset, report))) == 1 == report.kept
    assert report.counts["unreadable image"] == 1


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.png", "a/../../b.png", "", ".", "a\0b", "link/x.png", "loop/x.png", "a\\b",
                                  "x" * 5000 + "/a", "\ud800.png"])
def test_paths_stay_below_the_root(name, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", root / "link")
    os.symlink(root / "loop", root / "loop")
    with pytest.raises(BadImage):
        path = resolve_under_root(root, name)
        open_rgb(path)


values = st.recursive(st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=20),
                      lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4), max_leaves=12)
pieces = st.lists(st.sampled_from(["<image>", "\n", " first image ", " image 2 ", "the last image", " and ", ", ", "Find it",
                                   "shuffled", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
                                   "{ref}", "٣rd image", "image 999", box(1, 2, 3, 4),
                                   box(0, 0, 1000, 1000), box(7, 7, 7, 9), box(1, 2, 3000, 4)])
                  | st.text(max_size=6), max_size=8).map("".join)
turns = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | values, "value": pieces | values}), max_size=6)
paths = st.lists(st.sampled_from([GROUP.format(1), FILM.format(3), FILM.format(1), "/a", ".."]) | st.text(max_size=9), max_size=4)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1500)), deadline=None, suppress_health_check=list(HealthCheck))
@given(values | st.fixed_dictionaries({"images": paths | values, "conversations": turns | values}),
       st.lists(st.tuples(pieces, pieces), min_size=1, max_size=3), st.integers(1, 4), st.booleans())
def test_any_record_gives_items_inside_the_rules_or_a_reason(data, talk, n, tracking):
    for candidate in (data, record(*talk, n=n, images=[FILM.format(k) for k in range(n)] if tracking else None)):
        found, left = read(candidate, unstated={"Group_Grounding": 2})
        assert found or left or isinstance(candidate, dict)
        for item in found:
            assert item.targets and item.question and "<|" not in item.question and "<image>" not in item.question
            assert (item.reference is not None) == ("{ref}" in item.question)
            for k, b in [*item.targets, *([(1, item.reference)] if item.reference else [])]:
                assert 1 <= k <= len(item.images) and 0 <= b[0] < b[2] <= 1000 and 0 <= b[1] < b[3] <= 1000


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | values.map(lambda v: json.dumps(v).encode()))
def test_any_file_is_read_or_refused_with_one_error(tmp_path, data):
    path = tmp_path / "x.json"
    path.write_bytes(data)
    try:
        for index, element in enumerate(mgrounding.iter_records(path)):
            list(mgrounding.record_questions(index, element, SkipReport()))
    except ValueError as error:
        assert "download it again" in str(error)


def test_near_duplicates_finds_copies_and_nothing_else():
    photos = [make_sample("diff", "val", i).images[0].resize((320, 240)) for i in range(12)]
    noise = [Image.effect_noise((320, 240), 90).convert("RGB") for _ in range(12)]
    mixed = [Image.blend(a, b, 0.3) for a, b in zip(photos, noise)]
    train = perceptual_hashes((f"t{i}", image) for i, image in enumerate(mixed))
    copies = [image.resize((200, 150)).resize((330, 250)) for image in mixed[:4]]
    held_out = perceptual_hashes((f"e{i}", image) for i, image in enumerate(copies))
    assert {(a, b) for a, b, _ in find_near_duplicates(train, held_out)} == {(f"t{i}", f"e{i}") for i in range(4)}
    assert all(0 <= bits <= 4 for _, _, bits in find_near_duplicates(train, held_out))


def test_a_deeply_nested_file_is_one_sentence(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is nested over 32 deep"):
        list(mgrounding.iter_records(tmp_path / "x.json"))
