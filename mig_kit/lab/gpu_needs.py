"""How much of one GPU's memory each stage of a real run needs, before anything is downloaded.

Computed from the model's shape, for prompts of IMAGES images of the largest size and replies of the
largest length. Measured once: 02 of the 3B on an H100 (9.0 GiB of tensors predicted, 9.1 measured).
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import AutoConfig

from mig_kit.common import model_folder
from mig_kit.models.model_folders import FAMILIES
from mig_kit.pipeline.params import profile_params
from mig_kit.shared_prefix.logprobs import HEAD_TOKENS
from mig_kit.shared_prefix.prefixes import list_linear_attention

GIB = 2**30
CARDS = (24, 40, 80, 141)  # GB on the labels of GPUs
USABLE = 0.93  # share of a label's GB that can be used, in GiB
RUNTIME_GIB = 2.7  # the CUDA context, and what the allocator holds unused; measured in 02 of the 3B
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with its scales (double quantisation)
IMAGES, TEXT_TOKENS, TRACE_TOKENS = 6, 200, 300  # images and text of a prompt, tokens of a trace
ADVICE = {
    "02_sft": "lower max_pixels, or lora_r",
    "04_rejection_sampling": "lower max_pixels, or replies",
    "05_grpo": "lower max_pixels, num_generations or max_completion_length",
    "06_evaluate": "lower max_pixels"}


@dataclass(frozen=True)
class Shape:
    """A model's widths and numbers of parameters."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    total: int  # parameters
    head_dim: int = 128
    token_side: int = 28  # of an image, pixels
    linear_layers: int = 0  # of `layers`: those with linear attention
    key_width: int = 0  # of all heads of linear attention
    value_width: int = 0
    value_heads: int = 0
    state_depth: int = 0  # numbers that a layer keeps for each value channel: its state

    def list_projections(self) -> list[int]:
        """The side that is not `hidden`, of every matrix that 4-bit and LoRA apply to."""
        query, kv = self.head_dim * self.heads, self.head_dim * self.kv_heads
        # beside linear attention, q_proj also gives a gate as wide as the query
        attention = [query * (2 if self.linear_layers else 1), query, kv, kv]
        linear = [2 * self.key_width + self.value_width, self.value_width, self.value_width]
        return (attention * (self.layers - self.linear_layers) + linear * self.linear_layers
                + [self.inner] * 3 * self.layers)

    @property
    def linear_weights(self) -> int:
        """Weights of all projections."""
        return self.hidden * sum(self.list_projections())


# from each model's config.json; tests/models/test_full_profile.py counts their parameters
SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Shape(2048, 11008, 36, 16, 2, 151936, 3_754_622_976),
    "Qwen/Qwen2.5-VL-7B-Instruct": Shape(3584, 18944, 28, 28, 4, 152064, 8_292_166_656),
    "Qwen/Qwen2-VL-7B-Instruct": Shape(3584, 18944, 28, 28, 4, 152064, 8_291_375_616),
    "Qwen/Qwen3-VL-4B-Instruct": Shape(
        2560, 9728, 36, 32, 8, 151936, 4_437_815_808, token_side=32),
    "Qwen/Qwen3-VL-8B-Instruct": Shape(
        4096, 12288, 36, 32, 8, 151936, 8_767_123_696, token_side=32),
    "Qwen/Qwen3.5-9B": Shape(
        4096, 12288, 32, 16, 4, 248320, 9_409_813_744, 256, 32, 24, 2048, 4096, 32, 128)}


def predict(profile: str) -> dict[str, list]:
    """What a profile needs.

    Returns: {"advice": a line for each of CARDS, "memory": rows {"stage", "GiB", "largest part"}};
    both are empty for "tiny", and for a model that is neither in SHAPES nor a folder.
    """
    stages = ("01_synthesize", *ADVICE)
    params = {stage: SimpleNamespace(**profile_params(stage, profile)) for stage in stages}
    shape = find_shape(params["01_synthesize"].base_model)
    if shape is None:
        return {"advice": [], "memory": []}
    needs = predict_memory(shape, params)
    rows = [{"stage": stage, "GiB": round(sum(parts.values()) + RUNTIME_GIB, 1),
             "largest part": f"{max(parts, key=parts.get)} {max(parts.values()):.1f}"}
            for stage, parts in needs.items()]
    too_large = {gigabytes: [f"{row['stage']}: {ADVICE[row['stage']]}" for row in rows
                             if row["GiB"] > USABLE * gigabytes] for gigabytes in CARDS}
    return {"advice": [f"{gigabytes} GB: {'; '.join(words) or 'all stages fit'}"
                       for gigabytes, words in too_large.items()], "memory": rows}


def find_shape(model: str) -> Shape | None:
    """The shape of a name in SHAPES or of a model folder; None for others and for experts."""
    folder = model_folder(model)
    if model in SHAPES or model == "tiny" or not (folder / "config.json").is_file():
        return SHAPES.get(model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return None if config.model_type.endswith("_moe") else count_shape(config)


def count_shape(config) -> Shape:
    """The shape of a configuration, whose parameters are counted without weights."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    text, tower = config.text_config, config.vision_config
    head_dim = next(module.head_dim for name, module in model.model.language_model.named_modules()
                    if name.endswith("self_attn"))
    linear = list_linear_attention(model)
    sizes = [(part.key_dim, part.value_dim, part.num_v_heads, part.head_k_dim) for part in linear]
    return Shape(
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
        text.num_key_value_heads, text.vocab_size, sum(p.numel() for p in model.parameters()),
        head_dim, tower.patch_size * tower.spatial_merge_size, len(linear), *sum(sizes[:1], ()))


class Load(NamedTuple):
    """What is in memory at once."""

    prompt: int  # tokens of a prompt
    prompts: int = 1
    replies: int = 1  # to each prompt
    tokens: int = 512  # of a reply


def layer_bytes(shape: Shape, lora_r: int) -> float:
    """Bytes per token that a layer keeps for its backward pass: bfloat16, LoRA with dropout."""
    if shape.linear_layers:  # as transformers computes it without flash-linear-attention
        of_state = (70 + shape.state_depth / 16) * shape.value_width + 1314 * shape.value_heads
        return (40 * shape.hidden + 14 * shape.inner + 24 * lora_r + 8 * shape.key_width + of_state
                + 64)
    return 62.125 * shape.hidden + 14 * shape.inner + 28 * lora_r + 8


def training_memory(shape: Shape, load: Load, lora_r: int, is_checkpointed: bool,
                    four_bit: bool) -> dict[str, float]:
    """GiB of each part of a training step.

    Args:
        is_checkpointed: the inputs of all layers are kept, and one layer in full.
        four_bit: projections are NF4, and all else float32 (prepare_model_for_kbit_training).
    """
    logit_tokens = load.prompts * load.replies * load.tokens
    tokens = load.prompts * load.prompt + logit_tokens  # a prompt is read once
    activations = tokens * shape.layers * layer_bytes(shape, lora_r)
    if is_checkpointed:
        layer_inputs = shape.layers * shape.hidden * (4 if four_bit else 2)
        activations = tokens * (layer_bytes(shape, lora_r) + layer_inputs)
        if load.replies > 1:  # SFT's loss reads all logits at once
            logit_tokens = min(logit_tokens, HEAD_TOKENS)
    rest = shape.total - shape.linear_weights
    weights = shape.linear_weights * NF4_BYTES + rest * 4 if four_bit else shape.total * 2
    adapter = lora_r * sum(shape.hidden + width for width in shape.list_projections())
    return {"weights": weights / GIB, "adapter, gradients, Adam": adapter * 16 / GIB,
            "activations": activations / GIB,
            "logits": logit_tokens * shape.vocabulary * 10 / GIB}  # bf16, float32, gradient


def decoding_memory(shape: Shape, load: Load) -> dict[str, float]:
    """Part of what drawing replies of this load with a model of this shape holds -> GiB."""
    prompt_tokens, replies = load.prompts * load.prompt, load.prompts * load.replies
    # linear attention keeps states, so each reply has its own copy of the prompt's cache
    copies = replies if shape.linear_layers else load.prompts
    tokens = copies * load.prompt + replies * load.tokens
    kv_bytes = 2 * (shape.layers - shape.linear_layers) * shape.kv_heads * shape.head_dim * 2
    states = replies * shape.linear_layers * shape.value_width * shape.state_depth * 4  # float32
    return {"weights": shape.total * 2 / GIB,
            "keys and values": (tokens * kv_bytes + states) / GIB,
            "logits": replies * shape.vocabulary * 6 / GIB,
            "prefill": prompt_tokens * (4 * shape.hidden + 3 * shape.inner) * 2 / GIB}


def predict_memory(shape: Shape,
                   params: dict[str, SimpleNamespace]) -> dict[str, dict[str, float]]:
    """Stage -> GiB of its parts, one prompt at a time; for 05 those of its larger phase.

    params: of 01 and the stages in ADVICE.
    """
    first, sft, sampling, grpo, evaluate = params.values()
    prompt = TEXT_TOKENS + IMAGES * first.max_pixels // shape.token_side**2
    sft_load = Load(prompt, sft.per_device_train_batch_size, 1, TRACE_TOKENS)
    group, reply = grpo.num_generations, grpo.max_completion_length
    in_graph = max(1, (grpo.micro_replies or grpo.per_device_train_batch_size) // group)
    learning = training_memory(shape, Load(prompt, in_graph, group, reply), grpo.lora_r,
                               grpo.gradient_checkpointing, four_bit=False)
    drawing = decoding_memory(shape, Load(prompt, 1, group, reply))
    drawing["adapter, gradients, Adam"] = learning["adapter, gradients, Adam"]
    sampling_load = Load(prompt, 1, sampling.replies, sampling.max_new_tokens)
    evaluate_load = Load(prompt, 1, max(1, evaluate.replies), evaluate.max_new_tokens)
    return {
        "02_sft": training_memory(shape, sft_load, sft.lora_r, is_checkpointed=True, four_bit=True),
        "04_rejection_sampling": decoding_memory(shape, sampling_load),
        "05_grpo": max(drawing, learning, key=lambda parts: sum(parts.values())),
        "06_evaluate": decoding_memory(shape, evaluate_load)}
