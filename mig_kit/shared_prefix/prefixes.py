"""Prompts as batches, and what they share: questions about the same images begin with the same
tokens, which are read once; one pass then reads what follows in all of them.

With linear attention (Gated DeltaNet, as in Qwen3.5) every token changes the state, so prompts are
padded on the left, where masked tokens leave it at zero, and each completion starts from a copy.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mig_kit.shared_prefix.prompt_cache import Prompt, unwrap_peft

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


def additive_mask(is_allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, tokens, past) bool -> (rows, 1, tokens, past), what is added to attention scores."""
    zeros = torch.zeros(is_allowed.shape, dtype=dtype, device=is_allowed.device)
    return zeros.masked_fill_(~is_allowed, torch.finfo(dtype).min)[:, None]


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


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as one batch, padded on the right, which attention reads without a mask at half the
    cost; on the left for a model with linear attention.
    """

    inputs: dict  # of `embed_with_images`
    mask: torch.Tensor  # (prompts, tokens), 0 for padding
    positions: torch.Tensor  # (3, prompts, tokens)
    next_position: torch.Tensor  # (prompts,), of the token that follows

    def prefill(self, model) -> tuple[torch.Tensor, Cache]:
        """States at the last tokens (prompts, hidden), and the cache."""
        language = model.model.language_model
        arguments = self.inputs | {"position_ids": self.positions, "use_cache": True}
        if has_linear_attention(model):
            output = language(**arguments, attention_mask=self.mask,
                              past_key_values=make_cache(language))
            return output.last_hidden_state[:, -1], output.past_key_values
        output = language(**arguments)
        row = torch.arange(len(self.mask), device=self.mask.device)
        return output.last_hidden_state[row, self.mask.sum(1) - 1], output.past_key_values


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


def group_by_prefix(prompts: list[Prompt]) -> list[list[int]]:
    """Indices of the prompts that begin with the same images, in order.

    Every prompt is a group of its own where one has no images, or where padding each prefix to the
    largest group would more than double the batch.
    """
    alone = [[index] for index in range(len(prompts))]
    if not all(prompt.prefix_length for prompt in prompts):
        return alone
    by_prefix: dict[tuple, list[int]] = {}
    for index, prompt in enumerate(prompts):
        prefix_ids = prompt.ids[:prompt.prefix_length].numpy().tobytes()
        by_prefix.setdefault((prompt.image_digests, prefix_ids), []).append(index)
    groups = list(by_prefix.values())
    padded_rows = max(map(len, groups)) * len(groups)
    return alone if padded_rows > 2 * len(prompts) else groups


@dataclass(frozen=True)
class Suffixes:
    """What prompts have behind their shared prefixes; each is in a slot of its prefix's row."""

    prompt_index: torch.Tensor  # (prefixes, slots), -1 in an empty slot
    start: torch.Tensor  # (prefixes, slots) of the suffix's tokens in the row
    length: torch.Tensor  # (prefixes, slots)
    next_position: torch.Tensor  # (prefixes, slots) of the token that follows
    hidden: torch.Tensor  # (prompts, hidden) states at the prompts' last tokens


def prefill_suffixes(model, prompts: list[Prompt], groups: list[list[int]], prefixes: PaddedPrompts,
                  cache: Cache) -> Suffixes:
    """Read what follows the prefixes, and add its keys and values to their cache."""
    device = prefixes.mask.device
    rows = [[prompts[index] for index in group] for group in groups]
    slots = max(map(len, groups))
    lengths = [[len(prompt.ids) - prompt.prefix_length for prompt in row] for row in rows]
    longest = pad_to_multiple(max(map(sum, lengths)))

    ids = pad_rows([torch.cat([prompt.ids[prompt.prefix_length:] for prompt in row])
                    for row in rows], longest)
    positions = pad_rows([torch.cat([prompt.positions[:, prompt.prefix_length:] for prompt in row],
                                    1) for row in rows], longest).transpose(0, 1)
    slot_of_token = pad_rows([torch.arange(len(row)).repeat_interleave(torch.tensor(row))
                              for row in lengths], longest, -1)

    prompt_index = pad_rows([torch.tensor(group) for group in groups], slots, -1)
    length = pad_rows([torch.tensor(row) for row in lengths], slots)
    is_filled = prompt_index >= 0
    start = (length.cumsum(1) - length) * is_filled
    next_position = pad_rows([torch.tensor([prompt.next_position for prompt in row])
                              for row in rows], slots)

    # All suffixes of a prefix are one row, so that its keys need not be repeated for each; the mask
    # keeps a suffix from seeing its neighbours, and positions go on from the prefix for each.
    column = torch.arange(longest)
    is_same_suffix = slot_of_token[:, :, None] == slot_of_token[:, None, :]
    sees_suffix = is_same_suffix & (column[:, None] >= column)
    sees_prefix = prefixes.mask.bool()[:, None].expand(-1, longest, -1)
    is_allowed = torch.cat([sees_prefix, sees_suffix.to(device)], 2)
    language = model.model.language_model
    embeds = language.embed_tokens(ids.to(device))
    output = language(
        inputs_embeds=embeds, attention_mask=additive_mask(is_allowed, embeds.dtype),
        position_ids=positions.to(device), past_key_values=cache, use_cache=True)

    row, slot = is_filled.nonzero(as_tuple=True)
    last_column = (start + length - 1)[row, slot]
    in_prompt_order = prompt_index[row, slot].argsort()
    hidden = output.last_hidden_state[row, last_column][in_prompt_order]
    return Suffixes(prompt_index, start.to(device), length.to(device), next_position.to(device),
                    hidden)
