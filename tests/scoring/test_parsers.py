"""What is read from free text: boxes, image numbers and letters."""

import math
import os

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mig_bench_oracle import oracle_boxes

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.scoring import (
    annotations,
    box_lists,
    choice_parsers,
    image_names,
    parsers,
    score,
    strict_parsers,
)


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


# The parsers on anything at all.

SIGNS = list("()[]<>,. \n-+*:$\\'\"{}ABCDEHZa0159\u0663\u00b2")
WORDS = ["<answer>", "</answer>", "<box>", "</box>", "(1,2),(3,4)", "[0.1, 0.2, 0.3, 0.4]",
         "image 2", "the third image", "(A)", "Point B", "therefore", "the answer is", "none",
         "closer", "\n(A) x\n(B) y", "9" * 320, "<think>", "</think>", '{"image": ', "target",
         "image two", "x1=", "not ", " or ", "yes", "first", "\u25a0", "\u2039", "\u203a", "\uff08"]
PIECES = st.lists(st.sampled_from(SIGNS + WORDS), max_size=25).map("".join)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1000)), deadline=None)
@given(st.one_of(PIECES, st.text()))
@example("(A)\n.\n(B)")
def test_parsers_never_raise(text):
    for parse in (parsers.parse_mig_bench_box, parsers.parse_revised_mig_bench_box,
                  parsers.parse_normalized_pair):
        box = parse(text)
        assert box is None or (len(box) == 4 and all(value >= 0 for value in box))
    strict = strict_parsers.parse_strict_answer(text)
    assert all(len(box) == 4 for _, box in box_lists.parse_named_boxes(text))
    assert (strict.box is None) == bool(strict.problem)
    if strict.box:
        x1, y1, x2, y2 = strict.box
        assert x1 < x2 and y1 < y2 and all(map(math.isfinite, strict.box))
    for choices in ((), ("yes", "no"), ("the first image", "A is closer", "4", "4 (")):
        assert choice_parsers.parse_choice_letter(text, "ABCD", choices) in ("", *"ABCD")
    assert all(number >= 0 for number in image_names.find_image_numbers(text))
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
