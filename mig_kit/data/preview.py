"""A page of own data: the questions' boxes on their images, before anyone trains on them."""

from collections.abc import Iterator
from pathlib import Path

import jinja2

from mig_kit.common import write_atomically
from mig_kit.drawing.pictures import draw_sample
from mig_kit.image_files import to_data_url
from mig_kit.prompts import LETTERS
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
{% for name, question, url in rows %}
<h2>{{ name }}</h2>
<p>{{ question }}</p>
<img alt="" src="{{ url }}">
{% endfor %}
"""


def write_preview(samples: Iterator[Sample], out: Path) -> int:
    """Draw the samples' boxes on their images into a self-contained page, whose text is escaped;
    gives how many were drawn.

    ValueError for a name that does not end in .html, for a missing folder, and without a sample.
    """
    if out.suffix.lower() != ".html":
        raise ValueError(f"{out} must end in .html")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} is in no folder that exists; make {out.parent} first")
    rows = [(sample.id, _question_text(sample), to_data_url(draw_sample(sample, height=220)))
            for sample in samples]
    if not rows:
        raise ValueError("there is no question to draw; the file is empty, or has no correct line "
                         "(mig-kit data check lists what is wrong)")
    page = jinja2.Environment(autoescape=True).from_string(PREVIEW).render(rows=rows)
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return len(rows)


def _question_text(sample: Sample) -> str:
    """The question on one line, with the options of multiple choice and the correct letter, and of
    questions for all boxes how many there are.
    """
    text = sample.question
    if sample.find_all:
        text += f" (correct: all {len(sample.targets)})" if sample.targets else " (correct: none)"
    if sample.options:
        options = "; ".join(f"{letter}. {option}"
                            for letter, option in zip(LETTERS, sample.options))
        text += f" {options} (correct: {sample.letter})"
    return " ".join(text.split())
