"""What is read from free text: boxes, image numbers and letters."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mig_bench_oracle import oracle_boxes

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import PROJECT_ROOT
from mig_kit.scoring import annotations, parsers, record_files, score

DATA = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data"))
BLINK_FILES = sorted((DATA / "blink").glob("val_*.jsonl"))


@pytest.mark.parametrize("text,box", [
    ("(100,200),(300,400)", (0.1, 0.2, 0.3, 0.4)),
    # A lone match: 1 becomes 0.001.
    ("(1,200),(300,1000)", (0.001, 0.2, 0.3, 1.0)),
    # Several: a literal 1 stays, and the first box counts.
    ("(1,200),(300,1000) (5,5),(6,6)", (1.0, 0.2, 0.3, 1.0)),
    # Patterns go by rank, not by place.
    ("[0.1, 0.2, 0.3, 0.4] (1,2),(3,4)", (0.001, 0.002, 0.003, 0.004)),
    ("<think>[10, 20, 30, 40]</think><answer>[0.1,0.2,0.3,0.4]</answer>", (0.1, 0.2, 0.3, 0.4)),
    # Pixels, silently taken for 0..1000.
    ("[56, 112, 280, 336]", (0.056, 0.112, 0.28, 0.336)),
    ("<box>10 20 30 40</box>", (0.01, 0.02, 0.03, 0.04)),
    ("(0.1, 0.2),(0.3,0.4)", None),
    ("[-1, 2, 3, 4]", None),
    ("[1.0, 2, 3, 4]", None),
    ("", None)])
def test_official_mig_bench_boxes(text, box):
    assert parsers.parse_mig_bench_box(text) == (pytest.approx(box) if box else None)


def test_revised_boxes_must_be_whole_numbers():
    box = parsers.parse_revised_mig_bench_box("(1,20),(300,400) (5,6),(7,8)")
    assert box == (1, 20, 300, 400)
    assert parsers.parse_revised_mig_bench_box("[0.1, 0.2, 0.3, 0.4]") is None
    assert parsers.parse_normalized_pair("( 10 , 20 ) , (30,40)") == (0.01, 0.02, 0.03, 0.04)
    assert parsers.parse_normalized_pair("[1,2,3,4]") is None


@pytest.mark.parametrize("text,image,box,problem", [
    ('<think>[1,2,3,4]</think><answer>{"image": 2, "box": [10, 20, 30, 40]}</answer>',
     2, (10, 20, 30, 40), ""),
    ("<answer>(9,9),(8,8)</answer> no: <answer>In the third image (10,20),(30,40)</answer>",
     3, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40]</answer>", None, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40] [1, 2, 3, 4]</answer>", None, None, "several boxes"),
    ("<answer>image 1 or image 2: [10, 20, 30, 40]</answer>", None, None, "several images"),
    ("<answer>[30, 20, 10, 40]</answer>", None, None, "not a box: needs x1 < x2 and y1 < y2"),
    ("<answer>none</answer>", None, None, "no box"),
    ("[10, 20, 30, 40]", None, None, "no <answer> block"),
    ("<answer>[1, 2, 3, 4]", None, None, "no <answer> block")])
def test_strict_answers(text, image, box, problem):
    answer = parsers.parse_strict_answer(text)
    assert (answer.image, answer.box, answer.problem) == (image, box, problem)


@pytest.mark.parametrize("text,images", [
    ('{"target_image": 2, "bbox": [1, 2, 3, 4]}', {2}),
    ("Picture 2: (1,2),(3,4)", {2}),
    ("image=2", {2}),
    ("image (2)", {2}),
    ("Image **2**", {2}),
    ("img 2", {2}),
    ("2nd picture", {2}),
    ("image no. 2", {2}),
    ('"image_idx": 2', {2}),
    ("in the image (100,200),(300,400)", set()),
    ("image [100, 200, 300, 400]", set()),
    ("pilgrimage 2", set())])
def test_names_of_images(text, images):
    assert parsers.find_image_numbers(text) == images


@pytest.mark.parametrize("text,letter", [
    ("B", "B"),
    (" (B) the third image", "B"),
    ("<s> A </s>", "A"),
    ("b.", "B"),
    ("The correct answer is (C) because A is red.", "C"),
    ("A is closer. Point A is closer to the camera than point B.</s>", "A"),
    ("Box B more accurately encloses it. Box A does not.", "B"),
    ("(A) is wrong.\n(B) is a dog.\nTherefore, the answer is:\n(B) a dog", "B"),
    ("(C) About the same\n\nPoints A and B look alike.", "C"),
    ("<think>(A) or (B)?</think><answer>B</answer>", "B"),
    ("<think>Either A or C.</think>\n\nB", "B"),
    ("A large cat sits on a mat.", ""),
    ("Neither (A) nor (B) matches.", ""),
    ("I might lean towards (B) or (C).", ""),
    ("", ""),
    ("(H)", "")])
def test_letters(text, letter):
    assert parsers.parse_choice_letter(text, "ABCD") == letter


@pytest.mark.parametrize("text,letter", [
    ("Left is (A) and right is (B) .\n\n(B)", "B"), ("(A) and\nthen (B)", ""), ("(C)", "C"),
    ("C", "")])
def test_blinks_own_rule_decides_nothing_that_its_authors_leave_to_another_model(text, letter):
    assert parsers.parse_blink_letter(text, "ABCD") == letter


# The parsers on anything at all.

SIGNS = list("()[]<>,. \n-+*:$\\'\"{}ABCDEHZa0159\u0663\u00b2")
WORDS = ["<answer>", "</answer>", "<box>", "</box>", "(1,2),(3,4)", "[0.1, 0.2, 0.3, 0.4]",
         "image 2", "the third image", "(A)", "Point B", "therefore", "the answer is", "none",
         "closer", "\n(A) x\n(B) y", "9" * 320]
PIECES = st.lists(st.sampled_from(SIGNS + WORDS), max_size=25).map("".join)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1000)), deadline=None)
@given(st.one_of(PIECES, st.text()))
@example("(A)\n.\n(B)")
def test_parsers_never_raise(text):
    for parse in (parsers.parse_mig_bench_box, parsers.parse_revised_mig_bench_box,
                  parsers.parse_normalized_pair):
        box = parse(text)
        assert box is None or (len(box) == 4 and all(value >= 0 for value in box))
    strict = parsers.parse_strict_answer(text)
    assert (strict.box is None) == bool(strict.problem)
    if strict.box:
        x1, y1, x2, y2 = strict.box
        assert x1 < x2 and y1 < y2 and all(map(math.isfinite, strict.box))
    assert parsers.parse_choice_letter(text, "ABCD") in ("", *"ABCD")
    assert len(oracle_boxes(text)) == len(parsers._matches(text))


def item_in(coordinates, box, size=None):
    return annotations.BenchmarkItem(0, "", "common_object", "", ("a", "b", "c"), box, coordinates,
                                     target=2, size=size)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1000)), deadline=None)
@given(st.one_of(PIECES, st.text()))
def test_every_text_has_a_score(text):
    normalized = item_in(Coordinates.NORMALIZED_1, (0.1, 0.2, 0.3, 0.4))
    for coordinates in (Coordinates.NORMALIZED_1000, Coordinates.NORMALIZED_1):
        assert 0 <= score.strict_iou(normalized, text, coordinates, BoxFormat())[0] <= 1
    box = (1, 2, 300, 400)
    for item in (normalized, item_in(Coordinates.NORMALIZED_1000, box),
                 item_in(Coordinates.PIXELS, box, (640, 480))):
        assert 0 <= score.official_iou(item, text)[0] <= 1 + 1e-9


@pytest.mark.skipif(not BLINK_FILES,
                    reason="no blink/val_*.jsonl in the folder that MIG_KIT_DATA names")
def test_letters_agree_with_blinks_authors():
    settled = agreed = mentioned = mentioned_agreed = 0
    for path in BLINK_FILES:
        records = record_files.read_records(path)
        for item, record in zip(annotations.read_blink(records).items, records):
            text, authors_letter = record["full_prediction"], record["prediction"][1]
            if authors_letter not in item.options:
                authors_letter = ""
            letter = parsers.parse_choice_letter(text, item.options)
            if letter:
                settled += 1
                agreed += letter == authors_letter
            if letter or parsers.find_option_letters(text, item.options):
                mentioned += 1
                mentioned_agreed += letter == authors_letter
    assert settled > 8400 and agreed / settled >= 0.99
    assert mentioned > 8700 and mentioned_agreed / mentioned >= 0.98
