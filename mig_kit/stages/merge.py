"""Stage 03: how far ways to merge are from what training saw; `models.merging` merges.

QLoRA trains the adapter on NF4 weights, so it belongs to the dequantised base. Merging into other
weights gives another model; `measure_merge_gaps` says by how much.
"""

import gc
import shutil
from pathlib import Path

import torch
from peft import PeftModel

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.models.loading import Hardware, load_model
from mig_kit.models.merging import write_merged_model
from mig_kit.models.model_folders import VisionLanguageModel, locate_tensors
from mig_kit.models.processors import load_processor
from mig_kit.models.sample_prompts import reply_logps
from mig_kit.sample import Sample
from mig_kit.shared_prefix.decoding import train_mode_for_4bit_layers

DEQUANTISED = "dequantise, then merge"
FOUR_BIT = "merge into 4 bit"
ORIGINAL = "merge into the original"
ORIGINAL_FOUR_BIT = "merge into the original, then 4 bit"
MERGE_METHODS = (DEQUANTISED, FOUR_BIT, ORIGINAL, ORIGINAL_FOUR_BIT)
PROBES = 40  # replies on which the methods are compared
READ_BACK = "saved and read back"
LARGE_MODEL_BYTES = 2 * 2**30  # of a base's files: from here on fewer methods are compared
MOST_NATS = 0.05  # per token, largest mean difference to the trained model that rounding explains


def load_trained_model(base: str | Path, adapter: Path, hardware: Hardware) -> PeftModel:
    """The model that training saw: the 4-bit base under the adapter."""
    quantised = load_model(base, hardware, four_bit=True)
    return train_mode_for_4bit_layers(PeftModel.from_pretrained(quantised, adapter))


def merge_in_memory(base: str | Path, adapter: Path, hardware: Hardware,
                    method: str = DEQUANTISED) -> VisionLanguageModel:
    """The base with the adapter merged by PEFT, to be measured; method: DEQUANTISED or FOUR_BIT.

    The stage's own model is written by `write_merged_model`.
    """
    if method == FOUR_BIT:
        trained = load_trained_model(base, adapter, hardware)
        return train_mode_for_4bit_layers(trained.merge_and_unload(safe_merge=True))
    model = load_model(base, hardware, four_bit=True).dequantize(dtype=hardware.dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def choose_merge_methods(base: str | Path) -> tuple[str, ...]:
    """The MERGE_METHODS to compare with the merged folder; ORIGINAL alone if the base is large."""
    files = set(locate_tensors(base).values())  # each method makes and reads a whole model
    is_large = sum(path.stat().st_size for path in files) > LARGE_MODEL_BYTES
    return (ORIGINAL,) if is_large else MERGE_METHODS


def measure_merge_gaps(base: str | Path, adapter: Path, merged: Path, samples: list[Sample],
                       replies: list[str], hardware: Hardware,
                       box_format: BoxFormat) -> list[dict]:
    """How far each merge method's model is from the trained one; one model in memory at a time.

    Returns: rows {"way", "mean_gap", "max_gap"}, the written folder `merged` first: mean and
        largest |difference| of the replies' token log-probabilities to the trained model.
    """
    processor = load_processor(base, box_format)

    def read_logps(model) -> torch.Tensor:
        return torch.cat(reply_logps(model, processor, samples, replies, box_format))

    compared = merged.with_name("compared")  # each method's model in turn; none is left
    trained_logps = read_logps(load_trained_model(base, adapter, hardware))
    rows = []
    for method in (READ_BACK, *choose_merge_methods(base)):
        gc.collect()
        release_memory()
        if method == READ_BACK:
            logps = read_logps(load_model(merged, hardware))
        elif method in (ORIGINAL, ORIGINAL_FOUR_BIT):
            write_merged_model(base, adapter, compared, hardware, processor, four_bit=False)
            logps = read_logps(load_model(compared, hardware, method == ORIGINAL_FOUR_BIT))
        else:
            logps = read_logps(merge_in_memory(base, adapter, hardware, method))
        gaps = (logps - trained_logps).abs()
        rows.append({"way": method, "mean_gap": gaps.mean().item(), "max_gap": gaps.max().item()})
    for folder in (compared, compared.with_name("compared.tmp")):  # .tmp: of a killed start
        shutil.rmtree(folder, ignore_errors=True)
    gc.collect()
    release_memory()
    return rows


def merge_warning(gaps: list[dict]) -> str:
    """One sentence if the merged folder is not nearest to what SFT trained, else "".

    gaps: of `measure_merge_gaps`.
    """
    saved, *others = gaps
    if saved["mean_gap"] >= MOST_NATS:
        return (f"the merged model is {saved['mean_gap']:.3f} nats per token from what training "
                "saw; merge with the dtype that stage 02 had")
    wrong = [row for row in others if row["way"] != DEQUANTISED]
    nearer = [row["way"] for row in wrong if row["mean_gap"] < saved["mean_gap"]]
    return (f"'{nearer[0]}' is nearer to what training saw than the merged model: the adapter is "
            "too young, or bfloat16 too coarse, to tell them apart" if nearer else "")
