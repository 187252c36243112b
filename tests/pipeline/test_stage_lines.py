"""What `mig-kit run` prints."""

import logging

import pytest

from mig_kit.common import progress_bar
from mig_kit.pipeline.stage_lines import StageLines


def record(text):
    return logging.LogRecord("x", logging.INFO, "", 0, text, None, None)


@pytest.fixture
def printed_by(capsys):
    """Call it with messages of a running stage for the lines that they leave."""
    def show(*messages: str) -> list[str]:
        lines = StageLines()
        for message in messages:
            lines.emit(record(message))
        return capsys.readouterr().out.splitlines()

    return show


def test_a_stage_has_its_lines(capsys):
    lines = StageLines()
    lines.set("01", "up to date")
    lines.set("02", "running")
    lines.emit(record("step 12/24: loss 0.5; 1.0 min left [not markup]" + " long" * 20))
    lines.set("02", "done", "loss 2.00 -> 0.50")
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["01: up to date", "02: running"]
    assert printed[2].startswith("  step 12/24: loss 0.5; 1.0 min left [not markup]")
    assert printed[3:] == ["02: done in 0.0 min; loss 2.00 -> 0.50"]


def test_a_training_leaves_a_line_per_fifth(printed_by):
    lines = printed_by(*(f"step {step}/100: loss 1.0; 1.0 min left" for step in range(5, 101, 5)))
    assert [line.split(":")[0].strip() for line in lines] == [
        f"step {step}/100" for step in (5, 20, 40, 60, 80, 100)]


def test_what_libraries_print_for_their_own_sake_is_left_out(printed_by):
    assert printed_by("Executing Cell 7---", "a/b.py:1: FutureWarning: old is deprecated",
                      "Loading weights: 100%|====| 4/4 [00:01<00:00]") == []


def test_a_server_that_is_left_out_is_told(printed_by):
    news = "the server http://a:1/v1 is left out (ConnectError); 1 go on"
    warning = "warning: none of the first 128 replies earned anything for box"
    assert printed_by(warning, "UserWarning: old") == [f"  {warning}"]
    bar = "\rrollouts:  40%|==    | 4/10 [00:02<00:03]"
    assert printed_by("nothing new", news, f"{bar}{news}") == [f"  {news}"] * 2


def test_a_bar_tells_of_its_end(printed_by, capsys):
    for _ in progress_bar(range(4), "replies"):
        pass
    (line,) = printed_by(capsys.readouterr().out)
    assert line.startswith("  replies: 100%|") and "4/4 [00:0" in line
