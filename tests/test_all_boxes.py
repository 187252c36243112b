"""Questions for all boxes: answers, rewards, the filter, the figures of 06 and the outcomes."""

import itertools
import os
from dataclasses import replace

import numpy as np
import pytest
from benchmark_files import correct_reply
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mig_kit import prompts, rewards
from mig_kit.boxes import BoxFormat, iou
from mig_kit.data.endpoint import teacher_prompt
from mig_kit.filters import drop_reason
from mig_kit.sample import Sample
from mig_kit.stages import evaluate, report, tables
from mig_kit.stages.grpo import describe_reply
from mig_kit.stages.rejection_sampling import accuracy_by_detail, pass_rates
from mig_kit.stages.sanity_checks import _pair_with_other_images
from mig_kit.world.suites import make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
A, B, C = (0, 0, 28, 28), (42, 0, 84, 28), (0, 42, 28, 84)  # they touch nowhere
FUZZ = int(os.environ.get("MIG_KIT_FUZZ", 300))
coordinates = st.integers(0, 84)
some_boxes = st.lists(st.tuples(st.integers(0, 3), st.tuples(*[coordinates] * 4)), max_size=4)
some_targets = st.lists(st.tuples(st.integers(1, 2), st.sampled_from([A, B, C])), max_size=4,
                        unique=True)


def ask(*targets):
    """A question about two images of 84x84 pixels, which the model sees as they are."""
    images = [Image.new("RGB", (84, 84), "white")] * 2
    return Sample("q", "own", "own", "val", images, "Find every cup.", targets, find_all=True)


def reply_with(*boxes, answer=None):
    text = prompts.format_answers(boxes) if answer is None else answer
    return f"<think>Search.</think><answer>{text}</answer>"


def score(name, reply, sample):
    return rewards.REWARDS[name](reply, sample, BOX_FORMAT)


NONE = reply_with()


def test_the_answer_comes_back_and_one_box_is_written_as_ever():
    for boxes in ([], [(2, A)], [(1, A), (2, B), (2, C)]):
        assert prompts.parse_boxes(reply_with(*boxes)) == boxes
    assert prompts.format_answers([(2, A)]) == prompts.format_answer(2, A)
    assert prompts.parse_reply(reply_with((2, A))).box == A
    listed = f"[{prompts.format_answer(1, A)}, {prompts.format_answer(2, B)}]"
    assert prompts.parse_boxes(reply_with(answer=listed)) == [(1, A), (2, B)]


@pytest.mark.parametrize("answer", ['{"image": 0}', '{"image": null}', "null", "[]", " [] ",
                                    '{"image": null, "box": null}', '{"image": 0, "box": []}'])
def test_what_says_that_there_is_none(answer):
    assert prompts.parse_boxes(reply_with(answer=answer)) == []


@pytest.mark.parametrize("answer", [
    "", "none", "A", "0", "{}", "[[]]", "false", '{"image": false}', '{"image": ""}', "NaN",
    '{"image": 1}', '{"image": 1, "box": []}', '{"image": 0, "box": 3}', '{"image": 0.0}',
    '{"image": 0}, {"image": 0}', '{"image": 0}, {"image": 1, "box": [1,2,3,4]}',
    '{"image": 1, "box": [1,2,3,4]} {"image": 2, "box": [1,2,3,4]}',
    '{"image": 1, "box": [1,2,3,4]}, ', '{"image": 1, "box": [1,2,3,NaN]}',
    '{"image": 1, "box": [1,2,3,1e999]}', '{"image": true, "box": [1,2,3,4]}',
    '{"image": "1", "box": [1,2,3,4]}', '{"image": 1, "box": [[1,2,3,4]]}', "1], [2",
    "[" * 5000, '{"image": ' + "9" * 5000 + ', "box": [1,2,3,4]}',
    ", ".join(['{"image": 1, "box": [1,2,3,4]}'] * (prompts.MOST_BOXES + 1))])
def test_hostile_answers_are_no_answer_and_earn_nothing_but_tags(answer):
    reply = reply_with(answer=answer)
    assert prompts.parse_boxes(reply) is None
    for sample in (ask(), ask((1, A)), ask((1, A), (2, B))):
        earned = [score(name, reply, sample) for name in ("box", "image", "format")]
        assert earned == [0, 0, 0.75]
        assert not rewards.is_correct(reply, sample, BOX_FORMAT)
        assert drop_reason(reply, sample, BOX_FORMAT) == "format"


pieces = st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", '{"image": ', "2", "0",
                          ', "box": [', "1,2,3,4", "]}", "}", "[", "]", ", ", "NaN", "-1", "null"])


@settings(max_examples=FUZZ, deadline=None)
@given(st.one_of(st.text(), st.lists(pieces, max_size=20).map("".join)), some_targets)
def test_no_text_raises_and_no_reward_leaves_its_range(text, targets):
    sample = ask(*targets)
    for name, reward in rewards.REWARDS.items():
        value = reward(text, sample, BOX_FORMAT)
        assert value is None if name == "choice" else 0 <= value <= 1
    assert evaluate.score_reply(text, sample, BOX_FORMAT).keys() == {"iou", "correct", "image",
                                                                     "format"}
    assert report.classify_outcome(text, sample, BOX_FORMAT) in report.OUTCOMES


def brute_force(boxes, targets, value):
    """The best sum over all ways to give each of the fewer one of the others."""
    table = [[value(box, target.box) if image == target.image else 0.0 for target in targets]
             for image, box in dict.fromkeys(boxes)]
    if len(table) > len(targets):
        table = [list(column) for column in zip(*table)]
    orders = itertools.permutations(range(len(table[0])), len(table))
    return max(sum(row[place] for row, place in zip(table, order)) for order in orders)


@settings(max_examples=FUZZ, deadline=None)
@given(some_boxes.filter(bool), some_targets.filter(bool), st.randoms())
def test_hungarian_matching_is_brute_force_in_any_order(boxes, targets, rng):
    sample = ask(*targets)
    expected = brute_force(boxes, sample.targets, iou) / max(len(boxes), len(targets))
    assert rewards.match_score(reply_with(*boxes), sample, BOX_FORMAT) == pytest.approx(expected)
    shuffled = reply_with(*rng.sample(boxes, len(boxes)))
    turned = replace(sample, targets=tuple(rng.sample(sample.targets, len(targets))))
    for name in ("box", "format", "image"):
        value = score(name, reply_with(*boxes), sample)
        assert score(name, shuffled, turned) == pytest.approx(value), name
    assert (rewards.is_correct(shuffled, turned, BOX_FORMAT)
            == rewards.is_correct(reply_with(*boxes), sample, BOX_FORMAT))


@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(0, 3), st.tuples(*[coordinates] * 4)), some_targets.filter(bool))
def test_one_box_for_one_target_earns_what_it_always_did(box, targets):
    sample = ask(targets[0])
    today = replace(sample, find_all=False)
    for name in rewards.REWARDS:
        assert score(name, reply_with(box), sample) == score(name, reply_with(box), today), name
    for function in (rewards.reply_iou, rewards.is_correct):
        arguments = (reply_with(box), sample, BOX_FORMAT)
        assert function(*arguments) == function(reply_with(box), today, BOX_FORMAT)


@settings(max_examples=300, deadline=None)
@given(some_boxes.filter(bool), some_targets.filter(bool), st.randoms())
def test_degenerate_and_repeated_boxes_earn_nothing(boxes, targets, rng):
    sample = ask(*targets)
    image, (x1, y1, x2, y2) = rng.choice(boxes)
    for extra in ((image, (x1, y1, x2, y2)), (image, (x1, y1, x1, y2)), (image, (30, 30, 20, 20))):
        before = score("box", reply_with(*boxes), sample)
        assert score("box", reply_with(*boxes, extra), sample) <= before + 1e-12, extra


def test_rewards_by_hand():
    two = ask((1, A), (2, B))
    assert [score(name, reply_with((2, B), (1, A)), two) for name in ("format", "image", "box")] \
        == [1, 1, 1]
    one_of_two = reply_with((1, A))
    assert [score(name, one_of_two, two) for name in ("format", "image", "box")] == [1, 0.5, 0.5]
    one_too_many = reply_with((1, A), (2, B), (2, C))
    assert score("image", one_too_many, two) == 1
    assert score("box", one_too_many, two) == pytest.approx(2 / 3)
    swapped = reply_with((2, A), (1, B))
    assert score("box", swapped, two) == 0
    half = reply_with((1, (0, 0, 28, 14)), (2, B))  # IoU 0.5 and 1
    assert score("box", half, two) == pytest.approx(0.75)
    assert rewards.is_correct(half, two, BOX_FORMAT)
    assert not rewards.is_correct(half, two, BOX_FORMAT, threshold=0.6)
    assert rewards.weakest_iou(half, two, BOX_FORMAT) == 0.5
    overlapping = ask((1, (0, 0, 40, 40)), (1, (0, 0, 40, 50)))  # IoU 0.8 with one another
    twice = reply_with((1, (0, 0, 40, 40)), (1, (0, 0, 40, 40)))
    assert score("box", twice, overlapping) == 0.5, "a repeated box is not two"
    assert not rewards.is_correct(twice, overlapping, BOX_FORMAT)


def test_a_right_none_earns_and_a_wrong_one_does_not():
    right = [score(name, NONE, ask()) for name in ("format", "image", "box")]
    assert right == [1, rewards.RIGHT_NONE, rewards.RIGHT_NONE]
    assert rewards.is_correct(NONE, ask(), BOX_FORMAT)
    for sample in (ask((1, A)), ask((1, A), (2, B))):
        assert all(score(name, NONE, sample) == 0 for name in ("format", "image", "box"))
        assert not rewards.is_correct(NONE, sample, BOX_FORMAT)
    guess = reply_with((1, A))
    assert [score(name, guess, ask()) for name in ("format", "image", "box")] == [1, 0, 0]
    assert not rewards.is_correct(guess, ask(), BOX_FORMAT)


def test_the_filter_and_pass_rates():
    sample = ask((1, A), (2, B))
    shifted = (1, (20, 0, 48, 28))
    for reply, reason in ((reply_with((1, A), (2, B)), ""), (reply_with((1, A)), "image"),
                          (reply_with((1, A), (2, B), (2, C)), "box"), (NONE, "image"),
                          (reply_with(shifted, (2, B)), "box"), ("<answer></answer>", "format"),
                          (reply_with((1, A), (2, B)).replace("Search.", "[0,0,28,28]"), "leak")):
        assert drop_reason(reply, sample, BOX_FORMAT) == reason, reply
    assert drop_reason(NONE, ask(), BOX_FORMAT) == ""
    assert drop_reason(reply_with((1, A)), ask(), BOX_FORMAT) == "image"
    replies = {"q": [NONE, reply_with((1, A)), reply_with((2, B), (1, A)), ""]}
    assert pass_rates([sample], replies, BOX_FORMAT).tolist() == [0.25]
    assert pass_rates([ask()], replies, BOX_FORMAT).tolist() == [0.25]
    assert accuracy_by_detail([sample], replies, BOX_FORMAT)[0]["asked"] == "all boxes"


def test_figures_by_hand():
    samples = [ask((1, A), (2, B)), ask((1, A)), ask(), ask(), ask((2, C))]
    replies = [reply_with((1, A), (2, C)), reply_with((1, A)), NONE, reply_with((1, A)), NONE]
    result = evaluate.summarize_suite(samples, replies, [], BOX_FORMAT)
    assert result["score"] == 40 and result["tasks"]["own"]["acc@0.5"] == 40
    boxes = result["boxes"]
    assert (boxes["n"], boxes["n_none"]) == (5, 2)
    assert boxes["precision"] == 50 and boxes["recall"] == 50 and boxes["f1"] == 50  # 2 of 4, of 4
    assert boxes["rejection"] == 50
    assert boxes["wrong_rejection"] == pytest.approx(100 / 3, abs=1e-9), "not rounded"
    assert boxes["f1_ci95"][0] < 50 < boxes["f1_ci95"][1]
    # Clopper and Pearson for 1 of 2: 1 - sqrt(0.975), sqrt(0.975)
    bounds = [100 - 100 * 0.975 ** 0.5, 100 * 0.975 ** 0.5]
    assert boxes["rejection_ci95"] == pytest.approx(bounds, abs=1e-9)
    silent = evaluate.summarize_boxes(samples, ["", "", "", "", ""], BOX_FORMAT)
    assert silent["precision"] is None and silent["recall"] == 0 and silent["rejection"] == 0
    always = evaluate.summarize_boxes(samples, [NONE] * 5, BOX_FORMAT)
    assert always["rejection"] == always["wrong_rejection"] == 100 and always["f1"] == 0
    one = evaluate.summarize_boxes(samples[1:2], replies[1:2], BOX_FORMAT)
    assert one["rejection"] is None and one["f1"] == 100
    assert "boxes" not in evaluate.summarize_suite([make_sample("diff", "val", 0)], [""], [],
                                                   BOX_FORMAT)
    (row,) = tables.box_rows({"sft": {"find_all": result, "blink": {}}})
    assert row["F1"] == 50 and row["rejection rate"] == 50 and row["questions"] == 5
    assert (row["wrongly none"], row["rejection rate, 95 %"]) == (33.3, [1.3, 98.7]), "rounded"


def test_the_prompt_is_the_same_however_many_boxes_there_are():
    questions = {prompts.format_question(sample, BOX_FORMAT)
                 for sample in (ask(), ask((1, A)), ask((1, A), (2, B)))}
    assert questions == {f"Find every cup. {prompts.ALL_INSTRUCTION}"}
    assert prompts.ALL_INSTRUCTION.startswith(prompts.GROUNDING_INSTRUCTION)


def test_always_none_earns_less_than_a_blind_guess(stage_params):
    weights = stage_params("05_grpo").reward_weights
    questions = [ask(), ask((1, A)), ask((2, A))]  # a third of them without a box

    def mean_reward(replies):
        return np.mean([sum(weights[name] * score(name, reply, sample)
                            for name in ("format", "image", "box"))
                        for sample in questions for reply in replies])

    guesses = [reply_with((image, (60, 60, 80, 80))) for image in (1, 2)]  # it meets no target
    assert mean_reward([NONE]) < mean_reward(guesses)


def test_outcomes_and_rollouts():
    two = ask((1, A), (2, B))
    wrong = (NONE, reply_with((1, A)), reply_with((1, A), (2, B), (2, C)))
    outcomes = {reply_with((1, A), (2, B)): "correct", "": "no answer",
                **dict.fromkeys(wrong, "wrong list of boxes")}
    for reply, outcome in outcomes.items():
        assert report.classify_outcome(reply, two, BOX_FORMAT) == outcome
    assert report.classify_outcome(NONE, ask(), BOX_FORMAT) == "correct"
    row = describe_reply(reply_with((1, A), (2, C), (7, A)), two, BOX_FORMAT, {}, {})
    assert row["boxes"] == [(1, A), (2, C)] and not row["correct"]


def test_a_model_teacher_is_told_all_boxes_or_none():
    two = teacher_prompt(ask((1, A), (2, B)), "trace", BOX_FORMAT)
    assert two.endswith(f"answer is {prompts.format_answers([(1, A), (2, B)])}.")
    assert teacher_prompt(ask(), "trace", BOX_FORMAT).endswith('answer is {"image": 0}.')
    direct = teacher_prompt(ask(), "direct", BOX_FORMAT)
    assert direct == teacher_prompt(ask((1, A)), "direct", BOX_FORMAT) and "<think>" not in direct


def test_none_does_not_count_where_the_images_of_replies_are_swapped():
    samples = [sample for sample in make_suite("find_all", "val", 6) if len(sample.images) == 2]
    replies = [correct_reply(sample, BOX_FORMAT) for sample in samples]
    pairs = _pair_with_other_images(samples, replies)
    assert pairs and all(sample.targets for sample, _, _ in pairs)
    assert all(rewards.is_correct(reply, sample, BOX_FORMAT)
               for sample, reply in zip(samples, replies))
