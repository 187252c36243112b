"""Which box and image is read from free text: the strict protocol's answers, and all boxes."""

import math
import os
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.prompts import format_answer
from mig_kit.score import annotations, choice_parsers, official, protocols, reply_boxes
from mig_kit.score.image_names import find_image_numbers
from mig_kit.score.reply_boxes import parse_named_box, parse_named_boxes, parse_strict_answer

THOUSAND = Coordinates.NORMALIZED_1000
BOX = (10, 20, 30, 40)


def read_answer(text):
    return parse_strict_answer(f"<answer>{text}</answer>")


@pytest.mark.parametrize("text,image,box,problem", [
    ('<think>[1,2,3,4]</think><answer>{"image": 2, "box": [10, 20, 30, 40]}</answer>', 2, BOX, ""),
    ("<answer>(9,9),(8,8)</answer> no: <answer>In the third image (10,20),(30,40)</answer>",
     3, BOX, ""),
    ("<answer>[10, 20, 30, 40], that is (10,20),(30,40)</answer>", None, BOX, ""),
    ("<answer>[10, 20, 30, 40] (1,2),(3,4)</answer>", None, None, "several boxes"),
    ("<answer>image 1 or image 2: [10, 20, 30, 40]</answer>", None, None, reply_boxes.AMBIGUOUS),
    ("<answer>[30, 20, 10, 40]</answer>", None, None, "not a box: needs x1 < x2 and y1 < y2"),
    ("<answer>none</answer>", None, None, "no box"),
    *((text, None, None, "no <answer> block") for text in (
        "[10, 20, 30, 40]", "<answer>[1, 2, 3, 4]", "<think><answer>[1, 2, 3, 4]</answer></think>",
        "<tool_call><answer>[1, 2, 3, 4]</answer></tool_call>",
        "<think><answer>[1, 2, 3, 4]</answer> so", "maybe <answer>[1, 2, 3, 4]</answer></think>"))])
def test_strict_answers(text, image, box, problem):
    answer = parse_strict_answer(text)
    assert (answer.image, answer.box, answer.problem) == (image, box, problem)


@pytest.mark.parametrize("text", [
    "(10,20),(30,40)", "(10, 20) to (30, 40)", "[10 20 30 40]", "[[10, 20], [30, 40]]",
    "<box>10,20,30,40</box>", "10, 20, 30, 40", "<|box_start|>(10,20),(30,40)<|box_end|>",
    "image 2, 10, 20, 30, 40", "\uff0810\uff0c20\uff09\uff0c\uff0830\uff0c40\uff09",
    "\u3010\uff11\uff10\uff0c\uff12\uff10\u3001\uff13\uff10\uff0c\uff14\uff10\u3011",
    '{"x2": 30, "x1": 10, "y2": 40, "y1": 20}', "left: 10, top: 20, right: 30, bottom: 40",
    '{"bbox_2d": [10, 20, 30, 40], "score": 0.9}', '{"bbox": "10,20,30,40"}',
    '{"top_left": [10, 20], "bottom_right": [30, 40]}', "width=9, x1=10, y1=20, x2=30, y2=40",
    '{"x": 10, "y": 20, "width": 20, "height": 20}',
    "top-left (10, 20), bottom-right corner at (30, 40)"])
def test_ways_to_write_a_box(text):
    assert read_answer(text).box == BOX


@pytest.mark.parametrize("text", [
    "(10, 20)", "10, 20, 30", "[10, 20, 30, 40, 50]", "image 1 (10,20), image 2 (30,40)",
    "x1=10, y1=20, x2=30", "", "10.20.30.40", "v1.2.3.4", "(60, 40) x (40, 60)"])
def test_what_is_no_box(text):
    assert read_answer(text).box is None


@pytest.mark.parametrize("images,texts", [
    ({2}, ("image 2", "Image-2", "image_2", "img 2", "image2", "Image #2", "Image (2)", "photo 2",
           "**Image 2**", "<image 2>", "image no. 2", "image=2", "Image 2 of 6", "image_2.jpg",
           "the second image", "2nd picture", "2nd-image", "\u56fe2", "\u7b2c\u4e8c\u5f20\u56fe",
           '{"image": 2, "box": \u25a0}', '{"image": "Image-2"}', '{"target_image": "second"}',
           "{'img_idx': '2'}", "{image: 2, box: \u25a0}", '{"image_2": \u25a0}', '{"image": [2]}',
           '[{"bbox_2d": \u25a0, "label": "the dog in image 2"}]',
           '{"image": 2, "reason": "not in image 1"}', '{"reference_image": 1, "target_image": 2}',
           "Maybe image 2?", "Image 2: the first dog from the left")),
    ({1, 2}, ("image 1 and image 2", "images 1 and 2", "image 1 (or 2)", "image 1/2", "images 1-2",
              "the first or the second image", "In image 1, the dog of image 2",
              "I compared image 1 with image 2; it is in the latter.", "\u56fe1\u548c\u56fe2",
              '{"image": [1, 2]}', '{"image": "1 or 2"}', '{"image": 1} or {"image": 2}',
              '{"image": 1}, or in image 2', '{"image_1": \u25a0, "image_2": \u25a0}')),
    (set(), ("the first dog", '{"image_size": [640, 480]}', "in the image \u25a0"))])
def test_the_images_that_an_answer_names(images, texts):
    for text in texts:
        assert find_image_numbers(text) == images, text
        if "\u25a0" not in text:
            answer = read_answer(f"{text} <box>10,20,30,40</box>")
            assert answer.image == (2 if images == {2} else None), text
            assert answer.problem == ("" if len(images) < 2 else reply_boxes.AMBIGUOUS), text


NOT_READ, AMBIGUOUS = reply_boxes.IMAGE_NOT_READ, reply_boxes.AMBIGUOUS
BY_READING = {  # of four images; B stands for the box
    3: ("Image three: B", "image no. three B", "pic #3 B", "the third one: B", "the 3rd: B",
        "Third: B",
        "the third of the 4 images: B", "B in the third", "{'image': 'third', 'box': B}",
        '{"image": 3.0, "box": B}', '{"image": "3/4", "box": B}', "3/4: B", "(3) B", "#3: B",
        "No. 3 B",
        "Figure 3: B", "Fig. 3: B", "View 3: B", "image 3 \u2013 B",
        "\u7b2c\u4e09\u5e45\u56fe\uff1aB",
        "\u56fe\u4e09\uff1aB", "second to last image: B", "the penultimate one: B", '{"3": B}',
        "Image index (1-based): 3\nbox: B", "Image number (1-4): 3, box: B", "the third view: B",
        "| image | box |\n|---|---|\n| 3 | B |", "Of all images, image 3 has it: B"),
    4: ("the last image: B", "the final one: B", '{"image": "last", "box": B}',
        "\u6700\u540e\u4e00\u5f20\u56fe\uff1aB"),
    None: ("B", "The dog is at B", "In the image: B", "Object 1: B", "1. The dog: B",
           "Final answer: B",
           '{"box": B, "label": "player 3", "score": 0.9}', '{"box": B, "class_id": 2}',
           "the 1th region picture in the source image: B", "The dog on the left: B"),
    AMBIGUOUS: ("Images 1\u20133: B", "images 1 to three: B", "image 1 through 3: B",
                "both images: B",
                "every image: B", "the first two images: B", "the first or third one: B",
                '{"image": "all", "box": B}'),
    NOT_READ: ("Image C: B", "C: B", "Image III: B", "image 0: B", '{"image": -1, "box": B}',
               '{"image": null, "box": B}', '{"image": "dog.jpg", "box": B}', "image 2.5: B",
               '{"target": 3, "box": B}', '{"id": 17, "box": B}', "target: 3\nbox: B",
               "the image after image 1: B", "all images but image 1: B", "Image 1b: B",
               "It is not in image 2: B", "image 1 onwards: B", "the other image: B",
               "the latter: B", "the left image: B", "the image on the left: B",
               "none of the images: B",
               "Image 1 and the other image: B", "the second image from the end: B", "images 2: B",
               "\u56feA\uff1aB", "\u53e6\u4e00\u5f20\u56fe\uff1aB")}


@pytest.mark.parametrize("expected,text", [
    (reading, text) for reading, texts in BY_READING.items() for text in texts])
def test_an_image_that_is_not_read_is_none_that_is_not_named(expected, text):
    text = re.sub(r"\bB\b", "[10, 20, 30, 40]", text)
    answer = parse_strict_answer(f"<answer>{text}</answer>", count=4)
    assert expected in (answer.image, answer.problem), answer
    assert (answer.box == BOX) == (not isinstance(expected, str))


def test_a_difference_may_be_said_to_be_in_both_images():
    text = "<answer>In image 1 and image 2: [10, 20, 30, 40]</answer>"
    assert parse_strict_answer(text, one_image=False).box == BOX
    item = annotations.BenchmarkItem(0, "", "diff", "", ("a", "b"), (0.01, 0.02, 0.03, 0.04))
    assert protocols.strict_iou(item, text, THOUSAND, BoxFormat())[0] == pytest.approx(1)


@pytest.mark.parametrize("written,coordinates,iou", [
    ("[-1, 0, 1001, 1000]", THOUSAND, 1), ("[-1.5, 0, 1000, 1000]", THOUSAND, 0),
    ("[0, 0, 1002, 1000]", THOUSAND, 0), ("[-1, 0, 0, 1000]", THOUSAND, 0),
    ("[-0.001, 0, 1.001, 1]", Coordinates.NORMALIZED_1, 1),
    ("[-0.01, 0, 1, 1]", Coordinates.NORMALIZED_1, 0)])
def test_a_box_one_unit_outside_is_cut_to_the_image(written, coordinates, iou):
    item = annotations.BenchmarkItem(0, "", "region", "", ("a",), (0, 0, 1, 1), target=1)
    reply = f"<answer>{written}</answer>"
    assert protocols.strict_iou(item, reply, coordinates, BoxFormat())[0] == pytest.approx(iou)


def test_the_kits_own_answers():
    for image in range(1, 13):
        reply = f"<think>image 3</think><answer>{format_answer(image, (1, 2, 30, 40))}</answer>"
        assert parse_strict_answer(reply) == reply_boxes.StrictAnswer(image, (1, 2, 30, 40))


@pytest.mark.parametrize("reply, image, box", [
    ("First candidate [5,6,7,8], no.</think>It is at [10,20,30,40]", None, BOX),
    ("Not image 1.</think>In image 2: [10,20,30,40]", 2, BOX),
    ("The dog of image 1 is in image 2 at [10,20,30,40]", 2, BOX),
    ('<tool_call>{"bbox_2d": [5,6,7,8], "img_idx": 1}</tool_call>I see none.', None, None),
    ("<think>[5,6,7,8]</think>", None, (5, 6, 7, 8))])
def test_reasoning_whose_tag_the_template_opens_is_no_answer(reply, image, box):
    assert parse_named_box(reply) == (image, box)


@pytest.mark.parametrize("piece", [
    "image ", "image 1,", "images 1 and ", "first, ", "1st or the ", '"image": [1, ', "image_(",
    '{"image": ', "[1, 2, 3, 4] ", "image 1 (1,2),(3,4). ", "x1=1 ", "<box>", "1 ", ". "])
def test_no_text_takes_long(piece):
    text, start = piece * (50_000 // len(piece)), time.process_time()
    parse_strict_answer(f"<answer>{text}</answer>")
    parse_named_box(text)
    parse_named_boxes(text)
    assert time.process_time() - start < 3


# The parsers on anything at all.

SIGNS = list("()[]<>,. \n-+*:$\\'\"{}ABCDEHZa0159\u0663\u00b2")
WORDS = ["<answer>", "</answer>", "<box>", "</box>", "(1,2),(3,4)", "[0.1, 0.2, 0.3, 0.4]",
         "image 2", "the third image", "(A)", "Point B", "therefore", "the answer is", "none",
         "closer", "\n(A) x\n(B) y", "9" * 320, "<think>", "</think>", '{"image": ', "target",
         "image two", "x1=", "not ", " or ", "yes", "first", "\u25a0", "\u2039", "\u203a", "\uff08"]
PIECES = st.lists(st.sampled_from(SIGNS + WORDS), max_size=25).map("".join)


def item_in(coordinates, box, size=None):
    return annotations.BenchmarkItem(0, "", "common_object", "", ("a", "b", "c"), box, coordinates,
                                     target=2, size=size)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 300)), deadline=None)
@given(st.one_of(PIECES, st.text()))
@example("(A)\n.\n(B)")
def test_every_text_is_read_and_has_a_score(text):
    for parse in (official.parse_mig_bench_box, official.parse_revised_mig_bench_box,
                  official.parse_normalized_pair):
        box = parse(text)
        assert box is None or (len(box) == 4 and all(value >= 0 for value in box))
    strict = parse_strict_answer(text)
    assert all(len(box) == 4 for _, box in parse_named_boxes(text))
    assert (strict.box is None) == bool(strict.problem)
    if strict.box:
        x1, y1, x2, y2 = strict.box
        assert x1 < x2 and y1 < y2 and all(map(math.isfinite, strict.box))
    for choices in ((), ("yes", "no"), ("the first image", "A is closer", "4", "4 (")):
        assert choice_parsers.parse_choice_letter(text, "ABCD", choices) in ("", *"ABCD")
    normalized, box = item_in(Coordinates.NORMALIZED_1, (0.1, 0.2, 0.3, 0.4)), (1, 2, 300, 400)
    for coordinates in (THOUSAND, Coordinates.NORMALIZED_1):
        assert 0 <= protocols.strict_iou(normalized, text, coordinates, BoxFormat())[0] <= 1
    for item in (normalized, item_in(THOUSAND, box), item_in(Coordinates.PIXELS, box, (640, 480))):
        assert 0 <= official.official_iou(item, text)[0] <= 1 + 1e-9
