"""All stages at real size, without real weights: the 3B's shape in the published layout.

    MIG_KIT_QWEN_TOKENIZER=tokenizer.json pytest -s -m nightly tests/test_real_size.py

takes nine minutes and 6 GiB with four layers; MIG_KIT_LAYERS=36 takes all, 45 minutes and 20 GiB.
"""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from big_data import make_data
from command_line import output_of

from mig_kit.pipeline.params import default_params
from mig_kit.pipeline.run_folders import RECIPE

LAYERS = int(os.environ.get("MIG_KIT_LAYERS", "4"))
MINUTES, GIB, DISK_GB = (10, 14, 10) if LAYERS < 36 else (45, 20, 25)
CHANGES = {
    "teacher": "own", "data_shares": [0.4, 0.4, 0.2], "dtype": "bfloat16",
    "max_samples": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "max_new_tokens": 8, "max_completion_length": 8, "replies": 2, "launcher": "",
    "per_task": 4, "suites": "{mig_bench: 0, ood_grounding: 0, blink: 0, mmiu: 0}",
    "gradient_checkpointing": True}
if LAYERS < 36:  # the vision tower has all of its layers: smaller images keep it within its minutes
    CHANGES |= {"max_pixels": 200_704}
# a row of 02 keeps 160 MiB a layer: there is no gradient checkpointing on a CPU
SFT_CHANGES = {"max_samples": 2, "per_device_train_batch_size": 1} if LAYERS >= 36 else {}


class MemoryWatch(threading.Thread):
    """The peak in GiB of what this process's children hold, without the files that they map."""

    def __init__(self):
        super().__init__(daemon=True)
        self.gib, self.is_over = 0.0, threading.Event()

    def run(self):
        while not self.is_over.wait(0.2):
            held = 0
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    memory = child.memory_info()
                    held += memory.rss - memory.shared
            self.gib = max(self.gib, held / 2**30)


@pytest.mark.nightly
def test_the_3b_goes_through_all_stages(tmp_path):
    tokenizer = os.environ.get("MIG_KIT_QWEN_TOKENIZER", "")
    if not Path(tokenizer).is_file():
        pytest.skip("MIG_KIT_QWEN_TOKENIZER names no tokenizer.json of Qwen2.5")
    model = tmp_path / "model"
    script = Path(__file__).with_name("random_qwen.py")
    subprocess.run([sys.executable, script, model, tokenizer, str(LAYERS)], check=True)
    own_file = make_data(tmp_path / "own", *((32, 33) if LAYERS >= 36 else (24, 25)),
                         max_pixels=CHANGES.get("max_pixels"))
    lines = own_file.read_text().splitlines()
    own_file.write_text("\n".join(lines[::2]))  # no image stands in two questions: each is seen
    options = {**CHANGES, "base_model": model, "data": own_file}
    run, minutes, gib = tmp_path / "real", {}, {}
    for stage in RECIPE[1:]:
        known = default_params(stage)
        values = options | SFT_CHANGES if stage == "02_sft" else options
        words = [word for name, value in values.items() if name in known
                 for word in ("-p", name, str(value))]
        watch, start = MemoryWatch(), time.monotonic()
        watch.start()
        output_of("run", stage, "--profile", "smoke", "--run-id", "real", *words,
                  MIG_KIT_RUNS=str(tmp_path))
        watch.is_over.set()
        minutes[stage], gib[stage] = (time.monotonic() - start) / 60, watch.gib
        print(f"{stage}: {minutes[stage]:.1f} min, {gib[stage]:.1f} GiB", flush=True)
    disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e9
    print(f"{LAYERS} layers: {sum(minutes.values()):.1f} min, {max(gib.values()):.1f} GiB, "
          f"{disk:.1f} GB left in the run")
    record = json.loads((run / "05_grpo" / "run.json").read_text())
    assert "bfloat16" in record["hardware"] and "2 updates" in record["summary"]
    assert sum(minutes.values()) <= MINUTES and max(gib.values()) <= GIB and disk <= DISK_GB
