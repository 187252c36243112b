"""Replies and boxes as the benchmarks' authors judge them, quirks included.

Each function names its source. Parsers take any string and never raise. Rules of our own are in
`reply_boxes.py` and `choice_parsers.py`.
"""

import math
import re

import numpy as np

from mig_kit.boxes import Box, Coordinates
from mig_kit.common import UserError
from mig_kit.score.annotations import BenchmarkItem, is_four_numbers
from mig_kit.score.result import Verdict
from mig_kit.stats import group_by_task, macro_mean

# Boxes as the authors' scripts read them.
_REAL = r"(\d+\.\d+)"
MIG_BENCH_PATTERNS = (
    re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)"),
    re.compile(rf"\[{_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\]"),
    re.compile(rf"\({_REAL},{_REAL}\),\({_REAL},{_REAL}\)"),
    re.compile(rf"\({_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\)"),
    re.compile(r"\[(\d+),\s*(\d+),\s*(\d+),\s*(\d+)\]"),
    re.compile(r"<box>(\d+)\s+(\d+)\s+(\d+)\s+(\d+)</box>"),
)
_WHOLE_PAIR = re.compile(r"\(\s*(\d+)\s*,\s*(\d+)\s*\)\s*,\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)")
_MAX_DIGITS = 300  # a number of more digits is none that a float can hold

# what reasoning stands between, in the replies of released models
THINKING_MARKS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"), ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis", "<|channel|>final<|message|>"))
CLOSES = re.compile("|".join(re.escape(end) for _, end in THINKING_MARKS)
                     + r"|\Aanalysis.*assistantfinal", re.DOTALL)
_HIDDEN = re.compile("|".join(rf"{re.escape(start)}.*?(?:{re.escape(end)}|\Z)" for start, end in (
    *THINKING_MARKS, ("<tool_call>", "</tool_call>"))), re.DOTALL)
# where a model runs on after its turn, and what a chat template writes before it
_RUN_ON = re.compile(r"<\|(?:im_end|eot_id|end|return|endoftext)\|>|</s>|<end_of_turn>"
                     r"|\n\W*(?:Question|Human|User)\s*:")
_OPENING = re.compile(r"\s*(?:<s>|<\|(?!begin_of_box|box|object_ref)\w{1,20}\|>(?:assistant)?"
                      r"|assistant\s*\n)")
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)

NO_BOX_ANNOTATED = "counted 0, for the annotations have no box"
THRESHOLDS = [percent / 100 for percent in range(50, 100, 5)]
# COCO category -> the Objects365 category that the authors count it as; 37 has none of its own
OBJECTS365_BY_COCO = {
    1: 1, 2: 47, 3: 6, 4: 59, 5: 115, 6: 56, 7: 117, 8: 66, 9: 22, 10: 41, 11: 177, 13: 128,
    14: 250, 15: 25, 16: 56, 17: 140, 18: 93, 19: 79, 20: 100, 21: 97, 22: 145, 23: 296, 24: 179,
    25: 181, 27: 39, 28: 40, 31: 13, 32: 44, 33: 194, 34: 220, 35: 119, 36: 174, 37: 100000,
    38: 155, 39: 138, 40: 114, 41: 146, 42: 147, 43: 205, 44: 9, 46: 36, 47: 11, 48: 89, 49: 85,
    50: 94, 51: 26, 52: 113, 53: 83, 54: 266, 55: 104, 56: 142, 57: 153, 58: 235, 59: 144, 60: 151,
    61: 98, 62: 3, 63: 51, 64: 26, 65: 76, 67: 98, 70: 154, 72: 37, 73: 74, 74: 116, 75: 133,
    76: 107, 77: 62, 78: 164, 79: 135, 80: 278, 81: 82, 82: 134, 84: 19, 85: 95, 86: 31, 87: 170,
    88: 70, 89: 328, 90: 227}


def _matches(text: str) -> list[tuple[str, ...]]:
    """Digit strings of all matches of the first MIG-Bench pattern that matches."""
    for pattern in MIG_BENCH_PATTERNS:
        if matches := pattern.findall(text):
            return matches
    return []


def parse_mig_bench_box(text: str) -> Box | None:
    """The box that Migician's script scores, xyxy in 0..1; None if it reads none.

    It takes the first box that the first matching pattern finds, in the thinking too. Values are
    not checked: pixels pass for 0..1000. Source: thunlp/Migician, eval/utils.py, extract_bbox.
    """
    matches = _matches(text)
    if not matches:
        return None
    values = [float(digits) for digits in matches[0]]
    if len(matches) == 1:  # only then the script divides a literal 1
        return tuple(v / 1000 if v >= 1 else v for v in values)
    return tuple(v / 1000 if v > 1 else v for v in values)


def parse_revised_mig_bench_box(text: str) -> Box | None:
    """The box that UniVG-R1's script scores on the revised MIG-Bench, xyxy in 0..1000, or None.

    Migician's patterns, but a first box with a decimal point is none. Source: AMAP-ML/UniVG-R1,
    eval/MIG_bench/utils.py, extract_bbox.
    """
    matches = _matches(text)
    if not matches or any("." in digits or len(digits) > _MAX_DIGITS for digits in matches[0]):
        return None
    return tuple(float(digits) for digits in matches[0])


def parse_normalized_pair(text: str) -> Box | None:
    """The first "(x1,y1),(x2,y2)" of whole numbers, divided by 1000; None without one.

    Source: AMAP-ML/UniVG-R1, eval/zero_shot (its LISA and ReVOS scripts).
    """
    match = _WHOLE_PAIR.search(text)
    if match is None or any(len(digits) > _MAX_DIGITS for digits in match.groups()):
        return None
    return tuple(int(digits) / 1000 for digits in match.groups())


def shown_text(text: str) -> str:
    """The model's own turn, without its reasoning and <tool_call> blocks, up to where it runs on.

    Reasoning that never closes is no answer.
    """
    text = CLOSES.split(_HIDDEN.sub(" ", text))[-1]
    while opening := _OPENING.match(text):
        text = text[opening.end():]
    return _RUN_ON.split(text)[0]


def split_answer(text: str) -> tuple[str, str, str] | None:
    """What is before, inside and behind the last closed <answer> block of `shown_text`, or
    GLM-4.5V's marks of one; None without either.
    """
    text = shown_text(text)
    for opening, closing in (("<answer>", "</answer>"), ("<|begin_of_box|>", "<|end_of_box|>")):
        end = text.rfind(closing)
        start = text.rfind(opening, 0, end) if end >= 0 else -1
        if start >= 0:
            return text[:start], text[start + len(opening):end], text[end + len(closing):]
    return None


def last_answer_block(text: str) -> str | None:
    """The inside of the last answer block, as of `split_answer`; None without one."""
    parts = split_answer(text)
    return parts and parts[1]


def parse_blink_letter(text: str, valid: str) -> str:
    """The only "(B)" among white space, of the text or of its last paragraph; "" if undecided.

    Source: zeyofu/BLINK_Benchmark, eval/test_benchmark.py, analyze_answer; it then asks a model.
    """
    for part in (text, text.split("\n\n")[-1]):
        words = part.split()
        letters = [letter for letter in valid if f"({letter})" in words]
        if len(letters) == 1:
            return letters[0]
    return ""


def script_iou(answer: Box, box: Box | None, added: float = 0.0) -> float:
    """IoU of two boxes as the authors' scripts compute it; 0 for None or a division by zero.

    Nothing is clipped or repaired. added: to the union, 1e-6 in UniVG-R1's script. Sources:
    thunlp/Migician, eval/utils.py, calculate_iou; AMAP-ML/UniVG-R1, eval/zero_shot, compute_iou.
    """
    if box is None:
        return 0.0
    width = min(answer[2], box[2]) - max(answer[0], box[0])
    height = min(answer[3], box[3]) - max(answer[1], box[1])
    if width < 0 or height < 0:  # touching is an overlap of 0
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (answer, box)]
    union = areas[0] + areas[1] - width * height + added
    value = width * height / union if union else 0.0
    return 0.0 if math.isnan(value) else value


# what an item's answer is measured in -> its authors' parser
PARSERS = {Coordinates.PIXELS: parse_normalized_pair, Coordinates.NORMALIZED_1: parse_mig_bench_box,
           Coordinates.NORMALIZED_1000: parse_revised_mig_bench_box}


def official_iou(item: BenchmarkItem, response: str) -> Verdict:
    """The IoU of a free-text reply by the benchmark's own script.

    An item without a box counts 0, as in LISA's and ReVOS's script; one in pixels needs a size.
    """
    if item.box is None:
        return Verdict(0.0, NO_BOX_ANNOTATED)
    box = PARSERS[item.coordinates](response)
    if box is None:
        return Verdict(0.0, "no box found")
    limit = 1000 if item.coordinates == Coordinates.NORMALIZED_1000 else 1
    problem = "box outside the image, scored all the same" if max(box) > limit else ""
    answer, added = item.box, 0.0
    if item.coordinates == Coordinates.PIXELS:
        answer, added = tuple(np.divide(item.box, (*item.size, *item.size)).tolist()), 1e-6
    return Verdict(script_iou(answer, box, added), problem,
                   {"box": box, "rule": "the authors' rule"})


def ref_l4_ious(answers: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n,) float32 IoU of (n, 4) xyxy pixel boxes, pairwise; the union is at least 1e-6."""
    a, b = np.asarray(answers, np.float32), np.asarray(boxes, np.float32)
    sides = np.minimum(a[:, 2:], b[:, 2:]) - np.maximum(a[:, :2], b[:, :2])
    sides = np.clip(sides, 0, None)
    overlap = sides[:, 0] * sides[:, 1]
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    return overlap / np.maximum(area_a + area_b - overlap, np.float32(1e-6))


def judge_boxes(items: list[BenchmarkItem], lines: list[dict | None],
                source: str) -> list[Verdict]:
    """The IoU of each line's "pred_bbox"; None counts 0 and as missing.

    Raises: UserError, with the predictions' name `source`, for a malformed line.
    """
    boxes = []
    for item, line in zip(items, lines, strict=True):
        box, written_as = (line["pred_bbox"], line.get("format")) if line else ([0] * 4, "xyxy")
        if not is_four_numbers(box) or written_as not in ("xyxy", "xywh"):
            raise UserError(f'{source}: the line of {item.name} needs "pred_bbox", four numbers, '
                            'and "format", xyxy or xywh')
        x, y, third, fourth = box
        boxes.append([x, y, x + third, y + fourth] if written_as == "xywh" else box)
    values = ref_l4_ious(np.array([item.box for item in items]), np.array(boxes))
    return [Verdict(value, "" if any(box) else "missing" if line is None else "no box found",
                    {"box": line["pred_bbox"], "rule": "pred_bbox"} if line else {})
            for value, line, box in zip(values, lines, boxes)]


def ref_l4_metrics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> (n,) shares; an IoU must be over a threshold, not at it."""
    metrics = {f"acc@{t}": (values > t).astype(float) for t in (0.5, 0.75, 0.9)}
    steps = [values > threshold for threshold in THRESHOLDS]
    return metrics | {"macc": np.mean(steps, axis=0), "mean_iou": values.astype(float)}


def class_averages(items: list[BenchmarkItem], values: np.ndarray) -> dict[str, float]:
    """{"class_acc@0.5", "class_macc"}: unweighted means over classes, percent; {} without any."""
    by_class = group_by_task((_object_class(item.category) for item in items), values)
    if "" in by_class:
        return {}
    means = [macro_mean([part > threshold for part in by_class.values()])
             for threshold in THRESHOLDS]
    return {"class_acc@0.5": 100 * means[0], "class_macc": 100 * float(np.mean(means))}


def _object_class(category: str) -> str:
    """"refcoco_1", a category of COCO, as "o365_1", of Objects365."""
    dataset, _, number = category.rpartition("_")
    if dataset == "refcoco" and number.isdecimal() and int(number) in OBJECTS365_BY_COCO:
        return f"o365_{OBJECTS365_BY_COCO[int(number)]}"
    return category
