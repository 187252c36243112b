"""Scores of any model's predictions on the public benchmarks, by several protocols.

`official` repeats each benchmark's own script, quirks included (official.py, coco.py); where
BLINK's and MMIU's authors ask another model which option a text means, it reads the text alone.
`strict` wants one box in the last <answer>, in the correct image and the stated coordinates.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.common import UserError
from mig_kit.score import official
from mig_kit.score.annotations import Benchmark, BenchmarkItem, read_image_sizes
from mig_kit.score.benchmarks import BENCHMARKS, Rules, find_rules, read_benchmark
from mig_kit.score.choice_parsers import read_strictly
from mig_kit.score.convert_boxes import BOX_ORDERS, rewrite_boxes, to_official_line
from mig_kit.score.judge import NO_OPTION, NONE, Judge, ask_judge
from mig_kit.score.own import judge_own
from mig_kit.score.records import align_predictions, read_records
from mig_kit.score.reply_boxes import BOX, UNREAD, box_problem, parse_strict_answer
from mig_kit.score.result import Scored, Verdict, describe_reach

NORMALIZED = {Coordinates.NORMALIZED_1, Coordinates.NORMALIZED_1000}
ROUNDING = {Coordinates.NORMALIZED_1: 0.001 + 1e-9}  # how far outside a box is cut; else 1
PROSE = re.compile(r"[a-z]+ [a-z]+ [a-z]+", re.IGNORECASE)  # as reasoning is, no letter or box

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
    if problem := answer.problem or image_problem(item, answer.image) or box_problem(
            answer.box, coordinates):
        return Verdict(0.0, problem, read)
    size = sizes.get(item.images[(answer.image or item.target or 1) - 1],
                     item.size or (math.inf, math.inf))  # without one nothing is converted
    image_size, target_size = (coordinate_size(size, measure, box_format)
                               for measure in (coordinates, item.coordinates))
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


def judge_letter(item: BenchmarkItem, letter: str, rule: str) -> Verdict:
    """1 for the correct letter; letter: "" if unread, NONE if no option is chosen."""
    return Verdict(float(letter == item.letter), {"": UNREAD, NONE: NO_OPTION}.get(letter, ""),
                   {"letter": item.letter, "read": letter.strip(NONE), "rule": rule})


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
        coordinates: of the replies' boxes; `official` first converts all but 0..1000, of Ref-L4
            these, too.
        images: the folder of the images, if their sizes are needed.
        box_order: one of BOX_ORDERS, or None if the user did not say.
        judge: who reads the letters that no rule reads.
    Raises: UserError for missing, doubled or unknown items, and what the protocol cannot use.
    """
    rules, is_official = BENCHMARKS[benchmark.name], protocol == "official"
    coordinates, items, remarks = Coordinates(coordinates), benchmark.items, ()
    in_pixels = rules.frame == "pixels" and is_official  # by a rule that reads no text
    has_boxes = in_pixels and any("pred_bbox" in record for record in predictions)
    lines = align_predictions(items, predictions, "pred_bbox" if has_boxes else "response", source,
                              allow_missing, benchmark.left_out)
    if not has_boxes and (rules.read_letter or not is_official):
        lines, remarks = _mark_cut_reasoning(lines)
    if lines[0] is None and lines[1:2] != [None]:
        remarks += (f"The first item, {items[0].name}, has no prediction: if the file counts from "
                    "1, take 1 off every index.",)
    if has_boxes:
        verdicts, more = official.judge_boxes(items, lines, source), ()
    elif rules.read_letter:
        verdicts, more = _judge_letters(
            items, lines, rules.read_letter if is_official else read_strictly, judge)
    else:
        items, verdicts, more = _judge_replies_with_boxes(
            rules, items, lines, protocol, coordinates, box_format, images, box_order)
    values = np.array([verdict.value for verdict in verdicts])
    averages = official.class_averages(items, values) if in_pixels else {}
    problems = Counter(verdict.problem for verdict in verdicts if verdict.problem)
    return Scored(tuple(item.task for item in items), _metrics(rules, values), rules.is_macro,
                  dict(problems), {"avg": averages} if averages else {},
                  tuple((item.video,) if item.video else item.images or (f"item {item.index}",)
                        for item in items),
                  remarks + more, tuple(zip(items, verdicts, strict=True)))


def _judge_letters(items: Sequence[BenchmarkItem], lines: list[dict | None], read: Callable,
                   judge: Judge | None) -> tuple[list[Verdict], tuple]:
    """The verdicts by a rule from (item, reply) to (letter, its name), and a judge's remark."""
    verdicts = judge_all(items, lines, lambda item, reply: judge_letter(item, *read(item, reply)))
    if not judge:
        return verdicts, ()
    unread = [place for place, verdict in enumerate(verdicts) if verdict.problem == UNREAD]
    letters = ask_judge(judge, [(items[place], lines[place]["response"]) for place in unread])
    for place, letter in zip(unread, letters, strict=True):
        verdicts[place] = judge_letter(items[place], letter, f"the judge {judge.model}")
    return verdicts, (f"The judge {judge.model} read {len(unread):,} replies that no rule read; "
                      f"its answers are in {judge.file.name}.",)


def _judge_replies_with_boxes(
        rules: Rules, items: Sequence[BenchmarkItem], lines: list[dict | None], protocol: str,
        coordinates: Coordinates, box_format: BoxFormat, images: str | None,
        box_order: str | None) -> tuple[list[BenchmarkItem], list[Verdict], tuple]:
    """The items with the sizes of their images, as far as needed, the verdicts, and remarks."""
    is_official, remarks = protocol == "official", ()
    if box_order not in (None, "xyxy"):
        remarks += (f"Boxes were read as {box_order} and rewritten as x1, y1, x2, y2 first.",)
        lines = [line and line | {"response": rewrite_boxes(
            line["response"], BOX_ORDERS[box_order])} for line in lines]
    sizes = read_image_sizes((name for item in items for name in item.images if _needs_sizes(
        item, coordinates, is_official)), images)
    items = [replace(item, size=item.size or sizes.get(item.images[(item.target or 1) - 1]))
             for item in items]
    if is_official:
        verdicts, further = _judge_officially(rules, items, lines, coordinates, box_format, sizes)
        return items, verdicts, remarks + further
    rule = partial(judge_own, protocol=protocol) if rules.frame == "kit" else strict_iou
    verdicts = judge_all(items, lines, partial(
        rule, coordinates=coordinates, box_format=box_format, sizes=sizes))
    return items, verdicts, remarks + _describe_reach(
        items, verdicts, coordinates, box_format, sizes)


def _judge_officially(
        rules: Rules, items: list[BenchmarkItem], lines: list[dict | None],
        coordinates: Coordinates, box_format: BoxFormat,
        sizes: Sizes) -> tuple[list[Verdict], tuple]:
    """Verdicts of the authors' rule, and remarks: what was converted for it, what it reads."""
    in_pixels, remarks = rules.frame == "pixels", ()
    if in_pixels or coordinates != Coordinates.NORMALIZED_1000:
        remarks += (f"Boxes were read as {_describe_frame(coordinates, box_format)} and converted "
                    "before the authors' rule read them; their own script does not convert.",)
        n_below = 0 if in_pixels else sum(map(_has_edge_below_0, lines))
        remarks += (f"In {n_below:,} replies edges below 0 were cut to 0.",) * bool(n_below)
        lines = [line and to_official_line(
            item, rules.frame, line, [sizes.get(name, item.size or (1, 1)) for name in item.images],
            coordinates, box_format) for item, line in zip(items, lines, strict=True)]
    if in_pixels:
        verdicts = official.judge_boxes(items, lines, "")
    else:
        verdicts = judge_all(items, lines, official.official_iou)
        n_unlike = sum(line is not None and verdict.problem == "no box found" and bool(
            BOX.search(line["response"])) for line, verdict in zip(lines, verdicts))
        remarks += (f"{n_unlike:,} replies without a box have one that the authors' rule does not "
                    "read: it wants whole numbers without a sign, and no space or line break "
                    "beside a bracket.",) * bool(n_unlike)
        n_others = sum(map(_is_another_box, items, lines, verdicts))
        remarks += (f"In {n_others:,} replies the official rule read another box than the "
                    "<answer>.",) * bool(n_others)
    return verdicts, remarks + _describe_reach(
        items, verdicts, Coordinates.PIXELS if in_pixels else None, box_format, sizes)


def _has_edge_below_0(line: dict | None) -> bool:
    return line is not None and any(float(number) < 0 for match in BOX.finditer(line["response"])
                                    for number in match.groups() if number)


def _is_another_box(item: BenchmarkItem, line: dict | None, verdict: Verdict) -> bool:
    """Whether the authors' rule read another box than the one that the last <answer> states."""
    if not verdict.read.get("box") or (block := official.last_answer_block(
            line["response"])) is None or parse_strict_answer(line["response"]).box is None:
        return False
    return official.PARSERS[item.coordinates](block) != verdict.read["box"]


def _mark_cut_reasoning(lines: list[dict | None]) -> tuple[list[dict | None], tuple]:
    """The lines, and a remark: where most replies close their reasoning, other prose is cut."""
    replies = [line["response"] if line else "" for line in lines]
    n_replies = sum(bool(reply.strip()) for reply in replies)
    is_closed = [bool(official.CLOSES.search(reply)) for reply in replies]
    is_cut = [bool(PROSE.search(reply)) and not closed
              and official.last_answer_block(reply) is None
              for reply, closed in zip(replies, is_closed)]
    if not any(is_cut) or 2 * sum(is_closed) <= n_replies:
        return lines, ()
    opening, _ = official.THINKING_MARKS[0]
    return [line | {"response": opening + reply} if cut else line
            for line, reply, cut in zip(lines, replies, is_cut)], (
        f"{sum(is_cut):,} replies do not close their reasoning, as {sum(is_closed):,} of "
        f"{n_replies:,} do: cut, so unread.",)


def _needs_sizes(item: BenchmarkItem, coordinates: Coordinates, is_official: bool) -> bool:
    """Whether boxes are converted by images' sizes; the authors' rules want pixels as shares."""
    frames = {coordinates, item.coordinates}
    is_converted = len(frames) > 1 and not frames <= NORMALIZED
    return item.box is not None and item.size is None and (
        is_converted or is_official and item.coordinates == Coordinates.PIXELS)


def _describe_reach(items: Sequence[BenchmarkItem], verdicts: list[Verdict],
                    coordinates: Coordinates | None, box_format: BoxFormat,
                    sizes: Sizes) -> tuple[str, ...]:
    """`describe_reach` of the boxes that were read; coordinates: theirs, None for the authors'."""
    boxes, frame = [], coordinates or Coordinates.NORMALIZED_1000
    for item, verdict in zip(items, verdicts, strict=True):
        if any(box := verdict.read.get("box") or ()):
            if not coordinates and item.coordinates != frame:  # their scripts divide by 1000
                box = rescale_box(box, (1, 1), (1000, 1000))
            number = verdict.read.get("image") or item.target or 1
            size = next(map(sizes.get, item.images[number - 1:number]), None) or item.size or (
                (1, 1) if frame in NORMALIZED else None)
            limits = coordinate_size(size, frame, box_format) if size else (math.inf,) * 2
            boxes.append((box, box, limits))
    return describe_reach(boxes, _describe_frame(frame, box_format))


def _describe_frame(coordinates: Coordinates, box_format: BoxFormat) -> str:
    """The coordinates in words, with the limits that resize images."""
    resized = f", resized to {box_format.min_pixels:,} to {box_format.max_pixels:,} pixels"
    return f"{coordinates.description}{resized * (coordinates == Coordinates.ABSOLUTE)}"


def _metrics(rules: Rules, values: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of a benchmark, headline first; values: (n,) IoU, or 1 for a correct item."""
    if rules.read_letter:
        return {"accuracy": values}
    if rules.frame == "kit":
        return {"acc@0.5": values}
    if rules.frame == "pixels":
        return official.ref_l4_metrics(values)
    return {f"acc@{t}": (values >= t).astype(float) for t in (0.5, 0.3, 0.7)} | {
        "mean_iou": values}


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


def score_files(name: str, annotations: str | Path, predictions: str | Path, box_format: BoxFormat,
                protocol: str = "", judge: tuple[str, str] | None = None,
                **settings) -> tuple[dict, Scored]:
    """({"benchmark", "version", "complete", "protocol"}, Scored) from files.

    Args:
        protocol: "" for the benchmark's first.
        judge: a server's address and its model's name.
        settings: further arguments of `score_predictions`.
    Raises: as it; UserError for an unknown benchmark or protocol, or an option that it has not.
    """
    rules, file = find_rules(name), Path(predictions)
    protocol = protocol or rules.protocols[0]
    if protocol not in rules.protocols:
        raise UserError(f"{name} has no protocol '{protocol}'; its protocols are "
                        f"{', '.join(rules.protocols)}")
    box_order = settings.get("box_order")
    coordinates = settings.get("coordinates", Coordinates.NORMALIZED_1000)
    if not rules.frame and (box_order or coordinates != Coordinates.NORMALIZED_1000):
        option = "--box-order" if box_order else f"--coordinates {coordinates}"
        raise UserError(f"{option} is for boxes in replies, which {name} has not; leave it out")
    if judge and not (rules.read_letter and protocol == "official"):
        raise UserError(f"--judge reads letters under the protocol official, which {name} under "
                        f"{protocol} has not; leave it out")
    records = rules.read_file(annotations)
    if rules.score_results:
        scored = rules.score_results(records[0], read_records(file, may_be_empty=True), file.name)
        version, is_complete = "", len(scored.tasks) == rules.n_items or None
    else:
        benchmark = read_benchmark(name, records)
        settings["judge"] = judge and Judge(*judge, file.with_name(f"{file.name}.judge.jsonl"))
        scored = score_predictions(benchmark, read_records(file), file.name, box_format, protocol,
                                   **settings)
        n_empty, n_missing = map(scored.problems.get, ("empty", "missing"), (0, 0))
        if n_empty and n_empty + n_missing == len(scored.tasks):
            raise UserError(f"{file.name}: all replies are empty, which is no score; look at what "
                            "wrote them")
        version = benchmark.version
        is_complete = False if "missing" in scored.problems else benchmark.complete
    return {"benchmark": name, "version": version, "complete": is_complete,
            "protocol": protocol}, scored
