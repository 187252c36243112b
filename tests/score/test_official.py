"""The authors' rules by hand and on the official files."""

import functools
import re

import numpy as np
import pytest
from mig_bench_records import DATA, needs_data, prediction_lines, save_image, score_predictions

from mig_kit.boxes import BoxFormat
from mig_kit.score import annotations, official, protocols
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import read_records
from mig_kit.score.result import summarize


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
    ("(0.1,0.2),(0.3,0.4)", (0.1, 0.2, 0.3, 0.4)),
    ("(0.1, 0.2, 0.3, 0.4)", (0.1, 0.2, 0.3, 0.4)),
    ("<box>10 20 30 40</box>", (0.01, 0.02, 0.03, 0.04)),
    ("(0.1, 0.2),(0.3,0.4)", None),
    ("[-1, 2, 3, 4]", None),
    ("[1.0, 2, 3, 4]", None),
    ("", None)])
def test_mig_bench_boxes(text, box):
    assert official.parse_mig_bench_box(text) == (pytest.approx(box) if box else None)


def test_revised_boxes_must_be_whole_numbers():
    box = official.parse_revised_mig_bench_box("(1,20),(300,400) (5,6),(7,8)")
    assert box == (1, 20, 300, 400)
    assert official.parse_revised_mig_bench_box("[0.1, 0.2, 0.3, 0.4]") is None
    assert official.parse_normalized_pair("( 10 , 20 ) , (30,40)") == (0.01, 0.02, 0.03, 0.04)
    assert official.parse_normalized_pair("[1,2,3,4]") is None


@pytest.mark.parametrize("answer,box,expected", [
    ((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5), 1 / 3),
    ((0, 0, 0.5, 0.5), (0.5, 0, 0.75, 0.5), 0),  # touching
    ((0, 0, 0.5, 0.5), (0.5, 0.5, 0, 0), 0),  # inverted, not repaired
    ((0.2, 0.4, 0.4, 0.2), (0.2, 0.4, 0.4, 0.2), 0),  # an inverted answer does not match itself
    ((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1), 0),  # the script would divide by zero
    ((0, 0, 0.5, 0.5), official.parse_mig_bench_box(f"(0,0),({'9' * 400},0)"), 0)])
def test_the_scripts_iou_by_hand(answer, box, expected):
    assert official.script_iou(answer, box) == pytest.approx(expected)


@needs_data
def test_official_answers_score_themselves():
    benchmark = read_benchmark("mig_bench", read_records(DATA / "mig_bench" / "MIG_data.json"))
    assert (benchmark.version, benchmark.complete) == ("original", True)
    assert len(benchmark.items) == 4295
    assert sum(item.target is None for item in benchmark.items) == 528
    answers = [f"[{', '.join(map(str, item.box))}]" for item in benchmark.items]
    scored = score_predictions(benchmark, prediction_lines(answers))
    below = {item.index for item, value in zip(benchmark.items, scored.values) if value < 0.999}
    # A lone 1.0 is read as 0.001.
    with_one = {item.index for item in benchmark.items if max(item.box) >= 1}
    assert below == {7, 105, 126, 163, 512} | with_one


# Replies of real models to the revised MIG-Bench, as their authors' script judged each item.

REVISED = DATA / "mig_bench"


@functools.cache
def read_revised():
    return read_benchmark("mig_bench", read_records(REVISED / "revised_MIG_bench.json"))


def average(scored):
    return round(summarize(scored)["avg"]["acc@0.5"], 2)


@needs_data
def test_every_reply_of_qwen2_vl_has_the_iou_of_the_authors_script():
    assert read_revised().version == "revised" and read_revised().complete
    records = read_records(REVISED / "revised_replies_qwen2_vl.jsonl")
    scored = score_predictions(read_revised(), records)
    assert scored.values == pytest.approx([record["iou"] for record in records], abs=1e-12)
    assert average(scored) == 30.02


@needs_data
def test_migicians_replies_score_less_than_after_its_scripts_scaling():
    records = read_records(REVISED / "revised_replies_migician.jsonl")
    assert average(score_predictions(read_revised(), records)) == 55.34

    def scale(match):
        x1, y1, x2, y2 = map(int, match.groups())
        y1, y2 = (min(round(1000 * y), 999) for y in (y1 / 1000 * 1.05, y2 / 1000 * 1.10))
        return f"({x1},{y1}),({x2},{y2})"

    scaled = score_predictions(read_revised(), [{**record, "response": re.sub(
        r"\((\d+),(\d+)\),\((\d+),(\d+)\)", scale, record["response"])} for record in records])
    assert scaled.values == pytest.approx([record["iou"] for record in records], abs=0.01)
    assert average(scaled) == 63.37


@needs_data
@pytest.mark.parametrize("name,benchmark", [
    ("letterA", "mmiu"), ("words", "mmiu"), ("ownline", "blink")])
def test_replies_that_were_once_read_wrongly(name, benchmark):
    files = [str(DATA / "cases" / f"{name}_{part}") for part in ("ann.json", "pred.jsonl")]
    _, scored = protocols.score_files(benchmark, *files, BoxFormat())
    assert all(value or problem == "unread"
               for value, problem, _ in (verdict for _, verdict in scored.judged))


# LISA and ReVOS.

def test_lisa_by_hand(tmp_path):
    save_image(tmp_path / "a.jpg", (200, 100))
    record = {"image_path": "a.jpg", "instruction": "the cat",
              "boxes": [[20, 20, 60, 40], [0, 0, 9, 9]]}
    benchmark = read_benchmark("lisa", [record] * 2)
    lines = prediction_lines(["<answer>(100,200),(300,400)</answer> (0,0),(1,1)",
                              "[100,200,300,400]"])
    scored = score_predictions(benchmark, lines, images=str(tmp_path))
    assert scored.values.tolist() == [pytest.approx(0.04 / (0.04 + 1e-6), abs=1e-12), 0]
    pixels = prediction_lines(["<answer>[20,20,60,40]</answer>"] * 2)
    # Nothing is converted, so that no images are needed.
    assert score_predictions(benchmark, pixels, "strict", "pixels").values.tolist() == [1, 1]


def test_revos_answers_in_the_third_frame(tmp_path):
    for number in (1, 2, 10, 3):
        save_image(tmp_path / "v1" / f"{number}.jpg", (number * 100, 100))
    boxes = [[0, 0, 1, 1], [0, 0, 1, 1], [100.9, 20, 500, 60]]
    benchmark = read_benchmark("revos", [
        {"video_id": "v1", "frames": [0, 1, 3], "question": "q", "bbox_list": boxes}])
    # The files are sorted 1, 2, 3, 10: by number, not by name.
    assert annotations.resolve_image_path(tmp_path, "v1#3").name == "10.jpg"
    lines = prediction_lines(["(100,200),(500,600)"])
    scored = score_predictions(benchmark, lines, images=str(tmp_path))
    assert scored.values[0] == pytest.approx(1, abs=1e-4)


def test_an_item_without_a_box_counts_0_as_in_the_authors_scripts(tmp_path):
    save_image(tmp_path / "a.jpg", (100, 100))
    records = [{"image_path": "a.jpg", "instruction": "", "boxes": boxes}
               for boxes in ([[10, 10, 50, 50]], [], [None])]
    lines = prediction_lines(["<answer>(100,100),(500,500)</answer>"] * 3)
    for protocol in ("official", "strict"):
        scored = score_predictions(read_benchmark("lisa", records), lines, protocol,
                                   images=str(tmp_path))
        assert scored.values.tolist() == [pytest.approx(1, abs=1e-5), 0, 0]
        assert scored.problems == {official.NO_BOX_ANNOTATED: 2}
    video = {"video_id": "v", "frames": [0, 1, 2], "question": ""}
    for boxes in ([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]] * 2 + [None]):
        assert read_benchmark("revos", [video | {"bbox_list": boxes}]).items[0].box is None


# Ref-L4.

def test_ref_l4_by_hand():
    boxes = {"a": [0, 0, 100, 100], "b": [0, 0, 200, 200], "c": [10, 10, 300, 300]}
    benchmark = read_benchmark("ref_l4", [{"id": name, "bbox": box} for name, box in boxes.items()])
    lines = [{"id": "a", "pred_bbox": [0, 0, 100, 50], "format": "xyxy"},
             {"id": "b", "pred_bbox": [0, 0, 200, 160], "format": "xywh"},
             {"id": "c", "pred_bbox": [10, 10, 300, 300], "format": "xywh"}]
    result = summarize(score_predictions(benchmark, lines))
    average = result["avg"]
    assert list(result["tasks"]) == ["small", "medium", "large"]
    assert average["acc@0.5"] == pytest.approx(200 / 3, abs=1e-9)  # IoU 0.5 is not over 0.5
    assert [average["acc@0.75"], average["acc@0.9"]] == pytest.approx([200 / 3, 100 / 3], abs=1e-9)
    assert average["mean_iou"] == pytest.approx(230 / 3, abs=1e-5)  # in single precision
    # 0.8 passes 0.5 to 0.75, and is not over 0.8 in single precision.
    assert result["tasks"]["medium"]["macc"] == 60
    assert "class_macc" not in average, "the annotations name no classes"


def test_ref_l4_class_averages():
    """The unweighted mean over classes; COCO's cars (3) count as Objects365's (6)."""
    halves = [("o365_6", 1.0), ("refcoco_3", 0.8), ("refcoco_99", 0.6), ("o365_1", 0.3)]
    records = [{"id": str(number), "bbox": [0, 0, 100, 100], "ori_category_id": category}
               for number, (category, _) in enumerate(halves)]
    lines = [{"id": str(number), "pred_bbox": [0, 0, 100, 100 * share - 0.01], "format": "xyxy"}
             for number, (_, share) in enumerate(halves)]
    average = summarize(score_predictions(read_benchmark("ref_l4", records), lines))["avg"]
    assert average["class_acc@0.5"] == pytest.approx(200 / 3, abs=1e-9)
    shares = []
    for threshold in np.arange(0.5, 1, 0.05) + 1e-6:
        correct = {share: float(share - 1e-4 > threshold) for _, share in halves}
        shares.append(((correct[1.0] + correct[0.8]) / 2 + correct[0.6] + correct[0.3]) / 3)
    assert average["class_macc"] == pytest.approx(100 * np.mean(shares), abs=1e-9)
