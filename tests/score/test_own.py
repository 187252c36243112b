"""`mig-kit score own`: any system's replies to one's own questions, and replies in any text."""

import dataclasses

import pandas
import pytest
from mig_bench_records import run_score, write_lines
from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.data import own_data
from mig_kit.prompts import format_answer, parse_reply, read_reply
from mig_kit.rewards import is_correct
from mig_kit.score import own, reply_boxes
from mig_kit.world.suites import make_suite
from mig_kit.world.tasks import make_sample

SIZES = {"a.png": (200, 100), "b.png": (400, 300)}
LINES = [
    {"images": ["a.png", "b.png"], "question": "Find the cup.", "image": 2,
     "box": [40, 30, 200, 150], "coordinates": "pixels", "id": "cup"},
    {"images": ["a.png"], "question": "Find a dog.", "image": 1, "task": "dogs",
     "boxes": [[0, 0, 500, 500], [500, 500, 1000, 1000]], "coordinates": "normalized_1000"},
    {"images": ["b.png"], "question": "Which?", "options": ["a cat", "a dog"], "letter": "B"}]
# in 0 to 1000
BOX = '{"image": 2, "box": [100,100,500,500]}'
REPLIES = [f"<think>t</think><answer>{answer}</answer>" for answer in (
    BOX, BOX.replace("2", "1"), "B", "none",
    f'{{"image": 1, "box": [0,0,500,500]}}, {BOX}')]
REPLIES += ["In image 2, at [100, 100, 500, 500].", "[500, 500, 1000, 1000]", "None.", "", "A dog.",
            "Image 1: [0,0,500,500]. Image 2: [100,100,500,500].", "Image 1: [0,0,500,500]."]


def read_freely(reply, sample):
    return own.read_freely(reply, sample.options, len(sample.images))


@pytest.fixture
def folder(tmp_path):
    for name, size in SIZES.items():
        Image.new("RGB", size).save(tmp_path / name)
    return tmp_path


# as pandas and datasets write rows of several kinds
COLUMNS = dict.fromkeys(("image", "box", "boxes", "options", "letter", "coordinates",
                         "id", "task"))
PANDAS = [COLUMNS | line | ({"image": 2.0} if line.get("id") else {}) for line in LINES]


@pytest.mark.parametrize("lines", [LINES, PANDAS], ids=["json", "pandas"])
def test_every_reply_is_judged_as_by_eval(folder, lines):
    write_lines(folder / "mine.jsonl", lines)
    samples = list(own_data.iter_samples(folder / "mine.jsonl", folder))
    box_format = BoxFormat(coordinates="normalized_1000")
    for item, sample in zip(own.read_own(lines).items, samples, strict=True):
        assert item.id == sample.id and item.task == sample.task
        for reply in REPLIES:
            for protocol, text in (("strict", reply),
                                   ("free_text", read_freely(reply, sample))):
                verdict = own.judge_own(item, reply, protocol, Coordinates.NORMALIZED_1000,
                                        box_format, SIZES)
                answer = read_reply(text, sample, box_format)
                assert verdict.value == is_correct(answer, sample), reply


@pytest.mark.parametrize("protocol", ["strict", "free_text"])
@pytest.mark.parametrize("box, problem", [
    ([500, 100, 100, 500], reply_boxes.NOT_A_BOX), ([100, 500, 500, 500], reply_boxes.NOT_A_BOX),
    ([0.1, 0.1, 0.5, 0.5], reply_boxes.WITHIN_ONE), ([600, 600, 900, 900], "")])
def test_numbers_that_are_no_box_are_called_so(box, problem, protocol):
    reply = f'<think>t</think><answer>{{"image": 2, "box": {box}}}</answer>'
    verdict = own.judge_own(own.read_own(LINES).items[0], reply, protocol,
                            Coordinates.NORMALIZED_1000, BoxFormat(), SIZES)
    assert (verdict.value, verdict.problem) == (0, problem)


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.parquet"])
def test_own_data_is_an_annotation_file(folder, name):
    """In every form that `mig-kit data check` takes."""
    lines = [{**line, "reference": None} for line in LINES]
    if name == "mine.parquet":
        pandas.DataFrame(lines).to_parquet(folder / name)
    else:
        write_lines(folder / name, lines)
    files = {"annotations": name, "predictions": "p.jsonl"}
    write_lines(folder / "p.jsonl", [
        {"index": 0, "response": "In image 2: [40, 30, 200, 150]"},
        {"id": "line-2", "response": "[100, 50, 200, 100]"}, {"index": 2, "response": "B"}])
    result = run_score(folder, "own", "--coordinates", "pixels", "--images", folder, **files)
    assert "| avg | 3 | 100.00 |" in result.output and "| dogs | 1 | 100.00 |" in result.output
    assert "own, version as given, protocol free_text, 3 items." in result.output
    strict = run_score(folder, "own", "--images", folder, "--protocol", "strict", **files)
    assert "3 of 3 replies unread (100.0 %): 0.0, at most 100.0." in strict.output
    assert "pass --images FOLDER" in str(run_score(folder, "own", **files).exception)
    files["annotations"] = "wrong.jsonl"
    for wrong, part in (({**LINES[1], "imag": 1}, "line 2: 'imag': Extra inputs are not permitted"),
                        ([], "line 2: the line is no JSON object")):
        write_lines(folder / "wrong.jsonl", [LINES[0], wrong])
        assert part in str(run_score(folder, "own", **files).exception)


def test_text_without_the_answer_format_is_read():
    single = make_sample("refer_grounding", "val", 0)
    one_image = dataclasses.replace(single, images=single.images[:1])
    choice = make_suite("blink", "val", 1)[0]
    reply = "It is in the second image: [10, 20, 30, 40]."
    answer = parse_reply(read_freely(reply, single))
    assert (answer.image, answer.box) == (2, (10, 20, 30, 40))
    for unclear in (  # no box may get lost: the other one could then be the answer
            "At [10, 20, 30, 40].", "None but the second.", "<answer>none</answer>",
            "In image 1: [1, 2, 30, 40]\nIn image 2: [5, 6, 70, 80]",
            '[{"bbox_2d": [1, 2, 30, 40], "image": 1}, '
            '{"bbox_2d": [5, 6, 7, 8], "image": [1, 2]}]'):
        assert read_freely(unclear, single) == unclear
    answer = parse_reply(read_freely("[1, 2, 30.5, 40]", one_image))
    assert (answer.image, answer.box) == (1, (1, 2, 30.5, 40))
    assert read_freely("The answer is (A).", choice).endswith("<answer>A</answer>")
    well_formed = f"<think>x</think><answer>{format_answer(1, (1, 2, 3, 4))}</answer>"
    assert read_freely(well_formed, single) == well_formed
