"""Ref-L4's own figures: IoU in single precision, accuracies over thresholds, averages over classes.

Source: JierunChen/Ref-L4, ref_l4/overlaps.py and ref_l4/evaluation.py.
"""

from collections import Counter, defaultdict

import numpy as np

from mig_kit.scoring.annotations import BenchmarkItem, is_four_numbers

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
                source: str) -> tuple[np.ndarray, Counter]:
    """((n,) IoU, problems) of the "pred_bbox" of each line; None counts 0 and as missing.

    source: the predictions' name, for errors. Raises ValueError for a malformed line.
    """
    boxes = []
    for item, line in zip(items, lines, strict=True):
        if line is None:
            boxes.append([0, 0, 0, 0])
            continue
        box, written_as = line["pred_bbox"], line.get("format")
        if not is_four_numbers(box) or written_as not in ("xyxy", "xywh"):
            raise ValueError(f'{source}: the line of {item.name} needs "pred_bbox", four numbers, '
                             'and "format", xyxy or xywh')
        x, y, third, fourth = box
        boxes.append([x, y, x + third, y + fourth] if written_as == "xywh" else box)
    values = ref_l4_ious(np.array([item.box for item in items]), np.array(boxes))
    problems = Counter("missing" if line is None else "no box found"
                       for line, box in zip(lines, boxes) if not any(box))
    return values, problems


def ref_l4_metrics(values: np.ndarray) -> dict[str, np.ndarray]:
    """Metric -> (n,) shares of IoU values, which must be over the threshold, not at it."""
    metrics = {f"acc@{t}": (values > t).astype(float) for t in (0.5, 0.75, 0.9)}
    steps = [values > threshold for threshold in THRESHOLDS]
    return metrics | {"macc": np.mean(steps, axis=0), "mean_iou": values.astype(float)}


def class_averages(items: list[BenchmarkItem], values: np.ndarray) -> dict[str, float]:
    """{"class_acc@0.5", "class_macc"} in percent: unweighted means over the classes of objects.

    COCO's classes count as those of Objects365. Empty where the annotations have no class.
    """
    rows = defaultdict(list)
    for row, item in enumerate(items):
        rows[_object_class(item.category)].append(row)
    if "" in rows:
        return {}
    by_class = [values[places] for places in rows.values()]
    means = [np.mean([np.mean(part > threshold) for part in by_class]) for threshold in THRESHOLDS]
    return {"class_acc@0.5": 100 * float(means[0]), "class_macc": 100 * float(np.mean(means))}


def _object_class(category: str) -> str:
    """"refcoco_1", a category of COCO, as "o365_1", one of Objects365; others as they are."""
    dataset, _, number = category.rpartition("_")
    if dataset == "refcoco" and number.isdecimal() and int(number) in OBJECTS365_BY_COCO:
        return f"o365_{OBJECTS365_BY_COCO[int(number)]}"
    return category
