"""Pictures of own data: the questions' boxes on their images, before anyone trains on them."""

from collections.abc import Iterator
from pathlib import Path

import jinja2
from PIL import Image, ImageDraw

from mig_kit.common import write_atomically
from mig_kit.drawing.pictures import draw_sample, missing_letters, text_font
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


def write_preview(samples: Iterator[Sample], out: Path, height: int = 220) -> tuple[int, str]:
    """Draw the samples' boxes on their images into a .png or a self-contained .html; gives how many
    were drawn, and a sentence where no font of this machine has the letters for a PNG.

    height: of the images, pixels. Text is escaped in HTML; in a PNG it is cut to one line.
    ValueError for another ending or a missing folder, and if there is no sample.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"{out} must end in .png or .html")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"{out} is in no folder that exists; make {out.parent} first")
    strips = [(sample.id, _question_text(sample), draw_sample(sample, height=height))
              for sample in samples]
    if not strips:
        raise ValueError("there is no question to draw; the file is empty, or has no correct line "
                         "(mig-kit data check lists what is wrong)")
    note = ""
    if out.suffix.lower() == ".html":
        rows = [(name, question, to_data_url(strip)) for name, question, strip in strips]
        page = jinja2.Environment(autoescape=True).from_string(PREVIEW).render(rows=rows)
        write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    else:
        sheet, missing = _preview_sheet(strips)
        if missing:
            note = (f"no font of this machine has {missing!r}, and boxes stand in their place; "
                    "install one (as Noto Sans CJK for Chinese), or write an .html")
        write_atomically(out, lambda temporary: sheet.save(temporary, format="PNG"))
    return len(strips), note


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


def _preview_sheet(strips: list[tuple[str, str, Image.Image]]) -> tuple[Image.Image, str]:
    """All strips below each other, and some letters that could not be drawn, "" if all could."""
    head = 24
    width = max(640, *(strip.width for _, _, strip in strips))
    height = sum(strip.height + head for _, _, strip in strips)
    sheet = Image.new("RGB", (width, height), "white")
    pen, top, missing = ImageDraw.Draw(sheet), 0, set()
    for name, question, strip in strips:
        line = f"{name}: {question}"[:160]
        missing |= missing_letters(line)
        pen.text((8, top + 4), line, fill="black", font=text_font(14, line))
        sheet.paste(strip, (0, top + head))
        top += strip.height + head
    return sheet, "".join(sorted(missing)[:20])
