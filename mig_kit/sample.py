"""The record that flows through all stages: a question on several images, and its answers."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mig_kit.boxes import Box
from mig_kit.common import UserError
from mig_kit.image_files import EncodedImage, LazyImages, encode_image

# A table is written in groups of rows, so that its length does not matter.
ROWS_PER_GROUP = 64
BYTES_PER_GROUP = 2**22  # of embedded images
REMEDY = "delete it and run its stage again with --force"


class Target(NamedTuple):
    """An acceptable answer: number of the image, from 1, and box, xyxy, pixels of that original."""

    image: int
    box: Box


@dataclass(frozen=True)
class Sample:
    """One question.

    Args:
        images: in prompt order, RGB; those of a table are decoded when looked at.
        question: the text; "{ref}" stands for the reference box.
        targets: any one of them answers; empty if nothing in the images does.
        reference: xyxy, pixels of the original first image.
        options, letter: of multiple choice, and the correct one's letter.
        notes, finding: the scene graph's way to the answer, for the tiny profile's teacher.
        spec: the `SampleSpec` of a drawn one; in no table, so None of one read from a file.
    """

    id: str
    suite: str
    task: str
    split: str
    images: Sequence[Image.Image]
    question: str
    targets: tuple[Target, ...] = ()
    reference: Box | None = None
    options: tuple[str, ...] = ()
    letter: str = ""
    notes: tuple[str, ...] = ()
    finding: str = ""
    spec: object = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(Target(*target) for target in self.targets))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every original image, pixels; decodes nothing."""
        if isinstance(self.images, LazyImages):
            return self.images.sizes
        return [image.size for image in self.images]


@dataclass(frozen=True)
class Trace:
    """A teacher's reply; detail: how much its reasoning says; error: the mistake it was given."""

    text: str
    detail: str
    error: str


def table_schema(with_traces: bool):
    """The pyarrow schema of a table of samples, or of samples with their traces."""
    from datasets import Features, Image, List, Value  # late: scoring and checking need neither

    text, number, coordinates = Value("string"), Value("int32"), List(Value("float32"))
    columns = {"id": text, "suite": text, "task": text, "split": text, "images": List(Image()),
               "sizes": List(List(number)), "question": text, "target_images": List(number),
               "target_boxes": List(coordinates), "reference": coordinates, "options": List(text),
               "letter": text, "notes": List(text), "finding": text}
    trace = dict.fromkeys(("reply", "detail", "error"), text) if with_traces else {}
    return Features(columns | trace).arrow_schema


def encode_images(images: Sequence[Image.Image], folder: Path) -> list[dict]:
    """Images as `datasets.Image` for a table in `folder`: stored files by path, others as bytes."""
    if not isinstance(images, LazyImages):
        return [{"bytes": encode_image(image), "path": None} for image in images]
    return [{"bytes": None, "path": os.path.relpath(image.content, folder)} if image.sha256 else
            {"bytes": image.read_bytes(), "path": None} for image in images.encoded]


def sample_from_row(row: dict, folder: Path) -> Sample:
    """The sample that a row of a table in `folder` was made from; extra columns are ignored."""
    targets = zip(row["target_images"], row["target_boxes"])
    images = zip(row["images"], row["sizes"], strict=True)
    return Sample(
        id=row["id"], suite=row["suite"], task=row["task"], split=row["split"],
        images=LazyImages(tuple(_image_from_row(image, size, folder) for image, size in images)),
        question=row["question"],
        targets=tuple(Target(int(image), tuple(box)) for image, box in targets),
        reference=tuple(row["reference"]) if row["reference"] else None,
        options=tuple(row["options"]), letter=row["letter"],
        notes=tuple(row["notes"]), finding=row["finding"])


def _image_from_row(image: dict, size: list[int], folder: Path) -> EncodedImage:
    if image["bytes"] is not None:
        return EncodedImage(image["bytes"], tuple(size))
    path = Path(os.path.normpath(folder / image["path"]))
    return EncodedImage(path, tuple(size), path.stem)


class SampleWriter:
    """A context that writes samples, with or without traces, to a parquet file; an old file stays
    until it ends.
    """

    def __init__(self, path: Path, with_traces: bool = False):
        from pyarrow import parquet

        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.schema = table_schema(with_traces)
        self.file = parquet.ParquetWriter(self.temporary, self.schema)
        self.rows: list[dict] = []
        self.n_bytes = self.n_written = 0

    def write(self, sample: Sample, trace: Trace | None = None) -> None:
        """Add a row; what the table has no column for is left out."""
        row = vars(sample) | {
            "images": encode_images(sample.images, self.path.parent), "sizes": sample.sizes,
            "target_images": [target.image for target in sample.targets],
            "target_boxes": [target.box for target in sample.targets],
            "reference": sample.reference or []}
        if trace is not None:
            row |= {"reply": trace.text, "detail": trace.detail, "error": trace.error}
        self.rows.append(row)
        self.n_bytes += sum(len(image["bytes"] or b"") for image in row["images"])
        self.n_written += 1
        if len(self.rows) >= ROWS_PER_GROUP or self.n_bytes >= BYTES_PER_GROUP:
            self._write_group()

    def _write_group(self) -> None:
        from pyarrow import Table

        if self.rows:
            self.file.write_table(Table.from_pylist(self.rows, schema=self.schema))
        self.rows, self.n_bytes = [], 0

    def __enter__(self) -> "SampleWriter":
        return self

    def __exit__(self, error_class, *_) -> None:
        if error_class is None:
            self._write_group()
        self.file.close()
        if error_class is None:
            self.temporary.replace(self.path)
        self.temporary.unlink(missing_ok=True)


def write_samples(path: Path, samples: Iterable[Sample],
                  traces: Iterable[Trace] | None = None) -> None:
    """Write the samples, with their traces if given, to a parquet file, one at a time."""
    rows = zip(samples) if traces is None else zip(samples, traces, strict=True)
    with SampleWriter(path, traces is not None) as writer:
        for row in rows:
            writer.write(*row)


class TableRows(Sequence):
    """Rows of a parquet file of this kit; each is converted when it is looked at.

    Args:
        convert: makes an item of a row (a dict of `columns`) and the file's folder.
        rows: which rows, in order; None for all.
    Raises: UserError for a file that is missing, cut or of another kind.
    """

    def __init__(self, path: Path, convert: Callable[[dict, Path], object],
                 columns: Sequence[str] | None = None, rows: Sequence[int] | None = None):
        from pyarrow import ArrowException, parquet

        if not path.is_file():
            raise UserError(f"{path} is missing; run the stage that writes it")
        self.path, self.convert, self.columns = path, convert, columns
        try:
            self.table = parquet.read_table(path, columns=columns and list(columns))
        except (ArrowException, OSError) as error:
            raise UserError(f"{path} is cut or no parquet file; {REMEDY}") from error
        if not {*(columns or ("sizes",))} <= {*self.table.column_names}:
            raise UserError(f"{path} is no table of the kit's samples; run 01_synthesize again")
        self.rows = range(len(self.table)) if rows is None else rows

    def __reduce__(self):  # small, as datasets pickles what a transform holds
        return TableRows, (self.path, self.convert, self.columns, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        (row,) = self.table.slice(int(self.rows[index]), 1).to_pylist()
        return self.convert(row, self.path.parent)

    def __iter__(self) -> Iterator:  # Sequence's own would take a bug's IndexError for the end
        return (self[index] for index in range(len(self)))

    def select(self, indices: Sequence[int]) -> "TableRows":
        """The items at these indices, in this order."""
        part = copy(self)
        part.rows = [self.rows[index] for index in indices]
        return part


def read_samples(path: Path) -> TableRows:
    """The samples in a parquet file of this kit, a Sequence; raises as TableRows."""
    return TableRows(path, sample_from_row)


def read_replies(path: Path, convert: Callable[[str], object] = str) -> TableRows:
    """`convert` of each reply in a parquet file of samples with traces; raises as TableRows."""
    return TableRows(path, partial(_convert_reply, convert), ("reply",))


def _convert_reply(convert: Callable[[str], object], row: dict, folder: Path) -> object:
    return convert(row["reply"])
