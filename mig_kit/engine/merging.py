"""Merge an adapter into a model's weights file by file: no whole model is ever in memory.

Each tensor is read from the base, quantised and dequantised where training saw it so, changed by
its adapter and written. The peak is a shard and a few copies of the largest tensor. Notebooks 02
and 03 look at one weight and its adapter.
"""

import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion

from mig_kit.common import apply_umask, release_memory, write_json
from mig_kit.engine.model_folders import (
    FAMILIES,
    check_model_folder,
    copy_unchanged_files,
    find_file,
    load_config,
)
from mig_kit.engine.models import ADAPTED_PROJECTIONS, FULL_PRECISION_MODULES, Hardware
from mig_kit.engine.processors import StillImageProcessor

SHARD_BYTES = 2 * 2**30
INDEX = "model.safetensors.index.json"


def write_merged_model(base: str | Path, adapter: Path, folder: Path, hardware: Hardware,
                       processor: StillImageProcessor, four_bit: bool) -> None:
    """Write `base` with the LoRA `adapter` merged in as a model folder, tensor by tensor.

    W + alpha / r * B A, in hardware.dtype; with four_bit, W is the base's weight
    after NF4 with double quantisation, as `load_model(..., four_bit=True)` computes with it. The
    files are those of `save_model`. They are written to a folder beside `folder`, which then takes
    its place. ValueError where the adapter has weights for tensors that the base lacks.
    """
    check_model_folder(base)
    config = load_config(base)
    with torch.device("meta"):
        model = FAMILIES[config.model_type](config)
    lora = read_lora(adapter)
    linear = {name for name, module in model.named_modules()
              if type(module) is torch.nn.Linear and not name.startswith(
                  tuple(FULL_PRECISION_MODULES))}
    if unknown := sorted(lora.keys() - linear):
        raise ValueError(f"the adapter changes {unknown[0]}, which {base} does not have; give the "
                         "base that the adapter was trained on")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    source = locate_tensors(base)
    names, shards = plan_shards(model, hardware.dtype, source)
    for file, saved_names in shards.filename_to_tensors.items():
        shard = {}
        for saved_name in saved_names:
            name = names[saved_name]
            weight = read_tensor(source, saved_name, name).to(hardware.device, hardware.dtype)
            module_name = name.removesuffix(".weight")
            if four_bit and module_name in linear and name.endswith(".weight"):
                weight = round_to_nf4(weight)
            if module_name in lora and name.endswith(".weight"):
                weight = weight + compute_delta(*lora[module_name], hardware.device).to(
                    weight.dtype)
            shard[saved_name] = weight.cpu().contiguous()
        save_file(shard, temporary / file, metadata={"format": "pt"})
        del shard
        release_memory()
    if shards.is_sharded:
        write_json(temporary / INDEX, {"metadata": shards.metadata,
                                       "weight_map": shards.tensor_to_filename})
    write_settings(model, base, temporary, hardware.dtype)
    processor.save_image_settings(temporary)
    apply_umask(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def round_to_nf4(weight: torch.Tensor) -> torch.Tensor:
    """The weight as a 4-bit layer computes with it; same dtype and device."""
    # late: 03 alone needs it, and it comes with the notebooks
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4",
                                  quant_storage=torch.uint8)
    return dequantize_4bit(packed, state).to(weight.dtype)


def compute_delta(a: torch.Tensor, b: torch.Tensor, scale: float,
                  device: str) -> torch.Tensor:
    """What the adapter adds, (outputs, inputs). a: (r, inputs); b: (outputs, r)."""
    return b.to(device, torch.float32) @ a.to(device, torch.float32) * scale


def read_lora(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Name of the adapted module -> (A, B, alpha / r).

    FileNotFoundError where the folder holds no adapter; ValueError for another kind than plain
    LoRA.
    """
    from peft import LoraConfig  # takes seconds to import

    path = Path(adapter) / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{adapter} holds no adapter; run the stage that trains it")
    config = LoraConfig.from_pretrained(adapter)
    if config.use_rslora or config.use_dora or config.rank_pattern or config.alpha_pattern:
        raise ValueError(f"{adapter} is no plain LoRA; merge it with PEFT's merge_and_unload")
    weights, modules = load_file(path), {}
    for name in weights:
        prefix, matrix = name.removesuffix(".weight").rsplit(".", 1)
        if matrix not in ("lora_A", "lora_B"):
            raise ValueError(f"{adapter} holds {name}, which is no LoRA matrix; merge it with "
                             "PEFT's merge_and_unload")
        modules[prefix.removeprefix("base_model.model.")] = prefix
    scale = config.lora_alpha / config.r
    return {module: (weights[f"{prefix}.lora_A.weight"], weights[f"{prefix}.lora_B.weight"], scale)
            for module, prefix in modules.items()}


def plan_shards(model: torch.nn.Module, dtype: torch.dtype,
                source: Collection[str] = ()) -> tuple[dict[str, str], StateDictSplit]:
    """(name in a file -> name in the model, the files of at most SHARD_BYTES).

    model: its tensors may be on the meta device. A tied head is not in the file. source: names in
    the base's files; experts that are one tensor there stay one.
    """
    is_tied = model.config.tie_word_embeddings
    names, tensors = {}, {}
    for name, tensor in model.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue
        tensor = tensor.to("meta", dtype)
        saved = revert_weight_conversion(model, {name: tensor})
        if len(saved) > 1 and name in source:
            saved = {name: tensor}
        # a view would count as the whole tensor
        tensors |= {saved_name: part.clone() for saved_name, part in saved.items()}
        names |= dict.fromkeys(saved, name)
    return names, split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)


def locate_tensors(base: str | Path) -> dict[str, Path]:
    """Name of each tensor of a folder or hub name -> the file that holds it."""
    index = find_file(base, INDEX)
    if index is not None:
        files = json.loads(index.read_text())["weight_map"]
        paths = {file: find_file(base, file) for file in sorted(set(files.values()))}
        if lacking := [file for file, path in paths.items() if path is None]:
            raise FileNotFoundError(f"{base} has no {lacking[0]}, which its index names; copy or "
                                    "download it again")
        return {name: paths[file] for name, file in files.items()}
    path = find_file(base, "model.safetensors")
    if path is None:
        raise FileNotFoundError(f"{base} has neither model.safetensors nor {INDEX}; copy one")
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def read_tensor(source: dict[str, Path], *names: str) -> torch.Tensor:
    """The tensor under the first of `names` that `source` has; KeyError if it has none."""
    for name in names:
        if name in source:
            with safe_open(source[name], "pt") as file:
                return file.get_tensor(name)
    raise KeyError(f"the base has no tensor {names[0]}; copy or download its weights again")


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
