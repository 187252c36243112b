"""One token for many rows at a time, over keys and values that they share.

Used by `generation`. Where adapters can be folded into plain weights they are, for as long as replies are drawn; 4-bit layers are
the model's own modules and work unchanged.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.nn.functional import linear, softmax
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention

from mig_kit.engine.prefixes import PaddedPrompts, Suffixes


class Decoder:
    """One decoding step for stems x group rows over shared keys of what the rows begin with, and a preallocated cache of the rest.

    A stem is a prompt, whose replies the rows are; with `tails` it is the images that several prompts begin with, and the group
    is as many rows for each of them. A step is many small operations, and what each costs is its start, not its work. So
    products of one input are one product where `joined` (see `decoding_weights`) has their weights, positions are turned into
    angles once for all steps, and what a row remembers lies in the order of its stem's scores.
    """

    def __init__(self, model, cache, batch: PaddedPrompts, group: int, room: int, joined: dict, tails: Suffixes | None = None):
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

    def _keep_tails(self, cache, tails: Suffixes, padding: torch.Tensor, shared: int) -> torch.Tensor:
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


@contextmanager
def fuse_decoding_weights(model, autocast: bool):
    """Adapters folded into the weights, and weights in bfloat16 if that is what they compute in, while replies are drawn.

    Otherwise every step would cast every weight again and run every adapter beside it. Afterwards the weights are what
    they were, bit for bit: until then those with an adapter wait in the host's memory. Left as they are: 4-bit layers, and
    adapters beside weights that are kept in bfloat16 (on a GPU), for these would round a young adapter away.
    Yields {layers: (weight, bias)} of plain layers; where they are cast, those with the same input are joined into one, for
    they need no more memory then.
    """
    language = model.model.language_model
    folded = [m for m in model.modules() if isinstance(m, LoraLinear) and not m.merged and not m.disable_adapters
              and m.base_layer.weight.dtype == torch.float32]
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
                    _fuse_layers(joined, layers)
        if autocast and type(model.lm_head) is torch.nn.Linear:  # its weight may be the embeddings', which stay as they are
            joined[model.lm_head,] = model.lm_head.weight.to(torch.bfloat16), None
        yield joined
    finally:
        for layer in folded:
            layer.merged_adapters.clear()
        for module, weight, kept in saved:
            module.weight.data = weight if kept is None else weight.copy_(kept)


def _fuse_layers(joined: dict, layers: tuple) -> None:
    """Add the layers' weights as one, of which theirs become parts, if all are plain."""
    plain = [layer.base_layer if isinstance(layer, LoraLinear) and (layer.merged or layer.disable_adapters) else layer
             for layer in layers]
    if not all(type(layer) is torch.nn.Linear for layer in plain):
        return
    weight, biases = plain[0].weight.data, [layer.bias for layer in plain]
    if len(plain) > 1:
        weight = torch.cat([layer.weight.data for layer in plain])
        for layer, part in zip(plain, weight.split([layer.out_features for layer in plain])):
            layer.weight.data = part
    joined[layers] = weight, None if None in biases else torch.cat(biases).to(weight.dtype)
