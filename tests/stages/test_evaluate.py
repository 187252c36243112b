"""Metrics by hand."""

import numpy as np
import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.stages import evaluate
from mig_kit.stages.evaluate import paired_difference, summarize_suite
from mig_kit.stats import bootstrap_interval, macro_mean, to_percent
from mig_kit.world.suites import make_suite
from mig_kit.world.tasks import make_sample

VIEW = BoxFormat()


def answer(sample, share=1.0):
    """A reply whose box covers `share` of the target from the left: IoU = share."""
    from mig_kit.boxes import to_model_box

    number, box = sample.targets[0]
    x1, y1, x2, y2 = to_model_box(box, sample.sizes[number - 1], box_format=BoxFormat())
    return f'<think></think><answer>{{"image": {number}, "box": [{x1}, {y1}, {x1 + share * (x2 - x1)}, {y2}]}}</answer>'


def test_scores_by_hand():
    samples = [make_sample("diff", "val", i) for i in range(4)] + [make_sample("reasoning", "val", i) for i in range(2)]
    replies = [answer(samples[0]), answer(samples[1], 0.6), answer(samples[2], 0.4), "", answer(samples[4]), answer(samples[5])]
    result = summarize_suite(samples, replies, [], VIEW)
    diff = result["tasks"]["diff"]
    assert (diff["acc@0.3"], diff["acc@0.5"], diff["acc@0.7"]) == (75, 50, 25)
    assert diff["mean_iou"] == pytest.approx(50, abs=0.01)
    assert result["score"] == 75  # the unweighted mean of 50 and 100, not 4 of 6
    assert result["sampled"] is None


def test_the_wrong_image_scores_nothing():
    sample = make_sample("group_grounding", "val", 0)
    number = sample.targets[0][0]
    text = answer(sample).replace(f'"image": {number}', f'"image": {number % len(sample.images) + 1}')
    assert evaluate.score_reply(text, sample, VIEW)["right"] == 0


def test_either_image_of_a_pair_that_holds_both():
    sample = next(s for s in make_suite("ood_grounding", "val", 30) if s.task == "mc_bench" and len(s.targets) == 2)
    other = answer(sample)
    assert evaluate.score_reply(other, sample, VIEW)["right"] == 1


def test_where_there_is_nothing_to_find_it_is_right_to_name_nothing():
    sample = next(s for s in make_suite("ood_grounding", "test", 100, 14) if not s.targets)
    for answer_is, right in (("none", 1), ("", 1), ('{"image": null, "box": null}', 1), ("A", 0),
                             ('{"image": 1, "box": [1, 2, 3, 4]}', 0), ('{"image": 1, "box": [1, 2', 0)):
        found = evaluate.score_reply(f"<think>List.</think><answer>{answer_is}</answer>", sample, VIEW)
        assert (found["right"], found["format"] >= right) == (right, True), answer_is
    assert evaluate.score_reply("There is nothing.", sample, VIEW)["right"] == 0, "not in the form asked for"


def test_a_percentage_is_never_minus_zero():
    assert [f"{to_percent(v):+.1f}" for v in (-0.0, -1e-17, 0.123456, -0.05)] == ["+0.0", "+0.0", "+12.3", "-5.0"]


def test_paired_difference_and_sampled_mean():
    samples = [make_sample("diff", "val", i) for i in range(4)]
    good, bad = [answer(s) for s in samples], [""] * 4
    found = paired_difference(samples, good, bad[:3] + good[3:], [[g, ""] for g in good], [["", ""]] * 4, VIEW)
    assert found["value"] == 75 and found["sampled"] == 50 and found["ci95"][0] <= 75 <= found["ci95"][1]


def test_only_some_samples_have_drawn_replies():
    samples = [make_sample("diff", "val", i) for i in range(4)] + [make_sample("reasoning", "val", i) for i in range(2)]
    asked = {s.id for s in evaluate.first_per_task(samples, 1)}
    assert [s.id in asked for s in samples] == [True, False, False, False, True, False]
    assert evaluate.first_per_task(samples, 0) == samples
    greedy = [answer(s) for s in samples]
    drawn = [[answer(s), ""] if s.id in asked else [] for s in samples]
    result = summarize_suite(samples, greedy, drawn, VIEW)
    assert (result["score"], result["sampled"], result["n_sampled"]) == (100, 50, 2)
    assert result["tasks"]["diff"]["pass@2"] == 100 and result["pass_at_k"] == {"1": 50, "2": 100}
    found = paired_difference(samples, greedy, greedy, drawn, [["", ""] if replies else [] for replies in drawn], VIEW)
    assert (found["value"], found["sampled"]) == (0, 50)


def test_bootstrap_covers_and_is_stratified():
    rng = np.random.default_rng(1)
    groups = [np.ones(50), np.zeros(50)]
    assert bootstrap_interval(groups) == [0.5, 0.5]
    hits = 0
    for _ in range(60):
        values = [(rng.random(80) < 0.3).astype(float), (rng.random(40) < 0.7).astype(float)]
        low, high = bootstrap_interval(values, resamples=400)
        hits += low <= 0.5 <= high
    assert hits >= 51  # 95 % nominal


def test_macro():
    assert macro_mean([np.array([1.0, 0.0]), np.array([1.0])]) == 0.75
