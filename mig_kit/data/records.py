"""Records of a data set: JSON lines, a JSON list, a parquet table or a CSV; others are refused."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import ijson

from mig_kit.common import UserError, iter_lines

NOT_IN_CSV = ("question", "letter", "id", "task", "reply", "coordinates")  # cells that are no JSON


class Problem(UserError):
    """Why a question cannot be used, in one sentence; reason: a few words, by which to count."""

    def __init__(self, reason: str, sentence: str = ""):
        super().__init__(sentence or reason)
        self.reason = reason


def require(condition: bool, reason: str, sentence: str = "") -> None:
    """Raise a Problem unless the condition holds."""
    if not condition:
        raise Problem(reason, sentence)


def entry_word(path: Path) -> str:
    """What an entry of the file is called: a line, a record of a list, or a row of a table."""
    with path.open("rb") as file:
        opening = file.read(1024).lstrip()
    if path.suffix == ".csv" or opening.startswith(b"PAR1"):
        return "row"
    if opening and opening[:1] not in b"[{":
        raise UserError(f"{path} is neither JSON in UTF-8 nor parquet nor CSV; save its records as "
                        "JSON, one object a line")
    return "record" if opening.startswith(b"[") else "line"


def iter_entries(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("line 1", its record or what is wrong with it) of every entry, one in memory at a time.

    Raises: UserError for a file of another kind, and where a list or table is cut.
    """
    word = entry_word(path)
    read = _iter_json_lines if word == "line" else _iter_list if word == "record" else _iter_table
    try:
        for number, record in enumerate(read(path), 1):
            if not isinstance(record, dict | Problem):
                record = Problem(f"the {word} is no JSON object; write one {{...}} per {word}")
            yield f"{word} {number}", record
    except (ValueError, OSError, csv.Error, ijson.JSONError) as error:
        raise UserError(f"{path} is cut or broken ({str(error).splitlines()[0].strip()}); save it "
                        "again") from error


def _iter_json_lines(path: Path) -> Iterator[object]:
    for line in iter_lines(path):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            yield Problem("the line is no JSON object; write one {...} per line, not one over "
                          "several")


def _iter_list(path: Path) -> Iterator[object]:
    with path.open("rb") as file:
        yield from ijson.items(file, "item", use_float=True)


def _iter_table(path: Path) -> Iterator[dict]:
    """The rows of a parquet, or of a CSV, whose lists and numbers are JSON; empty cells go."""
    if path.suffix != ".csv":
        from pyarrow import parquet  # of an extra

        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
        return
    with path.open(newline="", encoding="utf-8-sig") as file:
        delimiter = max(",;", key=file.readline().count)  # spreadsheets of some countries write ;
        file.seek(0)
        for row in csv.DictReader(file, delimiter=delimiter):
            yield {key: _read_cell(key, text) for key, text in row.items() if text}


def _read_cell(key: str, text: str) -> object:
    try:
        return text if key in NOT_IN_CSV else json.loads(text)
    except ValueError:
        return text
