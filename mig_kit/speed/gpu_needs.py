"""What a real run needs of one GPU: memory and hours per stage, before anything is downloaded.

Predicted, not yet checked against a GPU. Memory follows from the models' shapes and from what a
layer keeps for the backward pass, which a test measures. Hours are nearer to a bound than to an
expectation: every prompt holds IMAGES images of the largest size, and every reply is as long as it
may be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import add, mul
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import AutoConfig

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.common import PROJECT_ROOT, model_folder
from mig_kit.data import own_data
from mig_kit.engine.generation import count_prompts_at_once
from mig_kit.engine.logprobs import HEAD_TOKENS
from mig_kit.engine.model_folders import FAMILIES
from mig_kit.pipeline.params import profile_params
from mig_kit.stages.sources import count_questions
from mig_kit.world.find_all import FIND_ALL
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.suites import SIZE_PARAMS, suite_tasks
from mig_kit.world.tasks import TASKS, make_sample

GIB = 2**30
# One card of each size (GB on its label): dense bfloat16 TFLOP/s and GB/s, as the makers give them.
CARDS = {24: ("RTX 4090", 165, 1008), 40: ("A100", 312, 1555), 80: ("A100", 312, 2039),
         141: ("H200", 989, 4800)}
# Cards with the memory of one of CARDS and other rates.
MORE_CARDS = {80: ("H100", 989, 3350)}
USABLE = 0.93  # share of a label's GB that can be used, in GiB
RUNTIME_GIB = 1.5  # the CUDA context, and what the allocator cannot use
RATE_SHARE = 0.35  # of a card's rates that is reached; a guess
LAYER_SECONDS = 0.001  # that a layer of a decoding step takes at least; a guess
SERVED_AT_ONCE = 256  # replies that a vLLM server draws together, in one captured graph per step
SERVED_SHARES = (0.45, 0.7)  # of a card's FLOP and byte rates that it reaches; guesses
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # a weight, with its scales (double quantisation)
IMAGES = 6  # of a prompt
OWN_QUESTIONS = 1000  # of own data whose file is named on the command line
TINY_TEXT_TOKENS = 120  # of a prompt's text and its reply, with the tiny profile's tokenizer
TEXT_TOKENS, TRACE_TOKENS = 200, 300  # of a prompt's text, and of a trace
ADVICE = {
    "02_sft": "lower max_pixels, or lora_r",
    "04_rejection_sampling": "lower max_pixels, or replies",
    "05_grpo": "lower max_pixels, num_generations or max_completion_length",
    "06_evaluate": "lower max_pixels"}


@dataclass(frozen=True)
class Shape:
    """A model: widths of the language model, parameters of all and of the vision tower, and the
    side of an image token (px).
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    total: int
    vision: int
    head_dim: int = 128
    token_side: int = 28

    def sum_projections(self, size: Callable[[int, int], int]) -> int:
        """The sum of `size(inputs, outputs)` over all projections: what 4-bit and LoRA apply to."""
        query, kv = self.head_dim * self.heads, self.head_dim * self.kv_heads
        widths = (query, query, kv, kv, self.inner, self.inner, self.inner)
        return self.layers * sum(size(self.hidden, width) for width in widths)

    @property
    def linear_weights(self) -> int:
        """Weights of all projections."""
        return self.sum_projections(mul)

    @property
    def kv_bytes(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2


# from each model's config.json; tests/engine/test_full_profile.py counts their parameters
SHAPES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": Shape(
        2048, 11008, 36, 16, 2, 151936, 3_754_622_976, 668_684_288),
    "Qwen/Qwen2.5-VL-7B-Instruct": Shape(
        3584, 18944, 28, 28, 4, 152064, 8_292_166_656, 676_550_144),
    "Qwen/Qwen2-VL-7B-Instruct": Shape(
        3584, 18944, 28, 28, 4, 152064, 8_291_375_616, 675_759_104),
    "Qwen/Qwen3-VL-4B-Instruct": Shape(
        2560, 9728, 36, 32, 8, 151936, 4_437_815_808, 415_347_712, token_side=32)}


class Profile(NamedTuple):
    """The parameters of the stages that decide what a machine needs."""

    synthesize: SimpleNamespace
    sft: SimpleNamespace
    sampling: SimpleNamespace
    grpo: SimpleNamespace
    evaluate: SimpleNamespace
    merge: SimpleNamespace


def read_profile(profile: str, changes: dict[str, dict] | None = None) -> Profile:
    """The parameters of a profile, a folder of params/; changes: by stage, those that differ."""
    stages = ("01_synthesize", *ADVICE, "03_merge")
    changes = changes or {}
    return Profile(*(SimpleNamespace(**{**profile_params(stage, profile), **changes.get(stage, {})})
                     for stage in stages))


def predict(profile: str) -> dict[str, list]:
    """What a profile needs: lines of `advice`, and the rows of `memory_table` and `hours_table`.

    All are empty where the profile's model is neither in SHAPES nor a folder, as is "tiny".
    """
    params = read_profile(profile)
    shape = find_shape(params.synthesize.base_model)
    if shape is None:
        return {"advice": [], "memory": [], "hours": []}
    advice = []
    for gigabytes in CARDS:
        pixels = fitting_pixels(shape, params, gigabytes)
        verdict = f"all stages fit, up to max_pixels {pixels}" if pixels else "not all stages fit"
        advice.append(f"{gigabytes} GB: {verdict} ({IMAGES} images a prompt)")
    return {"advice": advice, "memory": memory_table(predict_memory(shape, params)),
            "hours": hours_table(shape, params)}


def find_shape(model: str) -> Shape | None:
    """The shape of a known hub name or of a model folder; None for others: nothing is downloaded.
    """
    folder = model_folder(model)
    if model in SHAPES or model == "tiny" or not (folder / "config.json").is_file():
        return SHAPES.get(model)
    return count_shape(AutoConfig.from_pretrained(folder, local_files_only=True))


def count_shape(config) -> Shape:
    """The shape of a model by its configuration; its parameters are counted without weights."""
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    text, tower = config.text_config, config.vision_config
    head_dim = model.model.language_model.layers[0].self_attn.head_dim
    return Shape(
        text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
        text.num_key_value_heads, text.vocab_size, sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.model.visual.parameters()), head_dim,
        tower.patch_size * tower.spatial_merge_size)


@dataclass(frozen=True)
class Load:
    """What is in memory at once: `prompts` prompts of `prompt` tokens, with `replies` replies of
    `tokens` tokens to each.
    """

    prompt: int
    prompts: int = 1
    replies: int = 1
    tokens: int = 512


def layer_bytes(shape: Shape, lora_r: int) -> float:
    """Bytes per token that a layer keeps for its backward pass: bfloat16, LoRA with dropout."""
    return 62.125 * shape.hidden + 14 * shape.inner + 28 * lora_r + 8


def training_memory(shape: Shape, load: Load, lora_r: int, is_checkpointed: bool,
                    four_bit: bool) -> dict[str, float]:
    """GiB of each part of a training step.

    is_checkpointed: only the layers' inputs are kept, and one layer in full. four_bit also makes
    everything else float32, as peft's prepare_model_for_kbit_training does.
    """
    own_tokens = load.replies * load.tokens
    group_tokens = load.prompt + own_tokens  # the prompt is read once
    tokens, logit_tokens = load.prompts * group_tokens, load.prompts * own_tokens
    activations = tokens * shape.layers * layer_bytes(shape, lora_r)
    if is_checkpointed:
        layer_inputs = shape.layers * shape.hidden * (4 if four_bit else 2)
        activations = tokens * (layer_bytes(shape, lora_r) + layer_inputs)
        logit_tokens = min(logit_tokens, HEAD_TOKENS)
        if load.replies > 1:
            activations += load.prompts * group_tokens**2 * 2  # the mask of who sees whom
        else:
            logit_tokens = group_tokens  # SFT's loss reads the logits of all tokens at once
    rest = shape.total - shape.linear_weights
    weights = shape.linear_weights * NF4_BYTES + rest * 4 if four_bit else shape.total * 2
    adapter = lora_r * shape.sum_projections(add)
    return {"weights": weights / GIB, "adapter, gradients, Adam": adapter * 16 / GIB,
            "activations": activations / GIB,
            "logits": logit_tokens * shape.vocabulary * 10 / GIB}  # bf16, float32, gradient


def decoding_memory(shape: Shape, load: Load) -> dict[str, float]:
    """GiB of each part of drawing replies; the keys and values of a prompt are there once."""
    prompt_tokens = load.prompts * load.prompt
    tokens = load.prompts * (load.prompt + load.replies * load.tokens)
    return {"weights": shape.total * 2 / GIB, "keys and values": tokens * shape.kv_bytes / GIB,
            "logits": load.prompts * load.replies * shape.vocabulary * 6 / GIB,
            "prefill": prompt_tokens * (4 * shape.hidden + 3 * shape.inner) * 2 / GIB}


def predict_memory(shape: Shape, params: Profile) -> dict[str, dict[str, float]]:
    """Stage -> parts in GiB.

    Replies are drawn to as many prompts at a time as memory holds; the parts are those of one. 05
    draws replies, then learns from them: its parts are those of the phase that needs more.
    """
    _, sft, sampling, grpo, evaluate, _ = params
    prompt = TEXT_TOKENS + count_image_tokens(shape, params)
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


def count_image_tokens(shape: Shape, params: Profile) -> int:
    """Image tokens of a prompt."""
    return IMAGES * params.synthesize.max_pixels // shape.token_side**2


def groups_per_update(grpo: SimpleNamespace) -> int:
    """Prompts whose replies one process draws for an update."""
    replies = grpo.per_device_train_batch_size * grpo.gradient_accumulation_steps
    return max(1, replies // grpo.num_generations)


def memory_table(needs: dict[str, dict[str, float]]) -> list[dict]:
    """Rows {stage, GiB, largest part, one column per card: "fits" or what to lower}."""
    rows = []
    for stage, parts in needs.items():
        total = sum(parts.values()) + RUNTIME_GIB
        largest = max(parts, key=parts.get)
        verdicts = {f"{gigabytes} GB": "fits" if total <= USABLE * gigabytes else ADVICE[stage]
                    for gigabytes in CARDS}
        rows.append({"stage": stage, "GiB": round(total, 1),
                     "largest part": f"{largest} {parts[largest]:.1f}", **verdicts})
    return rows


def fitting_pixels(shape: Shape, params: Profile, gigabytes: int) -> int:
    """The largest max_pixels, in steps of 16 image tokens, with which every stage fits a card; 0 if
    none does.
    """
    area = shape.token_side**2
    for tokens in range(params.synthesize.max_pixels // area, 0, -16):
        synthesize = SimpleNamespace(**vars(params.synthesize) | {"max_pixels": tokens * area})
        rows = memory_table(predict_memory(shape, params._replace(synthesize=synthesize)))
        if all(row[f"{gigabytes} GB"] == "fits" for row in rows):
            return tokens * area
    return 0


def count_work(params: Profile) -> dict[str, int]:
    """Samples of SFT, candidates of rejection sampling, groups of RL, questions of evaluation.

    An evaluation asks three systems each of its questions, two where there is no teacher. On a
    benchmark whose limit is 0 their number is not known here, and the drawn suites are counted.
    """
    synthesize, sft, _, grpo, evaluate, _ = params
    traces = count_traces(synthesize)
    if synthesize.data == "scenes":
        rl = (len(FIND_ALL) * synthesize.rl_find_all_per_task
              + len(TASKS) * synthesize.rl_per_task + len(BOX_FORMS) * synthesize.rl_boxes_per_task
              + (len(FREE_FORM) - len(BOX_FORMS)) * synthesize.rl_free_form_per_task)
    else:
        questions = _count_questions(synthesize)
        shares = synthesize.data_shares
        rl = round(questions * (shares[1] + (synthesize.teacher == "none") * shares[0]))
    asked = count_held_out(params) + (evaluate.benchmark_limit or count_drawn(evaluate))
    return {
        "02_sft": round(min(traces, sft.max_samples or traces) * sft.num_train_epochs),
        "04_rejection_sampling": rl,
        "05_grpo": grpo.max_steps * groups_per_update(grpo),
        "06_evaluate": count_systems(params) * asked}


def relative_work(profile: str, params: dict[str, dict]) -> dict[str, float]:
    """Stage -> its work with these parameters, by stage, in shares of what the tiny profile has."""
    now, tiny = read_profile(profile, params), read_profile("tiny")
    length = _prompt_tokens(now.synthesize) / _prompt_tokens(tiny.synthesize)
    work, tiny_work = count_work(now), count_work(tiny)
    shares = {stage: length * work[stage] / tiny_work[stage] for stage in work}
    shares["04_rejection_sampling"] *= now.sampling.replies / tiny.sampling.replies
    shares["05_grpo"] *= now.grpo.num_generations / tiny.grpo.num_generations
    traces = max(1, count_traces(tiny.synthesize))
    return {"01_synthesize": (count_traces(now.synthesize) or work["04_rejection_sampling"])
            / traces} | shares


def _prompt_tokens(synthesize: SimpleNamespace) -> float:
    """Tokens of a prompt, the mean of a few; scenes where the data are not there to be read."""
    samples = [make_sample(task, "val", 0) for task in TASKS]
    path = PROJECT_ROOT / synthesize.data_file
    if synthesize.data == "own" and path.is_file():
        root = PROJECT_ROOT / synthesize.image_root if synthesize.image_root else path.parent
        samples = list(own_data.iter_samples(path, root, limit=20)) or samples
    box_format = BoxFormat(synthesize.min_pixels, synthesize.max_pixels)
    pixels = [width * height for sample in samples
              for width, height in (seen_size(size, box_format) for size in sample.sizes)]
    return TINY_TEXT_TOKENS + sum(pixels) / 28**2 / len(samples)


def count_traces(synthesize: SimpleNamespace) -> int:
    """Questions of the cold start."""
    if synthesize.teacher == "none":
        return 0
    if synthesize.data != "scenes":
        return round(_count_questions(synthesize) * synthesize.data_shares[0])
    return (len(TASKS) * synthesize.cot_per_task + len(FREE_FORM) * synthesize.free_form_per_task
            + len(FIND_ALL) * synthesize.cot_find_all_per_task)


def count_systems(params: Profile) -> int:
    """Systems that 06 evaluates: without a teacher there is no SFT model."""
    return 2 if params.synthesize.teacher == "none" else 3


def count_held_out(params: Profile) -> int:
    """Questions of own data that 06 asks a system; 0 for drawn scenes."""
    synthesize, most = params.synthesize, params.evaluate.held_out_samples
    if synthesize.data == "scenes":
        return 0
    held_out = round(_count_questions(synthesize) * synthesize.data_shares[2])
    return min(held_out, most or held_out)


def count_drawn(evaluate: SimpleNamespace) -> int:
    """Questions of the drawn suites that 06 asks a system."""
    return len(FIND_ALL) * evaluate.find_all_per_task + sum(
        len(suite_tasks(suite)) * vars(evaluate)[per_task]
        for suite, per_task in SIZE_PARAMS.items())


def _count_questions(synthesize: SimpleNamespace) -> int:
    """Lines of an own data file, OWN_QUESTIONS where the profile names none; data_limit where it is
    set.
    """
    if synthesize.data_limit:
        return synthesize.data_limit
    if not synthesize.data_file:
        return OWN_QUESTIONS
    return count_questions(synthesize)


def language_flops(shape: Shape, new: int, before: int = 0) -> float:
    """FLOPs of a forward pass over `new` tokens after `before` others: projections and attention,
    no head.
    """
    pairs = new * before + new * new / 2
    return (2 * shape.linear_weights * new
            + 4 * shape.layers * shape.head_dim * shape.heads * pairs)


def drawing_bytes(shape: Shape, gigabytes: int) -> int:
    """Bytes that the keys and values of a draw may take on a card, half of what the weights leave
    free, as `engine.generation.max_kv_bytes` has it.
    """
    free = (USABLE * gigabytes - RUNTIME_GIB) * GIB - 2 * shape.total
    return max(1, int(free / 2))


def predict_seconds(shape: Shape, params: Profile, card: tuple[str, int, int],
                    is_served: bool = False, max_bytes: int | None = None) -> dict[str, float]:
    """Seconds of one sample, candidate, group or question of each stage of `count_work`.

    card: its name, TFLOP/s and GB/s, as in CARDS. is_served: a vLLM server on such a card draws the
    replies, in turn with the learner. max_bytes: of `drawing_bytes`; None: as on a CPU.
    """
    _, sft, sampling, grpo, evaluate, _ = params
    _, tera_flops, giga_bytes = card
    flop_rate, byte_seconds = RATE_SHARE * tera_flops * 1e12, 1 / (RATE_SHARE * giga_bytes * 1e9)
    image_tokens = count_image_tokens(shape, params)
    prompt = TEXT_TOKENS + image_tokens
    seeing = 2 * shape.vision * 4 * image_tokens  # four patches to a token, encoded once
    head = 2 * shape.hidden * shape.vocabulary

    def reply_flops(tokens: int, replies: int) -> float:
        return replies * (language_flops(shape, tokens, prompt) + tokens * head)

    def draw_seconds(replies: int, tokens: int, prompts: int) -> float:
        """A prompt read and its replies drawn; each step reads the weights once for all replies
        that are drawn together.
        """
        flops = seeing + language_flops(shape, prompt) + reply_flops(tokens, replies)
        read_weights = 2 * (shape.total - shape.vision) * byte_seconds
        read_keys = replies * shape.kv_bytes * (prompt + tokens / 2) * byte_seconds
        if is_served:
            flop_gain, byte_gain = (share / RATE_SHARE for share in SERVED_SHARES)
            step = (read_weights * replies / SERVED_AT_ONCE + read_keys) / byte_gain
            return flops / flop_rate / flop_gain + tokens * step
        reading = 2 * (4 * shape.hidden + 3 * shape.inner) if max_bytes else 0
        at_once = count_prompts_at_once(prompts, prompt, replies, tokens, shape.kv_bytes, max_bytes,
                                        reading)
        step = max(read_weights, shape.layers * LAYER_SECONDS) / at_once + read_keys
        return flops / flop_rate + tokens * step

    # A frozen model's backward pass costs as much as a forward pass. Checkpoints, the reference
    # and replies learned from in parts cost one more each.
    passes = 2 + grpo.gradient_checkpointing + (grpo.beta > 0) + (grpo.micro_replies > 0)
    group, reply = grpo.num_generations, grpo.max_completion_length
    sft_tokens = prompt + TRACE_TOKENS
    sft_flops = seeing + 3 * (language_flops(shape, sft_tokens) + sft_tokens * head)
    unpacking = shape.linear_weights * NF4_BYTES * 3 * byte_seconds
    learning = passes * (language_flops(shape, prompt) + reply_flops(reply, group))
    return {
        "02_sft": sft_flops / flop_rate + unpacking,
        "04_rejection_sampling": draw_seconds(sampling.replies, sampling.max_new_tokens,
                                              sampling.batch_size),
        "05_grpo": draw_seconds(group, reply, groups_per_update(grpo)) + learning / flop_rate,
        "06_evaluate": draw_seconds(1 + evaluate.replies, evaluate.max_new_tokens,
                                    evaluate.batch_size)}


def hours_table(shape: Shape, params: Profile) -> list[dict]:
    """Rows {stage, drawn by, how many, predicted hours on each of CARDS and MORE_CARDS}.

    drawn by: "the kit" or "a server", for the stages that draw replies; else "".
    """
    rows = []
    for stage, count in count_work(params).items():
        if not count:
            continue
        for is_served in (False, True)[:1 if stage == "02_sft" else 2]:
            drawn_by = "a server" if is_served else "the kit"
            row = {"stage": stage, "drawn by": "" if stage == "02_sft" else drawn_by,
                   "how many": count}
            for gigabytes, card in (*CARDS.items(), *MORE_CARDS.items()):
                seconds = predict_seconds(shape, params, card, is_served,
                                          drawing_bytes(shape, gigabytes))[stage]
                row[f"{gigabytes} GB, {card[0]}: predicted hours"] = round(
                    count * seconds / 3600, 1)
            rows.append(row)
    return rows
