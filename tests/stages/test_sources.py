"""What 01 asks about, and the notebook with own data and a teacher at an endpoint."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from test_endpoint import Server, completion

from mig_kit.pipeline import store
from mig_kit.pipeline.params import params_file, read_params_file, validate_params
from mig_kit.sample import read_table
from mig_kit.stages import sources
from mig_kit.world import suites
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.suites import make_free_form
from mig_kit.world.tasks import make_sample


def params(**given):
    smoke = read_params_file(params_file("01_synthesize", "smoke"))
    return SimpleNamespace(**validate_params({**smoke, **given}, "01_synthesize"))


@pytest.fixture
def own(tmp_path):
    """Sixty questions of your own, on two images each."""
    rows = []
    for i in range(60):
        sample = make_sample("refer_grounding", "cot", i)
        for k, image in enumerate(sample.images):
            image.save(tmp_path / f"{i}_{k}.png")
        number, box = sample.targets[0]
        rows.append({"images": [f"{i}_{k}.png" for k in range(len(sample.images))], "question": sample.question, "image": number,
                     "box": list(box), "unit": "pixels", "task": "refer_grounding"})
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_drawn_scenes_are_the_sets_they_always_were():
    p = params()
    sets, text = sources.load_training_sets(p)
    assert text == "" and [s.id for s in sets["cot"]] == [
        s.id for s in suites.draw_training_mix("cot", p.cot_per_task, p.free_form_per_task, p.seed)]
    assert len(sets["val"]) == 10 * p.val_per_task and sets["rl"][0].split == "rl"


def test_rl_has_its_own_number_of_general_questions_for_a_box():
    p = params(rl_per_task=1, rl_free_form_per_task=2, rl_boxes_per_task=5)
    found = Counter(s.task for s in sources.load_training_sets(p)[0]["rl"])
    assert {task: found[task] for task in FREE_FORM} == {
        "naming": 2, "showing": 2, "sharing": 2, "choosing": 2, "pointing": 5, "telling": 5, "tallying": 2}
    assert len(found) == 17 and found["diff"] == 1
    assert all(bool(s.targets) == (s.task in BOX_FORMS) for s in make_free_form("rl", 3))


def test_own_data_is_divided_by_image(own):
    keys = {"data": "own", "data_file": str(own), "teacher": "endpoint", "data_shares": [0.5, 0.3, 0.2]}
    sets, text = sources.load_training_sets(params(**keys))
    assert text == "" and sum(map(len, sets.values())) == 60 and 20 < len(sets["cot"]) < 40
    again = sources.split_by_image([s for name in sources.SET_NAMES for s in sets[name]], [0.5, 0.3, 0.2])
    assert [s.id for s in again["val"]] == [s.id for s in sets["val"]]
    assert sum(map(len, sources.load_training_sets(params(**{**keys, "data_limit": 30}))[0].values())) == 30


@pytest.mark.parametrize("given,sentence", [
    ({"data": "web"}, "use scenes, own or mgrounding"), ({"teacher": "gpt"}, "use rules or endpoint"),
    ({"data": "own"}, "reads drawn scenes only"), ({"data": "own", "teacher": "endpoint"}, "name its file"),
    ({"data": "own", "teacher": "endpoint", "data_shares": [1.0, 0.5, 0.0], "data_file": "x"}, "sum to 1"),
    ({"data": "own", "teacher": "endpoint", "data_shares": [1.0, 0.0, 0.0], "data_file": "x"}, "no question fell to rl and val")])
def test_what_cannot_be(own, given, sentence):
    if "data_file" in given:
        given = {**given, "data_file": str(own)}
    with pytest.raises(ValueError, match=sentence):
        sources.load_training_sets(params(**given))
    with pytest.raises(FileNotFoundError, match="is not there"):
        sources.load_training_sets(params(data="own", teacher="endpoint", data_file="none.jsonl"))


def test_a_changed_file_is_another_stage(own, tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    given = vars(params(data="own", data_file=str(own)))
    before = store.stage_key("01_synthesize", "a", given)
    assert before == store.stage_key("01_synthesize", "a", given)
    own.write_text(own.read_text() + "\n")
    assert before != store.stage_key("01_synthesize", "a", given)


@pytest.mark.slow
def test_the_notebook_with_own_data_and_an_endpoint(own, tmp_path):
    """The teacher answers as it should, but for every fifth question; a second run with other parameters asks nothing again."""
    def plan(nth, body):
        words = body["messages"][0]["content"][-1]["text"]
        if "the verified answer is" not in words:
            return 200, completion("<answer>I do not know</answer>")
        answer = words.split("the verified answer is ")[1].rstrip(".")
        early = "The answer is in image 1." if server.total % 5 == 0 else "Both images show things."
        return 200, completion(f"<think>{early} One fits.</think><answer>{answer}</answer>")

    server = Server(plan)
    command = [sys.executable, "-c", "from mig_kit.cli import main; main()", "run", "01", "--profile", "smoke", "--run-id", "t",
               "-p", "teacher", "endpoint", "-p", "endpoint_url", server.url, "-p", "endpoint_model", "m", "-p", "data", "own",
               "-p", "data_file", str(own), "-p", "price_out", "1000"]
    environment = {**os.environ, "MIG_KIT_RUNS": str(tmp_path / "runs"), "MIG_KIT_API_KEY": "sk-very-secret"}
    for more in ([], ["-p", "concurrency", "2"]):
        result = subprocess.run([*command, *more], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = json.loads((tmp_path / "runs/t/01_synthesize/metrics.json").read_text())
        assert server.total == metrics["teacher"]["calls"] == 2 * metrics["traces"]["total"]
        assert metrics["traces"]["kept"] == metrics["sizes"]["cot"] > 0 and metrics["traces"]["dropped"]["up front"] > 0
        assert metrics["teacher"]["cost"] == pytest.approx(server.total * 10 * 1000 / 1e6)
    kept = read_table(tmp_path / "runs/t/01_synthesize/cot.parquet")
    assert kept["suite"][0] == "own" and kept["detail"][0] == "endpoint"
    assert not any(b"very-secret" in f.read_bytes() for f in (tmp_path / "runs").rglob("*") if f.is_file())
    server.http.shutdown()
    rest = [*command[:4], "02", "03", "04", "05", "06", "07", *command[5:9], "-p", "max_samples", "1000"]
    rest = [*rest, "-p", "lowest", "0", "-p", "highest", "1", "-p", "per_task", "50"]
    result = subprocess.run(rest, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and (tmp_path / "runs/t/07_report/report.html").is_file(), result.stderr[-3000:]
