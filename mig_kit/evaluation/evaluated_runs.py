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
import pandas as pd
from pydantic import TypeAdapter, ValidationError

from mig_kit.common import PROJECT_ROOT, UserError, write_json
from mig_kit.evaluation.items import QUESTION, pick, read_items
from mig_kit.pipeline import store
from mig_kit.pipeline.params import default_params, find_changed
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run
from mig_kit.world.suites import SUITES, suite_title

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
    params: dict  # SAMPLE_PARAMS of 06; of a model that mig-kit eval asked those of 06 alone
    start_from: str = "merged"  # what 05 trained
    questions: dict[str, str] = field(default_factory=dict)  # of `evaluate.digest_questions`
    changed: dict[str, dict] = field(default_factory=dict)  # of `changed_params`
    stale: list[str] = field(default_factory=list)  # of `Run.notes`
    # by system and suite: all figures of `items.summarize_reasoning`
    reasoning: dict[str, dict[str, dict]] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)  # percent, as 06 wrote them
    processor_seconds: float | None = None  # of stages 02 to 05; None where a part was not seen


def load_groups(groups: dict[str, list[str]]) -> tuple[
        pd.MultiIndex, dict[str, list[EvaluatedRun]]]:
    """(what the runs were asked, runs by group); groups: name -> run ids or recorded runs' files.

    The index has a row for each place of `EvaluatedRun.correct`, suite after suite: its suite,
    task, part and list, as in `items`.

    Raises: UserError for a run without a finished 06, or if runs answered different questions.
    """
    loaded, questions = {}, None
    for word in [word for group in groups.values() for word in group]:
        loaded[word], asked = _read_run(word)
        questions = asked if questions is None else questions
    for name in SAMPLE_PARAMS:
        values = {word: run.params.get(name, default_params("01_synthesize").get(name))
                  for word, run in loaded.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            texts = ", ".join(f"{word} {value}" for word, value in values.items())
            raise UserError(f"the runs were not evaluated on the same samples: {name} is {texts}")
    digests = {}
    for word, run in loaded.items():
        for suite, digest in run.questions.items():
            if digests.setdefault(suite, digest) != digest:
                raise UserError(f"{word} answered other questions of {suite} than the runs before "
                                "it; run its 06 again, or compare runs of the same own data and "
                                "version of the kit")
        for by_suite in run.correct.values():
            if sum(map(len, by_suite.values())) != len(questions):
                raise UserError(f"{word} answered another number of questions than its parameters "
                                "ask for now; compare it with the version that made it")
    return questions, {name: [loaded[word] for word in group] for name, group in groups.items()}


def _read_run(word: str) -> tuple[EvaluatedRun, pd.MultiIndex]:
    """A run or a recorded one, and the index of its questions."""
    if word.endswith(".json"):
        run = read_recorded(word)
        rows = [(suite, task, task) for suite, per_task in run.params["suites"].items()
                for task in SUITES[suite].tasks for _ in range(per_task)]
        # questions of drawn suites share no images, so that each is a list of its own
        asked = pd.DataFrame(rows, columns=QUESTION[:3]).assign(list=range(len(rows)))
        return run, pd.MultiIndex.from_frame(asked)
    run = Run(word)
    record = run.require("06_evaluate", "mig-kit table")
    greedy = pick(read_items(run.stage_folder("06_evaluate")), kind="greedy")
    greedy = greedy[greedy["model"].isin(SYSTEMS)]
    asked = greedy[greedy["model"] == greedy["model"].iloc[0]]
    return _load_run(run, record, greedy), pd.MultiIndex.from_frame(asked[QUESTION[:4]])


def _load_run(run: Run, record: dict, greedy: pd.DataFrame) -> EvaluatedRun:
    """record: of 06; greedy: rows of its `items`."""
    stages = list(filter(None, map(run.record, RECIPE[2:6])))  # a run may have no cold start
    trained, synthesized = (run.params(stage) for stage in ("05_grpo", "01_synthesize"))
    asked = {name: record["params"][name] for name in SAMPLE_PARAMS}
    drawn = {name: size for name, size in asked["suites"].items() if size}
    curves = store.read_metrics(run.stage_folder("05_grpo"))["curves"]
    lengths = [row["length"] for row in curves[-10:] if row["length"] is not None]
    summaries = store.read_metrics(run.stage_folder("06_evaluate"))["systems"]
    spent = [stage.get("processor_seconds") for stage in stages]
    return EvaluatedRun(
        run.id, synthesized["seed"], trained["seed"], correct_bits(greedy),
        float(np.mean(lengths or [np.nan])), sum(stage["seconds"] for stage in stages) / 60,
        record["git"], record["machine"], record["versions"]["mig-kit"], asked | {"suites": drawn},
        trained["start_from"], record["questions"], changed_params(run), run.notes("06_evaluate"),
        {system: {suite: summary["reasoning"] for suite, summary in by_suite.items()
                  if summary.get("reasoning")} for system, by_suite in summaries.items()},
        {system: {suite: summary["score"] for suite, summary in by_suite.items()}
         for system, by_suite in summaries.items()},
        None if None in spent else round(sum(spent), 1))


def correct_bits(greedy: pd.DataFrame, by: str = "model") -> dict[str, dict[str, str]]:
    """System -> suite -> "1" or "0" for each question; greedy: rows of `items`."""
    return {name: {suite: "".join(part["correct"].astype(int).astype(str))
                   for suite, part in of_name.groupby("suite", sort=False)}
            for name, of_name in greedy.groupby(by, sort=False)}


def record_run(run_id: str, folder: Path) -> Path:
    """Write FOLDER/RUN_ID.json, a recorded run; UserError as `load_groups`, and for own data."""
    _, runs = load_groups({run_id: [run_id]})
    if Run(run_id).data != "scenes":
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


def changed_params(run: Run) -> dict[str, dict]:
    """Finished stage of 01 to 06 -> its parameters that differ from the defaults."""
    changed = {stage: find_changed(run.params(stage), default_params(stage))
               for stage in RECIPE[1:7]}
    return {stage: values for stage, values in changed.items() if values}


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
        "One run each, whose own figures have intervals over questions alone; another seed may "
        "move a score by more": single * (system != "base"),
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
    if not run.record("06_evaluate") or not file.is_file() or changed_params(run):
        return "", False
    metrics = store.read_metrics(run.stage_folder("06_evaluate"))
    texts, is_outside = [], False
    for suite, margins in json.loads(file.read_text()).items():
        gap, lowest, highest = metrics["deltas"]["grpo-sft"][suite], min(margins), max(margins)
        low, high = gap["ci95"]
        this_outside = high < lowest or low > highest
        is_outside |= this_outside
        texts.append(f"RL over SFT, {suite_title(suite)}: {gap['value']:+.1f} points ({low:+.1f} "
                     f"to {high:+.1f}); recorded seeds: {lowest:+.1f} to {highest:+.1f}"
                     + ": OUTSIDE" * this_outside)
    return "\n".join(texts), is_outside
