"""The share of a machine's matrix rate that training reaches, counting every distinct token once.
"""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.lab.trainers import make_side
from mig_kit.lab.workload import Workload, time_call
from mig_kit.models.loading import TINY_BASE, Hardware, tiny_config
from mig_kit.models.processors import load_processor
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

MATRIX_SIZES = ((2048, 1024, 1024), (2048, 1024, 2816), (4096, 1024, 4096))  # rows, inputs, outputs


def save_random_model(folder: Path, hidden: int) -> Path:
    """Write a random Qwen2.5-VL, with the tiny base's tokenizer, to `folder`; returns it.

    Its two layers are shaped like the 3B's (equal at hidden 2048); hidden: a multiple of 128.
    """
    torch.manual_seed(0)
    processor = load_processor(TINY_BASE, BoxFormat())
    config = tiny_config(len(processor.tokenizer), hidden=hidden, layers=2)
    text = config.text_config
    text.num_attention_heads, text.intermediate_size = hidden // 128, hidden * 43 // 8
    text.num_key_value_heads = max(1, text.num_attention_heads // 8)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def minimal_flops(model, prompt: int, replies: int, tokens: int) -> float:
    """Floating-point operations that log-probabilities and gradients of a group cannot do without.

    Every distinct token passes once: forward, gradient of the activations through frozen weights,
    the adapters' own. prompt: tokens of the prompt; tokens: of a reply.
    """
    language = unwrap_peft(model).model.language_model
    last_layer = f"{len(language.layers) - 1}."
    weight_passes = unread_passes = 0  # unread: of the last layer for tokens with keys and values
    for name, parameter in language.layers.named_parameters():
        if parameter.ndim < 2:
            continue
        passes = (3 if ".lora_" in name else 2) * parameter.numel()
        weight_passes += passes
        is_key_or_value = ".k_proj" in name or ".v_proj" in name
        if name.startswith(last_layer) and not is_key_or_value:
            unread_passes += passes
    config = language.config
    own_tokens = replies * tokens
    linear = 2 * (prompt + own_tokens) * weight_passes - 2 * (prompt - 1) * unread_passes
    # the head is for replies only; a token attends to all before it, and backward counts twice
    head = 2 * 2 * own_tokens * config.hidden_size * config.vocab_size
    prompt_pairs, own_pairs = prompt**2 / 2, replies * (tokens * prompt + tokens**2 / 2)
    pairs = config.num_hidden_layers * (prompt_pairs + own_pairs) - prompt_pairs + prompt
    return linear + head + 3 * 4 * config.hidden_size * pairs


def matrix_rate(hardware: Hardware) -> float:
    """FLOP/s of matrix products in the dtype in use: the best of MATRIX_SIZES and of five."""
    in_bfloat16 = hardware.autocast or hardware.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_bfloat16 else torch.float32
    best = 0.0
    for rows, inputs, outputs in MATRIX_SIZES:
        a = torch.ones(rows, inputs, dtype=dtype, device=hardware.device)
        b = torch.ones(outputs, inputs, dtype=dtype, device=hardware.device)
        multiply = partial(torch.nn.functional.linear, a, b)
        multiply()
        seconds = min(time_call(multiply, hardware) for _ in range(5))
        best = max(best, 2 * rows * inputs * outputs / seconds)
    return best


def measure_utilisation(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                        repeats: int) -> dict:
    """The share of the matrix rate that training on one prompt's replies reaches, and its parts."""
    kit = make_side(model, hardware, replace(load, prompts=1), folder, is_kit=True)
    batch = kit.roll_out()
    weights = kit.trainer.model
    flops = minimal_flops(weights, kit.prompt_tokens, load.group, load.tokens)
    kit.learn(batch)
    times = [time_call(lambda: kit.learn(batch), hardware) for _ in range(repeats)]
    seconds, rate = statistics.median(times), matrix_rate(hardware)
    return {
        "seconds": round(seconds, 4), "gflop": round(flops / 1e9, 2),
        "matrix_gflops": round(rate / 1e9, 1),
        "parameters_m": round(sum(p.numel() for p in weights.parameters()) / 1e6, 1),
        "share": round(flops / seconds / rate, 3)}
