"""MC-Bench and OdinW: detections scored through pycocotools.

Predictions are COCO results: {"image_id", "category_id", "bbox": [x, y, w, h] pixels, "score"}. An
image without an entry has no box, which is an answer, so nothing can be missing.
"""

import contextlib
import io
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Container

import numpy as np
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from mig_kit.common import UserError
from mig_kit.score.annotations import is_four_numbers, is_number
from mig_kit.score.result import Scored, describe_reach


def load_coco(annotations: dict, name: str) -> COCO:
    """The annotations as a COCO index; UserError, naming the benchmark, for a missing part."""
    parts = ("images", "annotations", "categories")
    if not isinstance(annotations, dict) or not all(
            isinstance(annotations.get(part), list)
            and all(isinstance(entry, dict) and isinstance(entry.get("id"), (int, str))
                    for entry in annotations[part]) for part in parts):
        raise UserError(f"the {name} annotations need the lists {', '.join(parts)}, each entry "
                        "with an id; give the benchmark's COCO-style JSON file")
    ids = {field: {entry["id"] for entry in annotations[part]}
           for field, part in (("image_id", "images"), ("category_id", "categories"))}
    boxes = []
    for entry in annotations["annotations"]:
        if not (is_four_numbers(entry.get("bbox")) and isinstance(entry["id"], int)
                and all(_is_among(entry.get(field), known) for field, known in ids.items())
                and is_number(entry.get("area", 0)) and entry.get("iscrowd", 0) in (0, 1)):
            raise UserError(f"annotation {entry['id']} of {name} needs a whole number as id, the "
                            "image_id and category_id of an image and a category, a bbox of four "
                            "numbers, a number as area and 0 or 1 as iscrowd")
        boxes.append({"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry})
    categories = [{"name": str(entry["id"]), **entry} for entry in annotations["categories"]]
    coco = COCO()
    coco.dataset = {**annotations, "annotations": boxes, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _is_among(value, ids: Container) -> bool:
    return isinstance(value, (int, str)) and value in ids


def validate_detections(predictions: list[dict], coco: COCO, source: str) -> list[dict]:
    """The fields that count of the predictions, with the annotations' own ids (3 for "3").

    Raises: UserError that names a malformed entry, or an image or category that is unknown.
    """
    ids = {"image_id": {str(image): image for image in coco.imgs},
           "category_id": {str(category): category for category in coco.cats}}
    for number, entry in enumerate(predictions, 1):
        if not (is_four_numbers(entry.get("bbox")) and is_number(entry.get("score"))):
            raise UserError(f'entry {number} of {source} needs "bbox", four numbers x, y, width, '
                            'height in pixels, and "score"')
        for field, known in ids.items():
            if str(entry.get(field)) not in known:
                raise UserError(f"entry {number} of {source} has the {field} {entry.get(field)}, "
                                "which the annotations do not know; use the annotation file's ids")
    return [{"bbox": list(entry["bbox"]), "score": entry["score"],
             **{field: known[str(entry[field])] for field, known in ids.items()}}
            for entry in predictions]


def _describe_edges(coco: COCO, entries: list[dict]) -> tuple[str, ...]:
    """`describe_reach` of what `validate_detections` gives."""
    boxes = []
    for entry in entries:
        (x, y, width, height), image = entry["bbox"], coco.imgs[entry["image_id"]]
        boxes.append((entry["bbox"], (x, y, x + width, y + height),
                      [image.get(side) or math.inf for side in ("width", "height")]))
    return describe_reach(boxes, "x, y, width, height in pixels")


def measure_precision(coco: COCO, detections: list[dict],
                      images: list | None = None) -> dict[int | str, np.ndarray]:
    """Category id -> (10,) its AP, 0..1, at the IoU thresholds 0.5, 0.55, ... by pycocotools.

    All areas, 100 detections an image. Categories without truth are left out.

    Args:
        detections: maybe none.
        images: ids, None for all.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        results = coco.loadRes([dict(entry) for entry in detections]) if detections else load_coco(
            {**coco.dataset, "annotations": []}, "empty")
        evaluation = COCOeval(coco, results, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        if images is not None:
            evaluation.params.imgIds = images
        evaluation.evaluate()
        evaluation.accumulate()
    # catIds are sorted, as the results are; the file's order may be another
    precision = dict(zip(evaluation.params.catIds, np.moveaxis(
        evaluation.eval["precision"][..., 0, 0], 2, 0)))  # (thresholds, recalls) each
    return {category: part.mean(1) for category, part in precision.items() if part.max() > -1}


def score_odinw(annotations: dict, predictions: list[dict], source: str) -> Scored:
    """COCO AP of one OdinW data set; tasks are its categories, with AP, AP50 and AP75 in percent.

    AP is the mean over IoU 0.5:0.95; the benchmark's is the mean over its 13 or 35 data sets.
    """
    coco = load_coco(annotations, "OdinW")
    entries = validate_detections(predictions, coco, source)
    counts = Counter(str(entry["name"]) for entry in coco.cats.values())
    names = {category: str(entry["name"]) + f" (id {category})" * (counts[str(entry["name"])] > 1)
             for category, entry in coco.cats.items()}
    precision = {names[category]: values
                 for category, values in measure_precision(coco, entries).items()}
    if not precision:
        raise UserError("the OdinW annotations hold no boxes; give the file with annotations")
    precision = {"avg": np.mean(list(precision.values()), axis=0), **precision}
    aggregates = {name: {"ap": 100 * float(values.mean()), "ap50": 100 * float(values[0]),
                         "ap75": 100 * float(values[5])} for name, values in precision.items()}
    tasks = [names[category] for category in sorted(coco.cats)
             for _ in coco.getAnnIds(catIds=[category])]
    return Scored(tuple(tasks), {}, True, aggregates=aggregates,
                  remarks=_describe_edges(coco, entries),
                  detections=tuple(sorted(map(repr, entries))))


def score_mc_bench(annotations: dict, predictions: list[dict], source: str) -> Scored:
    """MC-Bench: image-level accuracy per pair, and AP50 weighted by the truth's count per category.

    Tasks are the text styles. A pair is correct if for both images "has a box" agrees with the
    truth. `rename_groups` comes first. Source: XuYunqiu/MC-Bench, eval_mc_bench.py.
    """
    coco = load_coco(annotations, "MC-Bench")
    styled_pairs = _styled_pairs(coco)
    pairs = [pair for pair, _ in styled_pairs]
    tasks = tuple(style for _, style in styled_pairs)
    entries = validate_detections(predictions, coco, source)
    entries = rename_groups(coco, entries, pairs)
    with_truth = {image for image in coco.imgs if coco.getAnnIds(imgIds=[image])}
    with_box = {entry["image_id"] for entry in entries}
    accuracy = np.array([all((image in with_truth) == (image in with_box) for image in pair)
                         for pair in pairs], float)
    aggregates = {"avg": {"ap50": _weighted_ap50(coco, entries, None)}}
    for task in dict.fromkeys(tasks):
        images = [image for pair, style in styled_pairs for image in pair if style == task]
        aggregates[task] = {"ap50": _weighted_ap50(coco, entries, images)}
    files = {image: str(entry.get("file_name", image)) for image, entry in coco.imgs.items()}
    return Scored(tasks, {"accuracy": accuracy}, False, aggregates=aggregates,
                  remarks=_describe_edges(coco, entries),
                  detections=tuple(sorted(map(repr, entries))),
                  lists=tuple(tuple(files[image] for image in pair) for pair in pairs))


def _styled_pairs(coco: COCO) -> list[tuple[tuple, str]]:
    """(image ids, text style) of each pair; without descriptions consecutive images are pairs."""
    descriptions = coco.dataset.get("descriptions") or []
    described = [(tuple(description["images_id"]), str(description.get("text_style", "all")))
                 for description in descriptions if isinstance(description, dict)
                 and isinstance(description.get("images_id"), list)
                 and all(_is_among(image, coco.imgs) for image in description["images_id"])]
    images = list(coco.imgs)
    if described and Counter(image for pair, _ in described for image in pair) == Counter(images):
        return described
    if described or len(images) % 2:
        raise UserError("the MC-Bench descriptions do not pair every image exactly once; "
                        "give the complete annotation file")
    return [(pair, "all") for pair in zip(images[0::2], images[1::2])]


def _weighted_ap50(coco: COCO, detections: list[dict], images: list | None) -> float:
    """AP50 in percent, weighted by the truth's counts; images: ids, None for all."""
    precision = measure_precision(coco, detections, images)
    # the script pairs counts and APs in the file's order, the same if that is sorted by id
    counts = [len(coco.getAnnIds(imgIds=images or [], catIds=[category])) for category in precision]
    values = [values[0] for values in precision.values()]
    return 100 * float(np.average(values, weights=counts)) if sum(counts) else 0.0


def rename_groups(coco: COCO, predictions: list[dict], pairs: list[tuple]) -> list[dict]:
    """The predictions, whose groups are renamed to the permutation with the highest mean IoU.

    As in the authors' script this happens to the last pair with a "group 2" only.
    """
    categories = coco.getCatIds(catNms=["group 2"])
    images = coco.getImgIds(catIds=categories) if categories else []
    renamed = [dict(entry) for entry in predictions]
    if not images:
        return renamed
    pair = next(tuple(pair) for pair in pairs if images[-1] in pair)
    truth, boxes = (defaultdict(lambda: defaultdict(list)) for _ in range(2))
    for entry in coco.dataset["annotations"]:
        truth[entry["image_id"]][entry["category_id"]].append(entry)
    for entry in predictions:
        boxes[entry["image_id"]][entry["category_id"]].append(entry["bbox"])
    for old, new in enumerate(_best_permutation(pair, truth, boxes), 1):
        for entry in renamed:  # one renaming can run into the next
            if entry["image_id"] in pair and entry["category_id"] == old:
                entry["category_id"] = new
    return renamed


def _best_permutation(pair: tuple, truth: dict, boxes: dict) -> tuple:
    """New categories of predicted groups 1, 2, ...; empty if they are more than the true ones."""
    groups = list({category for image in pair for category in truth[image]})
    count = len({category for image in pair for category in boxes[image]})
    permutations = itertools.permutations(groups, count)
    return max(permutations, key=lambda permutation: _agreement(pair, permutation, truth, boxes),
               default=())


def _agreement(pair: tuple, permutation: tuple, truth: dict, boxes: dict) -> float:
    """Mean IoU of the best one-to-one matches; predicted group k meets permutation[k - 1]."""
    overlaps = []
    for group, category in enumerate(permutation, 1):
        for image in pair:
            group_boxes = boxes[image].get(group)
            answers = truth[image].get(category)
            if not group_boxes or not answers:
                continue
            ious = np.asarray(mask.iou(
                [[float(v) for v in box] for box in group_boxes],
                [[float(v) for v in answer["bbox"]] for answer in answers],
                [int(answer["iscrowd"]) for answer in answers]))
            overlaps += list(ious[linear_sum_assignment(-ious)])
    return sum(overlaps) / len(overlaps) if overlaps else 0.0
