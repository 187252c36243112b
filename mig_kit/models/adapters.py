"""LoRA adapters in folders: which base they were trained on.

Some initialisations change the base in a way that PEFT cannot compute again; such adapters are
refused.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.utils import cached_file

from mig_kit.common import file_sha256, write_json
from mig_kit.models.model_folders import locate_tensors

FILES = ("adapter_config.json", "adapter_model.safetensors")
RECORD = "base.json"  # in a folder of an adapter that the kit has trained: on which weights
# initialisations that do not change the base, and those whose change PEFT can compute again
PLAIN = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
REPEATABLE = ("pissa", "olora", "kasa")
ELSEWHERE = ("merge it where it was trained, with PEFT's merge_and_unload, and give the folder of "
             "the merged model")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read."""

    folder: Path
    config: object  # PEFT's LoraConfig
    modules: dict[str, dict[str, torch.Tensor]]  # adapted module -> its tensors by name
    replaced: dict[str, torch.Tensor]  # by the name of the model's tensor that they replace


def load_adapter(folder: Path, four_bit: bool = False) -> Adapter:
    """An adapter as PEFT saves it; four_bit: whether it was trained on 4-bit weights.

    Raises: FileNotFoundError if the folder holds none, ValueError if it cannot be merged.
    """
    from peft import PeftConfig  # takes seconds to import

    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter; run the stage that trains it, or "
                                "save it as adapter_model.safetensors")
    config = PeftConfig.from_pretrained(folder)
    if config.peft_type != "LORA":
        raise ValueError(f"{folder} is no LoRA but {config.peft_type.value}; {ELSEWHERE}")
    if config.target_parameters:
        raise ValueError(f"{folder} adapts single parameters (target_parameters); {ELSEWHERE}")
    start = "kasa" if config.kasa_config else str(config.init_lora_weights).lower()
    if start not in PLAIN + (() if four_bit else REPEATABLE):
        cause = "in 4 bit" if four_bit else "without its data or random numbers"
        raise ValueError(f"the initialisation {start} of {folder} took a part out of the base that "
                         f"cannot be computed again {cause}; {ELSEWHERE}")
    modules, replaced = {}, {}
    for key, tensor in load_file(path).items():
        name = key.removeprefix("base_model.model.")
        module, is_lora, rest = name.partition(".lora_")
        if is_lora:
            modules.setdefault(module, {})[f"lora_{rest}"] = tensor
        else:
            replaced[name.replace(".base_layer.", ".")] = tensor
    return Adapter(Path(folder), config, modules, replaced)


def check_adapter_fits(adapter: Adapter, model: torch.nn.Module, base: str | Path) -> None:
    """ValueError if the adapter changes what `model` (on the meta device) lacks, or shares."""
    if unknown := sorted(adapter.modules.keys() - dict(model.named_modules())):
        raise ValueError(
            f"the adapter changes {unknown[0]}, which {base} does not have; give the base that the "
            "adapter was trained on, or train it with transformers 4.52 or later: older ones name "
            "layers otherwise")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if unknown := sorted(name for name, tensor in adapter.replaced.items()
                         if tensor.shape != shapes.get(name)):
        raise ValueError(f"{adapter.folder} holds {unknown[0]}, which is neither a LoRA matrix nor "
                         f"in place of a tensor of {base}; {ELSEWHERE}")
    changed = {*adapter.modules, *(name.rpartition(".")[0] for name in adapter.replaced)}
    tied = [name for name in sorted(changed) if name.endswith(("lm_head", "embed_tokens"))]
    if tied and model.config.tie_word_embeddings:
        raise ValueError(f"the adapter changes {tied[0]}, but embeddings and head of {base} are "
                         "one tensor: no merged folder computes what training saw; train without "
                         "it, or on a base that does not tie them")


def weights_digest(model: str | Path) -> str:
    """SHA-256 over name and first row of every tensor, equal for all layouts of a model."""
    rows = []
    for name, path in locate_tensors(model).items():
        with safe_open(path, "pt") as file:
            part = file.get_slice(name)
            first = part[:1] if part.get_shape() else file.get_tensor(name)
        first = first.float().contiguous().numpy().tobytes()
        # layouts of one model differ in these words, and in whether they hold a tied head
        name = name.replace("language_model.", "").removeprefix("model.")
        if not name.startswith(("lm_head", "mtp.")):  # neither is always saved
            rows.append(f"{name} {hashlib.sha256(first).hexdigest()}")
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()


def record_base(adapter: Path, base: str, four_bit: bool) -> None:
    """Write into an adapter's folder on which weights it was trained; base: folder or hub name."""
    write_json(adapter / RECORD, {"weights": weights_digest(base), "four_bit": four_bit})


def describe_adapter(adapter: Path) -> dict:
    """{"path", "files": SHA-256 by name, "base": its name, "base weights": "" if not recorded}."""
    files = {name: file_sha256(adapter / name) for name in FILES}
    return {"path": str(adapter.resolve()), "files": files, "base": _named_base(adapter),
            "base weights": _read_record(adapter).get("weights", "")}


def check_adapter_base(adapter: Path, base: str | Path, four_bit: bool | None = None) -> str:
    """One sentence if it is unknown whether the adapter was trained on the weights of `base` (a
    folder or hub name), or if four_bit is not as in its training; else "".

    Raises: ValueError for an adapter of other weights, FileNotFoundError for no adapter.
    """
    for file in FILES:
        if not (adapter / file).is_file():
            raise FileNotFoundError(f"{adapter} has no {file}; give the folder that PEFT has saved")
    name, record = _named_base(adapter), _read_record(adapter)
    in_4_bit = record.get("four_bit", four_bit)
    remark = "" if four_bit in (None, in_4_bit) else (
        f"{adapter} was trained on {'4-bit' if in_4_bit else 'full'} weights; "
        f"{'add' if in_4_bit else 'leave out'} --four-bit")
    if not record and name == str(base):
        return remark
    local = None if record else _find_base(name)
    expected = weights_digest(local) if local else record.get("weights", "")
    is_known = expected or (_is_hub_name(name) and not Path(base).is_dir())
    if not is_known:
        return (f"{adapter} says that its base is {name or 'nothing'}; whether {base} has the same "
                "weights cannot be known here")
    if not expected or weights_digest(base) != expected:
        raise ValueError(f"{adapter} was not trained on the weights of {base}; its base is {name}, "
                         "as it was then: give that model, or a copy of it")
    return remark


def _read_record(adapter: Path) -> dict:
    path = adapter / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def _named_base(adapter: Path) -> str:
    """The base that adapter_config.json names: a folder, absolute if it is there, or a name."""
    name = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    folder = adapter / (name or "nothing")
    return os.path.normpath(folder.absolute()) if folder.is_dir() else name or ""


def _is_hub_name(name: str) -> bool:
    return bool(name) and not name.startswith((".", "/")) and name.count("/") <= 1


def _find_base(name: str) -> Path | None:
    """The folder of a base on this machine, be it in the hub's cache; None without weights."""
    if name and Path(name).is_dir():
        return Path(name)
    config = _is_hub_name(name) and cached_file(
        name, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False)
    folder = Path(config).parent if config else None
    return folder if folder and any(folder.glob("*.safetensors")) else None
