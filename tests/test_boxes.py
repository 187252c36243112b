"""Boxes and their coordinates: hand-computed numbers, and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from mig_kit import boxes as kit
from mig_kit.boxes import BoxFormat, iou, rescale_box, to_model_box, to_original_box

ABSOLUTE, NORMALIZED = (BoxFormat(coordinates=name) for name in kit.MODEL_COORDINATES)
sides = st.integers(1, 3000)
boxes = st.tuples(*[st.floats(-50, 500, allow_nan=False) for _ in range(4)])


def test_iou_by_hand():
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert iou((10, 10, 0, 0), (0, 0, 10, 10)) == 0
    assert iou((2, 2, 4, 8), (2, 2, 4, 8)) == 1


@given(boxes, boxes)
def test_iou_is_symmetric_and_bounded(a, b):
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1 + 1e-9


@given(sides, sides)
def test_smart_resize_is_the_processors(width, height):
    if max(width, height) / min(width, height) > 200:
        with pytest.raises(ValueError, match="aspect ratio"):
            kit.smart_resize(width, height)
        return
    h, w = reference(height, width, factor=28, min_pixels=3136, max_pixels=401408)
    assert kit.smart_resize(width, height) == (w, h)


def test_smart_resize_by_hand():
    assert kit.smart_resize(84, 84) == (84, 84)
    assert kit.smart_resize(90, 80) == (84, 84)
    assert kit.smart_resize(76, 104) == (84, 112)
    assert kit.smart_resize(1920, 1080) == (840, 448)


def test_absolute_coordinates_depend_on_the_image_that_they_are_in():
    """One box of the model is different boxes in images of different size: the multi-image bug."""
    assert to_original_box((0, 0, 42, 42), (90, 80), ABSOLUTE) == pytest.approx((0, 0, 45, 40))
    assert to_original_box((0, 0, 42, 42), (84, 84), ABSOLUTE) == pytest.approx((0, 0, 42, 42))


@given(boxes, st.integers(28, 2000), st.integers(28, 2000), st.sampled_from(kit.MODEL_COORDINATES))
def test_to_the_model_and_back(box, width, height, coordinates):
    box_format, size = BoxFormat(coordinates=coordinates), (width, height)
    model_box = to_model_box(box, size, box_format)
    assert to_original_box(model_box, size, box_format) == pytest.approx(box, abs=1e-6)


def test_normalized_coordinates_by_hand():
    original, normalized, size = (10, 20, 30, 40), (50, 250, 150, 500), (200, 80)
    assert to_model_box(original, size, NORMALIZED) == normalized
    assert to_original_box(normalized, size, NORMALIZED) == original
    assert to_original_box(normalized, size, ABSOLUTE) != original


def test_a_model_writes_one_of_two_coordinates():
    assert BoxFormat(coordinates="normalized_1000").coordinates is kit.Coordinates.NORMALIZED_1000
    for coordinates in ("percent", "pixels", "normalized_1"):
        with pytest.raises(ValueError, match="use absolute .* or normalized_1000"):
            BoxFormat(coordinates=coordinates)
    with pytest.raises(ValueError, match="give two areas, the lower one first"):
        BoxFormat(min_pixels=5000, max_pixels=4000)


def test_rescale_by_hand():
    assert rescale_box((1, 2, 3, 4), (10, 10), (20, 5)) == (2, 1, 6, 2)
