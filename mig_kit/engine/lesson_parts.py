"""What notebooks 01 to 03 look at: the tokens of a prompt, one weight matrix, and its adapter.

Small pieces are read from a model's files; no model is loaded.
"""

from collections.abc import Iterable
from pathlib import Path

import torch

from mig_kit.boxes import BoxFormat
from mig_kit.engine.merging import compute_delta, locate_tensors, read_lora, read_tensor
from mig_kit.engine.models import ADAPTED_PROJECTIONS, TINY_BASE, resolve_model
from mig_kit.engine.processors import load_processor, render_prompt
from mig_kit.sample import Sample


def read_prompt(base_model: str, sample: Sample,
                box_format: BoxFormat) -> tuple[list[str], list[tuple[int, int]]]:
    """The sample's prompt as tokens, each as text, in which every image takes its places; and the
    (width, height) at which each image is seen, pixels.

    base_model: as the parameter of 01. The processor is that of a folder; for a hub name the tiny
    base's, so that nothing is downloaded.
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


def read_projection(base: str | Path, lora_targets: str) -> torch.Tensor:
    """The weight of the first adapted projection of the language model's first layer, (outputs,
    inputs) float32.

    lora_targets: a key of ADAPTED_PROJECTIONS.
    """
    tensors = locate_tensors(base)
    name = _first_projection([name.removesuffix(".weight") for name in tensors], lora_targets)
    return read_tensor(tensors, f"{name}.weight").float()


def read_adapter(adapter: Path,
                 lora_targets: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A, B, alpha / r * B A) that an adapter has for the matrix of `read_projection`; float32."""
    modules = read_lora(adapter)
    a, b, scale = modules[_first_projection(modules, lora_targets)]
    return a.float(), b.float(), compute_delta(a, b, scale, "cpu")


def _first_projection(names: Iterable[str], lora_targets: str) -> str:
    """The name of the first adapted projection that the language model's first layer has."""
    # Qwen3.5 has a layer more under mtp, which predicts further tokens and is never loaded
    in_first_layer = [name for name in names
                      if "layers.0." in name and not name.startswith("mtp.")]
    return next(name for projection in ADAPTED_PROJECTIONS[lora_targets]
                for name in in_first_layer if name.endswith(f".{projection}"))
