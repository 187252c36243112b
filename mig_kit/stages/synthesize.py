"""Stage 01: synthesise the cold-start set, by a teacher's traces and a filter that keeps good ones.

The paper publishes neither its prompts nor its filter. Our filter (`filters.drop_reason`) asks for
the format, the right image, IoU >= 0.5, and no answer given away inside the thinking.
"""

import random
from collections import Counter

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.filters import DROP_REASONS
from mig_kit.sample import Sample, Trace
from mig_kit.world.teacher import write_trace


def write_traces(samples: list[Sample], seed: int, mix: tuple[float, float, float],
                 error_rate: float, jitter: float, box_format: BoxFormat) -> list[Trace]:
    """The rule-based teacher's trace for every sample, each from its own random state.

    mix, error_rate, jitter: see `teacher.write_trace`.
    """
    return [write_trace(sample, random.Random(f"{seed}/{sample.id}"), box_format, mix, error_rate,
                        jitter)
            for sample in samples]


def count_drops(reasons: list[str], traces: list[Trace]) -> dict:
    """How many traces were kept and dropped per reason, and what became of the teacher's errors.

    reasons: of `filters.drop_reason`, "" for a kept trace.
    """
    names = [*DROP_REASONS, *sorted(set(reasons) - set(DROP_REASONS) - {""})]
    kept = [trace for trace, reason in zip(traces, reasons, strict=True) if not reason]
    return {"total": len(reasons), "kept": len(kept),
            "dropped": {name: reasons.count(name) for name in names},
            "errors": dict(Counter(trace.error for trace in traces if trace.error)),
            "errors_kept": dict(Counter(trace.error for trace in kept if trace.error)),
            "details_kept": dict(Counter(trace.detail for trace in kept))}


def data_card(seed: int, counts: dict, sizes: dict[str, int], coordinates: str,
              data: str = "scenes", teacher: str = "") -> str:
    """The data card in Markdown: what the set holds and how it was made.

    counts: of `count_drops`. sizes: samples by file. coordinates: of the boxes inside replies.
    teacher: the model's name, "" for the rules.
    """
    is_drawn = data == "scenes"
    source = (f"Drawn scenes (seed {seed})" if is_drawn
              else f"Questions and images from '{data}', under their own licence,")
    writer = f"{teacher}, asked over an endpoint" if teacher else "a rule-based teacher"
    dropped = ", ".join(f"{reason} {count}" for reason, count in counts["dropped"].items())
    return "\n".join([
        "---", f"license: {'apache-2.0' if is_drawn else 'other'}",
        "task_categories: [visual-question-answering]", "---", "# Cold-start set", "",
        f"{source} with chain-of-thought traces of {writer}; boxes are xyxy pixels of the",
        f"original image, boxes inside replies are {Coordinates(coordinates).description}.", "",
        *(f"- `{name}.parquet`: {count} samples" for name, count in sizes.items()), "",
        f"Traces: {counts['total']}, kept {counts['kept']}; dropped: {dropped}.", ""])
