"""Predictions: which item a line answers, and the logs of other evaluation kits as such lines.

The kit's own line is {"index" or "id", "response"}. Told by their fields and read as well:
lmms-eval's samples (`doc_id`, `resps`), VLMEvalKit's tables (`index`, `prediction`) and BLINK's
released outputs (`idx`, `full_prediction`). Sources of the formats: EvolvingLMMs-Lab/lmms-eval,
evaluator.py and loggers/evaluation_tracker.py; open-compass/VLMEvalKit, inference.py;
zeyofu/BLINK_Benchmark, eval/saved_outputs.
"""

import re

from mig_kit.scoring.annotations import BenchmarkItem, count_and_list


def read_foreign_lines(items: tuple[BenchmarkItem, ...], records: list[dict], source: str,
                       left_out: tuple[int, ...] = ()) -> list[dict]:
    """The records as lines {"index" or "id", "response"}; those in the kit's own form stay as they
    are, and those of the indices `left_out`, which have no answer, are dropped.

    A table of VLMEvalKit that counts from 1 to the number of items, with or without those left out,
    is taken as counting from 0. The correct letter that a log repeats must be the annotations',
    else it counts other questions. source: the predictions' name, for errors. Raises ValueError.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id}
    first = _first_place(records, [item.index for item in items], left_out, source)
    lines = []
    for number, record in enumerate(records, 1):
        where = f"prediction {number} of {source}"
        if "response" in record or "pred_bbox" in record:
            lines.append(record)
            continue
        if "doc_id" in record and {"resps", "filtered_resps"} & set(record):
            line = _lmms_eval_line(record, by_id, where)
        elif "full_prediction" in record:
            line = {**record, "response": record["full_prediction"]}
        elif "prediction" in record:
            line = {**record, "response": _table_reply(record)}
            if first:
                line["index"] = int(record["index"]) - first
        else:
            lines.append(record)
            continue
        index, item_id = _read_names(line)
        item = by_id.get(str(item_id)) or by_index.get(str(index))
        _compare_letters(item, record.get("target", record.get("answer")), where)
        lines.append(line)
    unscored = {str(index) for index in left_out}
    return [line for line in lines
            if str(next((name for name in _read_names(line) if name is not None), None))
            not in unscored]


def _read_names(line: dict) -> tuple[object, object]:
    """(index, id) that a line names its item by, None for one that it lacks.

    For a gap in the column, which it writes as not a number, pandas makes the other indices floats.
    """
    index, item_id, idx = (None if value != value else value
                           for value in map(line.get, ("index", "id", "idx")))
    if isinstance(index, float) and index.is_integer():
        index = int(index)
    elif isinstance(index, str):  # of a table in CSV
        index = re.sub(r"\.0$", "", index) or None
    return index, idx if item_id is None else item_id


def _first_place(records: list[dict], scored: list[int], left_out: tuple[int, ...],
                 source: str) -> int:
    """1 where the records are a table whose index is one more than the annotations', else 0.

    scored, left_out: the annotations' indices from 0, with an answer and without; a table may leave
    out the latter. ValueError where rows are missing, so that it could be either, and no letters
    tell.
    """
    if not records or not all("prediction" in record for record in records):
        return 0
    places = sorted(str(_read_names(record)[0]) for record in records)
    complete = [sorted(str(index + first) for index in indices)
                for first in (1, 0) for indices in (scored, [*scored, *left_out])]
    if places in complete[:2]:
        return 1
    has_letters = any("target" in record or "answer" in record for record in records)
    if places not in complete and "0" not in places and places[0].isdecimal() and not has_letters:
        raise ValueError(f"{source} has no index 0 and lacks rows, so it may count from 0 or from "
                         "1; give the whole table, or lines with index (from 0) and response")
    return 0


def _table_reply(record: dict) -> str:
    """The reply of a table's row, with the reasoning that VLMEvalKit can put into a column of its
    own. An empty cell, which pandas may read as not a number, is an empty reply.
    """
    prediction, thinking = (record.get(name) for name in ("prediction", "thinking"))
    prediction = "" if prediction is None or prediction != prediction else str(prediction)
    if isinstance(thinking, str) and thinking:
        return f"<think>{thinking}</think>{prediction}"
    return prediction


def _lmms_eval_line(record: dict, by_id: dict[str, BenchmarkItem], where: str) -> dict:
    """The line of a record of lmms-eval, whose replies are nested in lists.

    `resps` is the whole reply; the log leaves it out where the filter changed nothing. `doc_id`
    counts within a task, so an id of the benchmark, which some tasks log with their metric, comes
    first.
    """
    reply = record.get("resps", record.get("filtered_resps"))
    while isinstance(reply, list) and reply:
        reply = reply[0]
    if not isinstance(reply, str):
        raise ValueError(f"{where} has no text in its resps; log the samples of a task that "
                         "generates")
    parts = [part for part in record.values() if isinstance(part, dict)]
    names = [str(part[key]) for part in parts for key in ("idx", "id") if key in part]
    known = [name for name in names if name in by_id]
    return {"id": known[0], "response": reply} if known else {"index": record["doc_id"],
                                                              "response": reply}


def _compare_letters(item: BenchmarkItem | None, truth, where: str) -> None:
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", truth.strip()) if isinstance(truth, str) else None
    if item is None or not item.letter or letter is None:
        return
    if letter.group(1).upper() != item.letter:
        raise ValueError(f"{where} has the answer {letter.group(1)} where the annotations have "
                         f"{item.letter} for item {item.name}, so it counts other questions; give "
                         "the annotations that it was made from")


def align_predictions(items: tuple[BenchmarkItem, ...], predictions: list[dict], field: str,
                      source: str, allow_missing: bool = False) -> list[dict | None]:
    """Each item's prediction line (None where one may be missing and is), in the items' order.

    A line names its item by "index" (place in the annotation file, from 0) or "id". source: the
    predictions' name, for errors. Raises ValueError that lists lines without the field, and indices
    that are unknown, doubled or missing.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id} or by_index
    example = f'a line looks like {{"index": 0, "{field}": ...}}'
    lines: dict[int, dict] = {}
    doubled, unknown = [], []
    for number, line in enumerate(predictions, 1):
        where = f"prediction {number} of {source}"
        name, names_index = _named_item(line, by_index, by_id, where)
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f'{where} has no "index" or "id"; {example}')
        if field not in line:
            raise ValueError(f'{where} has no "{field}"; {example}')
        if field == "response" and not isinstance(line[field], str):
            raise ValueError(f'"response" of {where} is no text; write "" where the model said '
                             "nothing")
        item = (by_index if names_index else by_id).get(str(name))
        if item is None:
            unknown.append(str(name))
        elif item.index in lines:
            doubled.append(item.name)
        else:
            lines[item.index] = line
    missing = [] if allow_missing else [item.name for item in items if item.index not in lines]
    problems = [f"{problem}: {count_and_list(names)}" for problem, names in (
        ("unknown to the annotations", unknown), ("given more than once", doubled),
        ("missing", missing)) if names]
    if problems:
        hint = " (or pass --allow-missing to count missing ones wrong)" if missing else ""
        raise ValueError(f"{source}: {'; '.join(problems)}; give one prediction for each of the "
                         f"{len(items)} items{hint}")
    return [lines.get(item.index) for item in items]


def _named_item(line: dict, by_index: dict[str, BenchmarkItem], by_id: dict[str, BenchmarkItem],
                where: str) -> tuple[object, bool]:
    """(name of the line's item, whether the name is an index); ValueError if "index" and "id" name
    different items.
    """
    index, item_id = _read_names(line)
    if index is None:
        return item_id, False
    # An "id" tells nothing where the benchmark has none.
    if item_id is None or by_id is by_index:
        return index, True
    indexed = by_index.get(str(index))
    if indexed is not None and indexed != by_id.get(str(item_id)):
        raise ValueError(f'{where} has "index" {index} and "id" {item_id!r}, which are different '
                         "items")
    return item_id, False
