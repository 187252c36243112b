"""What a person looks at before a training: near duplicates of images, and boxes on a page."""

from collections.abc import Iterator
from pathlib import Path

import imagehash
import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_atomically
from mig_kit.data.records import SkipReport
from mig_kit.image_files import BadImage, open_rgb, resolve_under_root, to_data_url
from mig_kit.prompts import format_question
from mig_kit.sample import Sample

# Our choice: re-encoded and resized copies of a photo stay within it. Plain images (one shape on
# one colour) collide; look at the pairs before you drop samples.
MOST_BITS = 4

Hashes = tuple[list[str], np.ndarray]
PREVIEW = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Preview</title>
<style>
body { font: 15px sans-serif; margin: 2em }
h2 { font-size: 15px; margin: 1.5em 0 0 }
p { margin: .3em 0 }
img { max-width: 100% }
</style>
{% for name, question, correct, url in rows %}
<h2>{{ name }}</h2>
<p>{{ question }} (correct: {{ correct }})</p>
<img alt="" src="{{ url }}">
{% endfor %}
"""


def hash_images(folder: Path, report: SkipReport) -> Hashes:
    """Sorted names below the folder, and (n,) uint64: ImageHash's 64-bit phash of each image.

    The report counts files that cannot be opened.
    """
    names, hashes = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            if path.is_symlink():
                report.add("a link to a folder, not looked at", name)
            continue
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


def write_preview(samples: Iterator[Sample], out: Path) -> int:
    """Draw the samples' boxes into one escaped page, and return how many samples were drawn.

    Raises: UserError for a name not ending in .html, a missing folder, or no sample.
    """
    import jinja2  # of an extra, as matplotlib of the next

    from mig_kit.drawing.pictures import draw_sample

    if out.suffix.lower() != ".html":
        raise UserError(f"{out} must end in .html")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out} is in no folder that exists; make {out.parent} first")
    rows = [(sample.id, format_question(sample, BoxFormat(), with_instruction=False),
             sample.letter or f"{len(sample.targets)} drawn in green",
             to_data_url(draw_sample(sample, height=220))) for sample in samples]
    if not rows:
        raise UserError("there is no question to draw; the file is empty, or has no correct line "
                         "(mig-kit data check lists what is wrong)")
    page = jinja2.Environment(autoescape=True).from_string(PREVIEW).render(rows=rows)
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return len(rows)
