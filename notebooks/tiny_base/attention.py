"""Attention of the tiny base while it is supervised: plain products, block by block, whose weights
can be kept. It is registered with transformers under NAME, and is "sdpa" elsewhere.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mig_kit.shared_prefix.groups import product_dtype

NAME = "tiny_base"
BLOCK = 128  # tokens whose scores are computed at a time, so that half of the future never is


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
              value: torch.Tensor, attention_mask: torch.Tensor | None,
              scaling: float | None = None,
              **kwargs) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """Attend to the past, as transformers calls it, in blocks if the module is `in_blocks`.

    query (rows, heads, tokens, width); key, value (rows, kv_heads, tokens, width) -> mixed values
    (rows, tokens, heads, width), and the weights if the module `keep_weights`: of each block (rows,
    heads, tokens of the block, tokens before its end).
    """
    if not getattr(module, "in_blocks", False):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling,
                                      **kwargs)
    rows, heads, tokens, width = query.shape
    kv_heads, dtype = key.shape[1], product_dtype(query)
    mixed_blocks, weight_blocks = [], []
    # Autocast would write the scores again in float32; the softmax sums in float32 anyway.
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = ((query * (scaling or width**-0.5)).to(dtype), key.to(dtype),
                             value.to(dtype))
        for start, block in zip(range(0, tokens, BLOCK), query.split(BLOCK, 2)):
            end = start + block.shape[2]
            # The heads that share keys lie side by side, so that no key needs to be repeated.
            scores = torch.matmul(block.reshape(rows, kv_heads, -1, width),
                                  key[:, :, :end].transpose(2, 3))
            with torch.no_grad():  # what hides the future is constant
                future = torch.full((end - start,) * 2, torch.finfo(dtype).min / 2, dtype=dtype,
                                    device=query.device).triu_(1)
                scores.view(rows, heads, -1, end)[..., start:] += future
            weights = scores.softmax(-1)
            mixed = torch.matmul(weights, value[:, :, :end])
            mixed_blocks.append(mixed.view(rows, heads, -1, width))
            weight_blocks.append(weights.view(rows, heads, -1, end))
    mixed = torch.cat(mixed_blocks, 2).transpose(1, 2).contiguous()
    return mixed, weight_blocks if getattr(module, "keep_weights", False) else None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
