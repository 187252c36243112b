"""Stage 00."""

import pytest

from mig_kit.engine import models
from mig_kit.stages import preflight


def test_too_small_a_machine_is_one_sentence():
    found = {"available_gib": 1.5, "disk_free_gib": 0.2}
    with pytest.raises(MemoryError, match="needs 4 GiB of memory and 1.5 GiB are free"):
        preflight.require_resources(found, 4.0, 0.1)
    with pytest.raises(OSError, match="MIG_KIT_RUNS"):
        preflight.require_resources(found, 1.0, 1.0)
    preflight.require_resources(found, 1.0, 0.1)


def test_expected_minutes_scale_with_the_machine():
    same, slow = preflight.predict_minutes(preflight.REFERENCE_PACE), preflight.predict_minutes(3 * preflight.REFERENCE_PACE)
    assert [row["minutes"] for row in same] == [m for m, _ in preflight.TINY_COST.values()]
    assert [row["minutes"] for row in slow] == [round(3 * m, 1) for m, _ in preflight.TINY_COST.values()]
    assert 0 < preflight.time_reference_step(models.choose_hardware("float32"), 1) < 60
