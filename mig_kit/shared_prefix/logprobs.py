"""Log-probabilities of completions whose prompts are read once, with gradients.

In a GRPO update one pass over all prompts serves their completions, which a second pass reads and
which attend to the prompts' keys as `groups` says; layers are the model's own modules.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from mig_kit.shared_prefix.groups import KeysValues, PromptRow, ReplyRow, attending_by_row
from mig_kit.shared_prefix.prefixes import embed_with_images, is_linear, make_kv_cache
from mig_kit.shared_prefix.prompt_cache import Prompt, ReadPrompt, unwrap_peft

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
    Prompts are read first, unless they hold what was read of them; each has a row at least.
    """
    model = unwrap_peft(model)
    language = model.model.language_model
    read = read_prompts(model, prompts)
    packed = _pack_completions(prompts, prompt_index, ids, mask)
    hidden = language.embed_tokens(packed.ids)
    angles = language.rotary_emb(hidden, packed.positions)
    for index, layer in enumerate(language.layers):
        of_prompts = [prompt.layers[index] for prompt in read]
        hidden = _run(layer, partial(_read_replies, language, layer, of_prompts, packed.lengths,
                                     angles), hidden)
    states = torch.cat([*(prompt.state for prompt in read), hidden[0]])
    return language.norm(states)[packed.state_places]


def read_prompts(model, prompts: list[Prompt]) -> list[ReadPrompt]:
    """What completions need of each prompt; all prompts are read in one row."""
    if all(prompt.read for prompt in prompts):
        return [prompt.read for prompt in prompts]
    language, device = model.model.language_model, model.device
    lengths = [len(prompt.ids) for prompt in prompts]
    ids = torch.cat([prompt.ids for prompt in prompts])[None].to(device)
    positions = torch.cat([prompt.positions for prompt in prompts], 1)[:, None].to(device)
    is_image = ids == model.config.image_token_id
    inputs = embed_with_images(language.embed_tokens(ids), is_image, prompts)
    hidden, deepstack = inputs["inputs_embeds"], inputs.get("deepstack_visual_embeds", ())
    angles = language.rotary_emb(hidden, positions)
    ends = torch.tensor(lengths, device=device).cumsum(0) - 1
    layers, last = [], len(language.layers) - 1
    for index, layer in enumerate(language.layers):
        # of the last layer, completions see keys and values, and the last token's state
        asked = ends if index == last and len(deepstack) <= last else None
        hidden, of_prompts = _run(layer, partial(_read_prompt_layer, language, layer, lengths,
                                                 angles, asked), hidden)
        layers.append(of_prompts)
        if index < len(deepstack):
            hidden = hidden + torch.zeros_like(hidden).masked_scatter(
                is_image[..., None], deepstack[index].to(hidden.dtype))
    states = hidden[0] if asked is not None else hidden[0, ends]
    return [ReadPrompt(list(of_prompt), state)
            for of_prompt, state in zip(zip(*layers), states.split(1))]


class KeptPrompts:
    """Prompts that were read with a graph, by number, for one update that draws completions to them
    and learns from these.

    Passes of completions leave their gradients at copies of what was read; `backward` takes all of
    them to the weights at once.
    """

    def __init__(self, model, prompts: dict[int, Prompt]):
        self.outputs, self.copies = [], []
        read = read_prompts(unwrap_peft(model), list(prompts.values()))
        self.prompts = {number: replace(prompt, read=ReadPrompt(
            [tuple(map(self._copy, pair)) for pair in of_prompt.layers],
            self._copy(of_prompt.state)))
            for (number, prompt), of_prompt in zip(prompts.items(), read)}

    def _copy(self, output: torch.Tensor) -> torch.Tensor:
        copy = output.detach()
        if output.requires_grad:
            self.outputs.append(output)
            self.copies.append(copy.requires_grad_())
        return copy

    def backward(self) -> None:
        """Add to the weights' gradients what the passes of completions have left."""
        pairs = [(output, copy.grad) for output, copy in zip(self.outputs, self.copies)
                 if copy.grad is not None]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs)))


def _run(layer: torch.nn.Module, read: Callable, hidden: torch.Tensor):
    """read(hidden), a pass through the layer, checkpointed if the layer is."""
    if not (layer.training and layer.gradient_checkpointing):
        return read(hidden)

    def read_once(hidden):
        # transformers' own checkpoints would take the cache away, and the attention
        layer.gradient_checkpointing = False
        try:
            return read(hidden)
        finally:
            layer.gradient_checkpointing = True

    return checkpoint(read_once, hidden, use_reentrant=False)


def _read_prompt_layer(language, layer, lengths: list[int], angles: tuple,
                       ends: torch.Tensor | None,
                       hidden: torch.Tensor) -> tuple[torch.Tensor, list[KeysValues]]:
    """Prompts' states (1, tokens, hidden) behind a layer, and what completions need of it, by
    prompt. ends: places of the prompts' last tokens, if only their states are wanted.
    """
    if is_linear(layer):
        hidden, of_prompts = _read_linear_prompts(language, layer, lengths, hidden)
        return hidden if ends is None else hidden[:, ends], of_prompts
    row = PromptRow(lengths, ends)
    options = {"position_embeddings": angles, "attention_mask": None, "attend": row.attend}
    with attending_by_row(language.config):
        if ends is None:
            return layer(hidden, **options), row.keys_values
        mixed, _ = layer.self_attn(layer.input_layernorm(hidden), **options)
        hidden = (hidden + mixed)[:, ends]
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)), row.keys_values


def _read_replies(language, layer, prompts: list[KeysValues], lengths: list[list[int]],
                  angles: tuple, hidden: torch.Tensor) -> torch.Tensor:
    """Completions' states (1, tokens, hidden) behind a layer; prompts: of `_read_prompt_layer`."""
    if is_linear(layer):
        return _read_linear_replies(language, layer, prompts, lengths, hidden)
    attend = ReplyRow(prompts, lengths).attend
    with attending_by_row(language.config):
        return layer(hidden, position_embeddings=angles, attention_mask=None, attend=attend)


def _read_linear_prompts(language, layer, lengths: list[int],
                         hidden: torch.Tensor) -> tuple[torch.Tensor, list[KeysValues]]:
    """`_read_prompt_layer` with linear attention, in rows padded on the left: its state would run
    on through a neighbour's tokens.
    """
    rows = pad_sequence(hidden[0].split(lengths), True, padding_side="left")
    order = torch.arange(rows.shape[1], device=hidden.device)
    counts = torch.tensor(lengths, device=hidden.device)
    cache = make_kv_cache(language)
    rows = layer(rows, position_embeddings=None, past_key_values=cache,
                 attention_mask=(order >= rows.shape[1] - counts[:, None]).long())
    states = cache.layers[layer.linear_attn.layer_idx]
    of_prompts = zip(states.conv_states[0].split(1), states.recurrent_states[0].split(1))
    return torch.cat([row[-length:] for row, length in zip(rows, lengths)])[None], list(of_prompts)


def _read_linear_replies(language, layer, prompts: list[KeysValues], lengths: list[list[int]],
                         hidden: torch.Tensor) -> torch.Tensor:
    """`_read_replies` with linear attention: each completion goes on from its prompt's state."""
    counts = [length for row in lengths for length in row]
    rows = pad_sequence(hidden[0].split(counts), True)
    convolved, recurrent = (torch.cat([state for state, row in zip(states, lengths) for _ in row])
                            for states in zip(*prompts))
    cache = make_kv_cache(language)
    states = cache.layers[layer.linear_attn.layer_idx]
    states.update_conv_state(convolved, conv_kernel_size=convolved.shape[-1])
    states.update_recurrent_state(recurrent)
    rows = layer(rows, position_embeddings=None, attention_mask=None, past_key_values=cache)
    return torch.cat([row[:count] for row, count in zip(rows, counts)])[None]


@dataclass(frozen=True)
class _PackedRow:
    """All completions as one row, those of a prompt together."""

    ids: torch.Tensor  # (1, tokens)
    positions: torch.Tensor  # (3, 1, tokens)
    lengths: list[list[int]]  # of each prompt's completions
    # (completion tokens,), completion by completion: which of the prompts' last tokens and the
    # tokens of the row is before each token
    state_places: torch.Tensor


def _pack_completions(prompts: list[Prompt], prompt_index: torch.Tensor, ids: torch.Tensor,
                      mask: torch.Tensor) -> _PackedRow:
    """Arguments as of `completion_states`; the result is on the device of `ids`.

    >>> prompt = Prompt(torch.arange(9), torch.arange(9).expand(3, -1), None)  # of nine tokens
    >>> ids, mask = torch.tensor([[51, 52], [61, 0]]), torch.tensor([[1, 1], [1, 0]])
    >>> packed = _pack_completions([prompt], torch.tensor([0, 0]), ids, mask)
    >>> packed.ids.tolist(), packed.positions[0].tolist(), packed.lengths
    ([[51, 52, 61]], [[9, 10, 9]], [[2, 1]])
    >>> packed.state_places.tolist()  # 0: the prompt's end; 1: the token 51, before 52
    [0, 1, 0]
    """
    device = ids.device
    prompt_index, ids, is_token = prompt_index.cpu(), ids.cpu(), mask.bool().cpu()
    packed_ids, positions, lengths = [], [], []
    state_places, first = torch.zeros_like(ids), len(prompts)
    for row, prompt in enumerate(prompts):
        members = (prompt_index == row).nonzero()[:, 0]
        own = is_token[members]
        number, step = own.nonzero(as_tuple=True)  # of each token: its completion, its place in it
        packed_ids.append(ids[members][own])
        positions.append((prompt.next_position + step).expand(3, -1))
        # the first token is predicted at the prompt's end, whose state all completions share
        before = first + torch.arange(len(step)) - 1
        state_places[members[number], step] = torch.where(step > 0, before, row)
        lengths.append([length for length in own.sum(1).tolist() if length])
        first += len(step)
    return _PackedRow(torch.cat(packed_ids)[None].to(device),
                      torch.cat(positions, 1)[:, None].to(device), lengths,
                      state_places[is_token].to(device))


def _token_logps(model, states: torch.Tensor, targets: torch.Tensor,
                 temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (tokens,) of targets, and entropies, from the states (tokens, hidden)."""
    logps = log_softmax(model.lm_head(states).float() / temperature, -1)
    with torch.no_grad():
        entropies = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, targets[:, None])[:, 0], entropies
