"""Near duplicates between two folders of images, by perceptual hashes."""

from collections.abc import Iterator
from pathlib import Path

import imagehash
import numpy as np

from mig_kit.data.records import SkipReport
from mig_kit.image_files import BadImage, open_rgb, resolve_under_root

# Our choice: re-encoded and resized copies of a photo stay within it. Plain images (one shape on
# one colour) collide; look at the pairs before you drop samples.
MOST_BITS = 4

Hashes = tuple[list[str], np.ndarray]


def hash_images(folder: Path, report: SkipReport) -> Hashes:
    """Sorted names below the folder, and (n,) uint64: ImageHash's 64-bit phash of each image.

    The report counts files that cannot be opened.
    """
    names, hashes = [], []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        try:
            image = open_rgb(resolve_under_root(folder, name))
        except BadImage as error:
            report.add(error.reason, name)
            continue
        names.append(name)
        hashes.append(int(str(imagehash.phash(image)), 16))
    return names, np.array(hashes, dtype=np.uint64)


def find_near_duplicates(train: Hashes, held_out: Hashes) -> Iterator[tuple[str, str, int]]:
    """(training name, evaluation name, distance) of pairs that differ in at most MOST_BITS bits."""
    held_out_names, held_out_hashes = held_out
    for name, value in zip(*train):
        distances = np.bitwise_count(held_out_hashes ^ value)
        for index in np.flatnonzero(distances <= MOST_BITS):
            yield name, held_out_names[index], int(distances[index])
