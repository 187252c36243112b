"""What 01 asks about, and all notebooks with own data, a teacher at an endpoint and a benchmark."""

import json
import re
from collections import Counter

import numpy as np
import own_questions
import pytest
from command_line import notebooks_in_this_process, output_of
from teacher_server import TeacherServer, completion, question_text

from mig_kit.sample import read_samples
from mig_kit.stages import sources
from mig_kit.world import suites
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.tasks import TASKS

SMALL = {"cot_per_task": 6, "free_form_per_task": 2, "rl_per_task": 4, "rl_free_form_per_task": 2,
         "rl_boxes_per_task": 2, "val_per_task": 2}


@pytest.fixture
def params(stage_params):
    return lambda **changes: stage_params("01_synthesize", **{**SMALL, **changes})


@pytest.fixture
def own_file(tmp_path):
    return own_questions.write_questions(tmp_path / "q", 60)


def count_samples(sets):
    return sum(map(len, sets.values()))


def test_drawn_sets_hold_what_their_parameters_say(params, tmp_path):
    p = params(rl_per_task=1, rl_boxes_per_task=5)
    sets, text = sources.load_training_sets(p, tmp_path)
    mix = list(suites.iter_training_mix("cot", p.cot_per_task, p.free_form_per_task, p.seed))
    assert text == "" and [s.id for s in sets["cot"]] == [sample.id for sample in mix]
    assert len(sets["val"]) == 10 * p.val_per_task and sets["rl"][0].split == "rl"
    counts = Counter(sample.task for sample in sets["rl"])
    assert counts == {**dict.fromkeys(TASKS, 1), **dict.fromkeys(FREE_FORM, 2),
                      **dict.fromkeys(BOX_FORMS, 5)}


def test_own_data_is_divided_by_image(params, own_file, tmp_path):
    p = params(data=str(own_file), data_shares=[0.5, 0.3, 0.2])
    sets, text = sources.load_training_sets(p, tmp_path / "out")
    assert text.startswith("60 questions, 0 of them left out: ")
    assert re.search(r"\n46 questions to train, 14 held out, which tell a score to about 26 points "
                     r"either way: hold out more of a small set .*\n0 of the 45 "
                     "held-out images are also in training", text)
    assert count_samples(sets) == 60 and 20 < len(sets["cot"]) < 40
    firsts = [{sample.images.encoded[0].sha256 for sample in sets[name]}
              for name in sources.SET_NAMES]
    assert not firsts[0] & firsts[1] and not firsts[1] & firsts[2]


def test_own_replies_teach_and_questions_without_one_go_to_rl(params, tmp_path):
    path = own_questions.write_questions(tmp_path / "q", 40, replies=0.5)
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    p = params(data=str(path), teacher="own", data_shares=[0.6, 0.2, 0.2])
    sets, text = sources.load_training_sets(p, tmp_path / "out")
    assert all("reply" in rows[sample.id] for sample in sets["cot"]) and len(sets["cot"]) > 4
    assert sum("reply" not in rows[sample.id] for sample in sets["rl"]) > 10
    assert count_samples(sets) == 40
    assert f"{len(sets['val'])} held out, " in text and "\n0 of the" in text
    choices = [sample for part in sets.values() for sample in part if sample.options]
    assert choices and all(rows[sample.id]["letter"] == sample.letter for sample in choices)


def test_turned_photos_are_stored_as_they_are_and_read_upright(params, tmp_path):
    path = own_questions.write_questions(tmp_path / "q", 20)
    drawn = own_questions.draw_questions(20)
    p = params(data=str(path), teacher="none", data_shares=[0.0, 0.5, 0.5])
    sets, _ = sources.load_training_sets(p, tmp_path / "out")
    samples = {sample.id: sample for part in sets.values() for sample in part}
    for number, original in enumerate(drawn, 1):
        sample = samples[f"q{number}"]
        assert sample.sizes == original.sizes == [image.size for image in sample.images]
        for image, box in sample.targets:
            assert box == pytest.approx(original.targets[0].box, abs=1e-3)
            error = np.abs(np.subtract(np.array(sample.images[image - 1], dtype=int),
                                       np.array(original.images[image - 1], dtype=int)))
            assert error.mean() < 8, "the same picture, but for JPEG"


def test_images_that_are_in_training_too_are_counted(params, own_file, tmp_path):
    rows = list(map(json.loads, own_file.read_text().splitlines()))
    for row in rows:
        row["images"].append("0001_1.jpg")
    own_file.write_text("\n".join(map(json.dumps, rows)))
    p = params(data=str(own_file), teacher="none")
    _, text = sources.load_training_sets(p, tmp_path / "out")
    assert "\n1 of the" in text


def test_a_set_that_stays_empty_is_one_sentence(params, own_file, tmp_path):
    p = params(data=str(own_file), data_shares=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="no question fell to rl and val"):
        sources.load_training_sets(p, tmp_path / "out")


@pytest.mark.slow
def test_an_endpoint_writes_traces_for_own_data(own_file, tmp_path):
    """The teacher concludes up front in every fifth reply, else answers as it should."""
    def plan(nth, body):
        answer = question_text(body).split("the verified answer is ")[1].rstrip(".")
        first_sentence = "Both images show things."
        if server.total % 5 == 0:
            first_sentence = "The answer is in image 1."
        reply = f"<think>{first_sentence} One fits.</think><answer>{answer}</answer>"
        return 200, completion(reply)

    server = TeacherServer(plan)
    runs = tmp_path / "runs"
    environment = {"MIG_KIT_RUNS": str(runs), "MIG_KIT_API_KEY": "sk-very-secret"}
    options = ("--profile", "smoke", "--run-id", "t")
    overrides = ("-p", "teacher", "endpoint", "-p", "endpoint_url", server.url,
                 "-p", "endpoint_model", "m", "-p", "data", str(own_file))
    with notebooks_in_this_process():
        output_of("run", "01", *options, *overrides, **environment)
    metrics = json.loads((runs / "t/01_synthesize/metrics.json").read_text())
    traces, teacher = metrics["traces"], metrics["teacher"]
    assert server.total == teacher["calls"] == traces["total"]
    assert traces["kept"] == metrics["sizes"]["cot"] > 0 and traces["dropped"]["up front"] > 0
    kept = read_samples(runs / "t/01_synthesize/cot.parquet")
    assert kept[0].suite == "own" and kept[0].images.encoded[0].content.is_file()
    files = [path for path in runs.rglob("*") if path.is_file()]
    assert not any(b"very-secret" in path.read_bytes() for path in files)
