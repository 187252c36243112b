"""Prompts made ready once: token ids, positions, and the features of their images, each distinct image seen once.

No stage trains the vision tower, so an image's features stay valid for as long as a run lasts, across questions, replies, passes
and epochs.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.engine.models import check_image_grids, check_tokens, unwrap_peft
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample

LARGE_IMAGE_PATCHES = 256  # patches; images of so many had the same features to the bit whatever was in their batch (16 to 56 patches a side)


PATCHES_AT_ONCE = 8192  # patches of large images in a batch


@dataclass(frozen=True)
class Prompt:
    """A sample made ready. ids: (tokens,); positions: (3, tokens); features: (image tokens, hidden), or None.

    Of Qwen3-VL, which feeds its first layers features of their own, features are (image tokens, (1 + layers) * hidden).
    images: what tells its images from others, in order; stem: tokens up to the end of the last of them.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor | None
    images: tuple[bytes, ...] = ()
    stem: int = 0

    def begins(self) -> "Prompt":
        """Its stem as a prompt of its own."""
        return Prompt(self.ids[:self.stem], self.positions[:, :self.stem], self.features, self.images, self.stem)


def image_digest(image: Image.Image) -> bytes:
    """What tells images apart: their pixels and size."""
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=f"{image.mode} {image.size}".encode()).digest()


def tower_digest(model) -> bytes:
    """What tells the weights of a model's vision tower from others."""
    found = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.model.visual.state_dict().items()):
        found.update(f"{name} {weight.dtype}".encode())
        found.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.digest()


class PromptCache:
    """Prompts by sample id and features by image, the least recently used forgotten first.

    limit: prompts kept. room: bytes of features kept, in the host's memory; what a call asks for is always held while it is used.
    Images are seen AT_ONCE patches at a time. autocast: those of LARGE patches or more in bfloat16. In a batch of smaller ones
    long sums in bfloat16 depend on what else is in it: a run that goes on after a kill would see other features. They are
    computed in the tower's own dtype, all together.
    """

    def __init__(self, model, processor, box_format: BoxFormat, limit: int = 4096, room: int = 2 * 2**30,
                 autocast: bool = False):
        self.model, self.processor, self.box_format, self.limit, self.room = unwrap_peft(model), processor, box_format, limit, room
        self.autocast = autocast
        self.store: OrderedDict[str, tuple[torch.Tensor, torch.Tensor, tuple[bytes, ...], int]] = OrderedDict()
        self.images: OrderedDict[bytes, tuple[torch.Tensor, torch.Tensor]] = OrderedDict()  # features; grid (3,) of patches
        self.size = 0  # bytes of the features
        self.tower = b""  # what tells the tower's weights from others', while there is no model

    def clear(self) -> None:
        """Forget everything."""
        self.store.clear()
        self.images.clear()
        self.size = 0

    def release(self) -> None:
        """Let go of the model, so that two need not be in memory at a time; `serve` brings the next."""
        if self.model is not None:
            self.tower, self.model = tower_digest(self.model), None

    def serve(self, model) -> None:
        """Go on with another model of the same processor: prompts stay, and features if its tower has the same weights."""
        self.release()
        self.model = unwrap_peft(model)
        if tower_digest(self.model) != self.tower:
            self.images.clear()
            self.size = 0

    @torch.no_grad()
    def get(self, samples: list[Sample]) -> list[Prompt]:
        """The prompts of `samples`; missing ones are encoded together. Raises ValueError if images were lost."""
        fresh = list({s.id: s for s in samples if s.id not in self.store}.values())
        for start in range(0, len(fresh), 64):
            self._encode(fresh[start:start + 64])
        self._see({key: image for s in samples for key, image in zip(self.store[s.id][2], s.images)})
        prompts = []
        for s in samples:
            ids, place, keys, stem = self.store[s.id]
            self.store.move_to_end(s.id)
            for key in keys:
                self.images.move_to_end(key)
            features = torch.cat([self.images[key][0] for key in keys]).to(self.model.device) if keys else None
            prompts.append(Prompt(ids, place, features, keys, stem))
        while len(self.store) > self.limit:
            self.store.popitem(last=False)
        while self.size > self.room and self.images:
            _, (forgotten, _) = self.images.popitem(last=False)
            self.size -= forgotten.nbytes
        return prompts

    def _see(self, images: dict[bytes, Image.Image]) -> None:
        """Features of those images that are not there."""
        keys = [key for key in images if key not in self.images]
        if not keys:
            return
        inputs = self.processor.image_processor([images[key] for key in keys], return_tensors="pt")
        grids = inputs["image_grid_thw"]
        sizes = grids.prod(1).tolist()
        parts = inputs["pixel_values"].split(sizes)
        small = [i for i, size in enumerate(sizes) if self.autocast and size < LARGE_IMAGE_PATCHES]
        batches, room = [small] if small else [], 0
        for i in sorted(set(range(len(keys))) - set(small), key=lambda i: sizes[i]):
            room -= sizes[i]
            if room < 0:
                batches.append([])
                room = PATCHES_AT_ONCE - sizes[i]
            batches[-1].append(i)
        visual, device = self.model.model.visual, self.model.device
        merged = self.processor.image_processor.merge_size**2
        for batch in batches:
            patches = parts[batch[0]] if len(batch) == 1 else torch.cat([parts[i] for i in batch])
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast and batch is not small):
                out = visual(patches.to(device, visual.dtype), grid_thw=grids[batch].to(device))
            features = out.pooler_output
            if isinstance(self.model, Qwen3VLForConditionalGeneration):
                features = torch.cat([features, *out.deepstack_features], 1)
            for i, part in zip(batch, features.split([sizes[i] // merged for i in batch])):
                self.images[keys[i]] = part.to("cpu", copy=True), grids[i]  # a slice would keep its whole batch alive
                self.size += part.nbytes

    def _encode(self, samples: list[Sample]) -> None:
        """As the processor itself encodes text and images, but for an image that several ask about, which is prepared once."""
        texts = [self.processor.apply_chat_template(chat_messages(s, self.box_format), add_generation_prompt=True, tokenize=False)
                 for s in samples]
        for sample, text in zip(samples, texts):
            if text.count(self.processor.image_token) != len(sample.images):
                raise ValueError(f"the prompt of {sample.id} has {text.count(self.processor.image_token)} places for its "
                                 f"{len(sample.images)} images; take {self.processor.image_token} out of the question")
        objects = {id(image): image for s in samples for image in s.images}
        names = {where: image_digest(image) for where, image in objects.items()}
        self._see({names[where]: image for where, image in objects.items()})
        keys = [tuple(names[id(image)] for image in s.images) for s in samples]
        grids = [self.images[key][1] for row in keys for key in row]
        grid = torch.stack(grids) if grids else None
        wide = [self.processor.replace_image_token({"image_grid_thw": grid}, i) for i in range(len(grids))]
        texts, _ = self.processor.get_text_with_replacements(texts, wide)
        inputs = {**self.processor.tokenizer(texts, padding=True, return_tensors="pt"), "image_grid_thw": grid}
        check_tokens(self.processor, inputs)
        sizes = [image.size for sample in samples for image in sample.images]
        check_image_grids(self.processor, grid, sizes, self.box_format)
        kinds = torch.tensor(self.processor.create_mm_token_type_ids(inputs["input_ids"]))
        place, _ = self.model.model.get_rope_index(inputs["input_ids"], kinds, image_grid_thw=grid,
                                                   attention_mask=inputs["attention_mask"])
        there = inputs["attention_mask"].bool()
        for i, sample in enumerate(samples):
            ids = inputs["input_ids"][i][there[i]]
            seen = (ids == self.processor.image_token_id).nonzero()
            self.store[sample.id] = ids, place[:, i][:, there[i]], keys[i], int(seen[-1]) + 1 if len(seen) else 0
