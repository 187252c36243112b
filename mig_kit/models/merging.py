"""Merges an adapter into a model's weights, one of the base's files in memory at a time.

Each tensor is read from the base, rounded to NF4 if training saw it in 4 bits, merged and written
to a file of the same name.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from mig_kit.common import apply_umask, release_memory, write_json
from mig_kit.models.adapters import (
    ADAPTED_PROJECTIONS,
    Adapter,
    check_adapter_base,
    check_adapter_fits,
    load_adapter,
)
from mig_kit.models.hardware import FULL_PRECISION_MODULES, Hardware
from mig_kit.models.model_folders import (
    FAMILIES,
    INDEX,
    check_weights,
    copy_unchanged_files,
    find_file,
    load_config,
    locate_tensors,
)
from mig_kit.models.processors import StillImageProcessor


def write_merged_model(base: str | Path, adapter: Path, folder: Path, hardware: Hardware,
                       processor: StillImageProcessor, four_bit: bool) -> None:
    """Write the model folder of `base` with the LoRA `adapter` merged in, complete or not at all.

    Args:
        folder: replaced if it exists.
        hardware: its dtype is that of the merge.
        processor: is saved beside the weights.
        four_bit: merge into weights that are rounded to NF4, as `load_model(..., four_bit=True)`
            computes with them.
    Raises: UserError for another model's adapter, or one that is no plain LoRA.
    """
    check_weights(base)
    config = load_config(base)
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    lora = load_adapter(adapter)
    check_adapter_fits(lora, model, base)
    check_adapter_base(adapter, base)
    source = locate_tensors(base)
    layers = {}  # name of a weight in the base's files -> its linear layer
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            weight = f"{name}.weight"  # older files have another name for it
            names = (weight, *revert_weight_conversion(model, {weight: module.weight}))
            saved_name = next(filter(source.__contains__, names), "")
            if not saved_name and name != "lm_head":  # which may be tied
                raise KeyError(f"the files of {base} have no tensor {weight}")
            layers[saved_name] = name

    def merge(saved_name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.to(hardware.device, hardware.dtype)
        name = layers.get(saved_name, "")
        if four_bit and name and not name.startswith(tuple(FULL_PRECISION_MODULES)):
            tensor = round_to_nf4(tensor)
        if name in lora.matrices:
            tensor = add_lora(tensor, lora, name)
        return tensor.cpu().contiguous()

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for path in sorted({*source.values()}):
        with safe_open(path, "pt") as file:
            merged = {name: merge(name, file.get_tensor(name)) for name in file.keys()}
        save_file(merged, temporary / path.name, metadata={"format": "pt"})
        del merged
        release_memory()
    if find_file(base, INDEX):
        files = {name: path.name for name, path in source.items()}
        write_json(temporary / INDEX, {"metadata": {}, "weight_map": files})
    write_settings(model, base, temporary, hardware.dtype)
    processor.save_image_settings(temporary)
    apply_umask(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def add_lora(weight: torch.Tensor, adapter: Adapter, name: str) -> torch.Tensor:
    """W + alpha / r * B A for the module `name`, bit for bit as PEFT's merge_and_unload.

    The product is computed in float32, and added in the weight's dtype.
    """
    a, b = (adapter.matrices[name][part].to(weight.device, torch.float32) for part in "AB")
    return weight + (b @ a * adapter.scale).to(weight.dtype)


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a 4-bit layer computes with it; same dtype and device."""
    # late: 4-bit weights alone need it, and it comes with the notebooks
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4",
                                  quant_storage=torch.uint8)
    return dequantize_4bit(packed, state).to(weight.dtype)


def write_settings(model, base: str | Path, folder: Path, dtype: torch.dtype) -> None:
    """Write what a model folder holds beside weights and image settings."""
    config = model.config
    config.architectures = [type(model).__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    copy_unchanged_files(base, folder)


def read_projection(base: str | Path, lora_targets: str) -> torch.Tensor:
    """First adapted projection of the language model's first layer, (outputs, inputs) float32."""
    tensors = locate_tensors(base)
    name = _first_projection([name.removesuffix(".weight") for name in tensors], lora_targets)
    with safe_open(tensors[f"{name}.weight"], "pt") as file:
        return file.get_tensor(f"{name}.weight").float()


def read_adapter(adapter: Path,
                 lora_targets: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and alpha / r * B A of a plain adapter for the matrix of `read_projection`, float32."""
    lora = load_adapter(adapter)
    matrices = lora.matrices[_first_projection(lora.matrices, lora_targets)]
    a, b = matrices["A"].float(), matrices["B"].float()
    return a, b, b @ a * lora.scale


def _first_projection(names: Iterable[str], lora_targets: str) -> str:
    """The name of the first adapted projection that the language model's first layer has."""
    # Qwen3.5 has a layer more under mtp, which predicts further tokens and is never loaded
    in_first_layer = [name for name in names if "layers.0." in name and not name.startswith("mtp.")]
    return next(name for projection in ADAPTED_PROJECTIONS[lora_targets]
                for name in in_first_layer if name.endswith(f".{projection}"))
