"""What a person looks at before a training: boxes on a page."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_atomically
from mig_kit.image_files import to_data_url
from mig_kit.prompts import format_question
from mig_kit.sample import Sample

PAGE = """<!doctype html><meta charset="utf-8"><title>Preview</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body { font: 15px sans-serif; margin: 2em } img { max-width: 100% }</style>
"""


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
