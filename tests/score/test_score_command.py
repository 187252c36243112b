"""`mig-kit score`: the files it reads and writes, and its sentences about bad ones."""

import json
import subprocess
import sys

import pytest
from mig_bench_records import REPLIES, mig_records, prediction_lines, run_score, write_lines
from PIL import Image

START = """
import importlib, pkgutil, sys, time
from mig_kit.commands.main import cli
cli(["score", "--help"], standalone_mode=False)
seconds = time.process_time()
from mig_kit import score
for module in pkgutil.iter_modules(score.__path__):
    importlib.import_module(f"mig_kit.score.{module.name}")
print(seconds, *{"torch", "transformers"} & set(sys.modules))
"""


def test_scoring_starts_at_once_and_loads_no_torch():
    result = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    seconds, *loaded = result.stdout.splitlines()[-1].split()
    assert "--box-order" in result.stdout and not loaded, result.stderr
    assert float(seconds) < 1, "processor time, start of Python included"


@pytest.fixture
def files(tmp_path):
    """Annotations and two models' predictions as files."""
    (tmp_path / "mig.json").write_text(json.dumps(mig_records()))
    for name, replies in (("a", REPLIES), ("b", ["none"] * 6)):
        write_lines(tmp_path / f"{name}.jsonl", prediction_lines(replies))
    return tmp_path


@pytest.mark.parametrize("words,sentence", [
    (("--json", "a.jsonl"), "is given twice"),
    (("--json", "new.json", "--items", "new.json"), "is given twice"),
    (("--json", "p/new.json", "--predictions", "p"), "lies in a folder that is read")])
def test_no_file_that_was_given_is_overwritten(files, words, sentence):
    (files / "p").mkdir()
    (files / "p" / "a.jsonl").write_text((files / "a.jsonl").read_text())
    before = {path: path.read_bytes() for path in files.rglob("*.json*")}
    words = [word if word.startswith("--") else str(files / word) for word in words]
    result = run_score(files, "mig-bench", *words)
    assert result.exit_code and sentence in str(result.exception)
    assert {path: path.read_bytes() for path in files.rglob("*.json*")} == before


def test_letters_by_the_kits_rule_are_called_so(files):
    record = {"task": "t", "options": "A: cat B: dog", "output": "A", "question": "q"}
    output = run_score(files, "mmiu", records=[record], replies=["**A**"]).output
    assert "protocol official (letters by the kit's own rule), 1 items." in output
    assert 'count an empty choice as correct and leave out "GPT error".' in output
    assert "unread" not in output
    output = run_score(files, "mmiu", records=[record] * 2, replies=["**A**", "Hm."]).output
    assert "1 of 2 replies unread (50.0 %): 50.0, at most 100.0 with a judge (--judge" in output
    assert "| task | n | unread | accuracy |" in output and "| t | 2 | 1 | 50.00 |" in output


def test_items_say_what_became_of_each_question(files):
    """A reply that reads well, one without a box; the second model's are the other way round."""
    (files / "two.json").write_text(json.dumps(mig_records()[:1] * 2))
    replies = ["<answer>image 2: [100, 100, 500, 500]</answer>",
               "<answer>Image C: [1, 2, 3, 4]</answer>"]
    for name, texts in (("a", replies), ("b", replies[::-1])):
        write_lines(files / f"{name}.jsonl", prediction_lines(texts))
    words = ("mig_bench", "--compare", str(files / "b.jsonl"), "--items")
    assert not run_score(files, *words, str(files / "i.jsonl"), "--protocol", "strict",
                         annotations="two.json").exception
    read, unread = map(json.loads, (files / "i.jsonl").read_text().splitlines())
    assert read == {"index": 0, "id": "", "task": "common_object", "value": 1.0, "image": 2,
                    "box": [100, 100, 500, 500], "rule": "a statement", "problem": "",
                    "other": 0.0, "result": "win"}
    assert (unread["box"], unread["problem"], unread["result"]) == (None, "unread", "loss")


@pytest.mark.parametrize("numbers, words, sentences", [
    ((64, 48, 1100, 144), (), {
        "strict": "is 1100; 3 of 3 boxes leave their image, read as 0 to 1000",
        "official": "is 1100; 3 of 3 boxes leave their image, read as 0 to 1000"}),
    ((64, 48, 639, 481), ("--coordinates", "pixels"), {
        "strict": "is 639; 3 of 3 boxes", "official": "is 1002; 3 of 3 boxes"}),
    ((0.1, 0.2, 0.3, 1), ("--coordinates", "normalized_1"), {
        "strict": "is 1; 0 of 3 boxes", "official": "is 1000; 0 of 3 boxes"})])
def test_how_far_the_boxes_that_were_read_reach_is_said(files, numbers, words, sentences):
    """By the authors' rule in its 0 to 1000."""
    record = mig_records()[4] | {"answer": [.1, .6, .3, .9]}
    for name in record["images"]:
        Image.new("RGB", (640, 480)).save(files / name)
    for protocol, opening in (("strict", "<think>[0, 0, 9000, 9]</think>"), ("official", "")):
        output = run_score(files, "mig_bench", "--protocol", protocol, "--images", str(files),
                           *words, records=[record] * 3,
                           replies=[f"{opening}<answer>{list(numbers)}</answer>"] * 3).output
        assert f"The largest number of the boxes {sentences[protocol]}" in output, output


@pytest.mark.parametrize("words,changes,sentence", [
    (("mig",), {}, "the benchmarks are"),
    (("mig_bench", "--protocol", "substring"), {}, "its protocols are"),
    (("mig_bench", "--coordinates", "absolute"), {}, "pass --images"),
    (("mc_bench", "--coordinates", "absolute"), {}, "is for boxes in replies"),
    (("blink", "--box-order", "yxyx"), {}, "--box-order is for boxes in replies"),
    (("blink", "--judge", "http://x/v1"), {}, "--judge-model NAME belong together"),
    (("mig_bench", "--protocol", "strict", "--calibrate"), {}, "--calibrate is for mig_bench, "),
    (("mig_bench",), {"predictions": "none.jsonl"}, "no file"),
    (("mig_bench",), {"annotations": "a.jsonl"}, "is this the MIG-Bench file"),
    (("blink",), {}, "is this the BLINK file"), (("mc_bench",), {}, "COCO-style"),
    (("mig_bench", "--json", "no/such/folder.json"), {}, "cannot be written")])
def test_bad_input_is_one_sentence(files, words, changes, sentence):
    result = run_score(files, *words, **changes)
    assert isinstance(result.exception, (ValueError, FileNotFoundError))
    assert sentence in str(result.exception)


def test_one_reply_of_200_is_no_complete_result(files):
    records = [{"image_path": "a.png", "instruction": "", "boxes": [[0, 0, 9, 9]]}] * 200
    Image.new("RGB", (10, 10)).save(files / "a.png")
    words = ("lisa", "--images", str(files), "--json", str(files / "out.json"))
    result = run_score(files, *words, "--allow-missing", records=records,
                       replies=["(0,0),(900,900)"])
    assert "Replies are missing: do not set these numbers beside" in result.output
    assert json.loads((files / "out.json").read_text())["complete"] is False
    assert "UniVG" not in result.output, "published averages are of all items"
    result = run_score(files, *words, records=records, replies=["(0,0),(900,900)"] * 200)
    assert "UniVG" in result.output and "coordinates" not in result.output


def test_the_order_of_the_numbers_is_the_users_to_say(files):
    """A file in which Gemini writes y first, and of its rival x first."""
    reply = '<answer>{{"image": 1, "box_2d": {}}}</answer>'.format
    record = mig_records()[4] | {"answer": [.1, .6, .3, .9]}
    write_lines(files / "x_first.jsonl", prediction_lines([reply([100, 600, 300, 900])] * 2))
    result = run_score(files, "mig_bench", "--box-order", "yxyx", "--compare",
                       str(files / "x_first.jsonl"), "--compare-box-order", "xyxy",
                       records=[record] * 2, replies=[reply([600, 100, 900, 300])] * 2)
    assert "| avg | 2 | 100.00 |" in result.output and "+0.00 points" in result.output
    assert "rewritten as x1, y1, x2, y2" in result.output


def test_what_the_unread_replies_of_both_could_change_is_said(files):
    """Two of four unread on one side, one on the other: no order of the two is certain."""
    records = [{"idx": f"val_T_{n}", "task": "T", "answer": answer}
               for n, answer in enumerate(("(A)", "(A)", "(A)", "(B)"))]
    write_lines(files / "b.jsonl", prediction_lines(["(A)", "(A)", "(A)", "Hm."]))
    output = run_score(files, "blink", "--compare", str(files / "b.jsonl"), "--no-blind",
                       records=records, replies=["(A)", "(B)", "Hm.", "Hm."]).output
    assert "accuracy, replies.jsonl minus b.jsonl: 25.00 - 75.00 = -50.00 points" in output
    assert ("accuracy, replies.jsonl minus b.jsonl: between -75.00 and +0.00 points, whatever the "
            "unread replies say (2 and 1).") in output


def test_empty_replies_alone_are_no_score(files):
    result = run_score(files, "mig_bench", records=mig_records()[:2], replies=[" ", ""])
    assert "replies.jsonl: all replies are empty, which is no score" in str(result.exception)
    assert not run_score(files, "mig_bench", records=mig_records()[:2],
                         replies=["", REPLIES[0]]).exception
