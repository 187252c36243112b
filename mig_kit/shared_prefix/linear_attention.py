"""Models with linear attention: Gated DeltaNet layers beside attention, as in Qwen3.5.

Every token changes the one state of such a layer, so nothing may stand between a prompt and its
completion: prompts are padded on the left, where masked tokens leave the state at zero, and each
completion starts with a copy of its prompt's state.
"""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mig_kit.shared_prefix.prompt_cache import unwrap_peft


def list_linear_attention(model) -> list[torch.nn.Module]:
    """The modules of the language model that keep a state in place of keys and values."""
    layers = unwrap_peft(model).model.language_model.layers
    return [module for layer in layers for name, module in layer.named_children()
            if name == "linear_attn"]


def has_linear_attention(model) -> bool:
    """Does a layer of the language model keep a state in place of keys and values?"""
    return bool(list_linear_attention(model))


class _AssignedStates(LinearAttentionLayer):
    """A layer's states; new ones replace old ones, which transformers overwrites in memory."""

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0,
                          conv_kernel_size: int | None = None, **kwargs) -> torch.Tensor:
        """conv_states: (rows, channels, tokens), new inputs of the convolution; returned with those
        that it needs of the tokens before.
        """
        if self.has_previous_state[state_idx]:
            inputs = torch.cat([self.conv_states[state_idx], conv_states], -1)
        else:
            missing = max(0, conv_kernel_size - conv_states.shape[-1])
            inputs = pad(conv_states, (missing, 0))
            self.conv_kernel_size[state_idx] = conv_kernel_size
            self.has_previous_state[state_idx] = self.is_conv_states_initialized[state_idx] = True
            self.device = conv_states.device
        self.conv_states[state_idx] = inputs[..., -self.conv_kernel_size[state_idx]:]
        return inputs

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0,
                               **kwargs) -> torch.Tensor:
        """recurrent_states: (rows, heads, key width, value width), the state from now on."""
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, or repeat them."""
        self.reorder_cache(indices)


def make_cache(language: torch.nn.Module) -> DynamicCache:
    """An empty cache for a language model, through which gradients flow."""
    cache = DynamicCache(config=language.config)
    cache.layers = [_AssignedStates() if type(layer) is LinearAttentionLayer else layer
                    for layer in cache.layers]
    return cache


def state_bytes(model) -> int:
    """Bytes of a completion's states, in all layers; float32, whatever the model is."""
    return 4 * sum(module.num_v_heads * module.head_k_dim * module.head_v_dim
                   for module in list_linear_attention(model))
