"""Evaluated runs as comparisons read them, from their folders or from recorded runs.

A recorded run is a JSON file of some kilobytes that takes the place of the run's folder: which
answers were correct, and how the run was made.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from mig_kit.boxes import BoxFormat
from mig_kit.common import PROJECT_ROOT, UserError, write_json
from mig_kit.pipeline import store
from mig_kit.pipeline.params import default_params
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS
from mig_kit.sample import Sample
from mig_kit.serving.stored_replies import load_replies, reply_file
from mig_kit.stages import evaluate
from mig_kit.world.suites import suite_title

# Runs that differ in one of these did not answer the same questions.
SAMPLE_PARAMS = ("eval_seed", "suites", "min_pixels", "max_pixels", "coordinates")
SYSTEMS = ("base", "sft", "grpo")
MARGINS = "notebooks/guide/margins.json"  # suite -> points of RL over SFT, of each run


@dataclass(frozen=True)
class EvaluatedRun:
    """What a comparison reads of a run."""

    run_id: str
    data_seed: int  # of 01
    seed: int  # of 05
    correct: dict[str, dict[str, str]]  # by system and suite: "1" or "0" for each sample
    tokens: float  # of a reply in 05's last ten updates
    minutes: float  # of stages 02 to 05
    git: str
    machine: str
    version: str  # of mig-kit
    params: dict  # SAMPLE_PARAMS of 06
    start_from: str = "merged"  # what 05 trained
    questions: dict[str, str] = field(default_factory=dict)  # of `evaluate.digest_questions`
    changed: dict[str, dict] = field(default_factory=dict)  # of `changed_params`
    stale: list[str] = field(default_factory=list)  # of `Run.notes`
    # by system and suite: truth and grounded of `evaluate.summarize_reasoning`
    reasoning: dict[str, dict[str, dict]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # percent, as 06 wrote them
    processor_seconds: float | None = None  # of stages 02 to 05; None where a part was not seen


def load_groups(groups: dict[str, list[str]]) -> tuple[
        dict[str, list[Sample]], dict[str, list[EvaluatedRun]]]:
    """(samples by suite, runs by group); groups: name -> run ids or files of recorded runs.

    Raises: UserError for a run without a finished 06, and if runs answered different
    questions, or others than are drawn now, or if a model was trained again since.
    """
    asked = {run: _asked(run) for group in groups.values() for run in group}
    first, params = next(iter(asked.items()))
    for name, value in params.items():
        if any(of_run[name] != value for of_run in asked.values()):
            values = ", ".join(f"{run} {of_run[name]}" for run, of_run in asked.items())
            raise UserError(f"the runs were not evaluated on the same samples: {name} is {values}")
    samples = (evaluate.draw_test_samples(params) if is_recorded(first)
               else evaluate.load_test_samples(first, params))
    runs = {name: [_load_run(run, samples) for run in group] for name, group in groups.items()}
    loaded = [run for group in runs.values() for run in group]
    now = evaluate.digest_questions(samples) if any(run.questions for run in loaded) else {}
    for run in loaded:
        for suite, digest in run.questions.items():
            if digest != now.get(suite, digest):
                raise UserError(f"run '{run.run_id}' answered other questions of {suite} than the "
                                "same parameters draw now; compare it with the code of its "
                                "commit, or run its 06 again")
    return samples, runs


def _asked(run_id: str) -> dict:
    """What decides which questions a run answered: SAMPLE_PARAMS, and the file of own data."""
    if is_recorded(run_id):
        return read_recorded(run_id).params | {"own data": ""}
    run = Run(run_id)
    record = run.require("06_evaluate", "mig-kit table")
    held_out = (run.record("01_synthesize")["outputs"]["val.parquet"]
                if evaluate.has_own_data(run_id) else "")
    return _sample_params(record["params"]) | {"own data": held_out}


def _sample_params(params: dict) -> dict:
    """SAMPLE_PARAMS of the parameters of 06."""
    drawn = {name: size for name, size in params["suites"].items() if size}
    return {name: params[name] for name in SAMPLE_PARAMS} | {"suites": drawn}


def _load_run(run_id: str, samples: dict[str, list[Sample]]) -> EvaluatedRun:
    if is_recorded(run_id):
        return read_recorded(run_id)
    run = Run(run_id)
    record = run.record("06_evaluate")
    params, folder = record["params"], run.stage_folder("06_evaluate")
    box_format = BoxFormat(params["min_pixels"], params["max_pixels"], params["coordinates"])
    stages = {stage: run.record(stage) or {} for stage in RECIPE[1:6]}
    trained, synthesized = (stages[name].get("params", {}) for name in ("05_grpo", "01_synthesize"))
    seed, has_sft = trained.get("seed", 0), run.has_cold_start
    curves = store.read_metrics(run.stage_folder("05_grpo")).get("curves", [])
    lengths = [row["length"] for row in curves[-10:] if row.get("length") is not None]
    summaries = store.read_metrics(folder)["systems"]
    spent = [stage.get("processor_seconds") for name, stage in stages.items()
             if name > "02" and stage]
    return EvaluatedRun(
        run_id, synthesized.get("seed", seed), seed,
        {system: {suite: _correctness(folder / "replies", system, suite, part, box_format)
                  for suite, part in samples.items()}
         for system in SYSTEMS if has_sft or system != "sft"},
        float(np.mean(lengths or [np.nan])),
        sum(stage.get("seconds", 0) for name, stage in stages.items() if name > "02") / 60,
        record.get("git", ""), record.get("machine", ""),
        record.get("versions", {}).get("mig-kit", ""), _sample_params(params),
        trained.get("start_from", "merged"), record.get("questions", {}),
        changed_params(run_id, RECIPE[1:7]), run.notes("06_evaluate"),
        {system: {suite: summary["reasoning"] for suite, summary in by_suite.items()
                  if summary.get("reasoning")} for system, by_suite in summaries.items()},
        {system: {suite: summary["score"] for suite, summary in by_suite.items()}
         for system, by_suite in summaries.items()},
        None if None in spent else round(sum(spent), 1))


def _correctness(folder: Path, system: str, suite: str, samples: list[Sample],
                 box_format: BoxFormat) -> str:
    replies = load_replies(reply_file(folder, system, suite))
    return "".join(str(int(evaluate.reply_is_correct(replies[sample.id][0], sample, box_format)))
                   for sample in samples)


def is_recorded(name: str) -> bool:
    """Whether a member of a group is a recorded run's file, not a run id."""
    return name.endswith(".json")


def record_run(run_id: str, folder: Path) -> Path:
    """Write FOLDER/RUN_ID.json, a recorded run; UserError as `load_groups`, and for own data."""
    _, runs = load_groups({run_id: [run_id]})
    if evaluate.has_own_data(run_id):
        raise UserError(f"run '{run_id}' was scored on own data, whose questions are not in the "
                        "record; only runs on drawn suites can be recorded")
    path = folder / f"{run_id}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(runs[run_id][0]))
    return path


def read_recorded(path: str) -> EvaluatedRun:
    """A recorded run; path: relative to the working directory or to the project.

    Raises UserError.
    """
    file = Path(path) if Path(path).is_file() else PROJECT_ROOT / path
    try:
        return TypeAdapter(EvaluatedRun).validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError) as error:
        raise UserError(f"{path} is no file of evaluated_runs.record_run; name a run, or another "
                        "file") from error


def changed_params(run_id: str, stages: Sequence[str]) -> dict[str, dict]:
    """Finished stage -> its parameters that differ from the defaults and change results."""
    changed = {}
    for stage in stages:
        params, defaults = Run(run_id).params(stage), default_params(stage)
        if values := {name: value for name, value in params.items()
                      if name not in EXECUTION_PARAMS and value != defaults.get(name, value)}:
            changed[stage] = values
    return changed


def pair_runs(runs: Sequence[EvaluatedRun],
              others: Sequence[EvaluatedRun]) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """The (run, other) pairs that share the seed of 01, which decides the traces; where a group has
    several runs of such a seed, as draws of RL from one cold start, those that share all seeds.

    Exactly one run of each group must have the seed. A single pair counts only if each group is
    one run.
    """
    for key in (lambda run: run.data_seed, lambda run: (run.data_seed, run.seed)):
        by_seed = defaultdict(lambda: ([], []))
        for side, group in enumerate((runs, others)):
            for run in group:
                by_seed[key(run)][side].append(run)
        pairs = [(mine[0], theirs[0]) for mine, theirs in by_seed.values()
                 if len(mine) == len(theirs) == 1]
        if len(pairs) > 1 or pairs and len(runs) == len(others) == 1:
            return pairs
    return []


def list_notes(runs: dict[str, list[EvaluatedRun]], reference: str, system: str) -> list[str]:
    """Sentences that keep a reader from too sure a conclusion; runs: of each group."""
    single = [name for name, members in runs.items() if len(members) == 1]
    sharing = [name for name, members in runs.items()
               if len({run.data_seed for run in members}) < len(members)]
    unpaired = [name for name in runs
                if name != reference and not pair_runs(runs[name], runs[reference])]
    groups = {  # a sentence -> the groups that it is about
        "One run each, whose intervals are over questions alone; another seed may move a score by "
        "more": single * (system != "base"),
        "Runs with the same seed of 01 may share a cold start, and are counted as independent":
            sharing * (system != "base"),
        f"Not compared with {reference} seed by seed, for no two pairs of runs share seeds; such "
        "runs come of mig-kit run --run-id NAME-SEED -p seed SEED, with the same seeds in both "
        "groups": unpaired}
    notes = [f"{text}: {', '.join(names)}." for text, names in groups.items() if names]
    return notes + [f"{note}." for members in runs.values() for run in members
                    for note in run.stale]


def check_margins(run_id: str) -> tuple[str, bool]:
    """A line for each of RL's margins over SFT beside the range of recorded seeds; is one outside?

    A margin lies outside if its whole interval does. ("", False) for a run with other parameters
    than the recipe's, or without a finished 06.
    """
    file, run = PROJECT_ROOT / MARGINS, Run(run_id)
    if not run.record("06_evaluate") or not file.is_file() or changed_params(run_id, RECIPE[1:7]):
        return "", False
    metrics = store.read_metrics(run.stage_folder("06_evaluate"))
    texts, is_outside = [], False
    for suite, margins in json.loads(file.read_text()).items():
        gap, lowest, highest = metrics["deltas"]["grpo-sft"][suite], min(margins), max(margins)
        low, high = gap["ci95"]
        this_outside = high < lowest or low > highest
        is_outside |= this_outside
        texts.append(f"RL over SFT, {suite_title(suite)}: {gap['value']:+.1f} points ({low:+.1f} "
                     f"to {high:+.1f}); seeds of results.md: {lowest:+.1f} to {highest:+.1f}"
                     + ": OUTSIDE" * this_outside)
    return "\n".join(texts), is_outside
