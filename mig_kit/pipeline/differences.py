"""What differs between two runs: parameters, inputs, versions, machine and metrics."""

from mig_kit.pipeline import store
from mig_kit.pipeline.run_folders import require_runs

WIDEST = 44  # characters of a column; a longer word moves the rest of its line
MANY = 40  # a mapping with more entries holds one value per sample, so it is no metric


def list_differences(first: str, second: str) -> list[dict]:
    """Rows {stage, what, name, a, b}, in order of stage; None where a run lacks a value.

    Raises FileNotFoundError for a run that does not exist.
    """
    require_runs(first, second)
    rows = []
    for stage in store.STAGES:
        is_finished = [store.load_record(stage, run_id) is not None for run_id in (first, second)]
        if all(is_finished):
            rows += _stage_differences(stage, first, second)
        elif any(is_finished):
            rows.append({"stage": stage, "what": "stage", "name": "finished",
                         "a": is_finished[0], "b": is_finished[1]})
    return rows


def format_differences(rows: list[dict], first: str, second: str) -> list[str]:
    """Lines of the rows of `list_differences` in columns, under a header with the runs' names."""
    if not rows:
        return ["no difference"]
    table = [["stage", "what", "name", first, second],
             *([" ".join(str(value).split()) for value in row.values()] for row in rows)]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*table)]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths)).rstrip()
             for row in table]
    return [*lines, f"{len(rows)} differences"]


def _stage_differences(stage: str, first: str, second: str) -> list[dict]:
    facts, other_facts = stage_facts(stage, first), stage_facts(stage, second)
    return [{"stage": stage, "what": what, "name": name, "a": values.get(name),
             "b": other_facts[what].get(name)}
            for what, values in facts.items()
            for name in {**values, **other_facts[what]}
            if values.get(name) != other_facts[what].get(name)]


def stage_facts(stage: str, run_id: str) -> dict[str, dict]:
    """A finished stage's facts by kind: parameter, input (hashes), version, machine, metric."""
    record = store.load_record(stage, run_id)
    folder = store.stage_folder(stage, run_id)
    has_metrics = (folder / "metrics.json").is_file()
    inputs = {f"{earlier}/{name}": digest[:8]
              for earlier, files in record["inputs"].items() for name, digest in files.items()
              if name not in ("metrics.json", "started.json")}  # these hold times and run names
    return {
        "parameter": {name: value for name, value in record["params"].items() if name != "run_id"},
        "input": inputs,
        "version": record["versions"],
        "machine": {name: record.get(name, "") for name in ("machine", "hardware", "git")},
        "metric": flatten(store.read_metrics(folder)) if has_metrics else {},
    }


def flatten(data: dict, prefix: str = "") -> dict[str, float | str | None]:
    """Scalars of a nested mapping under dotted names.

    Lists, and mappings of more than MANY entries, are left out.
    """
    scalars = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            scalars |= flatten(value, f"{name}.") if len(value) <= MANY else {}
        elif not isinstance(value, list):
            scalars[name] = value
    return scalars
