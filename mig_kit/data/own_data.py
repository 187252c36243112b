"""Your own data: JSON lines or a JSON list, one question each, checked before anyone trains on it.

notebooks/guide/own_data.md explains the keys. If one line has "targets" or "image": null, every
question of the file asks for all boxes; else the prompt would tell how many there are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.common import iter_lines, progress_bar
from mig_kit.data.line_checks import (
    asks_for_all,
    box_places,
    find_file_problems,
    find_problems,
    is_choice,
    read_sizes_below,
    simplify_line,
)
from mig_kit.data.records import entry_word, iter_entries
from mig_kit.data.remarks import Remarks
from mig_kit.filters import drop_reason
from mig_kit.image_files import BadImage, EncodedImage, LazyImages, resolve_under_root
from mig_kit.sample import Sample, Target


@dataclass(frozen=True)
class Line:
    """A checked line, numbered from 1; sample: None if there are problems."""

    number: int
    problems: list[str]  # sentences
    sample: Sample | None = None
    reply: str = ""  # the line's own
    is_damaged: bool = False  # nothing is wrong but that image files cannot be read


# of `filters.drop_reason` -> what is wrong with a reply
WRONG_REPLIES = {
    "format": "it must end in <answer>{\"image\": 2, \"box\": [x1, y1, x2, y2]}</answer>, numbers "
              "without quotes, for multiple choice <answer>A</answer>, after <think>...</think>",
    "choice": "its letter is another one", "image": "it names another image",
    "box": "its box is not on the target; boxes in it are in the model's coordinates, which "
           "--profile names", "leak": "its reasoning gives the answer away"}


def check_file(path: Path, root: Path, measure: Callable[[Sample], str] | None = None,
               formats: Sequence[BoxFormat] = (), remarks: Remarks | None = None
               ) -> Iterator[tuple[int, list[str]]]:
    """(line number, problems) of every line; reads the pixels of every image once.

    Args:
        measure: gives a sentence on a sample that is too long for a model, or "".
        formats: a line's own reply must pass stage 01's filter in one of these formats.
        remarks: takes in every line.
    """
    for line in iter_checked_lines(path, root, True, remarks):
        problems = [measure(line.sample)] if measure and line.sample else []
        reasons = [drop_reason(line.reply, line.sample, box_format)
                   for box_format in formats if line.reply]
        if reasons and all(reasons):
            problems.append(f"01 would drop its 'reply': {WRONG_REPLIES[reasons[0]]}")
        yield line.number, [*line.problems, *filter(None, problems)]


def iter_checked_lines(path: Path, root: Path, decodes: bool = False,
                       remarks: Remarks | None = None) -> Iterator[Line]:
    """Every line of the file; ValueError for a file that holds no JSON. See `check_file`."""
    word, read_sizes = entry_word(path), read_sizes_below(root, decodes)
    if word == "row":
        raise ValueError(f"{path} is a parquet table; mig-kit data import FORMAT {path} --out OUT "
                         "writes it and the images in it as own data")
    find_all, hashes = file_asks_for_all(path), set()
    for number, record, problem in iter_entries(path):
        data, sizes = {} if problem else simplify_line(record), []
        problems = [problem] if problem else find_problems(data)
        if not problems:
            sizes, problems = find_file_problems(data, read_sizes)
        if find_all and "boxes" in data:
            problems = [*problems, "'boxes' are alternatives, but other lines ask for all boxes; "
                                   "write 'targets', or put these lines into another file"]
        name = data.setdefault("id", f"{word}-{number}")
        if isinstance(name, str):
            if hash(name) in hashes:
                problems = [*problems, f"id {name[:40]!r} is there twice"]
            hashes.add(hash(name))
        if remarks:
            remarks.add(f"{word} {number}", data, sizes, problems)
        if problems:
            n_damaged = sum(isinstance(size, BadImage) and size.reason == "unreadable image"
                            for size in sizes)
            yield Line(number, problems, is_damaged=len(problems) == n_damaged)
        else:
            yield Line(number, [], _make_sample(data, root, sizes, find_all), data.get("reply", ""))


def file_asks_for_all(path: Path) -> bool:
    """Whether a line has "targets" or "image": null, so that all questions ask for all boxes."""
    is_possible = any(line is None or b"targets" in line or b"null" in line
                      for _, line in iter_lines(path))
    return is_possible and any(isinstance(record, dict) and asks_for_all(record)
                               for _, record, _ in iter_entries(path))


def iter_usable_lines(path: Path, root: Path, takes_damaged: bool = True) -> Iterator[Line]:
    """Every line, without reading pixels; ValueError at the first wrong line.

    takes_damaged: whether lines whose only fault is a damaged image are given, without sample.
    """
    for line in iter_checked_lines(path, root):
        if line.problems and not (takes_damaged and line.is_damaged):
            word = entry_word(path)
            raise ValueError(f"{path} {word} {line.number}: {line.problems[0]} "
                             f"(mig-kit data check {path} lists every {word})")
        yield line


def require_correct_lines(path: Path, root: Path, remarks: Remarks | None = None) -> int:
    """The number of lines; ValueError with the first wrong one. Damaged images are left to 01."""
    word, first, n_wrong, n_lines = entry_word(path), "", 0, 0
    total = sum(1 for _ in iter_lines(path)) if word == "line" else None
    lines = iter_checked_lines(path, root, remarks=remarks)
    for line in progress_bar(lines, "check lines", total=total, delay=2):
        n_lines += 1
        if line.problems and not line.is_damaged:
            n_wrong += 1
            first = first or f"{word} {line.number}: {line.problems[0]}"
    if not n_lines:
        raise ValueError(f"{path} has no {word}; write one JSON object a line, a question each")
    if n_wrong:
        raise ValueError(f"{path} has {n_wrong} wrong of {n_lines} {word}s; {first} (mig-kit "
                         f"data check {path} --root {root} lists them, --out FILE writes the rest)")
    return n_lines


def iter_samples(path: Path, root: Path, limit: int | None = None) -> Iterator[Sample]:
    """The first `limit` samples (None: all); ValueError at a wrong line or a damaged image."""
    lines = iter_usable_lines(path, root, takes_damaged=False)
    return (line.sample for line in islice(lines, limit))


def _make_sample(data: dict, root: Path, sizes: list[tuple[int, int]], find_all: bool) -> Sample:
    images = LazyImages(tuple(EncodedImage(resolve_under_root(root, name), size)
                              for name, size in zip(data["images"], sizes)))
    coordinates = Coordinates(data.get("coordinates", Coordinates.PIXELS))
    targets = [Target(image, rescale_box(
        holder[key], coordinate_size(size, coordinates, BoxFormat()), size))
        for _, image, holder, key in box_places(data) for size in [sizes[image - 1]]]
    reference = targets.pop().box if "reference" in data else None
    return Sample(data["id"], "own", data.get("task", "own"), "train",
                  images, data["question"], tuple(targets), reference,
                  tuple(data.get("options", ())), data.get("letter", ""),
                  find_all=find_all and not is_choice(data))
