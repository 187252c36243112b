"""The prediction of GPU memory and time: parts by hand, and the measured part against a model it was not fitted on."""

import pytest
import torch

from mig_kit.engine import models
from mig_kit.speed import gpu_memory, gpu_time
from mig_kit.speed.gpu_memory import GIB, SHAPES, StageLoad

SEVEN = SHAPES["Qwen/Qwen2.5-VL-7B-Instruct"]


def test_what_a_layer_keeps_is_linear_in_its_widths():
    a, b, c = gpu_memory.layer_bytes(16, 0.05)
    two, three = (gpu_memory.saved_bytes(320, 704, layers, 96, 16, 0.05) for layers in (2, 3))
    assert (three - two) / 96 == pytest.approx(320 * a + 704 * b + c, rel=0.03)
    assert a > 0 and b > 0


def test_weights_and_adapters_by_hand():
    assert SEVEN.linear == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    parts = gpu_memory.training_memory(SEVEN, StageLoad(1000, rank=64), False)
    assert parts["weights"] == pytest.approx(8_292_166_656 * 2 / GIB)
    adapters = 28 * 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert parts["adapter, gradients, Adam"] == pytest.approx(16 * adapters / GIB)
    four = gpu_memory.training_memory(SEVEN, StageLoad(1000, rank=64), True)["weights"]
    assert four == pytest.approx((SEVEN.linear * 0.515869 + (SEVEN.total - SEVEN.linear) * 4) / GIB, rel=1e-4)


def test_replies_share_the_keys_of_their_prompt():
    one, eight = (gpu_memory.decoding_memory(SEVEN, StageLoad(3000, replies=n, tokens=100))["keys and values"] for n in (1, 8))
    assert one * GIB == pytest.approx(3100 * 28 * 4 * 128 * 2 * 2) and eight / one == pytest.approx(3800 / 3100)


def test_checkpoints_keep_less_and_more_prompts_need_more():
    whole, light = (gpu_memory.training_memory(SEVEN, StageLoad(3000, checkpointed=c), True)["activations"] for c in (False, True))
    assert light < whole / 5
    held = [gpu_memory.training_memory(SEVEN, StageLoad(3000, 2, 8, 100, kept=kept), False)["activations"] for kept in (1, 2)]
    assert held[1] == pytest.approx(2 * held[0])


@pytest.mark.parametrize("profile", ["qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_the_table_says_what_to_lower(profile):
    params = gpu_memory.profile_params(profile)
    shape = gpu_memory.find_shape(params["02_sft"]["base_model"])
    rows = {row["stage"]: row for row in gpu_memory.memory_table(gpu_memory.predict_memory(shape, params))}
    assert list(rows) == list(gpu_memory.ADVICE)
    for row in rows.values():
        fits = [row[f"{gpu} GB"] == "fits" for gpu in gpu_memory.GPUS]
        assert fits == sorted(fits), "a larger GPU holds what a smaller one holds"
        assert all(row[f"{gpu} GB"] in ("fits", gpu_memory.ADVICE[row["stage"]]) for gpu in gpu_memory.GPUS)
    pixels = gpu_memory.fitting_pixels(shape, params, 141)
    changed = {stage: {**values, "max_pixels": pixels} for stage, values in params.items()}
    assert all(row["141 GB"] == "fits" for row in gpu_memory.memory_table(gpu_memory.predict_memory(shape, changed)))


def test_a_folder_is_counted_and_an_unknown_name_is_not_downloaded(relatives):
    shape = gpu_memory.find_shape(str(relatives["qwen3_vl"]))
    weights = models.load_model(relatives["qwen3_vl"], models.Hardware("cpu", torch.float32, False, "sdpa", "test"))
    assert shape.total == sum(p.numel() for p in weights.parameters()) and (shape.head, shape.side) == (32, 32)
    assert gpu_memory.find_shape("somebody/else") is None


def test_forward_passes_by_hand():
    assert gpu_time.language_flops(SEVEN, 100) == 2 * SEVEN.linear * 100 + 28 * 4 * 28 * 128 * 100 * 50
    later = gpu_time.language_flops(SEVEN, 100, 900)
    assert gpu_time.language_flops(SEVEN, 900) + later == pytest.approx(gpu_time.language_flops(SEVEN, 1000))


def test_time_grows_with_what_is_asked_and_shrinks_with_the_card():
    params = gpu_memory.profile_params("qwen2_5_vl_7b")
    base = gpu_time.predict_seconds(SEVEN, params, 80)
    assert all(gpu_time.predict_seconds(SEVEN, params, 141)[stage] < value for stage, value in base.items())
    doubled = gpu_time.predict_seconds(SEVEN, {**params, "05_grpo": {**params["05_grpo"], "num_generations": 16, "batch_size": 16}}, 80)
    assert 1 < doubled["05_grpo"] / base["05_grpo"] < 2, "the prompt is read once, the weights are read for all replies at once"
    without = gpu_time.predict_seconds(SEVEN, {**params, "05_grpo": {**params["05_grpo"], "beta": 0.0}}, 80)
    assert without["05_grpo"] < base["05_grpo"]


def test_counts_of_a_profile_by_hand():
    params = gpu_memory.profile_params("qwen2_5_vl_7b")
    drawn, read = params["01_synthesize"], {**params["01_synthesize"], "data": "mgrounding", "data_limit": 4000}
    assert gpu_time.count_work(params)["02_sft"] == 10 * drawn["cot_per_task"] + 7 * drawn["free_form_per_task"]
    several = {**drawn, "rl_per_task": 3, "rl_free_form_per_task": 2, "rl_boxes_per_task": 7}
    assert gpu_time.count_work({**params, "01_synthesize": several})["04_rejection_sampling"] == 10 * 3 + 5 * 2 + 2 * 7
    found = gpu_time.count_work({**params, "01_synthesize": read, "06_evaluate": {**params["06_evaluate"], "benchmark_limit": 50}})
    assert (found["02_sft"], found["04_rejection_sampling"], found["06_evaluate"]) == (3000, 800, 150)
    assert found["05_grpo"] == 500 * 16 * 8 // 8
