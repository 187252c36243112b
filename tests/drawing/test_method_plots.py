"""Figures that explain the method: what they say, read back."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mig_kit.drawing import method_plots
from mig_kit.drawing.palette import CORRECT, PREDICTED
from mig_kit.pipeline import store


def texts(axes):
    return [text.get_text() for text in axes.texts]


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def colours(axis):
    return [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]


@pytest.mark.parametrize("stage", store.STAGES)
def test_the_present_stage_alone_is_filled(stage):
    axes = method_plots.draw_pipeline(stage).axes[0]
    filled = [colour == CORRECT for colour in colours(axes)]
    labels = [text.get_text() for text in axes.texts if text.get_text()[:2].isdigit()]
    assert sum(filled) == 1 and labels[filled.index(True)].startswith(stage[:2])
    assert [label[:2] for label in labels if label[:2] < "08"] == [f"0{n}" for n in range(8)]


def test_pass_rates_are_shares_of_a_task_and_the_bounds_stand_at_their_columns():
    tasks, rates = ["hard"] * 4 + ["easy"] * 2, [0, 0, 0, 0.5, 1, 0.75]
    axes = method_plots.plot_pass_rates(tasks, rates, 4, 0.1, 0.9).axes[0]
    assert texts(axes)[:10] == ["75", "", "25", "", "", "", "", "", "50", "50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hard (4)", "easy (2)"]
    assert [line.get_xdata()[0] for line in axes.lines] == [1, 4]
    assert texts(axes)[10:12] == ["25 %", "50 %"]


def test_the_signal_is_largest_in_the_middle_and_nothing_at_the_ends():
    variance, differ = method_plots.plot_learning_signal(2, 0.1, 0.9).axes
    assert np.allclose(variance.lines[0].get_ydata()[[0, 100, 200]], [0, 0.25, 0])
    assert np.allclose(differ.lines[0].get_ydata()[[0, 100, 200]], [0, 0.5, 0])


def test_every_matrix_has_its_own_scale_and_says_its_size():
    small, large = np.full((70, 80), 0.5), np.full((70, 80), -2.0)
    figure = method_plots.plot_matrices({"a": small, "b": large})
    images = [axes.images[0] for axes in figure.axes]
    assert [image.get_clim() for image in images] == [(-0.5, 0.5), (-2, 2)]
    assert images[0].get_array().shape == (64, 64)
    assert figure.axes[0].get_xlabel() == "mean size 0.5000\ncolours to ±0.500"


def test_every_level_is_a_line():
    axes = method_plots.plot_levels(np.linspace(-1, 1, 64), [-1, 0, 1]).axes[0]
    assert [line.get_xdata()[0] for line in axes.lines] == [-1, 0, 1]
    assert sum(patch.get_height() for patch in axes.patches) == 64


def test_rewards_are_stacked_up_to_their_sum_beside_the_advantages():
    figure = method_plots.plot_rewards({"format": [0.2, 0.1], "box": [0.5, 0.0]}, [1.5, -1.5])
    left, right = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in left.patches]
    assert tops == pytest.approx([0.2, 0.1, 0.7, 0.1])
    assert left.lines[0].get_ydata()[0] == pytest.approx(0.4), "the group's mean"
    assert heights(right) == [1.5, -1.5] and colours(right) == [CORRECT, PREDICTED]


def test_a_change_has_the_colour_of_its_advantage():
    axis = method_plots.plot_change([0.3, 0.1, -0.2], [1.0, -0.5, -0.5]).axes[0]
    assert heights(axis) == [0.3, 0.1, -0.2]
    assert colours(axis) == [CORRECT, PREDICTED, PREDICTED]
    assert [text.get_text() for text in axis.texts] == ["+0.3", "+0.1", "-0.2"]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["1\n(+1.0)", "2\n(-0.5)", "3\n(-0.5)"]


def test_tokens_by_hand():
    assert method_plots.count_tokens(prompt=100, group=4, reply=10) == {"stock": 440, "kit": 140}
    assert method_plots.count_tokens(100, 1, 10) == {"stock": 110, "kit": 110}, "nothing to share"


def test_the_bars_are_as_long_as_the_tokens():
    figure = method_plots.draw_shared_prompt(100, 4, 10)
    widths = [sum(patch.get_width() for patch in axis.patches) for axis in figure.axes]
    assert widths == [440, 140] and "440 tokens" in figure.axes[0].get_title(loc="left")


def test_resamples_within_the_interval_are_blue():
    means = np.array([0.1] * 3 + [0.5] * 94 + [0.9] * 3)
    figure = method_plots.plot_resamples(means, [0.5, 0.5], "t")
    inside, outside = figure.axes[0].containers
    assert [bar.get_height() for bar in inside] == [94]
    assert [bar.get_height() for bar in outside] == [3, 3]
    method_plots.plot_resamples(np.zeros(10), [0.0, 0.0], "all wrong")


def test_three_seeds_leave_two_and_a_half_standard_deviations():
    lines = method_plots.plot_seed_widths().axes[0].get_lines()
    student = dict(zip(*lines[0].get_data()))
    assert student[3] == pytest.approx(4.3027 / 3 ** 0.5, abs=1e-4)
    assert (lines[1].get_ydata() < lines[0].get_ydata()).all()
