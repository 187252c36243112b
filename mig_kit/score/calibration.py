"""How much of a score is a shift of boxes: each edge refitted on half of the image lists.

x' = a x + b for each edge, fitted on one half of the lists and scored on the other, in turns, so no
item is in its own fit. What comes back is a matter of frame, resize or padding, not of grounding.
"""

import numpy as np

from mig_kit.boxes import Coordinates
from mig_kit.score.blind import pairwise_iou, shares_of_image
from mig_kit.score.result import Scored, averaged_groups, number_lists
from mig_kit.stats import interval_text, macro_mean, paired_gap_by_list, to_percent

THRESHOLDS = (0.5, 0.75, 0.9)
NEAR, LEAST = 0.5, 10  # the IoU from which a box means the answer; fewer such are not fitted
ROUNDS, HALVINGS = 10, 40  # of choosing the boxes that are near, and of a slope's range
SLOPES = (0.1, 10.0)
EDGES = ("x1", "y1", "x2", "y2")
IDENTITY = np.array([[1.0, 0.0]] * 4)


def boxes_as_read(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) boxes of the replies and of the answers, 0..1 of their images; NaN for none."""
    boxes = []
    for item, verdict in scored.judged:
        box = verdict.read.get("box")
        scale = 1000 if item.coordinates == Coordinates.NORMALIZED_1000 else 1
        boxes.append([np.nan] * 4 if box is None else np.divide(box, scale))
    return np.array(boxes, dtype=float).reshape(-1, 4), shares_of_image(
        [item for item, _ in scored.judged])


def apply_map(edges: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n, 4) boxes after x' = a x + b; edges: (4, 2) a and b of x1, y1, x2, y2."""
    return boxes * edges[:, 0] + edges[:, 1]


def _iou_in_image(boxes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    return pairwise_iou(np.clip(boxes, 0, 1), answers)


def fit_lines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(4, 2) slope and intercept of each column's line y = a x + b of least absolute deviations.

    With the median gap as its intercept, a line's error is a convex function of the slope, so
    halving the slope's range by the sign of the derivative finds the minimum itself.
    """
    low, high = (np.full(4, bound) for bound in SLOPES)
    columns = np.arange(4)
    for _ in range(HALVINGS):
        slopes = (low + high) / 2
        gaps = y - slopes * x
        middle = np.argsort(gaps, axis=0, kind="stable")[len(x) // 2], columns
        is_steeper = (np.sign(gaps - gaps[middle]) * (x - x[middle])).sum(0) > 0
        low, high = np.where(is_steeper, slopes, low), np.where(is_steeper, high, slopes)
    return np.stack([slopes, gaps[middle]], 1)


def fit_map(boxes: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(4, 2) a and b of each edge that bring boxes (n, 4) to the answers (n, 4).

    The boxes' edges are regressed on the answers' and the line is inverted, because the other way
    round noise alone would draw boxes together. By least absolute deviations over all boxes, and
    over those near their answer; of these maps and of none the one whose boxes reach most of the
    IoUs of 0.5 to 0.9.
    """
    every = np.flatnonzero(np.isfinite(boxes).all(1) & np.isfinite(answers).all(1))
    if len(every) < LEAST:
        return IDENTITY
    boxes, answers = boxes[every], answers[every]

    def fit(rows: np.ndarray) -> np.ndarray:
        slopes, intercepts = fit_lines(answers[rows], boxes[rows]).T
        return np.stack([1 / slopes, -intercepts / slopes], 1)

    def reach(edges: np.ndarray) -> np.ndarray:
        return _iou_in_image(apply_map(edges, boxes), answers)

    candidates = [IDENTITY, fit(np.arange(len(every)))]
    for edges in tuple(candidates):
        near = np.array([], dtype=int)
        for _ in range(ROUNDS):
            before, near = near, np.flatnonzero(reach(edges) >= NEAR)
            if len(near) < LEAST or np.array_equal(near, before):
                break
            edges = fit(near)
        candidates.append(edges)
    steps = np.arange(5, 10) / 10
    return max(candidates, key=lambda edges: (reach(edges)[:, None] >= steps).sum())


def refit(boxes: np.ndarray, answers: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(n, 4) the boxes, each half of the lists after the map that the other half fits."""
    halves = np.random.default_rng(0).permutation(lists.max() + 1)[lists] % 2
    changed = boxes.copy()
    for half in (0, 1):
        edges = fit_map(boxes[halves != half], answers[halves != half])
        changed[halves == half] = apply_map(edges, boxes[halves == half])
    return changed


def measure_gain(before: np.ndarray, after: np.ndarray, lists: np.ndarray,
                 groups: list[np.ndarray]) -> dict:
    """{"before", "after", "value", "ci95"}, percent and points, of a change of a score.

    Args:
        before, after: (n,) 0 or 1 for each item.
        lists: (n,) numbers of the lists of images, from 0.
        groups: rows of each task that counts alike.
    """
    means = {name: to_percent(macro_mean([values[rows] for rows in groups]))
             for name, values in (("before", before), ("after", after))}
    return means | paired_gap_by_list([((after - before)[rows], lists[rows]) for rows in groups])


def _reach(boxes: np.ndarray, answers: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    return (_iou_in_image(boxes, answers) >= threshold).astype(float)


def measure_refit(boxes: np.ndarray, answers: np.ndarray, lists: np.ndarray,
                  groups: list[np.ndarray]) -> dict:
    """`measure_gain` at IoU 0.5 of what a refit brings back; boxes, answers: as of `refit`."""
    changed = refit(boxes, answers, lists)
    return measure_gain(_reach(boxes, answers), _reach(changed, answers), lists, groups)


def calibrate(scored: Scored) -> dict:
    """What a refit of the edges brings back.

    Returns: {"boxes": how many were read, "map": {edge: [a, b in thousandths]} of all lists,
        "median_error": of each edge of boxes that are right at 0.5, thousandths, "acc": threshold
        -> {"before", "after", "value": the gain, "ci95"} in percent, "tasks": the same of each
        task at 0.5}.
    """
    (boxes, answers), lists = boxes_as_read(scored), number_lists(scored)
    changed, right = refit(boxes, answers, lists), _reach(boxes, answers) > 0
    groups = averaged_groups(scored)

    def gain(threshold: float, groups: list[np.ndarray]) -> dict:
        return measure_gain(_reach(boxes, answers, threshold), _reach(changed, answers, threshold),
                            lists, groups)

    errors = 1000 * np.median((boxes - answers)[right], axis=0) if right.any() else ()
    return {"boxes": int(np.isfinite(boxes).all(1).sum()),
            "map": {edge: [float(a), 1000 * float(b)]
                    for edge, (a, b) in zip(EDGES, fit_map(boxes, answers))},
            "median_error": dict(zip(EDGES, map(float, errors))),
            "acc": {str(threshold): gain(threshold, groups) for threshold in THRESHOLDS},
            "tasks": {scored.tasks[rows[0]]: gain(0.5, [rows]) for rows in groups}
            if scored.is_macro else {}}


def calibration_notes(result: dict, name: str) -> list[str]:
    """Sentences on a result of `calibrate`; name: of the predictions."""
    notes = [f"{name}, edges refitted on the other half of the lists, acc@{threshold}: "
             f"{part['before']:.2f} to {part['after']:.2f}, {_signed_gap(part)} points."
             for threshold, part in result["acc"].items()]
    if result["acc"]["0.5"]["ci95"][0] > 0:
        maps = ", ".join(f"{edge}' = {a:.3f} {edge} {b:+.1f}"
                         for edge, (a, b) in result["map"].items())
        notes.append(f"{name}: a systematic shift of boxes: frame, resize or padding (in "
                     f"thousandths: {maps}).")
    elif result["boxes"] < 2 * LEAST:
        notes.append(f"{name}: {result['boxes']} boxes are too few to fit a shift.")
    else:
        notes.append(f"{name}: no shift that all images share is shown, as the interval holds 0; "
                     "one that depends on an image's size (padding, a limit of pixels) never "
                     "shows here.")
    if any(min(abs(1 / a - bound) for bound in SLOPES) < 1e-6 for a, _ in result["map"].values()):
        notes.append(f"{name}: the fit of an edge has not converged: its slope ended at the bound "
                     "of 0.1 to 10.")
    if result["median_error"]:
        errors = ", ".join(f"{edge} {error:+.1f}"
                           for edge, error in result["median_error"].items())
        notes.append(f"{name}, boxes right at 0.5: median error {errors} thousandths.")
    return notes


def _signed_gap(gap: dict) -> str:
    return interval_text(gap["value"], gap["ci95"], "+", 2)


def split_difference(first: Scored, second: Scored) -> str:
    """A sentence: how much of first over second is calibration, the rest is not."""
    raw, refitted = [], []
    for scored in (first, second):
        boxes, answers = boxes_as_read(scored)
        raw.append(_reach(boxes, answers))
        refitted.append(_reach(refit(boxes, answers, number_lists(scored)), answers))
    difference, remainder, shifted = (
        _signed_gap(measure_gain(*pair, number_lists(first), averaged_groups(first)))
        for pair in (raw[::-1], refitted[::-1], (refitted[0] - refitted[1], raw[0] - raw[1])))
    return (f"acc@0.5, of {difference} points between the two {shifted} are calibration; refitted, "
            f"{remainder} remain.")
