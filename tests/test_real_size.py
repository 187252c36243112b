"""All stages at real size, without real weights: four layers of the 3B's shape in the published
layout, on photo-sized JPEGs. Opt-in, for it takes minutes and some 12 GiB:

    MIG_KIT_QWEN_TOKENIZER=tokenizer.json pytest -m real_size
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from big_data import make_data
from command_line import run_mig_kit

MINUTES, GIB = 10, 14
PARAMS = {
    "data": "own", "teacher": "own", "data_shares": "[0.4, 0.4, 0.2]", "dtype": "bfloat16",
    "max_samples": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
    "max_new_tokens": 8, "max_completion_length": 8, "batch_size": 2, "replies": 2, "launcher": "",
    "probe_samples": 4, "per_task": 4, "mig_per_task": 1, "ood_per_task": 1, "blink_per_task": 1,
    "mmiu_per_task": 1, "gradient_checkpointing": True, "workers": 1}


@pytest.mark.real_size
def test_four_layers_of_the_3b_go_through_all_stages(tmp_path):
    tokenizer = os.environ.get("MIG_KIT_QWEN_TOKENIZER", "")
    if not Path(tokenizer).is_file():
        pytest.skip("MIG_KIT_QWEN_TOKENIZER names no tokenizer.json of Qwen2.5")
    model = tmp_path / "model"
    script = Path(__file__).with_name("random_qwen.py")
    subprocess.run([sys.executable, script, model, tokenizer, "4"], check=True)
    own_file = make_data(tmp_path / "own", 30, 12)
    options = {**PARAMS, "base_model": model, "data_file": own_file}
    words = [word for name, value in options.items() for word in ("-p", name, str(value))]
    start = time.monotonic()
    result = run_mig_kit("run", "--profile", "smoke", "--run-id", "real", *words,
                         MIG_KIT_RUNS=str(tmp_path))
    minutes = (time.monotonic() - start) / 60
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    print(f"{minutes:.1f} min, {gib:.1f} GiB")
    record = json.loads((tmp_path / "real" / "05_grpo" / "run.json").read_text())
    assert "bfloat16" in record["hardware"] and "2 updates" in record["summary"]
    assert minutes <= MINUTES and gib <= GIB
