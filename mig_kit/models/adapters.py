"""LoRA adapters in folders: plain ones, whole, and on the base that they were trained on.

A plain LoRA is lora_A and lora_B (with DoRA's magnitudes) on matrices. The merge is PEFT's, and a
merged matrix must compute what it computed with the adapter; every other adapter is refused.
"""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mig_kit.common import UserError, file_sha256, write_json
from mig_kit.models.model_folders import locate_tensors

FILES = ("adapter_config.json", "adapter_model.safetensors")
RECORD = "base.json"  # in a folder of an adapter that the kit has trained: on which weights
PARTS = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, read."""

    folder: Path
    config: object  # PEFT's LoraConfig
    modules: dict[str, dict[str, torch.Tensor]]  # adapted module -> its tensors by name


def load_adapter(folder: Path) -> Adapter:
    """A plain LoRA as PEFT saves it.

    Raises: UserError if the folder holds none, or one that changes nothing or is not finite.
    """
    from peft import PeftConfig  # takes seconds to import

    _require_files(folder)
    config = PeftConfig.from_pretrained(folder)
    modules: dict[str, dict[str, torch.Tensor]] = {}
    others = [f"a {config.peft_type.value}"] * (config.peft_type != "LORA")
    for key, tensor in load_file(Path(folder) / FILES[1]).items():
        module, is_lora, rest = key.removeprefix("base_model.model.").partition(".lora_")
        if not is_lora or f"lora_{rest}" not in PARTS:
            others.append(key)
        elif not tensor.isfinite().all():
            raise UserError(f"the adapter {folder} is not finite: {key} holds NaN or infinity")
        modules.setdefault(module, {})[f"lora_{rest}"] = tensor
    if others:
        raise UserError(f"{folder} is no plain LoRA ({others[0]}), which alone is merged here; "
                        "merge it where it was trained, with PEFT's merge_and_unload, and give the "
                        "folder of the merged model")
    changes = config.lora_alpha and any(
        parts["lora_B.weight"].any() for parts in modules.values() if "lora_B.weight" in parts)
    if not changes:
        sentence = (f"the adapter {folder} changes nothing: lora_B is 0 in all {len(modules)} "
                    "layers, or lora_alpha is; it was saved before training, or without its "
                    "weights, or its training had no signal")
        if not (Path(folder) / RECORD).is_file():
            raise UserError(sentence)
        warnings.warn(sentence, stacklevel=2)  # the kit has trained it
    return Adapter(Path(folder), config, modules)


def check_adapter_fits(adapter: Adapter, model: torch.nn.Module, base: str | Path) -> None:
    """UserError unless the adapter is on the layers of `model` (on the meta device) that its
    settings name.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(model.named_modules())
    if model.config.tie_word_embeddings:  # no merged folder could hold another head
        del modules["lm_head"]
    if unknown := sorted(adapter.modules.keys() - modules.keys()):
        raise UserError(
            f"the adapter changes {unknown[0]}, which {base} does not have as a layer of its own; "
            "give the base that the adapter was trained on, or train it with transformers 4.52 or "
            "later: older ones name layers otherwise")
    if adapter.config.target_modules != "all-linear":
        lacking = [name for name in modules if name not in adapter.modules
                   and check_target_module_exists(adapter.config, name)]
        if lacking:
            raise UserError(f"the adapter {adapter.folder} lacks {len(lacking)} layers that its "
                            f"target_modules name, such as {lacking[0]}; save or copy it again")


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
    """{"path", "files": SHA-256 by name, "base": its name}."""
    files = {name: file_sha256(adapter / name) for name in FILES}
    return {"path": str(adapter.resolve()), "files": files, "base": _named_base(adapter)}


def check_adapter_base(adapter: Path, base: str | Path, four_bit: bool | None = None) -> str:
    """One sentence if it is unknown whether the adapter was trained on the weights of `base` (a
    folder or hub name), or if four_bit is not as in its training; else "".

    Raises: UserError for an adapter of other weights.
    """
    _require_files(adapter)
    name, record = _named_base(adapter), _read_record(adapter)
    in_4_bit = record.get("four_bit", four_bit)
    remark = "" if four_bit in (None, in_4_bit) else (
        f"{adapter} was trained on {'4-bit' if in_4_bit else 'full'} weights; "
        f"{'add' if in_4_bit else 'leave out'} --four-bit")
    if not record and name == str(base):
        return remark
    expected = record.get("weights") or (
        weights_digest(name) if name and Path(name).is_dir() else "")
    if not expected:
        return (f"{adapter} says that its base is {name or 'nothing'}; whether {base} has the same "
                "weights cannot be known here")
    if weights_digest(base) != expected:
        raise UserError(f"{adapter} was not trained on the weights of {base}; its base is {name}, "
                        "as it was then: give that model, or a copy of it")
    return remark


def _require_files(folder: Path) -> None:
    for name in FILES:
        if not (Path(folder) / name).is_file():
            raise UserError(f"{folder} holds no adapter: it has no {name}; run the stage that "
                            "trains it, or give the folder that PEFT has saved")


def _read_record(adapter: Path) -> dict:
    path = adapter / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}


def _named_base(adapter: Path) -> str:
    """The base that adapter_config.json names: a folder, absolute if it is there, or a name."""
    name = json.loads((adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    folder = adapter / (name or "nothing")
    return os.path.normpath(folder.absolute()) if folder.is_dir() else name or ""
