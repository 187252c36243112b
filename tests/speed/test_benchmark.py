"""Stage 08 on a random model: the work by hand, and that both sides do the same."""

import time

import pytest
import torch

from mig_kit.speed import benchmark
from mig_kit.speed.benchmark import Workload


def test_questions_have_images_of_one_size():
    made = benchmark.make_questions(Workload(images=3, side=112), 2)
    assert [image.size for image in made[1].images] == [(112, 112)] * 3 and made[0].id != made[1].id
    assert benchmark.make_questions(Workload(images=3, side=112), 2)[0].question == made[0].question


def test_some_questions_are_about_the_same_images():
    made = benchmark.make_questions(Workload(images=2, side=56), 10, alike=5)
    assert len({s.question for s in made[:5]}) == 5 == len({s.question for s in made[5:]})
    assert [s.images[0] is made[0].images[0] for s in made] == [True] * 5 + [False] * 5


def test_turns_are_timed(float32):
    found = benchmark.compare_times(lambda: time.sleep(0.03), lambda: time.sleep(0.01), 3, float32)
    assert 1.5 < found["ratio"] < 4 and found["stock_spread"][0] >= 0.03 and found["kit_spread"][1] >= found["kit_s"]


def test_peak_memory_sees_what_is_freed_again(float32):
    def call():
        held = torch.ones(64, 2**18)  # 64 MiB
        time.sleep(0.05)
        return float(held.sum())

    assert 55 < benchmark.peak_memory(call, float32) < 120


def test_minimal_work_by_hand(random_model):
    language = random_model.model.language_model
    weights = sum(p.numel() for p in language.layers.parameters() if p.ndim > 1)
    shape = language.config
    every, pairs = 10 + 2 * 3, 10**2 / 2 + 2 * (3 * 10 + 3**2 / 2)
    assert (len(language.layers), shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads) == (2, 64, 2, 1)
    unread = 2 * 64 * 64 + 3 * 64 * shape.intermediate_size  # q_proj, o_proj and the MLP of the last layer, for 9 tokens
    wanted = 4 * every * weights - 4 * 9 * unread + 4 * 6 * 64 * shape.vocab_size
    wanted += 12 * 64 * (2 * pairs - 10**2 / 2 + 10)
    assert benchmark.minimal_flops(random_model, 10, 2, 3) == wanted


@pytest.mark.slow
def test_both_sides_do_the_same(tmp_path, random_folder, float32):
    load = Workload(images=2, group=4, tokens=6, side=84, prompts=2)
    pair = benchmark.TrainerPair(random_folder, float32, load, tmp_path)
    for share in (False, True):
        batch = pair.rollout(share)
        assert batch["completion_mask"].sum().item() == 2 * 4 * 6, "a reply ended early"
        before = [p.clone() for p in pair.trainers[share].model.parameters() if p.requires_grad]
        pair.step(share)
        after = [p for p in pair.trainers[share].model.parameters() if p.requires_grad]
        assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert benchmark.TrainerPair(random_folder, float32, load, tmp_path / "b").gradient_error(pair.batches()) < 1e-4


@pytest.mark.slow
def test_headline_compares_all_six(tmp_path, random_folder, float32):
    found = benchmark.run_headline(random_folder, float32, Workload(2, 2, 4, 56, 1), tmp_path, 1)
    assert all(found[name]["stock_s"] > 0 and found[name]["kit_s"] > 0 for name in benchmark.STAGES)
    assert found["grad_rel_error"] < 1e-4 and set(found["peak_mem_mb"]) == {"stock", "kit"}
    assert found["prompt_tokens"] > 8


def test_no_point_of_the_speed_up_is_cut_off():
    from mig_kit import plots

    usual = {"images": 6, "group": 8, "tokens": 64, "prompts": 1, "prompt_tokens": 1292}
    loads = [usual, {**usual, "images": 1, "prompt_tokens": 277}, {**usual, "group": 16}, {**usual, "tokens": 16},
             {**usual, "prompts": 4}]
    ratios = (5.0, 2.0, 9.4, 8.4, 8.0)
    rows = [{**load, "stage": stage, "ratio": ratio} for load, ratio in zip(loads, ratios) for stage in ("rollout", "train")]
    axes = plots.plot_speedup(rows, "Times as fast").axes
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 9.4 for axis in axes)
    drawn = [sorted({float(x) for line in axis.get_lines()[:2] for x in line.get_xdata()}) for axis in axes]
    assert drawn == [[277, 1292], [8, 16], [16, 64], [1, 4]]
