"""Stage 03: merge the adapter into the weights that training saw.

QLoRA trains the adapter on top of NF4 weights, so the right base to merge into is the dequantised one. Merging into the
original weights, or into 4-bit weights, gives another model; `compare` measures by how much.
"""

import gc
from pathlib import Path

from peft import PeftModel

from mig_kit.boxes import BoxFormat
from mig_kit.engine.logprobs import reply_logps
from mig_kit.engine.models import Hardware, load_model, load_processor, protect_4bit_weights, save_model
from mig_kit.sample import Sample

MERGE_METHODS = ("dequantise, then merge", "merge into 4 bit", "merge into the original", "merge into the original, then 4 bit")


def load_trained_model(base: str | Path, adapter: Path, hw: Hardware):
    """What training saw: a fresh 4-bit base under the adapter."""
    return protect_4bit_weights(PeftModel.from_pretrained(load_model(base, hw, four_bit=True), adapter))


def merge_adapter(base: str | Path, adapter: Path, hw: Hardware, way: str = MERGE_METHODS[0]):
    """The merged model, by one of WAYS; the first is the right one. A fresh base is loaded every time."""
    if way not in MERGE_METHODS:
        raise ValueError(f"no way to merge called '{way}'; use one of: {'; '.join(MERGE_METHODS)}")
    if way == MERGE_METHODS[1]:
        return protect_4bit_weights(load_trained_model(base, adapter, hw).merge_and_unload(safe_merge=True))
    if way == MERGE_METHODS[0]:
        model = load_model(base, hw, four_bit=True).dequantize(dtype=hw.dtype)
    else:
        model = load_model(base, hw)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True)


def compare_merge_methods(base: str | Path, adapter: Path, merged: Path, samples: list[Sample], replies: list[str], hw: Hardware,
            box_format: BoxFormat) -> list[dict]:
    """Mean and largest |difference| in reply log-probability against what training saw, for every way to merge.

    merged: the folder that stage 03 wrote, read back. The last way quantises the saved wrong merge again.
    """
    processor = load_processor(base, box_format)
    truth = reply_logps(load_trained_model(base, adapter, hw), processor, samples, replies, box_format)
    rows = []
    for way in ("saved and read back", *MERGE_METHODS):
        if way == "saved and read back":
            model = load_model(merged, hw)
        elif way == MERGE_METHODS[3]:
            again = merged.parent / "wrong_merge"
            save_model(merge_adapter(base, adapter, hw, MERGE_METHODS[2]), processor, again)
            model = load_model(again, hw, four_bit=True)
        else:
            model = merge_adapter(base, adapter, hw, way)
        gap = (reply_logps(model, processor, samples, replies, box_format) - truth).abs()
        rows.append({"way": way, "mean_gap": gap.mean().item(), "max_gap": gap.max().item()})
        del model
        gc.collect()
    return rows
