"""Scores of any model's predictions on the public benchmarks, by several protocols.

`official` repeats each benchmark's own script, quirks included (official.py, coco.py); where
BLINK's and MMIU's authors ask another model which option a text means, it reads the text alone.
`strict` wants one box in the last <answer>, in the correct image and the stated coordinates.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.common import UserError
from mig_kit.image_files import is_regular_file
from mig_kit.score import coco, official
from mig_kit.score.annotations import (
    PAPER_COUNTS,
    READERS,
    Benchmark,
    BenchmarkItem,
    add_image_sizes,
    read_image_sizes,
    resolve_image_path,
)
from mig_kit.score.convert_boxes import BOX_ORDERS, rewrite_boxes, to_official_line
from mig_kit.score.judge import NO_OPTION, Judge, ask_judge
from mig_kit.score.letters import CHOICE_JUDGES, UNREAD, read_item, read_strictly
from mig_kit.score.own import judge_own, read_own
from mig_kit.score.records import align_predictions, read_json, read_records
from mig_kit.score.reply_boxes import BOX, parse_named_boxes, parse_strict_answer
from mig_kit.score.result import Scored, headline_average

CHOICE_BENCHMARKS = ("blink", "mmiu")
PROTOCOLS = {**dict.fromkeys(READERS, ("official", "strict")),
             **dict.fromkeys(("mc_bench", "odinw"), ("official",)), "own": ("free_text", "strict")}
# The headline of these is the unweighted mean over tasks; elsewhere every item counts the same.
MACRO = ("mig_bench", "blink", "mmiu")
NORMALIZED = {Coordinates.NORMALIZED_1, Coordinates.NORMALIZED_1000}
ROUNDING = {Coordinates.NORMALIZED_1: 0.001 + 1e-9}  # how far outside a box is cut; else 1

BOX_BENCHMARKS = ("mig_bench", "lisa", "revos", "ref_l4", "own")
CALIBRATED = ("mig_bench", "lisa", "revos")
WITH_BLIND_ROWS = (*CALIBRATED, "ref_l4", *CHOICE_BENCHMARKS)
POOR, MUCH = 0.5, 0.1  # an average that another frame might explain, and a gain that is said
MEANT = 0.05  # of the boxes, by which a frame may be meant
CELL_LIMIT = 32767  # characters that a spreadsheet's cell can hold
CUT = f"cut at {CELL_LIMIT:,} characters, as a spreadsheet does"
WITHIN_ONE = "box within 0 to 1, where larger numbers were expected"

Rule = Callable[[BenchmarkItem, str], tuple[float, str]]


def image_problem(item: BenchmarkItem, image: int | None) -> str:
    """Why a reply that names this image (None: no image) does not answer the item, or "".

    Naming no image is a problem only if finding the image is the task.
    """
    if image is None:
        return "no image named" if not item.image_stated and item.target is not None else ""
    is_possible = image == item.target if item.target else 1 <= image <= len(item.images)
    return "" if is_possible else "wrong image"


def strict_iou(item: BenchmarkItem, response: str, coordinates: Coordinates,
               box_format: BoxFormat) -> tuple[float, str]:
    """(IoU, problem or "") of the one box in the last <answer>, by a rule of ours.

    0 for a box in another image, or outside its image; one unit of rounding (-1, 1001) is cut.

    Args:
        coordinates: of the reply's box.
        box_format: the processor's limits, for absolute coordinates.
    """
    if item.box is None:
        return 0.0, official.NO_BOX_ANNOTATED
    answer = parse_strict_answer(response)
    if answer.box is None:
        return 0.0, answer.problem
    problem = image_problem(item, answer.image)
    if problem:
        return 0.0, problem
    if coordinates == Coordinates.PIXELS and item.size is None:  # nothing is converted, see below
        image_size = (math.inf, math.inf)
    else:
        image_size = coordinate_size(item.size, coordinates, box_format)
    if coordinates != Coordinates.NORMALIZED_1 and 0 <= min(answer.box) <= max(answer.box) <= 1:
        return 0.0, WITHIN_ONE
    is_same = coordinates == item.coordinates
    target_size = image_size if is_same else coordinate_size(item.size, item.coordinates,
                                                             box_format)
    annotated = item.box if is_same else rescale_box(item.box, target_size, image_size)
    size = tuple(map(max, image_size, annotated[2:]))  # two annotated boxes reach outside
    box = _cut_to_image(answer.box, size, ROUNDING.get(coordinates, 1))
    if box is None:
        return 0.0, "outside the image"
    return iou(item.box, box if is_same else rescale_box(box, image_size, target_size)), ""


def _cut_to_image(box: Box, size: tuple[float, float], tolerance: float) -> Box | None:
    """The box cut to an image of `size`; None if it is over `tolerance` outside."""
    limits = (*size, *size)
    if any(not -tolerance <= v <= limit + tolerance for v, limit in zip(box, limits)):
        return None
    x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(box, limits))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def judge_all(items: list[BenchmarkItem], lines: list[dict | None],
              rule: Rule) -> tuple[np.ndarray, list[str]]:
    """(n,) values and n problems of each line's "response"; a missing or empty reply counts 0."""
    values, problems = [], []
    for item, line in zip(items, lines, strict=True):
        if line is None or not line["response"].strip():
            value, problem = 0.0, "missing" if line is None else "empty"
        else:
            value, problem = rule(item, line["response"])
        values.append(value)
        problems.append(CUT if problem and line and len(line["response"]) == CELL_LIMIT
                        else problem)
    return np.array(values), problems


def score_predictions(benchmark: Benchmark, predictions: list[dict], source: str,
                      box_format: BoxFormat, protocol: str = "official",
                      coordinates: Coordinates = Coordinates.NORMALIZED_1000,
                      images: str | None = None, allow_missing: bool = False,
                      box_order: str | None = None, judge: Judge | None = None) -> Scored:
    """Judge predictions: dicts with "index" or "id", and "response", or logs of other kits.

    Args:
        predictions: Ref-L4's own protocol wants "pred_bbox" and "format" for "response".
        source: what errors call the predictions.
        box_format: the processor's limits, for absolute coordinates.
        coordinates: of the replies' boxes; `official` first converts all but 0..1000.
        images: the folder of the images, if their sizes are needed.
        box_order: one of BOX_ORDERS, or None if the user did not say.
        judge: who reads the letters that no rule reads.
    Raises: UserError for missing, doubled or unknown items, and what the protocol cannot use.
    """
    items, is_choice = list(benchmark.items), benchmark.name in CHOICE_BENCHMARKS
    converts = (protocol == "official" and not is_choice
                and coordinates != Coordinates.NORMALIZED_1000)
    judges_boxes = benchmark.name == "ref_l4" and protocol == "official"
    field = "pred_bbox" if judges_boxes and not converts else "response"
    if field == "pred_bbox" and predictions and field not in predictions[0]:
        raise UserError(f"Ref-L4's own script takes boxes, so {source} needs lines "
                        '{"id": ..., "pred_bbox": [x1, y1, x2, y2], "format": "xyxy"}; for free '
                        "text say --coordinates absolute or pixels, or use --protocol strict")
    lines = align_predictions(benchmark.items, predictions, field, source, allow_missing,
                              benchmark.left_out)
    aggregates, remarks = {}, ()
    if field == "response" and not is_choice:
        if box_order not in (None, "xyxy"):
            remarks = (f"Boxes were read as {box_order} and rewritten as x1, y1, x2, y2 first.",)
            lines = [line and line | {"response": rewrite_boxes(
                line["response"], BOX_ORDERS[box_order])} for line in lines]
    if is_choice:
        values, problems = judge_all(items, lines, CHOICE_JUDGES[protocol])
        if judge:
            lines, remarks = _read_by_judge(judge, items, lines, values, problems)
        metrics = {"accuracy": values}
    elif benchmark.name == "own":
        sizes = read_image_sizes((
            name for item in items if _needs_conversion(item.coordinates, coordinates)
            for name in item.images if item.targets), images)
        values, problems = judge_all(items, lines, lambda item, reply: judge_own(
            item, reply, protocol, coordinates, box_format, sizes))
        metrics = {"acc@0.5": values}
    else:
        if converts:
            lines = _convert_lines(benchmark, lines, coordinates, box_format, images)
            remarks += (f"Boxes were read as {coordinates.description} and converted before the "
                        "authors' rule read them; their own script does not convert.",)
        if coordinates == Coordinates.ABSOLUTE:
            remarks += (f"Images count as resized to {box_format.min_pixels:,} to "
                        f"{box_format.max_pixels:,} pixels; other limits of the processor "
                        "(--min-pixels, --max-pixels) put boxes elsewhere.",)
        if benchmark.name in ("lisa", "revos") if protocol == "official" else (
                _needs_conversion(items[0].coordinates, coordinates)):
            items = add_image_sizes(benchmark.items, images)
        if judges_boxes:
            values, problems = official.judge_boxes(items, lines, source)
            aggregates = {"avg": official.class_averages(items, values)}
        else:
            judge = official.official_iou if protocol == "official" else (
                lambda item, reply: strict_iou(item, reply, coordinates, box_format))
            values, problems = judge_all(items, lines, judge)
        metrics = official.ref_l4_metrics(values) if benchmark.name == "ref_l4" else {
            **{f"acc@{t}": (values >= t).astype(float) for t in (0.5, 0.3, 0.7)},
            "mean_iou": values}
    return Scored(tuple(item.task for item in items), metrics, benchmark.name in MACRO, values,
                  dict(Counter(filter(None, problems))), aggregates,
                  tuple(map(_list_of_images, items)), remarks,
                  tuple(zip(items, lines, problems, strict=True)))


def _read_by_judge(judge: Judge, items: list[BenchmarkItem], lines: list[dict | None],
                   values: np.ndarray, problems: list[str]) -> tuple[list[dict | None], tuple]:
    """The lines with the letters that the judge reads, and a remark; changes values, problems."""
    unread = [place for place, problem in enumerate(problems) if problem == UNREAD]
    letters = ask_judge(judge, [(items[place], lines[place]["response"]) for place in unread])
    lines = list(lines)
    for place, letter in zip(unread, letters, strict=True):
        lines[place] = lines[place] | {"judged": letter, "judge": f"the judge {judge.model}"}
        values[place], problems[place] = letter == items[place].letter, "" if letter else NO_OPTION
    return lines, (f"The judge {judge.model} read {len(unread):,} replies that no rule read; its "
                   f"answers are in {judge.file.name}.",)


def item_rows(scored: Scored, name: str, protocol: str, other: Scored | None = None) -> list[dict]:
    """A row per question, for `--items`.

    Args:
        other: a second model's scores; adds its value as "other", and "result": win, loss or tie.
    Returns: {"index", "id", "task", "value": IoU, or 1 for a correct reply, "image", "box": as
    read, None if unread, "rule": that read them, "problem"}. Multiple choice has the correct
    "letter" and the letter that was "read" for image and box.
    Raises: UserError for benchmarks that take COCO results.
    """
    if not scored.judged:
        raise UserError(f"--items needs one reply a question; {name} takes lists of boxes")
    rows = []
    for (item, line, problem), value in zip(scored.judged, scored.values):
        row = {"index": item.index, "id": item.id, "task": item.task, "value": float(value)}
        rows.append(row | _what_was_read(item, line, name, protocol) | {"problem": problem})
    if other:
        metric, values = next(iter(scored.metrics.items()))
        for row, value, gap in zip(rows, other.values, values - other.metrics[metric]):
            row |= {"other": float(value), "result": ("tie", "win", "loss")[int(np.sign(gap))]}
    return rows


def is_same_read(first: Scored, second: Scored, name: str, protocol: str) -> bool:
    """Whether the same was read in every item of two systems' replies."""
    if not first.judged:
        return first.detections == second.detections
    return item_rows(first, name, protocol) == item_rows(second, name, protocol)


def _what_was_read(item: BenchmarkItem, line: dict | None, name: str, protocol: str) -> dict:
    """The letter, or the image and the box, and the rule that read it; "" and None if unread."""
    reply = line and line.get("response")
    if item.letter:
        read = read_strictly if protocol == "strict" else read_item
        letter, rule = read(item, reply or "")
        if line and "judge" in line:
            letter, rule = line["judged"], line["judge"]
        return {"letter": item.letter, "read": letter, "rule": rule}
    if reply is None:
        return {"image": None, "box": line and line["pred_bbox"], "rule": "pred_bbox"}
    if name == "own":
        named = parse_named_boxes(reply)
        image, box = named[0] if len(named) == 1 else (None, None)
        return {"image": image, "box": [box for _, box in named] if item.find_all else box,
                "rule": "a statement" if named else ""}
    if protocol == "strict":
        answer = parse_strict_answer(reply)
        return {"image": answer.image, "box": answer.box,
                "rule": "a statement" if answer.box else ""}
    box = official.read_official_box(item)(reply)
    return {"image": None, "box": box, "rule": "the authors' rule" if box else ""}


def _convert_lines(benchmark: Benchmark, lines: list[dict | None], coordinates: Coordinates,
                   box_format: BoxFormat, images: str | None) -> list[dict | None]:
    """The lines with their boxes as the authors' rule reads them; see `to_official_line`."""
    needs_sizes = coordinates != Coordinates.NORMALIZED_1 or benchmark.name == "ref_l4"
    sizes = read_image_sizes((name for item in benchmark.items if needs_sizes and item.size is None
                              for name in item.images), images)
    return [line and to_official_line(
        item, benchmark.name, line,
        [item.size or sizes.get(name, (1, 1)) for name in item.images], coordinates, box_format)
        for item, line in zip(benchmark.items, lines, strict=True)]


def _list_of_images(item: BenchmarkItem) -> tuple[str, ...]:
    """What items about the same images share; a video counts as one, whatever its frames."""
    videos = [name.rpartition("#")[0] for name in item.images] if item.task == "revos" else []
    return tuple(dict.fromkeys(videos)) or item.images or (f"item {item.index}",)


def _needs_conversion(first: Coordinates, second: Coordinates) -> bool:
    """Whether it takes a size to convert; between 0..1 and 0..1000 it does not."""
    return first != second and not {first, second} <= NORMALIZED


def score_files(name: str, annotations: str, predictions: str, box_format: BoxFormat,
                protocol: str = "", coordinates: str = Coordinates.NORMALIZED_1000,
                images: str | None = None, allow_missing: bool = False,
                box_order: str | None = None, judge: tuple[str, str] | None = None,
                ) -> tuple[dict, Scored]:
    """({"benchmark", "version", "complete", "protocol"}, Scored) from files.

    protocol: "" for the first of PROTOCOLS. judge: a server's address and its model's name.
    Other arguments and raises: see `score_predictions`;
    also UserError for an unknown benchmark or protocol.
    """
    if name not in PROTOCOLS:
        raise UserError(f"no benchmark '{name}'; the benchmarks are {', '.join(PROTOCOLS)}")
    protocol, measure = protocol or PROTOCOLS[name][0], Coordinates(coordinates)
    if protocol not in PROTOCOLS[name]:
        raise UserError(f"{name} has no protocol '{protocol}'; its protocols are "
                        f"{', '.join(PROTOCOLS[name])}")
    is_converted = measure != Coordinates.NORMALIZED_1000
    if name not in BOX_BENCHMARKS and (box_order or is_converted):
        option = "--box-order" if box_order else f"--coordinates {coordinates}"
        raise UserError(f"{option} is for boxes in replies, which {', '.join(BOX_BENCHMARKS)} "
                        "have; leave it out")
    if judge and (name not in CHOICE_BENCHMARKS or protocol != "official"):
        raise UserError(f"--judge reads the letters of {', '.join(CHOICE_BENCHMARKS)} under the "
                        "protocol official; leave it out")
    file = Path(predictions)
    asked = judge and Judge(*judge, file.parent / f"{file.name}.judge.jsonl")
    header = {"benchmark": name, "version": "", "complete": None, "protocol": protocol}
    source = Path(predictions).name
    if name in ("mc_bench", "odinw"):
        truth, detections = read_json(annotations), read_records(predictions, may_be_empty=True)
        if name == "odinw":
            return header, coco.score_odinw(truth, detections, source)
        scored = coco.score_mc_bench(truth, detections, source)
        return header | {"complete": len(scored.tasks) == PAPER_COUNTS[name] or None}, scored
    benchmark = (read_own if name == "own" else READERS[name])(read_records(annotations))
    records = read_records(predictions)

    def score_in(measure: Coordinates, order: str | None = box_order) -> Scored:
        return score_predictions(benchmark, records, source, box_format, protocol, measure, images,
                                 allow_missing, order, asked)

    scored = score_in(measure)
    if name in BOX_BENCHMARKS and not is_converted and "pred_bbox" not in records[0]:
        scored = replace(scored, remarks=scored.remarks + _frame_remarks(
            benchmark, records, scored, score_in, images, box_order))
    is_complete = False if "missing" in scored.problems else benchmark.complete
    return header | {"version": benchmark.version, "complete": is_complete}, scored


def _frame_remarks(benchmark: Benchmark, records: list[dict], scored: Scored,
                   score_in: Callable[..., Scored], images: str | None,
                   box_order: str | None) -> tuple[str, ...]:
    """What the boxes' numbers tell of their frame, and the one that fits best, if better."""
    boxes = [BOX.search(str(record.get("response"))) for record in records]
    extents = np.array([max(map(float, filter(None, match.groups()))) for match in boxes if match])
    if not len(extents):
        return ()
    average, within = headline_average(scored), int(np.sum(extents <= 1))
    names = {name for item in benchmark.items if item.size is None for name in item.images}
    has_sizes = not names or images is not None and all(
        is_regular_file(resolve_image_path(images, name)) for name in names)
    frames = [(Coordinates.NORMALIZED_1, box_order)] * (within >= MEANT * len(extents))
    if average < POOR and within < len(extents) / 2:
        frames += [(Coordinates.NORMALIZED_1000, order) for order in ("yxyx", "xywh")
                   if box_order is None]
        frames += [(Coordinates(measure), box_order) for measure in ("pixels", "absolute")
                   if has_sizes]
    scores = [(headline_average(score_in(*frame)), frame) for frame in frames]
    best, (measure, order) = max(scores, key=lambda pair: pair[0], default=(0.0, ("", "")))
    remarks = []
    if within >= MEANT * len(extents) and within < len(extents):
        remarks.append(f"{within:,} of {len(extents):,} boxes lie within 0 to 1, the others do "
                       "not: the file mixes two frames, so write all boxes in one.")
    if best > average + (0 if within == len(extents) else MUCH):
        option = (f"--coordinates {measure}" if measure != Coordinates.NORMALIZED_1000
                  else f"--box-order {order}")
        reason = "All boxes lie within 0 to 1: with" if within == len(extents) else "With"
        remarks.append(f"{reason} {option} they would score {100 * best:.2f} instead of "
                       f"{100 * average:.2f}.")
    elif average < POOR and names and images is None and not within:
        reach = float(np.quantile(extents, 1 - MEANT))
        if reach <= 900 or np.mean(extents > 1000) >= MEANT:
            remarks.append(f"{100 - 100 * MEANT:.0f} % of the boxes reach no further than "
                           f"{reach:.0f}: if these are pixels, add --images FOLDER to see what "
                           "they would score.")
    return tuple(remarks)
