"""Remarks on a file of own data: boxes in other coordinates than stated, contradicting answers."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.data.line_checks import box_places, is_choice

LEAST_CHANCE = 1e-3  # that boxes anywhere in their images all end where these do, else a remark
LEAST_OUTSIDE = 0.1  # share of lines with a box outside its coordinates, for a remark
SHOWN = 3  # pairs of lines, of those that contradict each other


class Remarks:
    """Collects what `sentences` says; in memory: a hash of each box and question, each answer."""

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
        """Take one line in. place: its name. sizes, problems: of `find_file_problems`."""
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
        """Add the chance that a box which ends anywhere in its image fits the other frame, too."""
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
