"""What `mig-kit run` prints of its stages: starts, some progress, and results."""

import logging
import re
import time

STEP = re.compile(r"^step (\d+)/(\d+): ")
BAR = re.compile(r"^(?!Loading weights: )(.+?): +(\d+)%\|")
# What whoever runs a stage should hear of; a bar may stand before it.
NEWS = re.compile(r"(?:the server https?://\S+ .*is left out|warning: ).*")


class StageLines(logging.Handler):
    """A log handler that prints a stage's start, some progress of its notebook, and its result."""

    def __init__(self):
        super().__init__()
        self.started = 0.0
        self.shown: set[tuple[str, int]] = set()  # fifths of the work that a line has told of

    def set(self, name: str, state: str, summary: str = "") -> None:
        """A stage is now "running", "up to date", "done" or "failed"; summary: its result."""
        if state == "running":
            self.started = time.monotonic()
            self.shown.clear()
        minutes = (time.monotonic() - self.started) / 60
        took = f" in {minutes:.1f} min" if state == "done" else ""
        result = f"; {summary}" if summary else ""
        print(f"{name}: {state}{took}{result}", flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        """Print those lines of a notebook's output that tell of progress, or are news."""
        for line in record.getMessage().split("\n"):
            line = line.rsplit("\r", 1)[-1].strip()  # a bar is printed over itself
            if news := NEWS.search(line):
                print(f"  {news.group()}", flush=True)
            elif self._is_due(line):
                print(f"  {line}", flush=True)

    def _is_due(self, line: str) -> bool:
        """Whether a line of progress is the first in its fifth of the work."""
        if match := STEP.match(line):
            label, share = "step", int(match[1]) / int(match[2])
        elif match := BAR.match(line):
            label, share = match[1], int(match[2]) / 100
            if share < 1:  # a bar per batch of replies is many bars: each tells of its end only
                return False
        else:
            return False
        fifth = (label, int(5 * share))
        is_new = fifth not in self.shown
        self.shown.add(fifth)
        return is_new and share > 0
