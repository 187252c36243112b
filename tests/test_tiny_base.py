"""Notebook 90: its lessons, its tokens and its position rule."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import pad
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import eager_attention_forward

from mig_kit.world.scenes import UNSEEN_PAIRS
from tiny_base import attention, curriculum, lessons, puzzles, training, vocabulary
from tiny_base.config import tiny_config


def draw_album(rng, images):
    return [lessons.clip_to_image(scene) for scene in lessons.album(rng, images)]


def join(pieces):
    return "".join(words for words, _, _ in pieces)


@pytest.fixture
def writer(processor):
    return vocabulary.Writer(processor.tokenizer)


def test_lessons_hold_no_unseen_pair():
    rng = random.Random(0)
    turns = [turn for _ in range(300) for turn in lessons.text_turns(rng, 3)]
    text = " ".join(question + " ".join(words for words, _, _ in pieces)
                    for question, pieces in turns)
    assert not any(f"{colour} {shape}" in text for colour, shape in UNSEEN_PAIRS)


def test_a_lesson_has_the_tokens_of_its_text(writer):
    """A space on the wrong side of a cut would teach tokens that no trace has."""
    rng = random.Random(0)
    turns = [turn for _ in range(100)
             for turn in lessons.text_turns(rng, 2, puzzles.HARD_KINDS, ["Find it."], 0.5)]
    for _ in range(20):
        scenes = draw_album(rng, 3)
        turns += lessons.visual_turns(rng, scenes, 6, 0.6) + lessons.locate_turns(rng, scenes)
    for _, pieces in turns:
        tokens = [token for words, _, _ in pieces for token in writer.encode(words)]
        assert tokens == writer.encode(join(pieces))


def test_dialogues_weigh_only_what_is_said(writer):
    question = "What is at [1,2,3,4] in image 1?"
    row = writer.write_dialogue([(question, [("red star", 1.0, (1, 4))])], [9])
    decode = writer.tokenizer.decode
    taught = decode([token for token, weight in zip(row.ids, row.weights) if weight > 0])
    assert taught == "red star<|im_end|>" and row.ids.count(5) == 9
    numbers = [decode([row.ids[index]]) for index in row.image_number_token if index >= 0]
    assert numbers == ["1"] * 9
    assert {row.ids.index(5) + 4} == {index for index in row.object_token if index >= 0}
    mention, = {index for index in row.question_token if index >= 0}
    assert decode(row.ids[mention - 2:mention + 2]) == " image 1?"


def small_model():
    config = tiny_config(640, hidden=256, layers=3, vision_hidden=64, vision_layers=2)
    return Qwen2_5_VLForConditionalGeneration._from_config(
        config, attn_implementation=attention.NAME)


@pytest.mark.parametrize("tokens", [5, 128, 300])
@pytest.mark.parametrize("in_blocks", [False, True])
def test_attention_is_the_plain_one_and_its_weights_can_be_kept(tokens, in_blocks):
    torch.manual_seed(0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True, training=True,
                             in_blocks=in_blocks, keep_weights=in_blocks)
    inputs = [torch.randn(2, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2)]
    future = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)
    results = []
    for function, mask in ((eager_attention_forward, future[None, None]),
                           (attention.attention, None)):
        output, weights = function(module, *inputs, mask, scaling=0.4, dropout=0.0)
        if function is attention.attention:
            assert (weights is not None) == in_blocks
            weights = in_blocks and torch.cat(
                [pad(block, (0, tokens - block.shape[-1])) for block in weights], 2)
        loss = output.square().sum() + (weights[..., ::3].square().sum() if in_blocks else 0)
        results.append((output, *torch.autograd.grad(loss, inputs), *[weights] * in_blocks))
    for expected, ours in zip(*results):
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


SHORT_COURSE = replace(curriculum.TELLING_APART, warmup_steps=1)
SMALL = dict(albums=2, rows=(3, 3))


def test_a_course_teaches_and_a_run_goes_on_behind_it(processor, tmp_path):
    model = small_model()
    model.model.visual.requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    curve = training.train_language(model, processor.tokenizer, tmp_path, SHORT_COURSE, steps=2,
                                     **SMALL)
    changed = {name.split(".")[1] for name, parameter in model.named_parameters()
               if not torch.equal(parameter, before[name])}
    assert changed == {"language_model"} and curve[-1]["step"] == 2
    fresh = small_model()
    again = training.train_language(fresh, processor.tokenizer, tmp_path, SHORT_COURSE, steps=2,
                                     **SMALL)
    weights = fresh.state_dict()
    assert again == curve
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
