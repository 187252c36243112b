"""What a person looks at before a training: what is wrong with lines, and twelve of them drawn."""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, write_atomically
from mig_kit.data.line_checks import INVERTED, LEAVES
from mig_kit.data.own_data import Line
from mig_kit.drawing.pictures import draw_sample
from mig_kit.image_files import to_data_url
from mig_kit.prompts import format_question

SHOWN, DRAWN = 100, 12  # lines that are named; questions on a sheet
FEWEST = 20  # boxes that tell a frame from others
PAGE = """<!doctype html><meta charset="utf-8"><title>Questions and boxes</title>
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>body { font: 15px sans-serif; margin: 2em } img { max-width: 100% }</style>
"""


@dataclass
class Findings:
    """What the lines of a file have shown."""

    n_lines: int = 0
    wrong: Counter = field(default_factory=Counter)  # lines, by the reason of their first problem
    n_boxes: int = 0
    n_outside: int = 0  # boxes that leave their image
    n_inverted: int = 0
    furthest: tuple[float, str] = (0.0, "")  # the largest of the lines' `reaches`, and its line
    n_drawable: int = 0
    drawn: list[Line] = field(default_factory=list)  # up to DRAWN, at random

    @property
    def n_doubtful(self) -> int:
        """Boxes that no frame and order of numbers would give, which speak against the others."""
        return self.n_outside + self.n_inverted

    def add(self, line: Line, rng: random.Random) -> None:
        """Take in a line."""
        self.n_lines += 1
        self.n_boxes += len(line.reaches)
        reasons = [problem.reason for problem in line.problems]
        self.n_outside += reasons.count(LEAVES)
        self.n_inverted += reasons.count(INVERTED)
        self.furthest = max(self.furthest, (max(line.reaches, default=0.0), line.place))
        if line.problems:
            self.wrong[line.problems[0].reason] += 1
        if line.sample:
            self.n_drawable += 1
            place = rng.randrange(self.n_drawable)  # each line is as likely to be drawn
            if len(self.drawn) < DRAWN:
                self.drawn.append(line)
            elif place < DRAWN:
                self.drawn[place] = line


def sort_lines(lines: Iterable[Line], word: str, out: Path | None, file: Path, root: Path,
               say: Callable[[str], object]) -> Findings:
    """Say what is wrong with lines of own data, and write the correct ones to `out`, if there are.

    Args:
        word: what a line is called. file, root: that the lines are from.
    """
    if out and (out.resolve() == file.resolve() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {out} is FILE itself, or in no folder that exists; name another "
                        "file")
    findings, rng, sentences, n_lost = Findings(), random.Random(0), [], 0
    temporary = out.with_name(f"{out.name}.tmp") if out else Path(os.devnull)
    try:
        with temporary.open("w", encoding="utf-8") as correct:
            for line in lines:
                findings.add(line, rng)
                if not line.problems:
                    correct.write(json.dumps(line.record) + "\n")
                elif len(sentences) < SHOWN:
                    sentences.append(f"{line.place}: {'; '.join(map(str, line.problems))}")
                reasons = {problem.reason for problem in line.problems}
                n_lost += bool(reasons) and reasons <= {"missing image", "outside root"}
        if n_lost and n_lost == findings.n_lines:
            raise UserError(f"none of the images of {file} is in {root.resolve()}, which is where "
                            f"--root says that they are, else FILE's folder ({sentences[0]})")
        for sentence in sentences:
            say(sentence)
        n_wrong = findings.wrong.total()
        n_correct = findings.n_lines - n_wrong
        # what passes although most boxes are wrong does so by chance
        is_written = out and n_correct and 2 * findings.n_doubtful <= findings.n_boxes
        if is_written:  # an older file is not replaced by none
            temporary.replace(out)
    finally:
        if out:
            temporary.unlink(missing_ok=True)
    written = f"; {n_correct} written to {out} (image root: {root})" if is_written else (
        "; nothing written" * bool(out))
    more = f" (the first {SHOWN} shown)" * (n_wrong > SHOWN)
    say(f"{findings.n_lines} {word}s, {n_correct} correct, {n_wrong} wrong{more}{written}")
    for reason, count in findings.wrong.most_common():
        say(f"  {count:>7}  {reason}")
    reach, place = findings.furthest
    if findings.n_boxes:
        inverted = f", {findings.n_inverted} are inverted" * bool(findings.n_inverted)
        say(f"{findings.n_outside} of {findings.n_boxes} boxes leave their image{inverted}; the "
            f"furthest reaches {100 * reach:.0f} % of its image's width or height ({place})")
    if findings.n_boxes >= FEWEST and reach <= 0.5:
        say(f"no box of {findings.n_boxes} passes half of its image: are their numbers of another "
            "frame than 'coordinates' says?")
    if findings.n_doubtful > findings.n_boxes / 10:
        say("so many that others are probably wrong, too: look at the boxes, and say in "
            "'coordinates' what their numbers are (corners, not x, y, width, height)")
    return findings


def write_sheet(lines: Iterable[Line], out: Path) -> None:
    """Draw the lines' boxes on their images: one escaped page."""
    rows = []
    for line in lines:
        question = format_question(line.sample, BoxFormat(), with_instruction=False)
        answer = line.sample.letter or f"{len(line.sample.targets)} drawn in green"
        rows.append(f"<h4>{escape(line.place)}</h4>\n<p>{escape(question)} (correct: "
                    f"{escape(answer)}) {escape('; '.join(map(str, line.problems)))}</p>\n"
                    f'<img alt="" src="{to_data_url(draw_sample(line.sample, height=220))}">\n')
    write_atomically(out, lambda temporary: temporary.write_text(PAGE + "".join(rows), "utf-8"))
