"""Files of records: JSON, JSON lines, parquet, tables of text or Excel, and folders of them.

What is broken is refused with a sentence that names the file and the line.
"""

import csv
import json
from pathlib import Path

from mig_kit.common import MAX_LINE, iter_lines

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DELIMITERS = {".tsv": "\t", ".csv": ","}
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".json")
WRAPPERS = ("val", "logs")  # of BLINK's released outputs, of lmms-eval's older logs


def read_records(path: str | Path, may_be_empty: bool = False) -> list[dict]:
    """The objects of a .json, .jsonl, .parquet, .tsv, .csv or .xlsx file, or of a folder of files.

    A .json file holds a list, a list below "val" or "logs", columns with "index" and "prediction",
    or one object a line. Of a folder see _folder_files. Raises FileNotFoundError for a missing
    file, and ValueError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return [record for file in _folder_files(path) for record in read_records(file)]
    _require_file(path)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (*DELIMITERS, ".xlsx"):
        records = _read_excel(path) if path.suffix == ".xlsx" else _read_table(path)
        numbered = list(enumerate(records, 1))
    else:
        numbered = _read_numbered(path)
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"entry {number} of {path} is no JSON object; every entry must look "
                             "like {...}")
    if not numbered and not may_be_empty:
        raise ValueError(f"{path} is empty; it needs one JSON object per item")
    return [record for _, record in numbered]


def _folder_files(folder: Path) -> list[Path]:
    """The files of records below a folder, in the order of their names.

    Of BLINK's data set only the validation parts, for the test answers are not public; of
    lmms-eval's results only the samples. Raises ValueError where there is none.
    """
    files = sorted(path for path in folder.rglob("*")
                   if path.suffix in FOLDER_SUFFIXES and path.is_file())
    for is_wanted in (lambda name: name.startswith("val"), lambda name: "samples_" in name):
        files = [path for path in files if is_wanted(path.name)] or files
    if not files:
        raise ValueError(f"{folder} holds no {', '.join(FOLDER_SUFFIXES)} file; name the folder "
                         "that does")
    return files


def _read_parquet(path: Path) -> list[dict]:
    """The rows without columns of image bytes, which no score needs."""
    import pyarrow
    import pyarrow.parquet

    def holds_bytes(kind) -> bool:
        fields = [kind.field(place).type for place in range(kind.num_fields)]
        return pyarrow.types.is_binary(kind) or any(map(holds_bytes, fields))

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [field.name for field in table.schema_arrow if not holds_bytes(field.type)]
        return table.read(columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no readable parquet table ({reason}); download it "
                         "again") from error


def _read_table(path: Path) -> list[dict]:
    """The rows of a table of text, by the names of its first line."""
    csv.field_size_limit(MAX_LINE)
    records = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=DELIMITERS[path.suffix])
            for record in reader:
                if None in record or None in record.values():
                    raise ValueError(f"the row that ends in line {reader.line_num} of {path} has "
                                     "another number of cells than the first; save the table again")
                records.append(record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as "
                         "UTF-8") from error
    except csv.Error as error:
        raise ValueError(f"{path} is no table ({error}); save it again") from error
    return records


def _read_excel(path: Path) -> list[dict]:
    """The rows of the first sheet; an empty cell is ""."""
    import pandas as pd

    try:
        table = pd.read_excel(path, engine="openpyxl", keep_default_na=False)
    except ImportError as error:
        raise ValueError(f"{path} is an Excel table, which needs openpyxl; run pip install "
                         "openpyxl, or save the table as .tsv") from error
    except Exception as error:  # of zip, XML and numbers alike
        raise ValueError(f"{path} is no readable Excel table ({type(error).__name__}); save it "
                         "again") from error
    return table.astype(object).to_dict("records")


def _read_numbered(path: Path) -> list[tuple[int, object]]:
    """(line or place from 1, JSON value) of every record of a JSON or JSON lines file."""
    with path.open("rb") as file:
        opening = file.read(1 << 16).removeprefix(BYTE_ORDER_MARK).lstrip()
    if opening.startswith(b"["):
        return list(enumerate(read_json(path), 1))
    if path.suffix != ".json" or not opening:
        return _parse_lines(path)
    try:
        value = read_json(path)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        return _parse_lines(path)
    return list(enumerate(_unwrap(value), 1))


def _unwrap(value) -> list:
    """The records that one JSON value holds; see read_records.

    {"val_Counting_1": "(B)", ...}, the form of BLINK's final predictions, is a record for each id.
    """
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


def read_json(path: str | Path):
    """The one JSON value of a file. Raises as read_records."""
    path = Path(path)
    _require_file(path)
    try:
        return _parse_json(path.read_text(encoding="utf-8-sig"), f"{path}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as "
                         "UTF-8") from error


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of the file that was downloaded or "
                                "written")


def _parse_lines(path: Path) -> list[tuple[int, object]]:
    """(line number, JSON value) of every line that is not blank."""
    numbered = []
    for number, line in iter_lines(path):
        if line is None:
            raise ValueError(f"line {number} of {path} is longer than {MAX_LINE} bytes; write one "
                             "JSON object per line")
        if not line.strip(BYTE_ORDER_MARK + b" \t"):
            continue
        try:
            text = line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {path} is not UTF-8 text (byte {error.start}); "
                             "save it as UTF-8") from error
        numbered.append((number, _parse_json(text, f"line {number} of {path}")))
    return numbered


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); write one JSON object per line, or one "
                         "JSON list") from error
