"""Figures of one group: heights and colours, read back."""

import pytest
from matplotlib.colors import to_hex

from mig_kit import group_plots
from mig_kit.plots import CORRECT, PREDICTED


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def colours(axis):
    return [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]


def test_rewards_are_stacked_up_to_their_sum_beside_the_advantages():
    figure = group_plots.plot_rewards({"format": [0.2, 0.1], "box": [0.5, 0.0]}, [1.5, -1.5])
    left, right = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in left.patches]
    assert tops == pytest.approx([0.2, 0.1, 0.7, 0.1])
    assert left.lines[0].get_ydata()[0] == pytest.approx(0.4), "the group's mean"
    assert heights(right) == [1.5, -1.5] and colours(right) == [CORRECT, PREDICTED]


def test_a_change_has_the_colour_of_its_advantage():
    axis = group_plots.plot_change([0.3, 0.1, -0.2], [1.0, -0.5, -0.5]).axes[0]
    assert heights(axis) == [0.3, 0.1, -0.2]
    assert colours(axis) == [CORRECT, PREDICTED, PREDICTED]
    assert [text.get_text() for text in axis.texts] == ["+0.3", "+0.1", "-0.2"]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["1\n(+1.0)", "2\n(-0.5)", "3\n(-0.5)"]
