"""Images that annotations name by path: found under one root and nowhere else, opened one sample at
a time.

An annotation file comes from somewhere else, so a path in it is not trusted: it must be relative,
must not climb with "..", and what it points to must lie under the root after symbolic links are
followed.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath

import imagehash
import numpy as np
from PIL import Image

MAX_PIXELS = 100_000_000
MAX_ASPECT_RATIO = 200
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# what Pillow's readers raise for broken files; those of AVIF, DDS and JPEG 2000 the last two
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RuntimeError,
                 MemoryError)


class BadImage(ValueError):
    """An image that cannot be used.

    reason: "outside root", "missing image", "unreadable image" or "image shape".
    """

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


@dataclass
class SkipReport:
    """What was left out of a data set, and why.

    read: records; kept: questions. max_names: how many names are kept per reason. counts, names: by
    reason.
    """

    read: int = 0
    kept: int = 0
    max_names: int = 5
    counts: Counter = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out for `reason`; the first few are remembered by name."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < self.max_names:
            names.append("".join(c if c.isprintable() else "?" for c in name[:200]))

    def summarize(self) -> str:
        """One line per reason, the most frequent first."""
        left_out = sum(self.counts.values())
        lines = [f"records {self.read}, questions kept {self.kept}, left out {left_out}"]
        for reason, count in self.counts.most_common():
            names = self.names[reason]
            more = ", ..." if count > len(names) else ""
            lines.append(f"  {count:>7}  {reason}: {', '.join(names)}{more}")
        return "\n".join(lines)


def resolve_under_root(root: Path, name: str) -> Path:
    """The path of `name` under `root`, whether it exists or not.

    BadImage if it is, or leads, anywhere else.
    """
    relative = PurePosixPath(name)
    is_odd = not relative.parts or "\0" in name or "\\" in name
    if is_odd or relative.is_absolute() or ".." in relative.parts:
        raise BadImage("outside root", f"{name!r} is no path below the image root; write it "
                                       "relative to the root, without '..'")
    try:
        path, base = (root / relative).resolve(), root.resolve()
        is_inside = path.is_relative_to(base) and path != base
    except (OSError, RuntimeError, ValueError):  # a loop of links, too long, a lone surrogate
        is_inside = False
    if not is_inside:
        raise BadImage("outside root", f"{name!r} leads out of the image root; copy the images "
                                       "below the root")
    return path


def is_regular_file(path: Path) -> bool:
    """True for a readable regular file; a name the file system cannot hold is no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_size(path: Path) -> tuple[int, int]:
    """(width, height), pixels, from the header alone.

    BadImage if the file is missing or no image, or the image is over MAX_PIXELS or too long.
    """
    if not is_regular_file(path):
        raise BadImage("missing image", f"{path.name!r} is not there")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except DECODE_ERRORS as error:
        raise BadImage("unreadable image", f"{path.name!r} is no readable image: give a PNG or "
                                           "JPEG file") from error
    is_too_long = max(width, height) > MAX_ASPECT_RATIO * min(width, height)
    if width * height > MAX_PIXELS or is_too_long:
        raise BadImage("image shape", f"{path.name!r} has {width}x{height} pixels; Qwen2.5-VL "
                                      f"takes sides up to {MAX_ASPECT_RATIO} to 1, and the kit "
                                      f"{MAX_PIXELS} pixels; crop or shrink it")
    return width, height


def open_rgb(path: Path) -> Image.Image:
    """The image, decoded, RGB; raises as `read_size`.

    Orientation tags are not applied: boxes mean stored pixels.
    """
    read_size(path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        sentence = f"{path.name!r} is cut or broken; copy it again"
        raise BadImage("unreadable image", sentence) from error


def iter_images(folder: Path, report: SkipReport,
                limit: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """(name below the folder, RGB image) of its image files in name order.

    limit: look at so many files. What cannot be opened is counted in the report.
    """
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES)
    for path in islice(paths, limit):
        name = path.relative_to(folder).as_posix()
        try:
            image = open_rgb(resolve_under_root(folder, name))
        except BadImage as error:
            report.add(error.reason, name)
            continue
        yield name, image


def perceptual_hashes(images: Iterable[tuple[str, Image.Image]]) -> tuple[list[str], np.ndarray]:
    """Names, and a 64-bit DCT hash of each image: (n,) uint64 (ImageHash's phash, Zauner 2010)."""
    names, hashes = [], []
    for name, image in images:
        names.append(name)
        hashes.append(int(str(imagehash.phash(image)), 16))
    return names, np.array(hashes, dtype=np.uint64)


def find_near_duplicates(train: tuple[list[str], np.ndarray],
                         held_out: tuple[list[str], np.ndarray],
                         bits: int = 4) -> Iterator[tuple[str, str, int]]:
    """(training name, evaluation name, distance) of every pair whose hashes differ in at most
    `bits` of 64 bits.

    train, held_out: of `perceptual_hashes`. The default of 4 bits is our choice: re-encoded and
    resized copies of a photo stay within it. Plain images (one shape on one colour) collide; look
    at the pairs before you drop samples.
    """
    held_out_names, held_out_hashes = held_out
    for name, value in zip(*train):
        distances = np.bitwise_count(held_out_hashes ^ value)
        for index in np.flatnonzero(distances <= bits):
            yield name, held_out_names[index], int(distances[index])
