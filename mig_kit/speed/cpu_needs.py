"""What a model of real size needs of this machine's CPU: memory and minutes per stage.

Stage 00 prints it where a profile, or its `model`, names another model than the shipped one
and there is no GPU. Memory follows from shapes, as in `gpu_needs`; minutes from three rates that
are measured here in seconds. Replies count as long as they may be, as a random model's are.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from mig_kit.boxes import BoxFormat
from mig_kit.engine import jobs
from mig_kit.engine.generation import KV_BYTES, count_prompts_at_once
from mig_kit.engine.models import Hardware, resolve_model
from mig_kit.engine.processors import load_processor
from mig_kit.engine.server_requests import PromptEncoder
from mig_kit.speed.gpu_needs import (
    GIB,
    IMAGES,
    NF4_BYTES,
    TEXT_TOKENS,
    TRACE_TOKENS,
    Load,
    Profile,
    Shape,
    count_work,
    find_shape,
    groups_per_update,
    language_flops,
    layer_bytes,
    read_profile,
    training_memory,
)
from mig_kit.speed.utilisation import matrix_rate
from mig_kit.speed.workload import time_call
from mig_kit.stages.synthesize import write_traces
from mig_kit.world.suites import SIZE_PARAMS
from mig_kit.world.tasks import TASKS, make_sample

RUNTIME_GIB = 1.0  # of a process: Python, its libraries and the notebook
SHARD_GIB = 4.5  # that merging takes at most: a shard of 2 GiB, and copies of its largest tensor
LOAD_BYTES = 5e8  # bytes of weights a second, read and made ready; a guess
PROBES = 64  # samples at most with which 02 checks that the model sees, each read twice


@dataclass(frozen=True)
class Rates:
    """flops: FLOP/s of matrix products; weight_bytes: bytes/s of weights that a few rows are
    multiplied by; unpacked: 4-bit weights/s that are dequantised.
    """

    flops: float
    weight_bytes: float
    unpacked: float


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, of its images and of a trace on average; the longest prompt and trace."""

    prompt: float
    images: float
    trace: float
    longest_prompt: int
    longest_trace: int


def measure_rates(hardware: Hardware) -> Rates:
    """The rates of this machine in the dtype in use; a few seconds."""
    is_half = hardware.autocast or hardware.dtype == torch.bfloat16
    dtype = torch.bfloat16 if is_half else torch.float32
    weight, rows = torch.ones(11008, 4096, dtype=dtype), torch.ones(8, 4096, dtype=dtype)
    packed, state = quantize_4bit(weight[:, :2048].contiguous(), blocksize=64,
                                  compress_statistics=True, quant_type="nf4")

    def seconds(call) -> float:
        return min(time_call(call, hardware) for _ in range(3))

    return Rates(
        flops=matrix_rate(hardware, rounds=2),
        weight_bytes=weight.nbytes / seconds(lambda: torch.nn.functional.linear(rows, weight)),
        unpacked=11008 * 2048 / seconds(lambda: dequantize_4bit(packed, state)))


def measure_lengths(params: Profile) -> Lengths:
    """Of drawn scenes with the model's own tokenizer; of other data the bounds of `gpu_needs`."""
    p = params.synthesize
    if p.data != "scenes":
        images = IMAGES * p.max_pixels // 28**2
        prompt = TEXT_TOKENS + images
        return Lengths(prompt, images, TRACE_TOKENS, prompt, TRACE_TOKENS)
    box_format = BoxFormat(p.min_pixels, p.max_pixels, p.coordinates)
    processor = load_processor(resolve_model(p.base_model), box_format)
    encoder = PromptEncoder(processor, box_format, [])
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(2)]
    traces = write_traces(samples, 0, (1, 1, 1), 0.0, 0.7, box_format)
    prompts = [encoder.prompt_ids(sample) for sample in samples]
    images = [ids.count(processor.image_token_id) for ids in prompts]
    lengths = [len(ids) for ids in prompts]
    replies = [len(ids) for ids in processor.tokenizer([t.text for t in traces])["input_ids"]]
    return Lengths(fmean(lengths), fmean(images), fmean(replies), max(lengths), max(replies))


def predict(profile: str, hardware: Hardware, model: str = "") -> list[dict]:
    """Rows of `predict_on_cpu` for a profile's model, or for the folder `model`.

    [] on a GPU, for the shipped base, which `stages.preflight` predicts, and for a model that is no
    folder: nothing is downloaded.
    """
    params = read_profile(profile)
    model = model or params.synthesize.base_model
    folder = Path(resolve_model(model))
    shape = find_shape(str(folder)) if folder.is_dir() else None
    if hardware.device == "cuda" or model == "tiny" or shape is None:
        return []
    synthesize = SimpleNamespace(**vars(params.synthesize) | {"base_model": model})
    params = params._replace(synthesize=synthesize)
    return predict_on_cpu(shape, params, hardware, measure_rates(hardware),
                          measure_lengths(params))


def predict_on_cpu(shape: Shape, params: Profile, hardware: Hardware, rates: Rates,
                   lengths: Lengths) -> list[dict]:
    """Rows {stage, memory_gib, minutes} of stages 02 to 06 on this machine's CPU.

    memory_gib: the peak of all processes of the stage together.
    """
    memory = _predict_gib(shape, params, hardware, lengths)
    seconds = _predict_seconds(shape, params, hardware, rates, lengths)
    return [{"stage": stage, "memory_gib": round(memory[stage], 1),
             "minutes": round(seconds[stage] / 60, 1)} for stage in memory]


def _weight_bytes(shape: Shape, hardware: Hardware, is_drawing: bool = False) -> int:
    """Of a whole model; under autocast, drawing has a copy of the language model in bfloat16."""
    copy = 2 * shape.linear_weights if hardware.autocast and is_drawing else 0
    return shape.total * hardware.dtype.itemsize + copy


def _at_once(shape: Shape, hardware: Hardware, lengths: Lengths, batch: int, replies: int,
             tokens: int, workers: int = 1) -> int:
    """Prompts of a batch that are drawn to at a time."""
    key_bytes = shape.kv_bytes * hardware.dtype.itemsize // 2
    return count_prompts_at_once(batch, lengths.longest_prompt, replies, tokens, key_bytes,
                                 KV_BYTES // workers)


def _predict_gib(shape: Shape, params: Profile, hardware: Hardware,
                 lengths: Lengths) -> dict[str, float]:
    _, sft, sampling, grpo, evaluate = params
    width = hardware.dtype.itemsize
    weights = _weight_bytes(shape, hardware)

    def draw(batch: int, replies: int, tokens: int, workers: int = 1) -> float:
        """GiB beside the weights, of all batches under way."""
        prompts = _at_once(shape, hardware, lengths, batch, replies, tokens, workers)
        read = prompts * lengths.longest_prompt
        keys = (read + prompts * replies * tokens) * shape.kv_bytes * width / 2
        logits = prompts * replies * shape.vocabulary * 12  # and probabilities, in float64
        states = read * (4 * shape.hidden + 3 * shape.inner) * width
        return workers * (keys + max(logits, states)) / GIB

    rows = sft.per_device_train_batch_size
    row_tokens = lengths.longest_prompt + lengths.longest_trace
    adapter = training_memory(shape, Load(1), sft.lora_r, False, False)["adapter, gradients, Adam"]
    kept = shape.layers * rows * row_tokens * layer_bytes(shape, sft.lora_r) * width / 2
    logits = rows * lengths.longest_trace * shape.vocabulary * 10
    rest = shape.total - shape.linear_weights
    four_bit = shape.linear_weights * NF4_BYTES + rest * 4  # float32 while it is made ready
    group, reply = grpo.num_generations, grpo.max_completion_length
    in_graph = max(1, (grpo.micro_replies or grpo.per_device_train_batch_size) // group)
    learning = training_memory(shape, Load(lengths.longest_prompt, in_graph, group, reply),
                               grpo.lora_r, grpo.gradient_checkpointing, four_bit=False)
    trained = learning["adapter, gradients, Adam"]
    processes = _count_processes(grpo)
    learned = (learning["activations"] * width / 2) + learning["logits"]
    drawn = draw(groups_per_update(grpo) // processes or 1, group, reply)
    drawing = _weight_bytes(shape, hardware, is_drawing=True) / GIB
    return {
        "02_sft": RUNTIME_GIB + max(weights / GIB + draw(4, 1, sft.max_new_tokens),
                                    adapter + (four_bit + kept + logits) / GIB),
        "03_merge": RUNTIME_GIB + max(SHARD_GIB, weights / GIB + draw(4, 1, TRACE_TOKENS)),
        "04_rejection_sampling": RUNTIME_GIB + drawing + draw(
            sampling.batch_size, sampling.replies, sampling.max_new_tokens, sampling.workers),
        "05_grpo": processes * (RUNTIME_GIB + trained + max(weights / GIB + learned,
                                                            drawing + drawn)),
        "06_evaluate": RUNTIME_GIB + drawing + max(
            draw(evaluate.batch_size, replies, evaluate.max_new_tokens, evaluate.workers)
            for replies in {1, max(1, evaluate.replies)})}


def _count_processes(grpo: SimpleNamespace) -> int:
    launch = jobs.plan_launch(grpo.launcher, grpo.gradient_accumulation_steps)
    return max(1, launch.local) if launch else 1


def _predict_seconds(shape: Shape, params: Profile, hardware: Hardware, rates: Rates,
                     lengths: Lengths) -> dict[str, float]:
    _, sft, sampling, grpo, evaluate = params
    width = hardware.dtype.itemsize
    head, seeing = 2 * shape.hidden * shape.vocabulary, 2 * shape.vision * 4
    load = _weight_bytes(shape, hardware) / LOAD_BYTES
    unpack = shape.linear_weights / rates.unpacked
    read_prompt = seeing * lengths.images + language_flops(shape, round(lengths.prompt))
    read_row = (seeing * lengths.images + lengths.trace * head
                + language_flops(shape, round(lengths.prompt + lengths.trace)))
    language_bytes = (shape.total - shape.vision) * width

    def draw(prompts: float, replies: int, tokens: int, batch: int, unpacking: float = 0) -> float:
        """A step multiplies the weights by a row for each reply, or waits for the weights."""
        at_once = _at_once(shape, hardware, lengths, min(batch, max(1, round(prompts))), replies,
                           tokens)
        row_flops = 2 * shape.linear_weights + head
        step = max(language_bytes / rates.weight_bytes, at_once * replies * row_flops / rates.flops)
        return prompts * read_prompt / rates.flops + prompts / at_once * tokens * (step + unpacking)

    work = count_work(params)
    rows = work["02_sft"]
    micro_steps = -(-rows // sft.per_device_train_batch_size)
    group, reply = grpo.num_generations, grpo.max_completion_length
    reply_flops = language_flops(shape, reply, round(lengths.prompt)) + reply * head
    passes = 2 + grpo.gradient_checkpointing + (grpo.beta > 0) + (grpo.micro_replies > 0)
    learning = passes * (read_prompt + group * reply_flops) / rates.flops
    rewrite = 2 * load + 2 * shape.total * 2 / LOAD_BYTES
    probes = min(PROBES, round(rows / sft.num_train_epochs))
    questions = work["06_evaluate"] / 3
    sampled = questions * evaluate.sampled_per_task / max(1, evaluate.mig_per_task)
    return {
        "02_sft": 2 * load + 2 * unpack + 2 * probes * read_row / rates.flops
        + draw(4, 1, sft.max_new_tokens, 4) + draw(4, 1, sft.max_new_tokens, 4, unpack)
        + 2 * rows * read_row / rates.flops + micro_steps * 2 * unpack,
        "03_merge": 2 * rewrite + 3 * unpack + 4 * load + draw(1, 1, 128, 1),
        "04_rejection_sampling": load + draw(work["04_rejection_sampling"], sampling.replies,
                                             sampling.max_new_tokens, sampling.batch_size),
        "05_grpo": 3 * load + rewrite + 2 * draw(17, 1, reply, 17)
        + grpo.max_steps * draw(groups_per_update(grpo), group, reply, groups_per_update(grpo))
        + work["05_grpo"] * learning,
        "06_evaluate": 3 * (load + draw(questions, 1, evaluate.max_new_tokens, evaluate.batch_size)
                            + draw(sampled * (evaluate.replies > 0), max(1, evaluate.replies),
                                   evaluate.max_new_tokens, evaluate.batch_size))
        + (evaluate.kl_samples > 0) * 3 * load  # the KL: two systems' replies, read by two models
        + 4 * evaluate.kl_samples * len(SIZE_PARAMS) * read_row / rates.flops}
