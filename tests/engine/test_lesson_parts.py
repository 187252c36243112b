"""What notebooks look at of a model's files: prompt tokens, a matrix and its adapter."""

import pytest
import torch
from safetensors.torch import save_file

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.engine import lesson_parts, models
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


@pytest.mark.parametrize("base_model", ["tiny", "Qwen/Qwen2.5-VL-7B-Instruct"])
def test_every_image_takes_a_token_for_each_square_of_28_pixels(base_model):
    sample = make_sample("diff", "val", 0)
    tokens, sizes = lesson_parts.read_prompt(base_model, sample, BOX_FORMAT)
    assert sizes == [seen_size(size, BOX_FORMAT) for size in sample.sizes]
    n_squares = sum(width * height // 28**2 for width, height in sizes)
    assert tokens.count("<|image_pad|>") == n_squares > 2
    assert sample.question in "".join(tokens)


@pytest.mark.parametrize(("targets", "part", "shape"), [
    ("all", "self_attn.q_proj", (256, 256)), ("gate_up", "mlp.gate_proj", (704, 256))])
def test_the_matrix_is_the_first_adapted_one(targets, part, shape, float32):
    model = models.load_model(models.TINY_BASE, float32)
    weight = lesson_parts.read_projection(models.TINY_BASE, targets)
    loaded = model.model.language_model.layers[0].get_submodule(part).weight
    assert weight.shape == shape and torch.equal(weight, loaded)


def test_the_matrix_is_of_no_layer_that_is_never_loaded(tmp_path):
    ones = torch.ones(2, 2)
    save_file({"mtp.layers.0.self_attn.q_proj.weight": ones * 9,
               "model.language_model.layers.0.linear_attn.in_proj_qkv.weight": ones},
              tmp_path / "model.safetensors")
    assert torch.equal(lesson_parts.read_projection(tmp_path, "all"), ones)


def test_the_adapter_of_the_matrix_is_alpha_over_r_times_b_a(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "x"}')
    prefix = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_{}.weight"
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    save_file({prefix.format(0, "A"): a, prefix.format(0, "B"): b, prefix.format(1, "A"): a * 9,
               prefix.format(1, "B"): b * 9}, tmp_path / "adapter_model.safetensors")
    read_a, read_b, delta = lesson_parts.read_adapter(tmp_path, "all")
    assert torch.equal(read_a, a) and torch.equal(read_b, b)
    assert delta.tolist() == [[2.0, 4.0]]
