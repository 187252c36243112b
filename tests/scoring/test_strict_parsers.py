"""Which box and image the strict protocol reads from free text."""

import functools
import os
from pathlib import Path

import numpy as np
import pytest
from mig_bench_records import mig_records
from mig_bench_wordings import AMBIGUOUS, NO_ANSWER, PLAIN, word_reply

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import PROJECT_ROOT
from mig_kit.prompts import format_answer
from mig_kit.scoring import (
    annotations,
    image_names,
    record_files,
    score,
    strict_parsers,
)
from mig_kit.scoring.parsers import last_answer_block
from mig_kit.scoring.strict_parsers import parse_strict_answer

DATA = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data"))
MIG_FILE = DATA / "mig_bench" / "MIG_data.json"
THOUSAND = Coordinates.NORMALIZED_1000
BOX = "[10, 20, 30, 40]"


def read_answer(text):
    return parse_strict_answer(f"<answer>{text}</answer>")


@pytest.mark.parametrize("text,image,box,problem", [
    ('<think>[1,2,3,4]</think><answer>{"image": 2, "box": [10, 20, 30, 40]}</answer>',
     2, (10, 20, 30, 40), ""),
    ("<answer>(9,9),(8,8)</answer> no: <answer>In the third image (10,20),(30,40)</answer>",
     3, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40]</answer>", None, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40], that is (10,20),(30,40)</answer>", None, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40] [1, 2, 3, 4]</answer>", None, None, "several boxes"),
    ("<answer>[10, 20, 30, 40] (1,2),(3,4)</answer>", None, None, "several boxes"),
    ("<answer>image 1 or image 2: [10, 20, 30, 40]</answer>", None, None,
     strict_parsers.AMBIGUOUS),
    ("<answer>image 2: [10, 20, 30, 40]. No, wrong.</answer>", 2, None, strict_parsers.DENIED),
    ("<answer>[30, 20, 10, 40]</answer>", None, None, "not a box: needs x1 < x2 and y1 < y2"),
    ("<answer>none</answer>", None, None, "no box"),
    ("[10, 20, 30, 40]", None, None, "no <answer> block"),
    ("<answer>[1, 2, 3, 4]", None, None, "no <answer> block"),
    ("<think><answer>[1, 2, 3, 4]</answer></think>", None, None, "no <answer> block"),
    ("<tool_call><answer>[1, 2, 3, 4]</answer></tool_call>", None, None, "no <answer> block"),
    ("<think><answer>[1, 2, 3, 4]</answer> so", None, None, "no <answer> block"),
    ("maybe <answer>[1, 2, 3, 4]</answer></think>", None, None, "no <answer> block")])
def test_strict_answers(text, image, box, problem):
    answer = parse_strict_answer(text)
    assert (answer.image, answer.box, answer.problem) == (image, box, problem)


@pytest.mark.parametrize("text", [
    "(10,20),(30,40)", "(10, 20) to (30, 40)", "[10 20 30 40]", "[[10, 20], [30, 40]]",
    "<box>10,20,30,40</box>", "<box>10 20 30 40</box>", "10, 20, 30, 40",
    "<|box_start|>(10,20),(30,40)<|box_end|>", "image 2, 10, 20, 30, 40",
    "\uff0810\uff0c20\uff09\uff0c\uff0830\uff0c40\uff09",
    "\u3010\uff11\uff10\uff0c\uff12\uff10\u3001\uff13\uff10\uff0c\uff14\uff10\u3011",
    "x1=10, y1=20, x2=30, y2=40", '{"x2": 30, "x1": 10, "y2": 40, "y1": 20}',
    "left: 10, top: 20, right: 30, bottom: 40", '{"bbox_2d": [10, 20, 30, 40], "score": 0.9}',
    '{"top_left": [10, 20], "bottom_right": [30, 40]}', '{"bbox": "10,20,30,40"}',
    '{"x": 10, "y": 20, "width": 20, "height": 20}', "width=9, x1=10, y1=20, x2=30, y2=40",
    "top-left (10, 20), bottom-right corner at (30, 40)"])
def test_ways_to_write_a_box(text):
    assert read_answer(text).box == (10, 20, 30, 40)


@pytest.mark.parametrize("text", [
    "(10, 20)", "10, 20, 30", "[10, 20, 30, 40, 50]", "image 1 (10,20), image 2 (30,40)",
    "x1=10, y1=20, x2=30", "", "10.20.30.40", "v1.2.3.4"])
def test_what_is_no_box(text):
    assert read_answer(text).box is None


@pytest.mark.parametrize("text,images", [
    ('{"target_image": 2, "bbox": \u25a0}', {2}), ("Picture 2: (1,2),(3,4)", {2}),
    ("image=2", {2}), ("image (2)", {2}), ("Image **2**", {2}), ("img 2", {2}),
    ("2nd picture", {2}), ("image no. 2", {2}), ('"image_idx": 2', {2}), ("image two", {2}),
    ("the second one", {2}), ('{"image": [2]}', {2}), ('{"target": 2}', {2}),
    ('{"image": "second"}', {2}), ('{"image": "Image-2"}', {2}), ("{image_id: '2'}", {2}),
    ('{"image": [1, 2]}', {1, 2}), ("images 1 and 2", {1, 2}),
    ("the first and third image", {1, 3}),
    ('{"reference_image": 1, "target_image": 2}', {2}), ('{"image": 1, "target": 2}', {2}),
    ("in the image (100,200)", set()), ("image [100, 200, 300, 400]", set()),
    ("pilgrimage 2", set()), ("picture frame 2", set()), ("the second picture frame", set()),
    ("the 2nd region picture", set()), ('{"image_size": [640, 480]}', set()),
    ("the last image", {4}), ("the second to last image", {image_names.UNCLEAR}),
    ("image 2, as of all images", {2}), ("of all images", {image_names.UNCLEAR})])
def test_names_of_images(text, images):
    assert image_names.find_image_numbers(text, count=4) == images


@pytest.mark.parametrize("text", [
    "image 1: [], image 2: []", "image 1: [], image 2: [1, 2, 3, 5]", "Image 1 or 2: []",
    "Either image 1 or image 2 at []", "It is in image 2 at [], or maybe in image 1.",
    "In image 1 and image 2: []", "image 2/3: []", "Image 2 (or image 3): []",
    "Maybe image 2: []. Maybe image 3: []", "the first and second images: []",
    '[{"image": 1, "bbox": []}, {"image": 2, "bbox": []}]', '{"image": [1, 2], "bbox": []}'])
def test_who_names_two_images_names_none(text):
    assert read_answer(text.replace("[]", BOX)).box is None


def test_a_difference_may_be_said_to_be_in_both_images():
    text = f"<answer>In image 1 and image 2: {BOX}</answer>"
    assert parse_strict_answer(text, one_image=False).box == (10, 20, 30, 40)
    item = annotations.BenchmarkItem(0, "", "diff", "", ("a", "b"), (0.01, 0.02, 0.03, 0.04))
    assert score.strict_iou(item, text, THOUSAND, BoxFormat())[0] == pytest.approx(1)


@pytest.mark.parametrize("written,coordinates,iou", [
    ("[-1, 0, 1001, 1000]", THOUSAND, 1), ("[-1.5, 0, 1000, 1000]", THOUSAND, 0),
    ("[0, 0, 1002, 1000]", THOUSAND, 0), ("[-1, 0, 0, 1000]", THOUSAND, 0),
    ("[-0.001, 0, 1.001, 1]", Coordinates.NORMALIZED_1, 1),
    ("[-0.01, 0, 1, 1]", Coordinates.NORMALIZED_1, 0)])
def test_a_box_one_unit_outside_is_cut_to_the_image(written, coordinates, iou):
    item = annotations.BenchmarkItem(0, "", "region", "", ("a",), (0, 0, 1, 1), target=1)
    reply = f"<answer>{written}</answer>"
    assert score.strict_iou(item, reply, coordinates, BoxFormat())[0] == pytest.approx(iou)


def test_the_kits_own_answers():
    for image in range(1, 13):
        reply = f"<think>image 3</think><answer>{format_answer(image, (1, 2, 30, 40))}</answer>"
        answer = parse_strict_answer(reply)
        assert (answer.image, answer.box, answer.problem) == (image, (1, 2, 30, 40), "")
    inside = f"<think><answer>{format_answer(2, (1, 2, 30, 40))}</answer></think>"
    assert last_answer_block(inside) is None
    assert parse_strict_answer(inside).problem == "no <answer> block"


# Perfect boxes in natural wordings.

def strict_average(items, reply_to):
    """Acc@0.5 in percent, averaged over tasks, of a reply (None: left out) to every item."""
    by_task = {}
    for item in items:
        reply = reply_to(item, [round(1000 * v) for v in item.box])
        if reply is not None:
            value, _ = score.strict_iou(item, reply, THOUSAND, BoxFormat())
            by_task.setdefault(item.task, []).append(value >= 0.5)
    return 100 * np.mean([np.mean(values) for values in by_task.values()])


@functools.cache
def read_items():
    """MIG-Bench's questions where its file is, else made ones without the inverted answer."""
    if MIG_FILE.is_file():
        return annotations.read_mig_bench(record_files.read_records(MIG_FILE)).items
    return annotations.read_mig_bench(mig_records()[:5]).items


def answer_with(wording, is_correct=True):
    """A function of an item and its box: the reply in this wording of its image or of another."""
    def reply_to(item, box):
        image = item.target or 2
        other = image % len(item.images) + 1
        pair = (image, other) if is_correct else (other, image)
        return word_reply(wording, *pair, box) if is_correct or item.target else None

    return reply_to


@pytest.mark.parametrize("wording", PLAIN)
def test_a_perfect_box_in_one_image_counts_in_any_wording(wording):
    items = read_items()[::20]
    assert strict_average(items, answer_with(wording)) >= 99
    assert strict_average(items, answer_with(wording, is_correct=False)) == 0


@pytest.mark.parametrize("wording", NO_ANSWER + AMBIGUOUS)
def test_a_denial_a_doubt_a_retraction_and_several_images_score_nothing(wording):
    items = [item for item in read_items()[::20] if item.target]
    assert strict_average(items, answer_with(wording)) == 0
    reply = answer_with(wording)(items[0], (100, 200, 300, 400))
    problem = strict_parsers.AMBIGUOUS if wording in AMBIGUOUS else strict_parsers.DENIED
    assert parse_strict_answer(reply).problem == problem


@pytest.mark.parametrize(("text", "image"), [
    ("second: [1, 2, 30, 40]", 2), ("the second - [1, 2, 30, 40]", 2), ("3rd - (1, 2, 30, 40)", 3),
    ("image 2, the first [1, 2, 30, 40]", 2), ("the first dog is at [1, 2, 30, 40]", None),
    ("first [1, 2, 30, 40]", None), ("First, [1, 2, 30, 40].", None)])
def test_an_ordinal_before_the_box_names_its_image_where_nothing_else_does(text, image):
    answer = parse_strict_answer(f"<answer>{text}</answer>")
    assert answer.box == (1, 2, 30, 40) and answer.image == image
