"""Samples as the prompts that `shared_prefix` reads, and the log-probabilities of their replies."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from mig_kit.boxes import BoxFormat
from mig_kit.image_files import image_digests
from mig_kit.models.loading import TINY_BASE, Policy, resolve_model
from mig_kit.models.processors import (
    StillImageProcessor,
    check_image_grids,
    load_processor,
    render_prompt,
)
from mig_kit.sample import Sample
from mig_kit.shared_prefix.logprobs import completion_logps
from mig_kit.shared_prefix.prefixes import pad_rows
from mig_kit.shared_prefix.prompt_cache import Prompt, PromptCache, PromptSource, unwrap_peft

PROMPTS_AT_ONCE = 4  # prompts that `reply_logps` holds in memory


def prompt_source(processor: StillImageProcessor, box_format: BoxFormat,
                  sample: Sample) -> PromptSource:
    """The sample's prompt, which a `PromptCache` renders when needed; its key is suite and id."""
    return PromptSource((sample.suite, sample.id),
                        partial(render_prompt, processor, sample, box_format), sample.images,
                        sample.sizes, partial(image_digests, sample.images))


class SampleCache(PromptCache):
    """A `PromptCache` of samples; `get` raises ValueError if an image is seen at a wrong size."""

    def __init__(self, model, processor: StillImageProcessor, box_format: BoxFormat):
        super().__init__(model, processor,
                         check_grids=partial(check_image_grids, processor, box_format))
        self.box_format = box_format

    def get(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The samples' prompts; those that are missing are encoded together."""
        return super().get([prompt_source(self.processor, self.box_format, sample)
                            for sample in samples])


def make_cache(policy: Policy) -> SampleCache:
    """A cache of prompts for the policy."""
    return SampleCache(policy.model, policy.processor, policy.box_format)


@torch.no_grad()
def reply_logps(model, processor: StillImageProcessor, samples: list[Sample], replies: list[str],
                box_format: BoxFormat) -> list[torch.Tensor]:
    """Log-probabilities of each reply's tokens, its end included: (tokens,) float32 per reply."""
    device, values = unwrap_peft(model).device, []
    for start in range(0, len(samples), PROMPTS_AT_ONCE):
        part = slice(start, start + PROMPTS_AT_ONCE)
        prompts = SampleCache(model, processor, box_format).get(samples[part])
        texts = [processor.cut_opened(reply) for reply in replies[part]]
        rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        completions = [torch.tensor([*row, processor.tokenizer.eos_token_id]) for row in rows]
        lengths = list(map(len, completions))
        ids = pad_rows(completions, max(lengths)).to(device)
        mask = pad_rows([torch.ones_like(row) for row in completions], max(lengths)).to(device)
        prompt_index = torch.arange(len(prompts), device=device)
        logps, _ = completion_logps(model, prompts, prompt_index, ids, mask)
        values += logps[mask.bool()].float().cpu().split(lengths)
    return values


def read_prompt(base_model: str, sample: Sample,
                box_format: BoxFormat) -> tuple[list[str], list[tuple[int, int]]]:
    """(tokens as text, each image's (width, height) as the model sees it) of a sample's prompt.

    base_model: as the parameter of 01; a hub name is read with the tiny base's processor.
    """
    folder = resolve_model(base_model)
    processor = load_processor(folder if isinstance(folder, Path) else TINY_BASE, box_format)
    text = render_prompt(processor, sample, box_format)
    inputs = processor(text=[text], images=list(sample.images), return_tensors="pt")
    tokens = [processor.tokenizer.decode([token]) for token in inputs["input_ids"][0].tolist()]
    patch = processor.image_processor.patch_size
    sizes = [(columns * patch, rows * patch)
             for _, rows, columns in inputs["image_grid_thw"].tolist()]
    return tokens, sizes
