"""MC-Bench and OdinW by hand."""

import math

import pytest

from mig_kit.scoring import coco
from mig_kit.scoring.result import summarize


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


def test_mc_bench_groups_may_be_named_in_any_order():
    swapped = [detection(1, [0, 0, 50, 50], 2), detection(2, [0, 0, 40, 40], 1),
               detection(3, [10, 10, 50, 50])]
    strict = coco.score_mc_bench(truth(2), swapped, "P", "strict")
    assert summarize(strict)["avg"]["ap50"] == 100
    official = coco.score_mc_bench(truth(2), swapped, "P")
    # The script renames group 1 to 2, then both of them to 1.
    assert summarize(official)["avg"]["ap50"] < 100


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
    annotations = {
        "images": [{"id": 1, "width": 50, "height": 50}],
        "categories": [{"id": 2, "name": "dog"}, {"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 0, "image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10]},
            {"id": 0, "image_id": 1, "category_id": 2, "bbox": [30, 30, 10, 10]}]}
    detections = [detection("1", [5, 5, 10, 10], "1") | {"caption": "x"}]
    scored = coco.score_odinw(annotations, detections, "P")
    assert scored.aggregates["cat"]["ap"] == 100 and scored.aggregates["dog"]["ap"] == 0


@pytest.mark.parametrize("detections,sentence", [
    ([detection(9, [0, 0, 1, 1])], "image_id"),
    ([detection(1, [0, 0, 1, 1], 7)], "category_id"),
    ([{"image_id": 1, "category_id": 1}], '"score"'),
    ([detection(1, [0, 0, 1, math.nan])], '"score"'),
    ([detection(1, [0, 0, 1, 10**400])], '"score"')])
def test_detections_must_fit(detections, sentence):
    with pytest.raises(ValueError, match=sentence):
        coco.score_odinw(truth(), detections, "P.json")
