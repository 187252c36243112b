"""Records of a data set: JSON lines, one JSON list or a parquet table; other files are refused."""

import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ijson

from mig_kit.common import MAX_LINE, iter_lines
from mig_kit.image_files import LFS_POINTER, is_lfs_pointer
from mig_kit.sample import name_broken_table

MAX_JSON_DEPTH = 32
MAX_NAMES = 5  # of what is left out, per reason
# an escape for one half of a character beyond U+FFFF without the other
HALF_EMOJI = re.compile(
    rb"\\u[dD](?<!\\\\u[dD])(?:[89abAB]..(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB]..\\u[dD])[c-fC-F]..)", re.DOTALL)
BYTE_ORDER_MARK, PARQUET = b"\xef\xbb\xbf", b"PAR1"


class Problem(ValueError):
    """Why a record cannot be used, in one sentence: what is wrong, and after ";" the remedy."""

    @property
    def reason(self) -> str:
        """What is wrong, to count."""
        return str(self).partition(";")[0]


@dataclass
class SkipReport:
    """What was left out of a data set, and why."""

    read: int = 0  # records
    kept: int = 0  # questions
    counts: Counter = field(default_factory=Counter)  # by reason
    names: dict[str, list[str]] = field(default_factory=dict)  # the first MAX_NAMES, by reason
    remarks: list[str] = field(default_factory=list)  # on what is kept
    file: Path | None = None  # gets every name with its reason

    def add(self, reason: str, name: str) -> None:
        """Count one more thing left out for `reason`; the first few are remembered by name."""
        self.counts[reason] += 1
        name = "".join(letter if letter.isprintable() else "?" for letter in name[:200])
        names = self.names.setdefault(reason, [])
        names += [name] * (len(names) < MAX_NAMES)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(f"{reason}: {name}\n")

    def summarize(self) -> str:
        """One line per reason, the most frequent first."""
        lines = [f"records {self.read}, questions kept {self.kept}, left out "
                 f"{self.counts.total()}"]
        for reason, count in self.counts.most_common():
            names = self.names[reason]
            more = ", ..." if count > len(names) else ""
            lines.append(f"  {count:>7}  {reason}: {', '.join(names)}{more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ImportRules:
    """How a file of another project is read; root: the folder that holds all images."""

    root: Path
    coordinates: str = ""  # of all boxes in texts, "" if the file states them
    is_padded: bool = False  # boxes are of the padded square, as in haotian-liu/LLaVA#606
    several: str = ""  # several boxes in an answer: any is correct, all must be found, "" not used
    instances: Path | None = None  # the COCO file of RefCOCO's annotations
    split: str = "train"  # taken of a file that has several


def require(condition: bool, sentence: str) -> None:
    """Raise a Problem unless the condition holds."""
    if not condition:
        raise Problem(sentence)


def _read_json(line: bytes | None) -> tuple[object, str]:
    """The value on a line, and why there is none; None for a line over MAX_LINE bytes."""
    if line is None:
        return None, (f"the line is longer than {MAX_LINE} bytes; put one question on a line, and "
                      "images into files of their own")
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: name), ""
    except UnicodeDecodeError:
        return None, "the line is not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        if not line.strip():
            return None, "the line is empty; delete it"
        is_syntax = isinstance(error, json.JSONDecodeError)
        reason = f"character {error.colno}: {error.msg}" if is_syntax else str(error)[:60]
        return None, f"the line is no JSON object ({reason}); write one {{...}} per line"


def entry_word(path: Path) -> str:
    """What an entry of the file is called: a line, a record of a list, or a row of a table."""
    opening = _read_opening(path)
    return ("row" if opening.startswith(PARQUET) else "record" if opening.startswith(b"[")
            else "line")


def _read_opening(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(BYTE_ORDER_MARK).lstrip()


def require_records(path: Path) -> None:
    """ValueError, with the way in, unless a file begins as JSON or a parquet table does."""
    opening = _read_opening(path)
    if is_lfs_pointer(path):
        raise ValueError(f"{path} {LFS_POINTER}")
    if opening and not opening.startswith((PARQUET, b"{", b"[")):
        raise ValueError(f"{path} is neither JSON in UTF-8 nor parquet; unpack it, or save its "
                         "records as JSON, one object a line (pandas: to_json(..., "
                         "orient='records', lines=True)); the kit opens no pickle")


def iter_entries(path: Path) -> Iterator[tuple[int, object, str]]:
    """(number from 1, record, what is wrong with it) of every entry, one in memory at a time."""
    require_records(path)
    word = entry_word(path)
    if re.match(rb'{\s*\n\s*"', _read_opening(path)):
        raise ValueError(f"{path} holds one JSON object over several lines; save its questions as "
                         "one list, [{...}, {...}], or one object a line")
    if word == "line":
        results = (_read_json(line) for _, line in iter_lines(path))
    else:
        results = ((record, "") for record in (
            _iter_rows(path) if word == "row" else iter_records(path)))
    number = 0
    try:
        for number, (record, problem) in enumerate(results, 1):
            is_none = not problem and not isinstance(record, dict)
            yield number, record, (
                f"the {word} is no JSON object; write one {{...}} per {word}" * is_none or problem)
    except ValueError as error:  # the file is broken
        yield number + 1, None, str(error)


def _iter_rows(path: Path) -> Iterator[dict]:
    """The rows of a parquet table, without their empty cells."""
    from pyarrow import parquet  # of an extra

    with name_broken_table(path, "download it again"):
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            for row in batch.to_pylist():
                yield {key: value for key, value in row.items() if value is not None}


def iter_records(path: Path, prefix: str = "item") -> Iterator[object]:
    """The elements of a JSON list, one in memory at a time; ValueError if the file is broken.

    prefix: ijson's name of the list, such as "images.item" for the list under the key "images".
    """
    if path.stat().st_size:
        _refuse_half_emoji(path)
    try:
        with path.open("rb") as file:
            file.seek(3 if file.read(3) == BYTE_ORDER_MARK else 0)
            events = _limit_depth(ijson.basic_parse(file, use_float=True), path)
            yield from ijson.items(ijson.parse(events), prefix)
    except (ijson.JSONError, UnicodeError) as error:
        reason = str(error)[:80]
        which = "" if prefix == "item" else ", or not the one object of a COCO file"
        raise ValueError(f"{path} is cut or no JSON{which} ({reason}); save or download it "
                         "again") from error


def _refuse_half_emoji(path: Path) -> None:
    """ValueError where the file holds half a surrogate pair, which ijson would read as "?"."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if half := HALF_EMOJI.search(content):
            before = content[max(0, half.start() - 40):half.start()].decode(errors="replace")
            raise ValueError(f"{path} holds half an emoji, {half[0].decode()}, after {before!r}; "
                             "write the whole character, or take it out")


def _limit_depth(events: Iterator, path: Path) -> Iterator:
    """The JSON events; ValueError over MAX_JSON_DEPTH, with whose square ijson's memory grows."""
    depth = 0
    for event in events:
        depth += event[0].startswith("start") - event[0].startswith("end_")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"{path} is nested over {MAX_JSON_DEPTH} deep, which no annotation "
                             "is; download it again")
        yield event
