"""The kit's attention against transformers' plain one, in float32: outputs and gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from published import format_of
from torch.nn.functional import pad
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.prompts import chat_messages
from mig_kit.shared_prefix import attention
from mig_kit.world.tasks import make_sample


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


CAUSAL = torch.ones(7, 12).tril(5).bool()[None, None].expand(2, 1, 7, 12)
IS_TOKEN = torch.arange(12) >= torch.tensor([0, 8])[:, None]
PADDED = CAUSAL & IS_TOKEN[:, None, None]  # the second row's first tokens see nothing


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def make_module(kv_groups: int = 2, **attributes) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=kv_groups, **{"is_causal": True, "training": True,
                                                              **attributes})


def random_inputs(rows: int, heads: tuple[int, int], tokens: tuple[int, int], width: int = 8,
                  **options) -> list[torch.Tensor]:
    """Query, key and value. heads, tokens: of the query, and of key and value."""
    return [torch.randn(rows, heads[i], tokens[i], width, **options) for i in (0, 1, 1)]


def count_block_calls(monkeypatch) -> list[int]:
    """The list that the rows of every later call of _attend_in_blocks will be added to."""
    calls, stock = [], attention._attend_in_blocks

    def watched(query, *arguments):
        calls.append(len(query))
        return stock(query, *arguments)

    monkeypatch.setattr(attention, "_attend_in_blocks", watched)
    return calls


def largest_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max()


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("mask", "meaning"), [
    (CAUSAL, CAUSAL), (additive(CAUSAL), CAUSAL), (None, CAUSAL), (PADDED, PADDED),
    (additive(PADDED), PADDED)])
def test_outputs_and_gradients_equal_the_plain_ones(heads, mask, meaning):
    torch.manual_seed(0)
    module = make_module(heads[0] // heads[1])
    inputs = random_inputs(2, heads, (7, 12), requires_grad=True)
    sees_something = meaning[:, 0].any(-1)  # (rows, tokens)
    results = []
    mask_before = None if mask is None else mask.clone()
    for function, used_mask in ((eager_attention_forward, additive(meaning)),
                                (attention.attention, mask)):
        output, _ = function(module, *inputs, used_mask, scaling=0.4, dropout=0.0)
        assert output.isfinite().all()
        output = output[sees_something]
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for plain, ours in zip(*results):
        assert ours.shape == plain.shape and largest_gap(plain, ours) < 1e-5
    assert mask is None or torch.equal(mask, mask_before)
    with torch.no_grad():
        output, _ = attention.attention(module, *inputs, meaning, scaling=0.4, dropout=0.0)
    assert largest_gap(results[0][0], output[sees_something]) < 1e-5


@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_in_blocks_and_with_weights_it_is_the_same(tokens):
    torch.manual_seed(0)
    module = make_module(keep_weights=True)
    inputs = random_inputs(2, (4, 2), (tokens, tokens), requires_grad=True)
    causal = additive(torch.ones(2, 1, tokens, tokens).tril().bool())
    results = []
    for in_blocks in (None, False, True):
        module.in_blocks = in_blocks
        output, weights = (
            eager_attention_forward(module, *inputs, causal, scaling=0.4) if in_blocks is None
            else attention.attention(module, *inputs, None, scaling=0.4))
        if in_blocks:
            assert [block.shape[2:] for block in weights] == [
                (min(128, tokens - start), min(start + 128, tokens))
                for start in range(0, tokens, 128)]
            weights = torch.cat([pad(block, (0, tokens - block.shape[-1])) for block in weights], 2)
        loss = output.square().sum() + weights[..., ::3].square().sum()
        results.append((output, weights, *torch.autograd.grad(loss, inputs)))
    for expected, plain, in_blocks in zip(*results):
        for ours in (plain, in_blocks):
            assert ours.shape == expected.shape
            assert largest_gap(expected, ours) < 1e-5 * expected.abs().max()
        assert largest_gap(plain, in_blocks) < 1e-6 * plain.abs().max()
    module.keep_weights = False
    assert attention.attention(module, *inputs, None, scaling=0.4)[1] is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["not", "by bool", "by numbers", "for all rows alike"])
def test_without_gradients_long_rows_are_read_in_blocks_and_are_the_same(causal, masked,
                                                                         monkeypatch):
    monkeypatch.setattr(attention, "ROWS_AT_ONCE", 2)
    torch.manual_seed(0)
    tokens = attention.LONG_WITHOUT_GRADIENT + 90
    module = make_module(is_causal=causal, training=False)
    inputs = [tensor.bfloat16() for tensor in random_inputs(3, (4, 2), (tokens, tokens))]
    meaning = torch.ones(3, 1, tokens, tokens).bool()
    if causal:
        meaning = meaning.tril()
    if masked != "not":  # padding on the left, whose own rows see nothing
        meaning = meaning & (torch.arange(tokens) >= 60)
    mask = {"not": None, "by bool": meaning, "by numbers": additive(meaning),
            "for all rows alike": meaning[:1]}[masked]
    mask_before = None if mask is None else mask.clone()
    calls = count_block_calls(monkeypatch)
    output, weights = attention.attention(module, *inputs, mask, scaling=0.4)
    in_float32 = [tensor.float() for tensor in inputs]
    plain, _ = eager_attention_forward(module, *in_float32, additive(meaning), scaling=0.4)
    assert calls == [2, 1] and weights is None
    assert output.dtype == torch.bfloat16 and output.shape == plain.shape
    assert output.isfinite().all() and largest_gap(output[:, 60:], plain[:, 60:]) < 0.03
    assert mask is None or torch.equal(mask, mask_before)
    attention.attention(module, *in_float32, mask, scaling=0.4)
    short = [tensor[:, :, :attention.LONG_WITHOUT_GRADIENT - 1] for tensor in inputs]
    attention.attention(module, *short, None, scaling=0.4)
    assert calls == [2, 1], "float32 and short rows are the fused kernel's"


@pytest.mark.parametrize(("dtype", "expected_calls"), [(torch.float64, [1]), (torch.float32, [])])
def test_a_long_prompt_is_read_in_blocks_but_in_float32_and_is_the_same(dtype, expected_calls,
                                                                        monkeypatch):
    torch.manual_seed(0)
    module = make_module()
    tokens = attention.LONG_WITH_GRADIENT + 76
    inputs = random_inputs(1, (2, 1), (tokens, tokens), dtype=dtype, requires_grad=True)
    causal = torch.ones(1, 1, tokens, tokens).tril().bool()
    calls = count_block_calls(monkeypatch)
    results = []
    for function, mask in ((eager_attention_forward, additive(causal)),
                           (attention.attention, None)):
        output, _ = function(module, *inputs, mask, scaling=0.4, dropout=0.0)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    assert calls == expected_calls
    for plain, ours in zip(*results):
        assert largest_gap(plain, ours) < 1e-5 * plain.abs().max()


def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_plain_one():
    torch.manual_seed(0)
    module = make_module()
    inputs = random_inputs(2, (4, 2), (40, 40), width=32, requires_grad=True)
    mask = torch.ones(2, 1, 40, 40).tril().bool()
    results = []
    for function, used_mask, autocast in (
            (eager_attention_forward, additive(mask), False),
            (eager_attention_forward, additive(mask), True),
            (attention.attention, mask, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output, _ = function(module, *inputs, used_mask, scaling=0.2, dropout=0.0)
        output = output.float()
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for exact, plain, ours in zip(*results):
        assert 0 < (ours - exact).norm() < 1.2 * (plain - exact).norm()


def test_a_whole_model_with_images_and_padding_is_the_same(random_folder, float32, processor):
    samples = [make_sample("refer_grounding", "val", 0), make_sample("object_tracking", "val", 0)]
    texts = [processor.apply_chat_template(chat_messages(sample, BoxFormat()), tokenize=False)
             for sample in samples]
    batch = processor(text=texts, images=[list(sample.images) for sample in samples], padding=True,
                      return_tensors="pt")
    is_token = batch["attention_mask"].bool()
    assert not is_token.all()
    results = []
    for name in ("eager", attention.NAME):
        model = loading.load_model(random_folder, replace(float32, attention=name))
        with torch.no_grad():
            without_gradient = model(**batch).logits[is_token]
        logits = model(**batch).logits[is_token]
        assert largest_gap(without_gradient, logits) < 1e-4 * logits.abs().max()
        (-logits.log_softmax(-1)[:, 5].mean()).backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()
                     if parameter.grad is not None}
        results.append((logits.detach(), gradients))
    (plain, plain_gradients), (ours, our_gradients) = results
    assert largest_gap(plain, ours) < 1e-4 * plain.abs().max()
    assert plain_gradients.keys() == our_gradients.keys()
    gap = sum((plain_gradients[name] - our_gradients[name]).square().sum()
              for name in plain_gradients)
    total = sum(gradient.square().sum() for gradient in plain_gradients.values())
    assert (gap / total).sqrt() < 1e-5
