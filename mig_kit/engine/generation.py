"""Rollouts that read a shared prompt once.

In multi-image grounding the prompt is many image tokens and the reply a few dozen; G replies to one prompt share it, and so do
several questions about the same images share these (`shared_prompts`). Here what is shared is prefilled once, its keys and values
serve all replies (`decoding`), and with a frozen vision tower the features of an image are computed once (`prompt_cache`).
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.functional import softmax

from mig_kit.engine.decoding import Decoder, fuse_decoding_weights
from mig_kit.engine.models import unwrap_peft
from mig_kit.engine.prefixes import group_by_prefix, pad_prompts, read_suffixes
from mig_kit.engine.prompt_cache import Prompt

KV_BYTES = 8 * 2**30  # of keys and values that a training step draws replies with at a time


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn; temperature 0 is greedy. Vision tokens are never drawn: they would break the prompt.

    min_new_tokens: no reply ends before.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    min_new_tokens: int = 0


def draw_uniforms(seed: int, prompts: int, group: int, tokens: int) -> torch.Tensor:
    """Uniform numbers in [0, 1) that decide every token of every reply: (prompts, group, tokens), float64, on the CPU.

    A reply's numbers are its own, whatever device draws it and whatever else is in its batch.
    """
    return torch.rand(prompts, group, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sample_tokens(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor | None = None) -> torch.Tensor:
    """One token per row of logits (rows, vocabulary), greedy at temperature 0, else sampled with top-p.

    draws: (rows,) uniform numbers; a row's token is the first at which the cumulated probabilities exceed its number.
    `torch.multinomial` would draw a number for every token of the vocabulary: thirty times as long on a CPU.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0)
        chances = torch.zeros_like(chances).scatter(-1, order, ranked)
    sums = chances.double().cumsum(-1)
    return torch.searchsorted(sums, draws[:, None] * sums[:, -1:], right=True)[:, 0]


def count_prompts_at_once(count: int, longest: int, group: int, tokens: int, token_bytes: int) -> int:
    """How many of `count` prompts to draw replies to at once: all that KV_BYTES holds, in rounds of about the same size.

    longest: tokens of the longest prompt; tokens: of the longest reply; token_bytes: of one token's keys and values.
    """
    rounds = -(-count // max(1, KV_BYTES // ((longest + group * tokens) * token_bytes)))
    return -(-count // rounds)


def kv_bytes_per_token(model) -> int:
    """Bytes of one token's keys and values in all layers."""
    language = unwrap_peft(model).model.language_model
    width = language.config.num_key_value_heads * language.layers[0].self_attn.head_dim
    return 2 * len(language.layers) * width * language.embed_tokens.weight.element_size()


def end_token_ids(model, processor) -> list[int]:
    """Every token that ends a reply: the tokenizer's, and what else the model declares, as transformers and TRL have it."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return sorted({processor.tokenizer.eos_token_id, *declared})


@torch.no_grad()
def generate_rollouts(model, processor, prompts: list[Prompt], group: int, sampling: Sampling,
             draws: torch.Tensor | None = None, autocast: bool = False, joined: dict | None = None) -> list[list[list[int]]]:
    """`group` replies to each prompt: token ids with the end token, or cut at sampling.max_new_tokens.

    Prompts that begin with the same images (`stems_of`) share the pass over them and their keys and values, too. draws: of
    `uniform_draws`; None: new ones. joined: of `decoding_weights`, where the caller holds the model in them, as it must if
    several threads draw with it.
    """
    model = unwrap_peft(model)
    device = model.device
    ends = torch.tensor(end_token_ids(model, processor), device=device)
    banned = [processor.tokenizer.convert_tokens_to_ids(t) for t in
              ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")]
    stems = group_by_prefix(prompts)
    shared = len(stems) < len(prompts)
    if draws is None and sampling.temperature:
        draws = draw_uniforms(int(torch.randint(2**62, ())), len(prompts), group, sampling.max_new_tokens)
    with fuse_decoding_weights(model, autocast) if joined is None else nullcontext(joined) as joined, torch.inference_mode(), \
            torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        batch = pad_prompts(model, [prompts[stem[0]].begins() for stem in stems] if shared else prompts, processor.image_token_id)
        final, cache = batch.read(model)
        tails = read_suffixes(model, prompts, stems, batch, cache) if shared else None
        final = tails.final if shared else final
        owner = (tails.places if shared else torch.arange(len(prompts))[:, None]).repeat_interleave(group, 1)
        per_stem = owner.shape[1]
        decoder = Decoder(model, cache, batch, per_stem, sampling.max_new_tokens, joined, tails)
        logits = model.lm_head(final)[owner.flatten().clamp(min=0).to(device)]
        replies: list[list[int]] = [[] for _ in range(owner.numel())]
        rows = torch.arange(len(replies), device=device)
        if sampling.temperature:
            draws = draws[owner.flatten().clamp(min=0), torch.arange(group).repeat(owner.numel() // group)].to(device)
        done = (owner.flatten() < 0).to(device)
        for step in range(sampling.max_new_tokens):
            logits[:, banned] = -torch.inf
            if step + 1 < sampling.min_new_tokens:
                logits[:, ends] = -torch.inf
            tokens = sample_tokens(logits, sampling, draws[rows, step] if sampling.temperature else None)
            for row, token, over in zip(rows.tolist(), tokens.tolist(), done.tolist()):
                if not over:
                    replies[row].append(token)
            done |= (tokens[:, None] == ends).any(1)
            if done.all() or step + 1 == sampling.max_new_tokens:
                break
            waiting = ~done.view(-1, per_stem).all(1)
            if waiting.sum() <= 0.85 * len(waiting):
                kept = waiting.repeat_interleave(per_stem)
                decoder.keep(waiting)
                rows, done, tokens = rows[kept], done[kept], tokens[kept]
            logits = decoder.forward(tokens)
    found: list[list[list[int]]] = [[] for _ in prompts]
    for reply, prompt in zip(replies, owner.flatten().tolist()):
        if prompt >= 0:
            found[prompt].append(reply)
    return found
