"""Files of one JSON object a line, read in bounded memory whatever they hold."""

from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 1 << 20


def lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line without its end), None for a line over MAX_LINE bytes; never more than that in memory."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) <= MAX_LINE or line.endswith(b"\n"):
                yield number, line.rstrip(b"\r\n")
                continue
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, None
