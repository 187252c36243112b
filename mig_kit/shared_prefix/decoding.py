"""One token at a time for many rows, over keys and values that they share.

Plain layers with the same input are one product. In float32 on a CPU, their adapters of plain LoRA
are added to the weights; elsewhere they are another product, which is added to the first: what the
learner computes, rounded as it rounds. All other layers, 4-bit ones or those of other PEFT methods,
are the model's own modules and work unchanged.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import linear, pad, softmax
from transformers import Cache

from mig_kit.shared_prefix.groups import KeysValues, product_dtype
from mig_kit.shared_prefix.prefixes import PaddedPrompts, has_linear_attention

ROW_BLOCK = 16  # tokens by which a row's keys and values grow on a CPU
HIDDEN = -1e30  # added to the scores of keys that are not attended to
SHRINK_AT = 0.85  # Dropping rows copies all others: it pays once this share or fewer are left.
FOLDED_BYTES = 2**31  # of a model's layers, up to which its adapters are added to copies of them


class FusedLayers(NamedTuple):
    """Layers with the same input as one product, and their adapters' product beside it."""

    weight: torch.Tensor  # (all outputs, inputs)
    bias: torch.Tensor | None  # (all outputs,)
    down: torch.Tensor | None = None  # A of all layers, (all ranks, inputs); None without adapters
    up: torch.Tensor | None = None  # B of all layers, block diagonal: (all outputs, all ranks)
    scale: float = 1.0  # of the adapters' product


FusedWeights = dict[tuple[torch.nn.Module, ...], FusedLayers]  # layers with the same input -> them


class Decoder:
    """Computes one token for all rows at a time: at first `rows_per_prefix` rows for each prefix.

    A prefix is a prompt, and its rows are replies. Attention is over a grid of (prefixes, rows of a
    prefix), which shrinks as rows end; on a CPU, all else is over the rows that go on alone.

    cache: of `PaddedPrompts.pad_keys`. capacity: tokens that a row can hold.
    """

    def __init__(self, model, cache: list[KeysValues], prefixes: PaddedPrompts,
                 rows_per_prefix: int, capacity: int, fused_weights: FusedWeights):
        self.language, self.head = model.model.language_model, model.lm_head
        self.fused_weights = fused_weights
        attention = self.language.layers[0].self_attn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.has_head_norms = "q_norm" in dict(attention.named_children())
        self.heads = self.language.config.num_attention_heads
        self.kv_heads = self.language.config.num_key_value_heads
        self.step = 0

        device = prefixes.mask.device
        self.on_cpu = device.type == "cpu"
        self.grid = len(prefixes.mask), rows_per_prefix
        self.places = torch.arange(math.prod(self.grid), device=device)  # of rows, in the grid
        self.row_of_place = self.places  # any row where a place is free
        # Under autocast the cache is float32, and every step would cast all of it again.
        self.dtype = product_dtype(cache[0][0])

        # First what all rows of a prefix share: its keys stay where they are, and one product reads
        # them for all rows. Of each layer: (prefixes, kv_heads, prefix tokens, width), twice.
        self.prefix_cache = [
            tuple(tensor.to(self.dtype).contiguous() for tensor in pair) for pair in cache]
        # Then each row's own keys and values, which grow in place; one cache for both would copy
        # itself at each step. On a CPU, where a product copies what is no whole tensor, they grow
        # by ROW_BLOCK, and `row_bias` hides what is not written yet. Of each layer: (keys or
        # values, prefixes, kv_heads, rows, new tokens, width).
        at_first = min(ROW_BLOCK, capacity) if self.on_cpu else capacity
        row_shape = (2, len(prefixes.mask), self.kv_heads, rows_per_prefix, at_first, self.width)
        self.row_cache = [torch.zeros(row_shape, dtype=self.dtype, device=device) for _ in cache]

        # added to scores: (prefixes * kv_heads, 1, prefix tokens), and (new tokens,), which are
        # hidden until they are drawn
        is_padding = prefixes.mask.repeat_interleave(self.kv_heads, 0)[:, None] == 0
        self.prefix_bias = torch.zeros(is_padding.shape, device=device)
        self.prefix_bias.masked_fill_(is_padding, HIDDEN)
        self.row_bias = torch.full((capacity + ROW_BLOCK,), HIDDEN, device=device)

        # cosines and sines of all steps, (prefixes, 1, steps, width)
        steps = torch.arange(capacity, device=device)
        positions = (prefixes.next_position[:, None] + steps).expand(3, -1, -1)
        self.cosines, self.sines = (angles[:, None] for angles in self.language.rotary_emb(
            prefixes.inputs["inputs_embeds"], positions))
        # With this sign, rotating a head only has to swap its halves.
        self.sines[..., :self.width // 2] *= -1

    def keep_rows(self, is_kept: torch.Tensor) -> None:
        """Drop the other rows. is_kept: (rows,) bool."""
        self.places = self.places[is_kept]
        prefix = self.places // self.grid[1]
        counts = torch.bincount(prefix, minlength=self.grid[0])
        left = counts.nonzero()[:, 0]
        smaller = len(left), int(counts.max())
        if math.prod(smaller) <= SHRINK_AT * math.prod(self.grid):
            rank = torch.arange(len(prefix), device=prefix.device)
            rank -= (counts.cumsum(0) - counts)[prefix]  # among the rows of its prefix
            self._shrink(smaller, left, torch.searchsorted(left, prefix) * smaller[1] + rank)
        self.row_of_place = self._find_rows()

    def _find_rows(self) -> torch.Tensor:
        """The row at each place of the grid, (places,)."""
        rows = torch.arange(len(self.places), device=self.places.device)
        return rows.new_zeros(math.prod(self.grid)).index_copy_(0, self.places, rows)

    def _shrink(self, grid: tuple[int, int], prefixes: torch.Tensor, places: torch.Tensor) -> None:
        """Move the rows to their places in a smaller grid, which has some prefixes alone."""
        moved = torch.arange(self.row_cache[0][..., 0, 0].numel(), device=places.device)
        moved = moved.view(self.row_cache[0].shape[:4]).movedim(3, 2).flatten(1, 2)
        old_places, self.grid, self.places = self.places, grid, places
        moved = moved[:, old_places[self._find_rows()]].unflatten(1, grid).movedim(2, 3)
        for index, (keys, values) in enumerate(self.prefix_cache):  # one layer at a time is copied
            self.prefix_cache[index] = (keys.index_select(0, prefixes),
                                        values.index_select(0, prefixes))
            rows = self.row_cache[index].flatten(0, 3).index_select(0, moved.flatten())
            self.row_cache[index] = rows.view(*moved.shape, *rows.shape[1:])
        by_prefix = self.prefix_bias.unflatten(0, (-1, self.kv_heads))
        self.prefix_bias = by_prefix[prefixes].flatten(0, 1)
        self.cosines, self.sines = self.cosines[prefixes], self.sines[prefixes]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows,) -> logits (rows, vocabulary) of the next token."""
        hidden = self.language.embed_tokens(tokens if self.on_cpu else self._to_grid(tokens))
        self.row_bias[self.step] = 0
        if self.step == self.row_cache[0].shape[-2]:
            self.row_cache = [pad(cache, (0, 0, 0, ROW_BLOCK)) for cache in self.row_cache]
        cosines = self._angles_of_step(self.cosines, of_values=1)
        sines = self._angles_of_step(self.sines, of_values=0)
        for index, layer in enumerate(self.language.layers):
            hidden = self._run_layer(index, layer, hidden, cosines, sines)
        self.step += 1
        hidden = self.language.norm(hidden if self.on_cpu else self._from_grid(hidden))
        return self._project(hidden, self.head)

    def _to_grid(self, of_rows: torch.Tensor) -> torch.Tensor:
        is_full = len(self.places) == math.prod(self.grid)
        return of_rows if is_full else of_rows.index_select(0, self.row_of_place)

    def _from_grid(self, of_places: torch.Tensor) -> torch.Tensor:
        is_full = len(self.places) == len(of_places)
        return of_places if is_full else of_places.index_select(0, self.places)

    def _angles_of_step(self, angles: torch.Tensor, of_values: int) -> torch.Tensor:
        """(prefixes, 1, heads + 2 * kv_heads, width); of_values keeps values unturned."""
        of_step = angles[:, :, self.step, None]
        turned = of_step.expand(-1, -1, self.heads + self.kv_heads, -1)
        unturned = of_step.new_full((1, 1, self.kv_heads, self.width), of_values)
        return torch.cat([turned, unturned.expand(*of_step.shape[:2], -1, -1)], 2)

    def _run_layer(self, index: int, layer: torch.nn.Module, hidden: torch.Tensor,
                   cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
        """One decoder layer: (rows, hidden) -> (rows, hidden)."""
        attention, mlp = layer.self_attn, layer.mlp
        heads = self._project(layer.input_layernorm(hidden),
                              attention.q_proj, attention.k_proj, attention.v_proj)
        heads = self._to_grid(heads) if self.on_cpu else heads
        heads = heads.view(*self.grid, -1, self.width)
        if self.has_head_norms:
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 2)
            heads = torch.cat([attention.q_norm(q), attention.k_norm(k), v], 2)
        swapped = heads.roll(self.width // 2, -1)
        heads = (heads * cosines).add_(swapped * sines).to(self.dtype)
        mixed = self._attend(heads, index)
        mixed = self._from_grid(mixed) if self.on_cpu else mixed
        hidden = hidden + self._project(mixed, attention.o_proj)
        normed = layer.post_attention_layernorm(hidden)
        gate, up = self._project(normed, mlp.gate_proj, mlp.up_proj).chunk(2, -1)
        return hidden + self._project(mlp.act_fn(gate).mul_(up), mlp.down_proj)

    def _project(self, inputs: torch.Tensor, *layers: torch.nn.Module) -> torch.Tensor:
        """(rows, inputs) -> the layers' outputs, side by side."""
        if layers in self.fused_weights:
            fused, inputs = self.fused_weights[layers], inputs.to(self.dtype)
            outputs = linear(inputs, fused.weight, fused.bias)
            if fused.down is None:
                return outputs
            return outputs + linear(linear(inputs, fused.down), fused.up) * fused.scale
        outputs = [self._project(inputs, layer) if (layer,) in self.fused_weights else layer(inputs)
                   for layer in layers]
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]

    def _attend(self, heads: torch.Tensor, index: int) -> torch.Tensor:
        """Queries, keys, values (prefixes, rows, heads, width) -> (places, heads * width)."""
        row_cache = self.row_cache[index]
        new = heads[:, :, self.heads:].unflatten(2, (2, self.kv_heads))
        row_cache[..., self.step, :] = new.permute(2, 0, 3, 1, 4)
        size = row_cache.shape[-2] if self.on_cpu else self.step + 1
        row_keys, row_values = row_cache[..., :size, :].flatten(1, 3)
        prefix_keys, prefix_values = (cache.flatten(0, 1) for cache in self.prefix_cache[index])

        # One product of all queries with the prefix's keys: (prefixes * kv_heads, rows *
        # heads_per_key, width); and one of each row's with its own: (prefixes * kv_heads * rows,
        # heads_per_key, width). One softmax is over both.
        queries = heads[:, :, :self.heads].unflatten(2, (self.kv_heads, -1)).transpose(1, 2)
        queries = queries.reshape(len(prefix_keys), -1, self.width)
        queries_by_row = queries.view(len(row_keys), -1, self.width)
        prefix_scores = _dots(queries, prefix_keys, self.prefix_bias, self.scale, self.on_cpu)
        row_scores = _dots(queries_by_row, row_keys, self.row_bias[:size], self.scale, self.on_cpu)
        scores = torch.cat([prefix_scores, row_scores.view(*queries.shape[:2], size)], -1)
        weights = softmax(scores, -1).to(self.dtype)

        prefix_weights, row_weights = weights.split((prefix_keys.shape[1], size), -1)
        mixed = torch.bmm(prefix_weights, prefix_values).view(queries_by_row.shape)
        row_weights = row_weights.unflatten(1, (self.grid[1], -1)).flatten(0, 1)
        mixed = mixed.baddbmm_(row_weights, row_values)
        mixed = mixed.view(self.grid[0], self.kv_heads, self.grid[1], -1).transpose(1, 2)
        return mixed.reshape(math.prod(self.grid), -1)


class StateDecoder:
    """A `Decoder` of models with linear attention: transformers' own pass over one token of each
    row, whose cache holds the row's prompt once more for each row.
    """

    def __init__(self, model, cache: Cache, prompts: PaddedPrompts, rows_per_prefix: int):
        self.language, self.head = model.model.language_model, model.lm_head
        self.cache, self.mask, self.position = cache, prompts.mask, prompts.next_position
        prompt_of_row = torch.arange(len(self.mask), device=self.mask.device)
        self._select(prompt_of_row.repeat_interleave(rows_per_prefix))

    def keep_rows(self, is_kept: torch.Tensor) -> None:
        """As `Decoder.keep_rows`."""
        self.places = self.places[is_kept]
        if len(self.places) <= SHRINK_AT * len(self.mask):
            self._select(self.places)

    def _select(self, places: torch.Tensor) -> None:
        """Hold these rows of the cache alone."""
        self.cache.batch_select_indices(places)
        self.mask, self.position = self.mask[places], self.position[places]
        self.places = torch.arange(len(places), device=places.device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (rows,) -> logits (rows, vocabulary) of the next token."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        held = tokens.new_zeros(len(self.mask)).index_copy_(0, self.places, tokens)
        output = self.language(
            input_ids=held[:, None], attention_mask=self.mask,
            position_ids=self.position[None, :, None].expand(3, -1, -1),
            past_key_values=self.cache, use_cache=True)
        self.position = self.position + 1
        return self.head(output.last_hidden_state[self.places, 0])


def is_plain_lora(layer: torch.nn.Module) -> bool:
    """Is this a linear layer of PEFT's that adds scale * x A^T B^T of one adapter, or of none?"""
    kind = type(layer)
    return (kind.__module__.startswith("peft.tuners.lora.")
            and kind.__name__ in ("Linear", "Linear4bit")
            and not layer.lora_variant and not any(layer.lora_bias.values())
            and sum(name in layer.lora_A for name in layer.active_adapters) <= 1)


def _dots(queries: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, scale: float,
            on_cpu: bool) -> torch.Tensor:
    """queries (batch, n, width), keys (batch, m, width) -> (batch, n, m); bias: float32."""
    keys = keys.transpose(1, 2)
    if queries.dtype == torch.float32:
        return torch.baddbmm(bias, queries, keys, alpha=scale)
    # In bfloat16, Qwen2.5's large keys err by whole units; on CPUs, bmm has no out_dtype.
    scores = (torch.bmm(queries, keys) if on_cpu
              else torch.bmm(queries, keys, out_dtype=torch.float32))
    return torch.add(bias, scores, alpha=scale)


def fuse_decoding_weights(model, autocast: bool = False) -> FusedWeights:
    """The weights of all plain projections and their adapters, as the decoder multiplies by them.

    Under autocast they are bfloat16 copies, layers with the same input are one, and the head is
    among them. In float32 on a CPU layers with the same input are one, too, and adapters are added:
    elsewhere copies would cost more, or round otherwise than the learner.
    """
    fused_weights: FusedWeights = {}
    if has_linear_attention(model):
        return fused_weights
    layers = model.model.language_model.layers
    folds = (not autocast and model.device.type == "cpu" and model.dtype == torch.float32
             and sum(parameter.nbytes for parameter in layers.parameters()) <= FOLDED_BYTES)
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        same_input = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,),
                      (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
        if not autocast and not folds:  # no copies: each layer's own weights
            same_input = [(single,) for group in same_input for single in group]
        for group in same_input:
            if fused := _fuse_layers(group, autocast, folds):
                fused_weights[group] = fused
    if autocast and type(model.lm_head) is torch.nn.Linear:
        fused_weights[model.lm_head,] = FusedLayers(model.lm_head.weight.to(torch.bfloat16), None)
    return fused_weights


def _fuse_layers(layers: tuple[torch.nn.Module, ...], autocast: bool,
                 folds: bool = False) -> FusedLayers | None:
    """The layers as one; None if one is not plain, or if their adapters differ in kind.

    folds: add the adapters to the weights.
    """
    bases, adapters = [], []
    for layer in layers:
        adapter = _active_adapter(layer) if is_plain_lora(layer) else None
        is_wrapped = adapter is not None or _is_bare(layer)
        bases.append(layer.base_layer if is_wrapped else layer)
        adapters.append(adapter)
    if not all(type(base) is torch.nn.Linear for base in bases):
        return None
    dtype = torch.bfloat16 if autocast else bases[0].weight.dtype
    weights, biases = [base.weight.detach().to(dtype) for base in bases], [
        base.bias for base in bases]
    if not autocast and any(down.dtype != dtype for down, _, _ in filter(None, adapters)):
        return None
    if folds:
        weights = [torch.addmm(weight, adapter[1], adapter[0], alpha=adapter[2])
                   if adapter else weight for weight, adapter in zip(weights, adapters)]
        adapters = [None] * len(layers)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = None if biases[0] is None else torch.cat(biases).detach().to(dtype)
    if not any(adapters):
        return FusedLayers(weight, bias)
    if None in adapters:
        return None
    downs, ups, scales = zip(*adapters)
    if len(set(scales)) > 1:
        return None
    return FusedLayers(weight, bias, torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype),
                       scales[0])


def _active_adapter(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A (rank, inputs), B (outputs, rank) and factor of a plain adapter that is in use, or None."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.merged or layer.disable_adapters or not names:
        return None
    name = names[0]
    return (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(),
            layer.scaling[name])


def _is_bare(layer: torch.nn.Module) -> bool:
    """Is this a layer of LoRA's that computes what its base layer does?"""
    return "lora_A" in dict(layer.named_children()) and layer.merged != layer.disable_adapters


def train_mode_for_4bit_layers(model: torch.nn.Module) -> torch.nn.Module:
    """Put the 4-bit layers alone in train mode; call it after what puts the model in eval mode.

    In eval mode, on CPUs with avx512_bf16, a 4-bit layer repacks its weights in place at its first
    use; merging it or training it afterwards gives garbage.
    """
    for module in model.modules():
        kind = type(module)  # by name, because bitsandbytes may not be installed
        # PEFT's wrapper, whose dropout must stay off, has the same name
        if kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes"):
            module.train()
    return model


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Have the model in eval mode while it lasts, but for its 4-bit layers."""
    was_training = model.training
    train_mode_for_4bit_layers(model.eval())
    try:
        yield
    finally:
        model.train(was_training)
