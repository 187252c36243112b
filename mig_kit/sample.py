"""The one record that flows through all stages: a question about several images, and what would
answer it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
from datasets import Dataset, Features, List, Value
from PIL import Image

from mig_kit.boxes import Box, iou
from mig_kit.common import write_atomically

SAMPLE_FEATURES = Features({
    "id": Value("string"), "suite": Value("string"), "task": Value("string"),
    "split": Value("string"), "images": List(datasets.Image()), "question": Value("string"),
    "target_images": List(Value("int32")), "target_boxes": List(List(Value("float32"))),
    "reference": List(Value("float32")), "options": List(Value("string")),
    "letter": Value("string"), "notes": List(Value("string")), "finding": Value("string")})
TRACE_FEATURES = Features({**SAMPLE_FEATURES, "reply": Value("string"),
                           "detail": Value("string"), "error": Value("string")})


class Target(NamedTuple):
    """An acceptable answer: the image's number, from 1, and the box in it (xyxy, pixels of that
    original image).
    """

    image: int
    box: Box


@dataclass(frozen=True)
class Sample:
    """One question.

    images: in prompt order, RGB. question: "{ref}" stands for the reference box. targets: the
    acceptable answers, empty when nothing in the images answers. reference: xyxy pixels of the
    original first image, or None. options and letter: a multiple-choice question's, else empty.
    notes and finding: the scene graph's account of the way to the answer, for the tiny profile's
    teacher.
    """

    id: str
    suite: str
    task: str
    split: str
    images: tuple[Image.Image, ...]
    question: str
    targets: tuple[Target, ...] = ()
    reference: Box | None = None
    options: tuple[str, ...] = ()
    letter: str = ""
    notes: tuple[str, ...] = ()
    finding: str = ""

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(Target(*target) for target in self.targets))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every original image, pixels."""
        return [image.size for image in self.images]


@dataclass(frozen=True)
class Trace:
    """A teacher's reply to a sample. detail: how much its reasoning says; error: the mistake it was
    given, or "".
    """

    text: str
    detail: str
    error: str


def best_iou(sample: Sample, image: int, box: Box) -> float:
    """Highest IoU of a box (xyxy, original pixels of image number `image`) with the targets in that
    image; else 0.
    """
    overlaps = (iou(box, target.box) for target in sample.targets if target.image == image)
    return max(overlaps, default=0.0)


def sample_to_row(sample: Sample) -> dict:
    """The sample as a plain row of a `datasets` table; images stay PIL images."""
    return {
        "id": sample.id, "suite": sample.suite, "task": sample.task, "split": sample.split,
        "images": list(sample.images), "question": sample.question,
        "target_images": [target.image for target in sample.targets],
        "target_boxes": [list(target.box) for target in sample.targets],
        "reference": list(sample.reference) if sample.reference else [],
        "options": list(sample.options), "letter": sample.letter,
        "notes": list(sample.notes), "finding": sample.finding,
    }


def sample_from_row(row: dict) -> Sample:
    """The sample that a row was made from; extra columns are ignored."""
    targets = zip(row["target_images"], row["target_boxes"])
    return Sample(
        id=row["id"], suite=row["suite"], task=row["task"], split=row["split"],
        images=tuple(row["images"]), question=row["question"],
        targets=tuple(Target(int(image), tuple(box)) for image, box in targets),
        reference=tuple(row["reference"]) if row["reference"] else None,
        options=tuple(row["options"]), letter=row["letter"],
        notes=tuple(row["notes"]), finding=row["finding"])


def write_samples(path: Path, samples: list[Sample], traces: list[Trace] | None = None) -> None:
    """Write the samples, with their traces if given, to a parquet file; an old file stays until the
    new one is whole.
    """
    rows, features = [sample_to_row(sample) for sample in samples], SAMPLE_FEATURES
    if traces is not None:
        rows = [{**row, "reply": trace.text, "detail": trace.detail, "error": trace.error}
                for row, trace in zip(rows, traces, strict=True)]
        features = TRACE_FEATURES
    table = Dataset.from_list(rows, features=features)
    write_atomically(path, lambda temporary: table.to_parquet(str(temporary)))


def read_table(path: Path) -> Dataset:
    """The table in a parquet file of this kit; ValueError with a remedy if the file is cut or no
    parquet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; run the stage that writes it")
    try:
        return Dataset.from_parquet(str(path), keep_in_memory=True, cache_dir=None)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is cut or no parquet file; delete it and run its stage again "
                         "with --force") from error


def read_samples(path: Path) -> list[Sample]:
    """The samples in a parquet file of this kit."""
    return [sample_from_row(row) for row in read_table(path)]
