"""A prompt and its completions as one row, which attends in two parts: the prompt to itself, and
each completion to the prompt's keys and its own past. No mask is larger than a completion's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

from mig_kit.shared_prefix.attention import attend_causally, product_dtype

NAME = "mig_kit_groups"
BLOCK = 512  # tokens whose mask is made at a time, so that half of the future is never computed
# on a CPU, in bfloat16, the fused kernel's backward pass takes several times as long as plain
# products, whose scores are small up to so many tokens of a prompt and of a completion
LONG_PROMPT, LONG_REPLY = 2048, 128


class Group(NamedTuple):
    """Tokens of a prompt, and of its completions behind it, each of which sees it and itself."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of the prompt and all completions."""
        return self.prompt + sum(self.completions)


def places(groups: Sequence[Group]) -> Iterator[tuple[int, Group]]:
    """Each group and the index of its first token."""
    first = 0
    for group in groups:
        yield first, group
        first += group.tokens


def scored_places(groups: Sequence[Group]) -> torch.Tensor:
    """Indices of each prompt's last token and of its completions' tokens."""
    return torch.cat([torch.arange(first + group.prompt - 1, first + group.tokens)
                      for first, group in places(groups)])


def attend_groups(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                  value: torch.Tensor, attention_mask: None, groups: Sequence[Group],
                  scaling: float | None = None, dropout: float = 0.0,
                  sliding_window: int | None = None, **kwargs) -> tuple[torch.Tensor, None]:
    """Attention within groups, as transformers calls it; all are in one row.

    query, key, value (1, heads, tokens, width) -> (mixed values (1, tokens, heads, width), None).
    """
    options = {"scale": scaling, "dropout_p": dropout}
    # a single completion simply goes on where its prompt ends
    counts = [(group.prompt, *group.completions) if len(group.completions) > 1 else (group.tokens,)
              for group in groups]
    # split, because every slice's gradient would be as large as the whole
    parts = [iter(tensor[0].transpose(0, 1).split(sum(counts, ())))
             for tensor in (query, key, value)]
    mixed = []
    for _, *lengths in counts:
        own = [next(part).transpose(0, 1)[None] for part in parts]
        mixed.append(_attend_causally(*own, sliding_window, options)[0])
        if not lengths:
            continue
        rows = [pad_sequence([next(part) for _ in lengths], True).transpose(1, 2)
                for part in parts]
        keys, values = (torch.cat([shared.expand(len(lengths), -1, -1, -1), tensor], 2)
                        for shared, tensor in zip(own[1:], rows[1:]))
        replies = _attend_causally(rows[0], keys, values, sliding_window, options)
        mixed += [reply[:, :length] for reply, length in zip(replies, lengths)]
    return torch.cat(mixed, 1).transpose(0, 1)[None], None


def _attend_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     window: int | None, options: dict) -> torch.Tensor:
    """The last tokens of rows attend to `window` tokens up to their own, or to all.

    query (rows, heads, tokens, width); key, value (rows, kv_heads, past, width) -> like query.
    """
    tokens, past = query.shape[2], key.shape[2]
    if window is not None and window >= past:
        window = None
    if (query.device.type == "cpu" and product_dtype(query) == torch.bfloat16 and window is None
            and tokens <= (LONG_PROMPT if tokens == past else LONG_REPLY)
            and not options["dropout_p"]):
        scale = options["scale"] or query.shape[3] ** -0.5
        return attend_causally(query, key, value, scale)[0].transpose(1, 2)
    fuses_heads = not query.is_cuda or query.dtype != torch.float32 and window is None
    if not fuses_heads:  # no kernel of a GPU takes both a mask and heads that share keys
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
                      for tensor in (key, value))
    options = options | {"enable_gqa": fuses_heads}
    if window is None and (tokens == past or query.is_cuda and fuses_heads):
        causal = ({"is_causal": True} if tokens == past
                  else {"attn_mask": causal_lower_right(tokens, past)})
        return scaled_dot_product_attention(query, key, value, **causal, **options)
    mixed = []
    for start in range(0, tokens, BLOCK):
        end = min(start + BLOCK, tokens)
        place, last = past - tokens + start, past - tokens + end
        first = 0 if window is None else max(0, place - window + 1)
        sees = query.new_ones(end - start, last - first, dtype=torch.bool).tril(place - first)
        if window is not None:
            sees = sees.triu(place - first - window + 1)
        mixed.append(scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, first:last], value[:, :, first:last],
            attn_mask=sees, **options))
    return torch.cat(mixed, 2)


@contextmanager
def attending_in_groups(config) -> Iterator[None]:
    """Have a language model's layers use `attend_groups` while it lasts."""
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


AttentionInterface.register(NAME, attend_groups)
