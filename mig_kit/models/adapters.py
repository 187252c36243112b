"""LoRA adapters in folders: plain ones, on the base that they were trained on.

A plain LoRA is lora_A and lora_B on matrices, all of one rank. Others are merged by PEFT first.
"""

import hashlib
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mig_kit.common import UserError, write_json
from mig_kit.models.model_folders import locate_tensors

WEIGHTS = "adapter_model.safetensors"
RECORD = "base.json"  # in a folder of an adapter that the kit has trained: on which weights
# settings of a LoraConfig that may have any value; another one must have PEFT's default
FREE = {"r", "lora_alpha", "lora_dropout", "init_lora_weights", "target_modules",
        "exclude_modules", "task_type", "layers_to_transform", "layers_pattern", "inference_mode",
        "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
PLAIN_STARTS = (True, False, "gaussian")  # init_lora_weights that leave the base as it is
# in_proj_* and out_proj are those of linear attention, whose in_proj_a and in_proj_b have as few
# outputs as heads.
_MIXERS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj")
ADAPTED_PROJECTIONS = {
    "all": (*_MIXERS, "gate_proj", "up_proj", "down_proj"),
    "attention": _MIXERS,
    "gate_up": ("gate_proj", "up_proj"),
}


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA, read."""

    scale: float  # alpha / r, the factor of B A
    matrices: dict[str, dict[str, torch.Tensor]]  # adapted module -> its "A" and "B"


def load_adapter(folder: Path) -> Adapter:
    """A plain LoRA as PEFT saves it; UserError if the folder holds none."""
    from peft import LoraConfig, PeftConfig  # takes seconds to import

    try:
        config, tensors = PeftConfig.from_pretrained(folder), load_file(Path(folder) / WEIGHTS)
    except (ValueError, OSError) as error:
        raise UserError(f"{folder} holds no adapter: {error}") from error
    default, matrices = vars(LoraConfig()), {}
    others = [name for name, value in vars(config).items()
              if name not in FREE and value != default.get(name)]
    for key, tensor in tensors.items():
        module, _, part = key.removeprefix("base_model.model.").partition(".lora_")
        matrices.setdefault(module, {})[part.removesuffix(".weight")] = tensor
    others += ["init_lora_weights"] * (config.init_lora_weights not in PLAIN_STARTS)
    others += [module for module, parts in matrices.items() if parts.keys() != {"A", "B"}]
    if others:
        raise UserError(f"{folder} is no plain LoRA ({others[0]}); merge it with PEFT "
                        "(merge_and_unload) first, and give the folder of the merged model")
    ranks = {len(parts["A"]) for parts in matrices.values()} - {config.r}
    if ranks:
        raise UserError(f"adapter_config.json of {folder} says r {config.r}, but its matrices have "
                        f"rank {min(ranks)}, so alpha / r would be another scale; give the "
                        "configuration that was saved with them")
    if not any(parts["B"].any() for parts in matrices.values()):
        warnings.warn(f"{folder} changes nothing: its matrices B hold zeros alone", stacklevel=2)
    return Adapter(config.lora_alpha / config.r, matrices)


def check_adapter_fits(adapter: Adapter, model: torch.nn.Module, base: str | Path) -> None:
    """UserError unless `model`, which may be on the meta device, has the adapter's matrices; a
    warning if the adapter lacks those of some layers.
    """
    modules = dict(model.named_modules())
    if model.config.tie_word_embeddings:  # no merged folder could hold another head
        del modules["lm_head"]
    for name, parts in adapter.matrices.items():
        layer, shape = modules.get(name), (parts["B"].shape[0], parts["A"].shape[1])
        if not isinstance(layer, torch.nn.Linear) or layer.weight.shape != shape:
            raise UserError(f"the adapter changes a matrix {name} of {shape[0]}x{shape[1]}, which "
                            f"{base} does not have; give the base that it was trained on")
    # one projection of all layers has one name but for the layer's number
    kinds = {re.sub(r"\d+", "N", name) for name in adapter.matrices}
    alike = [name for name in modules if re.sub(r"\d+", "N", name) in kinds]
    if lacking := [name for name in alike if name not in adapter.matrices]:
        warnings.warn(f"the adapter changes {len(adapter.matrices)} of {len(alike)} such matrices "
                      f"of {base}; {lacking[0]} stays as it is", stacklevel=2)


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


def check_adapter_base(adapter: Path, base: str | Path, four_bit: bool | None = None) -> None:
    """UserError if the kit has trained the adapter on other weights than those of `base`.

    four_bit: whether they are rounded to 4 bits; None if that is known to be right.
    """
    if not (adapter / RECORD).is_file():  # of another trainer
        return
    record = json.loads((adapter / RECORD).read_text())
    if record["weights"] != weights_digest(base):
        raise UserError(f"{adapter} was not trained on the weights of {base}; give the model that "
                        "its adapter_config.json names, as it was then, or a copy of it")
    if four_bit not in (None, record["four_bit"]):
        raise UserError(f"{adapter} was trained on {'full' if four_bit else '4-bit'} weights; "
                        f"{'leave out' if four_bit else 'add'} --four-bit")
