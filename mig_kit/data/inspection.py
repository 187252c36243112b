"""What a person looks at before a training: what is wrong with lines, and boxes on a page."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html import escape
from pathlib import Path

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_atomically
from mig_kit.data.file_remarks import Remarks
from mig_kit.data.own_data import Line
from mig_kit.data.records import describe_counts
from mig_kit.image_files import to_data_url
from mig_kit.prompts import format_question
from mig_kit.sample import Sample

SHOWN = 100  # lines that are named
PAGE = """<!doctype html><meta charset="utf-8"><title>Preview</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body { font: 15px sans-serif; margin: 2em } img { max-width: 100% }</style>
"""


def sort_lines(lines: Iterable[Line], remarks: Remarks, word: str, out: Path | None, file: Path,
               root: Path, say: Callable[[str], object]) -> tuple[Counter, bool]:
    """Say what is wrong with lines of own data, and write the correct ones to `out`.

    Nothing is written if none is correct, or if one reason refuses a fifth of the file.

    Args:
        remarks: takes in the lines. word: what one is called. file, root: that they are from.
    Returns: the wrong lines by reason, and whether `out` is written.
    """
    if out and (out.resolve() == file.resolve() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out} is FILE itself, or in no folder that exists; name another "
                        "file")
    counts: Counter[str] = Counter()
    temporary = out.with_name(f"{out.name}.tmp") if out else Path(os.devnull)
    try:
        with temporary.open("w", encoding="utf-8") as correct:
            for line in lines:
                if not line.problems:
                    correct.write(json.dumps(line.record) + "\n")
                    continue
                counts[line.problems[0].reason] += 1
                if counts.total() <= SHOWN:
                    say(f"{line.place}: {'; '.join(map(str, line.problems))}")
        n_correct = remarks.n_lines - counts.total()
        is_written = bool(out and n_correct and not remarks.file_fault())
        if is_written:  # an older file is not replaced by none
            temporary.replace(out)
    finally:
        if out:
            temporary.unlink(missing_ok=True)
    written = f"; {n_correct} written to {out} (image root: {root})" if is_written else ""
    more = f" (the first {SHOWN} shown)" if counts.total() > SHOWN else ""
    say(f"{remarks.n_lines} {word}s, {n_correct} correct, {counts.total()} wrong{more}"
        f"{written or '; nothing written' * bool(out)}")
    for sentence in [*describe_counts(counts),
                     *(f"remark: {sentence}" for sentence in remarks.sentences())]:
        say(sentence)
    return counts, is_written


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
