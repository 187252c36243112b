"""MC-Bench and OdinW by hand, and against pycocotools called as its users call it."""

import contextlib
import copy
import io
import math
import random

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mig_kit.score import coco
from mig_kit.score.result import summarize


def truth(groups=1):
    """Two pairs of 100 x 100 images; pair (1, 2) has a box in both, pair (3, 4) only in 3."""
    boxes = [(1, 1, [0, 0, 50, 50]), (2, groups, [0, 0, 40, 40]), (3, 1, [10, 10, 50, 50])]
    return {
        "images": [{"id": k, "width": 100, "height": 100, "file_name": f"{k}.jpg"}
                   for k in (1, 2, 3, 4)],
        "annotations": [{"id": number, "image_id": image, "category_id": category, "bbox": box,
                         "area": box[2] * box[3]}
                        for number, (image, category, box) in enumerate(boxes, 1)],
        "categories": [{"id": k, "name": f"group {k}"} for k in range(1, groups + 1)],
        "descriptions": [
            {"id": 1, "images_id": [1, 2], "text": "a", "text_style": "referring",
             "positive_sample": True},
            {"id": 2, "images_id": [3, 4], "text": "b", "text_style": "reasoning",
             "positive_sample": True}]}


def detection(image, box, category=1, confidence=1.0):
    return {"image_id": image, "category_id": category, "bbox": box, "score": confidence}


def test_mc_bench_by_hand():
    detections = [detection(1, [0, 0, 50, 50]), detection(2, [0, 0, 40, 40]),
                  detection(3, [10, 10, 50, 50]), detection(4, [0, 0, 5, 5])]
    result = summarize(coco.score_mc_bench(truth(), detections, "P"))
    assert result["tasks"]["referring"]["accuracy"] == 100
    assert result["tasks"]["reasoning"]["accuracy"] == 0  # a box where none is
    assert result["avg"]["accuracy"] == 50 and result["tasks"]["referring"]["ap50"] == 100
    nothing = summarize(coco.score_mc_bench(truth(), [], "P"))
    assert nothing["avg"]["accuracy"] == 0 and nothing["avg"]["ap50"] == 0


def test_mc_bench_renames_groups_as_the_authors_script_does():
    """Group 1 to 2, then both of them to 1: one renaming runs into the next."""
    swapped = [detection(1, [0, 0, 50, 50], 2), detection(2, [0, 0, 40, 40], 1),
               detection(3, [10, 10, 50, 50])]
    loaded = coco.load_coco(truth(2), "MC-Bench")
    renamed = coco.rename_groups(loaded, swapped, [(1, 2), (3, 4)])
    assert [entry["category_id"] for entry in renamed] == [1, 1, 1]
    assert summarize(coco.score_mc_bench(truth(2), swapped, "P"))["avg"]["ap50"] < 100
    assert coco.rename_groups(coco.load_coco(truth(), "MC-Bench"), swapped, []) == swapped


def test_odinw_by_hand():
    answers = truth()["annotations"]
    exact = [detection(answer["image_id"], answer["bbox"]) for answer in answers]
    average = summarize(coco.score_odinw(truth(), exact, "P"))["avg"]
    assert average == {"ap": 100, "ap50": 100, "ap75": 100}
    low = [detection(answer["image_id"], [*answer["bbox"][:3], answer["bbox"][3] * 0.6])
           for answer in answers]  # IoU 0.6
    assert summarize(coco.score_odinw(truth(), low, "P"))["avg"]["ap75"] == 0
    assert summarize(coco.score_odinw(truth(), [], "P"))["avg"]["ap"] == 0


def test_odinw_with_categories_in_any_order_and_ids_as_text():
    annotations = truth(2)
    annotations["categories"].reverse()
    first = annotations["annotations"][0]
    scored = coco.score_odinw(annotations, [detection("1", first["bbox"], "1") | {"caption": "x"}],
                              "P")
    # of the two boxes of group 1 the one is found
    assert scored.aggregates["group 1"]["ap50"] == pytest.approx(100 * 51 / 101)
    assert scored.aggregates["group 2"]["ap"] == 0


def made_annotations(first_id, pairs=25, groups=2):
    """Annotations of MC-Bench's form, ids from first_id, and detections near many of the boxes."""
    draw = random.Random(first_id)
    images = [{"id": k, "width": 640, "height": 480, "file_name": f"{k}.jpg"}
              for k in range(2 * pairs)]
    annotations, detections = [], []
    for image in images:
        for category in range(1, groups + 1):
            for _ in range(draw.choice((0, 1, 1, 2))):
                box = [draw.uniform(0, 300), draw.uniform(0, 200), draw.uniform(20, 300),
                       draw.uniform(20, 200)]
                annotations.append({"id": first_id + len(annotations), "image_id": image["id"],
                                    "category_id": category, "bbox": box, "iscrowd": 0,
                                    "area": box[2] * box[3]})
                if draw.random() < 0.8:
                    near = [value + draw.gauss(0, 6) for value in box]
                    detections.append(detection(image["id"], near, category, draw.random()))
    return {"images": images, "annotations": annotations,
            "categories": [{"id": k, "name": f"kind {k}"} for k in range(1, groups + 1)],
            "descriptions": [{"images_id": [k, k + 1], "text_style": "abc"[k % 3]}
                             for k in range(0, 2 * pairs, 2)]}, detections


def plain_pycocotools(annotations, detections):
    """(AP, AP50, AP75) per category, as loadRes, evaluate and accumulate give them unchanged."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco_api = COCO()
        coco_api.dataset = copy.deepcopy(annotations)
        coco_api.createIndex()
        evaluation = COCOeval(coco_api, coco_api.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (thresholds, recalls, categories, areas, detections)
    return np.array([[precision[rows, :, place, 0, 2].mean() for place in range(precision.shape[2])]
                     for rows in (slice(None), 0, 5)])


@pytest.mark.parametrize("first_id", [0, 1])
def test_every_figure_is_pycocotools(first_id):
    annotations, detections = made_annotations(first_id)
    expected = plain_pycocotools(annotations, detections)
    result = summarize(coco.score_odinw(annotations, detections, "P"))
    for place, category in enumerate(annotations["categories"]):
        task = result["tasks"][category["name"]]
        assert [task["ap"], task["ap50"], task["ap75"]] == pytest.approx(100 * expected[:, place],
                                                                         abs=1e-9)
    assert [result["avg"][name] for name in ("ap", "ap50", "ap75")] == pytest.approx(
        100 * expected.mean(1), abs=1e-9)
    counts = [sum(entry["category_id"] == category["id"] for entry in annotations["annotations"])
              for category in annotations["categories"]]
    weighted = summarize(coco.score_mc_bench(annotations, detections, "P"))
    assert weighted["avg"]["ap50"] == pytest.approx(
        100 * np.average(expected[1], weights=counts), abs=1e-9)


def test_annotation_0_is_never_found_as_in_pycocotools():
    annotations, _ = made_annotations(0)
    exact = [detection(entry["image_id"], entry["bbox"], entry["category_id"])
             for entry in annotations["annotations"]]
    from_1 = copy.deepcopy(annotations)
    for entry in from_1["annotations"]:
        entry["id"] += 1
    for score in (coco.score_odinw, coco.score_mc_bench):
        result = summarize(score(annotations, exact, "P"))
        assert result["avg"]["ap50"] < 99.9
        assert "id 0 or the id of another: 1. As in pycocotools" in result["remarks"][0]
        result = summarize(score(from_1, exact, "P"))
        assert result["avg"]["ap50"] == pytest.approx(100) and not result["remarks"]


def test_two_categories_of_one_name_are_two():
    annotations, detections = made_annotations(1)
    apart = summarize(coco.score_odinw(annotations, detections, "P"))
    for category in annotations["categories"]:
        category["name"] = "cup"
    result = summarize(coco.score_odinw(annotations, detections, "P"))
    assert list(result["tasks"]) == ["cup (id 1)", "cup (id 2)"]
    assert result["avg"] == apart["avg"]


@pytest.mark.parametrize("part,entry,sentence", [
    *(("annotations", {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], **change},
       "annotation .* of MC-Bench needs a whole number as id") for change in (
           {"image_id": 99}, {"image_id": []}, {"bbox": [0, 0, 1]}, {"id": "a"}, {"area": "x"},
           {"iscrowd": None})),
    ("images", {"id": {}}, "each entry with an id"),
    ("descriptions", {"images_id": [1, {}]}, "do not pair"),
    ("descriptions", {"images_id": [1, 2]}, "do not pair")])
def test_bad_annotations_are_one_sentence(part, entry, sentence):
    annotations = truth()
    annotations[part].append(entry)
    if entry == {"images_id": [1, {}]}:
        annotations[part] = [entry, {"images_id": [3, 4]}]
    with pytest.raises(ValueError, match=sentence):
        coco.score_mc_bench(annotations, [], "P")


@pytest.mark.parametrize("detections,sentence", [
    ([detection(9, [0, 0, 1, 1])], "image_id"),
    ([detection(1, [0, 0, 1, 1], 7)], "category_id"),
    ([{"image_id": 1, "category_id": 1}], '"score"'),
    ([detection(1, [0, 0, 1, math.nan])], '"score"'),
    ([detection(1, [0, 0, 1, 10**400])], '"score"')])
def test_detections_must_fit(detections, sentence):
    with pytest.raises(ValueError, match=sentence):
        coco.score_odinw(truth(), detections, "P.json")
