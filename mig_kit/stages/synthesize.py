"""Stage 01: synthesise the cold-start set, by a teacher's traces and a filter that keeps good ones.

The paper's abstracts name the step; prompts and filter (`filters.drop_reason`) are ours.
"""

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.common import UserError, progress_bar
from mig_kit.filters import DROP_REASONS
from mig_kit.sample import Sample, SampleWriter, TableRows, Trace, read_replies
from mig_kit.world.teacher import write_trace


class RuleBasedTraces(list):
    """The rule-based teacher's trace for every sample, each with a random state of its own.

    A sample that comes again gets another trace.

    error_rate, jitter, mix: see `teacher.write_trace`.
    """

    def __init__(self, samples: Iterable[Sample], seed: int, box_format: BoxFormat,
                 error_rate: float = 0.2, jitter: float = 0.7,
                 mix: tuple[float, float, float] = (1.0, 1.0, 1.0)):
        self.n_traces: Counter[str] = Counter()  # by sample id
        super().__init__(write_trace(sample, self._random_state(seed, sample.id), box_format, mix,
                                     error_rate, jitter) for sample in samples)

    def _random_state(self, seed: int, sample_id: str) -> random.Random:
        number, self.n_traces[sample_id] = self.n_traces[sample_id], self.n_traces[sample_id] + 1
        return random.Random(f"{seed}/{sample_id}" + f"/{number}" * bool(number))


def read_own_traces(path: Path) -> TableRows:
    """The replies that came with own data as traces, a Sequence; path: of the set's questions."""
    return read_replies(path, partial(Trace, detail="own", error=""))


def keep_good_traces(path: Path, samples: Iterable[Sample], traces: Sequence[Trace],
                     reasons: Iterable[str]) -> dict:
    """Write the samples whose trace is kept to `path`, and return `count_drops` of all.

    reasons: why a trace is dropped, "" for one to keep. Raises UserError if none is kept.
    """
    outcomes = []
    rows = zip(samples, traces, reasons, strict=True)
    with SampleWriter(path, with_traces=True) as writer:
        for sample, trace, reason in progress_bar(rows, "filter", total=len(traces)):
            outcomes.append((reason, trace.detail, trace.error))
            if not reason:
                writer.write(sample, trace)
        counts = count_drops(outcomes)
        if outcomes and not counts["kept"]:  # raised before the file takes the place of another
            raise UserError(_describe_drops(counts))
    return counts


def _describe_drops(counts: dict) -> str:
    """A sentence for a filter that kept nothing; counts: of `count_drops`."""
    dropped = counts["dropped"]
    failures = counts["errors"] if dropped.get("no reply") else {}
    reasons = ", ".join(f"{name} {count}" for name, count in [*dropped.items(), *failures.items()]
                        if count)
    hint = ("; a box is in the model's coordinates, as coordinates and max_pixels say"
            if dropped["box"] else "")
    return f"the filter dropped every reply ({reasons}); look at one of them{hint}"


def count_drops(outcomes: list[tuple[str, str, str]]) -> dict:
    """Traces kept, dropped by reason, and by error; outcomes: (reason, detail, error) of each."""
    reasons = Counter(reason for reason, _, _ in outcomes)
    names = [*DROP_REASONS, *sorted(reasons.keys() - {*DROP_REASONS, ""})]
    kept = [(detail, error) for reason, detail, error in outcomes if not reason]
    return {"total": len(outcomes), "kept": len(kept),
            "dropped": {name: reasons[name] for name in names},
            "errors": dict(Counter(error for _, _, error in outcomes if error)),
            "errors_kept": dict(Counter(error for _, error in kept if error)),
            "details_kept": dict(Counter(detail for detail, _ in kept))}


def data_card(seed: int, counts: dict, sizes: dict[str, int], coordinates: str,
              data: str = "scenes", teacher: str = "") -> str:
    """The data card in Markdown: what the set holds and how it was made.

    counts: of `count_drops`. sizes: samples by file. coordinates: of the boxes inside replies.
    teacher: who wrote the traces, "" for the rules.
    """
    is_drawn = data == "scenes"
    source = (f"Drawn scenes (seed {seed})" if is_drawn
              else f"Questions and images of {Path(data).name}, under their own licence,")
    traces = f" with chain-of-thought traces of {teacher or 'a rule-based teacher'}"
    if not counts["total"]:
        traces = " without traces"
    dropped = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
    return "\n".join([
        "---", f"license: {'apache-2.0' if is_drawn else 'other'}",
        "task_categories: [visual-question-answering]", "---", "# Cold-start set", "",
        f"{source}{traces}; boxes are xyxy pixels of the",
        f"original image, boxes inside replies are {Coordinates(coordinates).description}.", "",
        *(f"- `{name}.parquet`: {count} samples" for name, count in sizes.items()), "",
        f"Traces: {counts['total']}, kept {counts['kept']}; dropped: {dropped}.", ""])
