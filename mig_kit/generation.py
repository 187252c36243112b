"""Rollouts and log-probabilities that read a shared prompt once.

In multi-image grounding the prompt is many image tokens and the reply a few dozen; G replies to one prompt share it. Here
the prompt is prefilled once per group, its keys and values serve all replies, and with a frozen vision tower the features
of an image are computed once. Everything goes through the model's own modules, so LoRA and 4-bit layers work unchanged.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn.functional import log_softmax, softmax
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention

from mig_kit.prompt_cache import Prompt, inner

ROUND = 32  # tokens; rows are padded to multiples, for a heap in which every batch has sizes of its own grows and slows down
HEAD_TOKENS = 1024  # whose logits are in memory at a time where layers are checkpointed
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


def rounded(tokens: int) -> int:
    """The next multiple of ROUND."""
    return -(-tokens // ROUND) * ROUND


def with_features(embeds: torch.Tensor, where: torch.Tensor, prompts: list[Prompt]) -> dict:
    """The language model's inputs: embeddings (prompts, longest, hidden) with the images' features at `where`."""
    seen = [p.features for p in prompts if p.features is not None]
    if not seen:
        return {"inputs_embeds": embeds}
    features, *deeper = torch.cat(seen).to(embeds.dtype).split(embeds.shape[-1], 1)
    given = {"inputs_embeds": embeds.masked_scatter(where[..., None], features)}
    return given | {"visual_pos_masks": where, "deepstack_visual_embeds": deeper} if deeper else given


@dataclass(frozen=True)
class _Padded:
    """Prompts as one batch, padded on the right: a causal model reads them without a mask, which costs twice as much.

    given: inputs of `with_features`; mask: (prompts, longest), 0 where padding is; positions: (3, prompts, longest);
    last: (prompts,) index of a prompt's last token; after: (prompts,) position of the token that follows it.
    """

    given: dict
    mask: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    after: torch.Tensor

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """(prompts, longest, width) -> (prompts, width) at the last tokens."""
        return hidden[torch.arange(len(self.last), device=hidden.device), self.last]


def padded(model, prompts: list[Prompt], image_token: int) -> _Padded:
    """Prompts as a batch; longest is `rounded` if there are several."""
    longest, device = max(len(p.ids) for p in prompts), model.device
    longest = rounded(longest) if len(prompts) > 1 else longest
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    place = torch.zeros(3, len(prompts), longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, :len(p.ids)], mask[i, :len(p.ids)], place[:, i, :len(p.ids)] = p.ids, 1, p.positions
    embeds = model.model.language_model.embed_tokens(ids.to(device))
    where = ((ids == image_token) & mask.bool()).to(device)
    last = torch.tensor([len(p.ids) - 1 for p in prompts], device=device)
    after = torch.tensor([int(p.positions[:, -1].max()) + 1 for p in prompts], device=device)
    return _Padded(with_features(embeds, where, prompts), mask.to(device), place.to(device), last, after)


class _Decoder:
    """One decoding step for prompts x group rows over shared prompt keys and a preallocated cache of replies."""

    def __init__(self, model, cache, mask: torch.Tensor, group: int, room: int):
        self.language, self.head, self.group = model.model.language_model, model.lm_head, group
        attention = self.language.layers[0].self_attn
        shape, self.width = self.language.config, attention.head_dim
        self.heads, self.kv = shape.num_attention_heads, shape.num_key_value_heads
        self.scale, rows = attention.scaling, mask.shape[0] * group
        self.normed_heads = isinstance(attention, Qwen3VLTextAttention)
        kind = mask.device.type  # the cache is float32 under autocast, and every step would cast all of it anew
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else cache.layers[0].keys.dtype
        self.prompt = [(layer.keys.to(dtype).contiguous(), layer.values.to(dtype).contiguous()) for layer in cache.layers]
        shape = (rows, self.kv, room, self.width)
        self.own = [(torch.zeros(shape, dtype=k.dtype, device=k.device), torch.zeros(shape, dtype=k.dtype, device=k.device))
                    for k, _ in self.prompt]
        self.bias = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill_(mask == 0, -1e30)
        self.step = 0

    def keep(self, prompts: torch.Tensor, rows: torch.Tensor) -> None:
        """Drop the prompts (and their rows) that are done."""
        self.prompt = [(k[prompts], v[prompts]) for k, v in self.prompt]
        self.own = [(k[rows], v[rows]) for k, v in self.own]
        self.bias = self.bias[prompts]

    def attend(self, q, k, v, layer: int) -> torch.Tensor:
        """q: (rows, heads, width) against the prompt and the row's own past -> (rows, heads * width)."""
        prompt_k, prompt_v = self.prompt[layer]
        own_k, own_v = self.own[layer]
        own_k[:, :, self.step], own_v[:, :, self.step] = k, v
        prompts, length, past = prompt_k.shape[0], prompt_k.shape[2], self.step + 1
        split = (prompts, self.group, self.kv, -1)
        shared = q.view(*split, self.width).transpose(1, 2).flatten(2, 3)
        single = q.view(q.shape[0], self.kv, -1, self.width)
        # one buffer for both kinds of scores, in the order of the prompts' product: reshaped copies of it would cost most
        scores = torch.empty(*shared.shape[:3], length + past, dtype=torch.float32, device=q.device)
        torch.add(self.bias[:, None, None], torch.matmul(shared, prompt_k.transpose(2, 3)).float(), alpha=self.scale,
                  out=scores[..., :length])
        to_own = torch.matmul(single, own_k[:, :, :past].transpose(2, 3))
        torch.mul(to_own.view(*split, past).transpose(1, 2).flatten(2, 3).float(), self.scale, out=scores[..., length:])
        weight = softmax(scores, -1).to(q.dtype)
        mixed = torch.matmul(weight[..., :length], prompt_v).view(prompts, self.kv, self.group, -1, self.width).transpose(1, 2)
        on_own = weight[..., length:].view(prompts, self.kv, self.group, -1, past).transpose(1, 2).reshape(*single.shape[:3], past)
        return (mixed.reshape(single.shape) + torch.matmul(on_own, own_v[:, :, :past])).reshape(q.shape[0], -1)

    def forward(self, tokens: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """tokens, place: (rows,) -> logits (rows, vocabulary) of the next token."""
        hidden = self.language.embed_tokens(tokens)
        cos, sin = self.language.rotary_emb(hidden[:, None], place[None, :, None].expand(3, -1, -1))
        for index, layer in enumerate(self.language.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            q = attention.q_proj(normed).view(-1, self.heads, 1, self.width)
            k = attention.k_proj(normed).view(-1, self.kv, 1, self.width)
            if self.normed_heads:
                q, k = attention.q_norm(q), attention.k_norm(k)
            v = attention.v_proj(normed).view(-1, self.kv, self.width)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            k = k.to(v.dtype)
            hidden = hidden + attention.o_proj(self.attend(q[:, :, 0].to(v.dtype), k[:, :, 0], v, index))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.step += 1
        return self.head(self.language.norm(hidden))


def draw_tokens(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator | None) -> torch.Tensor:
    """One token per row of logits (rows, vocabulary), greedy at temperature 0, else sampled with top-p."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    chances = softmax(logits.float() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0)
        chances = torch.zeros_like(chances).scatter(-1, order, ranked)
    return torch.multinomial(chances, 1, generator=generator)[:, 0]


def prompts_at_once(count: int, longest: int, group: int, tokens: int, token_bytes: int) -> int:
    """How many of `count` prompts to draw replies to at once: all that KV_BYTES holds, in rounds of about the same size.

    longest: tokens of the longest prompt; tokens: of the longest reply; token_bytes: of one token's keys and values.
    """
    rounds = -(-count // max(1, KV_BYTES // ((longest + group * tokens) * token_bytes)))
    return -(-count // rounds)


def kv_bytes(model) -> int:
    """Bytes of one token's keys and values in all layers."""
    language = inner(model).model.language_model
    width = language.config.num_key_value_heads * language.layers[0].self_attn.head_dim
    return 2 * len(language.layers) * width * language.embed_tokens.weight.element_size()


@contextmanager
def decoding_weights(model, autocast: bool):
    """Adapters folded into the weights, and weights in bfloat16 if that is what they compute in, while replies are drawn.

    Otherwise every step would cast every weight again and run every adapter beside it. Afterwards the weights are what
    they were, bit for bit: until then those with an adapter wait in the host's memory. 4-bit layers are left as they are.
    """
    folded = [m for m in model.modules() if isinstance(m, LoraLinear) and not m.merged and not m.disable_adapters]
    adapted = {id(layer.base_layer) for layer in folded}
    saved = []
    for name, module in model.model.language_model.named_modules():
        if type(module) is torch.nn.Linear and ".lora_" not in name and (autocast or id(module) in adapted):
            weight = module.weight.data
            saved.append((module, weight, weight.to("cpu", copy=True) if id(module) in adapted else None))
    try:
        for layer in folded:
            layer.merge()
        if autocast:
            for module, *_ in saved:
                module.weight.data = module.weight.data.to(torch.bfloat16)
        yield
    finally:
        for layer in folded:
            layer.merged_adapters.clear()
        for module, weight, kept in saved:
            module.weight.data = weight if kept is None else weight.copy_(kept)


@torch.no_grad()
def rollouts(model, processor, prompts: list[Prompt], group: int, sampling: Sampling,
             generator: torch.Generator | None = None, autocast: bool = False) -> list[list[list[int]]]:
    """`group` replies to each prompt: token ids with the end token, or cut at sampling.max_new_tokens."""
    model = inner(model)
    device, end = model.device, processor.tokenizer.eos_token_id
    banned = [processor.tokenizer.convert_tokens_to_ids(t) for t in
              ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")]
    with decoding_weights(model, autocast), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        batch = padded(model, prompts, processor.image_token_id)
        out = model.model.language_model(**batch.given, position_ids=batch.positions, use_cache=True)
        decoder = _Decoder(model, out.past_key_values, batch.mask, group, sampling.max_new_tokens)
        logits = model.lm_head(batch.final(out.last_hidden_state)).repeat_interleave(group, 0)
        at = batch.after.repeat_interleave(group)
        replies: list[list[int]] = [[] for _ in range(len(prompts) * group)]
        rows = torch.arange(len(replies), device=device)
        done = torch.zeros(len(replies), dtype=torch.bool, device=device)
        for step in range(sampling.max_new_tokens):
            logits[:, banned] = -torch.inf
            if step + 1 < sampling.min_new_tokens:
                logits[:, end] = -torch.inf
            tokens = draw_tokens(logits, sampling, generator)
            for row, token, over in zip(rows.tolist(), tokens.tolist(), done.tolist()):
                if not over:
                    replies[row].append(token)
            done |= tokens == end
            if done.all() or step + 1 == sampling.max_new_tokens:
                break
            waiting = ~done.view(-1, group).all(1)
            if waiting.sum() <= 0.85 * len(waiting):
                kept = waiting.repeat_interleave(group)
                decoder.keep(waiting, kept)
                rows, done, tokens, at = rows[kept], done[kept], tokens[kept], at[kept]
            logits = decoder.forward(tokens, at)
            at = at + 1
    return [replies[i * group:(i + 1) * group] for i in range(len(prompts))]


def completion_logps(model, prompts: list[Prompt], owner: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                     image_token: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every completion token; gradients flow into the shared prompts.

    owner: (rows,) the prompt of each row; ids, mask: (rows, longest completion), padded on the right.
    Two passes: one over the prompts that keeps its graph, one over the completions on the prompts' keys and values.
    """
    model = inner(model)
    batch = padded(model, prompts, image_token)
    language = model.model.language_model
    first = language(**batch.given, position_ids=batch.positions, use_cache=True)
    cache = first.past_key_values
    cache.batch_select_indices(owner)
    steps = (batch.after[owner][:, None] + torch.arange(ids.shape[1], device=ids.device))[None].expand(3, -1, -1)
    second = language(input_ids=ids, attention_mask=torch.cat([batch.mask[owner], mask], 1), position_ids=steps,
                      past_key_values=cache, use_cache=True)
    hidden = torch.cat([batch.final(first.last_hidden_state)[owner][:, None], second.last_hidden_state[:, :-1]], 1)
    return _spread(*_said(model, hidden[mask.bool()], ids[mask.bool()], temperature), mask)


def packed_logps(model, prompts: list[Prompt], owner: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                 image_token: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logps` gives, in one pass without a cache, so that layers can be checkpointed: far less memory.

    A row is a prompt and its replies behind one another; a reply's token attends to the prompt and to its own past. With
    checkpointed layers the head, too, is computed piece by piece.
    """
    model, device = inner(model), ids.device
    lengths = mask.sum(1).tolist()
    mine = [(owner == i).nonzero()[:, 0].tolist() for i in range(len(prompts))]
    longest = max(len(p.ids) + sum(lengths[r] for r in rows) for p, rows in zip(prompts, mine))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    part, place = torch.full_like(tokens, -1), torch.zeros(3, *tokens.shape, dtype=torch.long)
    source: list[tuple[int, int]] = [(0, 0)] * int(sum(lengths))
    first = [sum(lengths[:r]) for r in range(len(lengths))]
    for i, (prompt, rows) in enumerate(zip(prompts, mine)):
        at = end = len(prompt.ids)
        tokens[i, :end], part[i, :end], place[:, i, :end] = prompt.ids, 0, prompt.positions
        for number, r in enumerate(rows, 1):
            here = slice(at, at + lengths[r])
            tokens[i, here], part[i, here] = ids[r, :lengths[r]].cpu(), number
            place[:, i, here] = prompt.positions[:, -1].max() + 1 + torch.arange(lengths[r])
            source[first[r]:first[r] + lengths[r]] = [(i, end - 1), *((i, k) for k in range(at, at + lengths[r] - 1))]
            at += lengths[r]
    language = model.model.language_model
    tokens, part, place = tokens.to(device), part.to(device), place.to(device)
    embeds = language.embed_tokens(tokens)
    given = with_features(embeds, (tokens == image_token) & (part == 0), prompts)
    asking, asked = part[:, :, None], part[:, None, :]
    order = torch.arange(longest, device=device)
    allowed = (order[:, None] >= order) & (asked >= 0) & ((asked == 0) | (asked == asking)) | (order[:, None] == order)
    bias = torch.zeros(allowed.shape, dtype=embeds.dtype, device=device).masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    out = language(**given, attention_mask=bias[:, None], position_ids=place, use_cache=False)
    rows, columns = torch.tensor(source, device=device).T
    hidden, said = out.last_hidden_state[rows, columns], ids[mask.bool()]
    if not (torch.is_grad_enabled() and model.is_gradient_checkpointing):
        return _spread(*_said(model, hidden, said, temperature), mask)
    pieces = [checkpoint(_said, model, *piece, temperature, use_reentrant=False)
              for piece in zip(hidden.split(HEAD_TOKENS), said.split(HEAD_TOKENS))]
    return _spread(*(torch.cat(found) for found in zip(*pieces)), mask)


def _said(model, hidden: torch.Tensor, said: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens said, and entropies, from the hidden states (tokens, hidden) before them."""
    logs = log_softmax(model.lm_head(hidden).float() / temperature, -1)
    with torch.no_grad():
        entropies = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, said[:, None])[:, 0], entropies


def _spread(logps: torch.Tensor, entropies: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the tokens under a mask (rows, longest) as (rows, longest), 0 elsewhere."""
    there, empty = mask.bool(), torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(there, logps), empty.masked_scatter(there, entropies)
