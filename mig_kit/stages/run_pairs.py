"""Which runs of two groups are compared with each other, and what that leaves open."""

from collections import Counter

from mig_kit.stages.evaluated_runs import EvaluatedRun


def pair_runs(runs: list[EvaluatedRun],
              others: list[EvaluatedRun]) -> list[tuple[EvaluatedRun, EvaluatedRun]]:
    """The (run, other) pairs that share a seed of 01 which exactly one run of each group has;
    without two of them, the pairs by the seed of 05.

    The seed of 01 goes first because it decides the traces of the cold start, which move a score
    by more than the random numbers of RL do. A single pair counts only where each group is one
    run: of several runs it would say nothing about the others.
    """
    for name in ("data_seed", "seed"):
        by_seed, others_by_seed = (_unique_by_seed(group, name) for group in (runs, others))
        pairs = [(run, others_by_seed[seed]) for seed, run in by_seed.items()
                 if seed in others_by_seed]
        if len(pairs) > 1 or (pairs and len(runs) == len(others) == 1):
            return pairs
    return []


def _unique_by_seed(runs: list[EvaluatedRun], name: str) -> dict[int, EvaluatedRun]:
    """Seed -> the run that has it, of the seeds that one run alone has; name: of the field."""
    counts = Counter(getattr(run, name) for run in runs)
    return {getattr(run, name): run for run in runs if counts[getattr(run, name)] == 1}


def list_notes(runs: dict[str, list[EvaluatedRun]], reference: str, system: str) -> list[str]:
    """Sentences on what the intervals do not cover, and on pairs; runs: of each group."""
    notes = []
    if system != "base":  # nothing was trained
        notes += _score_notes(runs, system)
    notes += _pairing_notes({name: members for name, members in runs.items() if name != reference},
                            reference, runs[reference])
    if len({run.git for members in runs.values() for run in members}) > 1:
        notes.append("The runs were evaluated at different commits.")
    return notes


def _score_notes(runs: dict[str, list[EvaluatedRun]], system: str) -> list[str]:
    notes = []
    alone = [name for name, members in runs.items() if len(members) == 1]
    if alone:
        notes.append(f"One run each: {', '.join(alone)}. The intervals of their scores are over "
                     "test samples alone; another seed may move a score by more.")
    sharing = [name for name, members in runs.items()
               if _repeat([run.data_seed for run in members if "sft" in run.correct])]
    controls = [name for name, members in runs.items()
                if system == "sft_long" and _repeat([run.control["model"] for run in members])]
    if controls:
        notes.append("Some runs share a control run, whose SFT model is counted as often. The "
                     "interval counts them as independent and says too little about another such "
                     f"model: {', '.join(controls)}.")
    if sharing:
        notes.append("Some runs have the same seed of 01, so they may share a cold start. The "
                     "interval counts them as independent and says too little about other cold "
                     f"starts: {', '.join(sharing)}.")
    return notes


def _repeat(values: list) -> bool:
    return len(set(values)) < len(values)


def _pairing_notes(groups: dict[str, list[EvaluatedRun]], reference: str,
                   others: list[EvaluatedRun]) -> list[str]:
    """What follows where not every run of a group and of the reference has a partner."""
    pairs = {name: pair_runs(runs, others) for name, runs in groups.items()}
    some = [name for name in pairs if pairs[name] and not (
        len(pairs[name]) == len(groups[name]) == len(others))]
    single = [name for name in pairs if not pairs[name] and 1 in (len(groups[name]), len(others))]
    several = [name for name in pairs if not pairs[name] and name not in single]
    mixed = [name for name in pairs
             if any(run.data_seed != other.data_seed for run, other in pairs[name])]
    notes = []
    if some:
        notes.append(f"Differences to {reference} are over the pairs of runs with the same seed; "
                     "the column runs says how many. Scores and the probability of improvement are "
                     "over all runs, so a difference need not be that of the two scores: "
                     f"{', '.join(some)}.")
    if mixed:
        notes.append(f"Paired with {reference} by the seed of 05, for those of 01 differ. The "
                     f"difference also holds what another cold start does: {', '.join(mixed)}.")
    if single:
        notes.append(f"Compared with {reference} by sample alone. The difference also holds what "
                     "another seed does; compare a branch with its own source to leave that out: "
                     f"{', '.join(single)}.")
    if several:
        notes.append(f"Compared with {reference} by sample alone, which widens the interval: fewer "
                     "than two pairs of runs have the same seed. A seed makes a pair if exactly "
                     f"one run of each group has it: {', '.join(several)}.")
    return notes
