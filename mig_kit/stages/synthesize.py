"""Stage 01: synthesise the cold-start set: samples, traces of a teacher, and the filter that keeps the good ones.

The paper does not publish its prompts or its filter. Kept here is what passes four checks: format, right image, IoU >= 0.5,
and no answer given away inside the thinking (MG-Thinker drops traces that state the answer up front).
"""

import random
from collections import Counter

from mig_kit.boxes import BoxFormat, Coordinates
from mig_kit.filters import DROP_REASONS
from mig_kit.sample import Sample, Trace
from mig_kit.world.teacher import write_trace


def write_traces(samples: list[Sample], seed: int, mix: tuple[float, float, float], error_rate: float, jitter: float,
                 box_format: BoxFormat) -> list[Trace]:
    """The teacher's trace for every sample, each from its own random state."""
    return [write_trace(s, random.Random(f"{seed}/{s.id}"), box_format, mix, error_rate, jitter) for s in samples]


def count_drops(verdicts: list[str], found: list[Trace]) -> dict:
    """How many traces were kept, dropped per reason, and what became of each kind of the teacher's errors."""
    reasons = [*DROP_REASONS, *sorted({v for v in verdicts if v} - set(DROP_REASONS))]
    return {"total": len(verdicts), "kept": verdicts.count(""), "dropped": {r: verdicts.count(r) for r in reasons},
            "errors": dict(Counter(t.error for t in found if t.error)),
            "errors_kept": dict(Counter(t.error for t, v in zip(found, verdicts) if t.error and not v)),
            "details_kept": dict(Counter(t.detail for t, v in zip(found, verdicts) if not v))}


def data_card(seed: int, kept: dict, sizes: dict[str, int], data: str = "scenes", teacher: str = "",
              coordinates: str = "absolute") -> str:
    """The data card in Markdown: what the set holds and how it was made. teacher: the model's name; "" for the rules.

    coordinates: of the boxes in the replies.
    """
    lines = [f"- `{name}.parquet`: {n} samples" for name, n in sizes.items()]
    reasons = ", ".join(f"{reason} {n}" for reason, n in kept["dropped"].items())
    source = f"Drawn scenes (seed {seed})" if data == "scenes" else f"Questions and images from '{data}', under their own licence,"
    writer = f"{teacher}, asked over an endpoint" if teacher else "a rule-based teacher"
    licence = "apache-2.0" if data == "scenes" else "other"
    return "\n".join([
        "---", f"license: {licence}", "task_categories: [visual-question-answering]", "---", "# Cold-start set", "",
        f"{source} with chain-of-thought traces of {writer}; boxes are xyxy pixels of the",
        f"original image, boxes inside replies are {Coordinates(coordinates).description}.", "", *lines, "",
        f"Traces: {kept['total']}, kept {kept['kept']}; dropped: {reasons}.", ""])
