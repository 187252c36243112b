"""Model folders and hub names: which families load, which files a folder must have."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import cached_file

from mig_kit.common import UserError
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
MOST = 1e6  # a tensor of a larger norm holds no trained weights
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
    if path := find_file(base, "model.safetensors"):  # from_pretrained, too, looks for it first
        with safe_open(path, "pt") as file:
            return dict.fromkeys(file.keys(), path)
    index = find_file(base, INDEX)
    if index is None:
        raise UserError(f"{base} has neither model.safetensors nor {INDEX}; copy one")
    files = json.loads(index.read_text())["weight_map"]
    paths = {file: Path(cached_file(base, file)) for file in sorted(set(files.values()))}
    return {name: paths[file] for name, file in files.items()}


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
    """UserError if a local folder is of none of FAMILIES, lacks a tokenizer or holds an adapter."""
    path = Path(model)
    if not path.is_dir():  # a hub name, or nothing, which `load_config` says
        return
    names = {entry.name for entry in path.iterdir()}
    if adapter := names & {"adapter_config.json", "adapter_model.safetensors"}:
        raise UserError(f"{model} holds an adapter ({min(adapter)}), which transformers would add "
                        "to a model; merge it (stage 03), ask with mig-kit eval --model ITS_BASE "
                        f"--adapter {model}, or move it out of the folder")
    load_config(path)
    # transformers makes an empty tokenizer where these files are missing
    has_old_form = {"vocab.json", "merges.txt"} <= names
    settings = {"tokenizer_config.json", "vocab.json" if has_old_form else "tokenizer.json"}
    if missing := sorted(settings - names):
        raise UserError(f"{model} is not complete, {missing[0]} is missing; hf download or copy it "
                        "again")


def check_weights(model: str | Path) -> None:
    """UserError unless the weights of a folder or hub name are whole, finite and its config.json's.

    Checked once for the same files; the 7.5 GB of a 3B take one second of a core.
    """
    check_model_folder(model)
    try:
        paths = sorted({*locate_tensors(model).values()})
        _check_files(model, tuple((path, path.stat().st_size, path.stat().st_mtime_ns)
                                  for path in [*paths, find_file(model, "config.json")]))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise UserError(f"the weights of {model}: {error}") from error


@lru_cache(8)
def _check_files(model: str | Path, files: tuple[tuple[Path, int, int], ...]) -> None:
    config = load_config(model)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        opened = [stack.enter_context(safe_open(path, "pt")) for path, *_ in files
                  if path.suffix == ".safetensors"]
        tensors = {name: file for file in opened for name in file.keys()}
        problems = pool.map(_describe_values, tensors, tensors.values())
        # transformers' own names of tensors, without their values
        _, info = FAMILIES[config.model_type].from_pretrained(
            model, config=config, device_map="meta", output_loading_info=True, use_safetensors=True)
        problem = "".join(islice(filter(None, problems), 1))
    missing, other = (sorted({*info[kind]}) for kind in ("missing_keys", "unexpected_keys"))
    if missing:
        raise UserError(f"the weights of {model} lack {len(missing)} tensors, the first is "
                        f"{missing[0]}{f'; they hold {other[0]} instead' if other else ''}; copy "
                        "or save them again")
    if other:
        raise UserError(f"the weights of {model} hold {len(other)} tensors for which its "
                        f"config.json has no place, the first is {other[0]}; give the config.json "
                        "that they were saved with")
    if problem:
        raise UserError(f"the weights of {model} are not those of a trained model: {problem}")


def _describe_values(name: str, file) -> str:
    """What is wrong with the values of an opened file's tensor, or ""."""
    values = file.get_tensor(name)
    # the norm is no less than any of them, and costs a third of a minimum and maximum in bfloat16
    norm = torch.linalg.vector_norm(values.float() if values.dtype == torch.float16 else values)
    if not norm < MOST:  # NaN is not less
        return (f"not finite: {name} holds NaN, infinity or numbers beyond {MOST:.0e}; its "
                "training went wrong")
    is_empty = values.ndim > 1 and norm == 0
    return f"{name} holds nothing but zeros; copy or save it again" if is_empty else ""


def load_config(model: str | Path):
    """The configuration of a folder or hub name.

    Raises: UserError if there is none, or for a quantised one or none of FAMILIES.
    """
    family = read_model_type(model)
    if family and family not in FAMILIES:
        raise UserError(f"{model} is a {family}; the kit loads {', '.join(FAMILIES)}; any other "
                        "model answers through a server (mig-kit eval --model NAME -p server URL "
                        "--coordinates normalized_1000 or absolute)")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"config.json of {model}: {str(error).splitlines()[0]}") from error
    if config.to_dict().get("quantization_config"):
        raise UserError(f"{model} holds quantised weights, which are neither what training saw "
                         "nor what a merge gives; give the full weights (stage 03 writes them)")
    return config


def load_generation_config(model: str | Path) -> GenerationConfig:
    """The model's generation_config.json, or else what its config.json says."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(load_config(model))
