"""The log of finished calls to a teacher: a JSON object a line, read when it is looked at."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

NO_REPLY = {"failed": "no reply in any attempt"}


class CallLog(Mapping):
    """Finished calls by key, each read from its place in the file `path`; none if there is no file.

    A call waits in memory until `write` has put it into the file. A last line that a kill has cut
    is dropped from the file; ValueError if another line is broken.
    """

    def __init__(self, path: Path):
        self.path = path
        self.places: dict[str, int] = {}
        self.unwritten: dict[str, dict] = {}
        place = 0
        if not path.is_file():
            return
        with path.open("r+b") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    file.truncate(place)
                    break
                try:
                    self.places[json.loads(line)["key"]] = place
                except (ValueError, TypeError, KeyError) as error:
                    raise ValueError(f"{path} line {number} is broken; delete that line, and its "
                                     "call is made again") from error
                place += len(line)

    def __getitem__(self, key: str) -> dict:
        if key in self.unwritten:
            return self.unwritten[key]
        with self.path.open("rb") as file:
            file.seek(self.places[key])
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[str]:
        yield from self.places
        yield from self.unwritten

    def __len__(self) -> int:
        return len(self.places) + len(self.unwritten)

    def write(self, file: BinaryIO) -> None:
        """Append what is not in the file yet to `file`, the open file of this log, down to the
        disk.
        """
        for key, entry in self.unwritten.items():
            self.places[key] = file.seek(0, os.SEEK_END)
            file.write((json.dumps(entry) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
        self.unwritten.clear()


@dataclass(frozen=True)
class LoggedReplies(Sequence):
    """What the log holds under `keys`, in order, each read when it is looked at.

    convert: from an entry, NO_REPLY if there is none, to an item.
    """

    log: CallLog
    keys: list[str]
    convert: Callable[[dict], object]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return replace(self, keys=self.keys[index])
        return self.convert(self.log.get(self.keys[index], NO_REPLY))
