"""Model folders and hub names: which families load, which files a folder must have."""

import json
import os
import shutil
from pathlib import Path

import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file

from mig_kit.image_files import LFS_POINTER, is_lfs_pointer
from mig_kit.shared_prefix import prompt_cache

# model_type of config.json -> class of the model
FAMILIES = {name: getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name])
            for name in prompt_cache.FAMILIES}

# Files of a model folder that training does not change; a saved model keeps its base's.
UNCHANGED_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "video_preprocessor_config.json",
)
INDEX = "model.safetensors.index.json"
VisionLanguageModel = PreTrainedModel  # of one of FAMILIES


class ServedName(str):
    """What a server calls a model that the kit cannot load, so that no processor is read."""


def find_file(model: str | Path, name: str, ask_hub: bool = True) -> Path | None:
    """A file of a model folder, or of a hub name (downloaded into its cache); None without one."""
    path = cached_file(model, name, _raise_exceptions_for_missing_entries=False,
                       _raise_exceptions_for_connection_errors=False, local_files_only=not ask_hub)
    return Path(path) if path else None


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


def copy_unchanged_files(base: str | Path, folder: Path) -> None:
    """Copy the files of `base` (a folder or hub name) that training does not change."""
    for name in UNCHANGED_FILES:
        if path := find_file(base, name):
            shutil.copyfile(path, Path(folder) / name)


def read_model_type(model: str | Path, ask_hub: bool = True) -> str:
    """The model_type that config.json of a folder or hub name states; "" where there is none."""
    try:
        path = find_file(model, "config.json", ask_hub)
        return str(json.loads(path.read_text()).get("model_type", "")) if path else ""
    except (OSError, ValueError, AttributeError):  # no name of the hub, or no configuration
        return ""


def check_model_folder(model: str | Path) -> None:
    """FileNotFoundError if a local folder lacks files, ValueError if it is of none of FAMILIES."""
    path = Path(model)
    if not path.exists():
        could_be_hub_name = os.sep not in str(model) or str(model).count("/") == 1
        if str(model).startswith(".") or not could_be_hub_name:
            raise FileNotFoundError(f"no model folder at {model}; run the stage that makes it, or "
                                    "give a hub name")
        return
    for file in path.glob("*.*"):
        if file.is_file() and is_lfs_pointer(file):
            raise ValueError(f"{file} {LFS_POINTER}")
    names = {entry.name for entry in path.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        config = json.loads((path / "adapter_config.json").read_text())
        base = config.get("base_model_name_or_path") or "ITS_BASE"
        base = os.path.normpath(path / base) if (path / base).is_dir() else base
        raise FileNotFoundError(f"{model} holds an adapter, not a model; merge it into its base "
                                f"first (stage 03), or ask: mig-kit eval --model {base} --adapter "
                                f"{model} (and --four-bit if 4-bit weights were under it)")
    _refuse_other_family(path)
    has_weights = any(name.endswith(".safetensors") for name in names)
    is_cut = any((path / ".cache" / "huggingface").rglob("*.incomplete"))
    index = path / "model.safetensors.index.json"
    missing = sorted({*json.loads(index.read_text())["weight_map"].values()} - names
                     if index.is_file() else ())
    missing += ["*.safetensors"] * (is_cut and not has_weights)
    missing += [name for name in _missing_settings(names) if is_cut]
    if missing:
        raise FileNotFoundError(f"{model} is not complete, {missing[0]} is missing; hf download or "
                                "copy it again")
    if not has_weights:
        raise FileNotFoundError(f"{model} holds no *.safetensors; only safetensors weights are "
                                "loaded, so convert them")
    for weights in path.glob("*.safetensors"):
        try:
            with safe_open(weights, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{weights} is cut or broken ({error}); copy it again") from error
    for name in _missing_settings(names):
        raise FileNotFoundError(f"{model} has no {name}; copy it from the model that this one was "
                                "made from")


def _missing_settings(names: set[str]) -> list[str]:
    """The files beside the weights that loading needs and a folder of these names lacks."""
    if "processor_config.json" in names:  # transformers 5 writes the image settings there
        names = names | {"preprocessor_config.json"}
    if {"vocab.json", "merges.txt"} <= names:
        names = names | {"tokenizer.json"}
    return [name for name in ("config.json", "tokenizer_config.json", "tokenizer.json",
                              "preprocessor_config.json") if name not in names]


def _refuse_other_family(model: str | Path) -> None:
    family = read_model_type(model)
    if family and family not in FAMILIES:
        raise ValueError(f"{model} is a {family}; the kit loads {', '.join(FAMILIES)}; any other "
                         "model answers through a server (mig-kit eval --model NAME --server URL "
                         "--coordinates normalized_1000 or absolute), and mig-kit score judges "
                         "the replies that it has given to a benchmark")


def load_config(model: str | Path):
    """The configuration of a folder or hub name.

    Raises: FileNotFoundError if there is none, ValueError for a quantised one or none of FAMILIES.
    """
    _refuse_other_family(model)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except OSError as error:
        cause = str(error).splitlines()[0]
        if Path(model).is_dir():
            raise ValueError(f"{cause}; copy it from the model that this one was made "
                             "from") from error
        raise FileNotFoundError(
            f"there is no folder {model}, and the hub gave no model of this name ({cause}); "
            "give a folder, or a hub name such as Qwen/Qwen2.5-VL-7B-Instruct") from error
    if "quantization_config" in config.to_dict():
        raise ValueError(f"{model} holds quantised weights, which are neither what training saw "
                         "nor what a merge gives; give the full weights (stage 03 writes them)")
    return config
