"""The prediction of memory and minutes on a CPU: lengths as drawn, and how rates and dtype act."""

from types import SimpleNamespace

import pytest
import torch

from mig_kit.engine import jobs
from mig_kit.engine.models import Hardware
from mig_kit.speed import cpu_needs, gpu_needs
from mig_kit.speed.cpu_needs import Lengths, Rates

THREE = gpu_needs.SHAPES["Qwen/Qwen2.5-VL-3B-Instruct"]
BFLOAT16 = Hardware("cpu", torch.bfloat16, False, "sdpa", "for tests")
FLOAT32 = Hardware("cpu", torch.float32, False, "sdpa", "for tests")
LENGTHS = Lengths(120.0, 30.0, 52.0, 178, 85)
RATES = Rates(1e11, 1e10, 1e9, 1e8)
STAGES = ["02_sft", "03_merge", "04_rejection_sampling", "05_grpo", "06_evaluate"]


@pytest.fixture
def smoke(monkeypatch):
    """The smoke profile, on a machine with two cores and no GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(jobs, "count_cores", lambda: 2)
    return gpu_needs.read_profile("smoke")


def predict(params, hardware=BFLOAT16, rates=RATES, column="memory_gib") -> dict[str, float]:
    rows = cpu_needs.predict_on_cpu(THREE, params, hardware, rates, LENGTHS, LENGTHS)
    return {row["stage"]: row[column] for row in rows}


def test_weights_are_in_memory_as_often_as_processes_hold_them(smoke):
    launcher = "torchrun --standalone --nproc-per-node 2"
    twice = smoke._replace(grpo=SimpleNamespace(**vars(smoke.grpo) | {"launcher": launcher}))
    weights = THREE.total * 2 / gpu_needs.GIB
    memory = predict(smoke)
    assert list(memory) == STAGES
    assert all(weights + cpu_needs.RUNTIME_GIB < gib < 2.6 * weights for gib in memory.values())
    assert predict(twice)["05_grpo"] > 1.8 * memory["05_grpo"], "torchrun starts two"
    private = predict(smoke, column="private_gib")
    for stage in ("04_rejection_sampling", "05_grpo", "06_evaluate"):
        assert cpu_needs.RUNTIME_GIB < private[stage] < memory[stage], "bfloat16 is mapped"
    float32 = predict(smoke, FLOAT32)
    assert predict(smoke, FLOAT32, column="private_gib")["06_evaluate"] == float32["06_evaluate"]
    assert all(float32[stage] > memory[stage] + 0.5 * weights for stage in STAGES[1:])


def test_memory_grows_with_what_is_in_it(smoke):
    before = predict(smoke)
    for name, stage, changes in (
            ("sft", "02_sft", {"per_device_train_batch_size": 16}),
            ("sampling", "04_rejection_sampling", {"replies": 32}),
            ("grpo", "05_grpo", {"num_generations": 32, "micro_replies": 32,
                                 "per_device_train_batch_size": 64}),
            ("evaluate", "06_evaluate", {"batch_size": 512, "max_new_tokens": 400})):
        changed = SimpleNamespace(**vars(getattr(smoke, name)) | changes)
        after = predict(smoke._replace(**{name: changed}))
        assert {other for other in STAGES if after[other] > before[other]} == {stage}


def test_minutes_by_rates(smoke):
    slow = predict(smoke, rates=Rates(1e10, 1e9, 1e8, 1e7), column="minutes")
    fast = predict(smoke, column="minutes")
    assert all(slow[stage] > 4 * fast[stage] for stage in ("04_rejection_sampling", "06_evaluate"))
    unpacking = predict(smoke, rates=Rates(1e11, 1e10, 1e8, 1e8), column="minutes")
    assert [stage for stage in STAGES if unpacking[stage] > fast[stage]] == STAGES[:2]
    # 12 batches of 4 rows, each unpacked forward and backward, 24 tokens of a reply
    steps = 12 * 2 + 24
    extra = THREE.linear_weights * (1 / 1e8 - 1 / 1e9) * steps / 60
    assert unpacking["02_sft"] - fast["02_sft"] == pytest.approx(extra, abs=0.11)


def test_what_is_not_done_takes_no_time(smoke):
    before = predict(smoke, column="minutes")
    grpo = SimpleNamespace(**vars(smoke.grpo) | {"rollout_steps": 0})
    assert predict(smoke._replace(grpo=grpo), column="minutes")["05_grpo"] < before["05_grpo"]
    few = SimpleNamespace(**vars(smoke.merge) | {"probe_samples": 1})
    assert predict(smoke._replace(merge=few), column="minutes")["03_merge"] < before["03_merge"]
    none = SimpleNamespace(**vars(smoke.evaluate) | {
        "mig_per_task": 0, "ood_per_task": 0, "blink_per_task": 0, "mmiu_per_task": 0})
    left = predict(smoke._replace(evaluate=none), column="minutes")["06_evaluate"]
    assert 0 < left < 0.5 * before["06_evaluate"], "models are loaded, and nothing is asked"


def test_drawn_suites_have_lengths_of_their_own(smoke):
    """Own photos are long prompts; the drawn scenes that 06 asks as well are short ones."""
    own = SimpleNamespace(**vars(smoke.synthesize) | {"data": "own", "data_limit": 30})
    smoke = smoke._replace(synthesize=own)
    photos = Lengths(1058.0, 988.0, 41.0, 1058, 41)

    def minutes(lengths, drawn_lengths):
        rows = cpu_needs.predict_on_cpu(THREE, smoke, BFLOAT16, RATES, lengths, drawn_lengths)
        return rows[-1]["minutes"]

    assert minutes(LENGTHS, LENGTHS) < minutes(photos, LENGTHS) < minutes(photos, photos)


def test_rates_and_lengths_are_measured_here(smoke, processor):
    rates = cpu_needs.measure_rates(FLOAT32)
    assert min(rates.flops, rates.weight_bytes, rates.unpacked, rates.packed) > 1e6
    lengths = cpu_needs.measure_lengths(smoke)
    assert 0 < lengths.images < lengths.prompt <= lengths.longest_prompt
    assert 10 < lengths.trace <= lengths.longest_trace
    own = SimpleNamespace(**vars(smoke.synthesize) | {"data": "own", "max_pixels": 784 * 100})
    assert cpu_needs.measure_lengths(smoke._replace(synthesize=own)).longest_prompt == 800


def test_only_a_folder_on_a_cpu_is_predicted(random_folder):
    assert cpu_needs.predict("smoke", FLOAT32) == cpu_needs.predict("qwen2_5_vl_3b", FLOAT32) == []
    gpu = Hardware("cuda", torch.bfloat16, False, "sdpa", "for tests")
    assert cpu_needs.predict("smoke", gpu, str(random_folder)) == []
    rows = cpu_needs.predict("smoke", FLOAT32, str(random_folder))
    assert [row["stage"] for row in rows] == STAGES
    assert all(row["minutes"] >= 0 and 0.5 < row["memory_gib"] < 6 for row in rows)
