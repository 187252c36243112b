"""Layers over all tokens of a batch: the same numbers as transformers' and PEFT's own."""

import pytest
import torch
from forced_completions import enliven
from peft import IA3Config, LoraConfig, get_peft_model

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.models.sample_prompts import SampleCache
from mig_kit.shared_prefix import flat_layers, logprobs, prefixes
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

# one completion, several, none but the end; a prompt longer than a block
PROMPT_INDEX, LENGTHS = [2, 2, 0, 3, 3, 3, 1], [5, 9, 3, 9, 1, 7, 8]


@pytest.fixture(params=["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
def adapted(request, random_folder, relatives, float32):
    """A random model whose LoRA adapters are not 0, and its processor."""
    folder = {**relatives, "qwen2_5_vl": random_folder}[request.param]
    model = loading.load_model(folder, float32).requires_grad_(False)
    adapted = get_peft_model(model, LoraConfig(
        r=3, lora_alpha=5, target_modules=loading.LORA_TARGETS["all"]))
    enliven(adapted, 0.2)
    return adapted, loading.load_processor(folder, BoxFormat(coordinates="normalized_1000"))


def values_and_gradients(adapted, samples):
    model, processor = adapted
    cache = SampleCache(model, processor, BoxFormat(coordinates="normalized_1000"))
    torch.manual_seed(0)
    ids = torch.randint(20, 600, (len(LENGTHS), max(LENGTHS)))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    values = logprobs.completion_logps(model, cache.get(samples[:4]), torch.tensor(PROMPT_INDEX),
                                       ids, mask)
    model.zero_grad()
    (values[0] * torch.randn(mask.shape)).sum().backward()
    return values, {name: weight.grad.clone() for name, weight in model.named_parameters()
                    if weight.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["", "checkpointed", "short blocks"])
def test_values_and_gradients_are_those_of_padded_rows(adapted, samples, monkeypatch, variant):
    model = unwrap_peft(adapted[0])
    assert flat_layers.can_read_flat(model)
    if variant == "checkpointed":
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    if variant == "short blocks":
        monkeypatch.setattr(flat_layers, "BLOCK", 16)
    flat, flat_gradients = values_and_gradients(adapted, samples)
    monkeypatch.setattr(logprobs, "can_read_flat", lambda model: False)
    padded, padded_gradients = values_and_gradients(adapted, samples)
    for own, expected in zip(flat, padded):
        assert (own - expected).abs().max() < 1e-5
    assert len(flat_gradients) == len(padded_gradients) > 0
    for name, gradient in flat_gradients.items():
        gap = (gradient - padded_gradients[name]).norm() / padded_gradients[name].norm()
        assert gap < 1e-5, (name, gap)


@pytest.mark.slow
def test_in_bfloat16_products_it_is_as_near_to_float32(adapted, samples, monkeypatch):
    exact = values_and_gradients(adapted, samples)
    with torch.autocast("cpu", torch.bfloat16):
        flat = values_and_gradients(adapted, samples)
        monkeypatch.setattr(logprobs, "can_read_flat", lambda model: False)
        padded = values_and_gradients(adapted, samples)
    for part in (lambda values: values[0][0],
                 lambda values: torch.cat([gradient.flatten() for gradient in values[1].values()])):
        errors = [(part(values) - part(exact)).norm() for values in (flat, padded)]
        assert 0 < errors[0] < 1.3 * errors[1]


@pytest.mark.slow
def test_padding_changes_no_bit(adapted, samples, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        values, gradients = values_and_gradients(adapted, samples)
        monkeypatch.setattr(flat_layers, "STEP", 4)
        few_values, few_gradients = values_and_gradients(adapted, samples)
    assert all(map(torch.equal, values, few_values))
    assert all(map(torch.equal, gradients.values(), few_gradients.values()))


def test_adapters_out_of_use_do_not_count(adapted, samples, monkeypatch):
    model, processor = adapted
    prompts = SampleCache(model, processor, BoxFormat(coordinates="normalized_1000")).get(samples)
    batch = prefixes.pad_prompts(unwrap_peft(model), prompts)
    with torch.no_grad():
        with_adapter = batch.prefill(unwrap_peft(model))[0]
        with model.disable_adapter():
            assert flat_layers.can_read_flat(unwrap_peft(model))
            flat = batch.prefill(unwrap_peft(model))[0]
            monkeypatch.setattr(prefixes, "can_read_flat", lambda model: False)
            padded = batch.prefill(unwrap_peft(model))[0]
    assert (flat - padded).abs().max() < 1e-5 < (flat - with_adapter).abs().max()


@pytest.mark.parametrize("change", [
    {"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}, {"bias": "lora_only"},
    {"modules_to_save": ["input_layernorm"]}])
def test_what_it_does_not_compute_is_left_to_the_models_own_layers(random_model, change):
    model = get_peft_model(random_model.requires_grad_(False), LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], **change))
    assert not flat_layers.can_read_flat(unwrap_peft(model))


def test_other_dtypes_and_layers_are_left_to_peft_and_the_model(random_model):
    """TRL makes adapters bfloat16 on a 4-bit base."""
    language = random_model.requires_grad_(False).model.language_model
    language.norm.weight.requires_grad_(True)
    assert not flat_layers.can_read_flat(random_model)
    with torch.no_grad():
        assert flat_layers.can_read_flat(random_model)
    language.norm.weight.requires_grad_(False)
    model = get_peft_model(random_model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert flat_layers.can_read_flat(random_model)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.bfloat16()
    assert not flat_layers.can_read_flat(random_model)
    with torch.autocast("cpu", torch.bfloat16):
        assert flat_layers.can_read_flat(random_model)
    tuned = get_peft_model(model.unload(), IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]))
    with torch.no_grad():
        assert not flat_layers.can_read_flat(unwrap_peft(tuned))
