"""Replies of real models to the revised MIG-Bench, item by item as their authors' script judged
them, and small replies that were once read wrongly.
"""

import functools
import re

import pytest
from mig_bench_records import DATA, needs_data

from mig_kit.boxes import BoxFormat
from mig_kit.score import annotations, protocols
from mig_kit.score.records import read_records
from mig_kit.score.result import headline_average

pytestmark = needs_data
FOLDER = DATA / "mig_bench"


@functools.cache
def read_benchmark():
    return annotations.read_mig_bench(read_records(FOLDER / "revised_MIG_bench.json"))


def score_replies(records):
    return protocols.score_predictions(read_benchmark(), records, "P", BoxFormat())


def test_every_reply_of_qwen2_vl_has_the_iou_of_the_authors_script():
    assert read_benchmark().version == "revised" and read_benchmark().complete
    records = read_records(FOLDER / "revised_replies_qwen2_vl.jsonl")
    scored = score_replies(records)
    assert scored.values == pytest.approx([record["iou"] for record in records], abs=1e-12)
    assert round(100 * headline_average(scored), 2) == 30.02


def test_migicians_replies_score_less_than_after_its_scripts_scaling():
    records = read_records(FOLDER / "revised_replies_migician.jsonl")
    assert round(100 * headline_average(score_replies(records)), 2) == 55.34

    def scale(match):
        x1, y1, x2, y2 = map(int, match.groups())
        y1, y2 = (min(round(1000 * y), 999) for y in (y1 / 1000 * 1.05, y2 / 1000 * 1.10))
        return f"({x1},{y1}),({x2},{y2})"

    scaled = score_replies([{**record, "response": re.sub(
        r"\((\d+),(\d+)\),\((\d+),(\d+)\)", scale, record["response"])} for record in records])
    assert scaled.values == pytest.approx([record["iou"] for record in records], abs=0.01)
    assert round(100 * headline_average(scaled), 2) == 63.37


@pytest.mark.parametrize("name,benchmark", [
    ("letterA", "mmiu"), ("words", "mmiu"), ("ownline", "blink")])
def test_replies_that_were_once_read_wrongly(name, benchmark):
    files = [str(DATA / "cases" / f"{name}_{part}") for part in ("ann.json", "pred.jsonl")]
    _, scored = protocols.score_files(benchmark, *files, BoxFormat())
    assert headline_average(scored) == 1
