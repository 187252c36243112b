"""How much of a score is a shift of boxes: each edge refitted on half of the image lists.

x' = a x + b for each edge, fitted on one half of the lists and scored on the other, in turns, so no
item is in its own fit. What comes back is a matter of frame, resize or padding, not of grounding.
"""

import itertools

import numpy as np

from mig_kit.boxes import Coordinates
from mig_kit.score.blind import pairwise_iou, shares_of_image
from mig_kit.score.official import read_official_box
from mig_kit.score.result import Scored, averaged_groups, number_lists
from mig_kit.stats import gap_interval_by_list, macro_mean

THRESHOLDS = (0.5, 0.75, 0.9)
NEAR, LEAST = (0.3, 0.5), 10  # IoUs from which a box means the answer; fewer such are not fitted
ROUNDS, STEPS = 4, 8  # of a fit
EDGES = ("x1", "y1", "x2", "y2")
IDENTITY = np.array([[1.0, 0.0]] * 4)


def boxes_as_read(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) boxes of the replies and of the answers, 0..1 of their images; NaN for none."""
    items, boxes = [item for item, _, _ in scored.judged], []
    for item, line, _ in scored.judged:
        box = read_official_box(item)(line["response"]) if line and item.box else None
        scale = 1000 if item.coordinates == Coordinates.NORMALIZED_1000 else 1
        boxes.append([np.nan] * 4 if box is None else np.divide(box, scale))
    return np.array(boxes, dtype=float).reshape(-1, 4), shares_of_image(items)


def apply_map(edges: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n, 4) boxes after x' = a x + b; edges: (4, 2) a and b of x1, y1, x2, y2."""
    return boxes * edges[:, 0] + edges[:, 1]


def fit_map(boxes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(4, 2) a and b of each edge that bring boxes (n, 4) to the answers (n, 4).

    The boxes' edges are regressed on the answers' and the line is inverted, because the other way
    round noise alone would draw boxes together. By least absolute deviations over all boxes, and
    over those near their answer; of these maps and of none the one whose boxes reach most of the
    IoUs of 0.5 to 0.9.
    """
    every = np.flatnonzero(np.isfinite(boxes).all(1) & np.isfinite(answers).all(1))
    boxes, answers = boxes[every], answers[every]

    def fit(rows: np.ndarray) -> np.ndarray:
        lines = []
        for edge in range(4):
            design, line = np.c_[answers[rows, edge], np.ones(len(rows))], np.array([1.0, 0.0])
            for _ in range(STEPS):  # of iteratively reweighted least squares
                gaps = np.abs(design @ line - boxes[rows, edge])
                weights = 1 / np.sqrt(np.maximum(gaps, 1e-4))
                line = np.linalg.lstsq(design * weights[:, None], boxes[rows, edge] * weights,
                                       rcond=None)[0]
            slope = max(line[0], 0.1)
            lines.append([1 / slope, -line[1] / slope])
        return np.array(lines)

    def count_reached(edges: np.ndarray) -> float:
        ious = pairwise_iou(apply_map(edges, boxes), answers)
        return sum(float((ious >= step / 10).mean()) for step in range(5, 10))

    if len(every) < LEAST:
        return IDENTITY
    candidates = [IDENTITY, fit(np.arange(len(every)))]
    for edges, threshold in itertools.product(tuple(candidates), NEAR):
        for _ in range(ROUNDS):
            near = np.flatnonzero(pairwise_iou(apply_map(edges, boxes), answers) >= threshold)
            edges = fit(near) if len(near) >= LEAST else edges
        candidates.append(edges)
    return max(candidates, key=count_reached)


def refit(boxes: np.ndarray, answers: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(n, 4) the boxes, each half of the lists after the map that the other half fits."""
    halves = np.random.default_rng(0).permutation(lists.max() + 1)[lists] % 2
    changed = boxes.copy()
    for half in (0, 1):
        edges = fit_map(boxes[halves != half], answers[halves != half])
        changed[halves == half] = apply_map(edges, boxes[halves == half])
    return changed


def calibrate(scored: Scored) -> dict:
    """What a refit of the edges brings back.

    Returns: {"map": {edge: [a, b in thousandths]} of all lists, "median_error": of each edge of
        boxes that are right at 0.5, thousandths, "area_ratio": of these, "acc": threshold ->
        {"before", "after", "gain", "ci95"} in percent, "tasks": the same of each task at 0.5}.
    """
    boxes, answers = boxes_as_read(scored)
    lists, groups = number_lists(scored), averaged_groups(scored)
    changed = refit(boxes, answers, lists)
    before, after = (pairwise_iou(part, answers) for part in (boxes, changed))
    right = before >= 0.5

    def compare(threshold: float, places: list[np.ndarray]) -> dict:
        pairs = [((before[part] >= threshold).astype(float), (after[part] >= threshold).astype(
            float)) for part in places]
        gaps = [(second - first, lists[part]) for (first, second), part in zip(pairs, places)]
        means = [100 * macro_mean([pair[side] for pair in pairs]) for side in (0, 1)]
        return {"before": means[0], "after": means[1], "gain": means[1] - means[0],
                "ci95": [100 * bound for bound in gap_interval_by_list(gaps)]}

    def area(rows: np.ndarray) -> np.ndarray:
        return (rows[:, 2] - rows[:, 0]) * (rows[:, 3] - rows[:, 1])

    edges = fit_map(boxes, answers)
    tasks = {scored.tasks[part[0]]: compare(0.5, [part]) for part in groups} if (
        scored.is_macro) else {}
    return {"map": {name: [float(a), 1000 * float(b)] for name, (a, b) in zip(EDGES, edges)},
            "median_error": dict(zip(EDGES, (1000 * np.median(
                (boxes - answers)[right], axis=0)).tolist())) if right.any() else {},
            "area_ratio": float(np.median(area(boxes[right]) / area(answers[right])))
            if right.any() else None,
            "acc": {str(threshold): compare(threshold, groups) for threshold in THRESHOLDS},
            "tasks": tasks}


def calibration_notes(found: dict, name: str) -> list[str]:
    """Sentences on a result of `calibrate`."""
    notes = []
    for threshold, part in found["acc"].items():
        low, high = part["ci95"]
        notes.append(f"{name}, edges refitted on the other half of the lists, acc@{threshold}: "
                     f"{part['before']:.2f} to {part['after']:.2f}, {part['gain']:+.2f} points "
                     f"({low:+.2f} to {high:+.2f}).")
    if found["acc"]["0.5"]["ci95"][0] > 0:
        maps = ", ".join(f"{edge}' = {a:.3f} {edge} {b:+.1f}" for edge, (a, b) in
                         found["map"].items())
        notes.append(f"{name}: a systematic shift of boxes: frame, resize or padding (in "
                     f"thousandths: {maps}).")
    if found["median_error"]:
        errors = ", ".join(f"{edge} {error:+.1f}" for edge, error in found["median_error"].items())
        notes.append(f"{name}, boxes right at 0.5: median error {errors} thousandths, area "
                     f"{found['area_ratio']:.3f} of the answer's.")
    return notes


def split_difference(first: Scored, second: Scored) -> str:
    """A sentence: how much of first over second is calibration, the rest is not."""
    sides = []
    for scored in (first, second):
        boxes, answers = boxes_as_read(scored)
        changed = refit(boxes, answers, number_lists(scored))
        sides.append([(pairwise_iou(part, answers) >= 0.5).astype(float)
                      for part in (boxes, changed)])
    (raw, after), (other_raw, other_after) = sides
    lists, parts = number_lists(first), []
    for gaps in (raw - other_raw, after - other_after, raw - other_raw - after + other_after):
        groups = [(gaps[places], lists[places]) for places in averaged_groups(first)]
        low, high = gap_interval_by_list(groups)
        value = macro_mean([values for values, _ in groups])
        parts.append(f"{100 * value:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})")
    return (f"acc@0.5, of {parts[0]} points between the two {parts[2]} are calibration; refitted, "
            f"{parts[1]} remain.")
