"""Scores of any model's predictions on the public benchmarks, by several protocols.

`official` repeats what each benchmark's own script does with a reply, quirks included, so that
numbers compare with published ones; each function names its source. `strict` asks for what the
question asks for: the last <answer>, one box in it, the correct image, the stated coordinates.
`substring` is the lax multiple-choice rule. One deviation: where BLINK's and MMIU's authors ask
another model which option a free text means, `official` here reads the text alone, options named
by their words included. MC-Bench and OdinW are in `coco.py`, Ref-L4's own figures in `ref_l4.py`.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mig_kit.boxes import Box, BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.image_files import is_regular_file
from mig_kit.scoring import coco
from mig_kit.scoring.annotations import (
    READERS,
    Benchmark,
    BenchmarkItem,
    add_image_sizes,
    has_paper_count,
    read_image_sizes,
    resolve_image_path,
)
from mig_kit.scoring.choice_parsers import (
    BLINK_CHOICES,
    parse_blink_letter,
    parse_choice_letter,
)
from mig_kit.scoring.convert_boxes import (
    SIZE_KEYS,
    Y_FIRST_KEY,
    largest_coordinate,
    reorder_boxes,
    to_official_line,
    wrap_native_json,
)
from mig_kit.scoring.own import THRESHOLD, judge_own, read_own
from mig_kit.scoring.parsers import (
    TOOL_CALL,
    contains_truth,
    last_answer_block,
    parse_mig_bench_box,
    parse_normalized_pair,
    parse_revised_mig_bench_box,
)
from mig_kit.scoring.predictions import align_predictions, read_foreign_lines
from mig_kit.scoring.record_files import read_json, read_records
from mig_kit.scoring.ref_l4 import class_averages, judge_boxes, ref_l4_metrics
from mig_kit.scoring.result import Scored, headline_average
from mig_kit.scoring.strict_parsers import parse_strict_answer

PROTOCOLS = {
    **dict.fromkeys(("mig_bench", "lisa", "revos", "ref_l4", "mc_bench", "odinw"),
                    ("official", "strict")),
    **dict.fromkeys(("blink", "mmiu"), ("official", "strict", "substring")),
    "own": ("free_text", "strict")}
# The headline of these is the unweighted mean over tasks; elsewhere every item counts the same.
MACRO = ("mig_bench", "blink", "mmiu")
COORDINATE_LIMITS = {Coordinates.NORMALIZED_1: 1, Coordinates.NORMALIZED_1000: 1000}
ROUNDING = {Coordinates.NORMALIZED_1: 0.001 + 1e-9}  # how far outside a box is cut; else 1

BOX_BENCHMARKS = ("mig_bench", "lisa", "revos", "ref_l4", "own")
POOR, MUCH = 0.5, 0.1  # an average that other coordinates might explain, and a gain that is said
SMALL, FEW = 900, 10  # a largest coordinate that 0..1000 hardly has, of how many replies
CELL_LIMIT = 32767  # characters that a spreadsheet's cell can hold
NO_BOX_ANNOTATED = "counted 0, for the annotations have no box"
CUT = f"cut at {CELL_LIMIT:,} characters, as a spreadsheet does"
WITHIN_ONE = "box within 0 to 1, where larger numbers were expected"

Judge = Callable[[BenchmarkItem, str], tuple[float, str]]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mig_bench_iou(answer: Box, box: Box | None) -> float:
    """IoU as MIG-Bench's script has it; both xyxy in the same coordinates. 0 for None.

    Nothing is clipped or repaired: a box inverted on one side never overlaps, touching is an
    overlap of 0. Where the script itself divides by zero or has no number (both boxes empty; values
    over 1e308), this is 0. Source: thunlp/Migician, eval/utils.py, calculate_iou.
    """
    if box is None:
        return 0.0
    width = min(answer[2], box[2]) - max(answer[0], box[0])
    height = min(answer[3], box[3]) - max(answer[1], box[1])
    if width < 0 or height < 0:
        return 0.0
    union = _area(answer) + _area(box) - width * height
    value = width * height / union if union else 0.0
    return 0.0 if math.isnan(value) else value


def univg_iou(answer: Box, box: Box | None) -> float:
    """IoU with 1e-6 added to the union, both xyxy in 0..1; 0 for None.

    Source: AMAP-ML/UniVG-R1, eval/zero_shot (LISA, ReVOS), compute_iou.
    """
    if box is None:
        return 0.0
    width = max(0, min(answer[2], box[2]) - max(answer[0], box[0]))
    height = max(0, min(answer[3], box[3]) - max(answer[1], box[1]))
    union = _area(answer) + _area(box) - width * height + 1e-6
    value = width * height / union if union else 0.0
    return 0.0 if math.isnan(value) else value


def official_iou(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(IoU, problem or "") of one free-text reply by the benchmark's own script.

    An item whose answer is in pixels needs its size. An item without a box counts 0, as in the
    authors' script for LISA and ReVOS.
    """
    if item.box is None:
        return 0.0, NO_BOX_ANNOTATED
    if item.coordinates == Coordinates.PIXELS:
        width, height = item.size
        x1, y1, x2, y2 = item.box
        read_box, limit = parse_normalized_pair, 1
        box = read_box(response)
        value = univg_iou((x1 / width, y1 / height, x2 / width, y2 / height), box)
    else:
        read_box, limit = ((parse_mig_bench_box, 1) if item.coordinates == Coordinates.NORMALIZED_1
                           else (parse_revised_mig_bench_box, 1000))
        box = read_box(response)
        value = mig_bench_iou(item.box, box)
    if box is None:
        return value, "no box found"
    if "<tool_call>" in response and box != read_box(TOOL_CALL.sub(" ", response)):
        return value, "box inside a <tool_call>, scored all the same"
    return value, "box outside the image, scored all the same" if max(box) > limit else ""


def image_problem(item: BenchmarkItem, image: int | None) -> str:
    """Why a reply that names this image (None: no image) does not answer the item, or "".

    A reply that names no image passes where the question names it, and where the annotations do not
    say (static differences, which are in the same place of both images); it fails where finding the
    image is the task.
    """
    if image is None:
        return "no image named" if not item.image_stated and item.target is not None else ""
    is_possible = image == item.target if item.target else 1 <= image <= len(item.images)
    return "" if is_possible else "wrong image"


def strict_iou(item: BenchmarkItem, response: str, coordinates: Coordinates,
               box_format: BoxFormat) -> tuple[float, str]:
    """(IoU, problem or "") of the one box in the last <answer>.

    0 for a box outside the image and for another image than the target; see image_problem. A box
    that is outside by one unit, as rounding makes it (-1, 1001), is cut to the image. coordinates:
    what the reply's numbers are measured in. box_format: the processor's limits, for absolute
    coordinates. The rule is ours.
    """
    if item.box is None:
        return 0.0, NO_BOX_ANNOTATED
    answer = parse_strict_answer(response, item.target is not None, len(item.images))
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
    box = _cut_to_image(answer.box, image_size, ROUNDING.get(coordinates, 1))
    if box is None:
        return 0.0, "outside the image"
    if coordinates == item.coordinates:
        return iou(item.box, box), ""
    target_size = coordinate_size(item.size, item.coordinates, box_format)
    return iou(item.box, rescale_box(box, image_size, target_size)), ""


def _cut_to_image(box: Box, size: tuple[float, float], tolerance: float) -> Box | None:
    """The box, cut to an image of (width, height); None where it reaches further than `tolerance`
    outside, or nothing of it is inside.
    """
    limits = (*size, *size)
    if any(not -tolerance <= v <= limit + tolerance for v, limit in zip(box, limits)):
        return None
    x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(box, limits))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def official_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem) by the letter that the free text settles on."""
    letter = read_letter(item, response)
    return float(letter == item.letter), "" if letter else "no option chosen"


def read_letter(item: BenchmarkItem, response: str) -> str:
    """The option that a reply's free text settles on, or "".

    BLINK's items, which have an id, are read by their authors' own rule first.
    """
    letter = parse_blink_letter(response, item.options) if item.id else ""
    task_choices = BLINK_CHOICES.get(item.task.replace(" ", "_"), ()) if item.id else ()
    return letter or parse_choice_letter(response, item.options, item.choices or task_choices)


def strict_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem): the last <answer> must hold the letter and nothing else."""
    block = last_answer_block(response)
    if block is None:
        return 0.0, "no <answer> block"
    letter = block.strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options
    return float(letter == item.letter), "" if is_option else "no single letter in <answer>"


def substring_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, "") by Migician's rule: the truth occurs somewhere in the reply.

    The truth is written as in the annotations: BLINK's "(B)", MMIU's "B".
    """
    return float(contains_truth(response, item.truth)), ""


CHOICE_JUDGES: dict[str, Judge] = {
    "official": official_choice, "strict": strict_choice, "substring": substring_choice}


def judge_all(items: list[BenchmarkItem], lines: list[dict | None],
              judge: Judge) -> tuple[np.ndarray, Counter]:
    """((n,) values, problems) of each line's "response"; None counts 0 and as missing, as does an
    empty reply, and a cell cut by a spreadsheet is counted apart where nothing is read from it.
    """
    def judge_line(item: BenchmarkItem, line: dict | None) -> tuple[float, str]:
        if line is None or not line["response"].strip():
            return 0.0, "missing" if line is None else "empty"
        value, problem = judge(item, line["response"])
        is_cut = problem and len(line["response"]) == CELL_LIMIT
        return value, CUT if is_cut else problem

    judged = [judge_line(item, line) for item, line in zip(items, lines, strict=True)]
    values = np.array([value for value, _ in judged])
    return values, Counter(problem for _, problem in judged if problem)


def score_predictions(benchmark: Benchmark, predictions: list[dict], source: str,
                      box_format: BoxFormat, protocol: str = "official",
                      coordinates: Coordinates = Coordinates.NORMALIZED_1000,
                      images: str | None = None, allow_missing: bool = False,
                      orientation: str = "upright", box_order: str | None = None) -> Scored:
    """Judge predictions: dicts with "index" or "id", and "response", or the logs that
    read_foreign_lines reads.

    Ref-L4's own protocol takes "pred_bbox" and "format" in place of "response". source: the
    predictions' name, for errors. coordinates: what the replies' boxes are measured in; under
    `official` other ones than 0..1000 are converted before the authors' rule reads them.
    box_format: see strict_iou. images: the folder of the images, where their sizes are needed.
    orientation: one of ORIENTATIONS. box_order: of BOX_ORDERS, None for one that nobody stated.
    Raises ValueError for missing, doubled and unknown items and for what the protocol cannot use.
    """
    items = list(benchmark.items)
    lines = read_foreign_lines(benchmark.items, predictions, source, benchmark.left_out)
    is_choice = benchmark.name in ("blink", "mmiu")
    converts = (protocol == "official" and not is_choice
                and coordinates != Coordinates.NORMALIZED_1000)
    takes_boxes = benchmark.name == "ref_l4" and protocol == "official"
    if takes_boxes and not converts and lines and "pred_bbox" not in lines[0]:
        raise ValueError(f"Ref-L4's own script takes boxes, so {source} needs lines "
                         '{"id": ..., "pred_bbox": [x1, y1, x2, y2], "format": "xyxy"}; for free '
                         "text say --coordinates absolute or pixels, or use --protocol strict")
    field = "pred_bbox" if takes_boxes and not converts else "response"
    lines = align_predictions(benchmark.items, lines, field, source, allow_missing)
    notes, aggregates, remarks = {}, {}, ()
    if field == "response" and not is_choice:
        remarks = _box_order_remarks(lines, protocol, box_order)
        lines = [line and line | {"response": reorder_boxes(line["response"], box_order)}
                 for line in lines]
    if is_choice:
        values, problems = judge_all(items, lines, CHOICE_JUDGES[protocol])
        metrics = {"accuracy": values}
    elif benchmark.name == "own":
        names = [name for item in items if _needs_conversion(item.coordinates, coordinates)
                 for name in item.images if item.targets]
        sizes = read_image_sizes(names, images, orientation) if names else {}
        values, problems = judge_all(items, lines, lambda item, reply: judge_own(
            item, reply, protocol, coordinates, box_format, sizes))
        metrics = {"acc@0.5": (values >= THRESHOLD).astype(float)}
    else:
        if converts:
            lines = _convert_lines(benchmark, lines, coordinates, box_format,
                                   lambda names: read_image_sizes(names, images, orientation))
            remarks += (f"Boxes were read as {coordinates.description} and converted before the "
                        "authors' rule read them; their own script does not convert.",)
        if coordinates == Coordinates.ABSOLUTE:
            remarks += (f"Images count as resized to {box_format.min_pixels:,} to "
                        f"{box_format.max_pixels:,} pixels; other limits of the processor "
                        "(--min-pixels, --max-pixels) put boxes elsewhere.",)
        if _needs_image_sizes(benchmark, protocol, coordinates):
            items = add_image_sizes(benchmark.items, images, orientation)
        if takes_boxes:
            values, problems = judge_boxes(items, lines, source)
            aggregates = {"avg": class_averages(items, values)}
        elif protocol == "official":
            values, problems = judge_all(items, lines, official_iou)
        else:
            values, problems = judge_all(items, lines, lambda item, reply: strict_iou(
                item, wrap_native_json(reply), coordinates, box_format))
        metrics = _iou_metrics(benchmark.name, values)
        notes = annotation_problems(replace(benchmark, items=tuple(items)), protocol == "strict")
    return Scored(tuple(item.task for item in items), metrics, benchmark.name in MACRO, values,
                  tuple(item.index for item in items), dict(problems), aggregates, notes,
                  tuple(map(_list_of_images, items)), remarks)


def _convert_lines(benchmark: Benchmark, lines: list[dict | None], coordinates: Coordinates,
                   box_format: BoxFormat, read_sizes: Callable) -> list[dict | None]:
    """The lines with their boxes as the authors' rule reads them; see to_official_line.

    read_sizes: the names of images -> their sizes.
    """
    sizes: dict[str, tuple[int, int]] = {}
    if coordinates != Coordinates.NORMALIZED_1 or benchmark.name == "ref_l4":
        names = [name for item in benchmark.items if item.size is None for name in item.images]
        sizes = read_sizes(names) if names else {}
    return [line and to_official_line(
        item, benchmark.name, line,
        [item.size or sizes.get(name, (1, 1)) for name in item.images], coordinates, box_format)
        for item, line in zip(benchmark.items, lines, strict=True)]


def _list_of_images(item: BenchmarkItem) -> tuple[str, ...]:
    """What the items of one list of images share; a video counts as one, whichever frames are
    shown. An item without images shares none.
    """
    videos = [name.rpartition("#")[0] for name in item.images] if item.task == "revos" else []
    return tuple(dict.fromkeys(videos)) or item.images or (f"item {item.index}",)


def _needs_image_sizes(benchmark: Benchmark, protocol: str, coordinates: Coordinates) -> bool:
    if protocol == "official":
        return benchmark.name in ("lisa", "revos")
    return _needs_conversion(benchmark.items[0].coordinates, coordinates)


def _needs_conversion(first: Coordinates, second: Coordinates) -> bool:
    """Whether it takes a size to convert; between 0..1 and 0..1000 it does not."""
    return first != second and not {first, second} <= set(COORDINATE_LIMITS)


def _box_order_remarks(lines: list[dict | None], protocol: str,
                       box_order: str | None) -> tuple[str, ...]:
    """Sentences on replies whose keys do not say x1, y1, x2, y2, and on what was made of them."""
    if box_order not in (None, "xyxy"):
        return (f"Boxes were read as {box_order} and rewritten as x1, y1, x2, y2 first.",)
    replies = [line["response"] for line in lines if line]
    y_first = sum(bool(Y_FIRST_KEY.search(reply)) for reply in replies)
    remarks = [f'Replies with "box_2d", in which Gemini writes y first: {y_first}. They were read '
               "x first: say --box-order yxyx, or xyxy if x comes first."] if (
                   y_first and not box_order) else []
    sized = sum(bool(SIZE_KEYS.search(reply)) for reply in replies) if protocol != "official" else 0
    if sized:
        remarks.append(f"Replies with x, y, width and height: {sized}. x and y were read as the "
                       "upper left corner.")
    return tuple(remarks)


def _iou_metrics(benchmark: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> (n,) shares of IoU values."""
    if benchmark == "ref_l4":
        return ref_l4_metrics(values)
    metrics = {f"acc@{t}": (values >= t).astype(float) for t in (0.5, 0.3, 0.7)}
    return metrics | {"mean_iou": values}


def score_files(name: str, annotations: str, predictions: str, box_format: BoxFormat,
                protocol: str = "", coordinates: str = Coordinates.NORMALIZED_1000,
                images: str | None = None, allow_missing: bool = False,
                orientation: str = "upright",
                box_order: str | None = None) -> tuple[dict, Scored]:
    """({"benchmark", "version", "complete", "protocol"}, Scored) from files.

    complete: see Benchmark, and False where replies are missing. protocol: "" for the first of
    PROTOCOLS. box_format and the rest: see score_predictions. Raises ValueError for an unknown
    benchmark, protocol or word for coordinates, and as score_predictions.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"no benchmark '{name}'; the benchmarks are {', '.join(PROTOCOLS)}")
    protocol = protocol or PROTOCOLS[name][0]
    if protocol not in PROTOCOLS[name]:
        raise ValueError(f"{name} has no protocol '{protocol}'; its protocols are "
                         f"{', '.join(PROTOCOLS[name])}")
    if coordinates not in list(Coordinates):
        raise ValueError(f"no coordinates '{coordinates}'; the coordinates are "
                         f"{', '.join(Coordinates)}")
    takes_text_boxes = name in BOX_BENCHMARKS
    if box_order and not takes_text_boxes:
        raise ValueError(f"--box-order is for boxes in replies, which {', '.join(BOX_BENCHMARKS)} "
                         "have; leave it out")
    if coordinates != Coordinates.NORMALIZED_1000 and not takes_text_boxes:
        raise ValueError(f"--coordinates {coordinates} is for boxes in replies, which "
                         f"{', '.join(BOX_BENCHMARKS)} have; leave it out")
    header = {"benchmark": name, "version": "", "complete": None, "protocol": protocol}
    source = Path(predictions).name
    if name in ("mc_bench", "odinw"):
        truth, detections = read_json(annotations), read_records(predictions, may_be_empty=True)
        if name == "odinw":
            return header, coco.score_odinw(truth, detections, source, protocol)
        scored = coco.score_mc_bench(truth, detections, source, protocol)
        return header | {"complete": has_paper_count(name, len(scored.tasks))}, scored
    benchmark = (read_own if name == "own" else READERS[name])(read_records(annotations))

    def score_in(measure: Coordinates) -> Scored:
        return score_predictions(benchmark, records, source, box_format, protocol, measure, images,
                                 allow_missing, orientation, box_order)

    records = read_records(predictions)
    scored = score_in(Coordinates(coordinates))
    if takes_text_boxes and coordinates == Coordinates.NORMALIZED_1000 and (
            "pred_bbox" not in records[0]):
        remarks = scored.remarks + _coordinate_remarks(benchmark, records, scored, score_in, images)
        scored = replace(scored, remarks=remarks)
    is_complete = False if "missing" in scored.problems else benchmark.complete
    return header | {"version": benchmark.version, "complete": is_complete}, scored


def _coordinate_remarks(benchmark: Benchmark, records: list[dict], scored: Scored,
                        score_in: Callable[[Coordinates], Scored],
                        images: str | None) -> tuple[str, ...]:
    """What a poor score would be in pixels, where the sizes of the images are at hand, or that they
    would tell. Nothing is scored otherwise than asked for.
    """
    average = headline_average(scored)
    if average >= POOR:
        return ()
    names = {name for item in benchmark.items if item.size is None for name in item.images}
    if images is None and names:
        largest = largest_coordinate([str(record.get("response")) for record in records])
        return (f"No box reaches beyond {largest:.0f}: if these are pixels of small pictures, add "
                "--images FOLDER to see what they would score as pixels.",) if (
                    1 < largest <= SMALL and len(records) >= FEW) else ()
    if not all(is_regular_file(resolve_image_path(images, name)) for name in names):
        return ()
    remarks = []
    for measure in (Coordinates.PIXELS, Coordinates.ABSOLUTE):
        other = headline_average(score_in(measure))
        if other > average + MUCH:
            remarks.append(f"Read as {measure.description}, the boxes would score {100 * other:.2f}"
                           f" instead of {100 * average:.2f}: if they are, say --coordinates "
                           f"{measure}.")
    return tuple(remarks)


def annotation_problems(benchmark: Benchmark, is_strict: bool) -> dict[str, list[str]]:
    """Kind of problem -> names of the items that have it; kinds that no item has are left out.

    No box can match an inverted or empty answer; an answer may leave the image; MIG-Bench asks some
    questions twice. Under `strict` also items whose target image the annotations do not say, so
    that it cannot be checked.
    """
    by_kind = defaultdict(list)
    for item in benchmark.items:
        if not item.box:
            continue
        x1, y1, x2, y2 = item.box
        if x1 >= x2 or y1 >= y2:
            by_kind["no box can match"].append(item.name)
        limit = COORDINATE_LIMITS.get(item.coordinates)
        width, height = (limit, limit) if limit else item.size or (math.inf, math.inf)
        margin = 0 if limit else 1  # pixel: annotation tools round
        if max(x1 - width, x2 - width, y1 - height, y2 - height, -min(item.box)) > margin:
            by_kind["answer leaves the image"].append(item.name)
        if is_strict and item.target is None:
            by_kind["target image unknown, not checked"].append(item.name)
    names_by_question = defaultdict(list)
    for item in benchmark.items if benchmark.name == "mig_bench" else ():
        names_by_question[item.task, item.images, item.question, item.box].append(item.name)
    by_kind["given twice"] = [" = ".join(names) for names in names_by_question.values()
                              if len(names) > 1]
    order = ("no box can match", "answer leaves the image", "given twice",
             "target image unknown, not checked")
    return {kind: by_kind[kind] for kind in order if by_kind[kind]}
