"""What a finished run says of itself: its data, the parameters that it changed, its control run."""

from collections.abc import Sequence

from mig_kit.pipeline.fingerprints import digest_json
from mig_kit.pipeline.params import EXECUTION_PARAMS, NAMES_OF_RUNS, profile_params
from mig_kit.pipeline.run_folders import load_record

SFT_STAGES = ("01_synthesize", "02_sft", "03_merge")


def changed_params(run_id: str, stages: Sequence[str]) -> dict[str, dict]:
    """Stage -> its parameters that differ from the tiny profile's, for those of `stages` that have
    finished; parameters that only say how a stage ran, and where, or name a run are left out.
    """
    changed = {}
    for stage in stages:
        record = load_record(stage, run_id)
        if record is None:
            continue
        defaults = profile_params(stage)
        differing = {name: value for name, value in record["params"].items()
                     if name in defaults and value != defaults[name]
                     and name not in (*EXECUTION_PARAMS, *NAMES_OF_RUNS)}
        if differing:
            changed[stage] = differing
    return changed


def name_data(run_id: str) -> str:
    """`data` of the run's 01, "scenes" where that has not finished."""
    record = load_record("01_synthesize", run_id) or {}
    return record.get("params", {}).get("data", "scenes")


def describe_control(run_id: str) -> dict:
    """{"run_id", "model", "minutes", "changed"} of a run whose SFT model is evaluated beside
    another's; {} for "".

    model: SHA-256 over the files of its 03; minutes: of 02 and 03; changed: of `changed_params`.
    """
    if not run_id:
        return {}
    records = [load_record(stage, run_id) or {} for stage in SFT_STAGES]
    return {"run_id": run_id, "model": model_digest(run_id),
            "minutes": sum(record.get("seconds", 0) for record in records[1:]) / 60,
            "changed": changed_params(run_id, SFT_STAGES)}


def model_digest(run_id: str) -> str:
    """SHA-256 over the files of the run's SFT model, "" if its 03 has not finished."""
    record = load_record("03_merge", run_id)
    if record is None:
        return ""
    files = {name: digest for name, digest in record["outputs"].items()
             if name.startswith("merged/")}
    return digest_json(files)
