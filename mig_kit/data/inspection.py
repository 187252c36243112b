"""What a person looks at before a training: near duplicates of images, and boxes on a page."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

import imagehash
import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_atomically
from mig_kit.image_files import BadImage, open_rgb, resolve_under_root, to_data_url
from mig_kit.prompts import format_question
from mig_kit.sample import Sample

# Our choice: re-encoded and resized copies of a photo stay within it. Plain images (one shape on
# one colour) collide; look at the pairs before you drop samples.
MOST_BITS = 4

Hashes = tuple[list[str], np.ndarray]
PAGE = """<!doctype html><meta charset="utf-8"><title>Preview</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body { font: 15px sans-serif; margin: 2em } img { max-width: 100% }</style>
"""


def hash_images(folder: Path, on_skip: Callable[[str], object]) -> Hashes:
    """Sorted names below the folder, and (n,) uint64: ImageHash's 64-bit phash of each image.

    on_skip: called with a sentence for a file that cannot be opened, or a link to a folder.
    """
    names, hashes = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if path.is_symlink():
                on_skip(f"left out, {name}: a link to a folder, not looked at")
            continue
        try:
            image = open_rgb(resolve_under_root(folder, name))
        except BadImage as error:
            on_skip(f"left out, {name}: {error}")
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


def write_preview(samples: Iterator[Sample], out: Path) -> int:
    """Draw the samples' boxes into one escaped page, and return how many samples were drawn.

    Raises: UserError for a name not ending in .html, a missing folder, or no sample.
    """
    from mig_kit.drawing.pictures import draw_sample  # of an extra

    if out.suffix.lower() != ".html" or not out.absolute().parent.is_dir():
        raise UserError(f"{out} must end in .html, in a folder that exists")
    rows = []
    for sample in samples:
        question = format_question(sample, BoxFormat(), with_instruction=False)
        answer = sample.letter or f"{len(sample.targets)} drawn in green"
        rows.append(f"<h4>{escape(sample.id)}</h4>\n<p>{escape(question)} (correct: "
                    f'{escape(answer)})</p>\n<img alt="" src="'
                    f'{to_data_url(draw_sample(sample, height=220))}">\n')
    if not rows:
        raise UserError("there is no question to draw; the file is empty, or has no correct line "
                        "(mig-kit data check lists what is wrong)")
    write_atomically(out, lambda temporary: temporary.write_text(PAGE + "".join(rows), "utf-8"))
    return len(rows)
