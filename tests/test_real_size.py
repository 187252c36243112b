"""All stages at real size, without real weights: the 3B's shape in the published layout, on
photo-sized JPEGs. Nine minutes and 6 GiB:

    MIG_KIT_QWEN_TOKENIZER=tokenizer.json pytest -s -m nightly tests/test_real_size.py

with four layers; MIG_KIT_LAYERS=36 takes all of them and images twice as large, three quarters of
an hour and 14 GiB (20 with mapped files). It prints minutes and memory of every stage beside what
stage 00 would predict.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from big_data import make_data
from command_line import run_mig_kit

from mig_kit.pipeline.params import stage_parameters
from mig_kit.pipeline.run_folders import RECIPE

LAYERS = int(os.environ.get("MIG_KIT_LAYERS", "4"))
MINUTES, GIB, DISK_GB = (10, 14, 10) if LAYERS < 36 else (45, 20, 25)
CHANGES = {
    "teacher": "own", "data_shares": [0.4, 0.4, 0.2], "dtype": "bfloat16",
    "max_samples": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "max_new_tokens": 8, "max_completion_length": 8, "replies": 2, "launcher": "",
    "per_task": 4, "mig_per_task": 0, "ood_per_task": 0, "blink_per_task": 0,
    "mmiu_per_task": 0, "gradient_checkpointing": True}
if LAYERS < 36:  # the vision tower has all of its layers: smaller images keep it within its minutes
    CHANGES |= {"max_pixels": 200_704}
# a row of 02 keeps 160 MiB a layer: there is no gradient checkpointing on a CPU
SFT_CHANGES = {"max_samples": 2, "per_device_train_batch_size": 1} if LAYERS >= 36 else {}


class MemoryWatch(threading.Thread):
    """The peak of what all processes that this one has started hold, in GiB.

    mapped_gib is with the pages of files that they map, which the system can take back.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.gib, self.mapped_gib, self.is_over = 0.0, 0.0, threading.Event()

    def run(self):
        """Look five times a second."""
        while not self.is_over.wait(0.2):
            held, mapped = 0, 0
            for child in psutil.Process().children(recursive=True):
                try:
                    memory = child.memory_info()
                except psutil.NoSuchProcess:
                    continue
                held, mapped = held + memory.rss - memory.shared, mapped + memory.rss
            self.gib = max(self.gib, held / 2**30)
            self.mapped_gib = max(self.mapped_gib, mapped / 2**30)


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
        known = stage_parameters(stage)
        values = options | SFT_CHANGES if stage == "02_sft" else options
        words = [word for name, value in values.items() if name in known
                 for word in ("-p", name, str(value))]
        watch, start = MemoryWatch(), time.monotonic()
        watch.start()
        result = run_mig_kit("run", stage, "--profile", "smoke", "--run-id", "real", *words,
                             MIG_KIT_RUNS=str(tmp_path))
        watch.is_over.set()
        minutes[stage], gib[stage] = (time.monotonic() - start) / 60, watch.gib
        assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
        print(f"{stage}: {minutes[stage]:.1f} min, {gib[stage]:.1f} GiB, with mapped files "
              f"{watch.mapped_gib:.1f}", flush=True)
    disk = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e9
    print(f"{LAYERS} layers: {sum(minutes.values()):.1f} min, {max(gib.values()):.1f} GiB, "
          f"{disk:.1f} GB left in the run")
    record = json.loads((run / "05_grpo" / "run.json").read_text())
    assert "bfloat16" in record["hardware"] and "2 updates" in record["summary"]
    assert sum(minutes.values()) <= MINUTES and max(gib.values()) <= GIB and disk <= DISK_GB
