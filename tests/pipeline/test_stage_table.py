"""What `mig-kit run` shows, on a terminal and off it."""

import io
import logging

from rich.console import Console

from mig_kit.common import progress_bar
from mig_kit.pipeline.stage_table import StageTable


def record(text):
    return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)


def printed_by(*messages: str) -> list[str]:
    """The lines that messages of a running stage leave where there is no terminal."""
    out = io.StringIO()
    table = StageTable(["02"], Console(file=out, width=40))
    for message in messages:
        table.emit(record(message))
    return out.getvalue().splitlines()


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with StageTable(["01", "02"], Console(file=out, width=40)) as table:
        table.set("01", "up to date")
        table.set("02", "running")
        table.emit(record("step 12/24: loss 0.5; 1.0 min left [not markup]" + " long" * 20))
        table.set("02", "done", "loss 2.00 -> 0.50")
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["01: up to date", "02: running"]
    assert lines[2].startswith("  step 12/24: loss 0.5; 1.0 min left [not markup]")
    assert lines[3:] == ["02: done in 0.0 min; loss 2.00 -> 0.50"]


def test_a_training_leaves_a_line_per_fifth():
    lines = printed_by(*(f"step {step}/100: loss 1.0; 1.0 min left" for step in range(5, 101, 5)))
    assert [line.split(":")[0].strip() for line in lines] == [
        f"step {step}/100" for step in (5, 20, 40, 60, 80, 100)]


def test_what_libraries_print_for_their_own_sake_is_left_out():
    assert printed_by(
        "Executing Cell 7---", "Ending Cell 7---", "<PIL.Image.Image image mode=RGB size=1x1>",
        "<Figure size 620x240 with 2 Axes>", "a/b.py:1: FutureWarning: old is deprecated",
        "  warnings.warn(", "[IPKernelApp] WARNING | Kernel is running over TCP without",
        "Empty DataFrame", "Columns: []", "Index: []") == []


def test_a_server_that_is_left_out_is_told_on_a_terminal_and_off_it():
    news = "the server http://a:1/v1 is left out (ConnectError); 1 go on"
    warning = "warning: none of the first 128 replies earned anything for box"
    assert printed_by(warning, "UserWarning: old") == [f"  {warning}"]
    bar = "\rrollouts:  40%|==    | 4/10 [00:02<00:03]"
    assert printed_by("nothing new", news, f"{bar}{news}") == [f"  {news}"] * 2
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, highlight=False)
    StageTable(["04"], console).emit(record(news))
    assert news in out.getvalue()


def test_a_bar_that_a_notebook_prints_is_seen_with_its_time_left(capsys):
    with progress_bar(range(4), "replies") as bar:
        for _ in zip(range(2), bar):
            bar.refresh()
        middle = capsys.readouterr().out
        for _ in bar:
            pass
    text = middle + capsys.readouterr().out
    table = StageTable(["04"], Console(file=io.StringIO(), width=120, force_terminal=True))
    table.set("04", "running")
    table.emit(record(text[:text.index("1/4") + 20]))
    assert table.last_line.startswith("replies: ") and "1/4 [00:0" in table.last_line
    assert "\r" not in table.last_line
    line, = printed_by("replies: 100%|====| 4/4 [00:01<00:00]")
    assert line == "  replies: 100%|====| 4/4 [00:01<00:00]"


def test_a_table_on_a_terminal():
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    with StageTable(["01_synthesize", "02_sft", "03_merge"], console) as table:
        table.set("01_synthesize", "running")
        table.set("01_synthesize", "done")
        table.set("02_sft", "running")
        table.emit(record("Executing Cell 5"))
        table.emit(record("step 12/24: loss 0.5; 1.0 min left\n"))
        plain = Console(file=io.StringIO(), width=120)
        plain.print(table.table())
        text = plain.file.getvalue()
    rows = [line.split(maxsplit=3) for line in text.splitlines()]
    assert rows[1][:3] == ["01_synthesize", "done", "0.0"] and rows[3] == ["03_merge", "waiting"]
    assert rows[2][:3] == ["02_sft", "running", "0.0"]
    assert rows[2][3].strip() == "step 12/24: loss 0.5; 1.0 min left"
    assert "02_sft" in out.getvalue()
