"""Your own data: JSON lines or another table, one question each, checked before anyone trains.

notebooks/guide/own_data.md explains the keys.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.common import UserError, iter_lines, progress_bar
from mig_kit.data.line_checks import (
    LEAVES,
    OWN_LETTER,
    OwnLine,
    find_file_problems,
    own_letters,
    parse_line,
    sizes_below,
)
from mig_kit.data.records import Problem, entry_word, iter_entries, require_own_data
from mig_kit.image_files import EncodedImage, LazyImages, resolve_under_root
from mig_kit.sample import Sample, Target


@dataclass(frozen=True)
class Line:
    """A checked line; place: as "line 3". sample: None if there is more wrong than boxes that leave
    their image; reaches: how far each box reaches, as a share of its image's side.
    """

    place: str
    problems: list[Problem]
    sample: Sample | None = None
    reply: str = ""  # the line's own
    record: dict = field(default_factory=dict)  # as the file has it
    reaches: list[float] = field(default_factory=list)


def iter_checked_lines(path: Path, root: Path, decodes: bool = False) -> Iterator[Line]:
    """Every line of the file; UserError for a file of another kind. See `check_records`."""
    require_own_data(path)
    return check_records(iter_entries(path), root, decodes)


def check_records(records: Iterable[tuple[str, dict | Problem]], root: Path,
                  decodes: bool = False) -> Iterator[Line]:
    """A Line for every record of own data.

    Args:
        records: (place, record or what is wrong with it).
        root: the folder that image names are relative to.
        decodes: read the pixels of every image, once.
    """
    read, ids = sizes_below(root, decodes), set()
    for place, record in records:
        line, problems, sizes, reaches = None, [record], [], []
        if isinstance(record, Problem):
            record = {}
        else:
            line, problems = parse_line(record)
        if line:
            line.id = line.id or place.replace(" ", "-")
            sizes = [read(name) for name in line.images]
            reaches, file_problems = find_file_problems(line, sizes)
            problems += file_problems
            if hash(line.id) in ids:
                problems.append(Problem("an id twice", f"id {line.id[:40]!r} is there twice"))
            ids.add(hash(line.id))
        is_drawable = line and {problem.reason for problem in problems} <= {LEAVES}
        sample = sample_of_line(line, root, sizes) if is_drawable else None
        yield Line(place, problems, sample, line and line.reply or "", record, reaches)


def check_lengths(lines: Iterable[Line], measure: Callable[[Sample], str]) -> Iterator[Line]:
    """The lines; measure gives a sentence on a sample that is too long for a model, or ""."""
    for line in lines:
        if line.sample and (sentence := measure(line.sample)):
            line.problems.append(Problem("prompts that are too long", sentence))
        yield line


def require_correct_lines(path: Path, root: Path) -> int:
    """The number of lines; UserError with the first wrong one. Damaged images are left to 01."""
    word, n_lines, n_wrong, first = entry_word(path), 0, 0, ""
    total = sum(1 for _ in iter_lines(path)) if word == "line" else None
    for line in progress_bar(iter_checked_lines(path, root), "check lines", total=total, delay=2):
        n_lines += 1
        if {problem.reason for problem in line.problems} - {"unreadable image"}:
            n_wrong += 1
            first = first or f"{line.place}: {line.problems[0]}"
    require_lines(path, n_lines)
    if n_wrong:
        raise UserError(f"{path} has {n_wrong} wrong of {n_lines} {word}s; {first} (mig-kit data "
                        f"check {path} --root {root} lists them, --out FILE writes the rest)")
    return n_lines


def require_lines(path: Path, count: int) -> None:
    """UserError for a file with no line."""
    if not count:
        raise UserError(f"{path} has no {entry_word(path)}; write one JSON object a line, a "
                        "question each")


def iter_samples(path: Path, root: Path, limit: int | None = None) -> Iterator[Sample]:
    """The samples of the first `limit` lines (None: all); UserError at the first wrong line."""
    for line in islice(iter_checked_lines(path, root), limit):
        if line.problems:
            raise UserError(f"{path} {line.place}: {line.problems[0]} (mig-kit data check {path} "
                            f"--root {root} lists every {entry_word(path)})")
        yield line.sample


def sample_of_line(line: OwnLine, root: Path, sizes: list) -> Sample:
    """The sample of a correct line; sizes: of its images, below `root`, pixels."""
    images = LazyImages(tuple(EncodedImage(resolve_under_root(root, name), size)
                              for name, size in zip(line.images, sizes)))
    coordinates = Coordinates(line.coordinates or Coordinates.PIXELS)
    targets = [Target(image, rescale_box(box, coordinate_size(size, coordinates, BoxFormat()),
                                         size))
               for _, image, box in line.places() for size in [images.sizes[image - 1]]]
    reference = targets.pop().box if line.reference else None
    options = line.options or []
    if own_letters(options):  # the prompt writes them once
        options = [OWN_LETTER.sub("", option, count=1) for option in options]
    return Sample(line.id, "own", line.task, "train", images, line.question, tuple(targets),
                  reference, tuple(options), line.letter or "")
