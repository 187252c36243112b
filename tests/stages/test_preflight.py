"""Stage 00."""

import pytest

from mig_kit.common import NOTEBOOKS
from mig_kit.models import loading
from mig_kit.stages import preflight


def test_too_small_a_machine_is_one_sentence():
    machine = {"available_gib": 1.5, "disk_free_gib": 0.2}
    with pytest.raises(ValueError, match="needs 4 GiB of memory and 1.5 GiB are free"):
        preflight.require_resources(machine, 4.0, 0.1)
    with pytest.raises(ValueError, match="MIG_KIT_RUNS"):
        preflight.require_resources(machine, 1.0, 1.0)
    preflight.require_resources(machine, 1.0, 0.1)
    with pytest.raises(ValueError, match="needs a GPU, and PyTorch .* sees none"):
        preflight.require_resources({"gpu": "none", **machine}, 1.0, 0.1, needs_gpu=True)
    preflight.require_resources({"gpu": "A100", **machine}, 1.0, 0.1, needs_gpu=True)


def test_expected_minutes_scale_with_the_machine():
    for scale in (1, 3):
        rows = preflight.predict_minutes(scale * preflight.REFERENCE_SECONDS)
        assert {row["stage"]: row["minutes"] for row in rows} == {
            stage: round(scale * cost, 1) for stage, (cost, _) in preflight.TINY_COST.items()}
    assert 0 < preflight.time_reference_step(loading.choose_hardware("float32"), 1) < 60


def test_the_machine_is_described_even_where_no_run_exists_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "none" / "yet"))
    machine = preflight.measure_machine()
    assert machine["cpus"] > 0 and machine["memory_gib"] > 0 and machine["disk_free_gib"] > 0


def test_the_measured_peaks_are_those_of_the_guide():
    page = (NOTEBOOKS / "guide" / "real_run.md").read_text()
    for profile, peaks in preflight.MEASURED_PEAKS.items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{profile}` |"))
        assert [float(cell) for cell in row.split("|")[2:5]] == list(peaks.values())[1:]
