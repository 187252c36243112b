"""What needs no image: scores of a constant box, a whole image, another's box, a frequent letter.

No row here is a model that one could submit: the constants are fitted on the benchmark's own other
image lists, so they tell what its annotations give away.
"""

from collections import Counter

import numpy as np

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.result import Scored, averaged_groups, number_lists
from mig_kit.stats import group_by_task, macro_mean, paired_gap_by_list

WHOLE, CONSTANT, OTHER, LETTER = ("whole image", "constant box", "another question's box",
                                  "most frequent letter")
FOLDS, GRID, ROUNDS, SEEDS, MOST = 5, 20, 2, 40, 500  # MOST: boxes that a fit looks at


def shares_of_image(items: list[BenchmarkItem]) -> np.ndarray:
    """(n, 4) the items' boxes in 0..1 of their images; NaN for an item without box or size."""
    limits = {"normalized_1": (1, 1), "normalized_1000": (1000, 1000)}
    rows = []
    for item in items:
        size = limits.get(item.coordinates, item.size)
        is_open = item.box is None or size is None
        rows.append([np.nan] * 4 if is_open else np.divide(item.box, (*size, *size)))
    return np.array(rows, dtype=float).reshape(-1, 4)


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(...) IoU of xyxy boxes (..., 4), broadcast; 0 where one is inverted, empty or NaN."""
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2],
                                                                     second[..., :2])
    overlap = np.clip(sides, 0, None).prod(-1)
    areas = [np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1)
             for boxes in (first, second)]
    with np.errstate(invalid="ignore", divide="ignore"):
        values = overlap / (areas[0] + areas[1] - overlap)
    return np.where(np.isfinite(values) & (areas[0] > 0) & (areas[1] > 0), values, 0.0)


def fit_constant_box(boxes: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """(4,) the box that most of `boxes` (n, 4), in 0..1, reach the threshold with.

    The best of some of the boxes themselves and their median, then moved edge by edge on a grid.
    """
    boxes = boxes[::-(-len(boxes) // MOST)]

    def count(candidates: np.ndarray) -> np.ndarray:
        ious = pairwise_iou(candidates[:, None], boxes[None])
        return (ious >= threshold).mean(1) + 1e-3 * ious.mean(1)

    candidates = np.vstack([np.median(boxes, axis=0), boxes[::-(-len(boxes) // SEEDS)],
                            [0, 0, 1, 1]])
    best = candidates[np.argmax(count(candidates))]
    for _ in range(ROUNDS):
        for edge in range(4):
            moved = np.tile(best, (GRID + 2, 1))
            moved[:-1, edge] = np.arange(GRID + 1) / GRID
            best = moved[np.argmax(count(moved))]
    return best


def blind_values(scored: Scored) -> dict[str, np.ndarray]:
    """Row -> (n,) values of the headline metric, 0..1, of answers that no image is needed for.

    Constants are fitted task by task on the other four fifths of the image lists, so no item's own
    list is in its fit; another question's box is the next list's of the task. Where a file has
    both, questions with letters get the most frequent one in every row.
    """
    items, lists = [item for item, _ in scored.judged], number_lists(scored)
    by_task, folds = group_by_task(scored.tasks, np.arange(len(items))), lists % FOLDS
    letters, boxes = np.zeros(len(items)), shares_of_image(items)
    guesses = {WHOLE: np.tile([0.0, 0, 1, 1], (len(items), 1)), CONSTANT: np.full_like(boxes, 0),
               OTHER: np.full_like(boxes, 0)}
    for places in by_task.values():
        known = places[np.isfinite(boxes[places]).all(1)]
        for fold in range(FOLDS):
            own, rest = places[folds[places] == fold], known[folds[known] != fold]
            counts = Counter(items[place].letter for place in places[folds[places] != fold])
            letter = max(counts, key=counts.get, default="")
            letters[own] = [letter != "" and items[place].letter == letter for place in own]
            if len(rest):
                guesses[CONSTANT][own] = fit_constant_box(boxes[rest])
        ordered = known[np.argsort(lists[known], kind="stable")]
        after = np.searchsorted(lists[ordered], lists[ordered], "right") % max(1, len(ordered))
        is_another = lists[ordered] != lists[ordered[after]]
        guesses[OTHER][ordered] = boxes[ordered[after]] * is_another[:, None]
    if np.isnan(boxes).all():
        return {LETTER: letters} if all(item.letter for item in items) else {}
    return {name: np.maximum(letters, pairwise_iou(guess, boxes) >= 0.5)
            for name, guess in guesses.items()}


def blind_summary(scored: Scored) -> dict:
    """{"rows": row -> {"avg", "tasks"}, "best": task -> row, "over": task or "avg" -> value, ci95}.

    "over" is the model's points over the best blind row of each task, with the interval of the
    difference.
    """
    headline = next(iter(scored.metrics.values()))
    blind, average = blind_values(scored), averaged_groups(scored)
    if not blind:
        return {}
    lists, best, names = number_lists(scored), np.zeros(len(headline)), {}
    by_task = group_by_task(scored.tasks, np.arange(len(headline)))
    for task, places in by_task.items():
        names[task] = max(blind, key=lambda name: blind[name][places].mean())
        best[places] = blind[names[task]][places]
    rows = {name: {"avg": 100 * macro_mean([values[places] for places in average]),
                   "tasks": {task: 100 * float(values[places].mean())
                             for task, places in by_task.items()}}
            for name, values in blind.items()}
    groups = {task: [places] for task, places in by_task.items()} | {"avg": average}
    return {"rows": rows, "best": names, "over": {name: paired_gap_by_list(
        [((headline - best)[places], lists[places]) for places in parts])
        for name, parts in groups.items()}}
