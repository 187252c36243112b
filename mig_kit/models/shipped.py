"""Trained models that come with the kit, as adapters beside mig_kit/tiny_base: 02's and 05's.

They are of the run that notebooks/executed shows. Each is merged once, by the code of 03 and 05,
into a folder of the user's cache. They have no record of their base's weights (base.json), because
NF4 rounds otherwise on a CPU without AVX2, in the last bit.
"""

import os
from pathlib import Path

import torch
from filelock import FileLock

from mig_kit import __version__
from mig_kit.common import UserError, digest_json, file_sha256, model_folder
from mig_kit.models.adapters import WEIGHTS
from mig_kit.models.hardware import Hardware
from mig_kit.models.merging import write_merged_model
from mig_kit.models.processors import load_processor, read_box_format

# a trained model -> what its adapter was trained on, and whether that was in 4 bits
STARTS = {"tiny/sft": ("tiny", True), "tiny/grpo": ("tiny/sft", False)}
AS_THE_RUN = Hardware("cpu", torch.float32, "sdpa", "the numbers of the run that trained them")


def merge_shipped(name: str) -> Path:
    """The folder of a model of SHIPPED, merged if it is not yet, a second or two.

    Raises: ModuleNotFoundError if tiny/sft has to be merged and bitsandbytes is missing.
    """
    adapter = model_folder(name)
    if name not in STARTS:
        return adapter
    if not adapter.is_dir():
        raise UserError(f"{name} is not in {adapter}; in a clone, make executed writes it there")
    start, four_bit = STARTS[name]
    base = merge_shipped(start)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mig-kit"
    key = digest_json([__version__, file_sha256(base / "model.safetensors"),
                       file_sha256(adapter / WEIGHTS)])
    folder = cache / f"{adapter.name}-{key[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():  # it is there whole or not at all
            processor = load_processor(base, read_box_format(base))
            write_merged_model(base, adapter, folder, AS_THE_RUN, processor, four_bit)
    return folder
