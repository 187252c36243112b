"""Stage 00."""

import pytest

from mig_kit.engine import models
from mig_kit.stages import preflight


def test_too_small_a_machine_is_one_sentence():
    machine = {"available_gib": 1.5, "disk_free_gib": 0.2}
    with pytest.raises(MemoryError, match="needs 4 GiB of memory and 1.5 GiB are free"):
        preflight.require_resources(machine, 4.0, 0.1)
    with pytest.raises(OSError, match="MIG_KIT_RUNS"):
        preflight.require_resources(machine, 1.0, 1.0)
    preflight.require_resources(machine, 1.0, 0.1)
    with pytest.raises(RuntimeError, match="needs a GPU, and PyTorch .* sees none"):
        preflight.require_resources({"gpu": "none", **machine}, 1.0, 0.1, needs_gpu=True)
    preflight.require_resources({"gpu": "A100", **machine}, 1.0, 0.1, needs_gpu=True)


def test_expected_minutes_scale_with_the_machine():
    same, slow = (preflight.predict_minutes(factor * preflight.REFERENCE_SECONDS)
                  for factor in (1, 3))
    costs = [minutes for minutes, _ in preflight.TINY_COST.values()]
    assert [row["minutes"] for row in same] == costs
    assert [row["minutes"] for row in slow] == [round(3 * minutes, 1) for minutes in costs]
    assert 0 < preflight.time_reference_step(models.choose_hardware("float32"), 1) < 60


def test_the_machine_is_described_even_where_no_run_exists_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "none" / "yet"))
    machine = preflight.describe_machine()
    assert machine["cpus"] > 0 and machine["memory_gib"] > 0 and machine["disk_free_gib"] > 0


def test_the_summary_counts_hours_where_a_gpu_is_needed():
    assert preflight.summary("tiny", 24.4, []) == "about 24 minutes in all"
    hours = [{"stage": "02_sft", "drawn by": "", "80 GB: H100": 1.0},
             {"stage": "05_grpo", "drawn by": "the kit", "80 GB: H100": 3.4},
             {"stage": "05_grpo", "drawn by": "a server", "80 GB: H100": 1.0}]
    expected = "profile large: predicted at most 4 hours in all on an 80 GB, 2 with a server"
    assert preflight.summary("large", 24.4, hours) == expected
