"""Parts of merging by hand, and folders that cannot be merged."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.common import UserError
from mig_kit.models import adapters, loading, merging
from mig_kit.shared_prefix.prompt_cache import unwrap_peft
from mig_kit.training import resuming

LANGUAGE = r".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
# changes to a LoraConfig -> what the refusal names, "" where the merge equals stock PEFT's
KINDS = [
    ({}, ""), ({"target_modules": "all-linear"}, ""),
    ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, ""),
    ({"use_rslora": True}, "use_rslora"), ({"use_dora": True}, "use_dora"),
    ({"init_lora_weights": False}, ""), ({"bias": "all"}, "bias"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"), ({"modules_to_save": ["norm"]}, "modules"),
    ({"target_modules": ["embed_tokens"]}, "embed_tokens")]


@pytest.mark.parametrize(("changes", "refusal"), KINDS, ids=[str(kind) for kind, _ in KINDS])
@pytest.mark.filterwarnings("ignore")
def test_a_plain_lora_is_merged_as_by_peft_and_another_is_refused(
        changes, refusal, random_folder, float32, processor, tmp_path):
    torch.manual_seed(0)
    stock = [Qwen2_5_VLForConditionalGeneration.from_pretrained(random_folder) for _ in range(2)]
    model = get_peft_model(stock[0], LoraConfig(
        **{"r": 4, "lora_alpha": 12, "target_modules": LANGUAGE, **changes}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    arguments = (random_folder, tmp_path / "adapter", tmp_path / "merged", float32, processor)
    if refusal:
        with pytest.raises(UserError, match=f"no plain LoRA .*{refusal}.*; merge it with PEFT"):
            merging.write_merged_model(*arguments, four_bit=False)
        assert not (tmp_path / "merged").exists()
        return
    merging.write_merged_model(*arguments, four_bit=False)
    plain, *others = [
        [each(input_ids=torch.arange(20, 60)[None]).logits,
         unwrap_peft(each).model.visual(torch.ones(64, 1176), torch.tensor([[1, 8, 8]]))[1]]
        for each in (loading.load_model(random_folder, float32),
                     loading.load_model(tmp_path / "merged", float32),
                     PeftModel.from_pretrained(stock[1], tmp_path / "adapter").eval())]
    for merged, expected in zip(*others):
        assert torch.allclose(merged, expected, atol=2e-5)
    assert not torch.allclose(plain[0], others[0][0], atol=1e-2)


@pytest.mark.parametrize(("config", "change", "sentence"), [
    ({"r": 2}, lambda key, tensor: tensor, "says r 2, but its matrices have rank 4, so alpha / r"),
    ({}, lambda key, tensor: tensor * ("lora_A" in key), "changes nothing: its matrices B hold"),
    ({}, lambda key, tensor: None if "layers.1." in key else tensor,
     r"changes 7 of 14 such matrices of .*; model.language_model.layers.1.* stays as it is")])
def test_an_adapter_that_is_not_what_it_says_is_refused_or_said(
        config, change, sentence, random_folder, float32, processor, tmp_path):
    folder = tmp_path / "adapter"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_folder)
    get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE, init_lora_weights=False)
                   ).save_pretrained(folder)
    tensors = load_file(folder / adapters.WEIGHTS)
    changed = {key: change(key, tensor) for key, tensor in tensors.items()}
    save_file({key: tensor for key, tensor in changed.items() if tensor is not None},
              folder / adapters.WEIGHTS)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    expected = pytest.raises(UserError, match=sentence) if config else (
        pytest.warns(UserWarning, match=sentence))
    with expected:
        merging.write_merged_model(random_folder, folder, tmp_path / "merged", float32, processor,
                                   four_bit=False)


@pytest.fixture
def bases(random_folder, float32, tmp_path):
    """(the base of an adapter that the kit has saved, another base, the adapter)."""
    right, other = (shutil.copytree(random_folder, tmp_path / name) for name in ("right", "other"))
    weights = load_file(other / "model.safetensors")
    next(tensor for name, tensor in weights.items() if "up_proj" in name).mul_(1.01)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    model = get_peft_model(loading.load_model(right, float32), resuming.lora_config(4))
    resuming.save_adapter(SimpleNamespace(model=model, is_world_process_zero=lambda: True),
                          tmp_path / "run")
    return right, other, tmp_path / "run" / "adapter"


def test_an_adapter_of_the_kit_goes_on_the_weights_that_it_was_trained_on(
        bases, float32, processor, tmp_path):
    right, other, adapter = bases
    moved = right.rename(tmp_path / "moved")
    adapters.check_adapter_base(adapter, moved, False)
    with pytest.raises(UserError, match="was trained on full weights; leave out --four-bit"):
        adapters.check_adapter_base(adapter, moved, True)
    with pytest.raises(UserError, match="was not trained on the weights of .*other"):
        merging.write_merged_model(other, adapter, tmp_path / "out", float32, processor, False)
    (adapter / adapters.RECORD).unlink()
    adapters.check_adapter_base(adapter, other)  # of another trainer nothing is known


def test_adapters_and_tensors_are_found_or_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter: Can't find 'adapter_config.json'"):
        adapters.load_adapter(tmp_path)
    with pytest.raises(UserError, match="has neither model.safetensors nor"):
        merging.locate_tensors(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / merging.INDEX).write_text(json.dumps(index))
    save_file({"b": torch.zeros(2)}, tmp_path / "two.safetensors")
    assert merging.locate_tensors(tmp_path) == {
        name: tmp_path / file for name, file in index["weight_map"].items()}


@pytest.mark.parametrize(("targets", "part", "shape"), [
    ("all", "self_attn.q_proj", (256, 256)), ("gate_up", "mlp.gate_proj", (704, 256))])
def test_the_matrix_is_the_first_adapted_one(targets, part, shape, float32):
    model = loading.load_model(loading.TINY_BASE, float32)
    weight = merging.read_projection(loading.TINY_BASE, targets)
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
