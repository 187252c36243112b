"""Scores by hand, against an independent statement of the official rules, and on the official files where they are."""

import json
import math
import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates, smart_resize
from mig_kit.cli import cli
from mig_kit.common import PROJECT_ROOT
from mig_kit.scoring import annotations, coco, leaderboard, parsers, score
from mig_kit.scoring.result import paired_difference, summarize

DATA = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data"))
MIG_FILE, BLINK_FILES = DATA / "mig_bench" / "MIG_data.json", sorted((DATA / "blink").glob("val_*.jsonl"))
needs_mig = pytest.mark.skipif(not MIG_FILE.is_file(), reason="no mig_bench/MIG_data.json in the folder that MIG_KIT_DATA names")
needs_blink = pytest.mark.skipif(not BLINK_FILES, reason="no blink/val_*.jsonl in the folder that MIG_KIT_DATA names")


def score_predictions(benchmark, predictions, source="P", *rules, **settings):
    """Scores with the default limits of a processor, which only absolute coordinates need."""
    return score.score_predictions(benchmark, predictions, source, BoxFormat(), *rules, **settings)


# An oracle of MIG-Bench's rules, written without regular expressions and in exact fractions.

FORMS = ("(d,_d),_(d,_d)", "[f,_f,_f,_f]", "(f,f),(f,f)", "(f,_f,_f,_f)", "[d,_d,_d,_d]", "<box>d d d d</box>")


def match_at(form, text, at):
    """(numbers, end) of a form at a place, or None. d: digits, f: digits.digits, _: maybe white space, blank: some."""
    numbers = []
    for sign in form:
        start = at
        if sign in "df":
            while at < len(text) and text[at].isdecimal():
                at += 1
            if at == start:
                return None
            if sign == "f":
                point = at
                at += 1
                while at < len(text) and text[at].isdecimal():
                    at += 1
                if text[point:point + 1] != "." or at == point + 1:
                    return None
            numbers.append(text[start:at])
        elif sign in "_ ":
            while at < len(text) and text[at].isspace():
                at += 1
            if sign == " " and at == start:
                return None
        elif text[at:at + 1] == sign:
            at += 1
        else:
            return None
    return numbers, at


# "box" holds a "d"-free literal except in <box>: no letter d or f occurs in "<box>", so forms need no escaping.

def oracle_boxes(text):
    for form in FORMS:
        found, at = [], 0
        while at < len(text):
            hit = match_at(form, text, at)
            if hit:
                found.append([Fraction(n) for n in hit[0]])
                at = hit[1]
            else:
                at += 1
        if found:
            return found
    return []


def oracle_iou(answer, text):
    boxes = oracle_boxes(text)
    if not boxes:
        return Fraction(0)
    box = [v / 1000 if v > 1 or (v == 1 and len(boxes) == 1) else v for v in boxes[0]]
    answer = [Fraction(v) for v in answer]
    overlap = [min(answer[i + 2], box[i + 2]) - max(answer[i], box[i]) for i in (0, 1)]
    if min(overlap) < 0:
        return Fraction(0)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (answer, box)]
    return overlap[0] * overlap[1] / (sum(areas) - overlap[0] * overlap[1])


TEMPLATES = ["({},{}),({},{})", "({}, {}), ({}, {})", "({},{}), ({},{})", "<|box_start|>({},{}),({},{})<|box_end|>",
             "[{}, {}, {}, {}]", "[{},{},{},{}]", "({}, {}, {}, {})", "<box>{} {} {} {}</box>", "<box>{},{},{},{}</box>",
             "[[{}, {}, {}, {}]]",
             "({} ,{}),({},{})", "x1={} y1={} x2={} y2={}", '{{"image": 2, "box": [{}, {},\n{}, {}]}}', "<box>{}  {}\t{} {}</box>"]
WRAPS = ["{}", "It is here: {}.", "<think>not {other}</think><answer>{}</answer>", "<think>no box</think>\n<answer>{}</answer>",
         "{} or {other}", "Image-2 {}", "{}{}", "-{}", "I see nothing.", ""]


def varied_responses(count, seed=0):
    """(answer in 0..1, response) pairs: all forms, frames, inversions, several boxes, literal ones and zeros, and near misses."""
    draw = random.Random(seed)

    def values(answer):
        box = [v + draw.gauss(0, draw.choice((0, 0.02, 0.1))) for v in answer]
        kind = draw.randrange(7)
        if kind == 0:
            box = [box[2], box[1], box[0], box[3]]
        if kind == 1:
            box[draw.randrange(4)] = draw.choice((0, 1, 0.001, 1.5, 2, 0.9999))
        if kind == 2:
            return [str(round(abs(v) * draw.choice((640, 1333)))) for v in box]
        if kind in (3, 4):
            return [f"{abs(v):.{draw.randint(1, 4)}f}" for v in box]
        return [str(round(abs(v) * 1000)) for v in box]

    for _ in range(count):
        x1, y1 = draw.uniform(0, 0.6), draw.uniform(0, 0.6)
        answer = [round(v, 3) for v in (x1, y1, x1 + draw.uniform(0.05, 0.4), y1 + draw.uniform(0.05, 0.4))]
        one, other = (draw.choice(TEMPLATES).format(*values(answer)) for _ in range(2))
        wrap = draw.choice(WRAPS)
        yield answer, wrap.replace("{other}", other).replace("{}", one)


def test_official_mig_bench_equals_the_oracle():
    overlapping = several = 0
    for answer, response in varied_responses(6000):
        expected = oracle_iou(answer, response)
        assert score.mig_bench_iou(answer, parsers.parse_mig_bench_box(response)) == pytest.approx(float(expected), abs=1e-9), response
        overlapping += expected > 0
        several += len(oracle_boxes(response)) > 1
    assert overlapping > 2000 and several > 500  # the comparison has substance


@pytest.mark.parametrize("text,box", [
    ("(100,200),(300,400)", (0.1, 0.2, 0.3, 0.4)),
    ("(1,200),(300,1000)", (0.001, 0.2, 0.3, 1.0)),  # a lone match: 1 becomes 0.001
    ("(1,200),(300,1000) (5,5),(6,6)", (1.0, 0.2, 0.3, 1.0)),  # several: a literal 1 stays, and the first box counts
    ("[0.1, 0.2, 0.3, 0.4] (1,2),(3,4)", (0.001, 0.002, 0.003, 0.004)),  # patterns go by rank, not by place
    ("<think>[10, 20, 30, 40]</think><answer>[0.1,0.2,0.3,0.4]</answer>", (0.1, 0.2, 0.3, 0.4)),
    ("[56, 112, 280, 336]", (0.056, 0.112, 0.28, 0.336)),  # pixels, silently taken for thousandths
    ("<box>10 20 30 40</box>", (0.01, 0.02, 0.03, 0.04)),
    ("(0.1, 0.2),(0.3,0.4)", None), ("[-1, 2, 3, 4]", None), ("[1.0, 2, 3, 4]", None), ("", None)])
def test_official_mig_bench_boxes(text, box):
    assert parsers.parse_mig_bench_box(text) == (pytest.approx(box) if box else None)


def test_official_iou_by_hand():
    assert score.mig_bench_iou((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert score.mig_bench_iou((0, 0, 0.5, 0.5), (0.5, 0, 0.75, 0.5)) == 0  # touching
    assert score.mig_bench_iou((0, 0, 0.5, 0.5), (0.5, 0.5, 0, 0)) == 0  # inverted, not repaired
    assert score.mig_bench_iou((0.2, 0.4, 0.4, 0.2), (0.2, 0.4, 0.4, 0.2)) == 0  # an inverted answer matches not even itself
    assert score.mig_bench_iou((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1)) == 0  # the script would divide by zero
    assert score.mig_bench_iou((0, 0, 0.5, 0.5), parsers.parse_mig_bench_box(f"(0,0),({'9' * 400},0)")) == 0
    assert score.univg_iou((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5)) == pytest.approx(0.125 / (0.375 + 1e-6), abs=1e-12)


def test_revised_boxes_must_be_whole_numbers():
    assert parsers.parse_revised_mig_bench_box("(1,20),(300,400) (5,6),(7,8)") == (1, 20, 300, 400)
    assert parsers.parse_revised_mig_bench_box("[0.1, 0.2, 0.3, 0.4]") is None
    assert parsers.parse_normalized_pair("( 10 , 20 ) , (30,40)") == (0.01, 0.02, 0.03, 0.04)
    assert parsers.parse_normalized_pair("[1,2,3,4]") is None


@pytest.mark.parametrize("text,image,box,problem", [
    ('<think>[1,2,3,4]</think><answer>{"image": 2, "box": [10, 20, 30, 40]}</answer>', 2, (10, 20, 30, 40), ""),
    ("<answer>(9,9),(8,8)</answer> no: <answer>In the third image (10,20),(30,40)</answer>", 3, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40]</answer>", None, (10, 20, 30, 40), ""),
    ("<answer>[10, 20, 30, 40] [1, 2, 3, 4]</answer>", None, None, "several boxes"),
    ("<answer>image 1 or image 2: [10, 20, 30, 40]</answer>", None, None, "several images"),
    ("<answer>[30, 20, 10, 40]</answer>", None, None, "not a box: needs x1 < x2 and y1 < y2"),
    ("<answer>none</answer>", None, None, "no box"),
    ("[10, 20, 30, 40]", None, None, "no <answer> block"), ("<answer>[1, 2, 3, 4]", None, None, "no <answer> block")])
def test_strict_answers(text, image, box, problem):
    read = parsers.parse_strict_answer(text)
    assert (read.image, read.box, read.problem) == (image, box, problem)


def item(**changes):
    return annotations.BenchmarkItem(**{"index": 0, "id": "", "task": "common_object", "question": "", "images": ("a", "b", "c"),
                              "box": (0.1, 0.2, 0.3, 0.4), "target": 2} | changes)


def test_strict_wants_the_right_image_and_frame():
    right = '<answer>{"image": 2, "box": [100, 200, 300, 400]}</answer>'
    assert score.strict_iou(item(), right, Coordinates.NORMALIZED_1000, BoxFormat()) == (pytest.approx(1), "")
    assert score.strict_iou(item(), right.replace("2,", "1,", 1), Coordinates.NORMALIZED_1000, BoxFormat()) == (0, "wrong image")
    assert score.strict_iou(item(), right, Coordinates.NORMALIZED_1, BoxFormat()) == (0, "outside the image")
    silent = "<answer>[100, 200, 300, 400]</answer>"
    assert score.strict_iou(item(), silent, Coordinates.NORMALIZED_1000, BoxFormat())[0] == pytest.approx(1)
    assert score.strict_iou(item(image_stated=False), silent, Coordinates.NORMALIZED_1000, BoxFormat()) == (0, "no image named")
    static = item(task="diff", target=None, images=("a", "b"))
    assert score.strict_iou(static, right, Coordinates.NORMALIZED_1000, BoxFormat())[0] == pytest.approx(1)
    third = right.replace('"image": 2', '"image": 3')
    assert score.strict_iou(static, third, Coordinates.NORMALIZED_1000, BoxFormat()) == (0, "wrong image")


def test_strict_converts_the_resized_frame():
    size = (1000, 500)
    width, height = smart_resize(*size)
    box = [0.1 * width, 0.2 * height, 0.3 * width, 0.4 * height]
    text = f"<answer>[{', '.join(f'{v:.4f}' for v in box)}]</answer>"
    assert score.strict_iou(item(size=size), text, Coordinates.ABSOLUTE, BoxFormat())[0] == pytest.approx(1, abs=1e-3)
    pixels = "<answer>[100, 100, 300, 200]</answer>"
    assert score.strict_iou(item(size=size), pixels, Coordinates.PIXELS, BoxFormat())[0] == pytest.approx(1)


@pytest.mark.parametrize("text,letter", [
    ("B", "B"), (" (B) the third image", "B"), ("<s> A </s>", "A"), ("b.", "B"),
    ("The correct answer is (C) because A is red.", "C"),
    ("A is closer. Point A is closer to the camera than point B.</s>", "A"),
    ("Box B more accurately encloses it. Box A does not.", "B"),
    ("(A) is wrong.\n(B) is a dog.\nTherefore, the answer is:\n(B) a dog", "B"),
    ("(C) About the same\n\nPoints A and B look alike.", "C"), ("<think>(A) or (B)?</think><answer>B</answer>", "B"),
    ("A large cat sits on a mat.", ""), ("Neither (A) nor (B) matches.", ""),
    ("I might lean towards (B) or (C).", ""), ("", ""), ("(H)", "")])
def test_letters(text, letter):
    assert parsers.parse_choice_letter(text, "ABCD") == letter


def test_multiple_choice_protocols():
    records = [{"idx": f"val_T_{i}", "task": "T", "answer": answer} for i, answer in enumerate(["(A)", "(B)", "(B)", "(A)"])]
    bench = annotations.read_blink(records)
    texts = ["(A)", "<answer>(B)</answer>", "Not (B) but (A), so I choose (A).", "(B)"]
    lines = [{"id": f"val_T_{i}", "response": text} for i, text in enumerate(texts)]
    right = {protocol: score_predictions(bench, lines, "P", protocol).values.tolist() for protocol in score.PROTOCOLS["blink"]}
    assert right == {"official": [1, 1, 1, 0], "strict": [0, 1, 0, 0], "substring": [1, 1, 1, 0]}  # "(B)" alone: a quirk


def test_mmiu_letters_and_left_out_items():
    bench = annotations.read_mmiu([{"task": "t", "options": "A: the U.S. B: two C: three", "output": "C"}, {"task": "t", "output": None},
                             {"task": "u", "options": "A: 1\nB: 2", "output": "B."}])
    assert [(i.index, i.letter, i.options) for i in bench.items] == [(0, "C", "ABC"), (2, "B", "AB")]
    scored = score_predictions(bench, [{"index": 0, "response": "C"}, {"index": 2, "response": "A"}], "P")
    assert summarize(scored)["avg"]["accuracy"] == 50 and scored.indices == (0, 2)


def mig_records():
    """Six items in four tasks; the last answer is inverted."""
    def one(task, question, answer, info="", images=3):
        return {"task": task, "question": question, "answer": answer, "additional_info": info,
                "images": [f"{k}.png" for k in range(images)]}

    return [one("common_object", "Locate it in the 2th image. ", [0.1, 0.1, 0.5, 0.5]),
            one("common_object", "Locate it in the 3th image. ", [0.2, 0.2, 0.6, 0.6]),
            one("group_grounding", "Find the truck.", [0.0, 0.0, 0.5, 0.5], "It is in the first image. "),
            one("diff", "Compare.", [0.5, 0.5, 1.0, 1.0], images=2), one("region", "Locate it.", [0.0, 0.0, 1.0, 1.0]),
            one("region", "Locate it.", [0.4, 0.9, 0.8, 0.1])]


REPLIES = ["(100,100),(500,500)", "(200,200),(600,400)", "(0,0),(500,250)", "(500,500),(1000,900)", "(0,0),(1000,250)",
           "(400,100),(800,900)"]


def lines_of(texts):
    return [{"index": index, "response": text} for index, text in enumerate(texts)]


def test_mig_bench_summary_by_hand():
    bench = annotations.read_mig_bench(mig_records())
    assert (bench.version, bench.complete) == ("original", False)
    assert [i.target for i in bench.items] == [2, 3, 1, None, 1, 1] and not bench.items[2].image_stated
    result = summarize(score_predictions(bench, lines_of(REPLIES), "P"))
    tasks = result["tasks"]  # IoU 1 and 0.5; 0.5; 0.8; 0.25 and 0
    assert list(tasks) == ["common_object", "group_grounding", "diff", "region"]
    assert [values["acc@0.5"] for values in tasks.values()] == [100, 100, 100, 0]
    assert [values["mean_iou"] for values in tasks.values()] == [75, 50, 80, 12.5]
    assert result["avg"]["acc@0.5"] == 75 and result["avg"]["acc@0.7"] == 37.5
    assert result["avg"]["mean_iou"] == pytest.approx(54.375, abs=0.01)
    assert result["notes"]["no box can match"] == ["5"] and result["avg"]["ci95"] == [75, 75]
    assert set(tasks["diff"]) == {"n", "acc@0.3", "acc@0.5", "acc@0.7", "mean_iou", "ci95"}


def test_the_revised_version_is_told_by_its_answers():
    records = [{**record, "answer": [round(1000 * v) for v in record["answer"]]} for record in mig_records()]
    bench = annotations.read_mig_bench(records)
    assert bench.version == "revised" and bench.items[0].coordinates == Coordinates.NORMALIZED_1000
    assert score_predictions(bench, lines_of(REPLIES), "P").values.tolist() == pytest.approx([1, 0.5, 0.5, 0.8, 0.25, 0])
    wrapped = lines_of([f"<answer>{text}</answer>" for text in REPLIES])  # the reply to the group item names no image
    assert score_predictions(bench, wrapped, "P", "strict").values.tolist() == pytest.approx([1, 0.5, 0, 0.8, 0.25, 0])


def test_paired_difference():
    bench = annotations.read_mig_bench(mig_records())
    first, second = (score_predictions(bench, lines_of(texts), "P") for texts in (REPLIES, ["nothing"] * 6))
    gap = paired_difference(first, second)
    assert gap["acc@0.5"] == {"value": 75, "ci95": [75, 75]} and gap["mean_iou"]["value"] == pytest.approx(54.375, abs=0.01)
    assert paired_difference(first, first)["mean_iou"] == {"value": 0, "ci95": [0, 0]}


@pytest.mark.parametrize("lines,sentence", [
    (lines_of(REPLIES)[:-2], "missing: 2 (4, 5)"), (lines_of(REPLIES) + lines_of(REPLIES)[:1], "given more than once: 1 (0)"),
    (lines_of(REPLIES) + [{"index": 99, "response": ""}], "unknown to the annotations: 1 (99)"),
    ([{"response": ""}], 'no "index" or "id"'), ([{"index": True, "response": ""}], 'no "index" or "id"'),
    ([{"index": 0, "answer": ""}], 'no "response"'), ([{"index": 0, "response": 3}], '"response" of prediction 1'),
    ([{**line, "index": line["index"] + 0.5} for line in lines_of(REPLIES)], 'no "index" or "id"')])
def test_predictions_must_fit(lines, sentence):
    with pytest.raises(ValueError) as error:
        score_predictions(annotations.read_mig_bench(mig_records()), lines, "P.jsonl")
    assert sentence in str(error.value) and "P.jsonl" in str(error.value)


def test_blinks_own_rule_and_what_its_authors_leave_to_another_model():
    for text, letter in (("Left is (A) and right is (B) .\n\n(B)", "B"), ("(A) and\nthen (B)", ""), ("(C)", "C"), ("C", "")):
        assert parsers.parse_blink_letter(text, "ABCD") == letter, text
    assert parsers.parse_choice_letter("<think>Either A or C.</think>\n\nB", "ABCD") == "B"


@pytest.mark.parametrize("text,images", [
    ('{"target_image": 2, "bbox": [1, 2, 3, 4]}', {2}), ("Picture 2: (1,2),(3,4)", {2}), ("image=2", {2}), ("image (2)", {2}),
    ("Image **2**", {2}), ("img 2", {2}), ("2nd picture", {2}), ("image no. 2", {2}), ('"image_idx": 2', {2}),
    ("in the image (100,200),(300,400)", set()), ("image [100, 200, 300, 400]", set()), ("pilgrimage 2", set())])
def test_names_of_images(text, images):
    assert parsers.find_image_numbers(text) == images


def test_a_line_that_names_two_items_is_refused_and_ids_count_only_where_there_are_any():
    lines = [{**line, "id": len(REPLIES) - line["index"]} for line in lines_of(REPLIES)]
    plain = score_predictions(annotations.read_mig_bench(mig_records()), lines_of(REPLIES), "P.jsonl")
    assert (score_predictions(annotations.read_mig_bench(mig_records()), lines, "P.jsonl").values == plain.values).all()
    bench = annotations.read_blink([{"idx": f"val_{i}", "sub_task": "T", "answer": "(A)"} for i in range(2)])
    with pytest.raises(ValueError, match="which are different items"):
        score_predictions(bench, [{"index": 0, "id": "val_1", "response": "A"}, {"index": 1, "id": "val_0", "response": "A"}], "P")
    assert score_predictions(bench, [{"id": None, "index": i, "response": "A"} for i in (1, 0)], "P").values.tolist() == [1, 1]


def test_coordinates_that_no_protocol_reads_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(mig_records()))
    with pytest.raises(ValueError, match="--coordinates absolute needs --protocol strict"):
        score.score_files("mig_bench", str(tmp_path / "a.json"), "p", BoxFormat(), "official", "absolute")


def test_odinw_with_categories_in_any_order_and_ids_as_text():
    truth = {"images": [{"id": 1, "width": 50, "height": 50}], "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
             "annotations": [{"id": 0, "image_id": 1, "category_id": c, "bbox": [b, b, 10, 10]} for c, b in ((1, 5), (2, 30))]}
    found = coco.score_odinw(truth, [{"image_id": "1", "category_id": "1", "bbox": [5, 5, 10, 10], "score": 1.0, "caption": "x"}], "P")
    assert found.aggregates["cat"]["ap"] == 100 and found.aggregates["dog"]["ap"] == 0


def test_an_index_may_be_written_as_text_or_as_a_float():
    """As pandas writes a column with gaps."""
    plain = score_predictions(annotations.read_mig_bench(mig_records()), lines_of(REPLIES), "P.jsonl")
    for kind in (str, float):
        lines = [{**line, "index": kind(line["index"])} for line in lines_of(REPLIES)]
        assert (score_predictions(annotations.read_mig_bench(mig_records()), lines, "P.jsonl").values == plain.values).all()


def test_missing_may_be_counted_wrong():
    scored = score_predictions(annotations.read_mig_bench(mig_records()), lines_of(REPLIES)[:1], "P", allow_missing=True)
    assert scored.problems == {"missing": 5} and scored.values.tolist() == pytest.approx([1, 0, 0, 0, 0, 0])


# Benchmarks whose answers are pixels of real images.

def picture(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_lisa_by_hand(tmp_path):
    picture(tmp_path / "a.jpg", (200, 100))
    bench = annotations.read_lisa([{"image_path": "a.jpg", "instruction": "the cat", "boxes": [[20, 20, 60, 40], [0, 0, 9, 9]]}] * 2)
    lines = lines_of(["<answer>(100,200),(300,400)</answer> (0,0),(1,1)", "[100,200,300,400]"])
    scored = score_predictions(bench, lines, "P", images=str(tmp_path))
    assert scored.values.tolist() == [pytest.approx(0.04 / (0.04 + 1e-6), abs=1e-12), 0] and bench.version == "subset"
    pixels = lines_of(["<answer>[20,20,60,40]</answer>"] * 2)
    assert score_predictions(bench, pixels, "P", "strict", Coordinates.PIXELS).values.tolist() == [1, 1]  # no conversion, so no images needed


def test_revos_answers_in_the_third_frame(tmp_path):
    for number in (1, 2, 10, 3):
        picture(tmp_path / "v1" / f"{number}.jpg", (number * 100, 100))
    boxes = [[0, 0, 1, 1], [0, 0, 1, 1], [100.9, 20, 500, 60]]
    bench = annotations.read_revos([{"video_id": "v1", "frames": [0, 1, 3], "question": "q", "bbox_list": boxes}])
    assert annotations.add_image_sizes(bench.items, tmp_path)[0].size == (1000, 100)  # 1, 2, 3, 10: by number, not by name
    assert score_predictions(bench, lines_of(["(100,200),(500,600)"]), "P", images=str(tmp_path)).values[0] == pytest.approx(1, abs=1e-4)


def test_images_are_confined_and_missing_ones_listed(tmp_path):
    bench = annotations.read_lisa([{"image_path": f"{k}.jpg", "instruction": "", "boxes": [[0, 0, 1, 1]]} for k in range(5)])
    with pytest.raises(ValueError, match=r"5 images are missing below .* \(first: 0.jpg, 1.jpg, 2.jpg\)"):
        annotations.add_image_sizes(bench.items, tmp_path)
    for name in ("../x.jpg", "/etc/passwd", "../../v#1"):
        with pytest.raises(ValueError, match="below the image root"):
            annotations.resolve_image_path(tmp_path, name)
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no readable images|are missing"):
        annotations.add_image_sizes(bench.items[:1], tmp_path)


def test_ref_l4_by_hand():
    boxes = {"a": [0, 0, 100, 100], "b": [0, 0, 200, 200], "c": [10, 10, 300, 300]}
    bench = annotations.read_ref_l4([{"id": name, "bbox": box} for name, box in boxes.items()])
    lines = [{"id": "a", "pred_bbox": [0, 0, 100, 50], "format": "xyxy"},
             {"id": "b", "pred_bbox": [0, 0, 200, 160], "format": "xywh"},
             {"id": "c", "pred_bbox": [10, 10, 300, 300], "format": "xywh"}]
    result = summarize(score_predictions(bench, lines, "P"))
    assert list(result["tasks"]) == ["small", "medium", "large"]
    assert result["avg"]["acc@0.5"] == 66.67  # IoU 0.5 is not over 0.5
    assert (result["avg"]["acc@0.75"], result["avg"]["acc@0.9"], result["avg"]["mean_iou"]) == (66.67, 33.33, 76.67)
    assert result["tasks"]["medium"]["macc"] == 60  # 0.8 passes 0.5 to 0.75, and is not over 0.8 in single precision
    with pytest.raises(ValueError, match="--protocol strict"):
        score_predictions(bench, lines_of(["(1,2),(3,4)"] * 3), "P")


def coco_truth(groups=1):
    """Two pairs of 100 x 100 images; pair (1, 2) has a box in both, pair (3, 4) only in 3."""
    boxes = [(1, 1, [0, 0, 50, 50]), (2, groups, [0, 0, 40, 40]), (3, 1, [10, 10, 50, 50])]
    return {"images": [{"id": k, "width": 100, "height": 100, "file_name": f"{k}.jpg"} for k in (1, 2, 3, 4)],
            "annotations": [{"id": n, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
                            for n, (image, category, box) in enumerate(boxes, 1)],
            "categories": [{"id": k, "name": f"group {k}"} for k in range(1, groups + 1)],
            "descriptions": [{"id": 1, "images_id": [1, 2], "text": "a", "text_style": "referring", "positive_sample": True},
                             {"id": 2, "images_id": [3, 4], "text": "b", "text_style": "reasoning", "positive_sample": True}]}


def found(image, box, category=1, confidence=1.0):
    return {"image_id": image, "category_id": category, "bbox": box, "score": confidence}


def test_mc_bench_by_hand():
    entries = [found(1, [0, 0, 50, 50]), found(2, [0, 0, 40, 40]), found(3, [10, 10, 50, 50]), found(4, [0, 0, 5, 5])]
    result = summarize(coco.score_mc_bench(coco_truth(), entries, "P"))
    assert result["tasks"]["referring"]["accuracy"] == 100 and result["tasks"]["reasoning"]["accuracy"] == 0  # a box where none is
    assert result["avg"]["accuracy"] == 50 and result["tasks"]["referring"]["ap50"] == 100
    none = summarize(coco.score_mc_bench(coco_truth(), [], "P"))
    assert none["avg"]["accuracy"] == 0 and none["avg"]["ap50"] == 0


def test_mc_bench_groups_may_be_named_in_any_order():
    swapped = [found(1, [0, 0, 50, 50], 2), found(2, [0, 0, 40, 40], 1), found(3, [10, 10, 50, 50])]
    assert summarize(coco.score_mc_bench(coco_truth(2), swapped, "P", "strict"))["avg"]["ap50"] == 100
    official = coco.score_mc_bench(coco_truth(2), swapped, "P")  # the script renames 1 to 2, then both of them to 1
    assert summarize(official)["avg"]["ap50"] < 100


def test_odinw_by_hand():
    truth = coco_truth()
    perfect = [found(e["image_id"], e["bbox"]) for e in truth["annotations"]]
    assert summarize(coco.score_odinw(truth, perfect, "P"))["avg"] == {"ap": 100, "ap50": 100, "ap75": 100}
    loose = [found(e["image_id"], [*e["bbox"][:3], e["bbox"][3] * 0.6]) for e in truth["annotations"]]  # IoU 0.6
    assert summarize(coco.score_odinw(truth, loose, "P"))["avg"]["ap75"] == 0
    assert summarize(coco.score_odinw(truth, [], "P"))["avg"]["ap"] == 0


@pytest.mark.parametrize("entries,sentence", [
    ([found(9, [0, 0, 1, 1])], "image_id"), ([found(1, [0, 0, 1, 1], 7)], "category_id"),
    ([{"image_id": 1, "category_id": 1}], '"score"'),
    ([found(1, [0, 0, 1, math.nan])], '"score"'), ([found(1, [0, 0, 1, 10**400])], '"score"')])
def test_coco_predictions_must_fit(entries, sentence):
    with pytest.raises(ValueError, match=sentence):
        coco.score_odinw(coco_truth(), entries, "P.json")


# The parsers on anything at all.

PIECES = st.lists(st.sampled_from(list("()[]<>,. \n-+*:$\\'\"{}ABCDEHZa0159٣²") + [
    "<answer>", "</answer>", "<box>", "</box>", "(1,2),(3,4)", "[0.1, 0.2, 0.3, 0.4]", "image 2", "the third image", "(A)",
    "Point B", "therefore", "the answer is", "none", "closer", "\n(A) x\n(B) y", "9" * 320]), max_size=25).map("".join)


@settings(max_examples=int(os.environ.get("MIG_KIT_FUZZ", 1000)), deadline=None)
@given(st.one_of(PIECES, st.text()))
@example("(A)\n.\n(B)")
def test_parsers_never_raise(text):
    for read in (parsers.parse_mig_bench_box, parsers.parse_revised_mig_bench_box, parsers.parse_normalized_pair):
        box = read(text)
        assert box is None or (len(box) == 4 and all(v >= 0 for v in box))
    strict = parsers.parse_strict_answer(text)
    assert (strict.box is None) == bool(strict.problem)
    if strict.box:
        assert strict.box[0] < strict.box[2] and strict.box[1] < strict.box[3] and all(map(math.isfinite, strict.box))
    assert parsers.parse_choice_letter(text, "ABCD") in ("", *"ABCD")
    for coordinates in (Coordinates.NORMALIZED_1000, Coordinates.NORMALIZED_1):
        assert 0 <= score.strict_iou(item(), text, coordinates, BoxFormat())[0] <= 1
    box = (1, 2, 300, 400)
    for thing in (item(), item(coordinates=Coordinates.NORMALIZED_1000, box=box), item(coordinates=Coordinates.PIXELS, size=(640, 480), box=box)):
        assert 0 <= score.official_iou(thing, text)[0] <= 1 + 1e-9
    assert len(oracle_boxes(text)) == len(parsers._matches(text))


# The command.

@pytest.fixture
def files(tmp_path):
    """Annotations and two models' predictions as files."""
    (tmp_path / "mig.json").write_text(json.dumps(mig_records()))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(REPLIES)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines_of(["none"] * 6)))
    return tmp_path


def command(folder, *words, annotations="mig.json", predictions="a.jsonl"):
    given_files = ["--annotations", str(folder / annotations), "--predictions", str(folder / predictions)]
    return CliRunner().invoke(cli, ["score", *words, *given_files])


def test_command_writes_the_result(files):
    result = command(files, "mig-bench", "--compare", str(files / "b.jsonl"), "--json", str(files / "out.json"),
                     "--items", str(files / "items.jsonl"))
    assert result.exit_code == 0, result.output
    written = json.loads((files / "out.json").read_text())
    assert {"benchmark", "version", "protocol", "n", "tasks", "avg"} <= set(written) and written["n"] == 6
    assert written["compare"]["difference"]["acc@0.5"]["value"] == 75
    assert "| avg | 6 | 75.00 |" in result.output and "63.82" in result.output and "do not hold every item" in result.output
    values = [json.loads(line)["value"] for line in (files / "items.jsonl").read_text().splitlines()]
    assert values == pytest.approx([1, 0.5, 0.5, 0.8, 0.25, 0])


@pytest.mark.parametrize("words,changes,sentence", [
    (("mig",), {}, "the benchmarks are"), (("mig_bench", "--protocol", "substring"), {}, "its protocols are"),
    (("mig_bench", "--coordinates", "cm"), {}, "the coordinates are"), (("mig_bench",), {"predictions": "none.jsonl"}, "no file"),
    (("mig_bench",), {"predictions": "cut.jsonl"}, "line 2 of"), (("mig_bench",), {"predictions": "list.json"}, "entry 1 of"),
    (("mig_bench",), {"predictions": "empty.jsonl"}, "is empty"), (("mig_bench",), {"predictions": "bytes.jsonl"}, "UTF-8"),
    (("mig_bench",), {"annotations": "a.jsonl"}, "is this the MIG-Bench file"), (("lisa",), {}, "is this the LISA-grounding file"),
    (("blink",), {}, "is this the BLINK file"), (("mc_bench",), {}, "COCO-style"), (("odinw",), {}, "COCO-style"),
    (("mig_bench", "--protocol", "strict", "--coordinates", "pixels"), {}, "--images"),
    (("mig_bench", "--json", "no/such/folder.json"), {}, "cannot be written")])
def test_bad_input_is_one_sentence(files, words, changes, sentence):
    (files / "cut.jsonl").write_text('{"index": 0, "response": ""}\n{"index": 1, "resp')
    (files / "list.json").write_text("[1, 2]")
    (files / "empty.jsonl").write_text("\n")
    (files / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    result = command(files, *words, **changes)
    assert isinstance(result.exception, (ValueError, FileNotFoundError)) and sentence in str(result.exception)


def test_parquet_annotations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    record = {"id": "a", "bbox": [0.0, 0.0, 10.0, 10.0], "width": 20, "height": 20}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    bench = annotations.read_ref_l4(annotations.read_records(tmp_path / "a.parquet"))
    lines = [{"id": "a", "response": "<answer>(0,0),(500,500)</answer>"}]
    assert score_predictions(bench, lines, "P", "strict").values[0] == pytest.approx(1)


def test_published_rows_average_to_their_headline():
    for row in (*leaderboard.MIG_BENCH["original"], *leaderboard.MIG_BENCH["revised"]):
        if row.tasks:
            assert set(row.tasks) == set(annotations.MIG_BENCH_TASKS)
            assert np.mean(list(row.tasks.values())) == pytest.approx(row.avg, abs=0.06)


# The official files.

@needs_mig
def test_the_official_annotations():
    bench = annotations.read_mig_bench(annotations.read_records(MIG_FILE))
    assert (bench.version, bench.complete, len(bench.items)) == ("original", True, 4295)
    notes = score.annotation_problems(bench, is_strict=True)
    assert notes["no box can match"] == ["7", "105", "126", "163", "512"] and notes["answer leaves the image"] == ["34", "703"]
    assert notes["given twice"] == ["2092 = 2094", "2093 = 2095"] and len(notes["target image unknown, not checked"]) == 528


@needs_mig
def test_official_answers_score_themselves_and_varied_ones_as_the_oracle():
    bench = annotations.read_mig_bench(annotations.read_records(MIG_FILE))
    truth = [f"[{', '.join(map(str, i.box))}]" for i in bench.items]
    scored = score_predictions(bench, lines_of(truth), "P")
    below = {i.index for i, value in zip(bench.items, scored.values) if value < 0.999}
    assert below == {7, 105, 126, 163, 512} | {i.index for i in bench.items if max(i.box) >= 1}  # a lone 1.0 is read as 0.001
    responses = [text for _, text in varied_responses(len(bench.items), seed=1)]
    values = score_predictions(bench, lines_of(responses), "P").values
    for thing, response, value in zip(bench.items, responses, values):
        assert value == pytest.approx(float(oracle_iou(thing.box, response)), abs=1e-9)


@needs_blink
def test_letters_agree_with_blinks_authors():
    picked = agreed = named = agreed_named = 0
    for path in BLINK_FILES:
        records = annotations.read_records(path)
        for thing, record in zip(annotations.read_blink(records).items, records):
            theirs = record["prediction"][1] if record["prediction"][1] in thing.options else ""
            ours = parsers.parse_choice_letter(record["full_prediction"], thing.options)
            picked, agreed = picked + bool(ours), agreed + (ours != "" and ours == theirs)
            if ours or parsers.find_option_letters(record["full_prediction"], thing.options):
                named, agreed_named = named + 1, agreed_named + (ours == theirs)
    assert picked > 8400 and agreed / picked >= 0.99  # where the text settles on an option
    assert named > 8700 and agreed_named / named >= 0.98  # wherever an option is mentioned at all


@needs_blink
def test_blinks_published_scores():
    """The authors' own letters through this scoring give the authors' figures."""
    published = {"GPT4V": 51.14, "MiniGPT-4-v2": 34.23, "llava_v1.5_7b": 37.13, "cogvlm-chat": 41.54, "flamingov2": 39.18}
    for path in BLINK_FILES:
        records = annotations.read_records(path)
        lines = [{"id": r["idx"], "response": r["prediction"]} for r in records]
        got = summarize(score_predictions(annotations.read_blink(records), lines, path.name))["avg"]["accuracy"]
        assert got == pytest.approx(published[path.stem.removeprefix("val_")], abs=0.3)
