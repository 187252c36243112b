"""Stage 08: the kit and stock TRL and transformers measured in turns.

Both sides have the same weights, data and tokens per reply. Stock trainers read a prompt once per
reply, the kit once per group. No rollout reuses the images of another.
"""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory
from mig_kit.drawing.method_plots import count_tokens
from mig_kit.lab.workload import (
    BOX_FORMAT,
    STOCK_ATTENTION,
    Workload,
    compare_times,
    gradient_error,
    load_stock_model,
    make_questions,
    make_side,
    make_sides,
    peak_memory,
    same_batches,
    time_call,
)
from mig_kit.models.loading import TINY_BASE, Hardware, Policy, load_model
from mig_kit.models.model_folders import load_config
from mig_kit.models.processors import load_processor, render_prompt
from mig_kit.models.sample_prompts import make_cache
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, generate_rollouts
from mig_kit.shared_prefix.prompt_cache import unwrap_peft

STAGES = ("rollout", "train", "grpo_step", "rejection", "evaluate", "evaluate_alike")
MATRIX_SIZES = ((2048, 1024, 1024), (2048, 1024, 2816), (4096, 1024, 4096))  # rows, inputs, outputs
ALIKE = 5  # questions about the same images: all of MIG-Bench's 555 with six images are such fives


def compare_replies(stock: Policy, kit: Policy, samples: list[Sample], load: Workload, group: int,
                    repeats: int, name: str) -> dict:
    """Times `group` replies of `load.tokens` tokens to every question, with the images' features.

    A single reply is greedy: stock gets one question at a time, as in MIG-Bench's script, the kit
    all at once. Several replies are sampled, on both sides in one batch.
    """
    processor, hardware, is_greedy = stock.processor, stock.hardware, group == 1
    options = SamplingOptions(float(not is_greedy), 1.0, load.tokens, load.tokens)
    sampling = {"do_sample": False} if is_greedy else {
        "do_sample": True, "top_k": 0, "top_p": 1.0, "num_return_sequences": group}
    batches = [[sample] for sample in samples] if is_greedy else [samples]

    def stock_replies() -> None:
        for batch in batches:
            texts = [render_prompt(processor, sample, BOX_FORMAT) for sample in batch]
            inputs = processor(text=texts, images=[list(sample.images) for sample in batch],
                               padding=True, return_tensors="pt").to(stock.model.device)
            with torch.no_grad(), torch.autocast(hardware.device, torch.bfloat16,
                                                 enabled=hardware.autocast):
                stock.model.generate(**inputs, **sampling, min_new_tokens=load.tokens,
                                     max_new_tokens=load.tokens)

    def kit_replies() -> None:
        generate_rollouts(kit.model, processor, make_cache(kit).get(samples), group, options, None,
                          hardware.autocast)

    return compare_times(stock_replies, kit_replies, repeats, hardware, name)


def compare_training(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                     repeats: int, with_step: bool = False) -> dict:
    """Times "rollout" and "train" of a load; with_step: also a GRPO step and its memory."""
    names = ("rollout", "train") if with_step else ("", "")
    stock, kit = make_sides(model, hardware, load, folder)
    stock_batch, kit_batch = same_batches(stock)
    kit.roll_out()
    result = {
        "prompt_tokens": kit.prompt_tokens,
        "rollout": compare_times(stock.roll_out, kit.roll_out, repeats, hardware, names[0]),
        "train": compare_times(lambda: stock.learn(stock_batch), lambda: kit.learn(kit_batch),
                               repeats, hardware, names[1])}
    if with_step:
        result["grpo_step"] = compare_times(stock.step, kit.step, repeats, hardware, "grpo_step")
        result["peak_mem_mb"] = {"stock": peak_memory(stock.step, hardware),
                                 "kit": peak_memory(kit.step, hardware)}
    return result


def sweep_loads(load: Workload) -> list[Workload]:
    """The loads of the sweep: `load` with one prompt, and with one other number changed."""
    single = replace(load, prompts=1)
    powers = (1, 2, 4, 8)
    groups, lengths = (max(2, load.group // 2), 2 * load.group), (
        max(2, load.tokens // 4), 2 * load.tokens)
    loads = [*(replace(single, images=count) for count in powers if count < load.images), single,
             *(replace(single, group=count) for count in groups),
             *(replace(single, tokens=count) for count in lengths),
             *(replace(single, prompts=count) for count in powers if count <= max(2, load.prompts))]
    return list(dict.fromkeys(loads))


def run_sweep(model: str | Path, hardware: Hardware, loads: list[Workload], folder: Path,
              repeats: int) -> list[dict]:
    """A row per load and stage ("rollout", "train"), with the load's numbers and both times."""
    rows = []
    for number, load in enumerate(progress_bar(loads, "loads")):
        result = compare_training(model, hardware, load, folder / str(number), repeats)
        release_memory()
        rows += [{**vars(load), "prompt_tokens": result["prompt_tokens"], "stage": stage,
                  **result[stage]} for stage in ("rollout", "train")]
    return rows


def run_headline(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                 repeats: int) -> dict:
    """Measures all STAGES at one load, prints a line each, and compares gradients in float32.

    "rejection" has as many questions as a step, "evaluate" four times as many; "evaluate_alike" has
    ALIKE times as many, in groups of ALIKE about the same images.
    """
    float32 = replace(hardware, dtype=torch.float32, autocast=False, attention="sdpa")
    error = gradient_error(*make_sides(model, float32, replace(load, prompts=1), folder))
    result = {
        "load": vars(load), "model": Path(model).name, "hardware": hardware.reason,
        "stock_attention": STOCK_ATTENTION, "repeats": repeats, "grad_rel_error": error,
        **compare_training(model, hardware, load, folder, repeats, with_step=True)}
    release_memory()
    processor = load_processor(model, BOX_FORMAT)
    stock = Policy(load_stock_model(model, hardware), processor, hardware, BOX_FORMAT)
    kit = Policy(load_model(model, hardware), processor, hardware, BOX_FORMAT)
    for name, group, count, alike in (("rejection", load.group, load.prompts, 1),
                                      ("evaluate", 1, 4 * load.prompts, 1),
                                      ("evaluate_alike", 1, ALIKE * load.prompts, ALIKE)):
        result[name] = compare_replies(stock, kit, make_questions(load, count, alike), load, group,
                                       (repeats + 1) // 2, name)
    return result


def headline_text(result: dict, load: Workload) -> str:
    """Text about the load, memory, gradients and utilisation; `run_headline` prints the times."""
    memory = result["peak_mem_mb"]
    tokens = count_tokens(result["prompt_tokens"], load.group, load.tokens)
    lines = [f"{load.prompts} prompts with {load.images} images of {load.side} px "
             f"({result['prompt_tokens']} tokens), {load.group} replies of {load.tokens} tokens to "
             f"each; {result['hardware']}",
             f"formula G(P + R)/(P + GR): {tokens['stock'] / tokens['kit']:.1f} times fewer tokens "
             "to read",
             f"memory of a step: stock {memory['stock']:.0f} MiB, kit {memory['kit']:.0f} MiB",
             f"gradients apart by {result['grad_rel_error']:.1e} (relative, float32)"]
    if "utilisation" in result:
        used = result["utilisation"]
        lines.append(f"{100 * used['share']:.0f} % of this machine's matrix rate "
                     f"({used['parameters_m']:.0f} M parameters)")
    return "\n".join(lines)


def save_random_model(folder: Path, hidden: int) -> Path:
    """Write a random Qwen2.5-VL with two layers shaped like the 3B's to `folder`, and return it.

    hidden: its width, a multiple of 128; the 3B has 2048.
    """
    torch.manual_seed(0)
    processor, config = load_processor(TINY_BASE, BoxFormat()), load_config(TINY_BASE)
    text, config.vision_config.out_hidden_size = config.text_config, hidden
    text.hidden_size, text.num_hidden_layers, text.layer_types = hidden, 2, text.layer_types[:2]
    text.num_attention_heads, text.intermediate_size = hidden // 128, hidden * 43 // 8
    text.num_key_value_heads = max(1, text.num_attention_heads // 8)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    model = Qwen2_5_VLForConditionalGeneration._from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def minimal_flops(model, prompt: int, replies: int, tokens: int) -> float:
    """Floating-point operations that the gradient of a group needs at least.

    Every distinct token passes once: forward, gradient of the activations through frozen weights,
    and gradient of the adapters. prompt: tokens of the prompt; tokens: of a reply.
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
    """FLOP/s of matrix products in the dtype in use: the best of five turns of MATRIX_SIZES."""
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


def measure_utilisation(hardware: Hardware, load: Workload, folder: Path, repeats: int,
                        hidden: int = 2048) -> dict:
    """The share of this machine's matrix rate that training a model of `save_random_model` reaches.

    Every distinct token of one prompt and its replies is counted once.
    """
    model = save_random_model(folder / "random", hidden)
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
