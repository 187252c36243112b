"""Which box a reply states, and in which image, by tables of forms; and the parsers on any text."""

import json
import math
import os
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mig_bench_records import DATA, needs_data

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.prompts import parse_reply
from mig_kit.score import annotations, choice_parsers, official, protocols, reply_boxes
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.image_names import find_names
from mig_kit.score.reply_boxes import parse_named_box, parse_named_boxes, parse_strict_answer

THOUSAND, BOX = Coordinates.NORMALIZED_1000, (10, 20, 30, 40)
LETTERED = annotations.BenchmarkItem(0, "", "", "", letter="A", options="ABCD")


@pytest.mark.parametrize("text, image", [
    ("[10, 20, 30, 40]", None), ("(10,20),(30,40)", None), ("10, 20, 30, 40", None),
    ("<|box_start|>(10,20),(30,40)<|box_end|>", None), ("<box>10 20 30 40</box>", None),
    ("[[10, 20], [30, 40]].", None), ("In image 2: (10, 20, 30, 40)", 2),
    ("**Image 2**: [10,20,30,40]", 2),
    ("It's in the second image. (10,20),(30,40)", 2), ("[10,20,30,40] in the 3rd picture", 3),
    ("image #2: [10,20,30,40]", 2), ('{"image": 2, "box": [10, 20, 30, 40]}', 2),
    ('{"img_idx": "2", "bbox_2d": [[10, 20], [30, 40]]}', 2),
    ('```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cup", "image": 2}]\n```', 2),
    ('{"image": "image 2", "x1": 10, "y1": 20, "x2": 30, "y2": 40}', 2),
    ('{"bbox_2d": [10, 20, 30, 40], "label": "the cup in image 2"}', 2),
    ("image 2: [10,20,30,40]\nimage 2: [10,20,30,40]", 2)])
def test_what_states_one_box_is_read(text, image):
    for reply in (f"<answer>{text}</answer>", f"<think>[1,2,3,4]</think><answer>{text}</answer>"):
        assert parse_strict_answer(reply) == reply_boxes.StrictAnswer(image, BOX)
    assert parse_named_box(text) == reply_boxes.StrictAnswer(image, BOX)


# What released families document as their output of grounding, without an <answer>
FAMILIES = {
    "Qwen2.5-VL, Qwen3-VL (QwenLM/Qwen3-VL, cookbooks/2d_grounding.ipynb)":
        '```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "cup in image 2"}]\n```',
    "Qwen2-VL (QwenLM/Qwen2-VL, README), Migician":
        "<|object_ref_start|>the cup in image-2<|object_ref_end|>"
        "<|box_start|>(10,20),(30,40)<|box_end|>",
    "InternVL (internvl.readthedocs.io, chat data format)":
        "Image-2: <ref>the cup</ref><box>[[10, 20, 30, 40]]</box>",
    "GLM-4.5V (zai-org/GLM-4.5V, model card)":
        "It is here: <|begin_of_box|>Image 2: [[10,20,30,40]]<|end_of_box|>",
    "Seed1.5-VL (arXiv 2505.07062)": "image 2: <bbox>10 20 30 40</bbox>"}


@pytest.mark.parametrize("text", FAMILIES.values(), ids=[name[:10] for name in FAMILIES])
def test_documented_outputs_of_released_families_are_read(text):
    for parse in (parse_strict_answer, parse_named_box):
        assert parse(text) == parse(f"<think>[1,2,3,4]</think>{text}") == (
            reply_boxes.StrictAnswer(2, BOX))
        assert parse(text.replace("cup", "not visible").replace("2: ", "2: not ")).box is None


@pytest.mark.parametrize("text", [
    "", "[10,20,30,40] in image 3? No.", "If it were in image 3: [10,20,30,40]",
    "Image C: [10,20,30,40]", "Placeholder: [10,20,30,40]", "image 0x2 [10,20,30,40]",
    "Image 3... no, image 2: [10,20,30,40]",
    "Images 1 to 4: [10,20,30,40]", "the last image: [10,20,30,40]", "not image 2: [10,20,30,40]",
    '{"page": 2, "bbox_2d": [10,20,30,40]}', '{"label": "no cup", "bbox_2d": [10,20,30,40]}',
    '{"image": 1, "image": 2, "box": [10,20,30,40]}', '{"excluded_image": 2, "box": [10,20,30,40]}',
    "# image 2: [10,20,30,40]", '{"image": null, "box": [10,20,30,40]}',
    '{"label": "picture B", "bbox_2d": [10,20,30,40]}',
    '{"label": "not in image 2", "bbox_2d": [10,20,30,40]}',
    '{"image": [1, 2], "box": [10,20,30,40]}', '{"image": true, "box": [10,20,30,40]}',
    '{"x": 10, "y": 20, "width": 20, "height": 20}',
    '{"image": 2, "box": [10,20,30]}', "image 2 from the end: [10,20,30,40]", "[10,20,30,40,50]",
    "[10,20,30,40] [1,2,3,4]", "image 1: [1,2,3,4]\nimage 2: [10,20,30,40]",
    "image 2: (30,40),(10,20)", '{"image": 2, "box": [10,20,30,' + "9" * 310 + "]}",
    '{"image": 2, "box": [10,20,30,40], "confidence": 0.0}',
    '{"image": 2, "box": [10,20,30,40], "label": "distractor"}'])
def test_what_says_more_or_less_is_not(text):
    answer = parse_strict_answer(f"<answer>{text}</answer>")
    assert answer.box is None and answer.problem


@pytest.mark.parametrize("around", [
    "{}\nCorrection: image 1", "The format would be {}.", "It is not {}.", "{} Wait, no.",
    "{}\nimage 1: [1,2,3,4]", "{} is wrong"])
def test_the_words_around_a_closed_answer_count(around):
    answer = "<answer>image 2: [10,20,30,40]</answer>"
    assert parse_strict_answer(answer + "\n\nI hope this helps.").box == BOX
    assert parse_strict_answer(around.format(answer)).problem == reply_boxes.UNREAD
    assert protocols.read_strictly(LETTERED, around.format("<answer>B</answer>").replace(
        "image 1: [1,2,3,4]", "A")) == ("", "")


def test_no_answer_block_is_needed_around_json_alone():
    block = '```json\n[{"bbox_2d": [10, 20, 30, 40]}]\n```'
    assert parse_strict_answer(f"<think>[1,2,3,4]</think>{block}").box == BOX
    for text in ("[10,20,30,40]", '<tool_call>{"bbox_2d": [10, 20, 30, 40]}</tool_call>'):
        assert parse_strict_answer(text).problem == reply_boxes.NO_ANSWER
    assert parse_strict_answer(f"It is {block}").problem == reply_boxes.NO_ANSWER
    assert parse_strict_answer("<think>The answer is <answer>[10,20,30,40]</answer>").box is None


def test_names_of_images():
    for text, numbers in (("image 2", [{2}]), ("images 1, 2 and 3", [{1, 2, 3}]), ("img_3", [{3}]),
                          ("the first or the third image", [{1, 3}]), ("2nd photo", [{2}]),
                          ("image 1 and then image 2", [{1}, {2}]), ("image 1.5, 2 images", [])):
        assert [name.numbers for name in find_names(text)] == numbers, text


@needs_data
@pytest.mark.parametrize("name", ["turn7/boxes", "turn6/boxes", "turn5/new_boxes",
                                  "reports/strict"])
def test_boxes_in_new_wordings_never_score_wrongly_and_never_fail_in_silence(name):
    for line in (DATA / "cases" / f"{name}.jsonl").read_text().splitlines():
        case = json.loads(line)
        if case.get("form") == "x1,y1,w,h":  # which nothing tells from two corners
            continue
        if case.get("options"):  # --box-order
            continue
        item = read_benchmark("mig_bench", [case["item"]]).items[0]
        is_strict = case.get("protocol", "strict") == "strict"
        reply = case["response"] if is_strict else f"<answer>{case['response']}</answer>"
        value, problem, _ = protocols.strict_iou(item, reply, THOUSAND, BoxFormat(), {})
        assert case["should"] or value < 0.5 or not is_strict, case["response"]
        assert value >= 0.5 or problem or not case["should"], case["response"]


@pytest.mark.parametrize("written, coordinates, iou", [
    ("[-1, 0, 1001, 1000]", THOUSAND, 1), ("[0, 0, 1002, 1000]", THOUSAND, 0),
    ("[-1, 0, 0, 1000]", THOUSAND, 0), ("[-0.001, 0, 1.001, 1]", Coordinates.NORMALIZED_1, 1),
    ("[-0.01, 0, 1, 1]", Coordinates.NORMALIZED_1, 0)])
def test_a_box_one_unit_outside_is_cut_to_the_image(written, coordinates, iou):
    item = annotations.BenchmarkItem(0, "", "region", "", ("a",), (0, 0, 1, 1), target=1)
    reply = f"<answer>{written}</answer>"
    assert protocols.strict_iou(item, reply, coordinates, BoxFormat(), {})[0] == pytest.approx(iou)


@pytest.mark.parametrize("piece", [
    "image ", "image 1,", "images 1 and ", "first, ", "1st or the ", '"image": [1, ', "image_(",
    '{"image": ', "[1, 2, 3, 4] ", "image 1 (1,2),(3,4). ", "x1=1 ", "<box>", "1 ", ". ", "answer ",
    "answer is ", "A) ", "the answer is A. ", "**A** ", "A\n", "\\boxed{", "<think>", "<answer>",
    "</answer>", "<answer>A</answer>", "[x] A ", "not A. ", '{"answer": "A"} '])
def test_no_text_takes_long(piece):
    text, start = piece * (50_000 // len(piece)), time.process_time()
    parse_reply(text)
    parse_reply(f"<think>{text}")
    parse_strict_answer(f"<answer>{text}</answer>")
    parse_named_boxes(text)
    choice_parsers.read_choice(text, "ABCD", ("A is closer", "left"), True)
    assert time.process_time() - start < 3


# The parsers on anything at all.

SIGNS = list("()[]<>,. \n-+*:$\\'\"{}ABCDEHZa0159\u0663\u00b2")
WORDS = ["<answer>", "</answer>", "<box>", "</box>", "(1,2),(3,4)", "[0.1, 0.2, 0.3, 0.4]",
         "image 2", "the third image", "(A)", "Point B", "the answer is", "none", "\n(A) x\n(B) y",
         "9" * 320, "[1, 2, 3, " + "9" * 320 + "]", "<think>", "</think>", '{"image": ',
         '"box": ', "x1", "not ", " or ", "\uff08"]
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
        assert choice_parsers.read_choice(text, "ABCD", choices)[0] in ("", *"ABCD")
    normalized, box = item_in(Coordinates.NORMALIZED_1, (0.1, 0.2, 0.3, 0.4)), (1, 2, 300, 400)
    for coordinates in (THOUSAND, Coordinates.NORMALIZED_1):
        assert 0 <= protocols.strict_iou(normalized, text, coordinates, BoxFormat(), {})[0] <= 1
    for item in (normalized, item_in(THOUSAND, box), item_in(Coordinates.PIXELS, box, (640, 480))):
        assert 0 <= official.official_iou(item, text)[0] <= 1 + 1e-9
