"""Attention of prompts and of their completions. All prompts are one row, in which each attends to
itself; all completions are another, in which each attends to its prompt's keys and its own past.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface

NAME = "mig_kit_groups"
BLOCK = 512  # tokens whose mask is made at a time, so that half of the future is never computed
# configuration by id -> (its own attention, passes under way); two threads may draw with one model
_USERS: dict[int, tuple[str, int]] = {}
_LOCK = Lock()
KeysValues = tuple[torch.Tensor, torch.Tensor]  # (1, kv_heads, tokens, width) each


def attend_by_row(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor,
                  value: torch.Tensor, attention_mask: None,
                  attend: Callable[..., torch.Tensor], scaling: float | None = None,
                  dropout: float = 0.0, sliding_window: int | None = None,
                  **kwargs) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; `attend` is the method of a PromptRow or a ReplyRow.

    query, key, value (1, heads, tokens, width) -> (mixed values (1, tokens, heads, width), None).
    """
    options = {"scale": scaling or query.shape[3] ** -0.5, "dropout_p": dropout}
    return attend(query, key, value, sliding_window, options).transpose(1, 2), None


class PromptRow:
    """Prompts in one row, each of which attends to itself.

    lengths: tokens of each. ends: None, or the places of their last tokens, (prompts,), if only
    these have a query. keys_values: of each prompt, once `attend` was called.
    """

    def __init__(self, lengths: Sequence[int], ends: torch.Tensor | None = None):
        self.lengths, self.ends = list(lengths), ends
        self.keys_values: list[KeysValues] = []

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               window: int | None, options: dict) -> torch.Tensor:
        """Mixed values, like `query`; zeros for tokens without a query."""
        # split, because every slice's gradient would be as large as the whole
        self.keys_values = list(zip(key.split(self.lengths, 2), value.split(self.lengths, 2)))
        queries = (query.split(self.lengths, 2) if self.ends is None else
                   query.index_select(2, self.ends).split(1, 2))
        mixed = torch.cat([_attend_causally(own, *pair, window, options)
                           for own, pair in zip(queries, self.keys_values)], 2)
        return mixed if self.ends is None else torch.zeros_like(query).index_copy(
            2, self.ends, mixed.to(query.dtype))


class ReplyRow:
    """Completions in one row, those of a prompt together.

    prompts: their keys and values. lengths: of each prompt, tokens of its completions.
    """

    def __init__(self, prompts: Sequence[KeysValues], lengths: Sequence[Sequence[int]]):
        self.prompts, self.lengths = prompts, lengths

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
               window: int | None, options: dict) -> torch.Tensor:
        """Mixed values, like `query`."""
        counts = [sum(lengths) for lengths in self.lengths]
        parts = zip(*(tensor.split(counts, 2) for tensor in (query, key, value)))
        return torch.cat([_attend_replies(*part, prompt, lengths, window, options)
                          for part, prompt, lengths in zip(parts, self.prompts, self.lengths)
                          if lengths], 2)


def _attend_replies(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                    prompt: KeysValues, lengths: Sequence[int], window: int | None,
                    options: dict) -> torch.Tensor:
    """A prompt's completions, in one row, attend to it and to their own past."""
    longest = prompt[0].shape[2] + max(lengths)
    if (query.device.type == "cpu" and product_dtype(query) == torch.float32
            and not options["dropout_p"] and (window is None or window >= longest)):
        return MergedAttention.apply(query, *prompt, key, value, list(lengths), options["scale"])
    rows = [pad_sequence(tensor[0].transpose(0, 1).split(lengths), True).transpose(1, 2)
            for tensor in (query, key, value)]
    keys, values = (torch.cat([shared.expand(len(lengths), -1, -1, -1), tensor], 2)
                    for shared, tensor in zip(prompt, rows[1:]))
    replies = _attend_causally(rows[0], keys, values, window, options)
    return torch.cat([reply[:, :length] for reply, length in zip(replies, lengths)], 1)[None]


_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class MergedAttention(torch.autograd.Function):
    """Completions attend to their prompt, all at once and without a mask, and each to its own past;
    the log-sums of exponentials of both parts say how much of each is in the result.
    """

    @staticmethod
    def forward(ctx, query, prompt_keys, prompt_values, keys, values, lengths, scale):
        """query (1, heads, tokens, width); lengths: of the completions -> mixed, like query."""
        kv_heads, heads_per_key = keys.shape[1], query.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(heads_per_key, 1) for tensor in (keys, values))
        # heads that share a key are one head with more tokens
        mixed, log_sums = _attend(query.reshape(1, kv_heads, -1, query.shape[3]), prompt_keys,
                                  prompt_values, scale=scale)
        mixed, log_sums = mixed.reshape(query.shape), log_sums.reshape(query.shape[:3])
        parts = zip(*(tensor.split(lengths, 2) for tensor in (query, keys, values)))
        own_mixed, own_log_sums = (torch.cat(results, 2) for results in zip(*(
            _attend(*part, is_causal=True, scale=scale) for part in parts)))
        total = torch.logaddexp(log_sums, own_log_sums)
        mixed = (mixed * (log_sums - total).exp()[..., None]
                 + own_mixed * (own_log_sums - total).exp()[..., None])
        ctx.save_for_backward(query, prompt_keys, prompt_values, keys, values, mixed, total)
        ctx.lengths, ctx.scale = lengths, scale
        return mixed

    @staticmethod
    def backward(ctx, gradient):
        """With the merged result and log-sum, each part's backward pass is the fused kernel's."""
        query, prompt_keys, prompt_values, keys, values, mixed, total = ctx.saved_tensors
        kv_heads, heads, width = prompt_keys.shape[1], query.shape[1], query.shape[3]

        def differentiate(gradient, query, keys, values, mixed, total, is_causal):
            total = total.transpose(1, 2).contiguous().transpose(1, 2)  # as the kernel lays it out
            return _attend_backward(gradient, query, keys, values, mixed, total, 0.0, is_causal,
                                    scale=ctx.scale)

        fold = [tensor.reshape(1, kv_heads, -1, width) for tensor in (gradient, query, mixed)]
        of_query, *of_prompt = differentiate(
            *fold[:2], prompt_keys, prompt_values, fold[2], total.reshape(1, kv_heads, -1), False)
        parts = zip(*(tensor.split(ctx.lengths, 2)
                      for tensor in (gradient, query, keys, values, mixed, total)))
        own = [torch.cat(gradients, 2)
               for gradients in zip(*(differentiate(*part, True) for part in parts))]
        own[1:] = (tensor.unflatten(1, (kv_heads, heads // kv_heads)).sum(2) for tensor in own[1:])
        return of_query.reshape(query.shape) + own[0], *of_prompt, *own[1:], None, None


def _attend_causally(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                     window: int | None, options: dict) -> torch.Tensor:
    """The last tokens of rows attend to `window` tokens up to their own, or to all.

    query (rows, heads, tokens, width); key, value (rows, kv_heads, past, width) -> like query.
    """
    tokens, past = query.shape[2], key.shape[2]
    if window is not None and window >= past:
        window = None
    fuses_heads = not query.is_cuda or query.dtype != torch.float32 and window is None
    if not fuses_heads:  # no kernel of a GPU takes both a mask and heads that share keys
        key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
                      for tensor in (key, value))
    options = options | {"enable_gqa": fuses_heads}
    if window is None and (tokens in (1, past) or query.is_cuda and fuses_heads):
        causal = ({"is_causal": tokens > 1} if tokens in (1, past)
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


def product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that products of this tensor are computed in."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


@contextmanager
def attending_by_row(config) -> Iterator[None]:
    """Have a language model's layers use `attend_by_row` while it lasts, in any of its threads."""
    with _LOCK:
        before, users = _USERS.get(id(config), (config._attn_implementation, 0))
        _USERS[id(config)] = before, users + 1
        config._attn_implementation = NAME
    try:
        yield
    finally:
        with _LOCK:
            before, users = _USERS.pop(id(config))
            if users > 1:
                _USERS[id(config)] = before, users - 1
            else:
                config._attn_implementation = before


AttentionInterface.register(NAME, attend_by_row)
