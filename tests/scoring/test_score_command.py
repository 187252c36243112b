"""`mig-kit score`: the files it reads and writes, and its sentences about bad ones."""

import json

import pytest
from click.testing import CliRunner
from mig_bench_records import REPLIES, mig_records, prediction_lines

from mig_kit.cli import cli


@pytest.fixture
def files(tmp_path):
    """Annotations and two models' predictions as files."""
    (tmp_path / "mig.json").write_text(json.dumps(mig_records()))
    for name, replies in (("a", REPLIES), ("b", ["none"] * 6)):
        lines = [json.dumps(line) + "\n" for line in prediction_lines(replies)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    return tmp_path


def run_score(folder, *words, annotations="mig.json", predictions="a.jsonl"):
    paths = ["--annotations", str(folder / annotations), "--predictions", str(folder / predictions)]
    return CliRunner().invoke(cli, ["score", *words, *paths])


@pytest.mark.parametrize("words", [
    ("--json", "a.jsonl"), ("--items", "mig.json"), ("--json", "x.json", "--items", "x.json")])
def test_no_file_that_was_given_is_overwritten(files, words):
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    words = [word if word.startswith("--") else str(files / word) for word in words]
    result = run_score(files, "mig-bench", *words)
    assert result.exit_code and "is given twice" in str(result.exception)
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before


def test_a_folder_of_predictions_gets_no_result(files):
    (files / "p").mkdir()
    (files / "a.jsonl").rename(files / "p" / "a.jsonl")
    for name in ("a.jsonl", "new.json"):
        result = run_score(files, "mig-bench", "--json", str(files / "p" / name), predictions="p")
        assert "lies in a folder that is read" in str(result.exception)
    assert [path.name for path in (files / "p").iterdir()] == ["a.jsonl"]


def test_what_the_compared_file_lacks_is_said(files):
    (files / "part.jsonl").write_text(json.dumps(prediction_lines(REPLIES)[0]) + "\n")
    part = run_score(files, "mig-bench", "--compare", str(files / "part.jsonl"), "--allow-missing")
    assert "Replies of part.jsonl, missing: 5." in part.output
    alone = run_score(files, "mig-bench", "--compare-coordinates", "pixels")
    assert "add that, or leave it out" in str(alone.exception)


def test_command_writes_the_result(files):
    result = run_score(files, "mig-bench", "--compare", str(files / "b.jsonl"),
                       "--json", str(files / "out.json"), "--items", str(files / "items.jsonl"))
    assert result.exit_code == 0, result.output
    written = json.loads((files / "out.json").read_text())
    assert {"benchmark", "version", "protocol", "n", "tasks", "avg"} <= set(written)
    assert written["n"] == 6
    assert written["compare"]["difference"]["acc@0.5"]["value"] == 75
    assert "| avg | 6 | 75.00 |" in result.output
    assert "63.82" not in result.output, "published averages are of all items"
    assert "do not hold every item" in result.output
    lines = (files / "items.jsonl").read_text().splitlines()
    values = [json.loads(line)["value"] for line in lines]
    assert values == pytest.approx([1, 0.5, 0.5, 0.8, 0.25, 0])


@pytest.mark.parametrize("words,changes,sentence", [
    (("mig",), {}, "the benchmarks are"),
    (("mig_bench", "--protocol", "substring"), {}, "its protocols are"),
    (("mig_bench", "--coordinates", "cm"), {}, "the coordinates are"),
    (("mig_bench", "--coordinates", "absolute"), {}, "pass --images"),
    (("mc_bench", "--coordinates", "absolute"), {}, "is for boxes in replies"),
    (("mig_bench",), {"predictions": "none.jsonl"}, "no file"),
    (("mig_bench",), {"predictions": "cut.jsonl"}, "line 2 of"),
    (("mig_bench",), {"predictions": "list.json"}, "entry 1 of"),
    (("mig_bench",), {"predictions": "empty.jsonl"}, "is empty"),
    (("mig_bench",), {"predictions": "bytes.jsonl"}, "UTF-8"),
    (("mig_bench",), {"annotations": "a.jsonl"}, "is this the MIG-Bench file"),
    (("lisa",), {}, "is this the LISA-grounding file"),
    (("blink",), {}, "is this the BLINK file"),
    (("mc_bench",), {}, "COCO-style"),
    (("odinw",), {}, "COCO-style"),
    (("odinw", "--items", "items.jsonl"), {}, "leave --items out"),
    (("mig_bench", "--protocol", "strict", "--coordinates", "pixels"), {}, "--images"),
    (("mig_bench", "--json", "no/such/folder.json"), {}, "cannot be written")])
def test_bad_input_is_one_sentence(files, words, changes, sentence):
    (files / "cut.jsonl").write_text('{"index": 0, "response": ""}\n{"index": 1, "resp')
    (files / "list.json").write_text("[1, 2]")
    (files / "empty.jsonl").write_text("\n")
    (files / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    result = run_score(files, *words, **changes)
    assert isinstance(result.exception, (ValueError, FileNotFoundError))
    assert sentence in str(result.exception)


@pytest.mark.parametrize("word,coordinates", [
    ("thousand", "normalized_1000"), ("unit", "normalized_1"), ("pixels", "pixels"),
    ("resized", "absolute"), ("cm", "normalized_1000 | normalized_1 | pixels | absolute")])
def test_the_former_option_names_the_new_one(files, word, coordinates):
    result = run_score(files, "mig_bench", "--frame", word)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == f"--frame {word} is now --coordinates {coordinates}"
