"""A page of own data: the questions' boxes on their images, before anyone trains on them."""

from collections.abc import Iterator
from pathlib import Path

import jinja2

from mig_kit.boxes import BoxFormat
from mig_kit.common import write_atomically
from mig_kit.drawing.pictures import draw_sample
from mig_kit.image_files import to_data_url
from mig_kit.prompts import format_question
from mig_kit.sample import Sample

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


def write_preview(samples: Iterator[Sample], out: Path) -> int:
    """Draw the samples' boxes into one escaped page, and return how many samples were drawn.

    Raises: ValueError for a name not ending in .html, a missing folder, or no sample.
    """
    if out.suffix.lower() != ".html":
        raise ValueError(f"{out} must end in .html")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} is in no folder that exists; make {out.parent} first")
    rows = [(sample.id, format_question(sample, BoxFormat(), with_instruction=False),
             sample.letter or f"{len(sample.targets)} drawn in green",
             to_data_url(draw_sample(sample, height=220))) for sample in samples]
    if not rows:
        raise ValueError("there is no question to draw; the file is empty, or has no correct line "
                         "(mig-kit data check lists what is wrong)")
    page = jinja2.Environment(autoescape=True).from_string(PREVIEW).render(rows=rows)
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return len(rows)
