"""Evaluated runs as comparisons read them: from their folders, or from a small file.

A recorded run is a JSON file of some kilobytes: which answers were correct, and how the run was
made. It takes the place of the run in a comparison, so that a table can be made again, and grow,
where the runs themselves are not at hand.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROJECT_ROOT, write_json
from mig_kit.pipeline import store
from mig_kit.pipeline.run_facts import changed_params, model_digest
from mig_kit.pipeline.run_folders import run_command
from mig_kit.sample import Sample
from mig_kit.stages import evaluate
from mig_kit.world import suites

# Runs that differ in one of these did not answer the same questions.
SAMPLE_PARAMS = ("eval_seed", *suites.SIZE_PARAMS.values(), "find_all_per_task", "min_pixels",
                 "max_pixels", "coordinates")
SYSTEMS = ("base", "sft", "grpo", "sft_long")  # the last: of the control run


@dataclass(frozen=True)
class EvaluatedRun:
    """What a comparison reads of a run. data_seed: the seed of 01; seed: that of 05; correct: of
    system and suite, (samples,) 0 or 1; tokens: of a reply in 05's last ten updates; minutes: of
    stages 02 to 05; start_from: what 05 trained, as its parameter says it; control: of
    `run_facts.describe_control`; questions: of `evaluate.digest_questions`, {} in older runs.
    """

    run_id: str
    data_seed: int
    seed: int
    correct: dict[str, dict[str, np.ndarray]]
    tokens: float
    minutes: float
    git: str
    machine: str
    start_from: str = "merged"
    control: dict = field(default_factory=dict)
    questions: dict[str, str] = field(default_factory=dict)


def load_evaluations(run_ids: Sequence[str]) -> dict[str, dict]:
    """Run id, or file of a recorded run -> parameters of its 06_evaluate.

    Raises FileNotFoundError for a run without one; ValueError if a model was trained again since,
    that of a control run too, or if the test samples differ.
    """
    evaluations = {}
    for run_id in run_ids:
        if is_recorded(run_id):
            evaluations[run_id] = read_recorded(run_id)["params"]
            continue
        record = store.load_record("06_evaluate", run_id)
        if record is None:
            raise FileNotFoundError(f"run '{run_id}' has no finished 06_evaluate; "
                                    f"run: {run_command('06_evaluate', run_id)}")
        if stale_input := store.find_stale_input("06_evaluate", run_id):
            raise ValueError(f"the scores of run '{run_id}' are of a model before {stale_input} "
                             f"was run again; run: {run_command('06_evaluate', run_id)}")
        control = record.get("control", {})
        now = model_digest(control["run_id"]) if control else ""
        if now and now != control["model"]:
            raise ValueError(f"run '{run_id}' was evaluated beside an earlier model of its control "
                             f"run '{control['run_id']}'; run its 06 again, or bring that model "
                             "back")
        evaluations[run_id] = record["params"]
    for name in SAMPLE_PARAMS:
        by_run = {run: params.get(name, 0) for run, params in evaluations.items()}
        if len(set(by_run.values())) > 1:
            values = ", ".join(f"{run} {value}" for run, value in by_run.items())
            raise ValueError(f"the runs were not evaluated on the same samples: {name} is {values}")
    parts = {run: _held_out_part(run, params) for run, params in evaluations.items()}
    if len(set(parts.values())) > 1:
        raise ValueError("the runs were not scored on the same held-out part of own data: "
                         f"{', '.join(parts)}; compare runs of one 01_synthesize")
    return evaluations


def _held_out_part(run_id: str, params: dict) -> tuple | None:
    """What tells the held-out questions of own data from others; None for a run without such."""
    if is_recorded(run_id) or not evaluate.name_own_data(run_id):
        return None
    outputs = store.load_record("01_synthesize", run_id)["outputs"]
    return outputs["val.parquet"], params["held_out_samples"]


def load_groups(groups: dict[str, list[str]]) -> tuple[
        dict[str, list[Sample]], dict[str, list[EvaluatedRun]]]:
    """(samples by suite, runs by group); raises as `load_evaluations`, and ValueError for a run
    that answered other questions than the parameters draw now.
    """
    evaluations = load_evaluations([run for members in groups.values() for run in members])
    first_run, params = next(iter(evaluations.items()))
    box_format = BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
    samples = (evaluate.draw_test_samples(params) if is_recorded(first_run)
               else evaluate.load_test_samples(first_run, params))
    runs = {name: [_load_run(run, samples, box_format) for run in members]
            for name, members in groups.items()}
    _refuse_other_questions([run for members in runs.values() for run in members], samples)
    return samples, runs


def _refuse_other_questions(runs: list[EvaluatedRun], samples: dict[str, list[Sample]]) -> None:
    now = evaluate.digest_questions(samples) if any(run.questions for run in runs) else {}
    for run in runs:
        for suite, digest in run.questions.items():
            if digest != now.get(suite, digest):
                raise ValueError(f"run '{run.run_id}' answered other questions of {suite} than the "
                                 "same parameters draw now; compare it with the code of its "
                                 "commit, or run its 06 again")


def _load_run(run_id: str, samples: dict[str, list[Sample]],
              box_format: BoxFormat) -> EvaluatedRun:
    if is_recorded(run_id):
        return _restore_run(run_id, samples)
    record = store.load_record("06_evaluate", run_id)
    trained = store.load_record("05_grpo", run_id) or {}
    stages = [store.load_record(stage, run_id) or {} for stage in store.RECIPE[2:6]]
    curves = store.read_metrics(store.stage_folder("05_grpo", run_id)).get("curves", [])
    lengths = [row["length"] for row in curves[-10:] if row.get("length") is not None]
    control = record.get("control", {})
    has_model = {"sft": store.has_cold_start(run_id), "sft_long": bool(control)}
    correct = {system: {suite: _correctness(run_id, system, suite, samples[suite], box_format)
                        for suite in samples}
               for system in SYSTEMS if has_model.get(system, True)}
    seed = trained.get("params", {}).get("seed", 0)
    synthesized = store.load_record("01_synthesize", run_id) or {}
    return EvaluatedRun(
        run_id, synthesized.get("params", {}).get("seed", seed), seed, correct,
        float(np.mean(lengths)) if lengths else float("nan"),
        sum(stage.get("seconds", 0) for stage in stages) / 60,
        record.get("git", ""), record.get("machine", ""),
        trained.get("params", {}).get("start_from", "merged"), control,
        record.get("questions", {}))


def _correctness(run_id: str, system: str, suite: str, samples: list[Sample],
                 box_format: BoxFormat) -> np.ndarray:
    folder = store.stage_folder("06_evaluate", run_id) / "replies"
    lines = (folder / f"{system}_{suite}_greedy.jsonl").read_text().splitlines()
    replies = {row["id"]: row["replies"][0] for row in map(json.loads, lines)}
    if missing := [sample.id for sample in samples if sample.id not in replies]:
        raise ValueError(f"run '{run_id}' lacks {system}'s replies to {len(missing)} samples, such "
                         f"as {missing[0]}; add --force and run: "
                         f"{run_command('06_evaluate', run_id)}")
    return np.array([evaluate.reply_is_correct(replies[sample.id], sample, box_format)
                     for sample in samples])


def is_recorded(name: str) -> bool:
    """Whether a member of a group is the file of a recorded run, not a run id."""
    return name.endswith(".json")


def record_run(run_id: str, folder: Path) -> Path:
    """Write FOLDER/RUN_ID.json, a recorded run, and give its path.

    It holds the run's seeds, figures, machine and commit, the correctness of every greedy reply as
    "0" and "1" in the order of the samples, and per stage the parameters that differ from the tiny
    profile's. Raises as `load_evaluations`; ValueError for a run that was scored on own data, whose
    questions cannot be drawn again.
    """
    if is_recorded(run_id):
        raise ValueError(f"{run_id} is a recorded run already; name a run")
    params = load_evaluations([run_id])[run_id]
    if data := evaluate.name_own_data(run_id):
        raise ValueError(f"run '{run_id}' was scored on own data ({data}), whose questions are not "
                         "in the record; only runs on drawn suites can be recorded")
    box_format = BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
    samples = evaluate.load_test_samples(run_id, params)
    run = _load_run(run_id, samples, box_format)
    _refuse_other_questions([run], samples)
    fields = asdict(run)
    fields["correct"] = {system: {suite: "".join(str(int(value)) for value in values)
                                  for suite, values in by_suite.items()}
                         for system, by_suite in run.correct.items()}
    fields["params"] = {name: params.get(name, 0) for name in SAMPLE_PARAMS}
    fields["changed"] = changed_params(run_id, store.RECIPE[1:7])
    path = folder / f"{run_id}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, fields)
    return path


def read_recorded(path: str) -> dict:
    """The fields of a recorded run; FileNotFoundError or ValueError with one sentence.

    path: relative to the working directory or, as a notebook's parameter, to the project.
    """
    file = next((file for file in (Path(path), PROJECT_ROOT / path) if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"there is no recorded run {path}; make one with mig-kit record")
    try:
        fields = json.loads(file.read_text())
        # Older files name these two only among the changed parameters.
        for name, stage, parameter, default in (("data_seed", "01_synthesize", "seed", 0),
                                                ("start_from", "05_grpo", "start_from", "merged")):
            changed = fields.get("changed", {}).get(stage, {})
            fields.setdefault(name, changed.get(parameter, default))
        fields.setdefault("control", {})
        fields.setdefault("questions", {})
        missing = [name for name in (*EvaluatedRun.__annotations__, "params") if name not in fields]
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no recorded run ({error}); make it again with mig-kit record"
                         ) from None
    if missing:
        raise ValueError(f"{path} is no recorded run: it lacks {missing[0]}; make it again with "
                         "mig-kit record")
    return fields


def _restore_run(path: str, samples: dict[str, list[Sample]]) -> EvaluatedRun:
    fields = read_recorded(path)
    correct = {}
    for system, by_suite in fields["correct"].items():
        correct[system] = {}
        for suite, suite_samples in samples.items():
            bits = by_suite.get(suite, "")
            is_fitting = isinstance(bits, str) and len(bits) == len(suite_samples)
            if not is_fitting or set(bits) - {"0", "1"}:
                raise ValueError(f"{path} does not fit the suite {suite} of "
                                 f"{len(suite_samples)} questions; make it again with mig-kit "
                                 "record")
            correct[system][suite] = np.array([float(bit) for bit in bits])
    values = {name: fields[name] for name in EvaluatedRun.__annotations__ if name != "correct"}
    return EvaluatedRun(**values, correct=correct)
