"""Six items of MIG-Bench, replies to them, and images; and where the real files are."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from mig_kit.boxes import BoxFormat
from mig_kit.commands.main import cli
from mig_kit.common import PROJECT_ROOT
from mig_kit.score import protocols

DATA = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data"))
MIG_FILE = DATA / "mig_bench" / "MIG_data.json"
BLINK_FILES = sorted((DATA / "blink").glob("val_*.jsonl"))
needs_data = pytest.mark.skipif(
    not MIG_FILE.is_file() or not BLINK_FILES,
    reason="no mig_bench/ and blink/ in the folder that MIG_KIT_DATA names")

PUBLISHED_ACCURACY = {"GPT4V": 51.14, "MiniGPT-4-v2": 34.23, "llava_v1.5_7b": 37.13,
                      "cogvlm-chat": 41.54, "flamingov2": 39.18}  # of BLINK

# IoU 1 and 0.5; 0.5; 0.8; 0.25 and 0.
REPLIES = ["(100,100),(500,500)", "(200,200),(600,400)", "(0,0),(500,250)", "(500,500),(1000,900)",
           "(0,0),(1000,250)", "(400,100),(800,900)"]


def _record(task, question, answer, info="", images=3):
    return {"task": task, "question": question, "answer": answer, "additional_info": info,
            "images": [f"{k}.png" for k in range(images)]}


def mig_records():
    """Six items in four tasks; the last answer is inverted."""
    return [
        _record("common_object", "Locate it in the 2th image. ", [0.1, 0.1, 0.5, 0.5]),
        _record("common_object", "Locate it in the 3th image. ", [0.2, 0.2, 0.6, 0.6]),
        _record("group_grounding", "Find the truck.", [0.0, 0.0, 0.5, 0.5],
                "It is in the first image. "),
        _record("diff", "Compare.", [0.5, 0.5, 1.0, 1.0], images=2),
        _record("region", "Locate it.", [0.0, 0.0, 1.0, 1.0]),
        _record("region", "Locate it.", [0.4, 0.9, 0.8, 0.1])]


def prediction_lines(responses):
    return [{"index": index, "response": response} for index, response in enumerate(responses)]


def score_predictions(benchmark, predictions, *rules, source="P", **settings):
    """Scores with the default limits of a processor, which only absolute coordinates need."""
    return protocols.score_predictions(benchmark, predictions, source, BoxFormat(), *rules,
                                       **settings)


def save_image(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run_score(folder, benchmark, *words, annotations="mig.json", predictions="a.jsonl",
              records=None, replies=None):
    """The result of `mig-kit score`; records, replies: what the two files hold instead."""
    if records is not None:
        annotations = "records.json"
        (folder / annotations).write_text(json.dumps(records))
    if replies is not None:
        predictions = "replies.jsonl"
        write_lines(folder / predictions, prediction_lines(replies))
    paths = ["--annotations", folder / annotations, "--predictions", folder / predictions]
    return CliRunner().invoke(cli, ["score", benchmark, *map(str, [*paths, *words])])
