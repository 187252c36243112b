"""MC-Bench and OdinW by hand."""

import math

import pytest

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
    one_group = summarize(coco.score_mc_bench(truth(2), [detections[0], detections[2]], "P"))
    assert one_group["avg"]["ap50"] == pytest.approx(200 / 3), "two of the three boxes"
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
    low = [detection(answer["image_id"], [*answer["bbox"][:3], answer["bbox"][3] * 0.62])
           for answer in answers]  # IoU 0.62 is over three of the ten thresholds
    average = summarize(coco.score_odinw(truth(), low, "P"))["avg"]
    assert average == pytest.approx({"ap": 30, "ap50": 100, "ap75": 0})
    assert summarize(coco.score_odinw(truth(), [], "P"))["avg"]["ap"] == 0


def test_odinw_with_categories_in_any_order_of_any_name_and_ids_as_text():
    annotations = truth(2)
    annotations["categories"].reverse()
    detections = [detection("1", [0, 0, 50, 50], "1") | {"caption": "x"}]
    scored = coco.score_odinw(annotations, detections, "P")
    # of the two boxes of group 1 the one is found
    assert scored.aggregates["group 1"]["ap50"] == pytest.approx(100 * 51 / 101)
    assert scored.aggregates["group 2"]["ap"] == 0
    for category in annotations["categories"]:
        category["name"] = "cup"
    same_names = summarize(coco.score_odinw(annotations, detections, "P"))
    assert list(same_names["tasks"]) == ["cup (id 1)", "cup (id 2)"]
    assert same_names["avg"] == summarize(scored)["avg"]


def test_annotation_0_is_never_found_as_in_pycocotools():
    annotations = truth()
    exact = [detection(entry["image_id"], entry["bbox"], entry["category_id"])
             for entry in annotations["annotations"]]
    for entry in annotations["annotations"]:
        entry["id"] -= 1
    for score in (coco.score_odinw, coco.score_mc_bench):
        assert summarize(score(annotations, exact, "P"))["avg"]["ap50"] < 99.9
        assert summarize(score(truth(), exact, "P"))["avg"]["ap50"] == pytest.approx(100)


@pytest.mark.parametrize("part,entry,sentence", [
    *(("annotations", {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], **change},
       "annotation .* of MC-Bench needs a whole number as id") for change in (
           {"image_id": []}, {"bbox": [0, 0, 1]}, {"id": "a"}, {"area": "x"}, {"iscrowd": None})),
    ("images", {"id": {}}, "each entry with an id"),
    ("descriptions", {"images_id": [1, {}]}, "do not pair"),
    ("descriptions", {"images_id": [1, 2]}, "do not pair"),
    ("detections", detection(9, [0, 0, 1, 1]), "image_id"),
    ("detections", detection(1, [0, 0, 1, 1], 7), "category_id"),
    ("detections", detection(1, [0, 0, 1, math.nan]), '"score"')])
def test_bad_annotations_and_detections_are_one_sentence(part, entry, sentence):
    files = {**truth(), "detections": []}
    files[part].append(entry)
    if entry == {"images_id": [1, {}]}:
        files[part] = [entry, {"images_id": [3, 4]}]
    with pytest.raises(ValueError, match=sentence):
        coco.score_mc_bench(files, files.pop("detections"), "P")


def test_how_far_boxes_reach_is_said():
    detections = [detection(1, [0, 0, 50, 50]), detection(2, [60, 0, 50, 40]),
                  detection(3, [-1, 10, 50, 50])]
    for score in (coco.score_odinw, coco.score_mc_bench):
        (remark,) = score(truth(), detections, "P").remarks
        assert "The largest number of the boxes is 60; 2 of 3 boxes leave their image" in remark
        assert score(truth(), [], "P").remarks == ()
