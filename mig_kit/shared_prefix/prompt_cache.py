"""Prompts ready for the model: token ids, positions, and the features of their images. The vision
tower is not trained, so a distinct image goes through it once as long as its features are kept.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad
from transformers import AutoConfig, Qwen2_5_VLProcessor, Qwen3VLForConditionalGeneration
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import is_torchvision_available

# whose passes are known to be shareable
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")

# Patches from which an image has the same features to the bit, whatever else is in its batch
# (tried with 16 to 56 patches a side).
LARGE_IMAGE_PATCHES = 256
PATCHES_AT_ONCE = 8192  # of large images in a batch
SOURCES_AT_ONCE = 64  # whose texts are encoded together
PIXELS_AT_ONCE = 2**24  # of images that are decoded and prepared together
# of features and of prompts' tokens that a cache keeps, in the host's memory
MAX_BYTES, MAX_TEXT_BYTES = 2 * 2**30, 2**28


def unwrap_peft(model):
    """The vision-language model itself, without a PEFT wrapper."""
    return model.base_model.model if "base_model" in dict(model.named_children()) else model


class ImagePrompts(Qwen2_5_VLProcessor):
    """A processor without its video part, which needs torchvision; for still images its relatives'
    do the same. Made of a tokenizer alone, it is for prompts of text.
    """

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that `from_pretrained` loads."""
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor or Qwen2VLImageProcessorPil(), tokenizer,
                         chat_template=chat_template)


def load_image_prompts(model, args) -> ImagePrompts | None:
    """The processor that TRL would load for a model or its name, saved as its family's own; None
    if TRL can load it, or if the family is not known. args: the trainer's, or None.
    """
    if is_torchvision_available():  # which AutoProcessor needs
        return None
    options = (args.model_init_kwargs if args else None) or {}
    options = {"revision": options.get("revision", "main")}
    source = model if isinstance(model, str) else model.config._name_or_path
    family = AutoConfig.from_pretrained(source, **options).model_type
    if family not in FAMILIES:
        return None
    named = type(PROCESSOR_MAPPING_NAMES[family], (ImagePrompts,), {})
    return named.from_pretrained(source, padding_side="left", truncation_side="left", **options)


def describe_image(image, image_processor) -> tuple[bytes, tuple[int, int]]:
    """(digest, (width, height)) of an image as the processor reads it, before it resizes it.

    Whatever their mode, palette or type, images with equal digests have equal pixel values, and the
    processor had the same settings.
    """
    pixels = image_processor.process_image(image, do_convert_rgb=image_processor.do_convert_rgb)
    pixels = np.ascontiguousarray(np.moveaxis(np.asarray(pixels), 0, -1))
    key = f"{pixels.shape} {pixels.dtype}".encode()
    digest = hashlib.blake2b(pixels, digest_size=16, key=key)
    digest.update(repr(sorted(image_processor.to_dict().items())).encode())
    return digest.digest(), (pixels.shape[1], pixels.shape[0])


@dataclass(frozen=True)
class PromptSource:
    """What a prompt is made of; the cache renders and decodes it only if it does not hold it.

    key: equal for equal prompts alone. render: returns the text with one image token for each
    image. images: may be lazy. sizes: (width, height) of each. digests: a hash of each image.
    """

    key: Hashable
    render: Callable[[], str]
    images: Sequence[Image.Image]
    sizes: Sequence[tuple[int, int]]
    digests: Callable[[], tuple[bytes, ...]]


class ReadPrompt(NamedTuple):
    """What completions need of a prompt that the language model has read.

    layers: of each, keys and values (1, kv_heads, tokens, width); with linear attention the states
    of convolution and attention. state: (1, hidden) at the last token, before the last norm.
    """

    layers: list[tuple[torch.Tensor, torch.Tensor]]
    state: torch.Tensor


@dataclass(frozen=True)
class Prompt:
    """A prompt, ready for the model; features are None without images and in the cache's copy.

    ids: (tokens,); positions: (3, tokens); features: (image tokens, hidden), of Qwen3-VL, which
    feeds some to its first layers, (image tokens, (1 + layers) * hidden). image_digests: of its
    images, in order. read: None, or what is used in place of another pass.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    features: torch.Tensor | None
    image_digests: tuple[bytes, ...] = ()
    read: ReadPrompt | None = None

    @property
    def next_position(self) -> int:
        """Position of the token that follows the prompt."""
        return int(self.positions[:, -1].max()) + 1


class ImageFeatures(NamedTuple):
    """An image as the vision tower sees it."""

    features: torch.Tensor  # (image tokens, hidden), on the CPU
    grid: torch.Tensor  # (3,) patches


def tower_digest(model) -> bytes:
    """A hash of the weights of a model's vision tower."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in sorted(model.model.visual.state_dict().items()):
        digest.update(f"{name} {weight.dtype}".encode())
        values = weight.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy())
    return digest.digest()


class PromptCache:
    """Prompts by key and features by image; the least recently used are dropped first.

    autocast: compute images of LARGE_IMAGE_PATCHES or more in bfloat16; features of smaller ones
    would depend on what else is in their batch. check_grids: called with the patch grids (images,
    3) and the sizes of new images, to raise if the caller expects other grids.
    """

    def __init__(self, model, processor, autocast: bool = False,
                 check_grids: Callable[[torch.Tensor | None, list], None] | None = None):
        self.model, self.processor, self.check_grids = unwrap_peft(model), processor, check_grids
        self.autocast = autocast
        self.texts: OrderedDict[Hashable, Prompt] = OrderedDict()  # by the source's key
        self.images: OrderedDict[bytes, ImageFeatures] = OrderedDict()  # by digest
        self.released_tower = b""  # digest of the tower of the model that was released

    def release(self) -> None:
        """Let go of the model, so that two need not be in memory at a time; see `serve`."""
        if self.model is not None:
            self.released_tower, self.model = tower_digest(self.model), None

    def serve(self, model) -> None:
        """Go on with another model; features stay if its tower has the same weights."""
        self.release()
        self.model = unwrap_peft(model)
        if tower_digest(self.model) != self.released_tower:
            self.images.clear()

    @torch.no_grad()
    def get(self, sources: Sequence[PromptSource]) -> list[Prompt]:
        """The prompts of `sources`; those that are missing are encoded together.

        Raises ValueError if a prompt lost images, and what `check_grids` raises.
        """
        missing = {source.key: source for source in sources if source.key not in self.texts}
        new_sources = list(missing.values())
        for start in range(0, len(new_sources), SOURCES_AT_ONCE):
            self._encode(new_sources[start:start + SOURCES_AT_ONCE])
        self._compute_features(sources, [self.texts[source.key].image_digests
                                         for source in sources])
        prompts = [self._assemble(source.key) for source in sources]
        _drop_least_recent(self.texts, MAX_TEXT_BYTES,
                           lambda text: text.ids.nbytes + text.positions.nbytes)
        _drop_least_recent(self.images, MAX_BYTES, lambda image: image.features.nbytes)
        return prompts

    def _assemble(self, key: Hashable) -> Prompt:
        """The prompt of a key whose text and features are here, now the most recently used."""
        text = self.texts[key]
        self.texts.move_to_end(key)
        for digest in text.image_digests:
            self.images.move_to_end(digest)
        features = [self.images[digest].features for digest in text.image_digests]
        on_device = torch.cat(features).to(self.model.device) if features else None
        return replace(text, features=on_device)

    def _compute_features(self, sources: Sequence[PromptSource],
                          digests: list[tuple[bytes, ...]]) -> None:
        """Decode and add the missing images; digests: of each source's images."""
        # by digest: where the image is, and its pixels
        places = {digest: (source.images, number, width * height)
                  for source, row in zip(sources, digests)
                  for number, (digest, (width, height)) in enumerate(zip(row, source.sizes))
                  if digest not in self.images}
        part: dict[bytes, Image.Image] = {}
        free = PIXELS_AT_ONCE
        for digest, (images, number, n_pixels) in places.items():
            if part and n_pixels > free:
                self._add_features(part)
                part, free = {}, PIXELS_AT_ONCE
            part[digest] = images[number]
            free -= n_pixels
        if part:
            self._add_features(part)

    def _add_features(self, images: dict[bytes, Image.Image]) -> None:
        """Add the features of some images, by digest."""
        digests, missing = list(images), list(images.values())
        inputs = self.processor.image_processor(missing, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        n_patches = grids.prod(1).tolist()
        patches = inputs["pixel_values"].split(n_patches)
        merged = self.processor.image_processor.merge_size**2  # patches that make one token
        for indices, in_bfloat16 in _batch_images(n_patches, self.autocast):
            features = self._run_tower([patches[i] for i in indices], grids[indices], in_bfloat16)
            n_tokens = [n_patches[i] // merged for i in indices]
            for i, part in zip(indices, features.split(n_tokens)):
                # a slice would keep the features of its whole batch in memory
                self.images[digests[i]] = ImageFeatures(part.to("cpu", copy=True), grids[i])

    def _run_tower(self, patches: list[torch.Tensor], grids: torch.Tensor,
                   in_bfloat16: bool) -> torch.Tensor:
        """Patches and grids (images, 3) of some images -> their features, one after the other."""
        tower, device = self.model.model.visual, self.model.device
        pixels = patches[0] if len(patches) == 1 else torch.cat(patches)
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
            output = tower(pixels.to(device, tower.dtype), grid_thw=grids.to(device))
        if isinstance(self.model, Qwen3VLForConditionalGeneration):
            return torch.cat([output.pooler_output, *output.deepstack_features], 1)
        return output.pooler_output

    def _encode(self, sources: list[PromptSource]) -> None:
        """Add the texts of sources, as the processor encodes them, but with each image once."""
        processor = self.processor
        texts = [source.render() for source in sources]
        digests = [source.digests() for source in sources]
        for text, row in zip(texts, digests):
            if text.count(processor.image_token) != len(row):
                raise ValueError(
                    f"a prompt's text holds {text.count(processor.image_token)} image tokens but "
                    f"the images give {len(row)}; give every image of a prompt one place in its "
                    "text, and take image tokens out of what people wrote")
        self._compute_features(sources, digests)
        grids = [self.images[digest].grid for row in digests for digest in row]
        grid = torch.stack(grids) if grids else None
        image_tokens = [processor.replace_image_token({"image_grid_thw": grid}, index)
                        for index in range(len(grids))]
        texts, _ = processor.get_text_with_replacements(texts, image_tokens)
        encoded = [torch.tensor(row) for row in processor.tokenizer(texts)["input_ids"]]
        if self.check_grids:
            self.check_grids(grid, [size for source in sources for size in source.sizes])
        longest = max(map(len, encoded))
        # on the left, as the processor pads: positions are computed for the batch as it is
        ids = torch.stack([pad(row, (longest - len(row), 0),
                               value=processor.tokenizer.pad_token_id) for row in encoded])
        mask = torch.stack([pad(torch.ones_like(row), (longest - len(row), 0)) for row in encoded])
        token_types = torch.tensor(processor.create_mm_token_type_ids(ids))
        positions, _ = self.model.model.get_rope_index(
            ids, token_types, image_grid_thw=grid, attention_mask=mask)
        for row, (source, own_ids) in enumerate(zip(sources, encoded)):
            self.texts[source.key] = Prompt(own_ids, positions[:, row][:, mask[row].bool()], None,
                                            digests[row])


def _drop_least_recent(kept: OrderedDict, max_bytes: int, count: Callable[..., int]) -> None:
    """Drop what is first in `kept` until `count` of the rest gives max_bytes at most."""
    held = sum(map(count, kept.values()))
    while held > max_bytes:
        held -= count(kept.popitem(last=False)[1])


def _batch_images(n_patches: list[int], autocast: bool) -> list[tuple[list[int], bool]]:
    """(indices, in_bfloat16) of images that go through the tower together."""
    # under autocast all small ones; the others by size, PATCHES_AT_ONCE patches at a time
    small = [i for i, size in enumerate(n_patches) if autocast and size < LARGE_IMAGE_PATCHES]
    batches = [(small, False)] if small else []
    others = set(range(len(n_patches))) - set(small)
    free = 0  # patches that the last batch still has room for
    for i in sorted(others, key=lambda i: n_patches[i]):
        free -= n_patches[i]
        if free < 0:
            batches.append(([], autocast))
            free = PATCHES_AT_ONCE - n_patches[i]
        batches[-1][0].append(i)
    return batches
