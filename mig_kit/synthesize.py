"""Stage 01: synthesise the cold-start set: samples, traces of a teacher, and the filter that keeps the good ones.

The paper does not publish its prompts or its filter. Kept here is what passes four checks: format, right image, IoU >= 0.5,
and no answer given away inside the thinking (MG-Thinker drops traces that state the answer up front).
"""

import random
import re
from collections import Counter
from pathlib import Path

import pyarrow
from datasets import Dataset, Features, Image, List, Value

from mig_kit.frames import FRAMES, QWEN2_5, View, iou, to_model
from mig_kit.prompts import box_in_original, parse
from mig_kit.records import Sample, best_iou, from_row, to_row
from mig_kit.suites import make_free_form
from mig_kit.tasks import TASKS, make
from mig_kit.teacher import Trace, write

REASONS = ("format", "image", "box", "choice", "leak")
FEATURES = Features({
    "id": Value("string"), "suite": Value("string"), "task": Value("string"), "split": Value("string"),
    "images": List(Image()), "question": Value("string"), "target_images": List(Value("int32")),
    "target_boxes": List(List(Value("float32"))), "reference": List(Value("float32")), "options": List(Value("string")),
    "letter": Value("string"), "notes": List(Value("string")), "finding": Value("string")})
TRACE_FEATURES = Features({**FEATURES, "reply": Value("string"), "detail": Value("string"), "error": Value("string")})


def leaks(thinking: str, sample: Sample, view: View) -> bool:
    """True if a box written in the thinking meets a target with IoU >= 0.5 (pixels of the resized target image)."""
    for found in re.findall(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]", thinking):
        box = tuple(float(v) for v in found)
        if any(iou(box, to_model(target, sample.sizes[n - 1], view)) >= 0.5 for n, target in sample.targets):
            return True
    return False


def verdict(reply: str, sample: Sample, view: View = QWEN2_5, threshold: float = 0.5) -> str:
    """"" if the reply may teach, else the first of REASONS that speaks against it."""
    read = parse(reply)
    if not read.well_formed or (not read.letter if sample.options else read.box is None):
        return "format"
    if sample.options:
        leak = re.search(r"(?:^|\s)\(?[A-H][.)](?:\s|$)", read.thinking)
        return "choice" if read.letter != sample.letter else "leak" if leak else ""
    if read.image not in {n for n, _ in sample.targets}:
        return "image"
    if best_iou(sample, read.image, box_in_original(sample, read, view)) < threshold:
        return "box"
    return "leak" if leaks(read.thinking, sample, view) else ""


def traces(samples: list[Sample], seed: int, mix: tuple[float, float, float], error_rate: float, jitter: float,
           view: View = QWEN2_5) -> list[Trace]:
    """The teacher's trace for every sample, each from its own random state."""
    return [write(s, random.Random(f"{seed}/{s.id}"), mix, error_rate, jitter, view) for s in samples]


def training_mix(split: str, per_task: int, free_form_per_task: int, seed: int, boxes: int | None = None) -> list[Sample]:
    """What is trained on: the ten tasks and general questions, `boxes` of each of their kinds that asks for a box."""
    return draw_split(split, per_task, seed) + make_free_form(split, free_form_per_task, seed, boxes)


def draw_split(split: str, per_task: int, seed: int) -> list[Sample]:
    """`per_task` samples of each of the ten tasks."""
    return [make(task, split, i, seed) for task in TASKS for i in range(per_task)]


def counts(verdicts: list[str], found: list[Trace]) -> dict:
    """How many traces were kept, dropped per reason, and what became of each kind of the teacher's errors."""
    reasons = [*REASONS, *sorted({v for v in verdicts if v} - set(REASONS))]
    return {"total": len(verdicts), "kept": verdicts.count(""), "dropped": {r: verdicts.count(r) for r in reasons},
            "errors": dict(Counter(t.error for t in found if t.error)),
            "errors_kept": dict(Counter(t.error for t, v in zip(found, verdicts) if t.error and not v)),
            "details_kept": dict(Counter(t.detail for t, v in zip(found, verdicts) if not v))}


def write_samples(path: Path, samples: list[Sample], found: list[Trace] | None = None) -> None:
    """A parquet file with image features, written beside and renamed; with the traces if there are any."""
    rows = [to_row(s) for s in samples]
    if found is not None:
        rows = [{**row, "reply": t.text, "detail": t.detail, "error": t.error} for row, t in zip(rows, found, strict=True)]
    beside = path.with_suffix(".tmp")
    Dataset.from_list(rows, features=FEATURES if found is None else TRACE_FEATURES).to_parquet(str(beside))
    beside.replace(path)


def read_rows(path: Path) -> Dataset:
    """The table in a parquet file of this kit; ValueError with a remedy if it is cut or not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the stage that writes it")
    try:
        return Dataset.from_parquet(str(path), keep_in_memory=True, cache_dir=None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is cut or no parquet file; delete it and run its stage again with --force") from error


def read_samples(path: Path) -> list[Sample]:
    """The samples in a parquet file of this kit."""
    return [from_row(row) for row in read_rows(path)]


def data_card(seed: int, kept: dict, sizes: dict[str, int], data: str = "scenes", teacher: str = "",
              frame: str = "resized") -> str:
    """The data card in Markdown: what the set holds and how it was made. teacher: the model's name; "" for the rules.

    frame: of the boxes in the replies, one of frames.FRAMES.
    """
    lines = [f"- `{name}.parquet`: {n} samples" for name, n in sizes.items()]
    reasons = ", ".join(f"{reason} {n}" for reason, n in kept["dropped"].items())
    source = f"Drawn scenes (seed {seed})" if data == "scenes" else f"Questions and images from '{data}', under their own licence,"
    writer = f"{teacher}, asked over an endpoint" if teacher else "a rule-based teacher"
    licence = "apache-2.0" if data == "scenes" else "other"
    return "\n".join([
        "---", f"license: {licence}", "task_categories: [visual-question-answering]", "---", "# Cold-start set", "",
        f"{source} with chain-of-thought traces of {writer}; boxes are xyxy pixels of the",
        f"original image, boxes inside replies are {FRAMES[frame]}.", "", *lines, "",
        f"Traces: {kept['total']}, kept {kept['kept']}; dropped: {reasons}.", ""])
