"""Predictions against annotations by the protocols, by hand."""

import numpy as np
import pytest
from mig_bench_records import REPLIES, prediction_lines

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.score import annotations, result

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


@pytest.mark.parametrize("benchmark,complete,sentence", [
    ("mmiu", None, "(its paper counts 11,698)"), ("revos", None, "not known to be all items"),
    ("mmiu", True, "")])
def test_completeness_is_said(benchmark, complete, sentence):
    notes = result.table_notes(RESULT | {"benchmark": benchmark, "complete": complete}, ())
    assert sentence in " ".join(notes)
    assert bool(sentence) == any("items of" in note for note in notes)


def test_published_rows_average_to_their_headline():
    for row in (row for rows in result.read_published().values() for row in rows):
        if row["tasks"]:
            assert set(row["tasks"]) == set(annotations.MIG_BENCH_TASKS)
            assert np.mean(list(row["tasks"].values())) == pytest.approx(row["avg"], abs=0.06)


def test_rows_of_unknown_version_stand_below_and_none_beside_strict():
    def table(benchmark, version, protocol="official"):
        return result.score_markdown(RESULT | {
            "benchmark": benchmark, "version": version, "protocol": protocol})

    head, notes = table("mig_bench", "revised").split("\n\n")
    assert "41.91" in head and "76.71" in head and "| 50.12 |" in head
    assert "20.10" not in head and "32.90" not in head and "63.82" not in head + notes
    for figure in ("Qwen2.5-VL-7B 20.10", "Qwen3-VL-8B 32.90", "Qwen3.5-9B 41.17"):
        assert f"Not in the table: {figure}" in notes
    for benchmark, version, figure in (("mig_bench", "original", "38.88"), ("lisa", "val", "64.29"),
                                       ("lisa", "test", "60.10"), ("revos", "", "61.32")):
        assert figure in table(benchmark, version)
    strict = table("mig_bench", "revised", "strict")
    assert "76.71" not in strict and "20.10" not in strict and "none stands beside" in strict
    assert "54.15" not in table("odinw", "").split("\n\n")[0]
