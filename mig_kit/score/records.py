"""Files of records, and predictions as lines that each answer one item.

The kit's own line is {"index" or "id", "response"}. Logs of other kits are told by their fields:
lmms-eval (`doc_id`, `resps`), VLMEvalKit (`index`, `prediction`) and BLINK's released outputs
(`idx`, `full_prediction`).
"""

import csv
import json
import re
from pathlib import Path

from mig_kit.common import UserError
from mig_kit.score.annotations import BenchmarkItem, is_four_numbers

TABLES = (".parquet", ".xlsx", ".tsv", ".csv")
FOLDER_SUFFIXES = (".parquet", ".jsonl", ".json")
SPACE = re.compile(r"\s*")
REPLIES = ("resps", "filtered_resps", "full_prediction", "prediction")  # of other kits
TRUTHS = ("groundtruth", "ground_truth", "gt", "target")  # names of the correct answer in logs


def read_records(path: str | Path, may_be_empty: bool = False) -> list[dict]:
    """The objects of a .json, .jsonl, .parquet, .tsv, .csv or .xlsx file, or of a folder of files.

    Raises: UserError naming the file and line.
    """
    path = Path(path)
    if path.is_dir():
        return [record for file in _folder_files(path) for record in read_records(file)]
    if require_file(path).suffix == ".gz":
        raise UserError(f"{path} is packed; unpack it first: gunzip --keep {path}")
    records = _read_table(path) if path.suffix.lower() in TABLES else _read_json(path)
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"entry {number} of {path} is no JSON object; every entry must look "
                            "like {...}")
    if not records and not may_be_empty:
        raise UserError(f"{path} is empty; it needs one JSON object per item")
    return records


def require_file(path: str | Path) -> Path:
    """The path; UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"no file {path}; give the path of the file that was downloaded or written")
    return Path(path)


def _folder_files(folder: Path) -> list[Path]:
    """The files of records below a folder, by name: if any are, BLINK's validation parts or
    lmms-eval's samples.
    """
    files = sorted(path for path in folder.rglob("*")
                   if path.suffix.lower() in FOLDER_SUFFIXES and path.is_file())
    if not files:
        raise UserError(f"{folder} holds no {', '.join(FOLDER_SUFFIXES)} file; name the folder "
                        "that does")
    return [path for path in files if re.match("val|.*samples_", path.name)] or files


def _read_table(path: Path) -> list[dict]:
    """The rows of a table, without columns of image bytes; an empty cell of text is ""."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet

            file = parquet.ParquetFile(path)
            columns = [field.name for field in file.schema_arrow
                       if "binary" not in str(field.type)]
            return file.read(columns).to_pylist()
        if suffix == ".xlsx":
            import pandas  # a second

            return pandas.read_excel(path, keep_default_na=False).to_dict("records")
        return _read_csv(path)
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not in UTF-8 ({error}); save it so, in Excel as "CSV UTF-8"'
                        ) from None
    except Exception as error:  # of parquet, zip, XML and text alike
        raise UserError(f"{path} is no readable table ({error}); save it again") from None


def _read_csv(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 20)  # of the whole process
    with path.open(newline="", encoding="utf-8-sig") as file:
        header = file.readline()
        # spreadsheets of some countries write semicolons
        separator = max(",;\t", key=header.count)
        if separator not in header:
            raise ValueError(f"its first line {header[:60]!r} has no commas, semicolons or tabs")
        file.seek(0)
        rows = list(csv.DictReader(file, delimiter=separator))
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has other columns than the first line, separated by "
                             f"{separator!r}; put texts that hold some between quotes")
    return rows


def _read_json(path: Path) -> list:
    """The records of a file of JSON or JSON lines."""
    decoder, values = json.JSONDecoder(), []
    try:
        text = path.read_text("utf-8-sig")
        place = SPACE.match(text).end()
        while place < len(text):
            value, place = decoder.raw_decode(text, place)
            values.append(value)
            place = SPACE.match(text, place).end()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON in UTF-8 ({error}); write one JSON object per line, or "
                        "one JSON list") from error
    value = values[0] if len(values) == 1 else values
    if isinstance(value, dict):
        value = value.get("val", value)  # of BLINK's outputs
    return value if isinstance(value, list) else [value]


def align_predictions(items: tuple[BenchmarkItem, ...], records: list[dict], field: str,
                      source: str, allow_missing: bool = False,
                      left_out: tuple[int, ...] = ()) -> list[dict | None]:
    """Each item's record, in the items' order, with its prediction under `field`; None if missing.

    Args:
        records: name their items by "index" (from 0) or "id". What a record repeats of its item
            (question, images, correct answer) must be that item's, not another's.
        source: what errors call the predictions.
        left_out: indices without an answer, whose predictions are dropped.
    Raises: UserError for records without the field, and unknown, doubled or missing indices.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id}
    by_fact = {fact: item for item in items[::-1]
               for fact in _facts(item.question, item.images, item.box)}
    dropped = set(map(str, left_out))
    lines: dict[int, dict] = {}
    doubled, unknown = [], []
    for number, record in enumerate(records, 1):
        where = f"prediction {number} of {source}"
        index, name = _read_names(record, by_id)
        if index is None and not by_id:  # an "id" tells nothing where the benchmark has none
            index, name = name, None
        if index is None and name is None:
            raise UserError(f'{where} has no "index" or "id"; a line looks like {{"index": 0, '
                            f'"{field}": ...}}{_hint_at_text(record)}')
        if index in dropped:
            continue
        line = {**record, field: _read_prediction(record, field, where)}
        named = [table.get(key) for table, key in ((by_id, name), (by_index, index))
                 if table and key is not None]
        if named[0] is not named[-1]:
            raise UserError(f'{where} has "index" {index} and "id" {name!r}, which are different '
                            "items")
        item = named[0]
        truths = TRUTHS + ("answer",) * (field not in record)  # else it may be the model's
        truth = next((record[name] for name in truths if record.get(name) is not None), None)
        _compare_letters(item, truth, where)
        own = _facts(item.question, item.images, item.box) if item else ()
        for fact in _facts(record.get("question"), record.get("images"), truth):
            if item and fact not in own and fact in by_fact:
                raise UserError(f"{where} is for item {item.name}, but has the {fact[0]} of item "
                                f"{by_fact[fact].name}: it counts in another order, or from 1; "
                                "give it the index of the item that it answers")
        if item is None:
            unknown.append(name or index)
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
        if missing and len(records) < len(items):
            hint += f"; of another version of the benchmark? there are {len(records)} predictions"
        if items[0].index not in lines:
            hint += "; a table that counts from 1 needs every index less 1"
        raise UserError(f"{source}: {'; '.join(problems)}; give one prediction for each of the "
                        f"{len(items)} items{hint}")
    return [lines.get(item.index) for item in items]


def _read_names(record: dict, by_id: dict[str, BenchmarkItem]) -> tuple[str | None, str | None]:
    """(index, id) that a record gives, or None each."""
    index, item_id, idx, doc_id = map(_to_name, map(record.get, ("index", "id", "idx", "doc_id")))
    if {"resps", "filtered_resps"} & set(record) and "response" not in record:
        # lmms-eval's doc_id counts within a task, so an id of the benchmark goes before it
        names = [str(part[key]) for part in record.values() if isinstance(part, dict)
                 for key in ("idx", "id") if key in part]
        known = next((name for name in names if name in by_id), None)
        return (doc_id if known is None else None), known
    return index, idx if item_id is None else item_id


def _to_name(value) -> str | None:
    """A JSON value or a table's cell as text; None if it is neither text nor a whole number."""
    if isinstance(value, float) and value.is_integer():  # of a column with gaps
        value = int(value)
    return re.sub(r"^(\d+)\.0$", r"\1", str(value)) or None if type(value) in (int, str) else None


def _read_prediction(record: dict, field: str, where: str):
    """What a record predicts: its `field`, or the reply of another kit's log."""
    key = next((name for name in (field, *REPLIES) if name in record), "")
    if not key:
        raise UserError(f'{where} has no "{field}"; a line looks like {{"index": 0, "{field}": '
                        f'...}}, and this one has {", ".join(record)}{_hint_at_text(record)}')
    reply = record[key]
    if key == "prediction":  # a cell: text, a number or nothing
        reply = "" if reply is None or reply != reply else str(reply)
    if key in ("resps", "filtered_resps") and (parts := _flatten(reply)):
        if (count := sum(isinstance(part, str) for part in parts)) > 1:
            raise UserError(f'"{key}" of {where} has {count} replies; keep one')
        reply = parts[0]
    if field == "response" and not isinstance(reply, str):
        raise UserError(f'"{key}" of {where} is no text; write "" where the model said nothing'
                        f"{_hint_at_text(record)}")
    return reply


def _hint_at_text(record: dict) -> str:
    """What an error adds for a line of a batch, or parts of a message: where its text is."""
    parts: list[tuple[str, object]] = [("", record)]
    for place, value in parts:
        if isinstance(value, str) and place.endswith((".content", ".text")):
            counts = 'and as "index" what custom_id counts' if "custom_id" in record else ""
            return f'; write as "response" what is under {place[1:]} here {counts}'.rstrip()
        children = value.items() if isinstance(value, dict) else (
            enumerate(value) if isinstance(value, list) else ())
        parts += [(f"{place}.{key}", child) for key, child in children]
    return ""


def _flatten(value) -> list:
    """What nested lists hold, or a value that is none."""
    return sum(map(_flatten, value), []) if isinstance(value, list) else [value]


def _facts(question, images, box) -> list[tuple[str, object]]:
    """(name, value) of what tells an item from others, without what is not given."""
    facts: list[tuple[str, object]] = []
    if isinstance(question, str) and question.strip():
        facts.append(("question", " ".join(question.split())))
    if isinstance(images, list | tuple) and images:
        facts.append(("images", tuple(Path(str(name)).name for name in images)))
    if is_four_numbers(list(box) if isinstance(box, tuple) else box):
        scale = 1000 if max(box) > 2 else 1  # thousandths, or shares of the image
        facts.append(("box", tuple(round(value / scale, 3) for value in box)))
    return facts


def _compare_letters(item: BenchmarkItem | None, truth, where: str) -> None:
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", truth.strip()) if isinstance(truth, str) else None
    if item and item.letter and letter and letter[1].upper() != item.letter:
        raise UserError(f"{where} has the answer {letter[1]} where the annotations have "
                        f"{item.letter} for item {item.name}, so it counts other questions, or "
                        "has another version's answers; give the annotations that it was made from")
