"""Pictures of samples, replies and tokens: what is drawn where, read back from the picture."""

import numpy as np
import pytest
from PIL import ImageColor

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.drawing import palette, pictures
from mig_kit.prompts import format_answer
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def make_row(sample, step, correct, box=None):
    return {"step": step, "reply": "<think>Compare.</think>" * 40, "reward": 1.0,
            "correct": correct, "boxes": [(sample.targets[0].image, box)] if box else []}


def has_colour(picture, colour):
    return bool((np.asarray(picture) == ImageColor.getrgb(colour)).all(-1).any())


def test_rollouts_show_every_box_in_the_colour_of_its_reply():
    sample = make_sample("diff", "val", 0)
    box = list(sample.targets[0].box)
    correct, wrong, none = (
        pictures.draw_rollouts(sample, [make_row(sample, 0, *row)], BOX_FORMAT)
        for row in ((True, box), (False, box), (False, None)))
    assert has_colour(correct, palette.CORRECT) and not has_colour(correct, palette.PREDICTED)
    assert has_colour(wrong, palette.PREDICTED) and not has_colour(none, palette.PREDICTED)
    assert has_colour(none, palette.TARGET)


@pytest.mark.parametrize("task", ["diff", "group_grounding", "object_tracking"])
def test_a_group_shows_every_box_in_its_image_and_colour(task, monkeypatch):
    sample = make_sample(task, "val", 0)
    image, target = sample.targets[0]
    box = to_model_box(target, sample.sizes[image - 1], BOX_FORMAT)
    other = image % len(sample.images) + 1
    replies = [f"<think>Find.</think><answer>{format_answer(number, box)}</answer>"
               for number in (image, image, other, 99)]
    draw, strokes = pictures.draw_boxes, []
    monkeypatch.setattr(pictures, "draw_boxes",
                        lambda drawn, marks, height: strokes.extend(marks) or draw(
                            drawn, marks, height))
    pictures.draw_group(sample, [*replies, "nothing"], BOX_FORMAT)
    assert [(stroke[0], stroke[2]) for stroke in strokes] == [
        (image, palette.CORRECT), (image, palette.CORRECT), (other, palette.PREDICTED)]
    assert [stroke.letter for stroke in strokes] == ["1", "2", "3"]


def test_a_caption_says_what_is_drawn_and_nothing_else(monkeypatch):
    lines = []
    monkeypatch.setattr(pictures, "draw_text",
                        lambda text, *_: lines.append(text) or pictures.Image.new("RGB", (9, 9)))
    asked, tracked = (make_sample(task, "val", 0) for task in ("diff", "object_tracking"))
    pictures.draw_sample(asked)
    pictures.draw_sample(tracked, "nothing", BOX_FORMAT)
    assert lines == ["green: the target", "green: the target; orange: the reply's box; magenta: "
                     "the place in question"]
