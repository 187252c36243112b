"""Figures of a training: what is drawn where, read back from the picture."""

import numpy as np
from matplotlib import pyplot as plt
from PIL import ImageColor

from mig_kit import pictures, plots
from mig_kit.boxes import BoxFormat
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
        plots.draw_rollouts(sample, [make_row(sample, 0, *row)], BOX_FORMAT)
        for row in ((True, box), (False, box), (False, None)))
    assert has_colour(correct, plots.CORRECT) and not has_colour(correct, plots.PREDICTED)
    assert has_colour(wrong, plots.PREDICTED) and not has_colour(none, plots.PREDICTED)
    assert has_colour(none, plots.TARGET)


def test_of_many_updates_the_first_and_the_last_are_shown():
    sample = make_sample("diff", "val", 0)
    few, many = (plots.draw_rollouts(sample, [make_row(sample, step, True) for step in range(n)],
                                     BOX_FORMAT, steps=3) for n in (3, 9))
    assert few.size == many.size
    assert pictures._spread_indices(9, 3) == [0, 4, 8] and pictures._spread_indices(2, 3) == [0, 1]


def test_shares_are_stacked_and_named():
    rows = [{"step": step, "a": 1 - step / 10, "b": step / 10} for step in range(11)]
    figure = plots.plot_shares([*rows, {"step": 11, "a": None, "b": None}], ["a", "b"], "t", 1)
    axis = figure.axes[0]
    texts = {text.get_text() for text in axis.get_legend().get_texts()}
    assert texts == {"a 100 to 0 %", "b 0 to 100 %"}
    assert axis.get_xlim() == (0, 10) and axis.get_ylim() == (0, 100)
    plt.close(figure)
