"""Predictions against annotations by the protocols, by hand."""

import numpy as np
import pytest
from mig_bench_records import REPLIES, mig_records, prediction_lines, score_predictions

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.score import annotations, protocols, score_table
from mig_kit.score.benchmarks import BENCHMARKS, read_benchmark
from mig_kit.score.result import summarize

BOX_FORMAT = BoxFormat()
THOUSAND = Coordinates.NORMALIZED_1000
LINES = prediction_lines(REPLIES)
RESULT = {"benchmark": "mig_bench", "version": "", "protocol": "official", "complete": True,
          "n": 10, "lists": 10, "tasks": {}, "avg": {"acc": 50.123456, "ci95": [40, 60]},
          "problems": {}, "remarks": []}


def make_item(**changes):
    fields = {"index": 0, "id": "", "task": "common_object", "question": "",
              "images": ("a", "b", "c"), "box": (0.1, 0.2, 0.3, 0.4), "target": 2}
    return annotations.BenchmarkItem(**fields | changes)


CORRECT = '<answer>{"image": 2, "box": [100, 200, 300, 400]}</answer>'
SILENT = "<answer>[100, 200, 300, 400]</answer>"


@pytest.mark.parametrize("changes,reply,coordinates,expected", [
    ({}, CORRECT, THOUSAND, (1, "")), ({}, SILENT, THOUSAND, (1, "")),
    ({}, CORRECT.replace("2,", "1,"), THOUSAND, (0, "wrong image")),
    ({}, CORRECT, Coordinates.NORMALIZED_1, (0, "outside the image")),
    ({"image_stated": False}, SILENT, THOUSAND, (0, "no image named")),
    ({"task": "diff", "target": None, "images": ("a", "b")}, CORRECT, THOUSAND, (1, "")),
    ({"task": "diff", "target": None, "images": ("a", "b")}, CORRECT.replace("2,", "3,"), THOUSAND,
     (0, "wrong image")),
    ({"size": (1000, 500)}, "<answer>[100, 100, 300, 200]</answer>", Coordinates.PIXELS, (1, ""))])
def test_strict_wants_the_correct_image_and_coordinates(changes, reply, coordinates, expected):
    value, problem, _ = protocols.strict_iou(make_item(**changes), reply, coordinates, BOX_FORMAT,
                                             {})
    assert (pytest.approx(value), problem) == expected


# Multiple choice.

def test_multiple_choice_protocols():
    records = [{"idx": f"val_T_{i}", "task": "T", "answer": answer}
               for i, answer in enumerate(["(A)", "(B)", "(B)", "(A)"])]
    responses = ["(A)", "<answer>(B)</answer>", "Not (B) but (A), so I choose (A).", "(B)"]
    lines = [{"id": f"val_T_{i}", "response": text} for i, text in enumerate(responses)]
    values = {protocol: score_predictions(read_benchmark("blink", records), lines,
                                          protocol).values.tolist()
              for protocol in BENCHMARKS["blink"].protocols}
    # by BLINK's own rule the "(B)" of the third stands by itself, but a conclusion goes first
    assert values == {"official": [1, 1, 0, 0], "strict": [0, 1, 0, 0]}


def test_mmius_letters_options_and_completeness():
    benchmark = read_benchmark("mmiu", [
        {"task": "t", "options": "A: the U.S. B: two C: three", "output": "c"},
        {"task": "t", "output": None},
        {"task": "u", "options": "A: 1\nB: 2", "output": "B."}])
    items = [(item.index, item.letter, item.options) for item in benchmark.items]
    assert items == [(0, "C", "ABC"), (2, "B", "AB")]
    lines = [{"index": 0, "response": "C"}, {"index": 2, "response": "A"}]
    scored = score_predictions(benchmark, lines)
    assert summarize(scored)["avg"]["accuracy"] == 50
    with pytest.raises(ValueError, match="no item of the MMIU annotations has an output"):
        read_benchmark("mmiu", [{"task": "order", "question": "Which?", "options": "A: one"}])
    records = [{"task": "t", "output": "A"}] * 11698
    assert [read_benchmark("mmiu", part).complete for part in (records, records[1:])] == [
        True, None]


@pytest.mark.parametrize("lines", [
    [{"index": str(place), "response": letter} for place, letter in enumerate("AAB")],
    [{"index": float("nan"), "id": place, "response": "A"} for place in range(3)],
    [{"index": f"{place}.0", "prediction": "A"} for place in range(3)],
    [{"doc_id": place, "resps": [["A"]]} for place in range(3)]])
def test_mmius_items_without_an_answer_are_left_out_with_their_predictions(lines):
    benchmark = read_benchmark("mmiu", [{"task": "a", "output": letter, "options": "A: x B: y"}
                                       for letter in ("A", None, "A")])
    replies = [line.get("response", "A") for line in lines]
    scored = score_predictions(benchmark, lines)
    assert scored.values.tolist() == [1, float(replies[-1] == "A")]
    with pytest.raises(ValueError, match="unknown to the annotations: 1 .3."):
        score_predictions(benchmark, prediction_lines(["A", "A", "B", "A"]))


# MIG-Bench.

@pytest.fixture
def benchmark():
    return read_benchmark("mig_bench", mig_records())


def test_mig_bench_summary_by_hand(benchmark):
    assert (benchmark.version, benchmark.complete) == ("original", False)
    assert [item.target for item in benchmark.items] == [2, 3, 1, None, 1, 1]
    assert not benchmark.items[2].image_stated
    result = summarize(score_predictions(benchmark, LINES))
    tasks = result["tasks"]
    assert list(tasks) == ["common_object", "group_grounding", "diff", "region"]
    assert [values["acc@0.5"] for values in tasks.values()] == [100, 100, 100, 0]
    assert [values["mean_iou"] for values in tasks.values()] == [75, 50, 80, 12.5]
    assert result["avg"]["acc@0.5"] == 75 and result["avg"]["acc@0.7"] == 37.5
    assert result["avg"]["mean_iou"] == pytest.approx(54.375, abs=1e-12)
    low, high = result["avg"]["ci95"]
    assert low < 75 < high <= 100 and result["lists"] == 2
    assert set(tasks["diff"]) == {"n", "lists", "unread", "acc@0.3", "acc@0.5", "acc@0.7",
                                  "mean_iou", "ci95"}


REVISED = [{**record, "answer": [round(1000 * v) for v in record["answer"]]}
           for record in mig_records()]


def test_the_revised_version_is_told_by_its_answers():
    benchmark = read_benchmark("mig_bench", REVISED)
    assert benchmark.version == "revised" and benchmark.items[0].coordinates == THOUSAND
    official = score_predictions(benchmark, LINES)
    assert official.values.tolist() == pytest.approx([1, 0.5, 0.5, 0.8, 0.25, 0])
    wrapped = prediction_lines([f"<answer>{text}</answer>" for text in REPLIES])
    # The reply to the group item names no image.
    assert score_predictions(benchmark, wrapped, "strict").values.tolist() == pytest.approx(
        [1, 0.5, 0, 0.8, 0.25, 0])
    unread = score_predictions(benchmark, LINES, "strict")
    assert summarize(unread)["unread"] == len(LINES)


OPENING = "<think>(1,2),(3,4)</think>"


@pytest.mark.parametrize("records, replies, coordinates, remark", [
    (mig_records(), ["(-0.3,0.1),(0.5,0.5)"] * 6, Coordinates.NORMALIZED_1,
     "In 6 replies edges below 0 were cut to 0."),
    (REVISED, ["[24.0, 93.0, 999.0, 910.0]"] * 4 + ["[\n 4,\n 3,\n 9,\n 9\n]", "-"], THOUSAND,
     "5 replies without a box have one that the authors' rule does not read: it wants whole "
     "numbers without a sign, and no space or line break beside a bracket."),
    (mig_records(), ["(600,600),(200,300)"] * 6, THOUSAND,  # width and height
     "0 of 6 boxes leave their image, 6 have x2 <= x1 or y2 <= y1, read as"),
    (mig_records(), [f"{OPENING}<answer>{REPLIES[0]}</answer>", f"{OPENING}<answer>none</answer>",
                     *(f"{reply} <answer>{reply}</answer>" for reply in REPLIES[2:])], THOUSAND,
     "In 1 replies the official rule read another box than the <answer>.")])
def test_what_the_authors_rule_does_not_read_as_it_was_meant_is_said(records, replies, coordinates,
                                                                     remark):
    scored = score_predictions(read_benchmark("mig_bench", records), prediction_lines(replies),
                               coordinates=coordinates)
    assert sum(remark in sentence for sentence in scored.remarks) == 1


# Predictions and the items they name.

@pytest.mark.parametrize("lines,sentence", [
    (LINES[:-2], "missing: 2 (4, 5)"),
    (LINES + LINES[:1], "given more than once: 1 (0)"),
    ([*LINES, {"index": 99, "response": ""}], "unknown to the annotations: 1 (99)"),
    ([{"response": ""}], 'no "index" or "id"'),
    ([{"index": 0, "answer": ""}], 'no "response"'),
    ([{**line, "index": line["index"] + 0.5} for line in LINES], 'no "index" or "id"')])
def test_predictions_must_fit(benchmark, lines, sentence):
    with pytest.raises(ValueError) as error:
        score_predictions(benchmark, lines, source="P.jsonl")
    assert sentence in str(error.value) and "P.jsonl" in str(error.value)


def test_a_line_that_names_two_items_is_refused():
    records = [{"idx": f"val_{i}", "sub_task": "T", "answer": "(A)"} for i in range(2)]
    benchmark = read_benchmark("blink", records)
    crossed = [{"index": i, "id": f"val_{1 - i}", "response": "A"} for i in range(2)]
    with pytest.raises(ValueError, match="which are different items"):
        score_predictions(benchmark, crossed)
    lines = [{"id": None, "index": i, "response": "A"} for i in (1, 0)]
    assert score_predictions(benchmark, lines).values.tolist() == [1, 1]


# The table.

@pytest.mark.parametrize("benchmark,complete,sentence", [
    ("mmiu", None, "(its paper counts 11,698)"), ("revos", None, "not known to be all items"),
    ("mmiu", True, "")])
def test_completeness_is_said(benchmark, complete, sentence):
    notes = score_table.table_notes(RESULT | {"benchmark": benchmark, "complete": complete}, ())
    assert sentence in " ".join(notes)
    assert bool(sentence) == any("items of" in note for note in notes)


def test_published_rows_average_to_their_headline():
    for row in (row for rows in score_table.read_published().values() for row in rows):
        if row["tasks"]:
            assert set(row["tasks"]) == set(annotations.MIG_BENCH_TASKS)
            assert np.mean(list(row["tasks"].values())) == pytest.approx(row["avg"], abs=0.06)


def test_rows_of_unknown_version_stand_below_and_none_beside_strict():
    def table(benchmark, version, protocol="official"):
        return score_table.score_markdown(RESULT | {
            "benchmark": benchmark, "version": version, "protocol": protocol})

    head, notes = table("mig_bench", "revised").split("\n\n")
    assert "41.91" in head and "76.71" in head and "| 50.12 |" in head
    assert "20.10" not in head and "63.82" not in head + notes
    assert "Not in the table: Qwen2.5-VL-7B 20.10" in notes
    assert "38.88" in table("mig_bench", "original") and "61.32" in table("revos", "")
    strict = table("mig_bench", "revised", "strict")
    assert "76.71" not in strict and "20.10" not in strict and "none stands beside" in strict
