"""Pass rates, pass@k, curation, and replies that a killed stage resumes."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import correct_answer, read_reply
from mig_kit.serving import reply_files
from mig_kit.shared_prefix import generation
from mig_kit.stages import rejection_sampling
from mig_kit.stats import pass_at_k
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
OPTIONS = {"replies": 2, "temperature": 1.0, "max_new_tokens": 6, "seed": 1}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(reply_files, "BATCH_SIZE", 3)


@pytest.mark.parametrize("correct,total,k", [(0, 8, 3), (1, 8, 1), (3, 8, 2), (8, 8, 4), (2, 5, 4)])
def test_pass_at_k_by_counting(correct, total, k):
    outcomes = [1] * correct + [0] * (total - correct)
    draws = list(combinations(outcomes, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(correct, total, k) == pytest.approx(expected)


def test_curate_by_hand():
    samples = [make_sample("diff", "rl", i) for i in range(5)]
    samples += [make_sample("reasoning", "rl", i) for i in range(2)]
    rates = np.array([0, 0.125, 0.5, 0.875, 1, 0.5, 1])
    kept, why = rejection_sampling.select_by_pass_rate(
        samples, rates, lowest=0.1, highest=0.9, per_task=2, seed=0)
    assert why["diff"] == {"below min_pass_rate": 1, "above max_pass_rate": 1, "kept": 2,
                           "over per_task": 1}
    assert why["reasoning"] == {"above max_pass_rate": 1, "kept": 1, "over per_task": 0}
    assert len(kept) == 3 and set(kept) <= {1, 2, 3, 5}


def test_accuracy_by_detail_by_hand():
    sample = make_sample("diff", "rl", 0)
    answer = f"<answer>{correct_answer(sample, BOX_FORMAT)}</answer>"
    thoughts = ["Compare.", "Compare. new: red star.", "Compare. image 1: a. new: red star."]
    replies = [f"<think>{thought}</think>{answer}" for thought in thoughts]
    replies.append("<think>Compare. new: x.</think><answer>?: ?: ?</answer>")
    answers = [read_reply(reply, sample, BOX_FORMAT) for reply in replies]
    rows = rejection_sampling.accuracy_by_detail([sample], {sample.id: answers})
    assert {row["asked"] for row in rows} == {"a box"}
    by_detail = {row["detail"]: (row["n"], row["correct"]) for row in rows}
    assert by_detail == {"method": (1, 1.0), "finding": (2, 0.5), "evidence": (1, 1.0)}


def test_a_killed_run_resumes_to_the_same_replies(tmp_path, random_policy, samples):
    path, cut_path = tmp_path / "replies.jsonl", tmp_path / "cut.jsonl"
    replies = reply_files.sample_replies(random_policy, samples, path, **OPTIONS)
    lines = path.read_text().splitlines()
    cut_path.write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    resumed = reply_files.sample_replies(random_policy, samples, cut_path, **OPTIONS)
    assert resumed == replies
    assert sorted(cut_path.read_text().splitlines()) == sorted(lines)


@pytest.mark.slow
def test_batches_side_by_side_give_the_same_replies(tmp_path, random_policy, samples, monkeypatch):
    monkeypatch.setattr(reply_files, "BATCH_SIZE", 2)
    alone, parallel = tmp_path / "alone.jsonl", tmp_path / "parallel.jsonl"
    threads, stock = torch.get_num_threads(), reply_files.map_in_threads
    with monkeypatch.context() as context:
        context.setattr(reply_files, "map_in_threads", lambda *parts, **_: stock(*parts[:2], 1))
        torch.set_num_threads(1)  # as each batch has beside another
        replies = reply_files.sample_replies(random_policy, samples, alone, **OPTIONS)
    torch.set_num_threads(threads)
    before = {name: value.clone() for name, value in random_policy.model.state_dict().items()}
    assert reply_files.sample_replies(random_policy, samples, parallel, **OPTIONS) == replies
    assert parallel.read_bytes() == alone.read_bytes()
    after = random_policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_questions_about_the_same_images_are_asked_together(tmp_path, random_policy, samples,
                                                            monkeypatch):
    questions = [replace(samples[i], id=f"{turn}/{i}", question="Where?" * (1 + turn))
                 for turn in range(3) for i in range(3)]
    options = OPTIONS | {"replies": 1, "temperature": 0.0}
    monkeypatch.setattr(reply_files, "BATCH_SIZE", 1)
    alone = reply_files.sample_replies(random_policy, questions, tmp_path / "alone.jsonl",
                                       **options)
    monkeypatch.setattr(reply_files, "BATCH_SIZE", 3)
    monkeypatch.setattr(reply_files, "CPU_WORKERS", 3)
    batches, generate = [], generation._generate_round

    def record_prompts(model, processor, prompts, *arguments):
        batches.append(prompts)
        return generate(model, processor, prompts, *arguments)

    monkeypatch.setattr(generation, "_generate_round", record_prompts)
    together = reply_files.sample_replies(random_policy, questions, tmp_path / "together.jsonl",
                                       **options)
    assert together == alone
    assert [len({prompt.image_digests for prompt in batch}) for batch in batches] == [1, 1, 1]


def test_greedy_replies_are_those_that_are_sampled_at_temperature_0(tmp_path, random_policy,
                                                                    samples):
    options = OPTIONS | {"replies": 1, "temperature": 0.0}
    drawn = reply_files.sample_replies(random_policy, samples, tmp_path / "drawn.jsonl", **options)
    greedy = reply_files.greedy_replies(random_policy, samples, options["max_new_tokens"])
    assert [drawn[sample.id] for sample in samples] == [[reply] for reply in greedy]


@pytest.mark.parametrize(("rates", "sentence"), [
    ([0.0, 0.0], "no reply to the 2 candidates is correct: RL only strengthens what a model "
                 "sometimes gets right; let it learn from traces first "),
    ([1.0, 1.0], "every reply to the 2 candidates is correct, so RL has nothing to add; give "),
    ([0.0, 0.05], "min_pass_rate and max_pass_rate, for they are 0.00 to 0.05; widen them, wit")])
def test_no_prompt_to_keep_says_what_helps(rates, sentence):
    with pytest.raises(ValueError) as caught:
        rejection_sampling.require_prompts([], np.array(rates))
    assert sentence in str(caught.value)
    rejection_sampling.require_prompts([make_sample("diff", "rl", 0)], np.array(rates))
