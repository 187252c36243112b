"""Records of a data set: JSON lines, a JSON list or a parquet table; others are refused."""

import json
import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path

from mig_kit.common import UserError, iter_lines

INDEX_COLUMN = re.compile(r"__index_level_\d+__|Unnamed: [\d.]+")  # pandas saves it with the others
READ_FORMS = ("own data are JSON lines, a JSON list or parquet with the keys of "
              "notebooks/guide/own_data.md, which has two scripts for other formats (COCO; "
              "conversations)")
TABLE = """{} is a table of texts, and own data have lists; write it as JSON lines with
import ast, pandas
cells = dict.fromkeys(["images", "box", "boxes", "reference", "options"],
                      lambda cell: ast.literal_eval(cell or "None")) | {{"id": str}}
pandas.read_csv({!r}, converters=cells).to_json({!r}, orient="records", lines=True)"""


class Problem(UserError):
    """Why a question cannot be used, in one sentence; reason: a few words, by which to count."""

    def __init__(self, reason: str, sentence: str = ""):
        super().__init__(sentence or reason)
        self.reason = reason


def refuse_unless(condition: bool, reason: str, sentence: str = "") -> None:
    """Raise a Problem unless the condition holds."""
    if not condition:
        raise Problem(reason, sentence)


def entry_word(path: Path) -> str:
    """What an entry of the file is called: a line, a record of a list, or a row of a table."""
    with path.open("rb") as file:
        opening = file.read(1024).removeprefix(BOM_UTF8).lstrip()
    if path.suffix == ".csv":
        raise UserError(TABLE.format(path, str(path), str(path.with_suffix(".jsonl"))))
    if opening.startswith(b"PAR1"):
        return "row"
    if opening and opening[:1] not in b"[{":
        raise UserError(f"{path} is neither JSON in UTF-8 nor parquet; {READ_FORMS}")
    return "record" if opening.startswith(b"[") else "line"


def iter_entries(path: Path) -> Iterator[tuple[str, dict | Problem]]:
    """("line 1", its record or what is wrong with it) of every entry; only a list is read whole.

    Raises: UserError for a file of another kind, and where a list or table is cut.
    """
    word = entry_word(path)
    try:
        records = (json.loads(path.read_text("utf-8-sig")) if word == "record" else
                   _iter_json_lines(path) if word == "line" else _iter_parquet(path))
        for number, record in enumerate(records, 1):
            if isinstance(record, dict):
                record = {key: record[key] for key in record if not INDEX_COLUMN.fullmatch(key)}
            elif not isinstance(record, Problem):
                record = Problem(f"the {word} is no JSON object; write one {{...}} per {word}")
            yield f"{word} {number}", record
    except (ValueError, RecursionError, OSError) as error:
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


def iter_image_names(path: Path) -> Iterator[str]:
    """The names of all images of own data, relative to their root; raises as `iter_entries`."""
    for _, record in iter_entries(path):
        names = record.get("images") if isinstance(record, dict) else None
        for name in names if isinstance(names, list) else ():
            yield str(name).removeprefix("file://")


def _iter_json_lines(path: Path) -> Iterator[object]:
    for line in iter_lines(path):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Problem("the line is no JSON object", f"the line is no JSON object ({error}); "
                          "write one {...} per line, in UTF-8")


def _iter_parquet(path: Path) -> Iterator[dict]:
    from pyarrow import parquet  # of an extra

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
        yield from batch.to_pylist()
