"""Log-probabilities of completions whose prompts are read once, with gradients.

In a GRPO update one pass over a prompt serves all its completions, which are one row with it and
attend to it as `groups` says; layers are the model's own modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from mig_kit.shared_prefix.groups import Group, attending_in_groups, places, scored_places
from mig_kit.shared_prefix.prefixes import embed_with_images, make_cache
from mig_kit.shared_prefix.prompt_cache import Prompt, unwrap_peft

# tokens whose logits are in memory at a time if layers are checkpointed or completions are long
HEAD_TOKENS, LONG_COMPLETION = 1024, 256


def completion_logps(model, prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                     mask: torch.Tensor,
                     temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every completion token, (rows, tokens) each; 0 for padding.

    Arguments as of `completion_states`. With checkpointed layers, or LONG_COMPLETION, the head is,
    too.
    """
    model = unwrap_peft(model)
    states = completion_states(model, prompts, prompt_index, ids, mask)
    targets = ids[mask.bool()]
    is_checkpointed = model.model.language_model.layers[0].gradient_checkpointing
    is_long = is_checkpointed or ids.shape[1] > LONG_COMPLETION
    size = HEAD_TOKENS if is_long else len(states)
    *pieces, last = zip(states.split(size), targets.split(size))
    values = [checkpoint(_token_logps, model, *piece, temperature, use_reentrant=False)
              for piece in pieces]
    values.append(_token_logps(model, *last, temperature))  # its backward pass comes first
    zeros = torch.zeros(mask.shape, device=mask.device)
    logps, entropies = (zeros.masked_scatter(mask.bool(), torch.cat(parts))
                        for parts in zip(*values))
    return logps, entropies


def completion_states(model, prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                      mask: torch.Tensor) -> torch.Tensor:
    """The states from which the completions' tokens are predicted, (tokens under the mask, hidden).

    prompt_index: (rows,) the prompt of each row; ids, mask: (rows, tokens), padded on the right.
    Each prompt, which has a row at least, is read with all its completions behind it, without a
    cache, so that layers can be checkpointed.
    """
    model = unwrap_peft(model)
    language = model.model.language_model
    packed = _pack_completions(prompts, prompt_index, ids, mask)
    embeds = language.embed_tokens(packed.ids)
    is_image = (packed.ids == model.config.image_token_id) & packed.is_prompt
    inputs = embed_with_images(embeds, is_image, prompts)
    hidden, deepstack = inputs["inputs_embeds"], inputs.get("deepstack_visual_embeds", ())
    angles = language.rotary_emb(hidden, packed.positions)
    scored, last = scored_places(packed.groups).to(ids.device), len(language.layers) - 1
    for index, layer in enumerate(language.layers):
        # of prompts the last layer's MLP reads their last tokens alone
        chosen = scored if index == last and len(deepstack) <= last else None
        read = partial(_read_layer, language, layer, packed.groups, angles, chosen)
        hidden = (checkpoint(read, hidden, use_reentrant=False)
                  if layer.training and layer.gradient_checkpointing else read(hidden))
        if index < len(deepstack):
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(
                is_image[..., None], deepstack[index].to(hidden.dtype))
    hidden = hidden[0, scored] if chosen is None else hidden[0]
    return language.norm(hidden)[packed.state_places]


def _read_layer(language, layer, groups: Sequence[Group], angles: tuple,
                chosen: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor:
    """States, (1, tokens, hidden), of all groups' tokens in one row, or of those chosen, behind a
    layer.
    """
    # transformers' own checkpoints would take the cache away, and the attention
    is_checkpointed, layer.gradient_checkpointing = layer.gradient_checkpointing, False
    try:
        if "linear_attn" in dict(layer.named_children()):
            read = _read_linear(language, layer, groups, hidden)
            return read if chosen is None else read[:, chosen]
        options = {"position_embeddings": angles, "attention_mask": None, "groups": groups}
        with attending_in_groups(language.config):
            if chosen is None:
                return layer(hidden, **options)
            mixed, _ = layer.self_attn(layer.input_layernorm(hidden), **options)
            hidden = (hidden + mixed)[:, chosen]
            return hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    finally:
        layer.gradient_checkpointing = is_checkpointed


def _read_linear(language, layer, groups: Sequence[Group], hidden: torch.Tensor) -> torch.Tensor:
    """`_read_layer` with linear attention: its state would run on through a neighbour's tokens."""
    counts = [(group.prompt, *group.completions) for group in groups]
    parts = [hidden[0, first:first + group.tokens].split(row)
             for (first, group), row in zip(places(groups), counts)]
    prompts = pad_sequence([row[0] for row in parts], True, padding_side="left")
    replies = pad_sequence([reply for row in parts for reply in row[1:]], True)
    order = torch.arange(prompts.shape[1], device=hidden.device)
    lengths = torch.tensor([group.prompt for group in groups], device=hidden.device)
    is_prompt = (order >= prompts.shape[1] - lengths[:, None]).long()
    index = torch.tensor([number for number, group in enumerate(groups)
                          for _ in group.completions], device=hidden.device)
    cache = make_cache(language)
    prompts = layer(prompts, position_embeddings=None, attention_mask=is_prompt,
                    past_key_values=cache)
    cache.batch_select_indices(index)
    replies = iter(layer(replies, position_embeddings=None, attention_mask=None,
                         past_key_values=cache))
    return torch.cat([part for prompt, (length, *own) in zip(prompts, counts)
                      for part in (prompt[-length:], *(next(replies)[:count] for count in own))]
                     )[None]


@dataclass(frozen=True)
class _PackedRow:
    """All prompts, each followed by its completions, as one row."""

    ids: torch.Tensor  # (1, tokens)
    is_prompt: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (3, 1, tokens)
    groups: list[Group]  # of the prompts
    # (completion tokens,), completion by completion: which of `scored_places` is before each token
    state_places: torch.Tensor


def _pack_completions(prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                      mask: torch.Tensor) -> _PackedRow:
    """Arguments as of `completion_states`; the result is on the device of `ids`."""
    device = ids.device
    prompt_index, ids, is_token = prompt_index.cpu(), ids.cpu(), mask.bool().cpu()
    packed_ids, is_prompt, positions, groups = [], [], [], []
    state_places, first = torch.zeros_like(ids), 0
    for row, prompt in enumerate(prompts):
        members = (prompt_index == row).nonzero()[:, 0]
        own = is_token[members]
        number, step = own.nonzero(as_tuple=True)  # of each token: its completion, its place in it
        packed_ids += [prompt.ids, ids[members][own]]
        is_prompt += [torch.ones_like(prompt.ids), torch.zeros_like(step)]
        positions += [prompt.positions, (prompt.next_position + step).expand(3, -1)]
        # the first token is predicted at the prompt's end, whose state all completions share
        state_places[members[number], step] = first + torch.arange(len(step)) * (step > 0)
        groups.append(Group(len(prompt.ids), tuple(own.sum(1).tolist())))
        first += 1 + len(step)
    return _PackedRow(torch.cat(packed_ids)[None].to(device),
                      torch.cat(is_prompt)[None].bool().to(device),
                      torch.cat(positions, 1)[:, None].to(device), groups,
                      state_places[is_token].to(device))


def _token_logps(model, states: torch.Tensor, targets: torch.Tensor,
                 temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (tokens,) of targets, and entropies, from the states (tokens, hidden)."""
    logps = log_softmax(model.lm_head(states).float() / temperature, -1)
    with torch.no_grad():
        entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropies
