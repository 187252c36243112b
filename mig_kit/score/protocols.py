"""Scores of any model's predictions on the public benchmarks, by several protocols.

`official` repeats each benchmark's own script, quirks included (official.py, coco.py); where
BLINK's and MMIU's authors ask another model which option a text means, it reads the text alone.
`strict` wants one box in the last <answer>, in the correct image and the stated coordinates.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
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
    read_image_sizes,
    resolve_image_path,
)
from mig_kit.score.convert_boxes import BOX_ORDERS, rewrite_boxes, to_official_line
from mig_kit.score.judge import NO_OPTION, Judge, ask_judge
from mig_kit.score.letters import LETTER_READERS
from mig_kit.score.own import judge_own, read_own
from mig_kit.score.records import align_predictions, read_json, read_records
from mig_kit.score.reply_boxes import BOX, UNREAD, parse_strict_answer
from mig_kit.score.result import Scored, Verdict, headline_average

CHOICE_BENCHMARKS = ("blink", "mmiu")
PROTOCOLS = {**dict.fromkeys(READERS, ("official", "strict")),
             **dict.fromkeys(("mc_bench", "odinw"), ("official",)), "own": ("free_text", "strict")}
# The headline of these is the unweighted mean over tasks; elsewhere every item counts the same.
MACRO = ("mig_bench", "blink", "mmiu")
NORMALIZED = {Coordinates.NORMALIZED_1, Coordinates.NORMALIZED_1000}
ROUNDING = {Coordinates.NORMALIZED_1: 0.001 + 1e-9}  # how far outside a box is cut; else 1

BOX_BENCHMARKS = ("mig_bench", "lisa", "revos", "ref_l4", "own")
CALIBRATED = ("mig_bench", "lisa", "revos")
WITH_BLIND_ROWS = (*CALIBRATED, "ref_l4", *CHOICE_BENCHMARKS, "own")
POOR, MUCH = 0.5, 0.1  # an average that another frame might explain, and a gain that is said
MEANT = 0.05  # of the boxes, by which a frame may be meant
WITHIN_ONE = "box within 0 to 1, where larger numbers were expected"

Sizes = dict[str, tuple[int, int]]  # image name -> (width, height), pixels


def image_problem(item: BenchmarkItem, image: int | None) -> str:
    """Why a reply that names this image (None: no image) does not answer the item, or "".

    Naming no image is a problem only if finding the image is the task.
    """
    if image is None:
        return "no image named" if not item.image_stated and item.target is not None else ""
    is_possible = image == item.target if item.target else 1 <= image <= len(item.images)
    return "" if is_possible else "wrong image"


def strict_iou(item: BenchmarkItem, response: str, coordinates: Coordinates,
               box_format: BoxFormat, sizes: Sizes) -> Verdict:
    """The IoU of the one box in the last <answer>, by a rule of ours.

    0 for a box in another image, or outside its image; one unit of rounding (-1, 1001) is cut.

    Args:
        coordinates: of the reply's box.
        box_format: the processor's limits, for absolute coordinates.
        sizes: of the images, if boxes are converted.
    """
    answer = parse_strict_answer(response)
    read = {"image": answer.image, "box": answer.box, "rule": "a statement" if answer.box else ""}
    if item.box is None:
        return Verdict(0.0, official.NO_BOX_ANNOTATED, read)
    if problem := answer.problem or image_problem(item, answer.image):
        return Verdict(0.0, problem, read)
    size = sizes.get(item.images[(answer.image or item.target or 1) - 1],
                     item.size or (math.inf, math.inf))  # without one nothing is converted
    image_size, target_size = (coordinate_size(size, measure, box_format)
                               for measure in (coordinates, item.coordinates))
    if coordinates != Coordinates.NORMALIZED_1 and 0 <= min(answer.box) <= max(answer.box) <= 1:
        return Verdict(0.0, WITHIN_ONE, read)
    is_same = coordinates == item.coordinates
    annotated = item.box if is_same else rescale_box(item.box, target_size, image_size)
    limits = tuple(map(max, image_size, annotated[2:]))  # two annotated boxes reach outside
    box = _cut_to_image(answer.box, limits, ROUNDING.get(coordinates, 1))
    if box is None:
        return Verdict(0.0, "outside the image", read)
    box = box if is_same else rescale_box(box, image_size, target_size)
    return Verdict(iou(item.box, box), "", read)


def _cut_to_image(box: Box, size: tuple[float, float], tolerance: float) -> Box | None:
    """The box cut to an image of `size`; None if it is over `tolerance` outside."""
    limits = (*size, *size)
    if any(not -tolerance <= v <= limit + tolerance for v, limit in zip(box, limits)):
        return None
    x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(box, limits))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def judge_letter(item: BenchmarkItem, reply: str, protocol: str) -> Verdict:
    """1 if the reply chooses the correct option."""
    letter, rule = LETTER_READERS[protocol](item, reply)
    return Verdict(float(letter == item.letter), "" if letter else UNREAD,
                   {"letter": item.letter, "read": letter, "rule": rule})


def judge_all(items: Sequence[BenchmarkItem], lines: list[dict | None],
              rule: Callable[[BenchmarkItem, str], Verdict]) -> list[Verdict]:
    """The verdicts on each line's "response"; a missing or empty reply counts 0."""
    return [Verdict(0.0, "missing") if line is None else rule(item, line["response"])
            if line["response"].strip() else Verdict(0.0, "empty")
            for item, line in zip(items, lines, strict=True)]


def score_predictions(benchmark: Benchmark, predictions: list[dict], source: str,
                      box_format: BoxFormat, protocol: str = "official",
                      coordinates: Coordinates = Coordinates.NORMALIZED_1000,
                      images: str | None = None, allow_missing: bool = False,
                      box_order: str | None = None, judge: Judge | None = None) -> Scored:
    """Judge predictions: dicts with "index" or "id", and "response", or logs of other kits.

    Args:
        predictions: of Ref-L4 also with its script's "pred_bbox" and "format" for "response".
        source: what errors call the predictions.
        box_format: the processor's limits, for absolute coordinates.
        coordinates: of the replies' boxes; `official` first converts all but 0..1000.
        images: the folder of the images, if their sizes are needed.
        box_order: one of BOX_ORDERS, or None if the user did not say.
        judge: who reads the letters that no rule reads.
    Raises: UserError for missing, doubled or unknown items, and what the protocol cannot use.
    """
    field = "pred_bbox" if benchmark.name == "ref_l4" and protocol == "official" and any(
        "pred_bbox" in record for record in predictions) else "response"
    lines = align_predictions(benchmark.items, predictions, field, source, allow_missing,
                              benchmark.left_out)
    items, remarks = benchmark.items, ()
    if benchmark.name in CHOICE_BENCHMARKS:
        verdicts = judge_all(items, lines, partial(judge_letter, protocol=protocol))
        if judge:
            verdicts, remarks = _read_by_judge(judge, items, lines, verdicts)
    elif field == "pred_bbox":
        verdicts = official.judge_boxes(items, lines, source)
    else:
        if box_order not in (None, "xyxy"):
            remarks = (f"Boxes were read as {box_order} and rewritten as x1, y1, x2, y2 first.",)
            lines = [line and line | {"response": rewrite_boxes(
                line["response"], BOX_ORDERS[box_order])} for line in lines]
        if coordinates == Coordinates.ABSOLUTE:
            remarks += (f"Images count as resized to {box_format.min_pixels:,} to "
                        f"{box_format.max_pixels:,} pixels; other limits of the processor "
                        "(--min-pixels, --max-pixels) put boxes elsewhere.",)
        is_official = protocol == "official"
        sizes = _read_sizes(items, coordinates, images, is_official)
        items = [replace(item, size=item.size or sizes.get(_target_image(item))) for item in items]
        if is_official and (coordinates != Coordinates.NORMALIZED_1000
                            or benchmark.name == "ref_l4"):
            remarks += (f"Boxes were read as {coordinates.description} and converted before the "
                        "authors' rule read them; their own script does not convert.",)
            lines = [line and to_official_line(
                item, benchmark.name, line,
                [sizes.get(name, item.size or (1, 1)) for name in item.images], coordinates,
                box_format) for item, line in zip(items, lines, strict=True)]
        verdicts = (official.judge_boxes(items, lines, source)
                    if is_official and benchmark.name == "ref_l4" else
                    judge_all(items, lines, _box_rule(benchmark.name, protocol, coordinates,
                                                      box_format, sizes)))
    values = np.array([verdict.value for verdict in verdicts])
    averages = (official.class_averages(items, values)
                if benchmark.name == "ref_l4" and protocol == "official" else None)
    problems = Counter(verdict.problem for verdict in verdicts if verdict.problem)
    return Scored(tuple(item.task for item in items), _metrics(benchmark.name, values),
                  benchmark.name in MACRO, dict(problems), {"avg": averages} if averages else {},
                  tuple(map(_list_of_images, items)), remarks,
                  tuple(zip(items, verdicts, strict=True)))


def _target_image(item: BenchmarkItem) -> str:
    return item.images[(item.target or 1) - 1]


def _box_rule(benchmark: str, protocol: str, coordinates: Coordinates, box_format: BoxFormat,
              sizes: Sizes) -> Callable[[BenchmarkItem, str], Verdict]:
    """The rule of a benchmark with boxes under a protocol."""
    if protocol == "official":
        return official.official_iou
    if benchmark == "own":
        return lambda item, reply: judge_own(item, reply, protocol, coordinates, box_format, sizes)
    return lambda item, reply: strict_iou(item, reply, coordinates, box_format, sizes)


def _metrics(benchmark: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of a benchmark, headline first; values: (n,) IoU, or 1 for a correct item."""
    if benchmark in CHOICE_BENCHMARKS:
        return {"accuracy": values}
    if benchmark == "own":
        return {"acc@0.5": values}
    if benchmark == "ref_l4":
        return official.ref_l4_metrics(values)
    return {f"acc@{t}": (values >= t).astype(float) for t in (0.5, 0.3, 0.7)} | {
        "mean_iou": values}


def _read_sizes(items: Iterable[BenchmarkItem], coordinates: Coordinates, images: str | None,
                is_official: bool) -> Sizes:
    """Sizes of the images whose boxes are converted, between 0..1 and 0..1000 none.

    is_official: whether the authors' rule reads the replies, which wants pixels as shares.
    """
    def is_needed(item: BenchmarkItem) -> bool:
        if is_official and item.coordinates == Coordinates.PIXELS:
            return True
        return coordinates != item.coordinates and not {coordinates, item.coordinates} <= NORMALIZED

    return read_image_sizes((name for item in items if item.box and item.size is None
                             and is_needed(item) for name in item.images), images)


def _read_by_judge(judge: Judge, items: Sequence[BenchmarkItem], lines: list[dict | None],
                   verdicts: list[Verdict]) -> tuple[list[Verdict], tuple]:
    """The verdicts with the letters that the judge reads, and a remark."""
    unread = [place for place, verdict in enumerate(verdicts) if verdict.problem == UNREAD]
    letters = ask_judge(judge, [(items[place], lines[place]["response"]) for place in unread])
    verdicts = list(verdicts)
    for place, letter in zip(unread, letters, strict=True):
        right = items[place].letter
        verdicts[place] = Verdict(float(letter == right), "" if letter else NO_OPTION, {
            "letter": right, "read": letter, "rule": f"the judge {judge.model}"})
    return verdicts, (f"The judge {judge.model} read {len(unread):,} replies that no rule read; "
                      f"its answers are in {judge.file.name}.",)


def item_rows(scored: Scored, name: str, other: Scored | None = None) -> list[dict]:
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
    rows = [{"index": item.index, "id": item.id, "task": item.task, "value": float(verdict.value),
             **({"letter": item.letter, "read": "", "rule": ""} if item.letter else
                {"image": None, "box": None, "rule": ""}),
             **verdict.read, "problem": verdict.problem} for item, verdict in scored.judged]
    if other:
        metric, values = next(iter(scored.metrics.items()))
        for row, (_, verdict), gap in zip(rows, other.judged, values - other.metrics[metric]):
            row |= {"other": float(verdict.value),
                    "result": ("tie", "win", "loss")[int(np.sign(gap))]}
    return rows


def _list_of_images(item: BenchmarkItem) -> tuple[str, ...]:
    """What items about the same images share; a video counts as one, whatever its frames."""
    videos = [name.rpartition("#")[0] for name in item.images] if item.task == "revos" else []
    return tuple(dict.fromkeys(videos)) or item.images or (f"item {item.index}",)


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
    if name in ("mc_bench", "odinw"):
        truth, detections = read_json(annotations), read_records(predictions, may_be_empty=True)
        if name == "odinw":
            return header, coco.score_odinw(truth, detections, file.name)
        scored = coco.score_mc_bench(truth, detections, file.name)
        return header | {"complete": len(scored.tasks) == PAPER_COUNTS[name] or None}, scored
    benchmark = (read_own if name == "own" else READERS[name])(read_records(annotations))
    records = read_records(predictions)

    def score_in(measure: Coordinates, order: str | None = box_order) -> Scored:
        return score_predictions(benchmark, records, file.name, box_format, protocol, measure,
                                 images, allow_missing, order, asked)

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
    matches = [BOX.search(str(record.get("response"))) for record in records]
    reach = np.array([max(map(float, filter(None, match.groups()))) for match in matches if match])
    within, average = int(np.sum(reach <= 1)), headline_average(scored)
    if within < len(reach) and within >= MEANT * len(reach) and within:
        return (f"{within:,} of {len(reach):,} boxes lie within 0 to 1, the others do not: the "
                "file mixes two frames, so write all boxes in one.",)
    names = {name for item in benchmark.items if item.size is None for name in item.images}
    has_sizes = not names or images is not None and all(
        is_regular_file(resolve_image_path(images, name)) for name in names)
    frames = []
    if len(reach) and within == len(reach):
        frames = [(Coordinates.NORMALIZED_1, box_order)]
    elif len(reach) and average < POOR:
        frames = [(Coordinates.NORMALIZED_1000, order) for order in ("yxyx", "xywh")
                  if box_order is None]
        frames += [(Coordinates(measure), box_order) for measure in ("pixels", "absolute")
                   if has_sizes]
    scores = [(headline_average(score_in(*frame)), frame) for frame in frames]
    best, (measure, order) = max(scores, key=lambda pair: pair[0], default=(0.0, ("", "")))
    if best > average + (0 if within else MUCH):
        option = (f"--coordinates {measure}" if measure != Coordinates.NORMALIZED_1000
                  else f"--box-order {order}")
        return (f"{'All boxes lie within 0 to 1: with' if within else 'With'} {option} they would "
                f"score {100 * best:.2f} instead of {100 * average:.2f}.",)
    if frames and not within and images is None and names and (
            np.quantile(reach, 1 - MEANT) <= 900 or np.mean(reach > 1000) >= MEANT):
        return (f"{100 - 100 * MEANT:.0f} % of the boxes reach no further than "
                f"{np.quantile(reach, 1 - MEANT):.0f}: if these are pixels, add --images FOLDER to "
                "see what they would score.",)
    return ()
