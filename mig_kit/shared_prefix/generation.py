"""Rollouts that read a shared prompt once: a prompt with images has hundreds of tokens, a reply a
few dozen.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import psutil
import torch
from torch.nn.functional import softmax
from transformers import GenerationConfig

from mig_kit.shared_prefix.decoding import (
    Decoder,
    FusedWeights,
    StateDecoder,
    fuse_decoding_weights,
)
from mig_kit.shared_prefix.logprobs import read_prompts
from mig_kit.shared_prefix.prefixes import (
    has_linear_attention,
    pad_prompts,
    state_bytes,
)
from mig_kit.shared_prefix.prompt_cache import Prompt, unwrap_peft

KV_BYTES = 8 * 2**30  # of keys and values of the replies that a training step draws at a time

# A completion that held one of these could not be read again as part of a prompt.
FORBIDDEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

# options of transformers that mean nothing to the decoder, and values of others that do nothing
WITHOUT_EFFECT = {"do_sample", "pad_token_id", "bos_token_id", "eos_token_id", "disable_compile",
                  "use_cache", "max_length", "transformers_version", "_from_model_config",
                  "suppress_tokens"}
NEUTRAL = GenerationConfig()._get_default_generation_params() | {
    "top_k": 0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, by transformers' names; a new field is read from configs, too.

    temperature: 0 is greedy. min_new_tokens: none ends before so many tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    min_new_tokens: int = 0


def read_sampling_options(*settings: dict) -> tuple[SamplingOptions, list[str]]:
    """The decoder's options, and the names of those that it lacks and that would have an effect.

    settings: by transformers' names. Later ones count more; None says nothing.
    """
    values = {name: value for part in settings for name, value in part.items()
              if value is not None}
    known = {field.name for field in fields(SamplingOptions)}
    lacking = [name for name, value in values.items() if name not in known | WITHOUT_EFFECT
               and value is not False and value != NEUTRAL.get(name)]
    return SamplingOptions(**{name: values[name] for name in known & values.keys()}), lacking


def draw_uniforms(seed: int, prompts: int, group: int, tokens: int) -> torch.Tensor:
    """The uniform numbers in [0, 1) that decide every token: (prompts, group, tokens), float64.

    Each completion has its own: it does not depend on the device, nor on the rest of its batch.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, group, tokens, dtype=torch.float64, generator=generator)


def sample_tokens(logits: torch.Tensor, sampling: SamplingOptions,
                  uniforms: torch.Tensor | None = None) -> torch.Tensor:
    """One token per row of logits (rows, vocabulary): greedy at temperature 0, else top-p.

    uniforms: (rows,); a row's token is the first at which the cumulative probability exceeds its
    number. On a CPU `torch.multinomial` takes thirty times as long.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        mass_before = ranked.cumsum(-1) - ranked
        ranked = ranked.masked_fill(mass_before >= sampling.top_p, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ranked)
    cumulative = probabilities.double().cumsum(-1)
    thresholds = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, thresholds, right=True)[:, 0]


def max_kv_bytes(device: torch.device) -> int:
    """Bytes for a draw's keys and values: half of what is free, on a CPU KV_BYTES at most."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + kept) // 2
    return min(KV_BYTES, psutil.virtual_memory().available // 2)


def count_prompts_at_once(count: int, longest: int, group: int, tokens: int, token_bytes: int,
                          max_bytes: int, reading_bytes: int = 0, row_bytes: int = 0) -> int:
    """How many of `count` prompts to draw completions to at once, in rounds of about one size.

    longest, tokens: tokens of the longest prompt and completion. token_bytes: a token's keys and
    values. reading_bytes: extra bytes per prompt token while it is read, checked against twice
    max_bytes; 0 to ignore. row_bytes: a completion's bytes besides its keys and values.
    """
    bytes_per_prompt = (longest + group * tokens) * token_bytes + group * row_bytes
    most = max_bytes // bytes_per_prompt
    if reading_bytes:
        most = min(most, 2 * max_bytes // (longest * (token_bytes + reading_bytes)))
    rounds = -(-count // max(1, most))
    return -(-count // rounds)


def kv_bytes_per_token(model) -> int:
    """Bytes of one token's keys and values in all layers."""
    language = unwrap_peft(model).model.language_model
    widths = [module.head_dim for layer in language.layers
              for name, module in layer.named_children() if name == "self_attn"]
    numbers = 2 * sum(widths) * language.config.num_key_value_heads
    return numbers * language.embed_tokens.weight.element_size()


def reading_bytes_per_token(model) -> int:
    """Bytes that a layer needs per token of a prompt that is read, for its states."""
    language = unwrap_peft(model).model.language_model
    states = 4 * language.config.hidden_size + 3 * language.config.intermediate_size
    return states * language.embed_tokens.weight.element_size()


def end_token_ids(generation_config, processor) -> list[int]:
    """Every token that ends a completion: the tokenizer's, and those that the model declares."""
    declared = generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({processor.tokenizer.eos_token_id, *declared} - {None})


class Completion(NamedTuple):
    """A completion's token ids, with the end token if there is one, and how likely each was."""

    ids: list[int]
    logps: list[float]  # at the temperature, before what is never drawn is left out


def generate_rollouts(*args, **kwargs) -> list[list[list[int]]]:
    """The token ids of `draw_completions`."""
    return [[completion.ids for completion in rollout]
            for rollout in draw_completions(*args, **kwargs)]


@torch.no_grad()
def draw_completions(model, processor, prompts: list[Prompt], group: int,
                     sampling: SamplingOptions, uniforms: torch.Tensor | None = None,
                     autocast: bool = False, fused_weights: FusedWeights | None = None,
                     max_bytes: int | None = None) -> list[list[Completion]]:
    """`group` completions to each prompt.

    uniforms: of `draw_uniforms`; None: new ones. fused_weights: of `fuse_decoding_weights`; None:
    made here. max_bytes: of keys and values at a time; None: `max_kv_bytes`.
    """
    model = unwrap_peft(model)
    device = model.device
    if uniforms is None and sampling.temperature:
        seed = int(torch.randint(2**62, ()))
        uniforms = draw_uniforms(seed, len(prompts), group, sampling.max_new_tokens)
    longest, token_bytes = max(len(prompt.ids) for prompt in prompts), kv_bytes_per_token(model)
    at_once = count_prompts_at_once(
        len(prompts), longest, group, sampling.max_new_tokens, token_bytes,
        max_bytes or max_kv_bytes(device),
        reading_bytes_per_token(model) if device.type == "cuda" else 0,
        longest * token_bytes + state_bytes(model) if has_linear_attention(model) else 0)
    if fused_weights is None:
        fused_weights = fuse_decoding_weights(model, autocast)
    rollouts = []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            rollouts += _generate_round(model, processor, prompts[part], group, sampling,
                                        None if uniforms is None else uniforms[part],
                                        fused_weights)
    return rollouts


def _generate_round(model, processor, prompts: list[Prompt], group: int, sampling: SamplingOptions,
                    uniforms: torch.Tensor | None,
                    fused_weights: FusedWeights) -> list[list[Completion]]:
    """`draw_completions` to prompts that are read together; uniforms: None at temperature 0."""
    decoder, hidden = _prefill_prompts(model, prompts, group, sampling.max_new_tokens,
                                       fused_weights)
    logits = model.lm_head(hidden).repeat_interleave(group, 0)
    if sampling.temperature:
        uniforms = uniforms.flatten(0, 1).to(hidden.device)
    completions = _decode(decoder, logits, sampling, uniforms,
                          end_token_ids(model.generation_config, processor),
                          forbidden_token_ids(processor))
    return [completions[start:start + group] for start in range(0, len(completions), group)]


def forbidden_token_ids(processor) -> list[int]:
    """The tokens that are never drawn."""
    return [processor.tokenizer.convert_tokens_to_ids(token) for token in FORBIDDEN_TOKENS]


def _prefill_prompts(
        model, prompts: list[Prompt], group: int, capacity: int,
        fused_weights: FusedWeights) -> tuple[Decoder | StateDecoder, torch.Tensor]:
    """A decoder, and the states at the prompts' ends (prompts, hidden)."""
    batch = pad_prompts(model, prompts)
    if has_linear_attention(model):
        hidden, cache = batch.prefill(model)
        return StateDecoder(model, cache, batch, group), hidden
    read = read_prompts(model, prompts)
    decoder = Decoder(model, batch.pad_keys(read), batch, group, capacity, fused_weights)
    states = torch.cat([prompt.state.detach() for prompt in read])
    return decoder, model.model.language_model.norm(states)


def _decode(decoder: Decoder | StateDecoder, logits: torch.Tensor, sampling: SamplingOptions,
            uniforms: torch.Tensor | None, end_tokens: list[int],
            forbidden_tokens: list[int]) -> list[Completion]:
    """Draw tokens from logits (rows, vocabulary) on, until all rows are done; a completion each."""
    device = logits.device
    ends = torch.tensor(end_tokens, device=device)
    shape = len(logits), sampling.max_new_tokens
    ids = torch.zeros(shape, dtype=torch.long, device=device)
    logps = torch.zeros(shape, device=device)
    lengths = ids.new_zeros(len(logits))
    rows = torch.arange(len(logits), device=device)  # those that go on
    for step in range(sampling.max_new_tokens):
        step_logps = (logits.float() / (sampling.temperature or 1.0)).log_softmax(-1)
        logits[:, forbidden_tokens] = -torch.inf
        if step < sampling.min_new_tokens:
            logits[:, ends] = -torch.inf
        row_uniforms = uniforms[rows, step] if sampling.temperature else None
        tokens = sample_tokens(logits, sampling, row_uniforms)
        ids[rows, step] = tokens
        logps[rows, step] = step_logps.gather(-1, tokens[:, None])[:, 0]
        lengths[rows] = step + 1
        goes_on = ~torch.isin(tokens, ends)
        n_left = int(goes_on.sum())
        if n_left == 0 or step + 1 == sampling.max_new_tokens:
            break
        if n_left < len(rows):
            decoder.keep_rows(goes_on)
            rows, tokens = rows[goes_on], tokens[goes_on]
        logits = decoder.forward(tokens)
    return [Completion(row_ids[:length], row_logps[:length])
            for row_ids, row_logps, length in zip(ids.tolist(), logps.tolist(), lengths.tolist())]
