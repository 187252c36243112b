"""Stage 03: merge the adapter into the weights that training saw.

QLoRA trains the adapter on top of NF4 weights, so the base to merge into is the dequantised one.
Merging into the original weights, or into 4-bit weights, gives another model;
`compare_merge_methods` measures by how much.
"""

import gc
from pathlib import Path

from peft import PeftModel

from mig_kit.boxes import BoxFormat
from mig_kit.engine.logprobs import reply_logps
from mig_kit.engine.models import Hardware, load_model, protect_4bit_weights, save_model
from mig_kit.engine.processors import load_processor
from mig_kit.sample import Sample

DEQUANTISED = "dequantise, then merge"
FOUR_BIT = "merge into 4 bit"
ORIGINAL = "merge into the original"
ORIGINAL_FOUR_BIT = "merge into the original, then 4 bit"
MERGE_METHODS = (DEQUANTISED, FOUR_BIT, ORIGINAL, ORIGINAL_FOUR_BIT)
READ_BACK = "saved and read back"


def load_trained_model(base: str | Path, adapter: Path, hardware: Hardware):
    """What training saw: a fresh 4-bit base under the adapter."""
    quantised = load_model(base, hardware, four_bit=True)
    return protect_4bit_weights(PeftModel.from_pretrained(quantised, adapter))


def merge_adapter(base: str | Path, adapter: Path, hardware: Hardware, method: str = DEQUANTISED):
    """The merged model, by one of MERGE_METHODS; the first is the right one.

    A fresh base is loaded every time. Raises ValueError for another method.
    """
    if method not in MERGE_METHODS:
        raise ValueError(f"no merge method '{method}'; use one of: {'; '.join(MERGE_METHODS)}")
    if method == FOUR_BIT:
        trained = load_trained_model(base, adapter, hardware)
        return protect_4bit_weights(trained.merge_and_unload(safe_merge=True))
    if method == DEQUANTISED:
        model = load_model(base, hardware, four_bit=True).dequantize(dtype=hardware.dtype)
    else:
        model = load_model(base, hardware)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def compare_merge_methods(base: str | Path, adapter: Path, merged: Path, samples: list[Sample],
                          replies: list[str], hardware: Hardware,
                          box_format: BoxFormat) -> list[dict]:
    """How far every method's model is from what training saw.

    Rows {"way", "mean_gap", "max_gap"}: |difference| in log-probability per token of the replies.
    merged: the folder that stage 03 wrote, read back.
    """
    processor = load_processor(base, box_format)
    trained = load_trained_model(base, adapter, hardware)
    trained_logps = reply_logps(trained, processor, samples, replies, box_format)
    rows = []
    for method in (READ_BACK, *MERGE_METHODS):
        if method == READ_BACK:
            model = load_model(merged, hardware)
        elif method == ORIGINAL_FOUR_BIT:
            folder = merged.parent / "wrong_merge"
            save_model(merge_adapter(base, adapter, hardware, ORIGINAL), processor, folder, base)
            model = load_model(folder, hardware, four_bit=True)
        else:
            model = merge_adapter(base, adapter, hardware, method)
        gaps = (reply_logps(model, processor, samples, replies, box_format) - trained_logps).abs()
        rows.append({"way": method, "mean_gap": gaps.mean().item(), "max_gap": gaps.max().item()})
        del model
        gc.collect()
    return rows
