"""The prediction of GPU memory: parts by hand, and what a layer keeps as measured."""

import pytest
import torch
from peft import get_peft_model
from published import CONFIGS
from transformers import Qwen3_5Config

from mig_kit.lab import gpu_needs
from mig_kit.lab.gpu_needs import GIB, SHAPES, Load, Shape
from mig_kit.models import loading
from mig_kit.shared_prefix import prompt_cache
from mig_kit.training.resuming import lora_config
from tiny_base.config import tiny_config

SEVEN = SHAPES["Qwen/Qwen2.5-VL-7B-Instruct"]


def attention_config(hidden: int, inner: int, layers: int):
    """A small Qwen2.5-VL."""
    config = tiny_config(640, hidden=hidden, layers=layers, vision_layers=1)
    config.text_config.intermediate_size = inner
    return config


def delta_net_config(hidden: int, inner: int, layers: int, heads: int, width: int):
    """A small Qwen3.5, all of whose layers have linear attention, twice as many value heads."""
    config = dict(CONFIGS["qwen3_5"])
    config["text_config"] = config["text_config"] | {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "layer_types": ["linear_attention"] * layers, "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads, "linear_key_head_dim": width,
        "linear_value_head_dim": width}
    return Qwen3_5Config(**config)


def saved_bytes(config, tokens: int, lora_r: int) -> int:
    """Bytes that the language model of a random model keeps for its backward pass."""
    hidden = config.text_config.hidden_size
    model = loading.FAMILIES[config.model_type]._from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, lora_config(lora_r, 0.05)).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}  # by address: tensors stay here, so that no address is used twice

    def keep(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept[address] = tensor
        return tensor

    embeds = torch.zeros(1, tokens, hidden, dtype=torch.bfloat16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prompt_cache.unwrap_peft(model).model.language_model(inputs_embeds=embeds, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("hidden, inner, tokens, lora_r",
                         [(128, 256, 64, 64), (320, 704, 96, 16), (256, 512, 64, 128)])
def test_a_layer_keeps_what_is_predicted(hidden, inner, tokens, lora_r):
    two, one = (saved_bytes(attention_config(hidden, inner, layers), tokens, lora_r)
                for layers in (2, 1))
    shape = Shape(hidden, inner, 2, hidden // 32, hidden // 64, 640, 0)
    assert (two - one) / tokens == pytest.approx(gpu_needs.layer_bytes(shape, lora_r), rel=0.005)


@pytest.mark.parametrize("hidden, inner, heads, width", [(256, 512, 2, 64), (512, 1536, 4, 32)])
def test_a_layer_with_linear_attention_keeps_what_is_predicted(hidden, inner, heads, width):
    two, one = (saved_bytes(delta_net_config(hidden, inner, layers, heads, width), 256, 16)
                for layers in (2, 1))
    shape = Shape(hidden, inner, 2, 2, 1, 640, 0, 32, 32, 2, heads * width, 2 * heads * width,
                  2 * heads, width)
    assert (two - one) / 256 == pytest.approx(gpu_needs.layer_bytes(shape, 16), rel=0.005)


def test_weights_and_adapters_by_hand():
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert SEVEN.linear_weights == 28 * layer
    parts, four_bit_parts = (gpu_needs.training_memory(SEVEN, Load(1000), 64, False, four_bit)
                             for four_bit in (False, True))
    assert parts["weights"] == pytest.approx(8_292_166_656 * 2 / GIB)
    adapters = 28 * 64 * (2 * 2 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert parts["adapter, gradients, Adam"] == pytest.approx(16 * adapters / GIB)
    four_bit = 28 * layer * 0.515869 + (SEVEN.total - 28 * layer) * 4
    assert four_bit_parts["weights"] == pytest.approx(four_bit / GIB, rel=1e-4)


@pytest.mark.parametrize("profile, gib", [("qwen2_5_vl_3b", [11.8, 10.3, 17.5, 10.1]),
                                          ("qwen2_5_vl_7b", [18.2, 19.2, 29.4, 18.8]),
                                          ("qwen3_vl_8b_own", [18.6, 20.8, 30.3, 19.8]),
                                          ("qwen3_5_9b_own", [21.7, 21.7, 34.8, 20.6])])
def test_the_predictions_are_those_of_the_guide(profile, gib):
    assert gpu_needs.predict("tiny") == {"advice": [], "memory": []}
    needs = gpu_needs.predict(profile)
    assert {row["stage"]: row["GiB"] for row in needs["memory"]} == dict(
        zip(gpu_needs.ADVICE, gib))
    assert needs["advice"][-1] == "141 GB: all stages fit"
    fits_24_gb = max(gib) <= 0.93 * 24
    assert (needs["advice"][0] == "24 GB: all stages fit") is fits_24_gb
    assert fits_24_gb or gpu_needs.ADVICE["05_grpo"] in needs["advice"][0]


def test_a_folder_is_counted_and_an_unknown_name_is_not_downloaded(relatives):
    shape = gpu_needs.find_shape(str(relatives["qwen3_vl"]))
    hardware = loading.Hardware("cpu", torch.float32, False, "sdpa", "test")
    weights = loading.load_model(relatives["qwen3_vl"], hardware)
    assert shape.total == sum(parameter.numel() for parameter in weights.parameters())
    assert (shape.head_dim, shape.token_side) == (32, 32)
    assert gpu_needs.find_shape("somebody/else") is None
