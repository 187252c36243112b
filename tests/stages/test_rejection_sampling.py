"""Pass rates, pass@k, curation and resuming."""

import json
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.engine import sampling
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.prompts import format_answer
from mig_kit.stages import rejection_sampling as rs
from mig_kit.stats import pass_at_k
from mig_kit.world.tasks import make_sample


@pytest.mark.parametrize("right,total,k", [(0, 8, 3), (1, 8, 1), (3, 8, 2), (8, 8, 4), (2, 5, 4)])
def test_pass_at_k_by_counting(right, total, k):
    marks = [1] * right + [0] * (total - right)
    sets = list(combinations(marks, k))
    assert pass_at_k(right, total, k) == pytest.approx(sum(any(s) for s in sets) / len(sets))


def test_curate_by_hand():
    samples = [make_sample("diff", "rl", i) for i in range(5)] + [make_sample("reasoning", "rl", i) for i in range(2)]
    rates = np.array([0, 0.125, 0.5, 0.875, 1, 0.5, 1])
    kept, why = rs.select_by_pass_rate(samples, rates, lowest=0.1, highest=0.9, per_task=2, seed=0)
    assert why["diff"] == {"never correct": 1, "always correct": 1, "kept": 2, "over the task's share": 1}
    assert why["reasoning"] == {"always correct": 1, "kept": 1, "over the task's share": 0}
    assert len(kept) == 3 and {s.id for s in kept} <= {samples[i].id for i in (1, 2, 3, 5)}


def test_by_detail_by_hand():
    sample = make_sample("diff", "rl", 0)
    image, box = sample.targets[0]
    answer = f"<answer>{format_answer(image, to_model_box(box, sample.sizes[image - 1], box_format=BoxFormat()))}</answer>"
    thoughts = ["Compare.", "Compare. new: red star.", "Compare. image 1: a. new: red star."]
    replies = [f"<think>{t}</think>{answer}" for t in thoughts] + ["<think>Compare. new: x.</think><answer>?: ?: ?</answer>"]
    rows = {row["detail"]: (row["n"], row["right"]) for row in rs.accuracy_by_detail([sample], {sample.id: replies}, BoxFormat())}
    assert rows == {"method": (1, 1.0), "finding": (2, 0.5), "evidence": (1, 1.0)}


def test_a_cut_line_is_dropped_and_the_rest_kept(tmp_path):
    path = tmp_path / "replies.jsonl"
    path.write_text(json.dumps({"id": "a", "replies": ["x"]}) + "\n" + '{"id": "b", "rep')
    assert sampling.load_replies(path) == {"a": ["x"]}
    assert path.read_text().count("\n") == 1


def test_a_killed_run_resumes_to_the_same_replies(tmp_path, random_model, processor, samples):
    options = dict(replies=2, temperature=1.0, max_new_tokens=6, batch_size=3, seed=1, box_format=BoxFormat(), autocast=False)
    whole = sampling.sample_replies(random_model, processor, samples, tmp_path / "whole.jsonl", **options)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:20])
    resumed = sampling.sample_replies(random_model, processor, samples, tmp_path / "cut.jsonl", **options)
    assert resumed == whole
    assert sorted((tmp_path / "cut.jsonl").read_text().splitlines()) == sorted(lines)


@pytest.mark.slow
def test_batches_side_by_side_give_the_same_replies(tmp_path, random_model, processor, samples):
    options = dict(replies=2, temperature=1.0, max_new_tokens=6, batch_size=2, seed=1, box_format=BoxFormat(), autocast=True)
    one = sampling.sample_replies(random_model, processor, samples, tmp_path / "one.jsonl", **options)
    before = {name: value.clone() for name, value in random_model.state_dict().items()}
    two = sampling.sample_replies(random_model, processor, samples, tmp_path / "two.jsonl", **options, workers=2)
    assert two == one and (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert all(torch.equal(value, before[name]) for name, value in random_model.state_dict().items())


def test_prompts_made_ready_before_give_the_same_replies(tmp_path, random_model, processor, samples, monkeypatch):
    options = dict(replies=2, temperature=1.0, max_new_tokens=6, batch_size=3, seed=1, box_format=BoxFormat(), autocast=False)
    alone = sampling.sample_replies(random_model, processor, samples, tmp_path / "alone.jsonl", **options)
    cache = PromptCache(random_model, processor, BoxFormat())
    greedy = options | {"replies": 1, "temperature": 0.0}
    sampling.sample_replies(random_model, processor, samples, tmp_path / "greedy.jsonl", cache=cache, **greedy)
    monkeypatch.setattr(cache, "_encode", lambda samples: pytest.fail("encoded again") if samples else None)
    assert sampling.sample_replies(random_model, processor, samples, tmp_path / "drawn.jsonl", cache=cache, **options) == alone


def test_questions_about_the_same_images_are_asked_together(tmp_path, random_model, processor, samples, monkeypatch):
    asked = [replace(samples[i], id=f"{turn}/{i}", question="Where?" * (1 + turn)) for turn in range(3) for i in range(3)]
    options = dict(replies=1, temperature=0.0, max_new_tokens=6, seed=1, box_format=BoxFormat(), autocast=False)
    alone = sampling.sample_replies(random_model, processor, asked, tmp_path / "alone.jsonl", batch_size=1, **options)
    batches, drawn = [], sampling.generate_rollouts
    monkeypatch.setattr(sampling, "generate_rollouts", lambda m, p, prompts, *more: batches.append(prompts) or drawn(m, p, prompts, *more))
    assert sampling.sample_replies(random_model, processor, asked, tmp_path / "together.jsonl", batch_size=3, **options) == alone
    assert [len({p.images for p in batch}) for batch in batches] == [1, 1, 1]


def test_no_replies_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="replies is 0; a prompt needs at least one"):
        sampling.sample_replies(None, None, [], tmp_path / "x.jsonl", replies=0, temperature=1.0, max_new_tokens=1,
                          batch_size=1, seed=0, box_format=BoxFormat(), autocast=False)
