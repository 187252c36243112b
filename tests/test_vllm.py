"""Stages 04, 05 and 06 over a real vLLM: MIG_KIT_VLLM names a virtual environment that has one."""

import json
import os
import shutil
from contextlib import ExitStack

import pytest
from command_line import output_of
from local_server import running_server

from mig_kit.common import model_folder

VLLM = os.environ.get("MIG_KIT_VLLM", "")
OPTIONS = ("--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "4096",
           "--limit-mm-per-prompt", json.dumps({"image": 6}), "--generation-config", "vllm",
           "--enforce-eager", "--enable-lora", "--max-lora-rank", "128", "--max-loras", "2",
           "--logprobs-mode", "processed_logprobs", "--port")


@pytest.mark.nightly
@pytest.mark.skipif(not VLLM, reason="MIG_KIT_VLLM names no environment with vLLM")
def test_vllm_serves_rejection_sampling_grpo_and_evaluation(smoke_runs, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    run = shutil.copytree(smoke_runs / "smoke", tmp_path / "smoke")
    local = json.loads((run / "06_evaluate/metrics.json").read_text())

    def run_stage(stage, *models, changes=()):
        with ExitStack() as stack:
            urls = [stack.enter_context(running_server(
                f"{VLLM}/bin/vllm", "serve", model, "--served-model-name", name, *OPTIONS,
                seconds=600)) for name, model in models]
            output_of("run", stage, "--profile", "smoke", "--run-id", "smoke", "--force",
                      "-p", "server", " ".join(urls), "-p", "seed", "1", *changes,
                      MIG_KIT_RUNS=str(tmp_path))

    sft = ("sft", run / "03_merge/merged")
    run_stage("04", sft)
    run_stage("05", sft, changes=("-p", "max_steps", "10"))
    run_stage("06", ("base", model_folder("tiny")), sft, ("grpo", run / "05_grpo/model"))
    replies = (tmp_path / "smoke/04_rejection_sampling/replies.jsonl").read_text().splitlines()
    assert {len(json.loads(line)["replies"]) for line in replies} == {4}
    curves = json.loads((tmp_path / "smoke/05_grpo/metrics.json").read_text())["curves"]
    assert len(curves) == 10 and all(abs(row["ratio"] - 1) < 0.1 for row in curves)
    record = json.loads((tmp_path / "smoke/06_evaluate/run.json").read_text())
    served = json.loads((tmp_path / "smoke/06_evaluate/metrics.json").read_text())
    assert record["drawn_by"].startswith("served: http")
    for suite, summary in served["systems"]["base"].items():
        gap = abs(summary["score"] - local["systems"]["base"][suite]["score"])
        assert gap <= max(10, 100 / summary["n"]), suite  # of few questions one may turn
