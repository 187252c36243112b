"""Prompts made ready once: token ids, positions, and the features of their images, each distinct image seen once.

No stage trains the vision tower, so an image's features stay valid for as long as a run lasts, across replies, passes and epochs.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from mig_kit.frames import QWEN2_5, View
from mig_kit.models import check_tokens
from mig_kit.prompts import messages
from mig_kit.records import Sample

ALONE = 256  # patches; an image of so many fills the machine by itself


@dataclass(frozen=True)
class Prompt:
    """A sample made ready. ids: (tokens,); positions: (3, tokens); features: (image tokens, hidden), or None.

    Of Qwen3-VL, which feeds its first layers features of their own, features are (image tokens, (1 + layers) * hidden).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor | None


def inner(model):
    """The vision-language model itself, without a PEFT wrapper."""
    return model.base_model.model if "base_model" in dict(model.named_children()) else model


def digest(image: Image.Image) -> bytes:
    """What tells images apart: their pixels and size."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=f"{image.mode} {image.size}".encode()).digest()


class PromptCache:
    """Prompts by sample id and features by image, the least recently used forgotten first.

    limit: prompts kept. room: bytes of features kept; what a call asks for is always held while it is used.
    autocast: images of ALONE patches or more are computed in bfloat16, one at a time. Smaller ones share a batch, and there
    long sums in bfloat16 depend on what else is in it: a run that goes on after a kill would see other features. They are
    computed in the tower's own dtype.
    """

    def __init__(self, model, processor, view: View = QWEN2_5, limit: int = 4096, room: int = 2 * 2**30,
                 autocast: bool = False):
        self.model, self.processor, self.view, self.limit, self.room = inner(model), processor, view, limit, room
        self.autocast = autocast
        self.store: OrderedDict[str, tuple[torch.Tensor, torch.Tensor, tuple[bytes, ...]]] = OrderedDict()
        self.images: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self.size = 0  # bytes of self.images

    def clear(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.images.clear()
        self.size = 0

    @torch.no_grad()
    def get(self, samples: list[Sample]) -> list[Prompt]:
        """The prompts of `samples`; missing ones are encoded together. Raises ValueError if images were lost."""
        fresh = list({s.id: s for s in samples if s.id not in self.store}.values())
        for start in range(0, len(fresh), 64):
            self._encode(fresh[start:start + 64])
        gone = {key: image for s in samples for key, image in zip(self.store[s.id][2], s.images) if key not in self.images}
        if gone:
            inputs = self.processor.image_processor(list(gone.values()), return_tensors="pt")
            self._see(list(gone), inputs["pixel_values"], inputs["image_grid_thw"])
        prompts = []
        for s in samples:
            ids, place, keys = self.store[s.id]
            self.store.move_to_end(s.id)
            for key in keys:
                self.images.move_to_end(key)
            prompts.append(Prompt(ids, place, torch.cat([self.images[key] for key in keys]) if keys else None))
        while len(self.store) > self.limit:
            self.store.popitem(last=False)
        while self.size > self.room and self.images:
            _, forgotten = self.images.popitem(last=False)
            self.size -= forgotten.nbytes
        return prompts

    def _see(self, keys: list[bytes], pixels: torch.Tensor, grids: torch.Tensor) -> None:
        """Features of the images that are not there yet. pixels: patches of all images; grids: (images, 3)."""
        sizes = grids.prod(1).tolist()
        parts, first = pixels.split(sizes), {key: i for i, key in reversed(list(enumerate(keys)))}
        wanted = sorted(i for key, i in first.items() if key not in self.images)
        if not wanted:
            return
        alone = [i for i in wanted if self.autocast and sizes[i] >= ALONE]
        together = [i for i in wanted if i not in alone]
        visual, device = self.model.model.visual, self.model.device
        merged = self.processor.image_processor.merge_size**2
        for batch in [*([i] for i in alone), *([together] if together else [])]:
            patches = parts[batch[0]] if len(batch) == 1 else torch.cat([parts[i] for i in batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=batch is not together):
                out = visual(patches.to(device, visual.dtype), grid_thw=grids[batch].to(device))
            features = out.pooler_output
            if isinstance(self.model, Qwen3VLForConditionalGeneration):
                features = torch.cat([features, *out.deepstack_features], 1)
            for i, part in zip(batch, features.split([sizes[i] // merged for i in batch])):
                self.images[keys[i]] = part.clone()  # a slice would keep its whole batch alive
                self.size += part.nbytes

    def _encode(self, samples: list[Sample]) -> None:
        texts = [self.processor.apply_chat_template(messages(s, self.view), add_generation_prompt=True, tokenize=False)
                 for s in samples]
        inputs = self.processor(text=texts, images=[list(s.images) for s in samples], padding=True, return_tensors="pt")
        check_tokens(self.processor, inputs)
        keys = [digest(image) for s in samples for image in s.images]
        self._see(keys, inputs["pixel_values"], inputs["image_grid_thw"])
        place, _ = self.model.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"])
        there, at = inputs["attention_mask"].bool(), 0
        for i, sample in enumerate(samples):
            ids = inputs["input_ids"][i][there[i]], place[:, i][:, there[i]]
            self.store[sample.id] = (*ids, tuple(keys[at:at + len(sample.images)]))
            at += len(sample.images)
