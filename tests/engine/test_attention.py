"""The kit's attention against transformers' plain one, in float32: outputs and gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from mig_kit.boxes import BoxFormat
from mig_kit.engine import attention, models
from mig_kit.prompts import chat_messages
from mig_kit.world.tasks import make_sample

FUTURE = torch.ones(7, 12).tril(5).bool()[None, None].expand(2, 1, 7, 12)
PADDED = FUTURE & (torch.arange(12) >= torch.tensor([0, 8])[:, None])[:, None, None]  # the second row's first tokens see nothing


def added(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("given", "meant"), [
    (FUTURE, FUTURE), (added(FUTURE), FUTURE), (None, FUTURE), (PADDED, PADDED), (added(PADDED), PADDED)])
def test_outputs_and_gradients_equal_the_plain_ones(heads, given, meant):
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=heads[0] // heads[1], is_causal=True, training=True)
    inputs = [torch.randn(2, heads[i], tokens, 8, requires_grad=True) for i, tokens in ((0, 7), (1, 12), (1, 12))]
    seen = meant[:, 0].any(-1)  # (rows, tokens) that look at something
    found = []
    kept = None if given is None else given.clone()
    for function, mask in ((eager_attention_forward, added(meant)), (attention.attention, given)):
        out, _ = function(module, *inputs, mask, scaling=0.4, dropout=0.0)
        assert out.isfinite().all()
        found.append((out[seen], *torch.autograd.grad(out[seen].square().sum(), inputs)))
    for plain, ours in zip(*found):
        assert ours.shape == plain.shape and (plain - ours).abs().max() < 1e-5
    assert given is None or torch.equal(given, kept)
    with torch.no_grad():
        out, _ = attention.attention(module, *inputs, meant, scaling=0.4, dropout=0.0)
    assert (found[0][0] - out[seen]).abs().max() < 1e-5


def test_weights_are_given_to_a_module_that_keeps_them():
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=True)
    query, key, value = torch.randn(2, 6, 7, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    _, plain = eager_attention_forward(module, query, key, value, added(FUTURE), scaling=0.4)
    assert attention.attention(module, query, key, value, FUTURE, scaling=0.4)[1] is None
    module.keep_weights = True
    _, ours = attention.attention(module, query, key, value, FUTURE, scaling=0.4)
    assert ours.shape == (2, 6, 7, 12) and (plain - ours).abs().max() < 1e-6


@pytest.mark.parametrize("tokens", [5, 128, 300])
def test_in_blocks_it_is_the_same(tokens):
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True, keep_weights=True)
    inputs = [torch.randn(2, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    found = []
    for blocks in (False, True):
        module.in_blocks = blocks
        out, weights = attention.attention(module, *inputs, None, scaling=0.4)
        if blocks:
            assert [w.shape[2:] for w in weights] == [(min(128, tokens - s), min(s + 128, tokens)) for s in range(0, tokens, 128)]
            weights = torch.cat([torch.nn.functional.pad(w, (0, tokens - w.shape[-1])) for w in weights], 2)
        loss = out.square().sum() + weights[..., ::3].square().sum()
        found.append((out, weights, *torch.autograd.grad(loss, inputs)))
    assert all((plain - ours).abs().max() < 1e-6 * plain.abs().max() for plain, ours in zip(*found))
    module.keep_weights = False
    assert attention.attention(module, *inputs, None, scaling=0.4)[1] is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", ["not", "by bool", "by numbers", "for all rows alike"])
def test_without_gradients_long_rows_are_read_in_blocks_and_are_the_same(causal, masked, monkeypatch):
    monkeypatch.setattr(attention, "AT_ONCE", 2)
    torch.manual_seed(0)
    tokens = attention.READ + 90
    module = SimpleNamespace(num_key_value_groups=2, is_causal=causal, training=False)
    inputs = [torch.randn(3, heads, tokens, 8).bfloat16() for heads in (4, 2, 2)]
    seen = torch.ones(3, 1, tokens, tokens).bool()
    seen = seen.tril() if causal else seen
    if masked != "not":
        seen = seen & (torch.arange(tokens) >= 60)  # padding on the left, whose own rows see nothing
    mask = {"not": None, "by bool": seen, "by numbers": added(seen), "for all rows alike": seen[:1]}[masked]
    kept = None if mask is None else mask.clone()
    blocks, called = attention._in_blocks, []
    monkeypatch.setattr(attention, "_in_blocks", lambda *given: called.append(len(given[0])) or blocks(*given))
    out, weights = attention.attention(module, *inputs, mask, scaling=0.4)
    plain, _ = eager_attention_forward(module, *(x.float() for x in inputs), added(seen), scaling=0.4)
    assert called == [2, 1] and weights is None and out.dtype == torch.bfloat16 and out.shape == plain.shape
    assert out.isfinite().all() and (out - plain)[:, 60:].abs().max() < 0.03
    assert mask is None or torch.equal(mask, kept)
    attention.attention(module, *(x.float() for x in inputs), mask, scaling=0.4)
    attention.attention(module, *(x[:, :, :attention.READ - 1] for x in inputs), None, scaling=0.4)
    assert called == [2, 1], "float32 and short rows are the fused kernel's"


@pytest.mark.parametrize(("dtype", "in_blocks"), [(torch.float64, [0]), (torch.float32, [])])
def test_a_long_prompt_is_read_in_blocks_but_in_float32_and_is_the_same(dtype, in_blocks, monkeypatch):
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    inputs = [torch.randn(1, heads, attention.LONG + 76, 8, dtype=dtype, requires_grad=True) for heads in (2, 1, 1)]
    future = torch.ones(1, 1, attention.LONG + 76, attention.LONG + 76).tril().bool()
    blocks, called = attention._in_blocks, []
    monkeypatch.setattr(attention, "_in_blocks", lambda *given: called.append(0) or blocks(*given))
    found = []
    for function, mask in ((eager_attention_forward, added(future)), (attention.attention, None)):
        out, _ = function(module, *inputs, mask, scaling=0.4, dropout=0.0)
        found.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert called == in_blocks
    assert all((plain - ours).abs().max() < 1e-5 * plain.abs().max() for plain, ours in zip(*found))


def test_in_bfloat16_it_is_no_further_from_the_truth_than_the_plain_one():
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True)
    inputs = [torch.randn(2, heads, 40, 32, requires_grad=True) for heads in (4, 2, 2)]
    mask, found = torch.ones(2, 1, 40, 40).tril().bool(), []
    for function, lower in ((eager_attention_forward, False), (eager_attention_forward, True), (attention.attention, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            out, _ = function(module, *inputs, mask if function is attention.attention else added(mask), scaling=0.2, dropout=0.0)
        found.append((out.float(), *torch.autograd.grad(out.float().square().sum(), inputs)))
    truth, plain, ours = found
    for right, theirs, mine in zip(truth, plain, ours):
        assert 0 < (mine - right).norm() < 1.2 * (theirs - right).norm()


def test_the_first_layer_of_the_tower_is_its_convolution():
    torch.manual_seed(0)
    layer, patches = torch.nn.Conv3d(3, 16, (2, 14, 14), stride=(2, 14, 14)), torch.randn(5, 3, 2, 14, 14)
    convolved = layer(patches).view(5, 16)
    layer = models.PatchProduct(layer)
    assert (layer(patches) - convolved).abs().max() < 1e-5


def test_a_whole_model_with_images_and_padding_is_the_same(random_folder, float32, processor):
    samples = [make_sample("refer_grounding", "val", 0), make_sample("object_tracking", "val", 0)]
    texts = [processor.apply_chat_template(chat_messages(s, box_format=BoxFormat()), tokenize=False) for s in samples]
    batch = processor(text=texts, images=[list(s.images) for s in samples], padding=True, return_tensors="pt")
    there, found = batch["attention_mask"].bool(), []
    assert not there.all()
    for name in ("eager", attention.NAME):
        model = models.load_model(random_folder, replace(float32, attention=name))
        with torch.no_grad():
            unlearning = model(**batch).logits[there]
        logits = model(**batch).logits[there]
        assert (unlearning - logits).abs().max() < 1e-4 * logits.abs().max()
        (-logits.log_softmax(-1)[:, 5].mean()).backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, gradients), (ours, same) = found
    assert (plain - ours).abs().max() < 1e-4 * plain.abs().max() and gradients.keys() == same.keys()
    gap = sum((g - same[n]).square().sum() for n, g in gradients.items()) / sum(g.square().sum() for g in gradients.values())
    assert gap.sqrt() < 1e-5


def test_every_cpu_uses_it():
    expected = "sdpa" if torch.cuda.is_available() else attention.NAME
    assert models.choose_hardware("bfloat16").attention == models.choose_hardware("float32").attention == expected
