"""MC-Bench and OdinW: detections scored through pycocotools.

Predictions are COCO results: a list of {"image_id", "category_id", "bbox": [x, y, w, h] pixels, "score"}. An image without an
entry has no box, which is an answer, so nothing can be missing here.
"""

import contextlib
import copy
import io
import itertools
from collections import defaultdict

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from mig_kit.scoring.annotations import is_four_numbers
from mig_kit.scoring.result import Scored
from mig_kit.stats import to_percent


def load_coco(annotations: dict, name: str) -> COCO:
    """The annotations as a COCO index. Raises ValueError where they have not COCO's parts."""
    wanted = ("images", "annotations", "categories")
    if not isinstance(annotations, dict) or not all(isinstance(annotations.get(part), list) for part in wanted):
        raise ValueError(f"the {name} annotations need the lists {', '.join(wanted)}; give the benchmark's COCO-style JSON file")
    coco = COCO()
    coco.dataset = copy.deepcopy(annotations)
    if not all(isinstance(e, dict) and "id" in e for part in wanted for e in annotations[part]):
        raise ValueError(f"every image, annotation and category of the {name} annotations needs an id; is the file whole?")
    numbers = itertools.count(1)
    for entry in coco.dataset["annotations"]:
        if not (is_four_numbers(entry.get("bbox")) and "image_id" in entry and "category_id" in entry):
            raise ValueError(f"annotation {entry['id']} of {name} needs image_id, category_id and a bbox of four numbers")
        entry.setdefault("iscrowd", 0)
        entry["id"] = next(numbers)  # pycocotools takes a match with number 0 for none
        entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def validate_detections(predictions: list[dict], coco: COCO, source: str) -> list[dict]:
    """What counts of the predictions, with the annotations' own ids (3 for "3").

    Raises ValueError that lists unknown images and categories, or says which entry is malformed.
    """
    for number, entry in enumerate(predictions, 1):
        score = entry.get("score")
        if not (is_four_numbers(entry.get("bbox")) and type(score) in (int, float) and -1e9 < score < 1e9):
            raise ValueError(f'entry {number} of {source} needs "bbox", four numbers x, y, width, height in pixels, and "score"')
    for field, known in (("image_id", coco.imgs), ("category_id", coco.cats)):
        names = {str(key) for key in known}
        unknown = sorted({str(entry.get(field)) for entry in predictions} - names)
        if unknown:
            raise ValueError(f"{source} has {len(unknown)} values of {field} that the annotations do not know "
                             f"({', '.join(unknown[:10])}); use the ids of the annotation file")
    own = {field: {str(key): key for key in known} for field, known in (("image_id", coco.imgs), ("category_id", coco.cats))}
    return [{"image_id": own["image_id"][str(entry["image_id"])], "category_id": own["category_id"][str(entry["category_id"])],
             "bbox": list(entry["bbox"]), "score": entry["score"]} for entry in predictions]


def load_detections(coco: COCO, predictions: list[dict]) -> COCO:
    """The predictions as a COCO index on the annotations' images; an empty list is allowed."""
    with contextlib.redirect_stdout(io.StringIO()):
        if predictions:
            return coco.loadRes(copy.deepcopy(predictions))
        return load_coco({**coco.dataset, "annotations": []}, "empty")


def run_coco_eval(coco: COCO, found: COCO, images: list | None = None) -> COCOeval:
    """pycocotools' box evaluation, matched and accumulated; images: ids to restrict it to."""
    run = COCOeval(coco, found, "bbox")
    if images is not None:
        run.params.imgIds = images
    with contextlib.redirect_stdout(io.StringIO()):
        run.evaluate()
        run.accumulate()
    return run


def mean_precision(run: COCOeval, category: int, threshold: int | None = None) -> float | None:
    """AP (0..1) of the category at a place in COCO's ten IoU thresholds (None: mean over all); None where it has no truth.

    All areas, at most 100 detections per image.
    """
    precision = run.eval["precision"][slice(None) if threshold is None else threshold, :, category, 0, 2]
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else None


def score_odinw(annotations: dict, predictions: list[dict], source: str) -> Scored:
    """COCO AP of one OdinW data set; tasks are its categories, their AP 0.5:0.95, AP50 and AP75 in percent.

    The benchmark's figure is the unweighted mean over its data sets (13 or 35), one annotation file each.
    """
    coco = load_coco(annotations, "OdinW")
    run = run_coco_eval(coco, load_detections(coco, validate_detections(predictions, coco, source)))
    names, whole = [], {}
    steps = {"ap": None, "ap50": 0, "ap75": 5}
    for place, category in enumerate(run.params.catIds):  # sorted, as the results are; the file's order may be another
        values = {name: mean_precision(run, place, step) for name, step in steps.items()}
        if values["ap"] is not None:
            count = len(coco.getAnnIds(catIds=[category]))
            names += [coco.cats[category]["name"]] * count
            whole[coco.cats[category]["name"]] = values
    if not whole:
        raise ValueError("the OdinW annotations hold no boxes; give the file with annotations")
    average = {name: to_percent(np.mean([values[name] for values in whole.values()])) for name in steps}
    return Scored(tuple(names), {}, True, np.array([]),
                  whole={"avg": average} | {task: {k: to_percent(v) for k, v in values.items()} for task, values in whole.items()})


def score_mc_bench(annotations: dict, predictions: list[dict], source: str, protocol: str = "official") -> Scored:
    """MC-Bench: image-level accuracy per pair, and AP50 weighted by the truth's count per category; tasks are the text styles.

    A pair is right if for both images "has a box" agrees with the truth. Where a pair's truth has several groups ("group 2"),
    predicted groups are first renamed to the permutation with the highest mean IoU. `official` repeats the authors' script, in
    which the renaming of only the last such pair survives, and one renaming can run into the next; `strict` renames all pairs,
    each group once. In both a category's count weighs its own AP; the script pairs them in the file's order, which is the same
    where that is sorted by id. Source: XuYunqiu/MC-Bench, eval_mc_bench.py.
    """
    coco = load_coco(annotations, "MC-Bench")
    pairs = _pairs(coco)
    entries = rename_groups(coco, validate_detections(predictions, coco, source), [pair for pair, _ in pairs], protocol == "official")
    found = load_detections(coco, entries)
    truth = {image for image in coco.imgs if coco.getAnnIds(imgIds=[image])}
    boxed = {entry["image_id"] for entry in entries}
    right = np.array([all((image in truth) == (image in boxed) for image in pair) for pair, _ in pairs], float)
    tasks = tuple(style for _, style in pairs)
    whole = {"avg": {"ap50": _weighted_ap50(coco, found, None)}}
    for task in dict.fromkeys(tasks):
        images = [image for pair, style in pairs for image in pair if style == task]
        whole[task] = {"ap50": _weighted_ap50(coco, found, images)}
    return Scored(tasks, {"accuracy": right}, False, right, tuple(range(len(pairs))), whole=whole)


def _pairs(coco: COCO) -> list[tuple[tuple, str]]:
    """((image id, image id), text style) of every sample, from the descriptions; else consecutive images, as the script pairs."""
    described = [(tuple(d["images_id"]), str(d.get("text_style", "all"))) for d in coco.dataset.get("descriptions", [])
                 if isinstance(d.get("images_id"), list)]
    images = list(coco.imgs)
    if described and sorted(image for pair, _ in described for image in pair) == sorted(images):
        return described
    if described or len(images) % 2:
        raise ValueError("the MC-Bench descriptions do not pair every image exactly once; give the whole annotation file")
    return [(pair, "all") for pair in zip(images[0::2], images[1::2])]


def _weighted_ap50(coco: COCO, found: COCO, images: list | None) -> float:
    run = run_coco_eval(coco, found, images)
    counts = [len(coco.getAnnIds(imgIds=images or [], catIds=[category])) for category in run.params.catIds]
    values = [mean_precision(run, place, 0) or 0.0 for place in range(len(counts))]
    return to_percent(np.average(values, weights=counts)) if sum(counts) else 0.0


def rename_groups(coco: COCO, predictions: list[dict], pairs: list[tuple], official: bool) -> list[dict]:
    """The predictions with the groups of every pair with a "group 2" renamed to their best permutation; see mc_bench."""
    several = coco.getCatIds(catNms=["group 2"])
    partner = {image: tuple(pair) for pair in pairs for image in pair}
    truth, boxes = defaultdict(list), defaultdict(list)
    for entry in coco.dataset["annotations"]:
        truth[entry["image_id"], entry["category_id"]].append(entry)
    for entry in predictions:
        boxes[entry["image_id"], entry["category_id"]].append(entry["bbox"])
    renamed = copy.deepcopy(predictions)
    for image in coco.getImgIds(catIds=several) if several else []:
        pair = partner[image]
        if official:
            renamed = copy.deepcopy(predictions)  # the script reads its file anew for every pair
        groups = list({category for place, category in truth if place in pair})
        count = len({category for place, category in boxes if place in pair})
        permutations = list(itertools.permutations(groups, count))
        if not permutations:
            continue
        scores = [_agreement(pair, permutation, truth, boxes) for permutation in permutations]
        best = permutations[scores.index(max(scores))]
        mine = [entry for entry in renamed if entry["image_id"] in pair]
        if official:
            for old, new in enumerate(best, 1):
                for entry in mine:
                    entry["category_id"] = new if entry["category_id"] == old else entry["category_id"]
        else:
            names = dict(enumerate(best, 1))
            for entry, original in zip(mine, [e for e in predictions if e["image_id"] in pair]):
                entry["category_id"] = names.get(original["category_id"], original["category_id"])
    return renamed


def _agreement(pair: tuple, permutation: tuple, truth: dict, boxes: dict) -> float:
    """Mean IoU of the best one-to-one matches, predicted group k against permutation[k - 1], over both images."""
    values = []
    for group, category in enumerate(permutation, 1):
        for image in pair:
            right = truth.get((image, category), [])
            if boxes.get((image, group)) and right:
                overlaps = np.asarray(mask.iou([list(map(float, b)) for b in boxes[image, group]],
                                               [list(map(float, t["bbox"])) for t in right], [int(t["iscrowd"]) for t in right]))
                values += list(overlaps[linear_sum_assignment(-overlaps)])
    return sum(values) / len(values) if values else 0.0
