"""Boxes and frames: hand-computed numbers, and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from mig_kit.boxes import FRAMES, BoxFormat, iou, rescale_box, smart_resize, to_model_box, to_original_box

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
            smart_resize(width, height)
        return
    h, w = reference(height, width, factor=28, min_pixels=3136, max_pixels=401408)
    assert smart_resize(width, height) == (w, h)


def test_smart_resize_by_hand():
    assert smart_resize(84, 84) == (84, 84)
    assert smart_resize(90, 80) == (84, 84)
    assert smart_resize(76, 104) == (84, 112)
    assert smart_resize(1920, 1080) == (840, 448)


def test_frames_of_one_prompt_differ():
    """The same model box means different original boxes in images of different size: the multi-image bug."""
    assert to_original_box((0, 0, 42, 42), (90, 80), box_format=BoxFormat()) == pytest.approx((0, 0, 45, 40))
    assert to_original_box((0, 0, 42, 42), (84, 84), box_format=BoxFormat()) == pytest.approx((0, 0, 42, 42))


@given(boxes, st.integers(28, 2000), st.integers(28, 2000), st.sampled_from(sorted(FRAMES)))
def test_there_and_back(box, width, height, frame):
    box_format = BoxFormat(frame=frame)
    back = to_original_box(to_model_box(box, (width, height), box_format), (width, height), box_format)
    assert back == pytest.approx(box, abs=1e-6)


def test_thousandths_by_hand():
    box_format = BoxFormat(frame="thousand")
    assert to_model_box((10, 20, 30, 40), (200, 80), box_format) == (50, 250, 150, 500)
    assert to_original_box((50, 250, 150, 500), (200, 80), box_format) == (10, 20, 30, 40)
    assert to_original_box((50, 250, 150, 500), (200, 80), box_format=BoxFormat()) != (10, 20, 30, 40), "read in the wrong frame it is another box"
    with pytest.raises(ValueError, match="use resized .* or thousand"):
        BoxFormat(frame="percent")


def test_rescale_by_hand():
    assert rescale_box((1, 2, 3, 4), (10, 10), (20, 5)) == (2, 1, 6, 2)
