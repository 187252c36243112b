"""Scores of any model's predictions on the public benchmarks, by the authors' rule or by the strict one.

`official` repeats what each benchmark's own script does with a reply, quirks included, so that numbers compare with published
ones; each function names its source. `strict` asks for what the question asks for: the last <answer>, one box in it, the right
image, the stated frame. `substring` is the lax multiple-choice rule. One deviation: where BLINK's and MMIU's authors ask
another model which option a free text means, `official` here reads the text alone. MC-Bench and OdinW are in `coco.py`.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mig_kit.boxes import Box, BoxFormat, iou, rescale_box, seen_size
from mig_kit.scoring.annotations import (
    READERS,
    Benchmark,
    BenchmarkItem,
    add_image_sizes,
    align_predictions,
    is_four_numbers,
    read_json,
    read_records,
)
from mig_kit.scoring.parsers import (
    contains_truth,
    last_answer_block,
    parse_blink_letter,
    parse_choice_letter,
    parse_mig_bench_box,
    parse_normalized_pair,
    parse_revised_mig_bench_box,
    parse_strict_answer,
)
from mig_kit.scoring.result import Scored

PROTOCOLS = {"mig_bench": ("official", "strict"), "lisa": ("official", "strict"), "revos": ("official", "strict"),
             "ref_l4": ("official", "strict"), "mc_bench": ("official", "strict"), "odinw": ("official",),
             "blink": ("official", "strict", "substring"), "mmiu": ("official", "strict", "substring")}


FRAMES = ("thousand", "unit", "pixels", "resized")


MACRO = ("mig_bench", "blink", "mmiu")  # their headline is the unweighted mean over tasks; elsewhere every item counts the same


def mig_bench_iou(answer: Box, box: Box | None) -> float:
    """IoU as MIG-Bench's script has it; both xyxy in one frame. 0 for None.

    Nothing is clipped or repaired: a box inverted on one side never overlaps, touching is an overlap of 0. Where the script
    itself divides by zero or has no number (both boxes empty; values over 1e308), this is 0.
    Source: thunlp/Migician, eval/utils.py, calculate_iou.
    """
    if box is None:
        return 0.0
    width, height = min(answer[2], box[2]) - max(answer[0], box[0]), min(answer[3], box[3]) - max(answer[1], box[1])
    if width < 0 or height < 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (answer, box)]
    union = areas[0] + areas[1] - width * height
    value = width * height / union if union else 0.0
    return value if value == value else 0.0


def univg_iou(answer: Box, box: Box | None) -> float:
    """IoU with 1e-6 added to the union, both xyxy in 0..1; 0 for None.

    Source: AMAP-ML/UniVG-R1, eval/zero_shot (LISA, ReVOS), compute_iou.
    """
    if box is None:
        return 0.0
    overlap = max(0, min(answer[2], box[2]) - max(answer[0], box[0])) * max(0, min(answer[3], box[3]) - max(answer[1], box[1]))
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (answer, box)]
    union = areas[0] + areas[1] - overlap + 1e-6
    value = overlap / union if union else 0.0
    return value if value == value else 0.0


def ref_l4_ious(answers: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n,) float32 IoU of (n, 4) xyxy pixel boxes, pairwise; the union is at least 1e-6.

    In single precision, as the source: JierunChen/Ref-L4, ref_l4/overlaps.py.
    """
    a, b = np.asarray(answers, np.float32), np.asarray(boxes, np.float32)
    sides = np.clip(np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2]), 0, None)
    overlap = sides[:, 0] * sides[:, 1]
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    return overlap / np.maximum(area_a + area_b - overlap, np.float32(1e-6))


def official_iou(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(IoU, problem or "") of one free-text reply by the benchmark's own script; item.size is needed for pixel answers."""
    if item.frame == "pixels":
        answer, box = tuple(v / side for v, side in zip(item.box, item.size * 2)), parse_normalized_pair(response)
        value, limit = univg_iou(answer, box), 1
    elif item.frame == "unit":
        box = parse_mig_bench_box(response)
        value, limit = mig_bench_iou(item.box, box), 1
    else:
        box = parse_revised_mig_bench_box(response)
        value, limit = mig_bench_iou(item.box, box), 1000
    problem = "no box found" if box is None else "box outside the frame (pixels?), scored all the same" if max(box) > limit else ""
    return value, problem


def frame_size(frame: str, size: tuple[int, int] | None, box_format: BoxFormat) -> tuple[float, float]:
    """(width, height) of a frame: "unit" 1, "thousand" 1000, "pixels" `size`, "resized" what the model sees of `size`."""
    if frame in ("unit", "thousand"):
        return (1, 1) if frame == "unit" else (1000, 1000)
    if frame == "pixels":
        return size or (float("inf"), float("inf"))  # no size is needed where answers are pixels too
    return seen_size(size, box_format)


def strict_iou(item: BenchmarkItem, response: str, frame: str, box_format: BoxFormat) -> tuple[float, str]:
    """(IoU, problem or "") of the one box in the last <answer>; 0 outside the frame or in another image than the target.

    A reply that names no image passes where the question names it, and where the annotations do not say (static differences,
    which are in the same place of both images); it fails where finding the image is the task. frame: one of FRAMES; view:
    the processor's limits, for "resized". The rule is ours.
    """
    read = parse_strict_answer(response)
    if read.box is None:
        return 0.0, read.problem
    if read.image is None and not item.image_stated and item.target is not None:
        return 0.0, "no image named"
    if read.image is not None and (read.image != item.target if item.target else not 1 <= read.image <= len(item.images)):
        return 0.0, "wrong image"
    source = frame_size(frame, item.size, box_format)
    if min(read.box) < 0 or max(read.box[0::2]) > source[0] or max(read.box[1::2]) > source[1]:
        return 0.0, "outside the frame"
    box = read.box if frame == item.frame else rescale_box(read.box, source, frame_size(item.frame, item.size, box_format))
    return iou(item.box, box), ""


def official_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem) by the letter the free text settles on; of BLINK, first by its authors' own rule."""
    letter = (parse_blink_letter(response, item.options) if item.id else "") or parse_choice_letter(response, item.options)
    return float(letter == item.letter), "" if letter else "no option chosen"


def strict_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem): the last <answer> must hold the letter and nothing else."""
    block = last_answer_block(response)
    if block is None:
        return 0.0, "no <answer> block"
    letter = block.strip().strip("()[].")
    return float(letter == item.letter), "" if len(letter) == 1 and letter in item.options else "no single letter in <answer>"


def substring_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, "") by Migician's rule: the truth occurs somewhere in the reply. BLINK's truth is "(B)", MMIU's "B"."""
    return float(contains_truth(response, f"({item.letter})" if item.id else item.letter)), ""


def judge_all(items: list[BenchmarkItem], lines: list[dict | None], judge: Callable) -> tuple[np.ndarray, Counter]:
    """((n,) values, problems) of the "response" of each line by judge(item, response); None counts 0 and as missing."""
    found = [judge(item, line["response"]) if line else (0.0, "missing") for item, line in zip(items, lines, strict=True)]
    return np.array([value for value, _ in found]), Counter(problem for _, problem in found if problem)


def score_predictions(benchmark: Benchmark, predictions: list[dict], source: str, box_format: BoxFormat, protocol: str = "official", frame: str = "thousand",
                      images: str | None = None, allow_missing: bool = False) -> Scored:
    """Judge predictions (dicts with "index" or "id", and "response"; Ref-L4 official: "pred_bbox" and "format").

    source: the predictions' name, for errors. frame, view: see strict_iou. images: the folder of the images, where their
    sizes are needed. Raises ValueError for missing, doubled and unknown items and for what the protocol cannot use.
    """
    name = benchmark.name
    boxes_given = name == "ref_l4" and protocol == "official"
    if boxes_given and predictions and "pred_bbox" not in predictions[0]:
        raise ValueError(f'Ref-L4\'s own script takes boxes, so {source} needs lines {{"id": ..., "pred_bbox": [x1, y1, x2, y2], '
                         '"format": "xyxy"}; for free text use --protocol strict')
    lines = align_predictions(benchmark.items, predictions, "pred_bbox" if boxes_given else "response", source, allow_missing)
    items = list(benchmark.items)
    tasks, indices = tuple(item.task for item in items), tuple(item.index for item in items)
    if name in ("blink", "mmiu"):
        judge = {"official": official_choice, "strict": strict_choice, "substring": substring_choice}[protocol]
        values, problems = judge_all(items, lines, judge)
        return Scored(tasks, {"accuracy": values}, True, values, indices, dict(problems))
    converted = frame != items[0].frame and (frame in ("pixels", "resized") or items[0].frame == "pixels")
    if converted if protocol == "strict" else name in ("lisa", "revos"):
        items = add_image_sizes(benchmark.items, images)
    if boxes_given:
        values, problems = _ref_l4_values(items, lines, source)
    elif protocol == "official":
        values, problems = judge_all(items, lines, official_iou)
    else:
        values, problems = judge_all(items, lines, lambda item, text: strict_iou(item, text, frame, box_format))
    if name == "ref_l4":
        steps = np.mean([values > i / 100 for i in range(50, 100, 5)], axis=0)
        columns = {f"acc@{t}": (values > t).astype(float) for t in (0.5, 0.75, 0.9)} | {"macc": steps, "mean_iou": values}
    else:
        columns = {f"acc@{t}": (values >= t).astype(float) for t in (0.5, 0.3, 0.7)} | {"mean_iou": values}
    return Scored(tasks, columns, name in MACRO, values, indices, dict(problems), notes=annotation_problems(benchmark, protocol == "strict"))


def score_files(name: str, annotations: str, predictions: str, box_format: BoxFormat, protocol: str = "official", frame: str = "thousand",
                **settings) -> tuple[dict, Scored]:
    """({"benchmark", "version", "complete", "protocol"}, Scored) from files; settings: images, view, allow_missing of `score`.

    Raises ValueError for an unknown benchmark, protocol or frame, and as `score`.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"no benchmark '{name}'; the benchmarks are {', '.join(PROTOCOLS)}")
    if protocol not in PROTOCOLS[name]:
        raise ValueError(f"{name} has no protocol '{protocol}'; its protocols are {', '.join(PROTOCOLS[name])}")
    if frame not in FRAMES:
        raise ValueError(f"no frame '{frame}'; the frames are {', '.join(FRAMES)}")
    if frame != "thousand" and protocol != "strict":
        raise ValueError(f"--frame {frame} needs --protocol strict: the authors' own rule takes boxes as they are written")
    header = {"benchmark": name, "version": "", "complete": True, "protocol": protocol}
    source = Path(predictions).name
    if name in ("mc_bench", "odinw"):
        from mig_kit.scoring import coco  # here, because coco needs Scored

        truth, boxes = read_json(annotations), read_records(predictions, may_be_empty=True)
        return header, coco.score_odinw(truth, boxes, source) if name == "odinw" else coco.score_mc_bench(truth, boxes, source, protocol)
    benchmark = READERS[name](read_records(annotations))
    header |= {"version": benchmark.version, "complete": benchmark.complete}
    return header, score_predictions(benchmark, read_records(predictions), source, protocol, frame, **settings)


def _ref_l4_values(items: list[BenchmarkItem], lines: list[dict | None], source: str) -> tuple[np.ndarray, Counter]:
    boxes = []
    for item, line in zip(items, lines, strict=True):
        box, kind = (line["pred_bbox"], line.get("format")) if line else ([0, 0, 0, 0], "xyxy")
        if not is_four_numbers(box) or kind not in ("xyxy", "xywh"):
            raise ValueError(f'{source}: the line of {item.name} needs "pred_bbox", four numbers, and "format", xyxy or xywh')
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]] if kind == "xywh" else box)
    values = ref_l4_ious(np.array([item.box for item in items]), np.array(boxes))
    return values, Counter({"missing": missing} if (missing := sum(line is None for line in lines)) else {})


def annotation_problems(benchmark: Benchmark, strict: bool) -> dict[str, list[str]]:
    """Names of items that no box can match (inverted or empty answers), whose answer leaves the image, that are given twice.

    Under strict also those whose target image the annotations do not say, so that it cannot be checked.
    """
    limits = {"unit": 1, "thousand": 1000}
    boxes = [(item, item.box) for item in benchmark.items if item.box]
    seen: dict[tuple, list[str]] = {}
    for item in benchmark.items if benchmark.name == "mig_bench" else ():
        seen.setdefault((item.task, item.images, item.question, item.box), []).append(item.name)
    found = {"no box can match": [item.name for item, (x1, y1, x2, y2) in boxes if x1 >= x2 or y1 >= y2],
             "answer leaves the image": [item.name for item, box in boxes if max(box) > limits.get(item.frame, float("inf"))],
             "given twice": [" = ".join(names) for names in seen.values() if len(names) > 1],
             "target image unknown, not checked": [item.name for item, _ in boxes if strict and item.target is None]}
    return {kind: names for kind, names in found.items() if names}
