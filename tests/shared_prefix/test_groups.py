"""Attention in two parts against one with a mask of all tokens, in float32 and through windows."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from mig_kit.shared_prefix import groups
from mig_kit.shared_prefix.groups import Group, attend_groups

GROUPS = [Group(9, (4, 7, 2)), Group(5, (6,)), Group(12, (8, 8)), Group(3, ())]


def sees(window):
    """(tokens, tokens) bool, written out token by token."""
    parts, places = [], []
    for number, group in enumerate(GROUPS):
        parts += [(number, 0)] * group.prompt
        places += range(group.prompt)
        for completion, length in enumerate(group.completions, 1):
            parts += [(number, completion)] * length
            places += range(group.prompt, group.prompt + length)
    return torch.tensor([[
        own[0] == other[0] and other[1] in (0, own[1]) and 0 <= place - past < (window or 99)
        for other, past in zip(parts, places)] for own, place in zip(parts, places)])


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("block", [2, 512])
def test_outputs_and_gradients_are_those_of_a_mask_of_all_tokens(monkeypatch, window, block):
    monkeypatch.setattr(groups, "BLOCK", block)
    torch.manual_seed(0)
    count = sum(group.tokens for group in GROUPS)
    inputs = [torch.randn(1, heads, count, 8, requires_grad=True) for heads in (4, 2, 2)]
    own = attend_groups(None, *inputs, None, GROUPS, 0.4, sliding_window=window)[0]
    expected = scaled_dot_product_attention(*inputs, attn_mask=sees(window), scale=0.4,
                                            enable_gqa=True).transpose(1, 2)
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


def test_no_tensor_is_as_large_as_the_square_of_a_group():
    group = Group(300, (600,) * 4)
    inputs = [torch.randn(1, heads, group.tokens, 8, requires_grad=True) for heads in (2, 1, 1)]
    with LargestSquare() as seen:
        attend_groups(None, *inputs, None, [group])[0].sum().backward()
    assert seen.elements <= groups.BLOCK * 900 < group.tokens**2 / 10
