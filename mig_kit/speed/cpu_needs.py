"""What a model of real size needs of this machine's CPU: memory and minutes per stage.

Stage 00 prints it where a profile, or its `model`, names another model than the shipped one
and there is no GPU. Memory follows from shapes, as in `gpu_needs`; minutes from four rates that
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
from mig_kit.engine.rollout_keeper import PROMPTS, REPLIES
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
    count_drawn,
    count_held_out,
    count_systems,
    count_traces,
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
from mig_kit.stages.merge import LARGE_MODEL_BYTES, MERGE_METHODS
from mig_kit.stages.synthesize import write_traces
from mig_kit.world.suites import SIZE_PARAMS, suite_tasks
from mig_kit.world.tasks import TASKS, make_sample

RUNTIME_GIB = 1.3  # of a process: Python, its libraries and the notebook
SHARD_GIB = 4.5  # that merging takes at most: a shard of 2 GiB, and copies of its largest tensor
LOAD_BYTES = 1e9  # bytes of weights a second, read or written; a guess
START_SECONDS = 15  # of a stage: its processes and their imports
PROBES, FEWEST_PROBES = 64, 8  # samples with which 02 checks that the model sees, each read twice
SHOWN = 4  # validation questions that 02 shows before and after
LESSON_PASSES = 8  # over one group, in the lesson of 05
TASKS_SHOWN = 12  # questions at most that 05 shows before and after, one of each task
MERGED_REPLY = 128  # tokens of the reply that 03 draws


@dataclass(frozen=True)
class Rates:
    """flops: FLOP/s of matrix products; weight_bytes: bytes/s of weights that a few rows are
    multiplied by; unpacked, packed: weights/s that are made of 4 bits, and to 4 bits.
    """

    flops: float
    weight_bytes: float
    unpacked: float
    packed: float


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
    layer = weight[:, :2048].contiguous()

    def pack() -> tuple:
        return quantize_4bit(layer, blocksize=64, compress_statistics=True, quant_type="nf4")

    packed, state = pack()

    def seconds(call) -> float:
        return min(time_call(call, hardware) for _ in range(3))

    return Rates(
        flops=matrix_rate(hardware, rounds=2),
        weight_bytes=weight.nbytes / seconds(lambda: torch.nn.functional.linear(rows, weight)),
        unpacked=layer.numel() / seconds(lambda: dequantize_4bit(packed, state)),
        packed=layer.numel() / seconds(pack))


def measure_lengths(params: Profile) -> Lengths:
    """Of drawn scenes as `measure_drawn_lengths`; of other data the bounds of `gpu_needs`."""
    p = params.synthesize
    if p.data == "scenes":
        return measure_drawn_lengths(params)
    images = IMAGES * p.max_pixels // 28**2
    prompt = TEXT_TOKENS + images
    return Lengths(prompt, images, TRACE_TOKENS, prompt, TRACE_TOKENS)


def measure_drawn_lengths(params: Profile) -> Lengths:
    """Of drawn scenes, with the model's own tokenizer."""
    p = params.synthesize
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
                          measure_lengths(params), measure_drawn_lengths(params))


def predict_on_cpu(shape: Shape, params: Profile, hardware: Hardware, rates: Rates,
                   lengths: Lengths, drawn_lengths: Lengths) -> list[dict]:
    """Rows {stage, memory_gib, private_gib, minutes} of stages 02 to 06 on this machine's CPU.

    memory_gib: the peak of all processes of the stage together, with the bfloat16 weights that they
    map from files; private_gib: the peak without these pages, which the system can take back and
    read again. lengths: of the profile's data; drawn_lengths: of the drawn suites of 06.
    """
    memory, private = _predict_gib(shape, params, hardware, lengths)
    work = _Work(shape, params, hardware, rates)
    seconds = {"02_sft": work.sft(lengths), "03_merge": work.merge(lengths),
               "04_rejection_sampling": work.sample(lengths), "05_grpo": work.grpo(lengths),
               "06_evaluate": work.evaluate(lengths, drawn_lengths)}
    return [{"stage": stage, "memory_gib": round(memory[stage], 1),
             "private_gib": round(private[stage], 1),
             "minutes": round((START_SECONDS + seconds[stage]) / 60, 1)} for stage in memory]


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
                 lengths: Lengths) -> tuple[dict[str, float], dict[str, float]]:
    """Stage -> GiB with, and without, the weights that are mapped from files."""
    _, sft, sampling, grpo, evaluate, _ = params
    width = hardware.dtype.itemsize
    weights = _weight_bytes(shape, hardware)
    mapped = weights / GIB if hardware.dtype == torch.bfloat16 else 0

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
    four_bit = shape.linear_weights * NF4_BYTES + rest * width
    shard = min(SHARD_GIB, weights / GIB)
    packing = (weights + four_bit) / GIB  # at most: files are read ahead of what is packed
    group, reply = grpo.num_generations, grpo.max_completion_length
    in_graph = max(1, (grpo.micro_replies or grpo.per_device_train_batch_size) // group)
    learning = training_memory(shape, Load(lengths.longest_prompt, in_graph, group, reply),
                               grpo.lora_r, grpo.gradient_checkpointing, four_bit=False)
    trained = learning["adapter, gradients, Adam"]
    processes = _count_processes(grpo)
    learned = (learning["activations"] * width / 2) + learning["logits"]
    drawn = draw(groups_per_update(grpo) // processes or 1, group, reply)
    drawing = _weight_bytes(shape, hardware, is_drawing=True) / GIB
    before = weights / GIB + draw(4, 1, sft.max_new_tokens)
    fine_tuning = adapter + (four_bit + kept + logits) / GIB
    merged_reply = weights / GIB + draw(4, 1, TRACE_TOKENS)
    sampled = drawing + draw(sampling.batch_size, sampling.replies, sampling.max_new_tokens,
                             sampling.workers)
    updates = processes * (trained + max(weights / GIB + learned, drawing + drawn))
    answers = drawing + max(
        draw(evaluate.batch_size, replies, evaluate.max_new_tokens, evaluate.workers)
        for replies in {1, max(1, evaluate.replies)})
    total = {"02_sft": max(packing, before, fine_tuning),
             "03_merge": max(packing, shard, merged_reply), "04_rejection_sampling": sampled,
             "05_grpo": max(updates, shard), "06_evaluate": answers}
    private = {"02_sft": max(packing, before - mapped, fine_tuning),
               "03_merge": max(packing, shard, merged_reply - mapped),
               "04_rejection_sampling": sampled - mapped,
               "05_grpo": max(updates - processes * mapped, shard),  # merged at the end
               "06_evaluate": answers - mapped}
    runtime = {stage: RUNTIME_GIB * (processes if stage == "05_grpo" else 1) for stage in total}
    return ({stage: runtime[stage] + gib for stage, gib in total.items()},
            {stage: runtime[stage] + gib for stage, gib in private.items()})


def _count_processes(grpo: SimpleNamespace) -> int:
    launch = jobs.plan_launch(grpo.launcher, grpo.gradient_accumulation_steps)
    return max(1, launch.local) if launch else 1


@dataclass(frozen=True)
class _Work:
    """What the stages compute, in seconds.

    An image is seen once for all that is computed of a prompt, but for fine-tuning.
    """

    shape: Shape
    params: Profile
    hardware: Hardware
    rates: Rates

    @property
    def load(self) -> float:
        """Reading the weights; writing them takes as long."""
        return _weight_bytes(self.shape, self.hardware) / LOAD_BYTES

    @property
    def pack(self) -> float:
        return self.shape.linear_weights / self.rates.packed

    @property
    def unpack(self) -> float:
        return self.shape.linear_weights / self.rates.unpacked

    @property
    def counts(self) -> dict[str, int]:
        return count_work(self.params)

    def see(self, lengths: Lengths) -> float:
        return 2 * self.shape.vision * 4 * lengths.images / self.rates.flops

    def read(self, lengths: Lengths, replies: int = 0, tokens: float = 0) -> float:
        """A pass over a prompt and replies of so many tokens, without its images."""
        flops = language_flops(self.shape, round(lengths.prompt))
        head = 2 * self.shape.hidden * self.shape.vocabulary
        reply_flops = language_flops(self.shape, round(tokens), round(lengths.prompt))
        return (flops + replies * (reply_flops + tokens * head)) / self.rates.flops

    def draw(self, lengths: Lengths, prompts: float, replies: int, tokens: int, batch: int,
             unpack: float = 0, is_seen: bool = False) -> float:
        """A step multiplies the weights by a row for each reply, or waits for the weights."""
        if not prompts:
            return 0
        shape, rates = self.shape, self.rates
        at_once = _at_once(shape, self.hardware, lengths, min(batch, max(1, round(prompts))),
                           replies, tokens)
        language_bytes = (shape.total - shape.vision) * self.hardware.dtype.itemsize
        row_flops = 2 * shape.linear_weights + 2 * shape.hidden * shape.vocabulary
        step = max(language_bytes / rates.weight_bytes, at_once * replies * row_flops / rates.flops)
        seen = 0 if is_seen else self.see(lengths)
        return (prompts * (seen + self.read(lengths))
                + prompts / at_once * tokens * (step + unpack))

    def sft(self, lengths: Lengths) -> float:
        sft, rows = self.params.sft, self.counts["02_sft"]
        probes = min(PROBES, round(rows / sft.num_train_epochs))
        probes = 2 * probes if probes >= FEWEST_PROBES else 0
        read_row = self.read(lengths, 1, lengths.trace)
        shown = min(SHOWN, _count_shown(self.params))
        micro_steps = -(-rows // sft.per_device_train_batch_size)
        return (3 * self.load + 2 * self.pack + probes * (self.see(lengths) + read_row)
                + self.draw(lengths, shown, 1, sft.max_new_tokens, 4)
                + self.draw(lengths, shown, 1, sft.max_new_tokens, 4, self.unpack)
                + rows * (self.see(lengths) + 2 * read_row) + micro_steps * 2 * self.unpack)

    def merge(self, lengths: Lengths) -> float:
        """The merged model is written; it, what training saw and other ways are compared."""
        traces = count_traces(self.params.synthesize)
        probes = -(-traces // max(1, traces // self.params.merge.probe_samples))
        is_large = self.shape.total * 2 > LARGE_MODEL_BYTES
        ways = 1 if is_large else len(MERGE_METHODS)
        read_probes = probes * (self.see(lengths) + self.read(lengths, 1, lengths.trace))
        return (2 * self.load + self.pack + self.unpack
                + (2 + ways) * (self.load + read_probes) + self.pack + ways * 2 * self.load
                + self.load + self.draw(lengths, 1, 1, MERGED_REPLY, 1))

    def sample(self, lengths: Lengths) -> float:
        p = self.params.sampling
        return self.load + self.draw(lengths, self.counts["04_rejection_sampling"], p.replies,
                                     p.max_new_tokens, p.batch_size)

    def grpo(self, lengths: Lengths) -> float:
        """The lesson, the kept rollouts, the updates, and the questions before and after."""
        p = self.params.grpo
        group, reply, groups = p.num_generations, p.max_completion_length, groups_per_update(p)
        group_pass = self.read(lengths, group, reply)
        lesson = (self.load + self.draw(lengths, 1, group, reply, 1)
                  + (LESSON_PASSES + p.gradient_checkpointing) * group_pass)
        in_graph = max(1, (p.micro_replies or p.per_device_train_batch_size) // group)
        in_step = max(1, p.per_device_train_batch_size // group)
        passes = 2 + p.gradient_checkpointing + (p.beta > 0) + (in_step > in_graph)
        times = 1 + -(-p.max_steps // p.rollout_steps) if p.rollout_steps else 0
        kept = times and PROMPTS * self.see(lengths) + times * self.draw(
            lengths, PROMPTS, REPLIES, reply, PROMPTS, is_seen=True)
        shown = min(TASKS_SHOWN, len(TASKS) if self.params.synthesize.data == "scenes" else 1)
        return (lesson + self.load + kept
                + p.max_steps * self.draw(lengths, groups, group, reply, groups)
                + self.counts["05_grpo"] * passes * group_pass + 2 * self.load
                + 2 * (self.load + self.draw(lengths, shown, 1, reply, shown)))

    def evaluate(self, lengths: Lengths, drawn_lengths: Lengths) -> float:
        """Greedy replies, replies to the first questions of each task, and the KL from the base."""
        p, systems = self.params.evaluate, count_systems(self.params)
        drawn = 0 if p.benchmark_limit else count_drawn(p)
        rest = self.counts["06_evaluate"] / systems - drawn
        drawn_tasks = sum(len(suite_tasks(suite)) for suite, name in SIZE_PARAMS.items()
                          if vars(p)[name])
        own_tasks = 1 if rest and not p.benchmark_limit else 0
        suites = sum(vars(p)[name] > 0 for name in SIZE_PARAMS.values())

        def answer(words: Lengths, questions: float, sampled: float) -> float:
            return (self.draw(words, questions, 1, p.max_new_tokens, p.batch_size)
                    + self.draw(words, min(questions, sampled) * (p.replies > 0), p.replies,
                                p.max_new_tokens, p.batch_size, is_seen=True))

        def compare(words: Lengths, n_suites: int) -> float:
            """(systems - 1) systems' replies, each read by that system and by the base."""
            prompts = p.kl_samples * n_suites
            return (systems * prompts * self.see(words)
                    + 2 * (systems - 1) * prompts * self.read(words, 1, p.max_new_tokens))

        return (systems * (self.load + answer(lengths, rest, own_tasks * p.sampled_per_task)
                           + answer(drawn_lengths, drawn, drawn_tasks * p.sampled_per_task))
                + (p.kl_samples > 0) * systems * self.load
                + compare(lengths, own_tasks) + compare(drawn_lengths, suites))


def _count_shown(params: Profile) -> int:
    """Every seventh validation question: how many there are."""
    p = params.synthesize
    if p.data == "scenes":
        return -(-len(TASKS) * p.val_per_task // 7)
    return -(-count_held_out(params) // 7)
