"""What differs between two runs: parameters, inputs, versions, machine, and the metrics that came out (`mig-kit diff`)."""

import json
from pathlib import Path

from mig_kit.pipeline import store

MANY = 40  # a mapping with more entries is one value per sample, not a metric


def flatten(data: dict, prefix: str = "") -> dict[str, float | str | None]:
    """Scalars of a nested mapping under dotted names; lists and mappings of more than MANY entries are left out."""
    found = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            found |= flatten(value, f"{name}.") if len(value) <= MANY else {}
        elif not isinstance(value, list):
            found[name] = value
    return found


def stage_facts(stage: str, run_id: str) -> dict[str, dict]:
    """A finished stage's facts by kind: parameter, input (hashes of files), version, machine, metric."""
    record = store.load_record(stage, run_id)
    metrics = Path(store.runs_root(), run_id, stage, "metrics.json")
    return {
        "parameter": {k: v for k, v in record["params"].items() if k != "run_id"},
        "input": {f"{earlier}/{name}": digest[:8] for earlier, files in record["inputs"].items() for name, digest in files.items()
                  if name not in ("metrics.json", "started.json")},  # which hold times and the run's name
        "version": record["versions"],
        "machine": {k: record.get(k, "") for k in ("machine", "hardware", "git")},
        "metric": flatten(json.loads(metrics.read_text())) if metrics.is_file() else {},
    }


def list_differences(one: str, other: str) -> list[dict]:
    """Rows {stage, what, name, a, b}, in order of stage; None where a run does not have it.

    Raises FileNotFoundError for a run that does not exist.
    """
    for run_id in (one, other):
        if not (store.runs_root() / run_id).is_dir():
            raise FileNotFoundError(f"no run '{run_id}' in {store.runs_root()}; mig-kit status lists the runs")
    rows = []
    for stage in store.STAGES:
        done = [store.load_record(stage, run_id) is not None for run_id in (one, other)]
        if not all(done):
            if any(done):
                rows.append({"stage": stage, "what": "stage", "name": "finished", "a": done[0], "b": done[1]})
            continue
        a, b = stage_facts(stage, one), stage_facts(stage, other)
        for what in a:
            for name in {**a[what], **b[what]}:
                left, right = a[what].get(name), b[what].get(name)
                if left != right:
                    rows.append({"stage": stage, "what": what, "name": name, "a": left, "b": right})
    return rows
