"""What `mig-kit run` shows, on a terminal and off it."""

import io
import logging

from rich.console import Console

from mig_kit.common import progress_bar
from mig_kit.pipeline.stage_table import StageTable


def record(text):
    return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with StageTable(["01", "02"], Console(file=out, width=40)) as shown:
        shown.set("01", "up to date")
        shown.set("02", "running")
        shown.emit(record("step 12/24: loss 0.5; 1.0 min left [not markup]" + " long" * 20))
        shown.set("02", "done")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["01: up to date", "02: running"] and lines[-1] == "02: done in 0.0 min"
    assert lines[2].startswith("step 12/24: loss 0.5; 1.0 min left [not markup]") and len(lines) == 4


def test_a_bar_that_a_notebook_prints_is_seen_with_its_time_left(capsys):
    with progress_bar(range(4), "replies") as bar:
        for _ in zip(range(2), bar):
            bar.refresh()
    printed = capsys.readouterr().out
    out = io.StringIO()
    shown = StageTable(["04"], Console(file=io.StringIO(), width=120, force_terminal=True))
    shown.set("04", "running")
    shown.emit(record(printed[:printed.index("1/4") + 20]))
    assert shown.last.startswith("replies: ") and "1/4 [00:0" in shown.last and "\r" not in shown.last
    plain = StageTable(["04"], Console(file=out, width=120))
    plain.emit(record(printed))
    assert len(out.getvalue().splitlines()) == 1 and "replies: " in out.getvalue() and "\r" not in out.getvalue()


def test_a_table_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with StageTable(["01_synthesize", "02_sft", "03_merge"], console) as shown:
        shown.set("01_synthesize", "running")
        shown.set("01_synthesize", "done")
        shown.set("02_sft", "running")
        shown.emit(record("Executing Cell 5"))
        shown.emit(record("step 12/24: loss 0.5; 1.0 min left\n"))
        plain = Console(file=io.StringIO(), width=120)
        plain.print(shown.table())
        text = plain.file.getvalue()
    rows = [line.split(maxsplit=3) for line in text.splitlines()]
    assert rows[1][:3] == ["01_synthesize", "done", "0.0"] and rows[3] == ["03_merge", "waiting"]
    assert rows[2][:3] == ["02_sft", "running", "0.0"] and rows[2][3].strip() == "step 12/24: loss 0.5; 1.0 min left"
    assert "02_sft" in out.getvalue()
