"""Tiny random models in folders laid out as the families are published: a flat config.json and old
tensor names, pixel limits as min_pixels or as `size`, the template in chat_template.json. Written
by hand, because save_pretrained writes today's layout.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import apply_umask
from mig_kit.models import loading
from mig_kit.models.model_folders import copy_unchanged_files
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
LIMITS = {"min_pixels": 3136, "max_pixels": 12845056}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
PREPROCESSORS = {
    "qwen2_5_vl": {
        **LIMITS, **PATCHES, **CLIP, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"},
    "qwen2_vl": {
        **LIMITS, **PATCHES, **CLIP, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor"},
    "qwen3_vl": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536}, **PATCHES, "patch_size": 16,
        **HALVES, "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor"},
}
PREPROCESSORS["qwen3_5"] = PREPROCESSORS["qwen3_vl"]
TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3,
          "vision_end_token_id": 4, "tie_word_embeddings": True}
LANGUAGE = {
    "vocab_size": 640, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu", "use_cache": True,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
SLIDING = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2,
           "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
# what the text_config of a model with linear attention has besides
DELTA_NET = {
    "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention",
                                            "linear_attention"],
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "rope_parameters": {"mrope_interleaved": True, "mrope_section": [2, 1, 1],
                        "partial_rotary_factor": 0.25, "rope_theta": 1e7, "rope_type": "default"}}
CONFIGS = {
    "qwen2_5_vl": {
        **LANGUAGE, **SLIDING, **TOKENS, "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "vision_config": {
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "in_chans": 3,
            "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
            "tokens_per_second": 2, "temporal_patch_size": 2, "hidden_act": "silu"}},
    "qwen2_vl": {
        **LANGUAGE, **SLIDING, **TOKENS, "architectures": ["Qwen2VLForConditionalGeneration"],
        "vision_config": {
            "depth": 2, "embed_dim": 64, "mlp_ratio": 4, "num_heads": 2, "in_chans": 3,
            "hidden_size": 64, "patch_size": 14, "spatial_merge_size": 2,
            "spatial_patch_size": 14, "temporal_patch_size": 2}},
    "qwen3_vl": {
        **TOKENS, "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": {
            **LANGUAGE, "model_type": "qwen3_vl_text", "head_dim": 32, "tie_word_embeddings": True,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [6, 5, 5],
                             "rope_type": "default"}},
        "vision_config": {
            "model_type": "qwen3_vl", "depth": 3, "hidden_size": 64, "intermediate_size": 128,
            "num_heads": 2, "in_channels": 3, "out_hidden_size": 64, "patch_size": 16,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1], "hidden_act": "gelu_pytorch_tanh"}},
}
text, tower = (dict(CONFIGS["qwen3_vl"][part]) for part in ("text_config", "vision_config"))
del text["rope_scaling"], tower["deepstack_visual_indexes"]
CONFIGS["qwen3_5"] = {
    **TOKENS, "architectures": ["Qwen3_5ForConditionalGeneration"],
    "text_config": text | DELTA_NET | {"model_type": "qwen3_5_text"},
    "vision_config": tower | {"model_type": "qwen3_5"}}
GENERATION = {"bos_token_id": 0, "pad_token_id": 0, "do_sample": True, "eos_token_id": [2, 0],
              "repetition_penalty": 1.05, "temperature": 1e-6, "transformers_version": "4.49.0"}
VIDEO = {"size": {"longest_edge": 25165824, "shortest_edge": 4096}, "patch_size": 16,
         "temporal_patch_size": 2, "merge_size": 2, **HALVES,
         "processor_class": "Qwen3VLProcessor", "video_processor_type": "Qwen3VLVideoProcessor"}


def format_of(family: str) -> BoxFormat:
    if family == "qwen2_5_vl":
        return BoxFormat()
    return BoxFormat(coordinates=Coordinates.NORMALIZED_1000)


def save_model(model, processor, folder, base, **options) -> None:
    """As a folder like `base`, by transformers' own `save_pretrained`."""
    model = unwrap_peft(model)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder, safe_serialization=True, **options)
    copy_unchanged_files(base, folder)
    processor.save_image_settings(folder)
    apply_umask(folder)


def write(path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2))


def published_name(name: str, family: str) -> str:
    if family not in ("qwen2_vl", "qwen2_5_vl"):
        return name
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    root, folders = tmp_path_factory.mktemp("published"), {}
    for family, config in CONFIGS.items():
        folder = folders[family] = root / family
        folder.mkdir()
        write(folder / "config.json", {"model_type": family, **config, "torch_dtype": "bfloat16"})
        write(folder / "generation_config.json", GENERATION)
        write(folder / "preprocessor_config.json", PREPROCESSORS[family])
        if PREPROCESSORS[family] is PREPROCESSORS["qwen3_vl"]:
            write(folder / "video_preprocessor_config.json", VIDEO)
        template = (loading.TINY_BASE / "chat_template.jinja").read_text()
        write(folder / "chat_template.json", {"chat_template": template})
        shutil.copy(loading.TINY_BASE / "tokenizer.json", folder)
        write(folder / "tokenizer_config.json", {
            "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "model_max_length": 131072})
        write(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>",
                                                   "pad_token": "<|endoftext|>"})
        torch.manual_seed(0)
        model = loading.FAMILIES[family](AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
        tensors = {published_name(name, family): tensor.detach().clone()
                   for name, tensor in model.named_parameters()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folders
