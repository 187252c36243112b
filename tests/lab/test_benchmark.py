"""Stage 08 on a random model: the work by hand, and what is measured."""

import time

import torch

from mig_kit.drawing import plots
from mig_kit.lab import benchmark, workload
from mig_kit.lab.workload import Workload


def test_questions_have_images_of_one_size_and_some_the_same_images():
    first, second = workload.make_questions(Workload(images=3, side=112), 2)
    assert [image.size for image in second.images] == [(112, 112)] * 3 and first.id != second.id
    again = workload.make_questions(Workload(images=3, side=112), 2)
    assert again[0].question == first.question
    samples = workload.make_questions(Workload(images=2, side=56), 10, alike=5)
    assert len({sample.question for sample in samples[:5]}) == 5
    assert len({sample.question for sample in samples[5:]}) == 5
    shares_images = [sample.images[0] is samples[0].images[0] for sample in samples]
    assert shares_images == [True] * 5 + [False] * 5


def test_turns_are_timed(float32, capsys):
    calls = lambda: time.sleep(0.03), lambda: time.sleep(0.01)
    times = workload.compare_times(*calls, 3, float32, "train")
    assert capsys.readouterr().out.startswith("train          stock    0.")
    assert 1.5 < times["ratio"] < 4 and times["stock_spread"][0] >= 0.03
    assert times["kit_spread"][1] >= times["kit_s"]


def test_peak_memory_sees_what_is_freed_again(float32):
    def call():
        ones = torch.ones(64, 2**18)  # 64 MiB
        time.sleep(0.05)
        return float(ones.sum())

    assert 55 < workload.peak_memory(call, float32) < 120


def test_minimal_work_by_hand(random_model):
    language = random_model.model.language_model
    weights = sum(p.numel() for p in language.layers.parameters() if p.ndim > 1)
    config = language.config
    assert (len(language.layers), config.hidden_size) == (2, 64)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    tokens, pairs = 10 + 2 * 3, 10**2 / 2 + 2 * (3 * 10 + 3**2 / 2)
    # q_proj, o_proj and the MLP of the last layer, for 9 tokens
    unread = 2 * 64 * 64 + 3 * 64 * config.intermediate_size
    expected = 4 * tokens * weights - 4 * 9 * unread + 4 * 6 * 64 * config.vocab_size
    expected += 12 * 64 * (2 * pairs - 10**2 / 2 + 10)
    assert benchmark.minimal_flops(random_model, 10, 2, 3) == expected


def test_the_sweep_changes_one_thing_at_a_time():
    single = Workload(prompts=1)
    changed = [{name: value for name, value in vars(load).items() if value != vars(single)[name]}
               for load in benchmark.sweep_loads(Workload())]
    assert changed == [{"images": 1}, {"images": 2}, {"images": 4}, {}, {"group": 4},
                       {"group": 16}, {"tokens": 16}, {"tokens": 128}, {"prompts": 2},
                       {"prompts": 4}], "every load once"
    few = benchmark.sweep_loads(Workload(images=2, group=2, tokens=4, prompts=1))
    assert min(load.group for load in few) == min(load.tokens for load in few) == 2


def test_no_point_of_the_speed_up_is_cut_off():
    usual = {"images": 6, "group": 8, "tokens": 64, "prompts": 1, "prompt_tokens": 1292}
    loads = [usual, {**usual, "images": 1, "prompt_tokens": 277}, {**usual, "group": 16},
             {**usual, "tokens": 16}, {**usual, "prompts": 4}]
    ratios = (5.0, 2.0, 9.4, 8.4, 8.0)
    rows = [{**load, "stage": stage, "ratio": ratio}
            for load, ratio in zip(loads, ratios) for stage in ("rollout", "train")]
    axes = plots.plot_speedup(rows, "Times as fast").axes
    assert all(axis.get_ylim()[0] == 0 and axis.get_ylim()[1] > 9.4 for axis in axes)
    drawn = [sorted({float(x) for line in axis.get_lines()[:2] for x in line.get_xdata()})
             for axis in axes]
    assert drawn == [[277, 1292], [8, 16], [16, 64], [1, 4]]
