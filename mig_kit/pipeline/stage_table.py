"""What `mig-kit run` shows: a live table of stages on a terminal, elsewhere a line per event."""

import logging
import re
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

# What papermill and libraries print for their own sake.
NOISE = re.compile(
    r"^(Executing Cell|Ending Cell|Executing notebook|Input Notebook|Output Notebook"
    r"|<[\w.]+[ >]"
    r"|\[IPKernelApp\] WARNING \| Kernel is running over TCP|.*(Future|User|Deprecation)Warning: "
    r"|\s*warnings\.warn\(|Loading weights: |\[?\d+ rows x \d+ columns|Empty DataFrame"
    r"|Columns: \[\]"
    r"|Index: \[\])")
# What is worth a line where there is no terminal: a training's progress and a bar's.
STEP = re.compile(r"^step (\d+)/(\d+): ")
BAR = re.compile(r"^(.+?): +(\d+)%\|")
# What whoever runs a stage should hear of, on a terminal too; a bar may stand before it.
NEWS = re.compile(r"(?:the server https?://\S+ .*is left out|warning: ).*")


class StageTable(logging.Handler):
    """States of the stages by name; a log handler that takes what the notebooks print.

    Use it in a `with` statement. On a terminal a table lives while the stages run. Elsewhere a
    stage has a line when it starts, a few lines of progress, and a line with its result.
    """

    def __init__(self, names: list[str], console: Console | None = None):
        super().__init__()
        self.console = console or Console(highlight=False)
        self.states = dict.fromkeys(names, "waiting")
        self.started: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self.last_line = ""
        self.shown: set[tuple[str, int]] = set()  # fifths of the work that a line has told of
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2,
                         transient=False)

    def __enter__(self):
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *args):
        if self.console.is_terminal:
            self.live.stop()

    def set(self, name: str, state: str, summary: str = "") -> None:
        """A stage is "running", "up to date", "done" or "failed" now; summary: its result."""
        now = time.monotonic()
        if state == "running":
            self.started[name], self.last_line = now, ""
            self.shown.clear()
        elif name in self.started:
            self.seconds[name] = now - self.started[name]
        self.states[name] = state
        if self.console.is_terminal:
            return
        minutes = f" in {self.seconds[name] / 60:.1f} min" if state == "done" else ""
        result = f"; {summary}" if summary else ""
        self._print(f"{name}: {state}{minutes}{result}")

    def emit(self, record: logging.LogRecord) -> None:
        """What a notebook printed: on a terminal its last line is shown, elsewhere its progress."""
        for line in record.getMessage().split("\n"):
            line = line.rsplit("\r", 1)[-1].rstrip()  # a bar is printed over itself
            if not line or NOISE.match(line):
                continue
            self.last_line = line.strip()
            if news := NEWS.search(line):
                self._print(f"  {news.group()}")
            elif not self.console.is_terminal and self._is_due(line):
                self._print(f"  {line.strip()}")

    def _is_due(self, line: str) -> bool:
        """Whether a line of progress is the first of its fifth of the work."""
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

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def table(self) -> Table:
        """Stage, state, minutes, and of the running stage the last line that it printed."""
        table = Table("stage", "state", "minutes", box=None, padding=(0, 2, 0, 0))
        table.add_column("now", no_wrap=True, overflow="ellipsis")
        colours = {"running": "bold", "failed": "red", "done": "green", "up to date": "green",
                   "waiting": "dim"}
        for name, state in self.states.items():
            is_running = state == "running"
            running_for = time.monotonic() - self.started[name] if is_running else None
            seconds = self.seconds.get(name, running_for)
            minutes = "" if seconds is None else f"{seconds / 60:.1f}"
            now = self.last_line if is_running else ""
            table.add_row(name, Text(state, colours[state]), minutes, Text(now))
        return table
