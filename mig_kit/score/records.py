"""Files of records, and predictions as lines that each answer one item.

The kit's own line is {"index" or "id", "response"}. Logs of other kits are told by their fields:
lmms-eval (`doc_id`, `resps`), VLMEvalKit (`index`, `prediction`), BLINK (`idx`, `full_prediction`)
and OpenAI's batches (`custom_id`).
"""

import csv
import json
import re
from pathlib import Path

from mig_kit.common import MAX_LINE, iter_lines
from mig_kit.image_files import LFS_POINTER, is_lfs_pointer
from mig_kit.openai_client import read_choice
from mig_kit.score.annotations import BenchmarkItem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
COMPRESSED = "compressed; unpack it, and give the file that it holds"
FORMATS = {  # how files start that are no text in UTF-8
    b"\x1f\x8b": COMPRESSED, b"BZh": COMPRESSED, b"\xfd7zXZ": COMPRESSED,
    b"\x28\xb5\x2f\xfd": COMPRESSED, b"PK\x03\x04": COMPRESSED, b"7z\xbc\xaf": COMPRESSED,
    b"%PDF": "a PDF document; save its text as JSON lines",
    **dict.fromkeys((b"\xff\xfe", b"\xfe\xff"), "text in UTF-16; save it as UTF-8")}
TABLES = (".parquet", ".xlsx", ".tsv", ".csv")
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".json")
REPLY_KEYS = ("answer", "output", "text", "reply", "generated_text", "completion", "content",
              "model_output", "model_answer", "responses", "predicted_answer", "pred", "outputs")
WRAPPERS = ("val", "logs")  # of BLINK's released outputs, of lmms-eval's older logs


def read_records(path: str | Path, may_be_empty: bool = False) -> list[dict]:
    """The objects of a .json, .jsonl, .parquet, .tsv, .csv or .xlsx file, or of a folder of files.

    Raises FileNotFoundError for a missing file, and ValueError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return [record for file in _folder_files(path) for record in read_records(file)]
    _require_file(path)
    numbered = (dict(enumerate(_read_table(path), 1)) if path.suffix.lower() in TABLES
                else _read_numbered(path))
    for number, record in numbered.items():
        if not isinstance(record, dict):
            raise ValueError(f"entry {number} of {path} is no JSON object; every entry must look "
                             "like {...}")
    if not numbered and not may_be_empty:
        raise ValueError(f"{path} is empty; it needs one JSON object per item")
    return list(numbered.values())


def read_json(path: str | Path):
    """The one JSON value of a file. Raises as read_records."""
    path = Path(path)
    _require_file(path)
    return _parse_json(path.read_bytes(), f"{path}")


def _folder_files(folder: Path) -> list[Path]:
    """The files of records below a folder, by name; of BLINK's data set the validation parts."""
    files = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file())
    for is_wanted in (lambda name: name.startswith("val"), lambda name: "samples_" in name):
        files = [path for path in files if is_wanted(path.name)] or files
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(FOLDER_SUFFIXES)} file; name the folder "
                         "that does")
    return files


def _require_file(path: Path) -> None:
    """FileNotFoundError for no file, ValueError for one whose first bytes are of another format."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of the file that was downloaded or "
                                "written")
    if is_lfs_pointer(path):
        raise ValueError(f"{path} {LFS_POINTER}")
    if path.suffix.lower() in (".parquet", ".xlsx"):
        return
    with path.open("rb") as file:
        opening = file.read(8)
    for start, advice in FORMATS.items():
        if opening.startswith(start):
            raise ValueError(f"{path} is {advice}")
    if b"\0" in opening:
        raise ValueError(f"{path} is no text in UTF-8, perhaps UTF-16; save it as UTF-8")


def _read_table(path: Path) -> list[dict]:
    """The rows of a table, without columns of image bytes; an empty cell of text is ""."""
    try:
        if path.suffix.lower() == ".parquet":
            from pyarrow import parquet

            file = parquet.ParquetFile(path)
            columns = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
            return file.read(columns).to_pylist()
        if path.suffix.lower() in (".tsv", ".csv"):
            return _read_text_table(path)
        import openpyxl  # a moment

        sheet = openpyxl.load_workbook(path, read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # which some exporters write wrongly
        rows = iter(sheet.iter_rows(values_only=True))
        names = next(rows, ())
        rows = [(*row, *[None] * (len(names) - len(row))) for row in rows]
    except ImportError as error:
        raise ValueError(f"{path} needs {error.name} to be read; run pip install "
                         f"{error.name}") from error
    except Exception as error:  # of parquet, zip, XML and text alike
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no readable table ({reason}); save or download it "
                         "again") from error
    return [{name: "" if value is None else value for name, value in zip(names, row)}
            for row in rows if any(value is not None for value in row)]


def _read_text_table(path: Path) -> list[dict]:
    """The rows of a table of text; pandas would read a row that was cut as empty cells."""
    csv.field_size_limit(MAX_LINE)
    with path.open(encoding="utf-8-sig", newline="") as file:
        delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        reader, records = csv.DictReader(file, delimiter=delimiter), []
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(f"line {reader.line_num} has another number of cells than the "
                                 "first")
            records.append(record)
    return records


def _holds_bytes(kind) -> bool:
    """Whether a column of this pyarrow type holds bytes, alone or in what it is made of."""
    import pyarrow

    fields = (kind.field(place).type for place in range(kind.num_fields))
    return pyarrow.types.is_binary(kind) or any(map(_holds_bytes, fields))


def _read_numbered(path: Path) -> dict[int, object]:
    """Line or place from 1 -> record of a file of JSON or JSON lines."""
    with path.open("rb") as file:
        opening = file.read(1 << 16).removeprefix(BYTE_ORDER_MARK).lstrip()
    if opening.startswith(b"[") or opening and path.suffix.lower() == ".json":
        try:
            return dict(enumerate(_unwrap(read_json(path)), 1))
        except ValueError as error:
            if "Extra data" not in str(error):  # which more lines are
                raise
    numbered = {}
    for number, line in iter_lines(path):
        if line is None:
            raise ValueError(f"line {number} of {path} is longer than {MAX_LINE} bytes; write one "
                             "JSON object per line")
        if line.strip(BYTE_ORDER_MARK + b" \t"):
            numbered[number] = _parse_json(line, f"line {number} of {path}")
    return numbered


def _parse_json(text: bytes, where: str):
    try:
        return json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON in UTF-8 ({error}); write one JSON object per line, "
                         "or one JSON list") from error


def _unwrap(value) -> list:
    """The records in one JSON value; {"val_Counting_1": "(B)", ...} are BLINK's predictions."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    for name in WRAPPERS:
        if isinstance(value.get(name), list):
            return value[name]
    columns = {name: list(column.values()) if isinstance(column, dict) else column
               for name, column in value.items()}
    if all(isinstance(columns.get(name), list) for name in ("index", "prediction")):
        columns = {name: column for name, column in columns.items()
                   if isinstance(column, list) and len(column) == len(columns["index"])}
        return [dict(zip(columns, row)) for row in zip(*columns.values())]
    is_named = {"id", "idx", "index", "response"} & set(value)
    if value and not is_named and all(isinstance(answer, str) for answer in value.values()):
        return [{"id": name, "response": answer} for name, answer in value.items()]
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
    Raises: ValueError for records without the field, and unknown, doubled or missing indices.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id}
    records = [_read_batch_line(record, by_id, f"prediction {number} of {source}", field)
               if "custom_id" in record else record for number, record in enumerate(records, 1)]
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
            raise ValueError(f'{where} has no "index" or "id"; a line looks like {{"index": 0, '
                             f'"{field}": ...}}')
        if str(item_id if index is None else index) in map(str, left_out):
            continue
        line = {**record, field: _read_prediction(record, field, where)}
        item = items_by_name.get(str(name))
        indexed = item if index is None else by_index.get(str(index), item)
        if indexed is not item:
            raise ValueError(f'{where} has "index" {index} and "id" {item_id!r}, which are '
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
        raise ValueError(f"{source}: {'; '.join(problems)}; give one prediction for each of the "
                         f"{len(items)} items{hint}")
    return [lines.get(item.index) for item in items]


def _read_batch_line(record: dict, by_id: dict[str, BenchmarkItem], where: str, field: str) -> dict:
    """A line of OpenAI's batch output as a prediction; a refused reply is empty."""
    name, answer = str(record["custom_id"]), record.get("response")
    body = answer.get("body") if isinstance(answer, dict) else None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        errors = [part.get("error") for part in (record, body) if isinstance(part, dict)]
        cause = next(filter(None, errors), "no choices")
        raise ValueError(f"{where}, {name!r}, holds no reply ({str(cause)[:80]}); ask it again, or "
                         "take the line out and pass --allow-missing")
    if isinstance(parts := message.get("content"), list):
        message = message | {"content": "".join(str(part.get("text", "")) for part in parts)}
    reply, _ = read_choice({"finish_reason": "none", **choice, "message": message})
    return {"id" if name in by_id else "index": name, field: reply}


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
    """1 if the records are a table that counts from 1, else 0; ValueError if it could be either."""
    if not records or not all("prediction" in record and "response" not in record
                              and "full_prediction" not in record for record in records):
        return 0
    places = sorted(str(_read_names(record, {})[0]) for record in records)
    complete = [sorted(str(index + first) for index in indices)
                for first in (1, 0) for indices in (scored, [*scored, *left_out])]
    if places in complete[:2]:
        return 1
    has_letters = any("target" in record or "answer" in record for record in records)
    if places not in complete and "0" not in places and places[0].isdecimal() and not has_letters:
        raise ValueError(f"{source} has no index 0 and lacks rows, so it may count from 0 or from "
                         "1; give the whole table, or lines with index (from 0) and response")
    return 0


def _read_prediction(record: dict, field: str, where: str):
    """What a record predicts: its `field`, or the reply of another kit's log."""
    reply = record.get(field)
    if field not in record and {"resps", "filtered_resps"} & set(record):
        reply = record.get("resps", record.get("filtered_resps"))
        while isinstance(reply, list) and reply:
            reply = reply[0]
        if not isinstance(reply, str):
            raise ValueError(f"{where} has no text in its resps; log the samples of a task that "
                             "generates")
    elif field not in record and "full_prediction" in record:
        reply = record["full_prediction"]
    elif field not in record and "prediction" in record:
        prediction, thinking = record["prediction"], record.get("thinking")
        reply = "" if prediction is None or prediction != prediction else str(prediction)
        if isinstance(thinking, str) and thinking:
            reply = f"<think>{thinking}</think>{reply}"
    elif field not in record:
        near = [name for name in REPLY_KEYS if isinstance(record.get(name), (str, list))]
        hint = f', but "{near[0]}", which is to be called "{field}"' if near else ""
        raise ValueError(f'{where} has no "{field}"{hint}; a line looks like {{"index": 0, '
                         f'"{field}": ...}}')
    if field == "response" and not isinstance(reply, str):
        raise ValueError(f'"response" of {where} is no text; write "" where the model said nothing')
    return reply


def _compare_letters(item: BenchmarkItem | None, truth, where: str) -> None:
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", truth.strip()) if isinstance(truth, str) else None
    if item and item.letter and letter and letter[1].upper() != item.letter:
        raise ValueError(f"{where} has the answer {letter[1]} where the annotations have "
                         f"{item.letter} for item {item.name}, so it counts other questions; give "
                         "the annotations that it was made from")
