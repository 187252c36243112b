"""A language model's layers on a CPU, over the tokens of all rows, one behind the other.

Layers with the same input are one product, backward passes are written out, and the last layer
computes only the states that are asked for. Outputs and gradients are those of transformers and
PEFT, but for rounding.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad, silu
from torch.utils.checkpoint import checkpoint

from mig_kit.shared_prefix.groups import Group, attend_groups, places, scored_places

BLOCK = 192  # tokens of a prompt whose scores are computed at a time
# Longer rows are padded at their end to a multiple of it, and states that are asked for to one of
# its quarter: oneDNN compiles a kernel for every new shape, which takes longer than to run it.
STEP = 256
LONG_REPLY = 128  # tokens; longer ones attend by a fused kernel
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def can_read_flat(model) -> bool:
    """Do the layers of this model consist of what `read_flat` computes, on a CPU?

    Projections must be plain, 4-bit or adapted by plain LoRA in the model's dtype; where gradients
    are wanted, nothing behind the embeddings but LoRA adapters may be trained.
    """
    language = model.model.language_model
    config, layer = language.config, language.layers[0]
    if (model.device.type != "cpu" or not hasattr(getattr(layer, "self_attn", None), "q_proj")
            or not hasattr(getattr(layer, "mlp", None), "gate_proj")):
        return False
    if (config.hidden_act != "silu" or language.training and config.attention_dropout
            or set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        return False
    trained = [name for name, weight in language.named_parameters() if weight.requires_grad
               and not name.startswith("embed_tokens.")]
    if torch.is_grad_enabled() and any(
            ".lora_A." not in name and ".lora_B." not in name for name in trained):
        return False
    # norms and whole modules may be PEFT's, too
    if any(type(module).__module__.startswith("peft.") and not is_plain_lora(module)
           for part in (language.layers, language.norm) for module in part.modules()):
        return False
    # PEFT computes an adapter in its own dtype, which TRL makes bfloat16 on a 4-bit base
    dtype = None if torch.is_autocast_enabled("cpu") else language.embed_tokens.weight.dtype
    return all(_is_plain(getattr(part, name), dtype) for layer in language.layers
               for part, names in ((layer.self_attn, ATTENTION), (layer.mlp, MLP))
               for name in names)


def is_plain_lora(layer: torch.nn.Module) -> bool:
    """Is this a linear layer of PEFT's that adds scale * x A^T B^T of one adapter, or of none?"""
    kind = type(layer)
    return (kind.__module__.startswith("peft.tuners.lora.")
            and kind.__name__ in ("Linear", "Linear4bit")
            and not layer.lora_variant and not any(layer.lora_bias.values())
            and sum(name in layer.lora_A for name in layer.active_adapters) <= 1)


def _is_plain(layer: torch.nn.Module, dtype: torch.dtype | None) -> bool:
    """Is this a layer, 4-bit or not, with one LoRA adapter, of this dtype if given, or none?"""
    if is_plain_lora(layer):
        in_use = {layer.lora_A[name].weight.dtype for name in layer.active_adapters
                  if name in layer.lora_A}
        if (layer.merged or dtype and in_use - {dtype}
                or any(isinstance(module, torch.nn.Dropout) and module.p and module.training
                       for module in layer.lora_dropout.values())):
            return False
        layer = layer.base_layer
    kind = type(layer)
    if kind is torch.nn.Linear:
        return True
    # by name, because bitsandbytes may not be installed; in eval mode it repacks weights in place
    return (kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes")
            and not getattr(layer.weight.quant_state, "packing_format_for_cpu", False))


def read_flat(language: torch.nn.Module, embeds: torch.Tensor, positions: torch.Tensor,
              groups: Sequence[Group], deepstack: Sequence[torch.Tensor] = (),
              is_image: torch.Tensor | None = None,
              keys_and_values: list | None = None) -> torch.Tensor:
    """Normed states of each prompt's last token and of all completions' tokens, (n, hidden).

    embeds: (tokens, hidden) of the groups, in sequence. positions: (3, tokens). deepstack: what is
    added behind the first layers, (image tokens, hidden) each, where is_image (tokens,) is true.
    keys_and_values: gets those of each layer, (tokens, kv_heads, width) each.
    """
    asked_for = scored_places(groups)
    tokens, count, last = len(embeds), len(asked_for), len(language.layers) - 1
    padding = STEP - tokens % STEP if tokens > STEP else 0
    if count > STEP:
        asked_for = pad(asked_for, (0, -count % (STEP // 4)), value=tokens)  # the first such row
    hidden, positions = pad(embeds, (0, 0, 0, padding)), pad(positions, (0, padding))
    if is_image is not None:
        is_image = pad(is_image, (0, padding))
    cosines, sines = (angles[0] for angles in language.rotary_emb(hidden, positions[:, None]))
    is_checkpointed = language.training and language.layers[0].gradient_checkpointing
    for index, layer in enumerate(language.layers):
        chosen = asked_for if index == last and len(deepstack) <= last else None
        arguments = layer, hidden, cosines, sines, groups, chosen, keys_and_values
        # the last layer's backward pass comes first: it would be computed again at once
        if is_checkpointed and torch.is_grad_enabled() and index < last:
            hidden = checkpoint(_run_layer, *arguments, use_reentrant=False)
        else:
            hidden = _run_layer(*arguments)
        if index < len(deepstack):
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(
                is_image[:, None], deepstack[index].to(hidden.dtype))
    hidden = hidden[asked_for] if chosen is None else hidden
    return _norm(language.norm, hidden[:count])


def _run_layer(layer: torch.nn.Module, hidden: torch.Tensor, cosines: torch.Tensor,
               sines: torch.Tensor, groups: Sequence[Group], chosen: torch.Tensor | None,
               keys_and_values: list | None) -> torch.Tensor:
    """A decoder layer: (tokens, hidden) -> (tokens, hidden), or only the tokens `chosen`."""
    attention, mlp, tokens = layer.self_attn, layer.mlp, sum(group.tokens for group in groups)
    count = tokens if chosen is None else int((chosen < tokens).sum())
    normed = _norm(layer.input_layernorm, hidden)
    if chosen is None:
        q, k, v = _project(normed, tokens, attention.q_proj, attention.k_proj, attention.v_proj)
    else:
        k, v = _project(normed, tokens, attention.k_proj, attention.v_proj)
        few, = _project(normed[chosen], count, attention.q_proj)
        q = few.new_zeros(len(normed), few.shape[1]).index_copy(0, chosen, few)
    q, k, v = (heads.unflatten(1, (-1, attention.head_dim)) for heads in (q, k, v))
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = (_Rotation.apply(heads, cosines, sines, v.dtype) for heads in (q, k))
    if keys_and_values is not None:
        keys_and_values.append((k[:tokens], v[:tokens]))
    with torch.autocast("cpu", enabled=False):
        mixed = (_attend_long(q, k, v, attention.scaling, groups) if has_long_replies(groups) else
                 _Attention.apply(q, k, v, attention.scaling, groups, chosen is not None))
    if chosen is not None:
        hidden, mixed = hidden[chosen], mixed[chosen]
    hidden = hidden + _project(mixed, count, attention.o_proj)[0]
    normed = _norm(layer.post_attention_layernorm, hidden)
    gated = _GatedSilu.apply(*_project(normed, count, mlp.gate_proj, mlp.up_proj))
    return hidden + _project(gated, count, mlp.down_proj)[0]


def _norm(module: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return _RMSNorm.apply(hidden, module.weight, module.variance_epsilon)


def _project(inputs: torch.Tensor, count: int,
             *layers: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """(tokens, inputs), the first `count` no padding -> each layer's outputs (tokens, outputs)."""
    dtype = product_dtype(inputs)
    adapters = [_adapter_of(layer) for layer in layers]
    down = [adapter[0].to(dtype) for adapter in adapters if adapter]
    up = [adapter[1].to(dtype) for adapter in adapters if adapter]
    scales = [adapter[2] if adapter else None for adapter in adapters]
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    with torch.autocast("cpu", enabled=False):
        return _Projection.apply(inputs.to(dtype), count, bases, scales,
                                 torch.cat(down) if down else None, *up)


def _adapter_of(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, float] | tuple[()]:
    """(lora_A, lora_B, scale) of the adapter that is in use; () without one."""
    if "lora_A" not in dict(layer.named_children()) or layer.disable_adapters:
        return ()
    for name in layer.active_adapters:
        if name in layer.lora_A:
            return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
    return ()


def _plain_weight(base: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The frozen weight of a layer, (outputs, inputs); a 4-bit one is dequantised."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return base.weight.data.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(base.weight.data, state).to(dtype)


class _Projection(torch.autograd.Function):
    """Frozen layers with the same input, and their adapters: x W^T + bias + scale * x A^T B^T."""

    # down: the adapters' A, one below the other; up: their B; scales: None without one. Adapters
    # learn from `count` tokens alone: padding would change the rounding of sums.
    @staticmethod
    def forward(ctx, inputs, count, bases, scales, down, *up):
        inner = None if down is None else inputs @ down.T
        ctx.save_for_backward(inputs, inner, down, *up)
        ctx.count, ctx.bases, ctx.scales = count, bases, scales
        low, b = _inner_parts(inner, up), iter(up)
        outputs = []
        for base, scale in zip(bases, scales):
            weight = _plain_weight(base, inputs.dtype)
            result = (inputs @ weight.T if base.bias is None else
                      torch.addmm(base.bias.data.to(inputs.dtype), inputs, weight.T))
            if scale is not None:
                result.addmm_(next(low), next(b).T, alpha=scale)
            outputs.append(result)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        inputs, inner, down, *up = ctx.saved_tensors
        grad_inputs, grad_inner, grad_up = None, [], []
        low, b = _inner_parts(inner, up), iter(up)
        for base, scale, grad in zip(ctx.bases, ctx.scales, grads):
            if ctx.needs_input_grad[0]:
                weight = _plain_weight(base, inputs.dtype)
                grad_inputs = (grad @ weight if grad_inputs is None
                               else grad_inputs.addmm_(grad, weight))
            if scale is not None:
                grad_up.append((grad[:ctx.count].T @ next(low)[:ctx.count]).mul_(scale))
                grad_inner.append((grad @ next(b)).mul_(scale))
        if down is None:
            return grad_inputs, None, None, None, None
        grad_inner = grad_inner[0] if len(grad_inner) == 1 else torch.cat(grad_inner, 1)
        if grad_inputs is not None:
            grad_inputs.addmm_(grad_inner, down)
        grad_down = grad_inner[:ctx.count].T @ inputs[:ctx.count]
        return grad_inputs, None, None, None, grad_down, *grad_up


def _inner_parts(inner: torch.Tensor | None, up: Sequence[torch.Tensor]) -> Iterator:
    return iter(()) if inner is None else iter(inner.split([b.shape[1] for b in up], 1))


class _RMSNorm(torch.autograd.Function):
    """hidden / root of its mean square * weight, in float32 as transformers computes it."""

    @staticmethod
    def forward(ctx, hidden, weight, epsilon):
        wide = hidden.float()
        inverse = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, inverse = ctx.saved_tensors
        normed = hidden.float() * inverse
        scaled = grad.float() * weight.float()
        projected = (scaled * normed).mean(-1, keepdim=True)
        return (scaled.addcmul_(normed, projected, value=-1).mul_(inverse).to(hidden.dtype),
                None, None)


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


class _Rotation(torch.autograd.Function):
    """Turn heads (tokens, heads, width) by cosines and sines (tokens, width), and cast them."""

    @staticmethod
    def forward(ctx, heads, cosines, sines, dtype):
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = heads.dtype
        return _turn(heads, cosines, sines, 1).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, -1).to(ctx.dtype), None, None, None


def _turn(heads: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor,
          sign: int) -> torch.Tensor:
    half, heads = heads.shape[2] // 2, heads.to(cosines.dtype)
    sines = torch.cat([-sines[:, :half], sines[:, half:]], -1)
    return (heads * cosines[:, None]).addcmul_(heads.roll(half, -1), sines[:, None], value=sign)


def has_long_replies(groups: Sequence[Group]) -> bool:
    """Would the weights that `_Attention` keeps need more memory than the layer?"""
    return any(len(group.completions) > 1 and max(group.completions) > LONG_REPLY
               for group in groups)


def _attend_long(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
                 groups: Sequence[Group]) -> torch.Tensor:
    """`_Attention` that keeps no weights; rows of padding, at the end, are 0."""
    tokens = sum(group.tokens for group in groups)
    rows = (heads[None, :tokens].transpose(1, 2) for heads in (q, k, v))
    mixed = attend_groups(None, *rows, None, groups, scale)[0][0].flatten(1)
    return pad(mixed, (0, 0, 0, len(q) - tokens))


class _Attention(torch.autograd.Function):
    """q (tokens, heads, width); k, v (tokens, kv_heads, width) -> (tokens, heads * width)."""

    @staticmethod
    def forward(ctx, q, k, v, scale, groups, only_asked_for):
        tokens, heads, width = q.shape
        # heads that share keys lie side by side: (kv_heads, shared, tokens, width)
        q = (q * scale).unflatten(1, (k.shape[1], -1)).permute(1, 2, 0, 3).contiguous()
        k, v = (values.transpose(0, 1).contiguous() for values in (k, v))
        mixed = torch.zeros_like(q)
        parts, kept = list(_parts(groups, only_asked_for)), []
        for part in parts:
            weights = part.forward(q, k, v, mixed)
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.parts, ctx.scale = parts, scale
        return mixed.permute(2, 0, 1, 3).reshape(tokens, -1)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *kept = ctx.saved_tensors
        grad = grad.view(q.shape[2], *q.shape[:2], -1).permute(1, 2, 0, 3).contiguous()
        grads = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part, weights in zip(ctx.parts, kept):
            part.backward(q, k, v, weights, grad, *grads)
        grad_q, grad_k, grad_v = grads
        grad_q = grad_q.mul_(ctx.scale).flatten(0, 1).transpose(0, 1)
        return grad_q, grad_k.transpose(0, 1), grad_v.transpose(0, 1), None, None, None


def _parts(groups: Sequence[Group], only_asked_for: bool) -> Iterator:
    """What attends together: blocks of a prompt, or its last token alone; its completions."""
    for first, group in places(groups):
        is_single = len(group.completions) == 1  # it simply goes on where its prompt ends
        prompt_end = first + group.prompt
        end = first + group.tokens if is_single else prompt_end
        start = prompt_end - 1 if only_asked_for else first
        for row in range(start, end, BLOCK):
            yield _Block(slice(row, min(row + BLOCK, end)), slice(first, min(row + BLOCK, end)))
        if group.completions and not is_single:
            yield _Completions(slice(first, prompt_end), group.completions)


class _Block(NamedTuple):
    """Tokens of a prompt, `rows`, which attend to the tokens up to their own, `past`."""

    rows: slice
    past: slice

    def forward(self, q, k, v, mixed):
        queries = q[:, :, self.rows]
        scores = queries.flatten(1, 2) @ k[:, self.past].transpose(1, 2)
        size = queries.shape[2]
        scores.view(*queries.shape[:3], -1)[..., -size:] += hide_future(size, q.dtype, q.device)
        weights = scores.softmax(-1)
        mixed[:, :, self.rows] = (weights @ v[:, self.past]).view(queries.shape)
        return weights

    def backward(self, q, k, v, weights, grad, grad_q, grad_k, grad_v):
        queries, grad = q[:, :, self.rows], grad[:, :, self.rows].flatten(1, 2)
        grad_v[:, self.past] += _transposed_product(weights, grad)
        grad_scores = torch._softmax_backward_data(
            grad @ v[:, self.past].transpose(1, 2), weights, -1, weights.dtype)
        grad_q[:, :, self.rows] = (grad_scores @ k[:, self.past]).view(queries.shape)
        grad_k[:, self.past] += _transposed_product(grad_scores, queries.flatten(1, 2))


class _Completions(NamedTuple):
    """The completions of a prompt, which attend to it, and each to itself."""

    prompt: slice
    lengths: tuple[int, ...]

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(completions, tokens of the longest): each token's index, and whether it is one."""
        lengths = torch.tensor(self.lengths)
        order = torch.arange(max(self.lengths))
        is_token = order < lengths[:, None]
        starts = self.prompt.stop + lengths.cumsum(0) - lengths
        last = self.prompt.stop + sum(self.lengths) - 1
        return (starts[:, None] + order).clamp(max=last), is_token

    def forward(self, q, k, v, mixed):
        places, is_token = self.places()
        queries, keys, values = q[:, :, places], k[:, places], v[:, places]
        kv_heads, shared, n, longest, width = queries.shape
        prompt_keys, prompt_values = k[:, self.prompt], v[:, self.prompt]
        to_prompt = queries.flatten(1, 3) @ prompt_keys.transpose(1, 2)
        # (kv_heads, n, shared * longest, width)
        by_row = queries.transpose(1, 2).flatten(2, 3)
        to_own = (by_row @ keys.transpose(2, 3)).unflatten(2, (shared, longest)).transpose(1, 2)
        to_own = to_own + hide_future(longest, q.dtype, q.device)
        scores = torch.cat([to_prompt.unflatten(1, (shared, n, longest)), to_own], -1)
        weights = scores.softmax(-1)
        prompt_weights, own_weights = weights.split([prompt_keys.shape[1], longest], -1)
        result = (prompt_weights.flatten(1, 3) @ prompt_values).view(queries.shape)
        own = own_weights.transpose(1, 2).flatten(2, 3) @ values
        result += own.unflatten(2, (shared, longest)).transpose(1, 2)
        mixed[:, :, places[is_token]] = result[:, :, is_token]
        return weights

    def backward(self, q, k, v, weights, grad, grad_q, grad_k, grad_v):
        places, is_token = self.places()
        queries, keys, values = q[:, :, places], k[:, places], v[:, places]
        grad = grad[:, :, places] * is_token[..., None]
        kv_heads, shared, n, longest, width = queries.shape
        prompt_keys, prompt_values = k[:, self.prompt], v[:, self.prompt]
        prompt_weights, own_weights = weights.split([prompt_keys.shape[1], longest], -1)
        grad_flat, grad_by_row = grad.flatten(1, 3), grad.transpose(1, 2).flatten(2, 3)
        by_row = queries.transpose(1, 2).flatten(2, 3)
        own_weights = own_weights.transpose(1, 2).flatten(2, 3)
        grad_v[:, self.prompt] += _transposed_product(prompt_weights.flatten(1, 3), grad_flat)
        own_grad_v = _transposed_product(own_weights, grad_by_row)
        from_prompt = (grad_flat @ prompt_values.transpose(1, 2)).unflatten(1, (shared, n, longest))
        from_own = (grad_by_row @ values.transpose(2, 3)).unflatten(2, (shared, longest))
        grad_scores = torch._softmax_backward_data(
            torch.cat([from_prompt, from_own.transpose(1, 2)], -1), weights, -1, weights.dtype)
        to_prompt, to_own = grad_scores.split([prompt_keys.shape[1], longest], -1)
        to_prompt, to_own = to_prompt.flatten(1, 3), to_own.transpose(1, 2).flatten(2, 3)
        result = (to_prompt @ prompt_keys).view(queries.shape)
        result += (to_own @ keys).unflatten(2, (shared, longest)).transpose(1, 2)
        grad_q[:, :, places[is_token]] = result[:, :, is_token]
        grad_k[:, self.prompt] += _transposed_product(to_prompt, queries.flatten(1, 3))
        own_grad_k = _transposed_product(to_own, by_row)
        grad_k[:, places[is_token]] = own_grad_k[:, is_token]
        grad_v[:, places[is_token]] = own_grad_v[:, is_token]


def _transposed_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left^T @ right of a left (..., rows, past) and a right (..., rows, width)."""
    # a product copies what it transposes, and the right is smaller
    return (right.transpose(-1, -2) @ left).transpose(-1, -2)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that products of this tensor are computed in."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def hide_future(tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(tokens, tokens), added to scores: 0 at a token and those before it, else very low."""
    # -inf would make a row of padding NaN
    lowest = torch.finfo(dtype).min / 2
    return torch.full((tokens, tokens), lowest, dtype=dtype, device=device).triu_(1)
