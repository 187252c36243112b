"""Scores by hand, against an independent statement of the official rules, and on the official files
where they are.
"""

import os
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from mig_bench_oracle import oracle_boxes, oracle_iou, varied_responses
from mig_bench_records import REPLIES, mig_records, prediction_lines
from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates, smart_resize
from mig_kit.common import PROJECT_ROOT
from mig_kit.scoring import annotations, leaderboard, parsers, record_files, score
from mig_kit.scoring.result import paired_difference, summarize

DATA = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data"))
MIG_FILE = DATA / "mig_bench" / "MIG_data.json"
BLINK_FILES = sorted((DATA / "blink").glob("val_*.jsonl"))
BLINK_ACCURACY = {"GPT4V": 51.14, "MiniGPT-4-v2": 34.23, "llava_v1.5_7b": 37.13,
                  "cogvlm-chat": 41.54, "flamingov2": 39.18}
needs_mig = pytest.mark.skipif(
    not MIG_FILE.is_file(),
    reason="no mig_bench/MIG_data.json in the folder that MIG_KIT_DATA names")
needs_blink = pytest.mark.skipif(
    not BLINK_FILES, reason="no blink/val_*.jsonl in the folder that MIG_KIT_DATA names")
BOX_FORMAT = BoxFormat()
THOUSAND = Coordinates.NORMALIZED_1000


def score_predictions(benchmark, predictions, source="P", *rules, **settings):
    """Scores with the default limits of a processor, which only absolute coordinates need."""
    return score.score_predictions(benchmark, predictions, source, BOX_FORMAT, *rules, **settings)


# Official IoU.

def test_official_mig_bench_equals_the_oracle():
    overlapping = several = 0
    for answer, response in varied_responses(6000):
        expected = float(oracle_iou(answer, response))
        value = score.mig_bench_iou(answer, parsers.parse_mig_bench_box(response))
        assert value == pytest.approx(expected, abs=1e-9), response
        overlapping += expected > 0
        several += len(oracle_boxes(response)) > 1
    assert overlapping > 2000 and several > 500  # the comparison has substance


@pytest.mark.parametrize("answer,box,expected", [
    ((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5), 1 / 3),
    ((0, 0, 0.5, 0.5), (0.5, 0, 0.75, 0.5), 0),  # touching
    ((0, 0, 0.5, 0.5), (0.5, 0.5, 0, 0), 0),  # inverted, not repaired
    ((0.2, 0.4, 0.4, 0.2), (0.2, 0.4, 0.4, 0.2), 0),  # an inverted answer does not match itself
    ((0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.1), 0),  # the script would divide by zero
    ((0, 0, 0.5, 0.5), parsers.parse_mig_bench_box(f"(0,0),({'9' * 400},0)"), 0)])
def test_official_iou_by_hand(answer, box, expected):
    assert score.mig_bench_iou(answer, box) == pytest.approx(expected)


def test_univg_iou_by_hand():
    value = score.univg_iou((0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5))
    assert value == pytest.approx(0.125 / (0.375 + 1e-6), abs=1e-12)


# Strict IoU.

def make_item(**changes):
    fields = {"index": 0, "id": "", "task": "common_object", "question": "",
              "images": ("a", "b", "c"), "box": (0.1, 0.2, 0.3, 0.4), "target": 2}
    return annotations.BenchmarkItem(**fields | changes)


def test_strict_wants_the_correct_image_and_coordinates():
    item = make_item()
    correct = '<answer>{"image": 2, "box": [100, 200, 300, 400]}</answer>'
    assert score.strict_iou(item, correct, THOUSAND, BOX_FORMAT) == (pytest.approx(1), "")
    first = correct.replace('"image": 2', '"image": 1')
    assert score.strict_iou(item, first, THOUSAND, BOX_FORMAT) == (0, "wrong image")
    in_unit = score.strict_iou(item, correct, Coordinates.NORMALIZED_1, BOX_FORMAT)
    assert in_unit == (0, "outside the image")
    silent = "<answer>[100, 200, 300, 400]</answer>"
    assert score.strict_iou(item, silent, THOUSAND, BOX_FORMAT)[0] == pytest.approx(1)
    unstated = make_item(image_stated=False)
    assert score.strict_iou(unstated, silent, THOUSAND, BOX_FORMAT) == (0, "no image named")
    static = make_item(task="diff", target=None, images=("a", "b"))
    assert score.strict_iou(static, correct, THOUSAND, BOX_FORMAT)[0] == pytest.approx(1)
    third = correct.replace('"image": 2', '"image": 3')
    assert score.strict_iou(static, third, THOUSAND, BOX_FORMAT) == (0, "wrong image")


def test_strict_converts_absolute_coordinates_and_pixels():
    item = make_item(size=(1000, 500))
    width, height = smart_resize(1000, 500)
    box = [0.1 * width, 0.2 * height, 0.3 * width, 0.4 * height]
    absolute = f"<answer>[{', '.join(f'{v:.4f}' for v in box)}]</answer>"
    value, _ = score.strict_iou(item, absolute, Coordinates.ABSOLUTE, BOX_FORMAT)
    assert value == pytest.approx(1, abs=1e-3)
    pixels = "<answer>[100, 100, 300, 200]</answer>"
    value, _ = score.strict_iou(item, pixels, Coordinates.PIXELS, BOX_FORMAT)
    assert value == pytest.approx(1)


# Multiple choice.

def test_multiple_choice_protocols():
    records = [{"idx": f"val_T_{i}", "task": "T", "answer": answer}
               for i, answer in enumerate(["(A)", "(B)", "(B)", "(A)"])]
    benchmark = annotations.read_blink(records)
    responses = ["(A)", "<answer>(B)</answer>", "Not (B) but (A), so I choose (A).", "(B)"]
    lines = [{"id": f"val_T_{i}", "response": text} for i, text in enumerate(responses)]
    values = {protocol: score_predictions(benchmark, lines, "P", protocol).values.tolist()
              for protocol in score.PROTOCOLS["blink"]}
    # "(B)" alone counts under `substring`, a quirk.
    assert values == {"official": [1, 1, 1, 0], "strict": [0, 1, 0, 0], "substring": [1, 1, 1, 0]}


def test_mmiu_letters_and_left_out_items():
    benchmark = annotations.read_mmiu([
        {"task": "t", "options": "A: the U.S. B: two C: three", "output": "C"},
        {"task": "t", "output": None},
        {"task": "u", "options": "A: 1\nB: 2", "output": "B."}])
    items = [(item.index, item.letter, item.options) for item in benchmark.items]
    assert items == [(0, "C", "ABC"), (2, "B", "AB")]
    lines = [{"index": 0, "response": "C"}, {"index": 2, "response": "A"}]
    scored = score_predictions(benchmark, lines)
    assert summarize(scored)["avg"]["accuracy"] == 50 and scored.indices == (0, 2)


# MIG-Bench.

@pytest.fixture
def benchmark():
    return annotations.read_mig_bench(mig_records())


def test_mig_bench_summary_by_hand(benchmark):
    assert (benchmark.version, benchmark.complete) == ("original", False)
    assert [item.target for item in benchmark.items] == [2, 3, 1, None, 1, 1]
    assert not benchmark.items[2].image_stated
    result = summarize(score_predictions(benchmark, prediction_lines(REPLIES)))
    tasks = result["tasks"]
    assert list(tasks) == ["common_object", "group_grounding", "diff", "region"]
    assert [values["acc@0.5"] for values in tasks.values()] == [100, 100, 100, 0]
    assert [values["mean_iou"] for values in tasks.values()] == [75, 50, 80, 12.5]
    assert result["avg"]["acc@0.5"] == 75 and result["avg"]["acc@0.7"] == 37.5
    assert result["avg"]["mean_iou"] == pytest.approx(54.375, abs=1e-12)
    assert result["notes"]["no box can match"] == ["5"]
    low, high = result["avg"]["ci95"]
    assert low < 75 < high <= 100 and result["lists"] == 2
    assert set(tasks["diff"]) == {"n", "lists", "acc@0.3", "acc@0.5", "acc@0.7", "mean_iou", "ci95"}


def test_the_revised_version_is_told_by_its_answers():
    records = [{**record, "answer": [round(1000 * v) for v in record["answer"]]}
               for record in mig_records()]
    benchmark = annotations.read_mig_bench(records)
    assert benchmark.version == "revised" and benchmark.items[0].coordinates == THOUSAND
    official = score_predictions(benchmark, prediction_lines(REPLIES))
    assert official.values.tolist() == pytest.approx([1, 0.5, 0.5, 0.8, 0.25, 0])
    wrapped = prediction_lines([f"<answer>{text}</answer>" for text in REPLIES])
    strict = score_predictions(benchmark, wrapped, "P", "strict")
    # The reply to the group item names no image.
    assert strict.values.tolist() == pytest.approx([1, 0.5, 0, 0.8, 0.25, 0])


def test_paired_difference(benchmark):
    first, second = (score_predictions(benchmark, prediction_lines(replies))
                     for replies in (REPLIES, ["nothing"] * 6))
    gap = paired_difference(first, second)
    assert gap["acc@0.5"]["value"] == 75
    assert gap["mean_iou"]["value"] == pytest.approx(54.375, abs=1e-12)
    nothing = paired_difference(first, first)["mean_iou"]
    # Two equal results on a few lists of images do not show that all others are equal.
    assert nothing["value"] == 0 and nothing["ci95"][0] == -nothing["ci95"][1] < 0


# Predictions and the items they name.

LINES = prediction_lines(REPLIES)


@pytest.mark.parametrize("lines,sentence", [
    (LINES[:-2], "missing: 2 (4, 5)"),
    (LINES + LINES[:1], "given more than once: 1 (0)"),
    ([*LINES, {"index": 99, "response": ""}], "unknown to the annotations: 1 (99)"),
    ([{"response": ""}], 'no "index" or "id"'),
    ([{"index": True, "response": ""}], 'no "index" or "id"'),
    ([{"index": 0, "answer": ""}], 'no "response"'),
    ([{"index": 0, "response": 3}], '"response" of prediction 1'),
    ([{**line, "index": line["index"] + 0.5} for line in LINES], 'no "index" or "id"')])
def test_predictions_must_fit(benchmark, lines, sentence):
    with pytest.raises(ValueError) as error:
        score_predictions(benchmark, lines, "P.jsonl")
    assert sentence in str(error.value) and "P.jsonl" in str(error.value)


def test_ids_count_only_where_there_are_any(benchmark):
    lines = [{**line, "id": len(LINES) - line["index"]} for line in LINES]
    plain = score_predictions(benchmark, LINES)
    assert (score_predictions(benchmark, lines).values == plain.values).all()


def test_a_line_that_names_two_items_is_refused():
    records = [{"idx": f"val_{i}", "sub_task": "T", "answer": "(A)"} for i in range(2)]
    benchmark = annotations.read_blink(records)
    crossed = [{"index": 0, "id": "val_1", "response": "A"},
               {"index": 1, "id": "val_0", "response": "A"}]
    with pytest.raises(ValueError, match="which are different items"):
        score_predictions(benchmark, crossed)
    lines = [{"id": None, "index": i, "response": "A"} for i in (1, 0)]
    assert score_predictions(benchmark, lines).values.tolist() == [1, 1]


@pytest.mark.parametrize("kind", [str, float])
def test_an_index_may_be_written_as_text_or_as_a_float(benchmark, kind):
    """As pandas writes a column with gaps."""
    lines = [{**line, "index": kind(line["index"])} for line in LINES]
    plain = score_predictions(benchmark, LINES)
    assert (score_predictions(benchmark, lines).values == plain.values).all()


def test_missing_may_be_counted_wrong(benchmark):
    scored = score_predictions(benchmark, LINES[:1], allow_missing=True)
    assert scored.problems == {"missing": 5}
    assert scored.values.tolist() == pytest.approx([1, 0, 0, 0, 0, 0])


# Benchmarks whose answers are pixels of real images.

def save_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def test_lisa_by_hand(tmp_path):
    save_image(tmp_path / "a.jpg", (200, 100))
    record = {"image_path": "a.jpg", "instruction": "the cat",
              "boxes": [[20, 20, 60, 40], [0, 0, 9, 9]]}
    benchmark = annotations.read_lisa([record] * 2)
    lines = prediction_lines(["<answer>(100,200),(300,400)</answer> (0,0),(1,1)",
                              "[100,200,300,400]"])
    scored = score_predictions(benchmark, lines, images=str(tmp_path))
    assert benchmark.version == "subset"
    assert scored.values.tolist() == [pytest.approx(0.04 / (0.04 + 1e-6), abs=1e-12), 0]
    pixels = prediction_lines(["<answer>[20,20,60,40]</answer>"] * 2)
    # Nothing is converted, so that no images are needed.
    strict = score_predictions(benchmark, pixels, "P", "strict", Coordinates.PIXELS)
    assert strict.values.tolist() == [1, 1]


def test_revos_answers_in_the_third_frame(tmp_path):
    for number in (1, 2, 10, 3):
        save_image(tmp_path / "v1" / f"{number}.jpg", (number * 100, 100))
    boxes = [[0, 0, 1, 1], [0, 0, 1, 1], [100.9, 20, 500, 60]]
    benchmark = annotations.read_revos([
        {"video_id": "v1", "frames": [0, 1, 3], "question": "q", "bbox_list": boxes}])
    # The files are sorted 1, 2, 3, 10: by number, not by name.
    assert annotations.add_image_sizes(benchmark.items, tmp_path)[0].size == (1000, 100)
    lines = prediction_lines(["(100,200),(500,600)"])
    scored = score_predictions(benchmark, lines, images=str(tmp_path))
    assert scored.values[0] == pytest.approx(1, abs=1e-4)


def test_images_are_confined_and_missing_ones_listed(tmp_path):
    benchmark = annotations.read_lisa([
        {"image_path": f"{k}.jpg", "instruction": "", "boxes": [[0, 0, 1, 1]]} for k in range(5)])
    missing = r"5 images are missing below .* \(first: 0.jpg, 1.jpg, 2.jpg\)"
    with pytest.raises(ValueError, match=missing):
        annotations.add_image_sizes(benchmark.items, tmp_path)
    for name in ("../x.jpg", "/etc/passwd", "../../v#1"):
        with pytest.raises(ValueError, match="below the image root"):
            annotations.resolve_image_path(tmp_path, name)
    (tmp_path / "0.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="no readable images|are missing"):
        annotations.add_image_sizes(benchmark.items[:1], tmp_path)


def test_photos_are_taken_upright_or_refused(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 200)).save(tmp_path / "turned.jpg", exif=exif)
    benchmark = annotations.read_lisa([
        {"image_path": "turned.jpg", "instruction": "", "boxes": [[20, 20, 180, 80]]}])
    lines = prediction_lines(["(100,200),(900,800)"])
    scored = score_predictions(benchmark, lines, images=str(tmp_path))
    assert scored.values[0] == pytest.approx(1, abs=1e-4), "200 wide, as people see it"
    for name, protocol in (("normalized_1000", "official"), ("absolute", "official"),
                           ("absolute", "strict")):
        with pytest.raises(ValueError, match="1 photos have an EXIF orientation .*turned.jpg"):
            score_predictions(benchmark, lines, protocol=protocol, coordinates=Coordinates(name),
                              images=str(tmp_path), orientation="refuse")


def test_ref_l4_by_hand():
    boxes = {"a": [0, 0, 100, 100], "b": [0, 0, 200, 200], "c": [10, 10, 300, 300]}
    benchmark = annotations.read_ref_l4([{"id": name, "bbox": box} for name, box in boxes.items()])
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
    with pytest.raises(ValueError, match="--protocol strict"):
        score_predictions(benchmark, prediction_lines(["(1,2),(3,4)"] * 3))


def test_a_part_of_mmiu_without_answers_is_one_sentence():
    with pytest.raises(ValueError, match="no item of the MMIU annotations has an output"):
        annotations.read_mmiu([{"task": "order", "question": "Which?", "options": "A: one"}])


def test_ref_l4_class_averages():
    """The unweighted mean over classes; COCO's cars (3) count as Objects365's (6)."""
    halves = [("o365_6", 1.0), ("refcoco_3", 0.8), ("refcoco_99", 0.6), ("o365_1", 0.3)]
    records = [{"id": str(number), "bbox": [0, 0, 100, 100], "ori_category_id": category}
               for number, (category, _) in enumerate(halves)]
    lines = [{"id": str(number), "pred_bbox": [0, 0, 100, 100 * share - 0.01], "format": "xyxy"}
             for number, (_, share) in enumerate(halves)]
    average = summarize(score_predictions(annotations.read_ref_l4(records), lines))["avg"]
    assert average["class_acc@0.5"] == pytest.approx(200 / 3, abs=1e-9)
    shares = []
    for threshold in np.arange(0.5, 1, 0.05) + 1e-6:
        correct = {share: float(share - 1e-4 > threshold) for _, share in halves}
        shares.append(((correct[1.0] + correct[0.8]) / 2 + correct[0.6] + correct[0.3]) / 3)
    assert average["class_macc"] == pytest.approx(100 * np.mean(shares), abs=1e-9)


@pytest.mark.parametrize("count,version", [(7231, "val"), (38110, "test"), (45341, "all"),
                                           (7230, "subset")])
def test_ref_l4s_splits_are_complete(count, version):
    benchmark = annotations.read_ref_l4([{"id": str(number), "bbox": [0, 0, 9, 9]}
                                         for number in range(count)])
    assert (benchmark.version, benchmark.complete) == (version, version != "subset")


def test_an_item_without_a_box_counts_0_as_in_the_authors_scripts(tmp_path):
    save_image(tmp_path / "a.jpg", (100, 100))
    records = [{"image_path": "a.jpg", "instruction": "", "boxes": boxes}
               for boxes in ([[10, 10, 50, 50]], [], [None])]
    benchmark = annotations.read_lisa(records)
    lines = prediction_lines(["<answer>(100,100),(500,500)</answer>"] * 3)
    for protocol in ("official", "strict"):
        scored = score_predictions(benchmark, lines, "P", protocol, images=str(tmp_path))
        assert scored.values.tolist() == [pytest.approx(1, abs=1e-5), 0, 0]
        assert scored.problems == {score.NO_BOX_ANNOTATED: 2}
    video = {"video_id": "v", "frames": [0, 1, 2], "question": ""}
    for boxes in ([[0, 0, 1, 1]] * 2, [[0, 0, 1, 1]] * 2 + [None]):
        assert annotations.read_revos([video | {"bbox_list": boxes}]).items[0].box is None


def test_lisa_to_the_last_digit(tmp_path):
    """An independent statement of the authors' rule, in exact fractions."""
    save_image(tmp_path / "a.jpg", (640, 480))
    draw, records, replies, expected = random.Random(0), [], [], []
    for _ in range(200):
        x, y = draw.randint(0, 300), draw.randint(0, 200)
        box = [x, y, x + draw.randint(1, 300), y + draw.randint(1, 250)]
        read = [round(v / side * 1000) + draw.randint(-20, 20)
                for v, side in zip(box, (640, 480) * 2)]
        read = [abs(v) for v in read]
        records.append({"image_path": "a.jpg", "instruction": "", "boxes": [box]})
        replies.append(f"so ( {read[0]},{read[1]} ) ,({read[2]}, {read[3]}), not (1,2),(3,4)")
        truth = [Fraction(v, side) for v, side in zip(box, (640, 480) * 2)]
        answer = [Fraction(v, 1000) for v in read]
        sides = [max(Fraction(0), min(truth[k + 2], answer[k + 2]) - max(truth[k], answer[k]))
                 for k in (0, 1)]
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (truth, answer)]
        overlap = sides[0] * sides[1]
        expected.append(float(overlap / (sum(areas) - overlap + Fraction(1, 10 ** 6))))
    scored = score_predictions(annotations.read_lisa(records), prediction_lines(replies),
                               images=str(tmp_path))
    assert scored.values.tolist() == pytest.approx(expected, abs=1e-9)
    summary = summarize(scored)["avg"]
    assert summary["mean_iou"] == pytest.approx(100 * np.mean(expected), abs=1e-9)
    hits = np.mean(np.array(expected) >= 0.5)
    assert 0.2 < hits < 1 and summary["acc@0.5"] == pytest.approx(100 * hits, abs=1e-9)


def test_mmius_items_without_an_answer_are_left_out_with_their_predictions():
    records = [{"task": "a", "output": letter, "options": "A: x B: y"}
               for letter in ("A", None, "B")]
    benchmark = annotations.read_mmiu(records)
    scored = score_predictions(benchmark, prediction_lines(["A", "A", "B"]))
    assert scored.values.tolist() == [1, 1] and scored.indices == (0, 2)
    with pytest.raises(ValueError, match="unknown to the annotations: 1 .3."):
        score_predictions(benchmark, prediction_lines(["A", "A", "B", "A"]))
    for lines in (
            [{"index": float(place), "response": "A"} for place in range(3)],
            [{"id": place, "response": "A"} for place in range(3)],
            [{"index": place, "prediction": "A"} for place in range(3)],
            [{"index": None, "id": place, "response": "A"} for place in range(3)],
            [{"index": float("nan"), "id": place, "response": "A"} for place in range(3)],
            [{"index": f"{place}.0", "prediction": "A"} for place in range(3)],
            [{"idx": place, "full_prediction": "A"} for place in range(3)],
            [{"index": place + 1, "prediction": "A"} for place in range(3)],
            [{"index": place + 1, "prediction": "A"} for place in (0, 2)],
            [{"index": place, "prediction": "A"} for place in (0, 2)],
            [{"doc_id": place, "resps": [["A"]]} for place in range(3)]):
        assert score_predictions(benchmark, lines).values.tolist() == [1, 0], lines


def test_boxes_in_0_to_1_get_a_hint_under_strict():
    lines = prediction_lines(["<answer>image 2: [0.1, 0.2, 0.3, 0.4]</answer>"] * 6)
    benchmark = annotations.read_mig_bench(mig_records())
    scored = score_predictions(benchmark, lines, protocol="strict")
    assert score.WITHIN_ONE in scored.problems
    result = {"benchmark": "mig_bench", "version": "", "protocol": "strict", "complete": True,
              "n": 6, "lists": 6, "problems": scored.problems, "notes": {}, "remarks": []}
    assert "--coordinates normalized_1" in " ".join(leaderboard.table_notes(result, ()))
    result["problems"] = {score.WITHIN_ONE: 6, "missing": 90}
    partial = leaderboard.table_notes(result | {"n": 96}, ())
    assert "--coordinates normalized_1" in " ".join(partial), "six of six replies"
    result["problems"] = {score.WITHIN_ONE: 1}
    few = leaderboard.table_notes(result | {"n": 60}, ())
    assert "--coordinates" not in " ".join(few), "one reply in sixty says nothing about the others"
    outside = prediction_lines(["<answer>image 2: [-9, -9, -2, -1]</answer>"] * 6)
    assert score.WITHIN_ONE not in score_predictions(benchmark, outside,
                                                     protocol="strict").problems
    right = score_predictions(benchmark, lines, protocol="strict",
                              coordinates=Coordinates.NORMALIZED_1)
    assert score.WITHIN_ONE not in right.problems


def test_pixel_annotations_that_leave_the_image_are_listed(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    boxes = ([0, 0, 100.4, 50], [0, 0, 5000, 50], [-3, 0, 10, 10])
    benchmark = annotations.read_lisa([{"image_path": "a.png", "instruction": "", "boxes": [box]}
                                       for box in boxes])
    scored = score_predictions(benchmark, prediction_lines([""] * 3), images=str(tmp_path))
    assert scored.notes["answer leaves the image"] == ["1", "2"]
    Image.new("I;16", (100, 50)).save(tmp_path / "a.png")  # its size is all that is read of it
    deep = score_predictions(benchmark, prediction_lines([""] * 3), images=str(tmp_path))
    assert deep.notes == scored.notes
    with pytest.raises(ValueError, match="must be a list of boxes"):
        annotations.read_lisa([{"image_path": "a.png", "instruction": "", "boxes": [0, 0, 5, 5]}])


def test_mmius_lower_case_letters_match():
    records = [{"task": f"task {number}", "output": letter, "options": "A: x B: y"}
               for number, letter in enumerate("aB" * 30)]
    benchmark = annotations.read_mmiu(records)
    lines = prediction_lines(["A", "B"] * 30)
    for protocol in ("official", "substring"):
        values = score_predictions(benchmark, lines, "P", protocol).values
        # Migician's rule looks for the answer as it is written.
        assert values.mean() == (1 if protocol == "official" else 0.5)


def test_a_count_that_no_paper_gives_is_neither_complete_nor_incomplete():
    records = [{"task": f"task {number % 60}", "output": "A"} for number in range(11698)]
    of_mmiu = [annotations.read_mmiu(part).complete
               for part in (records, records[1:], records[:59])]
    assert of_mmiu == [True, None, False]

    def sentence(benchmark, complete):
        notes = leaderboard.table_notes({
            "benchmark": benchmark, "version": "", "protocol": "official", "complete": complete,
            "n": 10, "lists": 10, "problems": {}, "notes": {}, "remarks": []}, ())
        return " ".join(note for note in notes if "items of" in note or "every item" in note)

    assert "its paper counts 11,698" in sentence("mmiu", None)
    assert "no number is published" in sentence("revos", None)
    assert "do not hold every item" in sentence("mmiu", False)
    assert sentence("mmiu", True) == ""


def test_parquet_annotations(tmp_path):
    import pyarrow
    import pyarrow.parquet

    record = {"id": "a", "bbox": [0.0, 0.0, 10.0, 10.0], "width": 20, "height": 20}
    table = pyarrow.Table.from_pylist([record])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    benchmark = annotations.read_ref_l4(record_files.read_records(tmp_path / "a.parquet"))
    lines = [{"id": "a", "response": "<answer>(0,0),(500,500)</answer>"}]
    assert score_predictions(benchmark, lines, "P", "strict").values[0] == pytest.approx(1)


# Published numbers and the official files.

def test_published_rows_average_to_their_headline():
    for row in (row for rows in leaderboard.PUBLISHED.values() for row in rows):
        if row.tasks:
            assert set(row.tasks) == set(annotations.MIG_BENCH_TASKS)
            assert np.mean(list(row.tasks.values())) == pytest.approx(row.avg, abs=0.06)


def test_rows_of_unknown_version_stand_below_and_none_beside_strict():
    def table(benchmark, version, protocol):
        average = {"acc": 50.123456, "ci95": [40, 60]}
        return leaderboard.score_markdown({
            "benchmark": benchmark, "version": version, "protocol": protocol, "complete": True,
            "n": 10, "lists": 10, "tasks": {}, "avg": average, "problems": {}, "notes": {},
            "remarks": []})

    revised = table("mig_bench", "revised", "official")
    head, notes = revised.split("\n\n")
    assert "41.91" in head and "76.71" in head and "| 50.12 |" in head
    assert "20.10" not in head and "32.90" not in head
    for figure in ("Qwen2.5-VL-7B 20.10", "Qwen3-VL-8B 32.90", "Qwen3.5-9B 41.17"):
        assert f"Not in the table: {figure}" in notes
    assert "63.82" not in revised and "38.88" in table("mig_bench", "original", "official")
    assert "64.29" in table("lisa", "val", "official")
    assert "60.10" in table("lisa", "test", "official")
    assert "61.32" in table("revos", "", "official")
    strict = table("mig_bench", "revised", "strict")
    assert "76.71" not in strict and "20.10" not in strict and "none stands beside" in strict
    assert "54.15" not in table("odinw", "", "official").split("\n\n")[0]


@needs_mig
def test_the_official_annotations():
    benchmark = annotations.read_mig_bench(record_files.read_records(MIG_FILE))
    assert (benchmark.version, benchmark.complete) == ("original", True)
    assert len(benchmark.items) == 4295
    notes = score.annotation_problems(benchmark, is_strict=True)
    assert notes["no box can match"] == ["7", "105", "126", "163", "512"]
    assert notes["answer leaves the image"] == ["34", "703"]
    assert notes["given twice"] == ["2092 = 2094", "2093 = 2095"]
    assert len(notes["target image unknown, not checked"]) == 528


@needs_mig
def test_official_answers_score_themselves_and_varied_ones_as_the_oracle():
    benchmark = annotations.read_mig_bench(record_files.read_records(MIG_FILE))
    answers = [f"[{', '.join(map(str, item.box))}]" for item in benchmark.items]
    scored = score_predictions(benchmark, prediction_lines(answers))
    below = {item.index for item, value in zip(benchmark.items, scored.values) if value < 0.999}
    # A lone 1.0 is read as 0.001.
    with_one = {item.index for item in benchmark.items if max(item.box) >= 1}
    assert below == {7, 105, 126, 163, 512} | with_one
    responses = [text for _, text in varied_responses(len(benchmark.items), seed=1)]
    values = score_predictions(benchmark, prediction_lines(responses)).values
    for item, response, value in zip(benchmark.items, responses, values):
        assert value == pytest.approx(float(oracle_iou(item.box, response)), abs=1e-9)


@needs_blink
@pytest.mark.parametrize("path", BLINK_FILES, ids=lambda path: path.stem)
def test_blinks_published_scores(path):
    """The authors' own letters through this scoring give the authors' figures."""
    records = record_files.read_records(path)
    lines = [{"id": record["idx"], "response": record["prediction"]} for record in records]
    result = summarize(score_predictions(annotations.read_blink(records), lines, path.name))
    published = BLINK_ACCURACY[path.stem.removeprefix("val_")]
    assert result["avg"]["accuracy"] == pytest.approx(published, abs=0.3)
