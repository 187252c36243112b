"""`mig-kit eval`: any model, with stage 06's own figures for a run's."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from benchmark_files import RECORDS, write_benchmarks
from command_line import error_of, output_of, run_mig_kit
from PIL import Image
from teacher_server import TeacherServer, completion, question_text

from mig_kit.boxes import BoxFormat
from mig_kit.commands.ask import find_model
from mig_kit.common import UserError
from mig_kit.evaluation import eval_model
from mig_kit.evaluation.items import read_items
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_facts import RunModel, find_run_model
from mig_kit.prompts import format_answer
from mig_kit.sample import Sample, read_samples, write_samples
from mig_kit.score.benchmarks import RUNNABLE
from mig_kit.stats import gap_interval_by_list
from mig_kit.world.suites import suite_title

PARAMS = SimpleNamespace(max_new_tokens=12, seed=0, replies=0, server="", concurrency=1)
BOX_FORMAT = BoxFormat()


@pytest.fixture(autouse=True)
def no_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))


def run_eval(*words, runs):
    return output_of("eval", *map(str, words), MIG_KIT_RUNS=str(runs))


def read_scores(folder):
    return json.loads((folder / "eval.json").read_text())["scores"]


@pytest.fixture
def evaluate(random_folder, float32, tmp_path):
    """Call it with a task: the result of the random model, or of another folder."""
    def run(task, out="out", model=random_folder, **changes):
        params = SimpleNamespace(**vars(PARAMS) | changes)
        return eval_model.evaluate_model(RunModel(model, BOX_FORMAT, {}), task, float32,
                                         tmp_path / out, params)

    return run


@pytest.fixture(scope="module")
def evaluated(smoke_runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    for name, model in (("base", "smoke/base"), ("grpo", "smoke")):
        run_eval("--model", model, "--out", root / name, runs=smoke_runs)
    return root


def test_a_runs_models_get_the_runs_own_scores(evaluated, smoke_runs):
    metrics = json.loads((smoke_runs / "smoke" / "06_evaluate" / "metrics.json").read_text())
    for system in ("base", "grpo"):
        scores = read_scores(evaluated / system)["strict"]
        assert scores.keys() == metrics["systems"][system].keys()
        for suite, summary in scores.items():
            recorded = metrics["systems"][system][suite]
            assert (summary["score"], summary["ci95"]) == (recorded["score"], recorded["ci95"])
            for task, figures in summary["tasks"].items():  # 06 also draws some at temperature 1
                assert figures.items() <= recorded["tasks"][task].items()


def test_two_models_stand_in_one_table(evaluated, smoke_runs):
    """The second call asks nothing again; its difference is that of the two scores."""
    predictions = evaluated / "grpo" / "predictions.jsonl"
    before = predictions.read_text()
    output = run_eval("--model", "smoke", "--out", evaluated / "grpo", "--compare",
                      evaluated / "base", runs=smoke_runs)
    assert "grpo - " in output and predictions.read_text() == before
    results = {name: eval_model.read_result(evaluated / name) for name in ("grpo", "base")}
    gaps = {(row["protocol"], row["suite"]): float(row["points"].split()[0])
            for row in eval_model.compare_results(results)}
    for suite, summary in results["grpo"]["scores"]["strict"].items():
        gain = summary["score"] - results["base"]["scores"]["strict"][suite]["score"]
        assert gaps["strict", suite_title(suite)] == pytest.approx(gain, abs=0.051)


def test_models_that_had_not_the_same_room_are_called_so(evaluated):
    results = {name: eval_model.read_result(evaluated / name) for name in ("grpo", "base")}
    assert not any("the same room" in text for text in eval_model.result_tables(results))
    results["base"]["max_new_tokens"] = 1024
    tokens = results["grpo"]["max_new_tokens"]
    sentence = f"max_new_tokens differ (grpo {tokens}, base 1024): what is compared"
    assert any(sentence in text for text in eval_model.result_tables(results))


def test_a_model_of_no_run_has_room_to_reason(random_folder):
    assert find_model(str(random_folder), {}).evaluation == {"max_new_tokens": 1024}
    assert find_model("tiny/sft", {}).evaluation == {}, "as 06 asks it"


def test_a_difference_is_over_lists_of_images():
    """Three questions to each of forty lists say no more than the lists."""
    by_list = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 40, p=[0.2, 0.4, 0.4])
    gains = np.repeat(by_list, 3)
    questions = pd.DataFrame({"protocol": "strict", "suite": "lisa", "task": "", "part": "",
                              "id": range(120), "list": np.arange(120) // 3})
    results = {name: {"questions": {}, "scores": {"strict": {"lisa": {}}},
                      "items": questions.assign(correct=values)}
               for name, values in (("a", gains), ("b", 0 * gains))}
    bounds = [f"{100 * bound:.1f}" for bound in gap_interval_by_list([(by_list, np.arange(40))])]
    points = eval_model.compare_results(results)[0]["points"]
    assert points == f"{100 * gains.mean():.1f} ({' to '.join(bounds)})"


@pytest.mark.parametrize("suite", ["own", *RUNNABLE])
def test_files_of_questions(suite, evaluate, tmp_path):
    """A random model knows nothing: what is tested is that every file is asked and written."""
    write_benchmarks(tmp_path)
    own = {"id": "x", "images": ["a.png"], "question": "Where?", "coordinates": "pixels",
           "image": 1, "box": [10, 10, 60, 50]}
    (tmp_path / "own.jsonl").write_text(json.dumps(own) + "\n")
    file = tmp_path / ("own.jsonl" if suite == "own" else f"{suite}.json")
    result = evaluate(eval_model.Task(suite, file, tmp_path))
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(RECORDS.get(suite, [own]))
    assert all("response" in json.loads(line) for line in lines)
    protocols = ["strict", "free_text"] if suite == "own" else ["official", "strict"]
    assert list(result["scores"]) == protocols
    table = read_items(tmp_path / "out")
    assert [*table["protocol"].unique()] == protocols and len(table) == 2 * result["asked"]
    assert set(table["suite"]) == {suite} and set(table["kind"]) == {"greedy"}
    rows = eval_model.protocol_rows({"a": result})
    assert list(dict.fromkeys(row["protocol"] for row in rows)) == protocols
    assert all(" (drawn)" not in row["percent, greedy"] for row in rows)


@pytest.fixture
def own_task(tmp_path):
    Image.new("RGB", (90, 60), "white").save(tmp_path / "a.png")
    lines = [{"id": name, "images": ["a.png"], "question": f"Where is {name}?", "image": 1,
              "box": [1, 2, 30, 40], "coordinates": "pixels"} for name in "xyz"]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return eval_model.Task("own", file, tmp_path)


def rewrite(folder, colour):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (90, 60), colour).save(folder / "a.png")


def test_replies_about_other_pictures_are_not_taken(own_task, evaluate, tmp_path):
    """Of another folder with the same names, and of new pictures; a copy is the same picture."""
    result, grey = evaluate(own_task), dataclasses.replace(own_task, root=tmp_path / "grey")
    rewrite(tmp_path / "copy", "white")
    assert evaluate(dataclasses.replace(own_task, root=tmp_path / "copy")) == result
    rewrite(tmp_path / "grey", "grey")
    rewrite(tmp_path, "grey")
    for task in (grey, own_task):
        with pytest.raises(UserError, match="holds replies of another evaluation: another "
                                             "questions; name another --out"):
            evaluate(task)
    rewrite(tmp_path, "white")
    assert evaluate(own_task) == result
    with pytest.raises(UserError, match="did not answer the same questions"):
        eval_model.compare_results({"white": result, "grey": evaluate(grey, "out 2")})


def test_a_folder_that_stock_transformers_saved_is_the_same_model(own_task, random_folder, evaluate,
                                                                  tmp_path):
    """Its image settings lie in processor_config.json, which transformers 5 writes."""
    stock = shutil.copytree(random_folder, tmp_path / "stock")
    settings = json.loads((stock / "preprocessor_config.json").read_text())
    (stock / "preprocessor_config.json").unlink()
    (stock / "processor_config.json").write_text(json.dumps(
        {"processor_class": "Qwen2_5_VLProcessor",
         "image_processor": settings | {"image_processor_type": "Qwen2VLImageProcessor"}}))
    for folder in (random_folder, stock):
        evaluate(own_task, f"of {folder.name}", folder)
    ours, theirs = ((tmp_path / f"of {folder.name}" / "predictions.jsonl").read_text()
                    for folder in (random_folder, stock))
    assert ours == theirs


ANSWER = f"<answer>{format_answer(1, (11, 33, 333, 667))}</answer>"


def serve(*messages, name="vision:7b"):
    """A server that answers x, y and z with the messages in turn, and words for mig-kit eval."""
    def plan(nth, body):
        parts = body["messages"][0]["content"]
        answer, asked = completion(prompt_tokens=100 * len(parts)), question_text(body)[9]
        message, choice = messages["xyz".index(asked) % len(messages)], answer["choices"][0]
        choice.update(message=message, finish_reason=message.get("ends", "stop"))
        return 200, answer

    server = TeacherServer(plan, ["another", name])
    return server, ("--model", name, "-p", "server", server.url, "-p", "concurrency", "1")


def ask_own(task, out, *words):
    return run_mig_kit("eval", "--suite", "own", "--file", str(task.file), "--out", str(out),
                       *words)


def test_a_model_of_any_family_answers_through_its_server(own_task, tmp_path):
    messages = [{"reasoning_content": "Look.", "content": ANSWER},
                {"content": f"So.</think>{ANSWER}"}, {"content": f"<think>So.</think>{ANSWER}"}]
    server, words = serve(*messages)
    result = ask_own(own_task, tmp_path / "out", *words, "--coordinates", "normalized_1000")
    assert result.returncode == 0, result.stderr
    assert "own data (a file)" in result.stdout and "held out" not in result.stdout
    own = read_scores(tmp_path / "out")["strict"]["own"]
    assert own["score"] == 100
    assert [part["format"] for part in own["tasks"].values()] == [100]
    assert set(server.bodies[-1]) == {"model", "messages", "temperature", "max_tokens"}
    assert ask_own(own_task, tmp_path / "out", *words, "--coordinates",
                   "absolute").stderr.count("another coordinates") == 1


def test_questions_of_the_training_are_counted_and_not_called_held_out(tmp_path, monkeypatch):
    image = Image.new("RGB", (60, 40), "red")
    asked = [Sample(str(number), "own", "own", "train", (image,), f"Find {number}.")
             for number in range(3)]
    folder = tmp_path / "runs" / "mine" / "01_synthesize"
    folder.mkdir(parents=True)
    for name, part in (("rl", asked[:2]), ("val", asked[2:])):
        write_samples(folder / f"{name}.parquet", part)
    samples, file = {"own": read_samples(folder / "rl.parquet")}, tmp_path / "a.jsonl"
    facts = eval_model._compare_with_run(eval_model.Task("own", file), samples, "mine")
    assert facts == {"held_out": False, "trained": 2}
    samples = {"own": read_samples(folder / "val.parquet")}
    task = eval_model.Task("own", folder / "val.parquet")
    assert eval_model._compare_with_run(task, samples, "mine") == {"held_out": True, "trained": 0}
    scores = {"scores": {"free_text": {}}}
    assert eval_model.title_suite("own", scores | {"held_out": True}) == "own data (held out)"
    assert eval_model.title_suite("own", scores | facts) == "own data (a file)"


def test_replies_without_a_text_are_counted_and_a_resumed_run_is_equal(own_task, tmp_path):
    messages = [{"content": ANSWER}, {"content": None, "ends": "content_filter"},
                {"content": None, "reasoning": "Look.", "ends": "length"}]
    _, words = serve(*messages)
    words = (*words, "--coordinates", "normalized_1000")
    tables = [ask_own(own_task, tmp_path / "out", *words).stdout.splitlines()]
    stored = tmp_path / "out" / "replies" / "model_own_greedy.jsonl"
    replies, result = stored.read_text(), (tmp_path / "out" / "eval.json").read_text()
    assert json.loads(result)["endings"] == {"replies": 3, "cut": 1, "empty": {"content_filter": 1}}
    assert any("1 cut, 1 empty (content_filter 1)" in line for line in tables[0])
    stored.write_text(replies[:-20])  # as a kill leaves it
    _, others = serve(messages[0])
    refused = ask_own(own_task, tmp_path / "out", *others, "--coordinates", "normalized_1000")
    assert "another server" in refused.stderr and "if the same model has moved" in refused.stderr
    tables.append(ask_own(own_task, tmp_path / "out", *words).stdout.splitlines())
    assert stored.read_text() == replies and (tmp_path / "out" / "eval.json").read_text() == result
    assert tables[0][-6:] == tables[1][-6:]


def test_a_reply_that_scores_is_not_called_unread(own_task, tmp_path):
    """It states a box in the answer, and not in the whole format."""
    answer = '<answer>{"image": 1, "box": [1, 2, 28, 37], "note": ""}</answer>'
    _, words = serve({"content": answer})
    result = ask_own(own_task, tmp_path / "out", *words, "--coordinates", "absolute")
    strict, = read_scores(tmp_path / "out")["strict"].values()
    assert strict["score"] > 0 and "name no box" not in result.stdout


def test_empty_replies_alone_are_no_score(own_task, tmp_path):
    _, words = serve({"content": ""})
    result = ask_own(own_task, tmp_path / "out", *words, "--coordinates", "absolute")
    assert "all 3 empty (stop 3): that is no score" in result.stderr and result.returncode == 1
    assert not (tmp_path / "out" / "eval.json").exists()


def test_a_folder_of_another_family_is_asked_as_the_server_names_it(own_task, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    _, words = serve({"content": "In image 1: [3, 5, 70, 50]"}, name=str(folder))
    result = ask_own(own_task, tmp_path / "out", *words, "--coordinates", "absolute")
    assert result.returncode == 0 and "its prompts are not compared with the kit's" in result.stderr
    scores = read_scores(tmp_path / "out")
    assert list(scores["free_text"]) == ["own"]


@pytest.mark.parametrize(("words", "sentence"), [
    ((), "only the server knows the model vision:7b; say with --coordinates"),
    (("--coordinates", "absolute", "--model", "vison:7b"),
     "serves the model vison:7b, but only another, vision:7b; use one of these names"),
    (("--coordinates", "absolute", "--adapter", "."), "have the server load it")])
def test_what_a_servers_model_cannot_be_asked_with(words, sentence, own_task, tmp_path):
    _, known = serve({"content": ANSWER})
    result = ask_own(own_task, tmp_path / "out", *known, *words)
    assert result.returncode == 1 and sentence in result.stderr
    assert result.stderr.count("\n") <= 2


@pytest.mark.parametrize(("change", "sentence"), [
    ({"images": None}, "line 4: 'images': Field required"),
    ({"question": "Where? " * 5000, "id": "long"},  # which more tokens for replies would not mend
     "question long: the prompt takes [0-9]+ tokens, 6 of them for images, and the model reads "
     "4096; shorten")])
def test_a_wrong_question_leaves_no_folder_behind(change, sentence, own_task, evaluate, tmp_path):
    right = own_task.file.read_text()
    line = json.loads(right.splitlines()[0]) | {"id": "w"} | change
    line = {name: value for name, value in line.items() if value is not None}
    own_task.file.write_text(right + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=sentence):
        evaluate(own_task)
    assert not (tmp_path / "out").exists()


def test_files_of_ones_own_are_not_overwritten(tmp_path):
    (tmp_path / "predictions.jsonl").write_text("mine")
    with pytest.raises(UserError, match="is of no mig-kit eval that could go on"):
        eval_model.claim_folder(tmp_path, {"model": "m"})
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.jsonl"]


def test_a_runs_name_is_that_of_its_model(smoke_runs, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(smoke_runs))
    folder = find_run_model("smoke").folder
    assert folder.name == "model" and find_run_model(str(folder)) is None, "a model's own folder"
    assert find_run_model("some/model") is None


def test_a_run_without_06_is_asked_as_its_profile_says(smoke_runs, tmp_path, monkeypatch):
    run = shutil.copytree(smoke_runs / "smoke", tmp_path / "smoke",
                          ignore=shutil.ignore_patterns("06_evaluate", "07_report"))
    monkeypatch.setenv("MIG_KIT_RUNS", str(run.parent))
    asked = profile_params("06_evaluate", "smoke")
    assert find_run_model("smoke/sft").evaluation["suites"] == asked["suites"]
    (run / "profile.txt").write_text("qwen2_5_vl_7b_own\n")
    assert find_run_model("smoke/sft").evaluation["max_new_tokens"] == 1024, "room to reason"


@pytest.mark.parametrize(("words", "sentence"), [
    (("--suite", "drawn", "--file", "here.jsonl"), "has no --file"),
    (("--suite", "own"), "every other suite needs one"),
    (("-p", "replies", "8"), "leave -p replies out"),
    (("--compare", "."), "holds no eval.json")])
def test_bad_words_end_at_once(words, sentence, tmp_path, monkeypatch):
    (tmp_path / "here.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert sentence in error_of("eval", "--model", "tiny", "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()
