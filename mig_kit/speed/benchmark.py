"""Stage 08: what it saves to read every prompt once, beside stock TRL and transformers in one run.

Both sides have the same weights, the same data and the same number of tokens per reply, and take turns. A prompt of several
images is long and its replies are short; stock trainers read it, and run the vision tower over its images, once per reply.
Nothing is remembered from one repetition to the next: every rollout of the kit encodes its images anew.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.common import progress_bar, release_memory
from mig_kit.engine.generation import Sampling, generate_rollouts
from mig_kit.engine.models import Hardware, Policy, load_model, load_processor, tiny_config, unwrap_peft
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.pipeline.params import profile_params
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.stages import grpo
from mig_kit.world.scenes import draw_scene
from mig_kit.world.tasks import World

BOX_FORMAT = BoxFormat(max_pixels=4_000_000)


STOCK_ATTENTION = "sdpa"  # transformers' default


STAGES = ("rollout", "train", "grpo_step", "rejection", "evaluate", "evaluate_alike")


ALIKE = 5  # questions about the same images: all of MIG-Bench's 555 questions about six images are such fives


@dataclass(frozen=True)
class Workload:
    """What is measured. images: of a prompt; group: replies to it; tokens: of a reply; side: of an image, pixels.

    prompts: of a GRPO step, as many as stage 05 learns from at a time.
    """

    images: int = 6
    group: int = 8
    tokens: int = 64
    side: int = 392
    prompts: int = 4


def make_questions(load: Workload, count: int, seed: int = 0, alike: int = 1) -> list[Sample]:
    """`count` questions over `load.images` drawn scenes each, blown up to `load.side` pixels; `alike` about the same scenes."""
    rng, world, made = random.Random(f"benchmark/{seed}"), World(), []
    for i in range(count):
        if i % alike == 0:
            scenes = [world.arrange_scene(rng, world.draw_appearances(rng, 4), (84, 84)) for _ in range(load.images)]
            images = tuple(draw_scene(scene).resize((load.side, load.side)) for scene in scenes)
        things = [thing for scene in scenes for thing in scene.objects]
        thing = things[i % alike % len(things)]
        box = tuple(v * load.side / 84 for v in thing.box)
        question = f"Find the {thing.name}."
        made.append(Sample(f"benchmark/{seed}/{i}", "benchmark", "benchmark", "val", images, question, ((1, box),)))
    return made


def random_model(folder: Path, tiny: Path, hidden: int, layers: int, seed: int = 0) -> Path:
    """A random Qwen2.5-VL in `folder`, with the tokenizer and processor files of `tiny`.

    Its layers are shaped like the 3B's, which they equal at hidden 2048: heads 128 wide, one pair of keys and values to eight
    of them, an MLP 5.375 times as wide. hidden: a multiple of 128.
    """
    torch.manual_seed(seed)
    processor = load_processor(tiny, box_format=BoxFormat())
    shape = tiny_config(len(processor.tokenizer), hidden=hidden, layers=layers)
    text = shape.text_config
    text.num_attention_heads, text.intermediate_size = hidden // 128, hidden * 43 // 8
    text.num_key_value_heads = max(1, text.num_attention_heads // 8)
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [16, 24, 24]}
    Qwen2_5_VLForConditionalGeneration._from_config(shape).to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stock_model(model: str | Path, hw: Hardware, attention: str = STOCK_ATTENTION) -> Qwen2_5_VLForConditionalGeneration:
    """The model as transformers itself loads it: its own attention, and its convolution over patches."""
    weights = AutoModelForImageTextToText.from_pretrained(
        model, dtype=hw.dtype, attn_implementation=attention, device_map=hw.device, use_safetensors=True)
    return weights.eval()


def _wait(hw: Hardware) -> None:
    if hw.device == "cuda":
        torch.cuda.synchronize()


def time_call(call: Callable[[], object], hw: Hardware) -> float:
    """Wall time of one call."""
    _wait(hw)
    start = time.perf_counter()
    call()
    _wait(hw)
    return time.perf_counter() - start


def compare_times(stock: Callable[[], object], kit: Callable[[], object], repeats: int, hw: Hardware) -> dict:
    """Both, warmed up, in turns: medians in seconds, their ratio, and the fastest and slowest of each."""
    stock(), kit()
    pairs = [(time_call(stock, hw), time_call(kit, hw)) for _ in range(repeats)]
    theirs, ours = zip(*pairs)
    return {"stock_s": round(statistics.median(theirs), 4), "kit_s": round(statistics.median(ours), 4),
            "ratio": round(statistics.median(theirs) / statistics.median(ours), 2),
            "stock_spread": [round(min(theirs), 4), round(max(theirs), 4)],
            "kit_spread": [round(min(ours), 4), round(max(ours), 4)]}


def peak_memory(call: Callable[[], object], hw: Hardware) -> float:
    """MiB that a call needs at its peak beyond what was there before: of the GPU, else of the process."""
    release_memory()
    if hw.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    process, over = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch():
        nonlocal highest
        while not over.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    over.set()
    watcher.join()
    return round((highest - before) / 2**20, 1)


class TrainerPair:
    """Stock TRL's trainer and the kit's, on copies of one model, ready for single steps.

    stock_attention: transformers' name of what the stock side computes attention with.
    """

    def __init__(self, model: str | Path, hw: Hardware, load: Workload, folder: Path, stock_attention: str = STOCK_ATTENTION,
                 seed: int = 0):
        self.load, self.hw, self.samples = load, hw, make_questions(load, load.prompts, seed)
        self.trainers = {}
        for share in (False, True):
            loaded = load_model(model, hw) if share else stock_model(model, hw, stock_attention)
            torch.manual_seed(seed)
            policy = Policy(loaded, load_processor(model, BOX_FORMAT), hw, BOX_FORMAT)
            made = grpo.grpo_trainer(policy, self.samples, folder / str(share), self._params(share, seed),
                                     min_new_tokens=load.tokens)
            torch.manual_seed(seed + 1)
            for name, parameter in made.model.named_parameters():  # an adapter that does something
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.02)
            made.create_optimizer()
            made.model.train()
            made.current_gradient_accumulation_steps = 1
            self.trainers[share] = made
        self.rows = {share: [made.train_dataset[i] for i in range(load.prompts) for _ in range(load.group)]
                     for share, made in self.trainers.items()}

    def _params(self, share: bool, seed: int) -> SimpleNamespace:
        load = self.load
        return SimpleNamespace(**profile_params("05_grpo") | {
            "share_prefix": share, "num_generations": load.group, "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": load.prompts * load.group, "max_steps": 1,
            "learning_rate": 1e-4, "warmup_steps": 1, "scale_rewards": "group", "seed": seed,
            "max_completion_length": load.tokens, "save_steps": 100})

    def rollout(self, share: bool) -> dict:
        """Replies and rewards of a step, and advantages that are not all 0; the kit's cache of prompts starts empty."""
        made = self.trainers[share]
        if share:
            made.cache.clear()
        batch = made._generate_and_score_completions(self.rows[share])
        spread = torch.linspace(-1, 1, self.load.group, device=batch["completion_ids"].device)
        return {**batch, "advantages": spread.repeat(self.load.prompts)}

    def batches(self) -> dict[bool, dict]:
        """The same replies as either trainer's loss reads them."""
        batch = self.rollout(False)
        ids, mask = batch["completion_ids"], batch["completion_mask"]
        where = torch.arange(self.load.prompts, device=ids.device).repeat_interleave(self.load.group)
        return {False: batch, True: {**batch, "sample": where, "prompt_ids": ids[:, :0], "prompt_mask": mask[:, :0]}}

    def learn(self, share: bool, batch: dict) -> None:
        """Log-probabilities, loss and gradients of a batch."""
        made = self.trainers[share]
        made.model.zero_grad()
        with made.compute_loss_context_manager():
            loss = made._compute_loss(made.model, batch)
        loss.backward()

    def step(self, share: bool) -> None:
        """A whole GRPO step."""
        self.learn(share, self.rollout(share))
        self.trainers[share].optimizer.step()

    def gradient_error(self, batches: dict[bool, dict]) -> float:
        """Norm of the gradients' difference over the norm of stock TRL's, over all adapters."""
        for share, batch in batches.items():
            self.learn(share, batch)
        stock, kit = (torch.cat([p.grad.flatten().float() for p in made.model.parameters() if p.grad is not None])
                      for made in (self.trainers[False], self.trainers[True]))
        return float((stock - kit).norm() / stock.norm())


def _stock_inputs(processor, samples: list[Sample], device) -> dict:
    texts = [processor.apply_chat_template(chat_messages(s, BOX_FORMAT), add_generation_prompt=True, tokenize=False) for s in samples]
    return processor(text=texts, images=[list(s.images) for s in samples], padding=True, return_tensors="pt").to(device)


def rejection_sampling_pair(model, processor, samples: list[Sample], load: Workload, hw: Hardware) -> tuple[Callable, Callable]:
    """(stock, kit): `load.group` sampled replies to every question, all questions in one batch.

    Stock is `generate(num_return_sequences=group)`.
    """

    def stock():
        with torch.no_grad(), torch.autocast(hw.device, torch.bfloat16, enabled=hw.autocast):
            return model.generate(**_stock_inputs(processor, samples, model.device), do_sample=True, top_k=0, top_p=1.0,
                                  num_return_sequences=load.group, min_new_tokens=load.tokens, max_new_tokens=load.tokens)

    def kit():
        prompts = PromptCache(model, processor, BOX_FORMAT, autocast=hw.autocast).get(samples)
        return generate_rollouts(model, processor, prompts, load.group, Sampling(1.0, 1.0, load.tokens, load.tokens), None, hw.autocast)

    return stock, kit


def evaluation_pair(model, processor, samples: list[Sample], load: Workload, hw: Hardware) -> tuple[Callable, Callable]:
    """(stock, kit): one greedy reply to every question, one at a time as MIG-Bench's script does, or in one batch."""

    def stock():
        with torch.no_grad(), torch.autocast(hw.device, torch.bfloat16, enabled=hw.autocast):
            return [model.generate(**_stock_inputs(processor, [s], model.device), do_sample=False,
                                   min_new_tokens=load.tokens, max_new_tokens=load.tokens) for s in samples]

    def kit():
        prompts = PromptCache(model, processor, BOX_FORMAT, autocast=hw.autocast).get(samples)
        return generate_rollouts(model, processor, prompts, 1, Sampling(0.0, 1.0, load.tokens, load.tokens), None, hw.autocast)

    return stock, kit


def minimal_flops(model, prompt: int, replies: int, tokens: int) -> float:
    """Floating-point operations that log-probabilities and gradients of a group cannot do without.

    Every distinct token once: forward and the gradient of the activations through frozen weights, and the adapters' own
    gradient; attention of every token to what stands before it (backward counts twice); the head for the replies only. In the
    last layer the prompt has keys and values alone, but for its last token.
    """
    language = unwrap_peft(model).model.language_model
    work, last = {"all": 0, "unread": 0}, f"{len(language.layers) - 1}."
    for name, parameter in language.layers.named_parameters():
        if parameter.ndim > 1:
            passes = (3 if ".lora_" in name else 2) * parameter.numel()
            work["all"] += passes
            work["unread"] += passes if name.startswith(last) and ".k_proj" not in name and ".v_proj" not in name else 0
    shape, every = language.config, prompt + replies * tokens
    linear = 2 * every * work["all"] - 2 * (prompt - 1) * work["unread"]
    head = 2 * 2 * replies * tokens * shape.hidden_size * shape.vocab_size
    own, before = replies * (tokens * prompt + tokens**2 / 2), prompt**2 / 2
    pairs = shape.num_hidden_layers * (before + own) - before + prompt
    return linear + head + 3 * 4 * shape.hidden_size * pairs


def matrix_rate(hw: Hardware, rounds: int = 5) -> float:
    """FLOP/s of matrix products in the dtype in use: the best of a few sizes and of `rounds`."""
    dtype = torch.bfloat16 if hw.autocast or hw.dtype == torch.bfloat16 else torch.float32
    best = 0.0
    for m, k, n in ((2048, 1024, 1024), (2048, 1024, 2816), (4096, 1024, 4096)):
        a, b = torch.ones(m, k, dtype=dtype, device=hw.device), torch.ones(n, k, dtype=dtype, device=hw.device)
        torch.nn.functional.linear(a, b)
        best = max(best, 2 * m * k * n / min(time_call(lambda a=a, b=b: torch.nn.functional.linear(a, b), hw) for _ in range(rounds)))
    return best


def utilisation(model: str | Path, hw: Hardware, load: Workload, folder: Path, repeats: int) -> dict:
    """Share of the matrix rate that log-probabilities and gradients of one prompt's replies reach, counting only work that must be
    done."""
    pair = TrainerPair(model, hw, replace(load, prompts=1), folder)
    made = pair.trainers[True]
    batch = pair.rollout(True)
    prompt = len(made.cache.get(pair.samples)[0].ids)
    work = minimal_flops(made.model, prompt, load.group, load.tokens)
    pair.learn(True, batch)
    took, rate = statistics.median(time_call(lambda: pair.learn(True, batch), hw) for _ in range(repeats)), matrix_rate(hw)
    return {"seconds": round(took, 4), "gflop": round(work / 1e9, 2), "matrix_gflops": round(rate / 1e9, 1),
            "parameters_m": round(sum(p.numel() for p in made.model.parameters()) / 1e6, 1), "share": round(work / took / rate, 3)}


def compare_training(model: str | Path, hw: Hardware, load: Workload, folder: Path, repeats: int, stock_attention: str = STOCK_ATTENTION,
             whole: bool = False) -> dict:
    """rollout and train of one load, side by side; whole: also a whole GRPO step, and its memory."""
    pair = TrainerPair(model, hw, load, folder, stock_attention)
    batches = pair.batches()
    pair.rollout(True)
    found = {"prompt_tokens": len(pair.trainers[True].cache.get(pair.samples)[0].ids),
             "rollout": compare_times(lambda: pair.rollout(False), lambda: pair.rollout(True), repeats, hw),
             "train": compare_times(lambda: pair.learn(False, batches[False]), lambda: pair.learn(True, batches[True]), repeats, hw)}
    if whole:
        found["grpo_step"] = compare_times(lambda: pair.step(False), lambda: pair.step(True), repeats, hw)
        found["peak_mem_mb"] = {"stock": peak_memory(lambda: pair.step(False), hw), "kit": peak_memory(lambda: pair.step(True), hw)}
    return found


def run_sweep(model: str | Path, hw: Hardware, load: Workload, folder: Path, repeats: int, images: list[int], groups: list[int],
          tokens: list[int], prompts: list[int], stock_attention: str = STOCK_ATTENTION) -> list[dict]:
    """Rollout and training with one thing at a time changed from `load` with a single prompt; a row per load and stage."""
    load = replace(load, prompts=1)
    loads = dict.fromkeys([*(replace(load, images=n) for n in images), *(replace(load, group=n) for n in groups),
                           *(replace(load, tokens=n) for n in tokens), *(replace(load, prompts=n) for n in prompts)])
    rows = []
    for number, one in enumerate(progress_bar(loads, "loads")):
        found = compare_training(model, hw, one, folder / str(number), repeats, stock_attention)
        release_memory()
        rows += [{**vars(one), "prompt_tokens": found["prompt_tokens"], "stage": stage, **found[stage]}
                 for stage in ("rollout", "train")]
    return rows


def run_headline(model: str | Path, hw: Hardware, load: Workload, folder: Path, repeats: int,
             stock_attention: str = STOCK_ATTENTION) -> dict:
    """All six comparisons at one load, the memory of a whole step, and how far the gradients are apart in float32 (one prompt).

    Rejection sampling has as many questions as a step, evaluation four times as many about images of their own ("evaluate") and
    five times as many, ALIKE about the same images each ("evaluate_alike").
    """
    exact = TrainerPair(model, replace(hw, dtype=torch.float32, autocast=False, attention="sdpa"), replace(load, prompts=1), folder)
    error = exact.gradient_error(exact.batches())
    del exact
    found = {"load": vars(load), "model": Path(model).name, "hardware": hw.reason, "stock_attention": stock_attention,
             "repeats": repeats, "grad_rel_error": error,
             **compare_training(model, hw, load, folder, repeats, stock_attention, whole=True)}
    release_memory()
    theirs, ours = stock_model(model, hw, stock_attention), load_model(model, hw)
    processor = load_processor(model, BOX_FORMAT)
    for name, maker, count, alike in (("rejection", rejection_sampling_pair, load.prompts, 1), ("evaluate", evaluation_pair, 4 * load.prompts, 1),
                                      ("evaluate_alike", evaluation_pair, ALIKE * load.prompts, ALIKE)):
        samples = make_questions(load, count, alike=alike)
        stock, kit = maker(theirs, processor, samples, load, hw)[0], maker(ours, processor, samples, load, hw)[1]
        found[name] = compare_times(stock, kit, (repeats + 1) // 2, hw)
    return found
