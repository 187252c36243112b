"""Prompts as batches, and what they share: several questions about the same images begin alike, as benchmarks often ask.

MIG-Bench's 4,295 questions are about 1,974 lists of images. The images are then read once, and the questions behind them in one
more pass, each on the images' keys and values and its own tokens alone.
"""

from copy import copy
from dataclasses import dataclass

import torch

from mig_kit.engine import attention
from mig_kit.engine.prompt_cache import Prompt

PAD_MULTIPLE = 32  # tokens; rows are padded to multiples, for a heap in which every batch has sizes of its own grows and slows down


def pad_to_multiple(tokens: int) -> int:
    """The next multiple of ROUND."""
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def embed_with_images(embeds: torch.Tensor, where: torch.Tensor, prompts: list[Prompt]) -> dict:
    """The language model's inputs: embeddings (prompts, longest, hidden) with the images' features at `where`."""
    seen = [p.features for p in prompts if p.features is not None]
    if not seen:
        return {"inputs_embeds": embeds}
    features, *deeper = torch.cat(seen).to(embeds.dtype).split(embeds.shape[-1], 1)
    given = {"inputs_embeds": embeds.masked_scatter(where[..., None], features)}
    return given | {"visual_pos_masks": where, "deepstack_visual_embeds": deeper} if deeper else given


@dataclass(frozen=True)
class PaddedPrompts:
    """Prompts as one batch, padded on the right: a causal model reads them without a mask, which costs twice as much.

    given: inputs of `with_features`; mask: (prompts, longest), 0 where padding is; positions: (3, prompts, longest);
    last: (prompts,) index of a prompt's last token; after: (prompts,) position of the token that follows it.
    """

    given: dict
    mask: torch.Tensor
    positions: torch.Tensor
    last: torch.Tensor
    after: torch.Tensor

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """(prompts, longest, width) -> (prompts, width) at the last tokens."""
        return hidden[torch.arange(len(self.last), device=hidden.device), self.last]

    def read(self, model) -> tuple[torch.Tensor, object]:
        """States at the last tokens (prompts, hidden), and the cache. Of long prompts the last layer computes nothing else.

        What it leaves out is a fifth of the tiny model's work, and 1/36 of the 3B's. With the kit's own attention only.
        """
        language = model.model.language_model
        short = self.mask.shape[1] < attention.READ or language.config._attn_implementation != attention.NAME
        whole = short or "deepstack_visual_embeds" in self.given
        reader = language if whole else _last_layer_at(language, self.last[:, None])
        out = reader(**self.given, position_ids=self.positions, use_cache=True)
        return self.final(out.last_hidden_state) if whole else out.last_hidden_state[:, 0], out.past_key_values


def _last_layer_at(language, where: torch.Tensor):
    """The model, its last layer giving only the states at `where` (rows, slots): (rows, slots, hidden); keys and values are whole.

    It has the same weights, and leaves the model itself as it is: another thread may be using it.
    """
    layer = language.layers[-1]
    mixer, last, reader = copy(layer.self_attn), copy(layer), copy(language)

    def forward(hidden_states: torch.Tensor, **given) -> torch.Tensor:
        mixed, _ = mixer(hidden_states=layer.input_layernorm(hidden_states), **given)
        hidden = (hidden_states + mixed).gather(1, where[..., None].expand(-1, -1, hidden_states.shape[2]))
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    mixer.read_at, last.forward = where, forward
    reader._modules = {**language._modules, "layers": torch.nn.ModuleList([*language.layers[:-1], last])}
    return reader


def pad_prompts(model, prompts: list[Prompt], image_token: int) -> PaddedPrompts:
    """Prompts as a batch; longest is `rounded` if there are several."""
    longest, device = max(len(p.ids) for p in prompts), model.device
    longest = pad_to_multiple(longest) if len(prompts) > 1 else longest
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    place = torch.zeros(3, len(prompts), longest, dtype=torch.long)
    for i, p in enumerate(prompts):
        ids[i, :len(p.ids)], mask[i, :len(p.ids)], place[:, i, :len(p.ids)] = p.ids, 1, p.positions
    embeds = model.model.language_model.embed_tokens(ids.to(device))
    where = ((ids == image_token) & mask.bool()).to(device)
    last = torch.tensor([len(p.ids) - 1 for p in prompts], device=device)
    after = torch.tensor([int(p.positions[:, -1].max()) + 1 for p in prompts], device=device)
    return PaddedPrompts(embed_with_images(embeds, where, prompts), mask.to(device), place.to(device), last, after)


@dataclass(frozen=True)
class Suffixes:
    """What prompts about the same images go on with after them, read in one pass on the keys and values of the images.

    places: (stems, slots) the prompt's index, -1 where a stem has fewer; first, length: (stems, slots) where its tokens are
    among those of its stem; after: (stems, slots) position of the token that follows; final: (prompts, hidden).
    """

    places: torch.Tensor
    first: torch.Tensor
    length: torch.Tensor
    after: torch.Tensor
    final: torch.Tensor


def group_by_prefix(prompts: list[Prompt]) -> list[list[int]]:
    """Indices of the prompts that begin with the same images, in order; each by itself where little is to be gained.

    Every stem gets as many rows as the one with the most prompts: more than twice as many in all as there are prompts is too much.
    """
    found: dict[object, list[int]] = {}
    for i, p in enumerate(prompts):
        found.setdefault((p.images, p.ids[:p.stem].numpy().tobytes()) if p.stem else i, []).append(i)
    stems = list(found.values())
    apart = not all(p.stem for p in prompts) or max(map(len, stems)) * len(stems) > 2 * len(prompts)
    return [[i] for i in range(len(prompts))] if apart else stems


def read_suffixes(model, prompts: list[Prompt], stems: list[list[int]], batch: PaddedPrompts, cache) -> Suffixes:
    """Read what follows the images; `cache`, which holds what `batch` of the stems left, is added to."""
    device, slots = batch.mask.device, max(map(len, stems))
    longest = pad_to_multiple(max(sum(len(prompts[i].ids) - prompts[i].stem for i in stem) for stem in stems))
    ids, part = torch.zeros(len(stems), longest, dtype=torch.long), torch.full((len(stems), longest), -1)
    place = torch.zeros(3, len(stems), longest, dtype=torch.long)
    places, first, length, after = (torch.full((len(stems), slots), fill) for fill in (-1, 0, 0, 0))
    for row, stem in enumerate(stems):
        at = 0
        for slot, i in enumerate(stem):
            p = prompts[i]
            here = slice(at, at + len(p.ids) - p.stem)
            ids[row, here], part[row, here], place[:, row, here] = p.ids[p.stem:], slot, p.positions[:, p.stem:]
            places[row, slot], first[row, slot], length[row, slot] = i, at, here.stop - at
            after[row, slot] = p.positions[:, -1].max() + 1
            at = here.stop
    order = torch.arange(longest)
    own = (part[:, :, None] == part[:, None, :]) & (order[:, None] >= order)
    allowed = torch.cat([batch.mask.bool()[:, None].expand(-1, longest, -1), own.to(device)], 2)
    embeds = model.model.language_model.embed_tokens(ids.to(device))
    bias = torch.zeros(allowed.shape, dtype=embeds.dtype, device=device).masked_fill_(~allowed, torch.finfo(embeds.dtype).min)
    out = model.model.language_model(inputs_embeds=embeds, attention_mask=bias[:, None], position_ids=place.to(device),
                                     past_key_values=cache, use_cache=True)
    row, slot = (places >= 0).nonzero(as_tuple=True)
    final = out.last_hidden_state[row, (first + length - 1)[row, slot]][places[row, slot].argsort()]
    return Suffixes(places, first.to(device), length.to(device), after.to(device), final)
