"""What `mig-kit run` shows: on a terminal the stages as a table that lives while they run, elsewhere one line per event."""

import logging
import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


class StageTable(logging.Handler):
    """States of the stages by name; as a log handler it takes what the notebooks print. Use it in a `with` statement."""

    def __init__(self, names: list[str], console: Console | None = None):
        super().__init__()
        self.console = console or Console(highlight=False)
        self.states = dict.fromkeys(names, "waiting")
        self.begun: dict[str, float] = {}
        self.taken: dict[str, float] = {}
        self.last = ""
        self.live = Live(get_renderable=self.table, console=self.console, refresh_per_second=2, transient=False)

    def __enter__(self):
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *args):
        if self.console.is_terminal:
            self.live.stop()

    def set(self, name: str, state: str) -> None:
        """A stage is "running", "up to date", "done" or "failed" now."""
        now = time.monotonic()
        if state == "running":
            self.begun[name], self.last = now, ""
        elif name in self.begun:
            self.taken[name] = now - self.begun[name]
        self.states[name] = state
        if not self.console.is_terminal:
            time_taken = f" in {self.taken[name] / 60:.1f} min" if state == "done" else ""
            self.console.print(f"{name}: {state}{time_taken}", markup=False, soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """A line that a notebook printed: kept as the stage's last on a terminal, printed elsewhere."""
        message = "\n".join(line.rsplit("\r", 1)[-1] for line in record.getMessage().split("\n"))  # a bar is printed over itself
        text = message.strip()
        if text and not self.console.is_terminal:
            self.console.print(message.strip("\n"), markup=False, soft_wrap=True)
        elif text and not text.startswith(("Executing Cell", "Ending Cell", "<")):
            self.last = text.splitlines()[-1]

    def table(self) -> Table:
        """Stage, state, minutes, and of the running stage the last line it printed."""
        made = Table("stage", "state", "minutes", box=None, padding=(0, 2, 0, 0))
        made.add_column("now", no_wrap=True, overflow="ellipsis")
        colours = {"running": "bold", "failed": "red", "done": "green", "up to date": "green", "waiting": "dim"}
        for name, state in self.states.items():
            seconds = self.taken.get(name, time.monotonic() - self.begun[name] if state == "running" else None)
            minutes = "" if seconds is None else f"{seconds / 60:.1f}"
            made.add_row(name, Text(state, colours[state]), minutes, Text(self.last if state == "running" else ""))
        return made
