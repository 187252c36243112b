"""Shared prefixes are exact: greedy replies, log-probabilities and gradients are transformers'."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from published import format_of

from mig_kit.boxes import BoxFormat
from mig_kit.image_files import pixel_digest
from mig_kit.models import loading
from mig_kit.models.sample_prompts import SampleCache
from mig_kit.prompts import chat_messages
from mig_kit.shared_prefix import decoding, generation, prefixes, prompt_cache
from mig_kit.shared_prefix.generation import SamplingOptions, draw_uniforms, sample_tokens
from mig_kit.shared_prefix.logprobs import KeptPrompts, completion_logps
from mig_kit.shared_prefix.prompt_cache import Prompt
from mig_kit.training import resuming

ABSOLUTE = BoxFormat()
NEVER_DRAWN = [3, 4, 5, 6]  # the vision tokens
END = 2
GREEDY = SamplingOptions(0.0, max_new_tokens=12)


# greedy replies and prompts of all families at night; their log-probabilities and gradients always
MOST = [pytest.param(name, marks=() if name == "qwen2_5_vl" else pytest.mark.nightly)
        for name in sorted(loading.FAMILIES)]


@pytest.fixture
def family(request, random_folder, relatives, float32):
    """(model, processor, box_format) of every family that the kit loads."""
    folder = {**relatives, "qwen2_5_vl": random_folder}[request.param]
    box_format = format_of(request.param)
    model = loading.load_model(folder, float32)
    return model, loading.load_processor(folder, box_format), box_format


def make_prompts(model, processor, samples, box_format=ABSOLUTE, autocast=False) -> list[Prompt]:
    cache = SampleCache(model, processor, box_format)
    cache.autocast = autocast
    return cache.get(samples)


def generate(model, processor, prompts, group=1, sampling=GREEDY, *uniforms, **options):
    return generation.generate_rollouts(model, processor, prompts, group, sampling, *uniforms,
                                        **options)


def questions_in_pairs(samples, count: int) -> list:
    """`count` questions, two about the images of each sample."""
    return [replace(samples[i // 2], id=f"{i}", question="Where?" * (1 + i % 2))
            for i in range(count)]


def stock_inputs(processor, sample, box_format=ABSOLUTE):
    text = processor.apply_chat_template(chat_messages(sample, box_format),
                                         add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[list(sample.images)], return_tensors="pt")


def stock_completion(model, processor, sample, box_format) -> list[int]:
    """What transformers' generate writes, greedily, up to and including the end token."""
    inputs = stock_inputs(processor, sample, box_format)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False,
                            suppress_tokens=NEVER_DRAWN, eos_token_id=END)
    completion = output[0, inputs["input_ids"].shape[1]:].tolist()
    return completion[:completion.index(END) + 1] if END in completion else completion


@pytest.mark.slow
@pytest.mark.parametrize("family", MOST, indirect=True)
def test_greedy_replies_equal_transformers(family, samples):
    model, processor, box_format = family
    prompts = make_prompts(model, processor, samples, box_format)
    for sample, rollout in zip(samples, generate(model, processor, prompts, 3)):
        assert rollout == [stock_completion(model, processor, sample, box_format)] * 3


def test_keys_and_values_are_in_memory_once(random_model, processor, samples, monkeypatch):
    """The prompts' cache goes when the decoder has its parts, and a layer's when it is copied."""
    read, stock = [], prefixes.PaddedPrompts.pad_keys

    def pad_keys(batch, prompts):
        read.extend(weakref.ref(keys) for prompt in prompts for keys, _ in prompt.layers)
        return stock(batch, prompts)

    monkeypatch.setattr(prefixes.PaddedPrompts, "pad_keys", pad_keys)
    prompts = make_prompts(random_model, processor, questions_in_pairs(samples, 4))
    fused_weights = decoding.fuse_decoding_weights(random_model, False)
    with torch.inference_mode():
        decoder = generation._prefill_prompts(random_model, prompts, 2, 4, fused_weights)[0]
    assert len(read) == 4 * len(decoder.prefix_cache)
    assert not any(keys() is not None for keys in read)
    layers = [weakref.ref(keys) for keys, _ in decoder.prefix_cache]
    alive = []

    class Watched(list):
        def __setitem__(self, index, value):
            super().__setitem__(index, value)
            alive.append(sum(layer() is not None for layer in layers))

    decoder.prefix_cache = Watched(decoder.prefix_cache)
    decoder.keep_rows(torch.tensor([True, False, False, False]).repeat_interleave(2))
    assert alive == [2, 1], "the layer that is copied, and those after it"
    assert {len(keys) for keys, _ in decoder.prefix_cache} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "variant"), [
    *((name, "") for name in sorted(loading.FAMILIES)), ("qwen2_5_vl", "kept"),
    ("qwen2_5_vl", "checkpointed"), *(
        pytest.param(name, variant, marks=pytest.mark.nightly) for variant in (
            "kept", "checkpointed") for name in sorted({*loading.FAMILIES} - {"qwen2_5_vl"}))],
    indirect=["family"])
def test_logps_and_gradients_equal_stock(family, samples, variant):
    model, processor, box_format = family
    language = model.model.language_model
    torch.manual_seed(0)
    if variant == "checkpointed":
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    prompts = make_prompts(model, processor, samples[:4], box_format)
    if variant == "kept":
        kept = KeptPrompts(model, dict(enumerate(prompts)))
        prompts = list(kept.prompts.values())
    prompt_index, lengths = torch.tensor([2, 2, 0, 3, 3]), [5, 9, 3, 9, 1]
    ids = torch.randint(20, 600, (5, 9))
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    logps, entropies = completion_logps(model, prompts, prompt_index, ids, mask)
    weights = torch.randn(5, 9) * mask
    model.zero_grad()
    (logps * weights).sum().backward()
    if variant == "kept":
        kept.backward()
    our_gradients = {name: parameter.grad.clone()
                     for name, parameter in language.named_parameters()}

    model.zero_grad()
    model.set_attn_implementation("sdpa")
    for row, index in enumerate(prompt_index.tolist()):
        length = lengths[row]
        inputs = stock_inputs(processor, samples[index], box_format)
        start = inputs["input_ids"].shape[1]
        completion = ids[row:row + 1, :length]
        full = torch.cat([inputs["input_ids"], completion], 1)
        token_types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(completion)], 1)
        output = model(input_ids=full, attention_mask=torch.ones_like(full),
                       mm_token_type_ids=token_types, pixel_values=inputs["pixel_values"],
                       image_grid_thw=inputs["image_grid_thw"])
        all_logps = output.logits[0, start - 1:-1].log_softmax(-1)
        expected = all_logps.gather(-1, completion[0][:, None])[:, 0]
        expected_entropies = -(all_logps.exp() * all_logps).sum(-1)
        assert (expected - logps[row, :length]).abs().max() < 1e-5
        assert (expected_entropies - entropies[row, :length]).abs().max() < 1e-4
        (expected * weights[row, :length]).sum().backward()
    for name, parameter in language.named_parameters():
        difference = (parameter.grad - our_gradients[name]).norm()
        gap = difference / parameter.grad.norm().clamp(min=1e-8)
        # rates of decay: stock's own differ by as much once 17 tokens of padding shift its chunks
        decays = name.endswith(("A_log", "dt_bias", "in_proj_a.weight"))
        assert gap < (2e-3 if decays else 1e-4), (name, gap)


@pytest.mark.parametrize(("odds", "options", "uniforms", "tokens"), [
    # where the cumulative probability first exceeds the number; never an impossible token
    ([0, 1, 0, 2, 1, 0], {}, [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], [1, 1, 3, 3, 4, 4]),
    ([1, 2], {"temperature": 0.5}, [0.19, 0.21], [0, 1]),  # odds of 1 to 4
    ([1, 2], {"temperature": 1.0}, [0.19, 0.21], [0, 0]),
    ([5, 3, 2], {"top_p": 0.6}, [0.62, 0.63, 0.9999], [0, 1, 1]),
    ([5, 3, 2], {"temperature": 0.0}, [0.1, 0.9], [0, 0])])
def test_tokens_by_hand(odds, options, uniforms, tokens):
    logits = torch.tensor([odds]).float().log().repeat(len(tokens), 1)
    drawn = sample_tokens(logits, SamplingOptions(**options),
                          torch.tensor(uniforms, dtype=torch.float64))
    assert drawn.tolist() == tokens


@pytest.mark.slow
def test_a_reply_is_drawn_with_numbers_of_its_own(random_model, processor, samples):
    """Whatever else is in its batch, in whatever order, and whether its images are shared."""
    prompts = make_prompts(random_model, processor, questions_in_pairs(samples, 4))
    sampling, uniforms = SamplingOptions(1.0, max_new_tokens=10), draw_uniforms(3, 4, 3, 10)

    def draw(indices, group=3, uniforms=None, **more):
        chosen = [prompts[i] for i in indices]
        return generate(random_model, processor, chosen, group, sampling, uniforms, **more)

    everyone = [0, 1, 2, 3]
    expected = draw(everyone, 3, uniforms)
    for order in ([2], [3, 0], [1, 2, 3]):
        assert draw(order, 3, uniforms[order]) == [expected[i] for i in order]
    assert draw([0], 2, uniforms[:1, 1:]) == [expected[0][1:]]
    assert draw(everyone, 3, uniforms, max_bytes=1) == expected, "a prompt at a time"
    torch.manual_seed(0)
    assert draw(everyone) != draw(everyone), "new numbers where none are given"


def test_another_model_is_served_what_the_same_tower_saw(random_model, random_folder, float32,
                                                         processor, samples):
    cache = SampleCache(random_model, processor, ABSOLUTE)
    first = cache.get(samples[:3])

    def equal_features() -> list[bool]:
        return [a.features is not None and torch.equal(a.features, b.features)
                for a, b in zip(first, cache.get(samples[:3]))]

    same_tower = loading.load_model(random_folder, float32)
    same_tower.model.language_model.norm.weight.data += 1
    cache.serve(same_tower)
    assert cache.images
    assert cache.model is same_tower and all(equal_features())
    cache.release()
    assert cache.model is None
    cache.serve(random_model)
    assert cache.model is random_model
    assert cache.images, "the same tower again, though it was released"
    other_tower = loading.load_model(random_folder, float32)
    other_tower.model.visual.merger.mlp[2].bias.data += 1
    cache.serve(other_tower)
    assert not cache.images
    assert not any(equal_features())


@pytest.mark.slow
@pytest.mark.parametrize("family", MOST, indirect=True)
def test_prompts_are_what_the_processor_makes(family, samples, monkeypatch):
    model, processor, box_format = family
    asked_samples = [*samples[:4], replace(samples[1], id="again", question="Where?")]
    images_prepared, stock = [], processor.image_processor.preprocess

    def watched(images, *args, **kwargs):
        images_prepared.append(len(images))
        return stock(images, *args, **kwargs)

    monkeypatch.setattr(processor.image_processor, "preprocess", watched)
    prompts = make_prompts(model, processor, asked_samples, box_format)
    n_images = sum(len(sample.images) for sample in samples[:4])
    assert images_prepared == [n_images], "an image is prepared once"
    monkeypatch.undo()
    for sample, prompt in zip(asked_samples, prompts):
        inputs = stock_inputs(processor, sample, box_format)
        positions, _ = model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"])
        assert torch.equal(prompt.ids, inputs["input_ids"][0])
        assert torch.equal(prompt.positions, positions[:, 0])
        image_columns = (prompt.ids == processor.image_token_id).nonzero()
        assert len(prompt.features) == len(image_columns)


def test_a_question_with_an_image_token_is_one_sentence(random_model, processor, samples):
    bad = replace(samples[0], question="Find <|image_pad|>.")
    message = r"has 3 places for its 2 images; take <\|image_pad\|> out of the question"
    with pytest.raises(ValueError, match=message):
        make_prompts(random_model, processor, [bad])


@pytest.mark.slow
def test_features_and_texts_stay_within_their_bytes_and_images_are_prepared_a_few_at_a_time(
        random_model, processor, samples, monkeypatch):
    expected = make_prompts(random_model, processor, samples[:4])
    cache = SampleCache(random_model, processor, ABSOLUTE)
    monkeypatch.setattr(prompt_cache, "MAX_BYTES", 2000)
    monkeypatch.setattr(prompt_cache, "MAX_TEXT_BYTES", 1)
    largest = max(width * height for sample in samples for width, height in sample.sizes)
    monkeypatch.setattr(prompt_cache, "PIXELS_AT_ONCE", 2 * largest)
    counts, add = [], cache._add_features
    monkeypatch.setattr(cache, "_add_features",
                        lambda images: counts.append(len(images)) or add(images))
    prompts = cache.get(samples[:4])
    assert sum(counts) > max(counts) >= 2
    for _ in range(2):
        prompts += [prompt for sample in samples[:4] for prompt in cache.get([sample])]
        assert sum(image.features.nbytes for image in cache.images.values()) <= 2000
        assert not cache.texts
    for prompt, other in zip(prompts, expected * 3):
        assert torch.allclose(prompt.features, other.features, atol=1e-6)
        assert torch.equal(prompt.ids, other.ids)


@pytest.mark.slow
def test_large_images_are_seen_in_bfloat16_a_few_at_a_time(random_model, processor, samples,
                                                           monkeypatch):
    large = [replace(sample, id=f"large/{sample.id}", question="Where?", reference=None,
                     images=(sample.images[0].resize((side, 224)),))
             for sample, side in zip(samples, (224, 280, 224, 252))]
    large_and_small = [*large, samples[0]]

    def first_prompt(samples, autocast: bool) -> Prompt:
        return make_prompts(random_model, processor, samples, autocast=autocast)[0]

    exact, alone = first_prompt(large[:1], False), first_prompt(large[:1], True)
    monkeypatch.setattr(prompt_cache, "PATCHES_AT_ONCE", 600)
    batches, stock = [], random_model.model.visual.forward

    def watched(patches, **kwargs):
        batches.append(len(patches))
        return stock(patches, **kwargs)

    monkeypatch.setattr(random_model.model.visual, "forward", watched)
    among_others = first_prompt(large_and_small, True)
    small_images = {pixel_digest(image): image for image in samples[0].images}.values()
    small_patches = sum(image.width * image.height // 14**2 for image in small_images)
    assert batches == [small_patches, 512, 288, 320], "small ones together, others by size"
    assert alone.features.dtype == torch.bfloat16 and exact.features.dtype == torch.float32
    batches.clear()
    first_prompt(large_and_small, False)
    assert sum(batches) == small_patches + 512 + 288 + 320
    assert max(batches) <= 600, "without autocast, too"
    norm = exact.features.norm()
    assert (alone.features - among_others.features).norm() <= 0.002 * alone.features.norm()
    assert (alone.features - exact.features).norm() < 0.02 * norm
    small, small_exact = (first_prompt(samples[:1], autocast) for autocast in (True, False))
    assert torch.equal(small.features, small_exact.features)


def test_half_of_what_is_free_is_for_keys_and_values(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for free, expected in ((2**40, generation.KV_BYTES), (2**30, 2**29)):
        memory = SimpleNamespace(available=free)
        monkeypatch.setattr(generation.psutil, "virtual_memory", lambda memory=memory: memory)
        assert generation.max_kv_bytes(cpu) == expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 12 * 2**30)
    assert generation.max_kv_bytes(gpu) == 32 * 2**30, "what PyTorch keeps for later is free, too"


def test_rounds_by_hand(random_model):
    """Half of what is free is for keys and values; a prompt takes more while it is read."""
    for token_bytes, at_once in {1: 16, 5: 8, 13: 4, 55: 1, 10**6: 1}.items():
        assert generation.count_prompts_at_once(16, 100, 8, 10, token_bytes, 10_000) == at_once
    counts = [generation.count_prompts_at_once(10, 100, 1, 0, 1, 500, reading)
              for reading in (0, 1, 4, 10**6)]
    assert counts == [5, 5, 2, 1]
    both, layers, head_width, float32_bytes = 2, 2, 32, 4
    expected = both * layers * head_width * float32_bytes
    assert generation.kv_bytes_per_token(random_model) == expected


def test_scores_of_large_keys_are_summed_in_float32(monkeypatch):
    """Keys as large as Qwen2.5's. On a CPU, whose bmm has no out_dtype, it is stood in for."""
    def bmm(left, right, out_dtype=torch.bfloat16):
        assert left.dtype == right.dtype == torch.bfloat16
        return torch.matmul(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr(decoding.torch, "bmm", bmm)
    noise = torch.Generator().manual_seed(0)
    queries = (3.5 * torch.randn(24, 5, 64, generator=noise)).bfloat16()
    keys = (27 * torch.randn(24, 9, 64, generator=noise)).bfloat16()
    exact = torch.matmul(queries.double(), keys.double().transpose(-1, -2))
    in_float32, in_bfloat16 = (decoding._dots(queries, keys, torch.zeros(9), 1.0, on_cpu)
                               for on_cpu in (False, True))
    assert (in_float32 - exact).abs().max() < 1e-2 < 1 < (in_bfloat16 - exact).abs().max()


@pytest.mark.slow
def test_a_young_adapter_beside_bfloat16_weights_is_not_rounded_away(random_model, processor,
                                                                     samples):
    """Replies are drawn with what training computes with; the weights' grid is coarser."""
    model = get_peft_model(random_model.to(torch.bfloat16), resuming.lora_config(4))
    adapted = next(module for module in model.modules() if hasattr(module, "lora_B"))
    adapted.lora_B["default"].weight.data.fill_(1e-4)
    unwrapped = prompt_cache.unwrap_peft(model)
    fused_weights = decoding.fuse_decoding_weights(unwrapped, False)
    assert not fused_weights, "every projection has an adapter of another dtype"
    prompts = make_prompts(model, processor, samples[:2])
    rollouts = generate(model, processor, prompts, 2, SamplingOptions(1.0, max_new_tokens=4))
    assert all(len(completion) for rollout in rollouts for completion in rollout)
    with model.disable_adapter():
        fused_weights = decoding.fuse_decoding_weights(unwrapped, False)
        assert fused_weights, "without adapters the layers are plain"


@pytest.mark.slow
def test_under_autocast_a_trained_adapter_is_rounded_as_the_learner_rounds_it(random_model):
    """The weights and the adapter folded into bfloat16 would be other numbers."""
    model = get_peft_model(random_model, resuming.lora_config(4, 0.0, "attention")).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    unwrapped = prompt_cache.unwrap_peft(model)
    attention = unwrapped.model.language_model.layers[0].self_attn
    layers = attention.q_proj, attention.k_proj, attention.v_proj
    inputs = torch.randn(64, attention.q_proj.in_features, generator=generator)
    fused = decoding.fuse_decoding_weights(unwrapped, autocast=True)[layers]
    decoder = SimpleNamespace(fused_weights={layers: fused}, dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        learned = torch.cat([layer(inputs) for layer in layers], -1)
        drawn = decoding.Decoder._project(decoder, inputs, *layers)
        folded = fused.weight.float() + fused.scale * fused.up.float() @ fused.down.float()
        rounded = torch.nn.functional.linear(inputs, folded, fused.bias)
    assert drawn.dtype == learned.dtype == torch.bfloat16
    assert (drawn != learned).float().mean() < 0.01 < 0.1 < (rounded != learned).float().mean()


@pytest.mark.slow
def test_every_end_token_ends_a_reply(random_model, processor, samples):
    prompts = make_prompts(random_model, processor, samples[:2])
    full = generate(random_model, processor, prompts)[0][0]
    end = full[3]
    random_model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, end]
    cut = generate(random_model, processor, prompts)[0][0]
    assert cut == full[:full.index(end) + 1] and cut[-1] == end
    inputs = stock_inputs(processor, samples[0])
    for least in (0, len(cut)):  # an end token is forbidden before so many others
        own = generate(random_model, processor, prompts, 1,
                       replace(GREEDY, min_new_tokens=least))[0][0]
        output = random_model.generate(**inputs, do_sample=False, max_new_tokens=12,
                                       min_new_tokens=least)
        assert output[0, inputs["input_ids"].shape[1]:].tolist() == own
        assert (own == cut) == (least == 0)


@pytest.mark.slow
@pytest.mark.parametrize("family", MOST, indirect=True)
def test_rows_that_end_leave_the_others_as_they_were(family, samples):
    model, processor, box_format = family
    prompts = make_prompts(model, processor, samples[:3], box_format)
    model.generation_config.eos_token_id = [*range(20, 640, 7)]
    sampling, uniforms = SamplingOptions(1.0, max_new_tokens=24), draw_uniforms(5, 3, 4, 24)
    together = generate(model, processor, prompts, 4, sampling, uniforms)
    assert len({len(ids) for rollout in together for ids in rollout}) > 4
    for index, rollout in enumerate(together):
        for row, ids in enumerate(rollout):
            alone = uniforms[index:index + 1, row:row + 1]
            assert generate(model, processor, prompts[index:index + 1], 1, sampling,
                            alone) == [[ids]]


@pytest.mark.slow
def test_fused_products_give_the_same_replies(random_model, processor, samples, monkeypatch):
    prompts = make_prompts(random_model, processor, samples[:3])
    projections = random_model.model.language_model.layers[0].self_attn
    same_input = projections.q_proj, projections.k_proj, projections.v_proj
    fused_layers = decoding.fuse_decoding_weights(random_model, autocast=True)[same_input]
    assert fused_layers.weight.dtype == fused_layers.bias.dtype == torch.bfloat16
    assert len(fused_layers.weight) == len(fused_layers.bias) == 4 * 32
    arguments = (prompts, 2, SamplingOptions(1.0, max_new_tokens=12), draw_uniforms(0, 3, 2, 12))
    fused = generate(random_model, processor, *arguments, autocast=True)
    monkeypatch.setattr(decoding, "_fuse_layers", lambda *arguments: None)
    assert generate(random_model, processor, *arguments, autocast=True) == fused
