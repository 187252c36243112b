"""Log-probabilities of completions whose prompts are read once, gradients flowing into what they share.

G completions of a prompt in a GRPO update: one pass over the prompt serves them all. LoRA and 4-bit layers are the model's own
modules and work unchanged.
"""

import torch
from torch.nn.functional import log_softmax
from torch.utils.checkpoint import checkpoint

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import unwrap_peft
from mig_kit.engine.prefixes import embed_with_images, pad_prompts
from mig_kit.engine.prompt_cache import Prompt, PromptCache
from mig_kit.sample import Sample

PROMPTS_AT_ONCE = 4  # prompts whose logits over the whole vocabulary are in memory at a time


HEAD_TOKENS = 1024  # whose logits are in memory at a time where layers are checkpointed


def completion_logps(model, prompts: list[Prompt], owner: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                     image_token: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every completion token; gradients flow into the shared prompts.

    owner: (rows,) the prompt of each row; ids, mask: (rows, longest completion), padded on the right.
    Two passes: one over the prompts that keeps its graph, one over the completions on the prompts' keys and values.
    """
    model = unwrap_peft(model)
    batch = pad_prompts(model, prompts, image_token)
    language = model.model.language_model
    final, cache = batch.read(model)
    cache.batch_select_indices(owner)
    steps = (batch.after[owner][:, None] + torch.arange(ids.shape[1], device=ids.device))[None].expand(3, -1, -1)
    second = language(input_ids=ids, attention_mask=torch.cat([batch.mask[owner], mask], 1), position_ids=steps,
                      past_key_values=cache, use_cache=True)
    hidden = torch.cat([final[owner][:, None], second.last_hidden_state[:, :-1]], 1)
    return _unpack_rows(*_token_logps(model, hidden[mask.bool()], ids[mask.bool()], temperature), mask)


def packed_logps(model, prompts: list[Prompt], owner: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor,
                 image_token: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What `completion_logps` gives, in one pass without a cache, so that layers can be checkpointed: far less memory.

    A row is a prompt and its replies behind one another; a reply's token attends to the prompt and to its own past. With
    checkpointed layers the head, too, is computed piece by piece.
    """
    model, device = unwrap_peft(model), ids.device
    lengths = mask.sum(1).tolist()
    mine = [(owner == i).nonzero()[:, 0].tolist() for i in range(len(prompts))]
    longest = max(len(p.ids) + sum(lengths[r] for r in rows) for p, rows in zip(prompts, mine))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    part, place = torch.full_like(tokens, -1), torch.zeros(3, *tokens.shape, dtype=torch.long)
    source: list[tuple[int, int]] = [(0, 0)] * int(sum(lengths))
    first = [sum(lengths[:r]) for r in range(len(lengths))]
    for i, (prompt, rows) in enumerate(zip(prompts, mine)):
        at = end = len(prompt.ids)
        tokens[i, :end], part[i, :end], place[:, i, :end] = prompt.ids, 0, prompt.positions
        for number, r in enumerate(rows, 1):
            here = slice(at, at + lengths[r])
            tokens[i, here], part[i, here] = ids[r, :lengths[r]].cpu(), number
            place[:, i, here] = prompt.positions[:, -1].max() + 1 + torch.arange(lengths[r])
            source[first[r]:first[r] + lengths[r]] = [(i, end - 1), *((i, k) for k in range(at, at + lengths[r] - 1))]
            at += lengths[r]
    language = model.model.language_model
    tokens, part, place = tokens.to(device), part.to(device), place.to(device)
    embeds = language.embed_tokens(tokens)
    given = embed_with_images(embeds, (tokens == image_token) & (part == 0), prompts)
    asking, asked = part[:, :, None], part[:, None, :]
    order = torch.arange(longest, device=device)
    allowed = (order[:, None] >= order) & (asked >= 0) & ((asked == 0) | (asked == asking)) | (order[:, None] == order)
    bias = torch.zeros(allowed.shape, dtype=embeds.dtype, device=device).masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    out = language(**given, attention_mask=bias[:, None], position_ids=place, use_cache=False)
    rows, columns = torch.tensor(source, device=device).T
    hidden, said = out.last_hidden_state[rows, columns], ids[mask.bool()]
    if not model.is_gradient_checkpointing:
        return _unpack_rows(*_token_logps(model, hidden, said, temperature), mask)
    pieces = [checkpoint(_token_logps, model, *piece, temperature, use_reentrant=False)
              for piece in zip(hidden.split(HEAD_TOKENS), said.split(HEAD_TOKENS))]
    return _unpack_rows(*(torch.cat(found) for found in zip(*pieces)), mask)


def _token_logps(model, hidden: torch.Tensor, said: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the tokens said, and entropies, from the hidden states (tokens, hidden) before them."""
    logs = log_softmax(model.lm_head(hidden).float() / temperature, -1)
    with torch.no_grad():
        entropies = -(logs.exp() * logs).sum(-1)
    return logs.gather(-1, said[:, None])[:, 0], entropies


def _unpack_rows(logps: torch.Tensor, entropies: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the tokens under a mask (rows, longest) as (rows, longest), 0 elsewhere."""
    there, empty = mask.bool(), torch.zeros(mask.shape, device=mask.device)
    return empty.masked_scatter(there, logps), empty.masked_scatter(there, entropies)


def reply_logps(model, processor, samples: list[Sample], replies: list[str], box_format: BoxFormat) -> torch.Tensor:
    """Log-probability of every token of the given replies, in float32; (tokens,), padding left out. AT_ONCE prompts in memory."""
    return torch.cat([_reply_logps(model, processor, samples[i:i + PROMPTS_AT_ONCE], replies[i:i + PROMPTS_AT_ONCE], box_format)
                      for i in range(0, len(samples), PROMPTS_AT_ONCE)])


@torch.no_grad()
def _reply_logps(model, processor, samples: list[Sample], replies: list[str], box_format: BoxFormat) -> torch.Tensor:
    prompts = PromptCache(model, processor, box_format).get(samples)
    tokens = [processor.tokenizer(r, add_special_tokens=False)["input_ids"] + [processor.tokenizer.eos_token_id] for r in replies]
    longest = max(map(len, tokens))
    ids, mask = torch.zeros(2, len(tokens), longest, dtype=torch.long, device=unwrap_peft(model).device)
    for row, reply in enumerate(tokens):
        ids[row, :len(reply)], mask[row, :len(reply)] = torch.tensor(reply), 1
    owner = torch.arange(len(samples), device=ids.device)
    logps, _ = completion_logps(model, prompts, owner, ids, mask, processor.image_token_id)
    return logps[mask.bool()].detach().float().cpu()
