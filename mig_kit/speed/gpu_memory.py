"""What the full profiles will need of a GPU, part by part, before anything is downloaded (stage 00).

Predicted, not yet checked against a GPU. Weights, adapters and caches follow from the published shapes; what a layer keeps
for the backward pass is measured here on small models of the same code, by width, and scaled up.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from mig_kit.engine import models
from mig_kit.engine.generation import count_prompts_at_once
from mig_kit.engine.logprobs import HEAD_TOKENS
from mig_kit.engine.models import tiny_config
from mig_kit.engine.training import lora_config
from mig_kit.pipeline import params

GIB = 2**30


GPUS = (24, 40, 80, 141)  # GB on the label; about 93 % of it, in GiB, can be used


NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # 4 bits, a byte for 64 of them, and 4 bytes for 256 of those (double quantisation)


@dataclass(frozen=True)
class Shape:
    """A model: widths of the language model, parameters of the whole and of its vision tower, side of an image token (px)."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    total: int
    vision: int
    head: int = 128
    side: int = 28

    @property
    def projections(self) -> list[tuple[int, int]]:
        """(in, out) of the seven projections of a layer."""
        query, kv = self.head * self.heads, self.head * self.kv_heads
        return [(self.hidden, query), (self.hidden, kv), (self.hidden, kv), (query, self.hidden),
                (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head * 2

    @property
    def linear(self) -> int:
        """Weights of all projections: what 4-bit and LoRA apply to."""
        return self.layers * sum(a * b for a, b in self.projections)


# as in each model's config.json; tests/test_full_profile.py counts their parameters
SHAPES = {"Qwen/Qwen2.5-VL-3B-Instruct": Shape(2048, 11008, 36, 16, 2, 151936, 3_754_622_976, 668_684_288),
          "Qwen/Qwen2.5-VL-7B-Instruct": Shape(3584, 18944, 28, 28, 4, 152064, 8_292_166_656, 676_550_144),
          "Qwen/Qwen2-VL-7B-Instruct": Shape(3584, 18944, 28, 28, 4, 152064, 8_291_375_616, 675_759_104),
          "Qwen/Qwen3-VL-4B-Instruct": Shape(2560, 9728, 36, 32, 8, 151936, 4_437_815_808, 415_347_712, side=32)}


def count_shape(config) -> Shape:
    """The shape of a model by its configuration; its parameters are counted on the meta device, without weights."""
    with torch.device("meta"):
        model = models.FAMILIES[config.model_type](config)
    text = config.text_config
    return Shape(text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
                 text.num_key_value_heads, text.vocab_size, sum(p.numel() for p in model.parameters()),
                 sum(p.numel() for p in model.model.visual.parameters()),
                 getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
                 config.vision_config.patch_size * config.vision_config.spatial_merge_size)


def find_shape(model: str) -> Shape | None:
    """The shape of a known hub name or of a model folder; None for any other name, for nothing is downloaded here."""
    if model in SHAPES or not (Path(model) / "config.json").is_file():
        return SHAPES.get(model)
    return count_shape(AutoConfig.from_pretrained(model, local_files_only=True))


TEXT, TRACE = 200, 300  # tokens of a prompt's text, and of a trace


ADVICE = {"02_sft": "lower max_pixels, or lora_rank", "04_rejection_sampling": "lower batch_size",
          "05_grpo": "lower max_pixels, num_generations or max_new_tokens", "06_evaluate": "lower batch_size"}


@dataclass(frozen=True)
class StageLoad:
    """What a stage does at once. prompt: tokens of one prompt; prompts: of them; replies: to each; tokens: of a reply.

    kept: prompts whose graph is in memory at a time; checkpointed: only the layers' inputs are kept, one layer in full.
    """

    prompt: int
    prompts: int = 1
    replies: int = 1
    tokens: int = 512
    rank: int = 64
    kept: int = 1
    checkpointed: bool = False


def saved_bytes(hidden: int, inner: int, layers: int, tokens: int, rank: int, dropout: float) -> int:
    """Bytes that the language model of a small random Qwen2.5-VL keeps for its backward pass, bfloat16 with LoRA."""
    shape = tiny_config(640, hidden=hidden, layers=layers, vision_layers=1)
    shape.text_config.intermediate_size = inner
    model = Qwen2_5_VLForConditionalGeneration._from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = get_peft_model(model, lora_config(rank, rank, dropout)).train()
    language = model.base_model.model.model.language_model
    embeds = torch.zeros(1, tokens, hidden, dtype=torch.bfloat16)
    parameters, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor  # held, so that none is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        language(inputs_embeds=embeds.requires_grad_(), use_cache=False)
    return sum(size for size, _ in found.values())


@cache
def layer_bytes(rank: int = 64, dropout: float = 0.05, tokens: int = 64) -> tuple[float, float, float]:
    """(a, b, c): a layer keeps a * hidden + b * inner + c bytes per token; from the difference of one layer and two."""

    def layer(hidden: int, inner: int) -> float:
        two, one = (saved_bytes(hidden, inner, layers, tokens, rank, dropout) for layers in (2, 1))
        return (two - one) / tokens

    small, taller, wider = layer(128, 256), layer(128, 512), layer(256, 256)
    b, a = (taller - small) / 256, (wider - small) / 128
    return a, b, small - 128 * a - 256 * b


def training_memory(shape: Shape, work: StageLoad, four_bit: bool) -> dict[str, float]:
    """GiB of each part of a training step.

    four_bit also means what peft's prepare_model_for_kbit_training does: everything that is not 4-bit becomes float32.
    """
    a, b, c = layer_bytes(work.rank)
    layer = a * shape.hidden + b * shape.inner + c
    seen = work.prompt + work.replies * work.tokens  # tokens of one prompt with its replies, the prompt read once
    stream = 4 if four_bit else 2
    tokens = work.kept * seen
    mask = work.kept * seen**2 * 2 * (work.checkpointed and work.replies > 1)  # who sees whom, of a prompt and its replies
    kept = mask + tokens * (layer + shape.layers * shape.hidden * stream if work.checkpointed else shape.layers * layer)
    said = work.kept * work.replies * work.tokens
    if work.checkpointed:
        said = seen if work.replies == 1 else min(said, HEAD_TOKENS)  # fine-tuning's loss reads the logits of all tokens at once
    adapters = shape.layers * sum(work.rank * (x + y) for x, y in shape.projections)
    rest = shape.total - shape.linear
    return {"weights": (shape.linear * NF4_BYTES + rest * 4 if four_bit else shape.total * 2) / GIB,
            "adapter, gradients, Adam": adapters * 16 / GIB, "activations": kept / GIB,
            "logits": said * shape.vocabulary * 10 / GIB}  # bfloat16, float32, and the gradient


def decoding_memory(shape: Shape, work: StageLoad) -> dict[str, float]:
    """GiB of each part of drawing replies: keys and values of the prompts once, of every reply's own tokens."""
    return {"weights": shape.total * 2 / GIB,
            "keys and values": work.prompts * (work.prompt + work.replies * work.tokens) * shape.token_bytes / GIB,
            "logits": work.prompts * work.replies * shape.vocabulary * 6 / GIB,
            "prefill": work.prompts * work.prompt * (4 * shape.hidden + 3 * shape.inner) * 2 / GIB}


def profile_params(profile: str) -> dict[str, dict]:
    """The parameters of 01, which says how many samples there are, and of the stages that need a GPU."""
    return {stage: params.read_params_file(params.params_file(stage, profile)) for stage in ("01_synthesize", *ADVICE)}


def groups_per_update(grpo: dict) -> int:
    """Prompts whose replies one process draws for an update."""
    return max(1, grpo["batch_size"] * grpo["gradient_accumulation"] // grpo["num_generations"])


def predict_memory(shape: Shape, params: dict[str, dict], images: int = 6) -> dict[str, dict[str, float]]:
    """Stage -> parts in GiB, for parameters per stage; prompts are `images` images of the largest size and TEXT tokens of text.

    05 draws replies, then learns from them: its parts are those of the phase that needs more.
    """
    sft, sampling, grpo, evaluate = (params[name] for name in ("02_sft", "04_rejection_sampling", "05_grpo", "06_evaluate"))
    prompt = TEXT + images * grpo["max_pixels"] // shape.side**2
    group = grpo["num_generations"]
    held = max(1, grpo["held"] // group) if grpo["held"] else grpo["batch_size"] // group
    learn = training_memory(shape, StageLoad(prompt, grpo["batch_size"] // group, group, grpo["max_new_tokens"], grpo["lora_rank"], held,
                                 grpo["checkpoint_layers"]), False)
    at_once = count_prompts_at_once(groups_per_update(grpo), prompt, group, grpo["max_new_tokens"], shape.token_bytes)
    draw = decoding_memory(shape, StageLoad(prompt, at_once, group, grpo["max_new_tokens"]))
    draw["adapter, gradients, Adam"] = learn["adapter, gradients, Adam"]
    return {
        "02_sft": training_memory(shape, StageLoad(prompt, 1, 1, TRACE, sft["lora_rank"], sft["batch_size"], True), True),
        "04_rejection_sampling": decoding_memory(shape, StageLoad(prompt, sampling["batch_size"], sampling["replies"],
                                                      sampling["max_new_tokens"])),
        "05_grpo": max(draw, learn, key=lambda parts: sum(parts.values())),
        "06_evaluate": decoding_memory(shape, StageLoad(prompt, evaluate["batch_size"], max(1, evaluate["replies"]),
                                            evaluate["max_new_tokens"]))}


def memory_table(found: dict[str, dict[str, float]]) -> list[dict]:
    """Rows {stage, GiB, largest part, one column per GPU of GPUS: "fits" or what to lower}."""
    rows = []
    for stage, parts in found.items():
        total = sum(parts.values()) + 1.5  # the CUDA context, and what the allocator cannot use
        largest = max(parts, key=parts.get)
        rows.append({"stage": stage, "GiB": round(total, 1), "largest part": f"{largest} {parts[largest]:.1f}",
                     **{f"{gpu} GB": "fits" if total <= 0.93 * gpu else ADVICE[stage] for gpu in GPUS}})
    return rows


def fitting_pixels(shape: Shape, params: dict[str, dict], gpu: int, images: int = 6) -> int:
    """The largest max_pixels, in steps of 16 image tokens, with which every stage fits a GPU of `gpu` GB; 0 if none does."""
    area = shape.side**2
    for tokens in range(params["05_grpo"]["max_pixels"] // area, 0, -16):
        changed = {stage: {**values, "max_pixels": tokens * area} for stage, values in params.items()}
        if all(row[f"{gpu} GB"] == "fits" for row in memory_table(predict_memory(shape, changed, images))):
            return tokens * area
    return 0
