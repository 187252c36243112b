"""Pictures of samples, replies and tokens: what is drawn where, read back from the picture."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.drawing import palette, pictures
from mig_kit.prompts import format_answer
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def make_row(sample, step, correct, box=None):
    return {"step": step, "reply": "<think>Compare.</think>" * 40, "reward": 1.0,
            "correct": correct, "image": sample.targets[0].image, "box": box}


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


def test_of_many_updates_the_first_and_the_last_are_shown():
    sample = make_sample("diff", "val", 0)
    few, many = (pictures.draw_rollouts(sample, [make_row(sample, step, True) for step in range(n)],
                                     BOX_FORMAT, steps=3) for n in (3, 9))
    assert few.size == many.size
    assert pictures._spread_indices(9, 3) == [0, 4, 8] and pictures._spread_indices(2, 3) == [0, 1]


def test_images_are_framed_and_fit_on_a_page():
    sample = make_sample("object_tracking", "val", 0)
    assert len(sample.images) >= 4
    picture = pictures.draw_systems(sample, {"base": "", "sft": "?"}, BOX_FORMAT, 400)
    assert picture.width <= pictures.MAX_WIDTH
    frame = ImageColor.getrgb(palette.FRAME)
    row = np.asarray(picture)[pictures.HEAD - 1]
    assert (row == frame).all(-1).sum() > 0.8 * picture.width, "a line above every image"


def test_every_system_has_its_box_letter_and_colour():
    sample = make_sample("diff", "val", 0)
    image, box = sample.targets[0]
    answer = format_answer(image, to_model_box(box, sample.sizes[image - 1], BOX_FORMAT))
    reply = f"<think></think><answer>{answer}</answer>"
    replies = dict.fromkeys(("base", "sft", "grpo"), reply)
    picture = pictures.draw_systems(sample, replies, BOX_FORMAT)
    assert all(has_colour(picture, palette.SYSTEM_COLOURS[system]) for system in replies)
    alone = pictures.draw_systems(sample, {"sft": replies["sft"]}, BOX_FORMAT)
    assert not has_colour(alone, palette.SYSTEM_COLOURS["grpo"])


@pytest.mark.parametrize("task", ["diff", "group_grounding", "object_tracking"])
def test_a_group_shows_every_box_in_its_image_and_colour(task, monkeypatch):
    sample = make_sample(task, "val", 0)
    image, target = sample.targets[0]
    box = to_model_box(target, sample.sizes[image - 1], BOX_FORMAT)
    other = image % len(sample.images) + 1
    replies = [f"<think>Find.</think><answer>{format_answer(number, box)}</answer>"
               for number in (image, image, other, 99)]
    monkeypatch.setattr(pictures, "draw_boxes", lambda *arguments: arguments)
    _, strokes, _, numbers = pictures.draw_group(sample, [*replies, "nothing"], BOX_FORMAT)
    assert [(stroke[0], stroke[2]) for stroke in strokes] == [
        (image, palette.CORRECT), (image, palette.CORRECT), (other, palette.PREDICTED)]
    assert [number[3] for number in numbers] == ["1", "2", "3"]


def test_runs_of_a_token_are_written_once():
    tokens, values = pictures.merge_runs(["a", "p", "p", "p", "p", "b"], [0, 0, 0, 0, 1, 1])
    assert tokens == ["a", "p x 3 ", "p", "b"] and values == [0, 0, 1, 1]
    with pytest.raises(ValueError):
        pictures.merge_runs(["a", "b"], [0])


def test_tokens_are_the_darker_the_larger_their_value_and_out_of_range_is_cut():
    page = np.asarray(pictures.colour_tokens(["W"] * 5, [-1, 0, 1, 2, 9], low=0, high=2))
    step = round(pictures.ImageFont.load_default(15).getlength("W")) + 3
    grounds = page[1, 9:9 + 5 * step:step].astype(int).sum(1)
    assert grounds[0] == grounds[1] > grounds[2] > grounds[3] == grounds[4]


def test_tokens_wrap_on_a_page_of_one_width():
    one, many = (pictures.colour_tokens(["token\n"] * count, [1] * count, "title")
                 for count in (1, 60))
    assert one.width == many.width == pictures.TOKENS_WIDTH and many.height > one.height
    assert isinstance(pictures.colour_tokens([], []), Image.Image)
    with pytest.raises(ValueError, match="2 tokens and 1 values; give one value for each token"):
        pictures.colour_tokens(["a", "b"], [1])
