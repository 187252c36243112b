"""Records of a data set: JSON lines, a JSON list, a parquet table or a CSV; others are refused."""

import ast
import csv
import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from mig_kit.common import UserError, iter_lines

NOT_IN_CSV = ("question", "letter", "id", "task", "reply", "coordinates")  # cells that are no JSON
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}  # of a CSV's columns
NOT_UTF8 = '{} is not in UTF-8 ({}); save it so, in Excel as "CSV UTF-8"'
ADJACENT = re.compile(r"""['"]\s+['"]""")
READ_FORMS = ("own data are JSON lines, a JSON list, parquet or CSV with the keys of "
              "notebooks/guide/own_data.md, which has two scripts for other formats (COCO; "
              "conversations)")


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
        opening = file.read(1024).removeprefix(BOM_UTF8).lstrip()
    if path.suffix in (".csv", ".tsv") or opening.startswith(b"PAR1"):
        return "row"
    if opening and opening[:1] not in b"[{":
        raise UserError(f"{path} is neither JSON in UTF-8 nor parquet nor CSV; {READ_FORMS}")
    return "record" if opening.startswith(b"[") else "line"


def iter_entries(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("line 1", its record or what is wrong with it) of every entry; only a list is read whole.

    Raises: UserError for a file of another kind, and where a list or table is cut.
    """
    word = entry_word(path)
    try:
        records = (json.loads(path.read_text("utf-8-sig")) if word == "record" else
                   _iter_json_lines(path) if word == "line" else _iter_table(path))
        for number, record in enumerate(records, 1):
            if not isinstance(record, dict | Problem):
                record = Problem(f"the {word} is no JSON object; write one {{...}} per {word}")
            yield f"{word} {number}", record
    except UnicodeDecodeError as error:
        raise UserError(NOT_UTF8.format(path, error)) from error
    except (ValueError, RecursionError, OSError, csv.Error) as error:
        raise UserError(f"{path} is cut or broken ({str(error).splitlines()[0].strip()}); save it "
                        "again") from error


def require_own_data(path: Path) -> None:
    """UserError unless the first entry of a file, if it is an object, has the keys of own data."""
    _, record = next(iter_entries(path), ("", {}))
    if isinstance(record, Problem) and next(iter_lines(path)).strip() == b"{":
        raise UserError(f"{path} is JSON over several lines, and no list; {READ_FORMS}")
    keys = () if isinstance(record, Problem) else [*record]
    if keys and not {"images", "question"} <= {*keys}:
        raise UserError(f"{path} is no own data: its first {entry_word(path)} has the keys "
                        f"{', '.join(map(repr, keys))[:200]}, not both of images and question; "
                        f"{READ_FORMS}")


def _iter_json_lines(path: Path) -> Iterator[object]:
    for line in iter_lines(path):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Problem("the line is no JSON object", f"the line is no JSON object ({error}); "
                          "write one {...} per line, in UTF-8")


def _iter_table(path: Path) -> Iterator[dict | Problem]:
    """The rows of a parquet, or of a CSV, whose lists and numbers are JSON; empty cells go."""
    if path.suffix not in (".csv", ".tsv"):
        from pyarrow import parquet  # of an extra

        file = parquet.ParquetFile(path)
        # pandas saves the order of shuffled rows beside their columns
        columns = [name for name in file.schema_arrow.names if name != "__index_level_0__"]
        for batch in file.iter_batches(batch_size=16, columns=columns):
            yield from batch.to_pylist()
        return
    for row in iter_csv_rows(path):
        yield row if isinstance(row, Problem) else {
            key: _read_cell(key, text) for key, text in row.items() if text}


def iter_csv_rows(path: Path) -> Iterator[dict[str, str | None] | Problem]:
    """The rows of a CSV as texts, None where one is too short; a Problem for one too long."""
    csv.field_size_limit(1 << 20)  # of the whole process
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        # spreadsheets of some countries write semicolons
        delimiter = max(SEPARATORS, key=header.count)
        if delimiter not in header:
            raise ValueError(f"its first line {header[:60]!r} has no columns that are separated by "
                             f"{' or '.join(SEPARATORS.values())}")
        file.seek(0)
        for row in csv.DictReader(file, delimiter=delimiter):
            yield row if None not in row else Problem(
                "the row has more columns than the first line, separated by "
                f"{SEPARATORS[delimiter]}; put texts that hold some between quotes")


def _read_cell(key: str, text: str) -> object:
    """A cell's list or number, in JSON's form or in Python's, as pandas writes lists; else text."""
    readers = [json.loads, ast.literal_eval] if key not in NOT_IN_CSV else []
    # numpy writes no commas, so that Python would read two texts as one
    for read in readers[:1] if ADJACENT.search(text) else readers:
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text
