"""What a whole file tells: the frame that its boxes fit, what refuses much of it, two answers.

No frame is guessed from prose: a reading of the boxes is named only if every box fits it.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, iou, rescale_box, smart_resize
from mig_kit.data.line_checks import OwnLine, own_letters
from mig_kit.data.records import Problem
from mig_kit.image_files import BadImage, ImageHeader

LEAST_CHANCE = 1e-3  # that boxes anywhere in the stated frame all fit another one, else a remark
LEAST_REFUSED = 0.2, 3  # share and number of lines that one reason refuses, for the whole file
LEAST_FILLED = 0.75  # of a frame that is named: the furthest box reaches at least so far
MOST_LIKE = 0.8  # a frame that is nearly as wide or high as the stated one says nothing
SHOWN = 3  # pairs of lines, of those that contradict each other
IMAGE_WORD = re.compile(r"\bimage\s?(\d{1,3})\b", re.IGNORECASE)


def _longest(side: int):
    return lambda size: (side * size[0] / max(size), side * size[1] / max(size))


def _resized(max_pixels: int):
    return lambda size: smart_resize(*size, max_pixels=max_pixels)


# frame -> the size of an image of `size` in it; each has a remedy
FRAMES = {
    "percent, 0 to 100": lambda size: (100, 100),
    "0 to 1 (normalized_1)": lambda size: (1, 1),
    "0 to 640, as of images stretched to 640x640": lambda size: (640, 640),
    "0 to 1000 (normalized_1000)": lambda size: (1000, 1000),
    **{f"pixels of the image with its longest side at {side}": _longest(side)
       for side in (640, 1024, 1280)},
    **{f"pixels of the resized image (--coordinates absolute --max-pixels {most})": _resized(most)
       for most in (401408, 1003520)},
    "pixels": lambda size: size}
# other orders of the four numbers -> the corners that they mean
ORDERS = {
    "x, y, width, height": lambda x, y, w, h: (x, y, x + w, y + h),
    "centre x, centre y, width, height": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2,
                                                             y + h / 2),
    "y1, x1, y2, x2": lambda y1, x1, y2, x2: (x1, y1, x2, y2),
    "two corners that were read as x, y, width, height": lambda x1, y1, x2, y2: (x1, y1, x2 - x1,
                                                                                 y2 - y1)}


def _fits(box: tuple, frame: tuple, margin: float = 0.0) -> bool:
    return (-margin <= box[0] < box[2] <= frame[0] + margin
            and -margin <= box[1] < box[3] <= frame[1] + margin)


class Remarks:
    """What is to be said of a whole file; in memory are each box and each answer."""

    def __init__(self) -> None:
        self.n_lines = self.n_boxes = self.n_lettered = 0
        self.refused: Counter[str] = Counter()  # lines, by the reason of a problem
        self.fits, self.furthest = Counter(), Counter()  # boxes, and the share of the frame
        self.chance = Counter()  # by frame: log, that boxes of the stated one fit it
        self.stated: Counter[str] = Counter()  # boxes by their coordinates
        self.images: set[tuple[int, int]] = set()  # their sizes
        self.turned = Counter()
        self.unnamed: list[str] = []  # questions about images that are not there
        self._conflicts: list[str] = []
        self._answers: dict[int, tuple[str, object]] = {}
        self._numbers: set[tuple] = set()  # boxes whatever their image: only new ones are evidence

    def add(self, place: str, line: OwnLine | None, headers: Sequence[ImageHeader | BadImage],
            problems: list[Problem]) -> None:
        """Take in the line called `place`; None for one that could not be read."""
        self.n_lines += 1
        self.refused.update({problem.reason for problem in problems if problem.is_fault})
        if line is None:
            return
        for _, number, box in line.places():
            header = headers[number - 1] if number <= len(headers) else None
            if isinstance(header, ImageHeader):
                self._weigh(line.coordinates or "pixels", box, header)
        self.n_lettered += bool(own_letters(line.options or []))
        numbers = map(int, IMAGE_WORD.findall(line.question))
        self.unnamed += [place] * any(not 1 <= number <= len(line.images) for number in numbers)
        if not problems:
            self._compare(place, line, [header.size for header in headers])

    def _weigh(self, stated: str, box: tuple, header: ImageHeader) -> None:
        """Count the frames and orders in which a box, in its `stated` coordinates, fits."""
        size = header.size
        frame = coordinate_size(size, Coordinates(stated), BoxFormat())
        is_new = box not in self._numbers
        self._numbers.add(box)
        self.n_boxes += 1
        self.stated[stated] += 1
        self.images.add(size)
        self.fits["stated"] += _fits(box, frame)
        self.furthest["stated"] = max(self.furthest["stated"], box[2] / frame[0],
                                      box[3] / frame[1])
        for name, to_size in FRAMES.items():
            width, height = to_size(size)
            self.fits[name] += _fits(box, (width, height), margin=1e-3 * width)
            self.furthest[name] = max(self.furthest[name], box[2] / width, box[3] / height)
            self.chance[name] += is_new * sum(
                math.log(new / old) for new, old in zip((width, height), frame)
                if new < MOST_LIKE * old)
        for name, to_corners in ORDERS.items():
            self.fits[name] += _fits(to_corners(*box), frame, margin=1.0)
        if header.stored_size != size:
            pixels = rescale_box(box, frame, size)
            self.turned.update(images=1, upright=_fits(pixels, size),
                               stored=_fits(pixels, header.stored_size))

    def _compare(self, place: str, line: OwnLine, sizes: list[tuple[int, int]]) -> None:
        """Count the line if an earlier one has the same question and images, and another answer."""
        coordinates = Coordinates(line.coordinates or "pixels")
        boxes = [(number, rescale_box(box, coordinate_size(size, coordinates, BoxFormat()), size))
                 for _, number, box in line.places() for size in [sizes[number - 1]]]
        reference = boxes.pop() if line.reference else None
        question = " ".join(line.question.split()).casefold()
        key = hash((*line.images, question, reference, *(line.options or ())))
        answer = line.letter or boxes
        first, other = self._answers.setdefault(key, (place, answer))
        if not _agree(answer, other):
            self._conflicts.append(f"{first} and {place}")

    def file_fault(self) -> str:
        """A sentence where one reason refuses a fifth of the lines or more, "" if none does."""
        share, least = LEAST_REFUSED
        reason, count = max(self.refused.items(), key=lambda pair: pair[1], default=("", 0))
        if count < max(least, share * self.n_lines):
            return ""
        if reason == "an image 0":
            return (f"{count} of {self.n_lines} questions name image 0, so the file counts images "
                    "from 0 and every other number is one too low; add 1 to all")
        sentence = f"{count} of {self.n_lines} lines are refused for one reason: {reason}"
        if reading := self._other_reading():
            sentence += f"; {reading}"
        return f"{sentence}; the other lines may be wrong, too"

    def _other_reading(self) -> str:
        """A clause on the orders or frames in which all boxes fit; "" if the stated one is best."""
        if self.n_boxes < 2 or self.fits["stated"] == self.n_boxes:
            return ""
        orders = [name for name in ORDERS if self.fits[name] == self.n_boxes]
        names = orders or self._fitting_frames()
        return (f"as {' or as '.join(names[:2])} all {self.n_boxes} boxes would lie in their "
                f"images, and as stated {self.fits['stated']} do") if names else ""

    def _fitting_frames(self) -> list[str]:
        """The frames in which every box fits and that the boxes fill, the tightest first."""
        names = [name for name in FRAMES if self.fits[name] == self.n_boxes
                 and self.furthest[name] >= LEAST_FILLED]
        return sorted(names, key=lambda name: self.chance[name])

    def _frame_remark(self) -> str:
        """A sentence if the boxes are probably measured in something else than stated."""
        if self.n_boxes < 2 or self.stated["normalized_1"] == self.n_boxes:
            return ""
        if self.n_boxes - self.fits["stated"] > 1 and (reading := self._other_reading()):
            return f"some boxes do not lie in their images: {reading}"
        stated, reach = " and ".join(self.stated), self.furthest["stated"]
        widths, heights = (sorted(sides) for sides in zip(*self.images))
        names = [name for name in self._fitting_frames()
                 if self.chance[name] < math.log(LEAST_CHANCE)]
        if names:
            return (f"all {self.n_boxes} boxes are stated as {stated}, and all fit {names[0]}, "
                    f"though the images are {widths[0]} to {widths[-1]} pixels wide and "
                    f"{heights[0]} to {heights[-1]} high: if that is their frame, convert or state "
                    "it; look at a few (mig-kit data check --preview)")
        if reach < LEAST_FILLED and len(self._numbers) * math.log(reach) < math.log(LEAST_CHANCE):
            return (f"none of the {self.n_boxes} boxes, stated as {stated}, reaches beyond "
                    f"{100 * reach:.0f} % of its image's width or height: they may be of smaller "
                    "copies of the images; look at a few (mig-kit data check --preview)")
        return ""

    def sentences(self) -> list[str]:
        """The remarks, each with its evidence; none for most files."""
        remarks = list(filter(None, [self.file_fault() or self._frame_remark()]))
        if self.turned["images"]:
            n_images, upright, stored = (self.turned[key] for key in ("images", "upright",
                                                                      "stored"))
            remarks.append(
                f"{n_images} of {self.n_boxes} boxes are in photos that their EXIF data turn; "
                f"boxes are of the upright picture, which {upright} of them fit, and {stored} "
                "would fit the stored one; look at some (mig-kit data check --preview)")
        if self.n_lettered:
            remarks.append(f"{self.n_lettered} questions have options that begin with letters of "
                           "their own, as in 'A. a cup'; the prompt writes letters once")
        if self.unnamed:
            remarks.append(f"{len(self.unnamed)} questions name an image that is not there "
                           f"({self.unnamed[0]}); images are called image 1, image 2")
        if self._conflicts:
            more = ", ..." * (len(self._conflicts) > SHOWN)
            remarks.append(f"{len(self._conflicts)} questions are asked of the same images before, "
                           "with another answer, and no reply is correct for both "
                           f"({', '.join(self._conflicts[:SHOWN])}{more}); keep one of them, or "
                           "write one question with 'boxes' (any is correct)")
        return remarks


def _agree(answer: str | list, other: str | list) -> bool:
    """Whether one reply can be correct for both answers."""
    if not answer or not other or isinstance(answer, str) or isinstance(other, str):
        return answer == other
    return any(number == other_number and iou(box, other_box) >= 0.5
               for number, box in answer for other_number, other_box in other)
