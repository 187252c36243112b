"""Parts of merging by hand, and folders that cannot be merged."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from published import RELATIVES
from safetensors.torch import save_file

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.engine import merging, models, training


def save_adapter(folder, tensors, **changes):
    folder.mkdir(exist_ok=True)
    LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], **changes).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora_tensors() -> dict[str, torch.Tensor]:
    prefix = "base_model.model.model.layers.0.q_proj"
    return {f"{prefix}.lora_A.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]]),
            f"{prefix}.lora_B.weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]])}


def test_an_adapter_adds_alpha_over_r_times_b_a(tmp_path):
    modules = merging.read_lora(save_adapter(tmp_path / "adapter", lora_tensors()))
    assert list(modules) == ["model.layers.0.q_proj"]
    delta = merging.compute_delta(*modules["model.layers.0.q_proj"], "cpu")
    assert delta.tolist() == [[3.0, 6.0, 9.0], [0.0, 6.0, 0.0]]


def test_adapters_that_are_no_plain_lora_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter; run the stage that trains it"):
        merging.read_lora(tmp_path)
    for changes in ({"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 4}}):
        folder = save_adapter(tmp_path / "adapter", lora_tensors(), **changes)
        with pytest.raises(ValueError, match="is no plain LoRA"):
            merging.read_lora(folder)
    tensors = lora_tensors() | {"base_model.model.lm_head.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="lm_head.weight, which is no LoRA matrix"):
        merging.read_lora(save_adapter(tmp_path / "adapter", tensors))


@pytest.mark.parametrize("family", RELATIVES)
def test_a_relative_with_an_adapter_is_merged_into_its_published_layout(published, family, float32,
                                                                       tmp_path):
    base = published[family]
    policy = models.load_policy(base, float32, BoxFormat(coordinates=Coordinates.NORMALIZED_1000))
    model = get_peft_model(policy.model, training.lora_config(4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merging.write_merged_model(base, tmp_path / "adapter", tmp_path / "merged", float32,
                               policy.processor, four_bit=False)
    sizes = [{name: merging.read_tensor({name: path}, name).shape
              for name, path in merging.locate_tensors(folder).items()}
             for folder in (base, tmp_path / "merged")]
    assert sizes[0] == sizes[1]
    merged, ids = models.load_model(tmp_path / "merged", float32), torch.arange(20, 60)[None]
    with torch.no_grad():
        expected, plain = model(input_ids=ids).logits, model.unload()(input_ids=ids).logits
        logits = merged(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-5) and not torch.allclose(plain, expected)


def test_a_weight_in_4_bit_takes_sixteen_values_of_each_block():
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    rounded = merging.round_to_nf4(weight)
    assert rounded.dtype == weight.dtype and rounded.shape == weight.shape
    assert all(len(row.unique()) <= 16 for row in rounded), "a row is a block"
    assert 0 < (rounded - weight).abs().mean() < 0.15


def test_tensors_are_found_by_their_index_or_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither model.safetensors nor"):
        merging.locate_tensors(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / merging.INDEX).write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="has no two.safetensors, which its index names"):
        merging.locate_tensors(tmp_path)
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    source = merging.locate_tensors(tmp_path)
    assert merging.read_tensor(source, "old name of b", "b").tolist() == [0.0, 0.0]
    with pytest.raises(KeyError, match="the base has no tensor c"):
        merging.read_tensor(source, "c")


@pytest.mark.parametrize(("targets", "part", "shape"), [
    ("all", "self_attn.q_proj", (256, 256)), ("gate_up", "mlp.gate_proj", (704, 256))])
def test_the_matrix_is_the_first_adapted_one(targets, part, shape, float32):
    model = models.load_model(models.TINY_BASE, float32)
    weight = merging.read_projection(models.TINY_BASE, targets)
    loaded = model.model.language_model.layers[0].get_submodule(part).weight
    assert weight.shape == shape and torch.equal(weight, loaded)


def test_the_matrix_is_of_no_layer_that_is_never_loaded(tmp_path):
    ones = torch.ones(2, 2)
    save_file({"mtp.layers.0.self_attn.q_proj.weight": ones * 9,
               "model.language_model.layers.0.linear_attn.in_proj_qkv.weight": ones},
              tmp_path / "model.safetensors")
    assert torch.equal(merging.read_projection(tmp_path, "all"), ones)


def test_the_adapter_of_the_matrix_is_alpha_over_r_times_b_a(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "x"}')
    prefix = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.lora_{}.weight"
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    save_file({prefix.format(0, "A"): a, prefix.format(0, "B"): b, prefix.format(1, "A"): a * 9,
               prefix.format(1, "B"): b * 9}, tmp_path / "adapter_model.safetensors")
    read_a, read_b, delta = merging.read_adapter(tmp_path, "all")
    assert torch.equal(read_a, a) and torch.equal(read_b, b)
    assert delta.tolist() == [[2.0, 4.0]]
