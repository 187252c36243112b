"""Prompts as batches.

With linear attention (Gated DeltaNet, as in Qwen3.5) every token changes the state, so prompts are
padded on the left, where masked tokens leave it at zero, and each completion starts from a copy.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mig_kit.shared_prefix.prompt_cache import Prompt, ReadPrompt, unwrap_peft

# Rows are padded to multiples of so many tokens: where every batch has sizes of its own, the heap
# grows and slows down.
PAD_MULTIPLE = 32


def pad_to_multiple(tokens: int) -> int:
    """The next multiple of PAD_MULTIPLE."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def pad_rows(rows: list[torch.Tensor], length: int, fill: int = 0,
             on_left: bool = False) -> torch.Tensor:
    """Tensors (..., tokens) as one (rows, ..., length), padded on the right, or on the left."""
    missing = [length - row.shape[-1] for row in rows]
    return torch.stack([pad(row, (count, 0) if on_left else (0, count), value=fill)
                        for row, count in zip(rows, missing)])


def embed_with_images(embeds: torch.Tensor, is_image: torch.Tensor, prompts: list[Prompt]) -> dict:
    """Inputs of the language model: embeddings (prompts, tokens, hidden) with the images'
    features where is_image (prompts, tokens) is true.
    """
    features = [prompt.features for prompt in prompts if prompt.features is not None]
    if not features:
        return {"inputs_embeds": embeds}
    hidden = embeds.shape[-1]
    first, *deepstack = torch.cat(features).to(embeds.dtype).split(hidden, 1)
    inputs = {"inputs_embeds": embeds.masked_scatter(is_image[..., None], first)}
    if deepstack:
        inputs |= {"visual_pos_masks": is_image, "deepstack_visual_embeds": deepstack}
    return inputs


def list_linear_attention(model) -> list[torch.nn.Module]:
    """The modules of the language model that keep a state in place of keys and values."""
    layers = unwrap_peft(model).model.language_model.layers
    return [layer.linear_attn for layer in layers if is_linear(layer)]


def is_linear(layer: torch.nn.Module) -> bool:
    """Does a layer keep a state in place of keys and values?"""
    return "linear_attn" in dict(layer.named_children())


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


def make_kv_cache(language: torch.nn.Module) -> DynamicCache:
    """An empty cache for a language model, through which gradients flow."""
    cache = DynamicCache(config=language.config)
    cache.layers = [_AssignedStates() if type(layer) is LinearAttentionLayer else layer
                    for layer in cache.layers]
    return cache


def state_bytes(model) -> int:
    """Bytes of a completion's states, in all layers; float32, whatever the model is."""
    return 4 * sum(module.num_v_heads * module.head_k_dim * module.head_v_dim
                   for module in list_linear_attention(model))


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as one batch, padded on the right; on the left for a model with linear attention.
    """

    inputs: dict  # of `embed_with_images`
    mask: torch.Tensor  # (prompts, tokens), 0 for padding
    positions: torch.Tensor  # (3, prompts, tokens)
    next_position: torch.Tensor  # (prompts,), of the token that follows

    def prefill(self, model) -> tuple[torch.Tensor, Cache]:
        """States at the last tokens (prompts, hidden), and the cache, with linear attention."""
        language = model.model.language_model
        output = language(**self.inputs, position_ids=self.positions, attention_mask=self.mask,
                          past_key_values=make_kv_cache(language), use_cache=True)
        return output.last_hidden_state[:, -1], output.past_key_values

    def pad_keys(self, read: list[ReadPrompt]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each layer the prompts' keys and values, (prompts, kv_heads, tokens, width)."""
        length, dtype = self.mask.shape[1], self.inputs["inputs_embeds"].dtype
        return [tuple(torch.cat([pad(tensor.detach().to(dtype),
                                     (0, 0, 0, length - tensor.shape[2])) for tensor in tensors])
                      for tensors in zip(*of_prompts))
                for of_prompts in zip(*(prompt.layers for prompt in read))]


def pad_prompts(model, prompts: list[Prompt]) -> PaddedPrompts:
    """Prompts as a batch; several are padded to a multiple of PAD_MULTIPLE tokens."""
    device = model.device
    longest = max(len(prompt.ids) for prompt in prompts)
    if len(prompts) > 1:
        longest = pad_to_multiple(longest)
    on_left = has_linear_attention(model)
    ids = pad_rows([prompt.ids for prompt in prompts], longest, on_left=on_left)
    mask = pad_rows([torch.ones_like(prompt.ids) for prompt in prompts], longest, on_left=on_left)
    positions = pad_rows([prompt.positions for prompt in prompts], longest, on_left=on_left)
    positions = positions.transpose(0, 1)
    next_position = torch.tensor([prompt.next_position for prompt in prompts])
    embeds = model.model.language_model.embed_tokens(ids.to(device))
    is_image = ((ids == model.config.image_token_id) & mask.bool()).to(device)
    return PaddedPrompts(embed_with_images(embeds, is_image, prompts), mask.to(device),
                         positions.to(device), next_position.to(device))
