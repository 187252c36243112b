"""Explorers: what their controls draw and say, and the still picture where none are live."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from mig_kit.boxes import BoxFormat, iou
from mig_kit.drawing import palette, widgets
from mig_kit.sample import Sample
from mig_kit.world.tasks import make_sample

FORMAT = BoxFormat()


def make_question():
    """Two images of 84 x 84 pixels, which the model sees as they are; the target is in the second.
    """
    images = [Image.new("RGB", (84, 84), colour) for colour in ("white", "grey")]
    return Sample(id="a", suite="mig_bench", task="diff", split="val", images=images,
                  question="Find it.", targets=((2, (10, 10, 30, 30)),))


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(widgets, "is_live", lambda: True)


def test_a_still_picture_where_nobody_moves_controls():
    picture = widgets.explore_box(make_question(), FORMAT)
    assert isinstance(picture, Image.Image) and picture.width <= 900


def test_a_notebook_is_live_under_a_server_alone(monkeypatch):
    for name in widgets.LIVE_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(widgets.sys.modules, "ipykernel", None)
    assert not widgets.is_live()
    monkeypatch.setenv("JPY_SESSION_NAME", "05_grpo.ipynb")
    assert widgets.is_live()
    monkeypatch.delitem(widgets.sys.modules, "ipykernel")
    assert not widgets.is_live(), "a script that a notebook started"


def test_a_box_that_is_moved_says_what_it_earns(live, monkeypatch):
    lines = []
    monkeypatch.setattr(widgets.pictures, "draw_text",
                        lambda text, *_: lines.append(text) or Image.new("RGB", (9, 9)))
    image, across, down = widgets.explore_box(make_question(), FORMAT).kwargs_widgets
    across.value = (20, 40)  # half of it on the target: 200 / (400 + 400 - 200)
    image.value = 1
    assert lines == ["IoU 1.00: correct, image reward 1.00, box reward 1.00",
                     "IoU 0.33: not correct, image reward 1.00, box reward 0.33",
                     "IoU 0.00: not correct, image reward 0.00, box reward 0.00"]
    assert (across.max, down.max) == (84, 84)


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9, 1.0])
def test_a_box_is_moved_to_the_iou_that_is_asked_for(wanted):
    box = (3, 5, 33, 25)
    assert iou(box, widgets.shift_to_iou(box, wanted)) == pytest.approx(wanted)


def test_boxes_from_one_half_on_are_blue():
    sample = make_sample("region", "val", 0)
    blue, orange = (
        [(np.asarray(widgets._draw_shifted(sample, wanted, FORMAT))
          == ImageColor.getrgb(colour)).all(-1).any() for wanted in (0.3, 0.45, 0.55, 0.9)]
        for colour in (palette.CORRECT, palette.PREDICTED))
    assert blue == [False, False, True, True] and orange == [True, True, False, False]


def test_what_cannot_be_explored():
    question = make_question()
    with pytest.raises(ValueError, match="has no target"):
        widgets.explore_box(Sample("a", "s", "t", "val", question.images, "?"), FORMAT)
