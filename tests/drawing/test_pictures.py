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


def test_a_false_claim_of_a_first_reply_is_struck_where_it_stands():
    sample, row = make_sample("diff", "val", 0), make_row(make_sample("diff", "val", 0), 0, True)
    plain, struck, beyond = (
        np.asarray(pictures.draw_rollouts(sample, [row | {"false": false}], BOX_FORMAT))
        for false in ([], [(7, 15), (300, 340)], [(5000, 5100)]))
    changed = np.argwhere((plain != struck).any(-1))
    assert has_colour(struck, palette.PREDICTED) and not has_colour(plain, palette.PREDICTED)
    assert changed.min(0)[0] > plain.shape[0] / 2 and len(set(changed[:, 0])) > 20, "two lines"
    assert (plain == beyond).all()


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


def test_runs_of_a_token_are_written_once():
    tokens, values = pictures.merge_runs(["a", "p", "p", "p", "p", "b"], [0, 0, 0, 0, 1, 1])
    assert tokens == ["a", "p x 3 ", "p", "b"] and values == [0, 0, 1, 1]
    with pytest.raises(ValueError):
        pictures.merge_runs(["a", "b"], [0])


def test_tokens_are_the_darker_the_larger_their_value_and_out_of_range_is_cut():
    picture = pictures.colour_tokens(["W"] * 5, [-1, 0, 1, 2, 9], "t", high=2)
    page = np.asarray(picture)[-pictures.TOKENS_LINE - 4:]
    step = round(pictures.ImageFont.load_default(15).getlength("W")) + 3
    grounds = page[1, 9:9 + 5 * step:step].astype(int).sum(1)
    assert grounds[0] == grounds[1] > grounds[2] > grounds[3] == grounds[4]


def test_a_caption_says_what_is_drawn_and_nothing_else(monkeypatch):
    lines = []
    monkeypatch.setattr(pictures, "draw_text",
                        lambda text, *_: lines.append(text) or pictures.Image.new("RGB", (9, 9)))
    asked, tracked = (make_sample(task, "val", 0) for task in ("diff", "object_tracking"))
    pictures.draw_sample(asked)
    pictures.draw_sample(tracked, "nothing", BOX_FORMAT)
    assert lines == ["green: the target", "green: the target; orange: the reply's box; magenta: "
                     "the place in question"]
