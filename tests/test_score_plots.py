"""Pictures that explain a score, read back."""

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import ImageColor

from mig_kit import palette, score_plots
from mig_kit.boxes import iou
from mig_kit.world.tasks import make_sample


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9, 1.0])
def test_a_box_is_moved_to_the_iou_that_is_asked_for(wanted):
    box = (3, 5, 33, 25)
    assert iou(box, score_plots.shift_to_iou(box, wanted)) == pytest.approx(wanted)


def test_boxes_from_one_half_on_are_blue():
    sample = make_sample("region", "val", 0)
    blue, orange = (
        [(np.asarray(score_plots.draw_overlaps(sample, (wanted,))) == ImageColor.getrgb(colour))
         .all(-1).any() for wanted in (0.3, 0.49, 0.5, 0.9)]
        for colour in (palette.CORRECT, palette.PREDICTED))
    assert blue == [False, False, True, True] and orange == [True, True, False, False]
    assert score_plots.draw_overlaps(sample).width <= 780


def test_resamples_within_the_interval_are_blue():
    means = np.array([0.1] * 3 + [0.5] * 94 + [0.9] * 3)
    figure = score_plots.plot_resamples(means, [0.5, 0.5], "t")
    inside, outside = figure.axes[0].containers
    assert [bar.get_height() for bar in inside] == [94]
    assert [bar.get_height() for bar in outside] == [3, 3]
    score_plots.plot_resamples(np.zeros(10), [0.0, 0.0], "all wrong")
    plt.close("all")


def test_three_seeds_leave_two_and_a_half_standard_deviations():
    lines = score_plots.plot_seed_widths().axes[0].get_lines()
    student = dict(zip(*lines[0].get_data()))
    assert student[3] == pytest.approx(4.3027 / 3 ** 0.5, abs=1e-4)
    assert (lines[1].get_ydata() < lines[0].get_ydata()).all()
    plt.close("all")
