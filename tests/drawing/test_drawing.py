"""Charts and pictures: what is drawn where, in which colour, and what they say, read back."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from PIL import ImageColor

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.drawing import palette, pictures, plots
from mig_kit.prompts import format_answer, read_reply
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_scores_are_where_their_numbers_are():
    rows = [{"suite": suite, "system": system, "score": score, "ci95": [score - 5, score + 5],
             "n": 40} for suite, score in (("a", 20.0), ("b", 60.0)) for system in ("sft", "grpo")]
    axis = plots.plot_scores(rows, "suite", "Scores").axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a, n = 40", "b, n = 40"]
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
    assert lines["SFT"] == lines["GRPO"] == [20.0, 60.0]


def test_a_dollar_in_the_name_of_a_task_is_no_formula():
    """Two of them would enclose one, and matplotlib would raise on what it cannot read."""
    plots.set_style()
    rows = [{"task": "cost in $_$ or \\$", "system": "base", "acc@0.5": 10.0,
             "ci95": [5.0, 15.0], "n": 4}]
    plots.plot_scores(rows, "task", "a $\\x$ b", "acc@0.5").canvas.draw()


def test_bars_are_grouped_and_named():
    rows = [{"step": step, "side": side, "s": seconds + (side == "shared prompts")}
            for step, seconds in (("a", 9.0), ("b", 4.0)) for side in palette.SIDE_COLOURS]
    axis = plots.plot_bars(rows, "step", "s", "t", "side", palette.SIDE_COLOURS).axes[0]
    drawn = {(round(bar.get_x()), to_hex(bar.get_facecolor())): bar.get_height()
             for bar in axis.patches if bar.get_height()}
    first, second = map(str.lower, palette.SIDE_COLOURS.values())
    assert drawn == {(0, first): 9, (0, second): 10, (1, first): 4, (1, second): 5}
    named = plots.plot_bars([{"o": "kept", "n": 3}, {"o": "leak", "n": 1}], "o", "n", "t").axes[0]
    assert [text.get_text() for text in named.texts] == ["3", "1"]
    assert to_hex(named.patches[0].get_facecolor()) == palette.CORRECT.lower()


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
    pictures.draw_replies_of_group(sample, [read_reply(reply, sample, BOX_FORMAT)
                                 for reply in (*replies, "nothing")])
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
