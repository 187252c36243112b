"""Stages 04, 05 and 06 over a real vLLM: MIG_KIT_VLLM names a virtual environment that has one."""

import json
import os
import shlex
import shutil

import pytest
from command_line import output_of

VLLM = os.environ.get("MIG_KIT_VLLM", "")
SERVER = (f"env VLLM_CPU_KVCACHE_SPACE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {VLLM}/bin/vllm serve "
          "{model} --host 127.0.0.1 --port {port} --dtype float32 --max-model-len 4096 "
          f"--limit-mm-per-prompt {shlex.quote(json.dumps({'image': 6}))} --generation-config vllm "
          "--enforce-eager --enable-lora --max-lora-rank 64 --max-loras 2 "
          "--logprobs-mode processed_logprobs")


@pytest.mark.nightly
@pytest.mark.skipif(not VLLM, reason="MIG_KIT_VLLM names no environment with vLLM")
def test_vllm_serves_rejection_sampling_grpo_and_evaluation(smoke_runs, tmp_path):
    shutil.copytree(smoke_runs / "smoke", tmp_path / "smoke")
    local = json.loads((tmp_path / "smoke/06_evaluate/metrics.json").read_text())
    for stage, changes in (("04", ()), ("05", ("-p", "max_steps", "10")), ("06", ())):
        words = ("run", stage, "--profile", "smoke", "--run-id", "smoke", "-p", "server", SERVER,
                 "-p", "seed", "1", *changes)
        output_of(*words, MIG_KIT_RUNS=str(tmp_path))
    replies = (tmp_path / "smoke/04_rejection_sampling/replies.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["replies"]) for line in replies} == {4}
    curves = json.loads((tmp_path / "smoke/05_grpo/metrics.json").read_text())["curves"]
    assert [row["adapter"] for row in curves] == list(range(1, 11))
    assert all(abs(row["ratio"] - 1) < 0.1 and row["staleness"] == 0 for row in curves)
    record = json.loads((tmp_path / "smoke/06_evaluate/run.json").read_text())
    served = json.loads((tmp_path / "smoke/06_evaluate/metrics.json").read_text())
    assert record["drawn_by"].startswith("served: env")
    for suite, summary in served["systems"]["base"].items():
        assert abs(summary["score"] - local["systems"]["base"][suite]["score"]) <= 10, suite
