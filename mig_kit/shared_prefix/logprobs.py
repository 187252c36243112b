"""Log-probabilities of completions whose prompts are read once, with gradients.

In a GRPO update one pass over a prompt serves all its completions. On a CPU `flat_layers` computes
what LoRA and 4-bit layers would; elsewhere these are the model's own modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from mig_kit.shared_prefix.flat_layers import Group, can_read_flat, read_flat
from mig_kit.shared_prefix.prefixes import (
    additive_mask,
    embed_with_images,
    has_linear_attention,
    make_cache,
    pad_prompts,
    pad_rows,
)
from mig_kit.shared_prefix.prompt_cache import Prompt, unwrap_peft

HEAD_TOKENS = 1024  # tokens whose logits are in memory at a time if layers are checkpointed


def completion_logps(model, prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                     mask: torch.Tensor,
                     temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every completion token, (rows, tokens) each; 0 for padding.

    Arguments as of `completion_states`. With checkpointed layers the head is, too.
    """
    model = unwrap_peft(model)
    states = completion_states(model, prompts, prompt_index, ids, mask)
    targets = ids[mask.bool()]
    size = HEAD_TOKENS if model.is_activation_checkpointing else len(states)
    *pieces, last = zip(states.split(size), targets.split(size))
    values = [checkpoint(_token_logps, model, *piece, temperature, use_reentrant=False)
              for piece in pieces]
    values.append(_token_logps(model, *last, temperature))  # its backward pass comes first
    logps, entropies = (_unpack_rows(torch.cat(parts), mask) for parts in zip(*values))
    return logps, entropies


def completion_states(model, prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                      mask: torch.Tensor) -> torch.Tensor:
    """The states from which the completions' tokens are predicted, (tokens under the mask, hidden).

    prompt_index: (rows,) the prompt of each row; ids, mask: (rows, tokens), padded on the right.
    Each prompt, which has a row at least, is read with all its completions behind it, without a
    cache, so that layers can be checkpointed. On a CPU `read_flat` does that.
    """
    model = unwrap_peft(model)
    if has_linear_attention(model):  # a state would run on through the neighbour's tokens
        return _layered_states(model, prompts, prompt_index, ids, mask)
    language = model.model.language_model
    packed = _pack_completions(prompts, prompt_index, ids, mask)
    is_flat = can_read_flat(model)
    if is_flat:
        packed = packed.flatten()
    embeds = language.embed_tokens(packed.ids)
    is_image = (packed.ids == model.config.image_token_id) & (packed.part == 0)
    inputs = embed_with_images(embeds, is_image, prompts)
    if is_flat:
        return read_flat(language, inputs["inputs_embeds"][0], packed.positions[:, 0],
                         packed.groups, inputs.get("deepstack_visual_embeds", ()), is_image[0]
                         )[packed.state_columns]
    # with one completion to each prompt, the past is all that a token may see
    is_causal = all(len(group.completions) == 1 for group in packed.groups)
    is_allowed = None if is_causal else additive_mask(packed.is_allowed(), embeds.dtype)
    output = language(**inputs, attention_mask=is_allowed, position_ids=packed.positions,
                      use_cache=False)
    return output.last_hidden_state[packed.state_rows, packed.state_columns]


def _layered_states(model, prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                    mask: torch.Tensor) -> torch.Tensor:
    """`completion_states` of a model with linear attention."""
    # Each layer reads the prompts and then the completions, and its cache lives no longer than
    # that, so that layers can be checkpointed.
    language = model.model.language_model
    batch = pad_prompts(model, prompts)
    steps = torch.arange(ids.shape[1], device=ids.device)
    positions = batch.next_position[prompt_index][:, None] + steps
    states = batch.inputs["inputs_embeds"], language.embed_tokens(ids)
    angles = [language.rotary_emb(part, part_positions) for part, part_positions in zip(
        states, (batch.positions, positions.expand(3, -1, -1)))]
    is_prompt = batch.mask.bool()
    order = torch.arange(is_prompt.shape[1], device=ids.device)
    # a token of padding sees itself, or its row would be NaN
    is_allowed = (order[:, None] >= order) & is_prompt[:, None] | (order[:, None] == order)
    sees_prompt = is_prompt[prompt_index][:, None].expand(-1, len(steps), -1)
    sees_past = (steps[:, None] >= steps).expand(len(ids), -1, -1)
    attention_masks = [additive_mask(allowed, states[0].dtype)
                       for allowed in (is_allowed, torch.cat([sees_prompt, sees_past], 2))]
    for layer in language.layers:
        is_linear = "linear_attn" in dict(layer.named_children())
        masks = (batch.mask, mask) if is_linear else attention_masks
        read = partial(_read_layer, language, layer, prompt_index, angles, masks)
        states = (checkpoint(read, *states, use_reentrant=False)
                  if model.is_activation_checkpointing else read(*states))
    prompt_states, own_states = language.norm(states[0][:, -1]), language.norm(states[1])
    before = torch.cat([prompt_states[prompt_index][:, None], own_states[:, :-1]], 1)
    return before[mask.bool()]


def _read_layer(language, layer, prompt_index: torch.Tensor, angles: list, masks: Sequence,
                prompts: torch.Tensor, completions: torch.Tensor) -> tuple:
    """States of prompts and completions, (rows, tokens, hidden) each, behind a layer."""
    cache = make_cache(language)
    # transformers' own checkpoints would take the cache away
    is_checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        prompts = layer(prompts, position_embeddings=angles[0], attention_mask=masks[0],
                        past_key_values=cache)
        cache.batch_select_indices(prompt_index)
        return prompts, layer(completions, position_embeddings=angles[1],
                              attention_mask=masks[1], past_key_values=cache)
    finally:
        layer.gradient_checkpointing = is_checkpointed


@dataclass(frozen=True)
class _PackedRows:
    """Each prompt followed by its completions, padded on the right."""

    ids: torch.Tensor  # (prompts, tokens)
    part: torch.Tensor  # (prompts, tokens): 0 prompt; 1, 2, ... its completions; -1 padding
    positions: torch.Tensor  # (3, prompts, tokens)
    state_rows: torch.Tensor  # (completion tokens,): where the state before each token is,
    state_columns: torch.Tensor  # completion by completion
    groups: list[Group]  # of the prompts

    def is_allowed(self) -> torch.Tensor:
        """(prompts, tokens, past): does a token attend to another? Padding sees only itself."""
        order = torch.arange(self.ids.shape[1], device=self.ids.device)
        is_past = order[:, None] >= order
        query_part, key_part = self.part[:, :, None], self.part[:, None, :]
        is_prompt_or_own = (key_part == 0) | (key_part == query_part)
        is_itself = order[:, None] == order
        return is_past & (key_part >= 0) & is_prompt_or_own | is_itself

    def flatten(self) -> "_PackedRows":
        """All tokens but padding as one row; state_columns then count those of `read_flat`."""
        is_token = self.part >= 0
        asked_for = torch.tensor([1 + sum(group.completions) for group in self.groups])
        prompts = torch.tensor([group.prompt for group in self.groups])
        first = asked_for.cumsum(0) - asked_for - prompts + 1
        return _PackedRows(self.ids[is_token][None], self.part[is_token][None],
                           self.positions[:, is_token][:, None], torch.zeros_like(self.state_rows),
                           self.state_columns + first[self.state_rows], self.groups)


def _pack_completions(prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                      mask: torch.Tensor) -> _PackedRows:
    """Arguments as of `completion_states`; the result is on the device of `ids`."""
    device = ids.device
    prompt_index, ids, is_token = prompt_index.cpu(), ids.cpu(), mask.bool().cpu()
    packed_ids, packed_part, packed_positions, groups = [], [], [], []
    columns = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        members = (prompt_index == row).nonzero()[:, 0]
        own = is_token[members]
        number, step = own.nonzero(as_tuple=True)  # of each token: its completion, its place in it
        packed_ids.append(torch.cat([prompt.ids, ids[members][own]]))
        packed_part.append(torch.cat([torch.zeros_like(prompt.ids), number + 1]))
        positions = (prompt.next_position + step).expand(3, -1)
        packed_positions.append(torch.cat([prompt.positions, positions], 1))
        # the first token is predicted at the prompt's end, whose state all completions share
        before = len(prompt.ids) - 1 + torch.arange(len(step)) * (step > 0)
        columns[members[number], step] = before
        groups.append(Group(len(prompt.ids), tuple(own.sum(1).tolist())))
    longest = max(map(len, packed_ids))
    state_rows = prompt_index.repeat_interleave(is_token.sum(1))
    return _PackedRows(
        pad_rows(packed_ids, longest).to(device), pad_rows(packed_part, longest, -1).to(device),
        pad_rows(packed_positions, longest).transpose(0, 1).to(device), state_rows.to(device),
        columns[is_token].to(device), groups)


def _token_logps(model, states: torch.Tensor, targets: torch.Tensor,
                 temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (tokens,) of targets, and entropies, from the states (tokens, hidden)."""
    logps = log_softmax(model.lm_head(states).float() / temperature, -1)
    with torch.no_grad():
        entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropies


def _unpack_rows(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Values of the tokens under a mask (rows, tokens) as (rows, tokens), 0 elsewhere."""
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask.bool(), values)
