"""Files of records, and predictions as lines that each answer one item.

The kit's own line is {"index" or "id", "response"}. Logs of other kits are told by their fields:
lmms-eval (`doc_id`, `resps`), VLMEvalKit (`index`, `prediction`) and BLINK's released outputs
(`idx`, `full_prediction`).
"""

import csv
import json
import re
from pathlib import Path

from mig_kit.common import MAX_LINE, UserError, iter_lines
from mig_kit.score.annotations import BenchmarkItem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TABLES = (".parquet", ".xlsx", ".tsv", ".csv")
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".json")


def read_records(path: str | Path, may_be_empty: bool = False) -> list[dict]:
    """The objects of a .json, .jsonl, .parquet, .tsv, .csv or .xlsx file, or of a folder of files.

    Raises: UserError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return [record for file in _folder_files(path) for record in read_records(file)]
    _require_file(path)
    numbered = (dict(enumerate(_read_table(path), 1)) if path.suffix.lower() in TABLES
                else _read_numbered(path))
    for number, record in numbered.items():
        if not isinstance(record, dict):
            raise UserError(f"entry {number} of {path} is no JSON object; every entry must look "
                            "like {...}")
    if not numbered and not may_be_empty:
        raise UserError(f"{path} is empty; it needs one JSON object per item")
    return list(numbered.values())


def read_json(path: str | Path):
    """The one JSON value of a file. Raises as read_records."""
    _require_file(Path(path))
    return _parse_json(Path(path).read_bytes(), f"{path}")


def _folder_files(folder: Path) -> list[Path]:
    """The files of records below a folder, by name; of BLINK's data set the validation parts."""
    files = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file())
    for is_wanted in (lambda name: name.startswith("val"), lambda name: "samples_" in name):
        files = [path for path in files if is_wanted(path.name)] or files
    if not files:
        raise UserError(f"{folder} holds no {', '.join(FOLDER_SUFFIXES)} file; name the folder "
                        "that does")
    return files


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no file {path}; give the path of the file that was downloaded or written")


def _read_table(path: Path) -> list[dict]:
    """The rows of a table, without columns of image bytes; an empty cell of text is ""."""
    import pandas  # a second
    from pyarrow import parquet

    try:
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            columns = [field.name for field in file.schema_arrow
                       if "binary" not in str(field.type)]
            return file.read(columns).to_pylist()
        if path.suffix.lower() == ".xlsx":
            return pandas.read_excel(path, keep_default_na=False).to_dict("records")
    except ImportError:
        raise UserError(f"{path} needs openpyxl to be read; run pip install openpyxl, or save it "
                        "as CSV") from None
    except Exception as error:  # of parquet, zip and XML alike
        raise UserError(f"{path} is no readable table ({error}); download it again") from None
    csv.field_size_limit(MAX_LINE)
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader, records = csv.DictReader(file, delimiter=delimiter), []
        for record in reader:  # pandas would read a row that was cut as empty cells
            if None in record or None in record.values():
                raise UserError(f"line {reader.line_num} of {path} has another number of cells "
                                "than the first; save it again")
            records.append(record)
    return records


def _read_numbered(path: Path) -> dict[int, object]:
    """Line or place from 1 -> record of a file of JSON or JSON lines."""
    with path.open("rb") as file:
        opening = file.read(1 << 16).removeprefix(BYTE_ORDER_MARK).lstrip()
    if opening.startswith(b"[") or opening and path.suffix.lower() == ".json":
        try:
            return dict(enumerate(_unwrap(read_json(path)), 1))
        except UserError as error:
            if "Extra data" not in str(error):  # which more lines are
                raise
    numbered = {}
    for number, line in iter_lines(path):
        if line is None:
            raise UserError(f"line {number} of {path} is longer than {MAX_LINE} bytes; write one "
                            "JSON object per line")
        if line.strip(BYTE_ORDER_MARK + b" \t"):
            numbered[number] = _parse_json(line, f"line {number} of {path}")
    return numbered


def _parse_json(text: bytes, where: str):
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON in UTF-8 ({error}); write one JSON object per line, "
                        "or one JSON list") from error


def _unwrap(value) -> list:
    """The records in one JSON value: a list, BLINK's "val", lmms-eval's "logs", or columns."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    if isinstance(rows := value.get("val", value.get("logs")), list):
        return rows
    if all(isinstance(value.get(name), (list, dict)) for name in ("index", "prediction")):
        columns = {name: list(column.values()) if isinstance(column, dict) else column
                   for name, column in value.items()}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    return [value]


def align_predictions(items: tuple[BenchmarkItem, ...], records: list[dict], field: str,
                      source: str, allow_missing: bool = False,
                      left_out: tuple[int, ...] = ()) -> list[dict | None]:
    """Each item's record, in the items' order, with its prediction under `field`; None if missing.

    Args:
        records: name their items by "index" (from 0) or "id"; a table of VLMEvalKit may count from
            1. If a record repeats the correct letter, it must be the annotations'.
        source: what errors call the predictions.
        left_out: indices without an answer, whose predictions are dropped.
    Raises: UserError for records without the field, and unknown, doubled or missing indices.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id}
    first = _first_place(records, [item.index for item in items], left_out, source)
    lines: dict[int, dict] = {}
    doubled, unknown = [], []
    for number, record in enumerate(records, 1):
        where = f"prediction {number} of {source}"
        index, item_id = _read_names(record, by_id, first)
        # an "id" tells nothing where the benchmark has none
        name, items_by_name = (index, by_index) if index is not None and (
            item_id is None or not by_id) else (item_id, by_id or by_index)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise UserError(f'{where} has no "index" or "id"; a line looks like {{"index": 0, '
                            f'"{field}": ...}}')
        if str(item_id if index is None else index) in map(str, left_out):
            continue
        line = {**record, field: _read_prediction(record, field, where)}
        item = items_by_name.get(str(name))
        indexed = item if index is None else by_index.get(str(index), item)
        if indexed is not item:
            raise UserError(f'{where} has "index" {index} and "id" {item_id!r}, which are '
                            "different items")
        if field not in record:
            _compare_letters(item, record.get("target", record.get("answer")), where)
        if item is None:
            unknown.append(str(name))
        elif item.index in lines:
            doubled.append(item.name)
        else:
            lines[item.index] = line
    missing = [] if allow_missing else [item.name for item in items if item.index not in lines]
    problems = [f"{problem}: {len(names)} ({', '.join(names[:10])}{', ...' * (len(names) > 10)})"
                for problem, names in (("unknown to the annotations", unknown),
                                       ("given more than once", doubled), ("missing", missing))
                if names]
    if problems:
        hint = " (or pass --allow-missing to count missing ones wrong)" if missing else ""
        raise UserError(f"{source}: {'; '.join(problems)}; give one prediction for each of the "
                        f"{len(items)} items{hint}")
    return [lines.get(item.index) for item in items]


def _read_names(record: dict, by_id: dict[str, BenchmarkItem],
                first: int = 0) -> tuple[object, object]:
    """(index, id) that a record gives, or None each; first: index of the first item."""
    index, item_id, idx, doc_id = (None if value != value else value for value in map(
        record.get, ("index", "id", "idx", "doc_id")))
    # lmms-eval's doc_id counts within a task, so an id of the benchmark goes before it
    if {"resps", "filtered_resps"} & set(record) and "response" not in record:
        parts = [part for part in record.values() if isinstance(part, dict)]
        names = [str(part[key]) for part in parts for key in ("idx", "id") if key in part]
        known = next((name for name in names if name in by_id), None)
        return (doc_id if known is None else None), known
    if isinstance(index, float) and index.is_integer():  # of pandas, if the column has gaps
        index = int(index)
    elif isinstance(index, str):  # of a table in CSV
        index = re.sub(r"\.0$", "", index) or None
    if first and index is not None:
        index = int(index) - first
    return index, idx if item_id is None else item_id


def _first_place(records: list[dict], scored: list[int], left_out: tuple[int, ...],
                 source: str) -> int:
    """1 if the records are a whole table that counts from 1, else 0."""
    if not all("prediction" in record and "response" not in record
               and "full_prediction" not in record for record in records):
        return 0
    places = {str(_read_names(record, {})[0]) for record in records}
    for first in (0, 1):
        if any(places == {str(index + first) for index in indices}
               for indices in (scored, [*scored, *left_out])):
            return first
    if "0" in places or not all(map(str.isdecimal, places)):
        return 0
    if any("target" in record or "answer" in record for record in records):
        return 0  # whose letters are compared
    raise UserError(f"{source} has no index 0 and lacks rows, so it may count from 0 or from 1; "
                    "give the whole table, or lines with index (from 0) and response")


def _read_prediction(record: dict, field: str, where: str):
    """What a record predicts: its `field`, or the reply of another kit's log."""
    reply = record.get(field)
    if field not in record and {"resps", "filtered_resps"} & set(record):
        reply = record.get("resps", record.get("filtered_resps"))
        while isinstance(reply, list) and reply:
            reply = reply[0]
        if not isinstance(reply, str):
            raise UserError(f"{where} has no text in its resps; log the samples of a task that "
                            "generates")
    elif field not in record and "full_prediction" in record:
        reply = record["full_prediction"]
    elif field not in record and "prediction" in record:
        prediction, thinking = record["prediction"], record.get("thinking")
        reply = "" if prediction is None or prediction != prediction else str(prediction)
        if isinstance(thinking, str) and thinking:
            reply = f"<think>{thinking}</think>{reply}"
    elif field not in record:
        raise UserError(f'{where} has no "{field}"; a line looks like {{"index": 0, "{field}": '
                        f'...}}, and this one has {", ".join(record)}')
    if field == "response" and not isinstance(reply, str):
        raise UserError(f'"response" of {where} is no text; write "" where the model said nothing')
    return reply


def _compare_letters(item: BenchmarkItem | None, truth, where: str) -> None:
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", truth.strip()) if isinstance(truth, str) else None
    if item and item.letter and letter and letter[1].upper() != item.letter:
        raise UserError(f"{where} has the answer {letter[1]} where the annotations have "
                        f"{item.letter} for item {item.name}, so it counts other questions; give "
                        "the annotations that it was made from")
