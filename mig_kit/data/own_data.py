"""Your own data: JSON lines or a JSON list, one question each, checked before anyone trains on it.

notebooks/guide/own_data.md explains the keys. If one line has "targets" or "image": null, every
question of the file asks for all boxes; else the prompt would tell how many there are.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, iou, rescale_box
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
from mig_kit.filters import drop_reason
from mig_kit.image_files import BadImage, EncodedImage, LazyImages, resolve_under_root
from mig_kit.sample import Sample, Target

LEAST_CHANCE = 1e-3  # that boxes anywhere in their images all end where these do, else a remark
LEAST_OUTSIDE = 0.1  # share of lines with a box outside its coordinates, for a remark
SHOWN = 3  # pairs of lines, of those that contradict each other


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


class Remarks:
    """What is to be said of a whole file: other coordinates than stated, contradicting answers.

    In memory are a hash of each box and question, and each answer.
    """

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()  # what is said of so many questions
        self._n_lines = self._n_outside = self._n_conflicts = 0
        self._conflicts: list[str] = []
        self._answers: dict[int, tuple[str, object]] = {}
        self._boxes: set[int] = set()
        # by coordinates: the sizes of the images, the logarithm of the chance
        self._images, self._chance = defaultdict(dict), Counter()

    def add(self, place: str, data: dict, sizes: Sequence[tuple[int, int]],
            problems: list[str]) -> None:
        """Take in the line called `place`, with what `find_file_problems` says of it."""
        self._n_lines += 1
        self._n_outside += any("outside '" in problem or " leaves image " in problem
                               for problem in problems)
        if problems:
            return
        coordinates = data.get("coordinates")
        pixels = []
        for _, number, holder, key in box_places(data):
            size, box = sizes[number - 1], holder[key]
            frame_size = coordinate_size(size, Coordinates(coordinates), BoxFormat())
            pixels.append((number, rescale_box(box, frame_size, size)))
            self._weigh(coordinates, data["images"][number - 1], size, box)
        self._compare(place, data, pixels)

    def _weigh(self, coordinates: str, image: str, size: tuple[int, int], box: list) -> None:
        """Add the chance that a box that ends anywhere in its image fits the other frame, too."""
        if hash((image, *box)) in self._boxes or coordinates == Coordinates.NORMALIZED_1:
            return
        self._boxes.add(hash((image, *box)))
        self._images[coordinates][image] = size
        for side, end in zip(size, box[2:]):
            limits = (side, 1000) if coordinates == Coordinates.PIXELS else (1000, side)
            fits = end <= limits[1]
            self._chance[coordinates] += math.log(min(1, limits[1] / limits[0])) if fits else 1e9

    def _compare(self, place: str, data: dict, boxes: list[tuple[int, tuple]]) -> None:
        reference = boxes.pop() if "reference" in data else None
        question = " ".join(data["question"].split()).casefold()
        images = map(os.path.normpath, data["images"])
        key = hash((*images, question, reference, *data.get("options", ())))
        answer = data["letter"] if is_choice(data) else (boxes, "boxes" in data)
        first, other = self._answers.setdefault(key, (place, answer))
        if not _agree(answer, other):
            self._n_conflicts += 1
            self._conflicts += [f"{first} and {place}"] * (len(self._conflicts) < SHOWN)

    def sentences(self) -> list[str]:
        """The remarks, each with its evidence; none for most files."""
        remarks = [f"{count} questions {text}" for text, count in self.notes.most_common(SHOWN)]
        if self._n_outside >= max(2, LEAST_OUTSIDE * self._n_lines):
            remarks.append(f"{self._n_outside} of {self._n_lines} questions have boxes outside "
                           "their coordinates, so the other boxes may be measured in something "
                           "else, too; look at them (mig-kit data preview)")
        for coordinates, fits, other in (
                (Coordinates.PIXELS, "no box reaches beyond 1000", Coordinates.NORMALIZED_1000),
                (Coordinates.NORMALIZED_1000, "every box would lie in its image as pixels",
                 Coordinates.PIXELS)):
            if self._chance[coordinates] < math.log(LEAST_CHANCE):
                remarks.append(f"{fits} though {self._describe_sizes(coordinates)}; if the boxes "
                               f"are {other} and not {coordinates}, state that")
        if self._n_conflicts:
            more = ", ..." if self._n_conflicts > SHOWN else ""
            remarks.append(f"{self._n_conflicts} questions are asked of the same images before, "
                           "with another answer, and no reply is correct for both "
                           f"({', '.join(self._conflicts)}{more}); keep one of them, or write one "
                           "question with 'boxes' (any is correct) or 'targets' (all)")
        return remarks

    def _describe_sizes(self, coordinates: str) -> str:
        is_large = coordinates == Coordinates.PIXELS
        sides = [[side for side in sides if (side > 1000) == is_large and side != 1000]
                 for sides in zip(*self._images[coordinates].values())]
        sides, word = max(zip(sides, ("wide", "high")), key=lambda pair: len(pair[0]))
        n_images = len(self._images[coordinates])
        count = f"all {n_images}" if len(sides) == n_images else f"{len(sides)} of {n_images}"
        span = f"{min(sides)} to {max(sides)}" if min(sides) < max(sides) else str(min(sides))
        return f"{count} images are {span} pixels {word}"


def _agree(answer: object, other: object) -> bool:
    """Whether one reply can be correct for both answers."""
    if isinstance(answer, str) or isinstance(other, str):
        return answer == other
    (boxes, is_any), (others, other_is_any) = answer, other
    overlaps = [[number == other_number and iou(box, other_box) >= 0.5
                 for other_number, other_box in others] for number, box in boxes]
    if is_any or other_is_any:
        return any(map(any, overlaps))
    return len(boxes) == len(others) and all(map(any, overlaps)) and all(map(any, zip(*overlaps)))


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


def require_correct_lines(path: Path, root: Path, remarks: Remarks | None = None) -> int:
    """The number of lines; ValueError with the first wrong one. Damaged images are left to 01."""
    word, n_lines, n_wrong, first = entry_word(path), 0, 0, ""
    total = sum(1 for _ in iter_lines(path)) if word == "line" else None
    lines = iter_checked_lines(path, root, remarks=remarks)
    for line in progress_bar(lines, "check lines", total=total, delay=2):
        n_lines += 1
        if line.problems and not line.is_damaged:
            n_wrong += 1
            first = first or f"{word} {line.number}: {line.problems[0]}"
    require_lines(path, n_lines)
    if n_wrong:
        raise ValueError(f"{path} has {n_wrong} wrong of {n_lines} {word}s; {first} (mig-kit "
                         f"data check {path} --root {root} lists them, --out FILE writes the rest)")
    return n_lines


def require_lines(path: Path, count: int) -> None:
    """ValueError for a file with no line."""
    if not count:
        raise ValueError(f"{path} has no {entry_word(path)}; write one JSON object a line, a "
                         "question each")


def iter_samples(path: Path, root: Path, limit: int | None = None) -> Iterator[Sample]:
    """The samples of the first `limit` lines (None: all); ValueError at the first wrong line."""
    for line in islice(iter_checked_lines(path, root), limit):
        if line.problems:
            word = entry_word(path)
            raise ValueError(f"{path} {word} {line.number}: {line.problems[0]} "
                             f"(mig-kit data check {path} lists every {word})")
        yield line.sample


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
