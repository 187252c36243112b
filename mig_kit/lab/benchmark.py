"""Stage 08: the kit beside stock TRL and transformers in one run.

Both have the same weights, data and tokens per reply, and take turns. Stock trainers read a prompt
once per reply, the kit once per group. No rollout reuses the images of another.
"""

from dataclasses import replace
from pathlib import Path

import torch

from mig_kit.common import progress_bar, release_memory
from mig_kit.drawing.method_plots import count_tokens
from mig_kit.lab.trainers import gradient_error, make_sides, same_batches
from mig_kit.lab.workload import (
    BOX_FORMAT,
    STOCK_ATTENTION,
    Workload,
    compare_times,
    load_stock_model,
    make_questions,
    peak_memory,
)
from mig_kit.models.loading import Hardware, Policy, load_model
from mig_kit.models.processors import load_processor, render_prompt
from mig_kit.models.sample_prompts import make_cache
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, generate_rollouts

STAGES = ("rollout", "train", "grpo_step", "rejection", "evaluate", "evaluate_alike")
ALIKE = 5  # questions about the same images: all of MIG-Bench's 555 with six images are such fives


def compare_replies(stock: Policy, kit: Policy, samples: list[Sample], load: Workload, group: int,
                    repeats: int, name: str) -> dict:
    """`group` replies of `load.tokens` tokens to every question, from images on, side by side.

    One reply is greedy: stock is asked a question at a time, as in MIG-Bench's script, the kit all
    at once. Several are sampled, for both in one batch.
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
    """"rollout" and "train" of a load, side by side; with_step: also a GRPO step and its memory."""
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
    """`load` with a single prompt, and loads that change one of its numbers; each load once."""
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
    """Rollout and training of every load; a row per load and stage."""
    rows = []
    for number, load in enumerate(progress_bar(loads, "loads")):
        result = compare_training(model, hardware, load, folder / str(number), repeats)
        release_memory()
        rows += [{**vars(load), "prompt_tokens": result["prompt_tokens"], "stage": stage,
                  **result[stage]} for stage in ("rollout", "train")]
    return rows


def run_headline(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                 repeats: int) -> dict:
    """All comparisons at one load, a printed line each, and the gradients' difference in float32.

    "rejection" has as many questions as a step, "evaluate" four times as many; "evaluate_alike" has
    ALIKE times as many, ALIKE about the same images.
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
    """What was measured, with what `run_headline` has not printed: memory, gradients and more."""
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
