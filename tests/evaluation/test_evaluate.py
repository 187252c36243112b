"""Metrics by hand."""

from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.common import write_json
from mig_kit.evaluation import evaluate, items
from mig_kit.prompts import read_reply
from mig_kit.sample import TableRows, read_samples, write_samples
from mig_kit.stats import to_percent
from mig_kit.world.suites import make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def reply_to(sample, share=1.0):
    """A reply whose box covers `share` of the target from the left: IoU = share."""
    target = sample.targets[0]
    size = sample.sizes[target.image - 1]
    x1, y1, x2, y2 = to_model_box(target.box, size, BOX_FORMAT)
    box = f"[{x1}, {y1}, {x1 + share * (x2 - x1)}, {y2}]"
    return f'<think></think><answer>{{"image": {target.image}, "box": {box}}}</answer>'


def judge(samples, drawn=None, **greedy):
    """The table of models' greedy replies, each with the drawn ones of its name."""
    return items.make_items({"s": samples}, {model: {"s": {
        "greedy": replies, "drawn": (drawn or {}).get(model, [[]] * len(samples))}}
        for model, replies in greedy.items()}, BOX_FORMAT)


def summarize(samples, greedy, drawn=None):
    return items.summarize_suite(judge(samples, {"m": drawn} if drawn else None, m=greedy))


def two_tasks():
    return [*(make_sample("diff", "val", index) for index in range(4)),
            *(make_sample("reasoning", "val", index) for index in range(2))]


def test_scores_by_hand():
    samples = two_tasks()
    replies = [reply_to(samples[0]), reply_to(samples[1], 0.6), reply_to(samples[2], 0.4), "",
               reply_to(samples[4]), reply_to(samples[5])]
    result = summarize(samples, replies)
    diff = result["tasks"]["diff"]
    assert (diff["acc@0.3"], diff["acc@0.5"], diff["acc@0.7"]) == (75, 50, 25)
    assert diff["mean_iou"] == pytest.approx(50, abs=0.01)
    assert result["score"] == 75  # the unweighted mean of 50 and 100, not 4 of 6
    assert result["sampled"] is None


def test_the_truth_of_reasoning_by_hand():
    """Correct with true reasoning, correct with a false claim, correct without any, and wrong."""
    samples = [make_sample("diff", "val", index) for index in range(4)]
    thoughts = [" ".join([*samples[0].notes, samples[0].finding]),
                f"{samples[1].notes[0]} image 3: red star.", "Compare. hm.", samples[3].finding]
    replies = [reply_to(sample).replace("<think>", f"<think>{thought}")
               for sample, thought in zip(samples, thoughts)]
    replies[3] = replies[3].partition("<answer>")[0]
    result = summarize(samples, replies)["reasoning"]
    assert result["claims"] == 6
    assert result["truth"] == pytest.approx(100 * 5 / 6)
    for name in ("grounded", "silent", "false"):
        assert result[name] == pytest.approx(100 / 3)
    low, high = result["grounded_ci95"]
    assert 0 <= low < 100 / 3 < high <= 100
    silent = summarize(samples, [""] * 4)["reasoning"]
    assert [silent[name] for name in ("claims", "truth", "grounded")] == [0, None, None]
    own = [replace(sample, spec=None) for sample in samples]
    assert "reasoning" not in summarize(own, replies)


@pytest.mark.parametrize("reply,correct", [
    *((f"<think>List.</think><answer>{answer}</answer>", correct) for answer, correct in (
        ("none", 1), ("", 1), ('{"image": null, "box": null}', 1), ("A", 0), ('{"image": 0}', 1),
        ('{"image": 1, "box": [1, 2, 3, 4]}', 0), ('{"image": 1, "box": [1, 2', 0))),
    ("There is nothing.", 0)])
def test_where_there_is_nothing_to_find_the_correct_answer_names_no_box(reply, correct):
    sample = sample_without_target()
    scores = items.score_answer(read_reply(reply, sample, BOX_FORMAT), sample)
    assert scores["correct"] == correct and scores["format"] >= correct


@cache
def sample_without_target():
    return next(sample for sample in make_suite("ood_grounding", "test", 8, 14)
                if not sample.targets)


def test_a_percentage_is_never_minus_zero():
    texts = [f"{to_percent(value):+.1f}" for value in (-0.0, -1e-17, 0.123456, -0.05)]
    assert texts == ["+0.0", "+0.0", "+12.3", "-5.0"]


def test_only_some_samples_have_drawn_replies(tmp_path):
    samples = two_tasks()
    with_drawn = {sample.id for sample in evaluate.first_per_task(samples, 1)}
    has_drawn = [sample.id in with_drawn for sample in samples]
    assert has_drawn == [True, False, False, False, True, False]
    assert evaluate.first_per_task(samples, 0) == samples
    write_samples(tmp_path / "val.parquet", samples)
    rows = read_samples(tmp_path / "val.parquet")
    first = evaluate.first_per_task(rows, 1)
    assert isinstance(first, TableRows) and {sample.id for sample in first} == with_drawn
    greedy = [reply_to(sample) for sample in samples]
    drawn = [[reply, ""] if has_drawn[i] else [] for i, reply in enumerate(greedy)]
    result = summarize(samples, greedy, drawn)
    assert (result["score"], result["sampled"], result["n_sampled"]) == (100, 50, 2)
    assert result["pass_at_k"] == {"1": 50, "2": 100}
    empty = [["", ""] if replies else [] for replies in drawn]
    table = judge(samples, {"after": drawn, "before": empty}, after=greedy, before=greedy)
    gap = items.paired_difference(table, "after", "before")
    assert gap["ci95"] == [0, 0] and gap["sampled_ci95"] != [0, 0], "the same replies, others"
    assert (gap["value"], gap["sampled"]) == (0, 50)


def test_samples_that_share_their_images_are_resampled_together():
    apart = [replace(make_sample("region", "val", i), suite="own") for i in range(40)]
    together = [replace(apart[i // 10], id=str(i)) for i in range(40)]
    correct = [i // 10 in (0, 2) for i in range(40)]
    nothing, widths = ["nothing"] * 40, []
    for samples in (apart, together):
        replies = [reply_to(sample) if is_right else "nothing"
                   for sample, is_right in zip(samples, correct)]
        low, high = summarize(samples, replies)["ci95"]
        gap = items.paired_difference(judge(samples, a=replies, b=nothing), "a", "b")
        assert gap["value"] == 50 and low < 50 < high
        widths.append((high - low, gap["ci95"][1] - gap["ci95"][0]))
    assert widths[1][0] > 1.5 * widths[0][0] and widths[1][1] > 1.5 * widths[0][1]


def test_own_data_is_scored_by_question_and_drawn_suites_by_task():
    """Three questions of one task, all correct, and one of another, wrong."""
    drawn = [make_sample("diff", "val", i) for i in range(3)] + [make_sample("region", "val", 0)]
    own = [replace(sample, suite="own") for sample in drawn]
    replies = [reply_to(sample) for sample in drawn[:3]] + ["?"]
    by_task = summarize(drawn, replies)
    by_question = summarize(own, replies, [[reply] for reply in replies])
    assert (by_task["score"], by_question["score"], by_question["sampled"]) == (50, 75, 75)
    assert by_question["tasks"].keys() == {"diff", "region"}
    gap = items.paired_difference(judge(own, a=replies, b=["?"] * 4), "a", "b")
    assert gap["value"] == 75 and gap["ci95"][0] < 75 < gap["ci95"][1]


def test_the_table_reads_back_as_it_was_written(tmp_path):
    """Also names that look like numbers or like nothing, and what no scene tells."""
    samples = [replace(sample, suite="own", id=name, task="NA", spec=None)
               for sample, name in zip(two_tasks(), ("007", "nan", "", "1e3", "a,b", "None"))]
    table = judge(samples, {"a": [["?", "!"]] * 6}, a=[reply_to(sample, 1 / 3)
                                                       for sample in samples])
    items.write_items(table, tmp_path)
    back = items.read_items(tmp_path)
    pd.testing.assert_frame_equal(back, table, check_dtype=False, check_exact=True)
    assert len(back) == 6 * 3 and back["judged"].isna().all()


def test_which_samples_are_scored(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    folder = tmp_path / "a" / "01_synthesize"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"params": {"data": "own"}})
    write_samples(folder / "val.parquet",
                  [replace(make_sample("diff", "val", i), suite="own") for i in range(10)])
    sizes = {"suites": {"mig_bench": 0, "mmiu": 1}, "eval_seed": 0}
    samples = evaluate.load_test_samples("a", sizes)
    assert list(samples) == ["own", "mmiu"], "own data comes first"
    assert len(samples["own"]) == 10
    write_json(folder / "run.json", {"params": {}})
    assert list(evaluate.load_test_samples("a", sizes)) == ["mmiu"]
    assert evaluate.list_pairs({"base": 1, "grpo": 1}) == [("grpo", "base")]


def test_rl_that_started_from_a_folder_is_compared_with_it(tmp_path):
    assert [evaluate.find_rl_start(name) for name in ("merged", "base")] == [None] * 2
    assert evaluate.find_rl_start(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match="RL started from /nowhere/x, which is gone"):
        evaluate.find_rl_start("/nowhere/x")
    assert evaluate.list_pairs(("base", "start", "grpo")) == [("grpo", "start"), ("grpo", "base")]


def test_shifted_boxes_of_a_system_come_back():
    """Every box five hundredths too far right and down; the base names no box."""
    samples = [make_sample("region", "test", number) for number in range(60)]

    def reply(sample, shift):
        target, = sample.targets
        step = [shift * side for side in sample.sizes[target.image - 1]] * 2
        moved = tuple(np.add(target.box, step).tolist())
        return reply_to(replace(sample, targets=(target._replace(box=moved),)))

    replies = {name: {"mig_bench": {"greedy": texts, "drawn": []}} for name, texts in {
        "base": ["none"] * 60, "sft": [reply(sample, 0.05) for sample in samples],
        "grpo": [reply(sample, 0) for sample in samples]}.items()}
    gains = evaluate.calibrate_systems({"mig_bench": samples}, replies, BOX_FORMAT)
    assert gains["sft"]["mig_bench"]["before"] < 60 and gains["sft"]["mig_bench"]["after"] > 95
    assert gains["sft"]["mig_bench"]["ci95"][0] > 0
    assert gains["grpo"]["mig_bench"]["before"] == gains["grpo"]["mig_bench"]["after"] == 100
    assert gains["base"]["mig_bench"]["value"] == 0
