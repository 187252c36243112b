"""Rollouts and log-probabilities that read a shared prompt once.

In multi-image grounding the prompt is many image tokens and the reply a few dozen; G replies to one prompt share it, and so do
several questions about the same images share these, as benchmarks often ask: MIG-Bench's 4,295 questions are about 1,974 lists of
images. Here what is shared is prefilled once, its keys and values serve all replies, and with a frozen vision tower the
features of an image are computed once. LoRA and 4-bit layers are the model's own modules and work unchanged.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn.functional import linear, log_softmax, softmax
from torch.utils.checkpoint import checkpoint
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


@dataclass(frozen=True)
class _Tails:
    """What prompts about the same images go on with after them, read in one pass on the keys and values of the images.

    places: (stems, slots) the prompt's index, -1 where a stem has fewer; first, length: (stems, slots) where its tokens are
    among those of its stem; after: (stems, slots) position of the token that follows; final: (prompts, hidden).
    """

    places: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    after: torch.Tensor
    final: torch.Tensor


def stems_of(prompts: list[Prompt]) -> list[list[int]]:
    """Indices of the prompts that begin with the same images, in order; each by itself where little is to be gained.

    Every stem gets as many rows as the one with the most prompts: more than twice as many in all as there are prompts is too much.
    """
    found: dict[object, list[int]] = {}
    for i, p in enumerate(prompts):
        found.setdefault((p.images, p.ids[:p.stem].numpy().tobytes()) if p.stem else i, []).append(i)
    stems = list(found.values())
    apart = not all(p.stem for p in prompts) or max(map(len, stems)) * len(stems) > 2 * len(prompts)
    return [[i] for i in range(len(prompts))] if apart else stems


def _read_tails(model, prompts: list[Prompt], stems: list[list[int]], batch: _Padded, cache) -> _Tails:
    """Read what follows the images; `cache`, which holds what `batch` of the stems left, is added to."""
    device, slots = batch.mask.device, max(map(len, stems))
    longest = rounded(max(sum(len(prompts[i].ids) - prompts[i].stem for i in stem) for stem in stems))
    ids, part = torch.zeros(len(stems), longest, dtype=torch.long), torch.full((len(stems), longest), -1)
    place = torch.zeros(3, len(stems), longest, dtype=torch.long)
    places, first, length, after = (torch.full((len(stems), slots), fill) for fill in (-1, 0, 0, 0))
    for row, stem in enumerate(stems):
        at = 0
        for slot, i in enumerate(stem):
            p = prompts[i]
            here = slice(at, at + len(p.ids) - p.stem)
            ids[row, here], part[row, here], place[:, row, here] = p.ids[p.stem:], slot, p.positions[:, p.stem:]
            places[row, slot], first[row, slot], length[row, slot] = i, at, here.stop - at
            after[row, slot] = p.positions[:, -1].max() + 1
            at = here.stop
    order = torch.arange(longest)
    own = (part[:, :, None] == part[:, None, :]) & (order[:, None] >= order)
    allowed = torch.cat([batch.mask.bool()[:, None].expand(-1, longest, -1), own.to(device)], 2)
    embeds = model.model.language_model.embed_tokens(ids.to(device))
    bias = torch.zeros(allowed.shape, dtype=embeds.dtype, device=device).masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    out = model.model.language_model(inputs_embeds=embeds, attention_mask=bias[:, None], position_ids=place.to(device),
                                     past_key_values=cache, use_cache=True)
    row, slot = (places >= 0).nonzero(as_tuple=True)
    final = out.last_hidden_state[row, (first + length - 1)[row, slot]][places[row, slot].argsort()]
    return _Tails(places, first.to(device), length.to(device), after.to(device), final)


class _Decoder:
    """One decoding step for stems x group rows over shared keys of what the rows begin with, and a preallocated cache of the rest.

    A stem is a prompt, whose replies the rows are; with `tails` it is the images that several prompts begin with, and the group
    is as many rows for each of them. A step is many small operations, and what each costs is its start, not its work. So
    products of one input are one product where `joined` (see `decoding_weights`) has their weights, positions are turned into
    angles once for all steps, and what a row remembers lies in the order of its stem's scores.
    """

    def __init__(self, model, cache, batch: _Padded, group: int, room: int, joined: dict, tails: _Tails | None = None):
        self.language, self.head, self.group, self.joined = model.model.language_model, model.lm_head, group, joined
        attention, stems, device = self.language.layers[0].self_attn, len(batch.last), batch.mask.device
        shape, self.width = self.language.config, attention.head_dim
        self.heads, self.kv, self.scale = shape.num_attention_heads, shape.num_key_value_heads, attention.scaling
        self.normed_heads = isinstance(attention, Qwen3VLTextAttention)
        # the cache is float32 under autocast, and every step would cast all of it anew
        self.dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else cache.layers[0].keys.dtype
        shared, self.tail = batch.mask.shape[1], 0 if tails is None else int(tails.length.max())
        self.prompt = [tuple(kept[:, :, :shared].to(self.dtype).contiguous() for kept in (layer.keys, layer.values))
                       for layer in cache.layers]
        self.own = [torch.zeros(2, stems, self.kv, group, self.tail + room, self.width, dtype=self.dtype, device=device)
                    for _ in self.prompt]
        padding, after = torch.cat([batch.mask, batch.mask.new_ones(stems, room)], 1)[:, None] == 0, batch.after[:, None]
        if tails is not None:
            after = tails.after.repeat_interleave(group // tails.after.shape[1], 1)
            padding = self._keep_tails(cache, tails, padding, shared)
        self.bias = torch.zeros(padding.shape, device=device).masked_fill_(padding, -1e30)[:, None]
        place = (after.flatten()[:, None] + torch.arange(room, device=device)).expand(3, -1, -1)
        self.cos, self.sin = (each.view(*after.shape, room, -1)
                              for each in self.language.rotary_emb(batch.given["inputs_embeds"], place))
        self.sin[..., :self.width // 2] *= -1  # so that a half turn of the width does for the rest
        self.step = 0

    def _keep_tails(self, cache, tails: _Tails, padding: torch.Tensor, shared: int) -> torch.Tensor:
        """Put the tails before the rows' own keys and values; what is padding, (stems, rows * heads of a group, all keys)."""
        stems, slots = tails.first.shape
        order = torch.arange(self.tail, device=padding.device)
        where = (tails.first[..., None] + order).clamp(max=cache.layers[0].keys.shape[2] - shared - 1).view(stems, 1, -1, 1)
        for own, layer in zip(self.own, cache.layers):
            for side, kept in zip(own, (layer.keys, layer.values)):
                found = kept[:, :, shared:].gather(2, where.expand(-1, self.kv, -1, self.width)).to(self.dtype)
                side[..., :self.tail, :] = found.unflatten(2, (slots, -1)).repeat_interleave(self.group // slots, 2)
        none = (order >= tails.length[..., None]).repeat_interleave(self.group // slots, 1)
        ahead, behind = padding.expand(-1, self.group, -1).split([shared, padding.shape[2] - shared], 2)
        return torch.cat([ahead, none, behind], 2).repeat_interleave(self.heads // self.kv, 1)

    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of this step, each (stems, 1 or rows, heads, width): of queries, keys, and values, which stay."""
        turned = (each[:, :, self.step, None].expand(-1, -1, self.heads + self.kv, -1) for each in (self.cos, self.sin))
        return tuple(torch.cat([each, each.new_full((1, 1, self.kv, self.width), neutral).expand(*each.shape[:2], -1, -1)], 2)
                     for each, neutral in zip(turned, (1, 0)))

    def keep(self, stems: torch.Tensor) -> None:
        """Drop the stems that are done, and their rows."""
        self.prompt = [(k[stems], v[stems]) for k, v in self.prompt]
        self.own = [own[:, stems] for own in self.own]
        self.bias, self.cos, self.sin = self.bias[stems], self.cos[stems], self.sin[stems]

    def project(self, given: torch.Tensor, *layers) -> torch.Tensor:
        """(rows, inputs) -> what `layers` make of it, side by side."""
        if layers in self.joined:
            return linear(given.to(self.dtype), *self.joined[layers])
        made = [self.project(given, layer) if (layer,) in self.joined else layer(given) for layer in layers]
        return torch.cat(made, -1) if len(made) > 1 else made[0]

    def attend(self, heads: torch.Tensor, layer: int) -> torch.Tensor:
        """(stems, group, heads + 2 * groups of heads, width): queries, keys, values -> (rows, heads * width).

        Against the stem, which its rows share, and each row's own past.
        """
        prompt_k, prompt_v = self.prompt[layer]
        stems, length, past = prompt_k.shape[0], prompt_k.shape[2], self.tail + self.step + 1
        own = self.own[layer]
        own[..., past - 1, :] = heads[:, :, self.heads:].unflatten(2, (2, self.kv)).permute(2, 0, 3, 1, 4)
        own_k, own_v = own[..., :past, :]
        shared = heads[:, :, :self.heads].unflatten(2, (self.kv, -1)).transpose(1, 2).flatten(2, 3)
        single = shared.unflatten(2, (self.group, -1))
        scores = torch.cat([torch.matmul(shared, prompt_k.transpose(2, 3)),
                            torch.matmul(single, own_k.transpose(3, 4)).flatten(2, 3)], -1)
        weight = softmax(torch.add(self.bias[..., :length + past], scores, alpha=self.scale), -1).to(self.dtype)
        mixed = torch.matmul(weight[..., :length], prompt_v).view(single.shape)
        on_own = torch.matmul(weight[..., length:].unflatten(2, (self.group, -1)), own_v)
        return (mixed + on_own).transpose(1, 2).reshape(stems * self.group, -1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows,) -> logits (rows, vocabulary) of the next token."""
        hidden = self.language.embed_tokens(tokens)
        cos, sin = self.angles()
        by_stem = (len(cos), self.group, -1, self.width)
        for index, layer in enumerate(self.language.layers):
            attention, mlp = layer.self_attn, layer.mlp
            heads = self.project(layer.input_layernorm(hidden), attention.q_proj, attention.k_proj, attention.v_proj)
            heads = heads.view(by_stem)
            if self.normed_heads:
                q, k, v = heads.split((self.heads, self.kv, self.kv), 2)
                heads = torch.cat([attention.q_norm(q), attention.k_norm(k), v], 2)
            heads = (heads * cos).add_(heads.roll(self.width // 2, -1) * sin).to(self.dtype)
            hidden = hidden + self.project(self.attend(heads, index), attention.o_proj)
            gate, up = self.project(layer.post_attention_layernorm(hidden), mlp.gate_proj, mlp.up_proj).chunk(2, -1)
            hidden = hidden + self.project(mlp.act_fn(gate) * up, mlp.down_proj)
        self.step += 1
        return self.project(self.language.norm(hidden), self.head)


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
    Yields {layers: (weight, bias)} of plain layers; where they are cast, those with the same input are joined into one, for
    they need no more memory then.
    """
    language = model.model.language_model
    folded = [m for m in model.modules() if isinstance(m, LoraLinear) and not m.merged and not m.disable_adapters]
    adapted = {id(layer.base_layer) for layer in folded}
    saved = []
    for name, module in language.named_modules():
        if type(module) is torch.nn.Linear and ".lora_" not in name and (autocast or id(module) in adapted):
            weight = module.weight.data
            saved.append((module, weight, weight.to("cpu", copy=True) if id(module) in adapted else None))
    joined = {}
    try:
        for layer in folded:
            layer.merge()
        if autocast:
            for module, *_ in saved:
                module.weight.data = module.weight.data.to(torch.bfloat16)
        for layer in language.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj),
                          (attention.o_proj,), (mlp.down_proj,)):
                for layers in (group,) if autocast else ((one,) for one in group):
                    _join(joined, layers)
        if autocast and type(model.lm_head) is torch.nn.Linear:  # its weight may be the embeddings', which stay as they are
            joined[model.lm_head,] = model.lm_head.weight.to(torch.bfloat16), None
        yield joined
    finally:
        for layer in folded:
            layer.merged_adapters.clear()
        for module, weight, kept in saved:
            module.weight.data = weight if kept is None else weight.copy_(kept)


def _join(joined: dict, layers: tuple) -> None:
    """Add the layers' weights as one, of which theirs become parts, if all are plain."""
    plain = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
    if not all(type(layer) is torch.nn.Linear for layer in plain):
        return
    weight, biases = plain[0].weight.data, [layer.bias for layer in plain]
    if len(plain) > 1:
        weight = torch.cat([layer.weight.data for layer in plain])
        for layer, part in zip(plain, weight.split([layer.out_features for layer in plain])):
            layer.weight.data = part
    joined[layers] = weight, None if None in biases else torch.cat(biases).to(weight.dtype)


@torch.no_grad()
def rollouts(model, processor, prompts: list[Prompt], group: int, sampling: Sampling,
             generator: torch.Generator | None = None, autocast: bool = False) -> list[list[list[int]]]:
    """`group` replies to each prompt: token ids with the end token, or cut at sampling.max_new_tokens.

    Prompts that begin with the same images (`stems_of`) share the pass over them and their keys and values, too.
    """
    model = inner(model)
    device, end = model.device, processor.tokenizer.eos_token_id
    banned = [processor.tokenizer.convert_tokens_to_ids(t) for t in
              ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")]
    stems = stems_of(prompts)
    shared = len(stems) < len(prompts)
    with decoding_weights(model, autocast) as joined, torch.inference_mode(), \
            torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        batch = padded(model, [prompts[stem[0]].begins() for stem in stems] if shared else prompts, processor.image_token_id)
        out = model.model.language_model(**batch.given, position_ids=batch.positions, use_cache=True)
        tails = _read_tails(model, prompts, stems, batch, out.past_key_values) if shared else None
        final = tails.final if shared else batch.final(out.last_hidden_state)
        owner = (tails.places if shared else torch.arange(len(prompts))[:, None]).repeat_interleave(group, 1)
        per_stem = owner.shape[1]
        decoder = _Decoder(model, out.past_key_values, batch, per_stem, sampling.max_new_tokens, joined, tails)
        logits = model.lm_head(final)[owner.flatten().clamp(min=0).to(device)]
        replies: list[list[int]] = [[] for _ in range(owner.numel())]
        rows = torch.arange(len(replies), device=device)
        done = (owner.flatten() < 0).to(device)
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
