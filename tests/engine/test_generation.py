"""Shared prefixes are exact: the same greedy replies, log-probabilities and gradients as transformers gives."""

from dataclasses import replace

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.engine import attention, decoding, generation, models, prefixes, prompt_cache
from mig_kit.engine.generation import Sampling, draw_uniforms, generate_rollouts, sample_tokens
from mig_kit.engine.logprobs import completion_logps, packed_logps
from mig_kit.engine.prompt_cache import PromptCache, image_digest
from mig_kit.prompts import chat_messages


@pytest.fixture(params=sorted(models.FAMILIES))
def family(request, random_folder, relatives, float32):
    """(model, processor, box_format) of every family that the kit loads."""
    folder = {**relatives, "qwen2_5_vl": random_folder}[request.param]
    box_format = BoxFormat() if request.param == "qwen2_5_vl" else BoxFormat(frame="thousand")
    return models.load_model(folder, float32), models.load_processor(folder, box_format), box_format


def stock_inputs(processor, sample, box_format=BoxFormat()):
    text = processor.apply_chat_template(chat_messages(sample, box_format), add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=[list(sample.images)], return_tensors="pt")


@pytest.mark.slow
def test_greedy_replies_equal_transformers(family, samples):
    model, processor, box_format = family
    prompts = PromptCache(model, processor, box_format).get(samples)
    groups = generate_rollouts(model, processor, prompts, 3, Sampling(0.0, max_new_tokens=16))
    for sample, group in zip(samples, groups):
        inputs = stock_inputs(processor, sample, box_format)
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False, suppress_tokens=[3, 4, 5, 6], eos_token_id=2)
        reply = out[0, inputs["input_ids"].shape[1]:].tolist()
        reply = reply[:reply.index(2) + 1] if 2 in reply else reply
        assert group == [reply] * 3


@pytest.mark.slow
def test_questions_about_the_same_images_read_them_once(family, samples, monkeypatch):
    model, processor, box_format = family
    about = [(0, "Find the red star."), (1, "Where?"), (0, "Which thing is new in image 2, and where is it?"),
             (2, "Find the blue ring."), (1, "What do these pictures have in common?"), (0, "Where?")]
    asked = [replace(samples[i], id=text + str(i), question=text, reference=None) for i, text in about]
    prompts = PromptCache(model, processor, box_format).get(asked)
    read, language = [], model.model.language_model.forward
    monkeypatch.setattr(model.model.language_model, "forward",
                        lambda *a, **given: read.append(given["inputs_embeds"].shape[:2]) or language(*a, **given))
    groups = generate_rollouts(model, processor, prompts, 2, Sampling(0.0, max_new_tokens=16))
    monkeypatch.undo()
    assert [rows for rows, _ in read] == [3, 3], "three lists of images, and what is asked about each"
    assert read[0][1] == prefixes.pad_to_multiple(max(p.stem for p in prompts))
    for sample, group in zip(asked, groups):
        inputs = stock_inputs(processor, sample, box_format)
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False, suppress_tokens=[3, 4, 5, 6], eos_token_id=2)
        reply = out[0, inputs["input_ids"].shape[1]:].tolist()
        assert group == [reply[:reply.index(2) + 1] if 2 in reply else reply] * 2


def test_stems_by_hand():
    def prompt(name, tokens=3):
        return prompt_cache.Prompt(torch.arange(tokens + 2), torch.zeros(3, tokens + 2), None, (name,) if tokens else (), tokens)

    a, b, c, text = prompt(b"a"), prompt(b"b"), prompt(b"c"), prompt(b"", 0)
    assert prefixes.group_by_prefix([a, b, a, c, b]) == [[0, 2], [1, 4], [3]]
    assert prefixes.group_by_prefix([a, prompt(b"a", 4)]) == [[0], [1]], "another text before the end of the images"
    assert prefixes.group_by_prefix([a, a, text]) == [[0], [1], [2]], "no images to share"
    lonely = [prompt(bytes([i])) for i in range(7)]
    assert prefixes.group_by_prefix([a] * 5 + lonely) == [[i] for i in range(12)], "40 rows for 12 questions"


@pytest.mark.slow
def test_done_stems_leave_and_the_rest_goes_on(random_model, processor, samples, monkeypatch):
    asked = [replace(samples[i // 2], id=f"{i}", question="Where?" * (1 + i % 2)) for i in range(8)]
    prompts = PromptCache(random_model, processor, box_format=BoxFormat()).get(asked)
    sampling = Sampling(0.0, max_new_tokens=12, min_new_tokens=12)
    whole = generate_rollouts(random_model, processor, prompts, 3, sampling)
    ends, drawn = [0, 1, 2, 5], generation.sample_tokens

    def ending(logits, sampling, draws):  # a stem's rows end together, one stem after the other
        tokens = drawn(logits, sampling, draws)
        step = ending.step = ending.step + 1
        here = [stem for stem in range(4) if stem not in ending.over]
        for place, stem in enumerate(here):
            if step > ends[stem] + 3:
                tokens[6 * place:6 * place + 6] = 2
                ending.over.append(stem)
        return tokens

    ending.step, ending.over = 0, []
    monkeypatch.setattr(generation, "sample_tokens", ending)
    cut = generate_rollouts(random_model, processor, prompts, 3, sampling)
    for i, (full, short) in enumerate(zip(whole, cut)):
        assert short == [reply[:ends[i // 2] + 3] + [2] for reply in full]


@pytest.mark.slow
@pytest.mark.parametrize(("way", "how"), [(completion_logps, ""), (completion_logps, "long"), (packed_logps, ""),
                                          (packed_logps, "checkpointed")])
def test_logps_and_gradients_equal_stock(family, samples, monkeypatch, way, how):
    model, processor, box_format = family
    torch.manual_seed(0)
    if how == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if how == "long":
        model.set_attn_implementation(attention.NAME)
        monkeypatch.setattr(attention, "READ", 1)
    prompts = PromptCache(model, processor, box_format).get(samples[:4])
    owner, lengths = torch.tensor([2, 2, 0, 3, 3]), [5, 9, 3, 9, 1]
    ids, mask = torch.randint(20, 600, (5, 9)), torch.zeros(5, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    logps, entropies = way(model, prompts, owner, ids, mask, processor.image_token_id)
    weights = torch.randn(5, 9) * mask
    model.zero_grad()
    (logps * weights).sum().backward()
    ours = {n: p.grad.clone() for n, p in model.model.language_model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    for row, index in enumerate(owner.tolist()):
        inputs = stock_inputs(processor, samples[index], box_format)
        start = inputs["input_ids"].shape[1]
        reply = ids[row:row + 1, :lengths[row]]
        full = torch.cat([inputs["input_ids"], reply], 1)
        kinds = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(reply)], 1)
        out = model(input_ids=full, attention_mask=torch.ones_like(full), mm_token_type_ids=kinds,
                           pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
        logs = out.logits[0, start - 1:-1].log_softmax(-1)
        expected = logs.gather(-1, reply[0][:, None])[:, 0]
        assert (expected - logps[row, :lengths[row]]).abs().max() < 1e-5
        assert (-(logs.exp() * logs).sum(-1) - entropies[row, :lengths[row]]).abs().max() < 1e-4
        (expected * weights[row, :lengths[row]]).sum().backward()
    for name, parameter in model.model.language_model.named_parameters():
        gap = (parameter.grad - ours[name]).norm() / parameter.grad.norm().clamp(min=1e-8)
        assert gap < 1e-4, (name, gap)


@pytest.mark.slow
def test_sampled_replies_have_the_models_distribution(random_model, processor, samples):
    prompts = PromptCache(random_model, processor, box_format=BoxFormat()).get(samples[:1])
    groups = generate_rollouts(random_model, processor, prompts, 4000, Sampling(1.0, max_new_tokens=1), draw_uniforms(0, 1, 4000, 1))
    with torch.no_grad():
        logits = random_model(**stock_inputs(processor, samples[0])).logits[0, -1]
    logits[[3, 4, 5, 6]] = -torch.inf
    chances = logits.softmax(-1)
    top = chances.topk(12).indices
    drawn = torch.bincount(torch.tensor([r[0] for r in groups[0]]), minlength=640) / 4000
    spread = (chances * (1 - chances) / 4000).sqrt()
    assert ((drawn - chances).abs()[top] < 4.5 * spread[top]).all()
    assert drawn[[3, 4, 5, 6]].sum() == 0


def test_top_p_and_greedy():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(500, 1)
    draws = draw_uniforms(0, 1, 500, 1).flatten()
    assert set(sample_tokens(logits, Sampling(1.0, top_p=0.6), draws).tolist()) == {0, 1}
    assert sample_tokens(logits, Sampling(0.0)).unique().tolist() == [0]


def test_tokens_by_hand():
    """A token where its cumulated probability first exceeds the number; never one that cannot be, at either end."""
    logits = torch.log(torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])).repeat(6, 1)
    draws = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert sample_tokens(logits, Sampling(1.0), draws).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.slow
def test_a_reply_is_drawn_with_numbers_of_its_own(random_model, processor, samples):
    """Whatever else is in its batch, in whatever order, and whether its images are shared."""
    asked = [replace(samples[i // 2], id=f"{i}", question="Where?" * (1 + i % 2)) for i in range(4)]
    prompts, sampling = PromptCache(random_model, processor, box_format=BoxFormat()).get(asked), Sampling(1.0, max_new_tokens=10)
    draws = draw_uniforms(3, 4, 3, 10)
    whole = generate_rollouts(random_model, processor, prompts, 3, sampling, draws)
    for order in ([2], [3, 0], [1, 2, 3]):
        found = generate_rollouts(random_model, processor, [prompts[i] for i in order], 3, sampling, draws[order])
        assert found == [whole[i] for i in order]
    assert generate_rollouts(random_model, processor, prompts[:1], 2, sampling, draws[:1, 1:]) == [whole[0][1:]]
    torch.manual_seed(0)
    again = [generate_rollouts(random_model, processor, prompts, 3, sampling) for _ in range(2)]
    assert again[0] != again[1], "new numbers where none are given"


def test_prompts_are_encoded_once_and_forgotten_in_order(random_model, processor, samples):
    cache = PromptCache(random_model, processor, limit=3, box_format=BoxFormat())
    seen, visual = [], random_model.model.visual.forward

    def watched(pixels, grid_thw, **more):
        seen.append(len(grid_thw))
        return visual(pixels, grid_thw, **more)

    random_model.model.visual.forward = watched
    first = cache.get(samples[:3])
    again = cache.get([samples[0], replace(samples[1], id="the same images, asked about again")])
    assert seen == [len({image_digest(image) for s in samples[:3] for image in s.images})], "every image is seen once"
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again))
    cache.get(samples[3:5])
    assert len(cache.store) == 3


def test_another_model_is_served_what_the_same_tower_saw(random_model, random_folder, float32, processor, samples):
    cache = PromptCache(random_model, processor, box_format=BoxFormat())
    first = cache.get(samples[:3])
    other = models.load_model(random_folder, float32)
    other.model.language_model.norm.weight.data += 1
    cache.serve(other)
    assert cache.model is other and all(a.features is not None and torch.equal(a.features, b.features)
                                        for a, b in zip(first, cache.get(samples[:3])))
    assert cache.size > 0
    cache.release()
    assert cache.model is None
    cache.serve(random_model)
    assert cache.model is random_model and cache.size > 0, "the same tower again, though it was let go of"
    third = models.load_model(random_folder, float32)
    third.model.visual.merger.mlp[2].bias.data += 1
    cache.serve(third)
    assert cache.size == 0
    assert not any(torch.equal(a.features, b.features) for a, b in zip(first, cache.get(samples[:3])))


@pytest.mark.slow
def test_prompts_are_what_the_processor_makes(family, samples, monkeypatch):
    model, processor, box_format = family
    asked = [*samples[:4], replace(samples[1], id="again", question="Where?")]
    prepared, prepare = [], processor.image_processor.preprocess
    monkeypatch.setattr(processor.image_processor, "preprocess",
                        lambda images, *a, **options: prepared.append(len(images)) or prepare(images, *a, **options))
    prompts = PromptCache(model, processor, box_format).get(asked)
    assert prepared == [sum(len(s.images) for s in samples[:4])], "an image is prepared once"
    monkeypatch.undo()
    for sample, prompt in zip(asked, prompts):
        inputs = stock_inputs(processor, sample, box_format)
        place, _ = model.model.get_rope_index(inputs["input_ids"], inputs["mm_token_type_ids"],
                                              image_grid_thw=inputs["image_grid_thw"])
        assert torch.equal(prompt.ids, inputs["input_ids"][0]) and torch.equal(prompt.positions, place[:, 0])
        tokens = (prompt.ids == processor.image_token_id).nonzero()
        assert prompt.stem == tokens[-1] + 1 and len(prompt.features) == len(tokens)


def test_a_question_with_an_image_token_is_one_sentence(random_model, processor, samples):
    bad = replace(samples[0], question="Find <|image_pad|>.")
    with pytest.raises(ValueError, match=r"has 3 places for its 2 images; take <\|image_pad\|> out of the question"):
        PromptCache(random_model, processor, box_format=BoxFormat()).get([bad])


@pytest.mark.slow
def test_features_stay_within_their_room(random_model, processor, samples):
    whole, tight = PromptCache(random_model, processor, box_format=BoxFormat()), PromptCache(random_model, processor, room=2000, box_format=BoxFormat())
    for sample in [*samples[:4], *samples[:4]]:
        expected, = whole.get([sample])
        found, = tight.get([sample])
        assert torch.allclose(expected.features, found.features, atol=1e-6) and torch.equal(expected.ids, found.ids)
        assert tight.size <= 2000 and tight.size == sum(f.nbytes for f, _ in tight.images.values())


@pytest.mark.slow
def test_large_images_are_seen_in_bfloat16_a_few_at_a_time(random_model, processor, samples, monkeypatch):
    large = [replace(s, id=f"large/{s.id}", images=(s.images[0].resize((side, 224)),), question="Where?", reference=None)
             for s, side in zip(samples, (224, 280, 224, 252))]
    exact, = PromptCache(random_model, processor, box_format=BoxFormat()).get(large[:1])
    alone, = PromptCache(random_model, processor, autocast=True, box_format=BoxFormat()).get(large[:1])
    monkeypatch.setattr(prompt_cache, "PATCHES_AT_ONCE", 600)
    sizes, seen = [], random_model.model.visual.forward
    monkeypatch.setattr(random_model.model.visual, "forward",
                        lambda patches, **given: sizes.append(len(patches)) or seen(patches, **given))
    among, *_ = PromptCache(random_model, processor, autocast=True, box_format=BoxFormat()).get([*large, samples[0]])
    small = sum(image.size[0] * image.size[1] // 14**2 for image in {image_digest(i): i for i in samples[0].images}.values())
    assert sizes == [small, 512, 288, 320], "small ones together, in the order of their sizes otherwise"
    assert alone.features.dtype == torch.bfloat16 and exact.features.dtype == torch.float32
    sizes.clear()
    PromptCache(random_model, processor, box_format=BoxFormat()).get([*large, samples[0]])
    assert sum(sizes) == small + 512 + 288 + 320 and max(sizes) <= 600, "without autocast, too"
    assert (alone.features - among.features).norm() <= 0.002 * alone.features.norm(), "whatever else is asked for"
    assert (alone.features - exact.features).norm() < 0.02 * exact.features.norm()
    small, = PromptCache(random_model, processor, autocast=True, box_format=BoxFormat()).get(samples[:1])
    assert torch.equal(small.features, PromptCache(random_model, processor, box_format=BoxFormat()).get(samples[:1])[0].features)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"], indirect=True)
def test_of_long_prompts_the_last_layer_reads_only_the_last_token(family, samples, monkeypatch):
    model, processor, box_format = family
    prompts = PromptCache(model, processor, box_format).get(samples[:4])
    model.set_attn_implementation(attention.NAME)
    batch, language = prefixes.pad_prompts(model, prompts, processor.image_token_id), model.model.language_model
    with torch.inference_mode():
        states, cache = batch.read(model)
        monkeypatch.setattr(attention, "READ", 64)
        counted, mlp = [], language.layers[-1].mlp.forward
        monkeypatch.setattr(language.layers[-1].mlp, "forward", lambda hidden: counted.append(hidden.shape[:2]) or mlp(hidden))
        short, left = batch.read(model)
    assert counted == [(4, 1)], "a token of each"
    assert torch.allclose(states, short, atol=1e-5 * states.abs().max())
    for ours, whole in zip(left.layers, cache.layers):
        assert torch.equal(ours.keys, whole.keys) and torch.equal(ours.values, whole.values)
    assert "forward" not in vars(language.layers[-1]) and not hasattr(language.layers[-1].self_attn, "read_at")


def test_rounds_by_hand(random_model, monkeypatch):
    monkeypatch.setattr(generation, "KV_BYTES", 10_000)
    assert [generation.count_prompts_at_once(16, 100, 8, 10, size) for size in (1, 5, 13, 55, 10**6)] == [16, 8, 4, 1, 1]
    assert generation.kv_bytes_per_token(random_model) == 2 * 2 * 32 * 4  # keys and values, layers, the width of one head, bytes


@pytest.mark.slow
def test_folding_adapters_for_decoding_changes_no_weight(random_model, processor, samples):
    from peft import get_peft_model

    from mig_kit.engine import training

    model = get_peft_model(random_model, training.lora_config(4, 8))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = PromptCache(model, processor, box_format=BoxFormat()).get(samples[:2])
    folded = generate_rollouts(model, processor, prompts, 1, Sampling(0.0, max_new_tokens=12))
    generate_rollouts(model, processor, prompts, 1, Sampling(0.0, max_new_tokens=2), autocast=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merged = model.merge_and_unload()
    assert generate_rollouts(merged, processor, prompts, 1, Sampling(0.0, max_new_tokens=12)) == folded


@pytest.mark.slow
def test_a_young_adapter_beside_bfloat16_weights_is_not_rounded_away(random_model, processor, samples):
    """What training computes with is what replies are drawn with, though the weights' grid is coarser than the adapter's effect."""
    from peft import get_peft_model

    from mig_kit.engine import training

    model = get_peft_model(random_model.to(torch.bfloat16), training.lora_config(4, 8))
    layer = next(m for m in model.modules() if hasattr(m, "lora_B"))
    layer.lora_B["default"].weight.data.fill_(1e-4)
    with decoding.fuse_decoding_weights(models.unwrap_peft(model), False) as joined:
        assert not layer.merged and not any(layer in layers for layers in joined)
    plain = [id(m) for layers in joined for m in layers]
    assert not plain, "every projection has an adapter"
    prompts = PromptCache(model, processor, box_format=BoxFormat()).get(samples[:2])
    assert all(len(reply) for group in generate_rollouts(model, processor, prompts, 2, Sampling(1.0, max_new_tokens=4)) for reply in group)
    with model.disable_adapter(), decoding.fuse_decoding_weights(models.unwrap_peft(model), False) as joined:
        assert joined, "without adapters the layers are plain"


@pytest.mark.slow
def test_every_end_token_ends_a_reply(random_model, processor, samples):
    prompts, sampling = PromptCache(random_model, processor, box_format=BoxFormat()).get(samples[:2]), Sampling(0.0, max_new_tokens=12)
    whole = generate_rollouts(random_model, processor, prompts, 1, sampling)
    random_model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, whole[0][0][3]]
    cut = generate_rollouts(random_model, processor, prompts, 1, sampling)
    assert cut[0][0] == whole[0][0][:whole[0][0].index(whole[0][0][3]) + 1] and cut[0][0][-1] == whole[0][0][3]
    stock = random_model.generate(**stock_inputs(processor, samples[0]), do_sample=False, max_new_tokens=12)
    start = stock_inputs(processor, samples[0])["input_ids"].shape[1]
    assert stock[0, start:].tolist() == cut[0][0]


@pytest.mark.slow
def test_joined_products_give_the_same_replies(random_model, processor, samples, monkeypatch):
    prompts = PromptCache(random_model, processor, box_format=BoxFormat()).get(samples[:3])
    before = {name: value.clone() for name, value in random_model.state_dict().items()}
    layer = random_model.model.language_model.layers[0]
    with decoding.fuse_decoding_weights(random_model, autocast=True) as joined:
        weight, bias = joined[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        assert weight.dtype == bias.dtype == torch.bfloat16 and len(weight) == len(bias) == 4 * 32
        assert layer.self_attn.k_proj.weight.data_ptr() == weight[2 * 32].data_ptr(), "a part of it, not one more copy"
    assert all(torch.equal(value, before[name]) for name, value in random_model.state_dict().items())

    def replies():
        return generate_rollouts(random_model, processor, prompts, 2, Sampling(1.0, max_new_tokens=12), draw_uniforms(0, 3, 2, 12),
                        autocast=True)

    found = replies()
    monkeypatch.setattr(decoding, "_fuse_layers", lambda joined, layers: None)
    assert replies() == found, "as by the layers themselves"
