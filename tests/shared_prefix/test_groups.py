"""Attention of two rows against one with a mask of all tokens, in float32 and through windows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mig_kit.shared_prefix import groups
from mig_kit.shared_prefix.groups import PromptRow, ReplyRow, attend_by_row

GROUPS = [(9, (4, 7, 2)), (5, (6,)), (12, (8, 8)), (3, (1,))]  # tokens of prompt and completions
PROMPTS, LENGTHS = zip(*GROUPS)


def sees(window):
    """(tokens, tokens) bool, of all prompts and then of all completions, token by token."""
    parts, places = [], []
    for number, prompt in enumerate(PROMPTS):
        parts += [(number, 0)] * prompt
        places += range(prompt)
    for number, (prompt, lengths) in enumerate(GROUPS):
        for completion, length in enumerate(lengths, 1):
            parts += [(number, completion)] * length
            places += range(prompt, prompt + length)
    return torch.tensor([[
        own[0] == other[0] and other[1] in (0, own[1]) and 0 <= place - past < (window or 99)
        for other, past in zip(parts, places)] for own, place in zip(parts, places)])


def attend_in_rows(inputs, prompts, lengths, scale=None, window=None, ends=None):
    """Both rows as one, (1, tokens, heads, width)."""
    def attend(row, parts):
        return attend_by_row(None, *parts, None, row.attend, scale, sliding_window=window)[0]

    first, second = zip(*(tensor.split([sum(prompts), sum(map(sum, lengths))], 2)
                          for tensor in inputs))
    of_prompts = PromptRow(prompts, ends)
    mixed = attend(of_prompts, first)
    return torch.cat([mixed, attend(ReplyRow(of_prompts.keys_values, lengths), second)], 1)


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("block", [2, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("only_ends", [False, True])
def test_outputs_and_gradients_are_those_of_a_mask_of_all_tokens(monkeypatch, window, block, dtype,
                                                                 only_ends):
    monkeypatch.setattr(groups, "BLOCK", block)
    torch.manual_seed(0)
    count = sum(PROMPTS) + sum(map(sum, LENGTHS))
    inputs = [torch.randn(1, heads, count, 8, dtype=dtype, requires_grad=True)
              for heads in (4, 2, 2)]
    ends = torch.tensor(PROMPTS).cumsum(0) - 1 if only_ends else None
    own = attend_in_rows(inputs, PROMPTS, LENGTHS, 0.4, window, ends)
    expected = scaled_dot_product_attention(*inputs, attn_mask=sees(window), scale=0.4,
                                            enable_gqa=True).transpose(1, 2)
    if only_ends:
        places = torch.cat([ends, torch.arange(sum(PROMPTS), count)])
        assert own.shape == expected.shape
        own, expected = own[:, places], expected[:, places]
    assert own.shape == expected.shape and torch.allclose(own, expected, atol=1e-6)
    weights = torch.randn_like(own)
    for gradient, right in zip(*(torch.autograd.grad((mixed * weights).sum(), inputs)
                                 for mixed in (own, expected))):
        assert torch.allclose(gradient, right, atol=1e-5)


class LargestSquare(TorchDispatchMode):
    """The most elements of a tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2700 * 16),
                                             (torch.float64, 512 * 900)])
def test_no_tensor_is_as_large_as_the_square_of_a_group(dtype, most):
    """In float32 on a CPU, none is larger than the row itself."""
    inputs = [torch.randn(1, heads, 2700, 8, dtype=dtype, requires_grad=True)
              for heads in (2, 1, 1)]
    with LargestSquare() as seen:
        attend_in_rows(inputs, [300], [(600,) * 4]).sum().backward()
    assert seen.elements <= most < 2700**2 / 10
