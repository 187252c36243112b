"""Explorers: what their controls draw and say, and the still picture where none are live."""

import io

import ipywidgets
import numpy as np
import pytest
from PIL import Image, ImageColor

from mig_kit.boxes import BoxFormat, iou
from mig_kit.drawing import palette, widgets
from mig_kit.sample import Sample
from mig_kit.world.tasks import make_sample

FORMAT = BoxFormat()
WIDGET = "application/vnd.jupyter.widget-view+json"
ANSWER = '<think>Look.</think><answer>{"image": 2, "box": [10,10,30,30]}</answer>'


def make_question(name="a", task="diff"):
    """Two images of 84 x 84 pixels, which the model sees as they are; the target is in the second.
    """
    images = [Image.new("RGB", (84, 84), colour) for colour in ("white", "grey")]
    return Sample(id=name, suite="mig_bench", task=task, split="val", images=images,
                  question="Find it.", targets=((2, (10, 10, 30, 30)),))


def controls_of(explorer):
    """(inputs by their description, the label, the picture) of a live explorer."""
    *inputs, label, picture = explorer.controls.children
    assert isinstance(picture, ipywidgets.Image)
    return {item.description: item for item in inputs}, label, picture


def explorers():
    question = make_question()
    replies = {"SFT": {"a": "nothing"}, "GRPO": {"a": ANSWER}}
    return [widgets.explore_box(question, FORMAT),
            widgets.step_through(question, [ANSWER, "nothing"], FORMAT, ["good", "bad"]),
            widgets.browse_gallery([("fixed", question)], replies, FORMAT)]


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(widgets, "is_live", lambda: True)


def test_a_still_picture_where_nobody_moves_controls():
    for explorer in explorers():
        bundle = explorer._repr_mimebundle_()
        assert explorer.controls is None and set(bundle) == {"image/png", "text/plain"}
        assert Image.open(io.BytesIO(bundle["image/png"])).width <= 900
        assert bundle["text/plain"] == explorer.alt


def test_a_live_notebook_keeps_the_still_picture(live):
    for explorer in explorers():
        bundle = explorer._repr_mimebundle_()
        assert set(bundle) == {"image/png", "text/plain", WIDGET}
        assert Image.open(io.BytesIO(bundle["image/png"])) and bundle["text/plain"] == explorer.alt


def test_a_notebook_is_live_under_a_server_alone(monkeypatch):
    for name in widgets.LIVE_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(widgets.sys.modules, "ipykernel", None)
    assert not widgets.is_live()
    monkeypatch.setenv("JPY_SESSION_NAME", "05_grpo.ipynb")
    assert widgets.is_live()
    monkeypatch.delitem(widgets.sys.modules, "ipykernel")
    assert not widgets.is_live(), "a script that a notebook started"


def test_a_box_that_is_moved(live):
    inputs, label, picture = controls_of(widgets.explore_box(make_question(), FORMAT))
    assert label.value == "IoU 1.00: correct, image reward 1.00, box reward 1.00"
    before = picture.value
    inputs["x1 to x2"].value = (20, 40)  # half of it on the target: 200 / (400 + 400 - 200)
    assert label.value == "IoU 0.33: not correct, image reward 1.00, box reward 0.33"
    assert picture.value != before
    inputs["image"].value = 1
    assert label.value == "IoU 0.00: not correct, image reward 0.00, box reward 0.00"


def test_sliders_end_with_the_image(live):
    question = make_question()
    question.images[0] = Image.new("RGB", (168, 56))
    inputs, _, _ = controls_of(widgets.explore_box(question, FORMAT))
    assert (inputs["x1 to x2"].max, inputs["y1 to y2"].max) == (84, 84)
    inputs["image"].value = 1
    assert (inputs["x1 to x2"].max, inputs["y1 to y2"].max) == (168, 56)


def test_rewards_of_ones_own(live):
    rewards = {"mine": lambda reply, sample, box_format: 0.25}
    _, label, _ = controls_of(widgets.explore_box(make_question(), FORMAT, rewards))
    assert label.value == "IoU 1.00: correct, mine reward 0.25"


def test_replies_one_after_the_other(live):
    question = make_question()
    inputs, _, picture = controls_of(widgets.step_through(question, [ANSWER, "nothing"], FORMAT))
    first = picture.value
    (pages,) = inputs.values()
    pages.value = "reply 2"
    assert picture.value != first
    pages.value = "reply 1"
    assert picture.value == first


def test_a_gallery_page_by_page(live):
    gallery = [("fixed", make_question("a")), ("fixed", make_question("b", "region")),
               ("lost", make_question("c"))]
    replies = {"SFT": dict.fromkeys("abc", "nothing"), "GRPO": dict.fromkeys("abc", ANSWER)}
    inputs, _, picture = controls_of(widgets.browse_gallery(gallery, replies, FORMAT))
    (pages,) = inputs.values()
    assert pages.options == ("1. diff: fixed", "2. region: fixed", "3. diff: lost")
    first = picture.value
    pages.value = "2. region: fixed"
    assert picture.value != first


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9, 1.0])
def test_a_box_is_moved_to_the_iou_that_is_asked_for(wanted):
    box = (3, 5, 33, 25)
    assert iou(box, widgets.shift_to_iou(box, wanted)) == pytest.approx(wanted)


def test_boxes_from_one_half_on_are_blue():
    sample = make_sample("region", "val", 0)
    blue, orange = (
        [(np.asarray(widgets._draw_shifted(sample, wanted, FORMAT, {}))
          == ImageColor.getrgb(colour)).all(-1).any() for wanted in (0.3, 0.45, 0.55, 0.9)]
        for colour in (palette.CORRECT, palette.PREDICTED))
    assert blue == [False, False, True, True] and orange == [True, True, False, False]


def test_what_cannot_be_explored():
    question = make_question()
    with pytest.raises(ValueError, match="has no target"):
        widgets.explore_box(Sample("a", "s", "t", "val", question.images, "?"), FORMAT)
    with pytest.raises(ValueError, match="2 replies and 1 captions"):
        widgets.step_through(question, ["a", "b"], FORMAT, ["one"])
    with pytest.raises(ValueError, match="at least one reply"):
        widgets.step_through(question, [], FORMAT)
    with pytest.raises(ValueError, match="gallery is empty"):
        widgets.browse_gallery([], {}, FORMAT)
