"""The prediction of GPU memory: parts by hand, and the measured part against a model it was not fitted on."""

import pytest

from mig_kit import gpu_memory
from mig_kit.gpu_memory import GIB, SHAPES, Work

SEVEN = SHAPES["Qwen/Qwen2.5-VL-7B-Instruct"]


def test_what_a_layer_keeps_is_linear_in_its_widths():
    a, b, c = gpu_memory.layer_bytes(16, 0.05)
    two, three = (gpu_memory.saved_bytes(320, 704, layers, 96, 16, 0.05) for layers in (2, 3))
    assert (three - two) / 96 == pytest.approx(320 * a + 704 * b + c, rel=0.03)
    assert a > 0 and b > 0


def test_weights_and_adapters_by_hand():
    assert SEVEN.linear == 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    parts = gpu_memory.training(SEVEN, Work(1000, rank=64), False)
    assert parts["weights"] == pytest.approx(8_292_166_656 * 2 / GIB)
    adapters = 28 * 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert parts["adapter, gradients, Adam"] == pytest.approx(16 * adapters / GIB)
    four = gpu_memory.training(SEVEN, Work(1000, rank=64), True)["weights"]
    assert four == pytest.approx((SEVEN.linear * 0.515869 + (SEVEN.total - SEVEN.linear) * 4) / GIB, rel=1e-4)


def test_replies_share_the_keys_of_their_prompt():
    one, eight = (gpu_memory.decoding(SEVEN, Work(3000, replies=n, tokens=100))["keys and values"] for n in (1, 8))
    assert one * GIB == pytest.approx(3100 * 28 * 4 * 128 * 2 * 2) and eight / one == pytest.approx(3800 / 3100)


def test_checkpoints_keep_less_and_more_prompts_need_more():
    whole, light = (gpu_memory.training(SEVEN, Work(3000, checkpointed=c), True)["activations"] for c in (False, True))
    assert light < whole / 5
    held = [gpu_memory.training(SEVEN, Work(3000, 2, 8, 100, kept=kept), False)["activations"] for kept in (1, 2)]
    assert held[1] == pytest.approx(2 * held[0])


@pytest.mark.parametrize("profile", ["qwen2_5_vl_3b", "qwen2_5_vl_7b"])
def test_the_table_says_what_to_lower(profile):
    params = gpu_memory.profile_params(profile)
    model = params["02_sft"]["base_model"]
    rows = {row["stage"]: row for row in gpu_memory.table(gpu_memory.needs(model, params))}
    assert list(rows) == list(gpu_memory.ADVICE)
    for row in rows.values():
        fits = [row[f"{gpu} GB"] == "fits" for gpu in gpu_memory.GPUS]
        assert fits == sorted(fits), "a larger GPU holds what a smaller one holds"
        assert all(row[f"{gpu} GB"] in ("fits", gpu_memory.ADVICE[row["stage"]]) for gpu in gpu_memory.GPUS)
    pixels = gpu_memory.fitting_pixels(model, params, 141)
    changed = {stage: {**values, "max_pixels": pixels} for stage, values in params.items()}
    assert all(row["141 GB"] == "fits" for row in gpu_memory.table(gpu_memory.needs(model, changed)))
