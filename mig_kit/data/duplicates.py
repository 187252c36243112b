"""Near duplicates between two folders of images, by perceptual hashes."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from mig_kit.data.records import SkipReport
from mig_kit.image_files import BadImage, open_rgb, resolve_under_root


def iter_images(folder: Path, report: SkipReport, limit: int | None = None,
                orientation: str = "upright") -> Iterator[tuple[str, Image.Image]]:
    """(name below the folder, RGB image) of its image files, whatever their names end in, in name
    order.

    limit: look at so many files. orientation: one of ORIENTATIONS. What cannot be opened is counted
    in the report.
    """
    paths = (path for path in sorted(folder.rglob("*")) if not path.is_dir())
    for path in islice(paths, limit):
        name = path.relative_to(folder).as_posix()
        try:
            image = open_rgb(resolve_under_root(folder, name), orientation)
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
