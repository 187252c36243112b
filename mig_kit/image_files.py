"""Images that annotations name by path: found under one root and nowhere else, opened one sample at a time.

An annotation file comes from somewhere else, so a path in it is not trusted: it must be relative, must not climb with "..",
and what it points to must lie under the root after symbolic links are followed.
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
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class BadImage(ValueError):
    """An image that cannot be used. reason: "outside root", "missing image", "unreadable image" or "image shape"."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


@dataclass
class SkipReport:
    """What was left out of a data set, and why. named: how many names are kept per reason."""

    read: int = 0
    kept: int = 0
    named: int = 5
    counts: Counter = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out for `reason`; the first few are remembered by name."""
        self.counts[reason] += 1
        if len(first := self.names.setdefault(reason, [])) < self.named:
            first.append("".join(c if c.isprintable() else "?" for c in name[:200]))

    def text(self) -> str:
        """One line per reason, the most frequent first."""
        lines = [f"records {self.read}, questions kept {self.kept}, left out {sum(self.counts.values())}"]
        lines += [f"  {n:>7}  {reason}: {', '.join(self.names[reason])}{', ...' if n > len(self.names[reason]) else ''}"
                  for reason, n in self.counts.most_common()]
        return "\n".join(lines)


def resolve_under_root(root: Path, name: str) -> Path:
    """The path of `name` under `root`, whether it exists or not; BadImage if it is, or leads, anywhere else."""
    pure = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise BadImage("outside root", f"{name!r} is no path below the image root; write it relative to the root, without '..'")
    try:
        real, base = (root / pure).resolve(), root.resolve()
        inside = real.is_relative_to(base) and real != base
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name too long, a lone surrogate
        inside = False
    if not inside:
        raise BadImage("outside root", f"{name!r} leads out of the image root; copy the images below the root")
    return real


# what Pillow's readers raise for broken files; those of AVIF, DDS and JPEG 2000 the last two
DECODE_ERRORS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, RuntimeError, MemoryError)


def is_regular_file(path: Path) -> bool:
    """True for a readable regular file; a name the file system cannot hold is no file."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_size(path: Path) -> tuple[int, int]:
    """(width, height), pixels, from the header alone; BadImage if it is missing, no image, over MAX_PIXELS or too long."""
    if not is_regular_file(path):
        raise BadImage("missing image", f"{path.name!r} is not there")
    try:
        with Image.open(path) as image:
            width, height = image.size
    except DECODE_ERRORS as error:
        raise BadImage("unreadable image", f"{path.name!r} is no readable image: give a PNG or JPEG file") from error
    if width * height > MAX_PIXELS or max(width, height) > 200 * min(width, height):
        raise BadImage("image shape", f"{path.name!r} has {width}x{height} pixels; Qwen2.5-VL takes sides up to 200 to 1, and the "
                                      f"kit {MAX_PIXELS} pixels; crop or shrink it")
    return width, height


def open_rgb(path: Path) -> Image.Image:
    """The image, decoded, RGB; BadImage as `size_of`. Orientation tags are not applied: boxes mean stored pixels."""
    read_size(path)
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        raise BadImage("unreadable image", f"{path.name!r} is cut or broken; copy it again") from error


def perceptual_hashes(images: Iterable[tuple[str, Image.Image]]) -> tuple[list[str], np.ndarray]:
    """Names, and a 64-bit DCT hash of each image: (n,) uint64 (ImageHash's phash, Zauner 2010)."""
    names, hashes = [], []
    for name, image in images:
        names.append(name)
        hashes.append(int(str(imagehash.phash(image)), 16))
    return names, np.array(hashes, dtype=np.uint64)


def find_near_duplicates(train: tuple[list[str], np.ndarray], held_out: tuple[list[str], np.ndarray], bits: int = 4
                    ) -> Iterator[tuple[str, str, int]]:
    """(training name, evaluation name, distance) of every pair whose hashes differ in at most `bits` of 64 bits.

    train, held_out: as `perceptual_hashes` gives them. The default of 4 bits is our choice: re-encoded and resized copies of
    a photo stay within it. Plain pictures (one shape on one colour) collide; look at the pairs before dropping samples.
    """
    for name, value in zip(*train):
        distance = np.bitwise_count(held_out[1] ^ value)
        for index in np.flatnonzero(distance <= bits):
            yield name, held_out[0][index], int(distance[index])


def iter_images(folder: Path, report: SkipReport, limit: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """(name below the folder, RGB image) of its image files in name order; what cannot be opened is counted in the report."""
    found = (p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)
    for path in islice(found, limit):
        name = path.relative_to(folder).as_posix()
        try:
            image = open_rgb(resolve_under_root(folder, name))
        except BadImage as bad:
            report.add(bad.reason, name)
            continue
        yield name, image
