"""The vision tower's windows, which attend in one call on a GPU."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from published import format_of

from mig_kit.models import loading


def window_by_window(query, key, value, bounds, *_, scale=None):
    """What varlen_attn computes on a GPU, by hand: (tokens, heads, width), in float32."""
    mixed = torch.empty_like(query)
    for start, end in zip(bounds.tolist(), bounds.tolist()[1:]):
        scores = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * scale
        mixed[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[start:end])
    return mixed


@pytest.mark.parametrize("family", sorted(loading.FAMILIES))
def test_packed_windows_are_seen_as_one_by_one(family, published, float32, samples, monkeypatch):
    """The tower hands over all windows at once, and gets back what it computes one by one."""
    calls = []

    def attend(*arguments, **options):
        calls.append(len(arguments[3]) - 1)
        return window_by_window(*arguments, **options)

    monkeypatch.setattr(loading, "varlen_attn", attend)
    processor = loading.load_processor(published[family], format_of(family))
    images = processor.image_processor([image.resize((252, 168)) for image in samples[0].images],
                                       return_tensors="pt")
    inputs = images["pixel_values"], images["image_grid_thw"]
    tower = loading.load_model(published[family], float32).model.visual
    with torch.no_grad():
        expected = tower(*inputs).pooler_output
        assert not calls
        tower = load_as_on_a_gpu(published[family], monkeypatch).model.visual.float()
        assert torch.allclose(tower(*inputs).pooler_output, expected, atol=1e-5)
    assert len(calls) == len(tower.blocks) and calls[-1] == len(samples[0].images)
    assert (calls[0] > calls[-1]) == (family == "qwen2_5_vl"), "it has windows in its first layer"


def load_as_on_a_gpu(folder, monkeypatch):
    """The model as `load_model` loads it for a GPU, on the CPU and from the folder's float32."""
    family = loading.FAMILIES[loading.load_config(folder).model_type]
    load = family.from_pretrained
    monkeypatch.setattr(family, "from_pretrained", lambda *words, **options: load(
        *words, **options | {"device_map": "cpu", "dtype": torch.float32}))
    hardware = loading.Hardware("cuda", torch.bfloat16, "sdpa", "GPU")
    return loading.load_model(folder, hardware)


def test_windows_are_packed_on_a_gpu_in_bfloat16_alone():
    gpu = loading.Hardware("cuda", torch.bfloat16, "sdpa", "a GPU")
    others = replace(gpu, dtype=torch.float32), replace(gpu, device="cpu")
    for hardware, name in ((gpu, loading.PACKED_NAME), *((other, "sdpa") for other in others)):
        tower = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa"))
        loading.pack_windows(tower, hardware)
        assert tower.config._attn_implementation == name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")
def test_the_gpus_kernel_computes_windows_one_by_one():
    bounds = torch.tensor([0, 64, 80, 200], device="cuda", dtype=torch.int32)
    inputs = [torch.randn(1, 16, 200, 80, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    mixed, _ = loading.attend_packed(None, *inputs, None, bounds, 120, scaling=80**-0.5)
    expected = window_by_window(*(tensor[0].transpose(0, 1).float() for tensor in inputs), bounds,
                                scale=80**-0.5)
    assert torch.allclose(mixed[0].float(), expected, atol=2e-2)
