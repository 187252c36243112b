"""`mig-kit score own`: any system's replies to one's own questions."""


import pytest
from click.testing import CliRunner
from mig_bench_records import write_lines
from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.cli import cli
from mig_kit.data import own_data
from mig_kit.score import own
from mig_kit.stages import eval_model, evaluate

SIZES = {"a.png": (200, 100), "b.png": (400, 300)}
LINES = [
    {"images": ["a.png", "b.png"], "question": "Find the cup.", "image": 2,
     "box": [40, 30, 200, 150], "coordinates": "pixels", "id": "cup"},
    {"images": ["a.png"], "question": "Find a dog.", "image": 1, "task": "dogs",
     "boxes": [[0, 0, 500, 500], [500, 500, 1000, 1000]], "coordinates": "normalized_1000"},
    {"images": ["b.png"], "question": "Which?", "options": ["a cat", "a dog"], "letter": "B"}]
ALL = [
    {"images": ["a.png", "b.png"], "question": "Find all.", "coordinates": "pixels", "targets": [
        {"image": 1, "box": [0, 0, 100, 50]}, {"image": 2, "box": [40, 30, 200, 150]}]},
    {"images": ["a.png"], "question": "Find all.", "image": None}]
# in 0 to 1000
REPLIES = [
    '<think>t</think><answer>{"image": 2, "box": [100,100,500,500]}</answer>',
    '<think>t</think><answer>{"image": 1, "box": [100,100,500,500]}</answer>',
    "In image 2, at [100, 100, 500, 500].", "At [100, 100, 500, 500].", "[500, 500, 1000, 1000]",
    '<think>t</think><answer>{"image": 1, "box": [500,500,990,1000]}</answer>', "None.", "",
    "The answer is **B**.", "<think>t</think><answer>B</answer>", "A dog.", "(A)",
    '<think>t</think><answer>{"image": 1, "box": [0,0,500,500]}, {"image": 2, "box": '
    "[100,100,500,500]}</answer>", "Image 1: [0,0,500,500]. Image 2: [100,100,500,500].",
    "Image 1: [0,0,500,500].", '<think>t</think><answer>{"image": 0}</answer>', "There is none."]


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


def run_score(folder, *words):
    return CliRunner().invoke(cli, ["score", "own", "--annotations", str(folder / "mine.jsonl"),
                                    "--predictions", str(folder / "p.jsonl"), *words])


@pytest.mark.parametrize("lines", [LINES, ALL], ids=["one", "all"])
def test_every_reply_is_judged_as_by_eval(folder, lines):
    write_lines(folder / "mine.jsonl", lines)
    samples = list(own_data.iter_samples(folder / "mine.jsonl", folder))
    box_format = BoxFormat(coordinates="normalized_1000")
    verdicts = []
    for item, sample in zip(own.read_own(lines).items, samples, strict=True):
        assert item.id == sample.id and item.task == sample.task
        for reply in REPLIES:
            for protocol, text in (("strict", reply),
                                   ("free_text", eval_model.read_freely(reply, sample))):
                value, _ = own.judge_own(item, reply, protocol, Coordinates.NORMALIZED_1000,
                                         box_format, SIZES)
                verdicts.append(value >= own.THRESHOLD)
                assert verdicts[-1] == evaluate.reply_is_correct(text, sample, box_format), reply
    assert len(set(verdicts)) == 2


def test_own_data_is_an_annotation_file(folder):
    write_lines(folder / "mine.jsonl", LINES)
    write_lines(folder / "p.jsonl", [
        {"index": 0, "response": "In image 2: [40, 30, 200, 150]"},
        {"id": "line-2", "response": "[100, 50, 200, 100]"}, {"index": 2, "response": "B"}])
    result = run_score(folder, "--coordinates", "pixels", "--images", str(folder))
    assert "| avg | 3 | 100.00 |" in result.output and "| dogs | 1 | 100.00 |" in result.output
    assert "own, version as given, protocol free_text, 3 items." in result.output
    strict = run_score(folder, "--images", str(folder), "--protocol", "strict")
    assert "Replies, no box found: 2." in strict.output
    assert "pass --images FOLDER" in str(run_score(folder).exception)


def test_a_wrong_line_of_own_data_is_named(folder):
    write_lines(folder / "mine.jsonl", [LINES[0], {**LINES[1], "imag": 1}])
    write_lines(folder / "p.jsonl", [{"index": 0, "response": ""}])
    sentence = str(run_score(folder).exception)
    assert "line 2: unknown key 'imag'; did you mean 'image'? (mig-kit data check " in sentence
