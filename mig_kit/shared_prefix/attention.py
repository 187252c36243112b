"""Attention for CPUs, registered with transformers under NAME.

The fused kernel of "sdpa" is fast only in the forward pass of short rows, and is used there. All
else is plain products, with scores written in place, and block by block for a long prompt. The
results equal those of "eager" but for the last bit.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "mig_kit"
LONG_WITH_GRADIENT = 1024  # tokens; only longer rows are worth blocks, which skip half the scores
LONG_WITHOUT_GRADIENT = 512  # tokens from which blocks beat the fused kernel, in bfloat16
BLOCK = 128  # tokens whose scores are computed at a time in a causal model
NONCAUSAL_BLOCK = 8 * BLOCK  # the same where every token looks at all others
ROWS_AT_ONCE = 8  # rows whose scores are in memory at a time where no gradient is wanted


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor, attention_mask: torch.Tensor | None,
              scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
              **kwargs) -> tuple[torch.Tensor, torch.Tensor | list[torch.Tensor] | None]:
    """Attend, as transformers calls it, with a key and value for several query heads.

    Args:
        query: (rows, heads, tokens, width). key, value: (rows, kv_heads, past, width).
        attention_mask: (rows, 1, tokens, past), bool (True: is attended to) or added to the
            scores. None: every token attends to all, in a causal module to the past alone.
    Returns: mixed values (rows, tokens, heads, width), and weights if the module `keep_weights`:
        (rows, heads, tokens, past), or a list of `_attend_in_blocks` if it is `in_blocks`.
    """
    tokens, width, past = query.shape[2], query.shape[3], key.shape[2]
    keep_weights = getattr(module, "keep_weights", False)
    in_blocks = getattr(module, "in_blocks", False)
    causal = module.is_causal if is_causal is None else is_causal
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (query, key, value))
    dtype = product_dtype(query)
    scale = width**-0.5 if scaling is None else scaling

    is_causal_square = attention_mask is None and causal and tokens == past
    is_long = is_causal_square and tokens > LONG_WITH_GRADIENT and not keep_weights
    if needs_gradient or keep_weights:
        # in float32 it is as fast for long rows, too, and keeps no scores
        is_fused = not keep_weights and (dropout > 0 or is_long and not in_blocks
                                         and dtype == torch.float32)
    elif (tokens == past and tokens >= LONG_WITHOUT_GRADIENT and dropout == 0
          and dtype == torch.bfloat16):
        return _attend_few_rows(query, key, value, scale, causal, attention_mask), None
    else:
        is_fused = True
    if is_fused:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, is_causal=is_causal, **kwargs)
    if attention_mask is None and causal:
        return attend_causally(query, key, value, scale, keep_weights, in_blocks)
    return _attend_at_once(query, key, value, scale, keep_weights, attention_mask)


def attend_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                    keep_weights: bool = False, in_blocks: bool = False) -> tuple:
    """`attention` of the last tokens of rows to those up to their own, by plain products."""
    tokens, past = query.shape[2], key.shape[2]
    is_long = tokens > LONG_WITH_GRADIENT and not keep_weights
    if tokens == past and (is_long or in_blocks):
        return _attend_in_blocks(query, key, value, scale, keep_weights)
    all_pairs = torch.ones(tokens, past, dtype=torch.bool, device=query.device)
    mask = all_pairs.tril(past - tokens)[None, None] if tokens > 1 else None
    return _attend_at_once(query, key, value, scale, keep_weights, mask)


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that products of this tensor are computed in."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _attend_few_rows(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                     causal: bool, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention in blocks without weights, ROWS_AT_ONCE rows after ROWS_AT_ONCE rows."""
    rows = len(query)
    mask = None if mask is None else mask.expand(rows, -1, -1, -1)
    parts = [slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE)]
    mixed = [_attend_in_blocks(query[part], key[part], value[part], scale, False, causal,
                               None if mask is None else mask[part])[0] for part in parts]
    return torch.cat(mixed)


def _attend_at_once(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
                    keep_weights: bool,
                    mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with all scores in memory; shapes are those of `attention`."""
    rows, heads, tokens, width = query.shape
    kv_heads, past = key.shape[1:3]
    dtype = product_dtype(query)
    # Autocast would write the scores again in float32; the softmax sums in float32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        # The heads that share keys lie side by side, so that no key needs to be repeated.
        query = (query * scale).to(dtype).reshape(rows, kv_heads, -1, width)
        scores = torch.matmul(query, key.to(dtype).transpose(2, 3))
        if mask is not None:
            # Adding in place on a view of the scores would make backward copy them.
            scores += _additive(mask, dtype).repeat(1, 1, heads // kv_heads, 1)
        weights = scores.softmax(-1)
        mixed = torch.matmul(weights, value.to(dtype)).view(rows, heads, tokens, width)
    mixed = mixed.transpose(1, 2).contiguous()
    return mixed, weights.view(rows, heads, tokens, past) if keep_weights else None


def _attend_in_blocks(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float,
        keep_weights: bool, causal: bool = True,
        mask: torch.Tensor | None = None) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Attend block by block; weights are (rows, heads, tokens of the block, tokens before its end).
    """
    rows, heads, tokens, width = query.shape
    kv_heads = key.shape[1]
    dtype = product_dtype(query)
    step = BLOCK if causal else NONCAUSAL_BLOCK
    mixed_blocks, weight_blocks = [], []
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (query * scale).to(dtype), key.to(dtype), value.to(dtype)
        for start, block in zip(range(0, tokens, step), query.split(step, 2)):
            end = start + block.shape[2]
            past = end if causal else tokens
            block = block.reshape(rows, kv_heads, -1, width)
            scores = torch.matmul(block, key[:, :, :past].transpose(2, 3))
            scores_by_head = scores.view(rows, heads, -1, past)
            with torch.no_grad():  # what is added is constant
                if mask is not None:
                    scores_by_head += _additive(mask[:, :, start:end, :past], dtype)
                elif causal:
                    scores_by_head[..., start:] += _hide_future(end - start, dtype, query.device)
            weights = scores.softmax(-1)
            mixed = torch.matmul(weights, value[:, :, :past])
            mixed_blocks.append(mixed.view(rows, heads, -1, width))
            if keep_weights:
                weight_blocks.append(weights.view(rows, heads, -1, past))
    mixed = torch.cat(mixed_blocks, 2).transpose(1, 2).contiguous()
    return mixed, weight_blocks if keep_weights else None


def _hide_future(tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(tokens, tokens), added to scores: 0 at a token and those before it, else very low."""
    # -inf would make a row of padding NaN
    lowest = torch.finfo(dtype).min / 2
    return torch.full((tokens, tokens), lowest, dtype=dtype, device=device).triu_(1)


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a mask, bool or numbers, adds to scores."""
    lowest = torch.finfo(dtype).min / 2
    if mask.dtype == torch.bool:
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill_(~mask, lowest)
    return mask.clamp(min=lowest).to(dtype)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
