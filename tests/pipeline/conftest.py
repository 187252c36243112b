"""A folder of runs, and what finished stages leave in it."""

import time
from contextlib import suppress

import papermill
import pytest

from mig_kit.common import UserError, file_sha256, write_json
from mig_kit.pipeline.params import validate_params
from mig_kit.pipeline.runs import Run


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs, in which no kernel may start."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(papermill, "execute_notebook",
                        lambda *arguments, **options: pytest.fail("a kernel would start"))
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def leave(root):
    """Call it with a stage: what it leaves when it has finished, one product and new metrics."""
    def leave_stage(stage: str, run_id: str = "a", product: str = "1", **values):
        folder = root / run_id / stage
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "metrics.json", {"product": product, "seconds": time.time_ns()})
        (folder / "x").write_text(product)
        record = {"params": validate_params(values, stage), "facts": {},
                  "summary": product, "stats": {},
                  "seconds": 60.0, "started": "2026-01-02T03:04:05Z", "inputs": {}, "versions": {},
                  "outputs": {name: file_sha256(folder / name) for name in ("x", "metrics.json")}}
        write_json(folder / "run.json", record)
        with suppress(UserError):  # a stage before it is not there
            record["facts"] = Run(run_id).stage_facts(stage, record["params"])
            write_json(folder / "run.json", record)
        return folder

    return leave_stage
