"""Replies in the files that a killed stage resumes from; reading them needs no model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mig_kit.common import write_atomically


class StoredReplies(Mapping):
    """Replies by sample id, each read from its place in a file of `sample_replies` when it
    is looked at.
    """

    def __init__(self, path: Path, places: dict[str, int]):
        self.path, self.places = path, places

    def __getitem__(self, name: str) -> list[str]:
        with self.path.open("rb") as file:
            file.seek(self.places[name])
            return json.loads(file.readline())["replies"]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class RepliesInOrder(Sequence):
    """The replies to samples with these ids, each read when it is looked at; [] where there are
    none. is_single: the one reply to each in place of a list of replies.
    """

    stored: Mapping[str, list[str]]
    ids: list[str]
    is_single: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return replace(self, ids=self.ids[index])
        name = self.ids[index]
        return self.stored[name][0] if self.is_single else self.stored.get(name, [])


def load_replies(path: Path) -> StoredReplies:
    """Replies by sample id from a file of `StoredReplies`; a line cut by a kill is dropped."""
    places: dict[str, int] = {}
    if not path.is_file():
        return StoredReplies(path, places)
    end = 0
    for name, line in _iter_complete_lines(path):
        places[name] = end
        end += len(line)
    if end != path.stat().st_size:
        write_atomically(path, lambda temporary: _copy_complete_lines(path, temporary))
    return StoredReplies(path, places)


def _copy_complete_lines(source: Path, target: Path) -> None:
    with target.open("wb") as file:
        file.writelines(line for _, line in _iter_complete_lines(source))


def _iter_complete_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """(sample id, line) of every line that is whole."""
    with path.open("rb") as file:
        for line in file:
            try:
                name = json.loads(line)["id"]
            except ValueError:
                continue
            yield name, line.rstrip(b"\n") + b"\n"
