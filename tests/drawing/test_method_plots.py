"""Figures that explain the method: what they say, read back."""

import pytest
from matplotlib.colors import to_hex

from mig_kit.drawing import method_plots
from mig_kit.drawing.palette import CORRECT, PREDICTED


def texts(axes):
    return [text.get_text() for text in axes.texts]


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def colours(axis):
    return [to_hex(bar.get_facecolor()).upper() for bar in axis.patches]


@pytest.mark.parametrize("stage", ["02_sft", "90_tiny_base"])
def test_the_present_stage_alone_is_filled(stage):
    axes = method_plots.draw_pipeline(stage).axes[0]
    filled = [colour == CORRECT for colour in colours(axes)]
    labels = [text.get_text() for text in axes.texts if text.get_text()[:2].isdigit()]
    assert sum(filled) == 1 and labels[filled.index(True)].startswith(stage[:2])
    assert [label[:2] for label in labels if label[:2] < "08"] == [f"0{n}" for n in range(8)]


def test_pass_rates_are_shares_of_a_task_and_the_bounds_stand_at_their_columns():
    tasks, rates = ["hard"] * 4 + ["easy"] * 2, [0, 0, 0, 0.5, 1, 0.75]
    axes = method_plots.plot_pass_rates(tasks, rates, 4, 0.1, 0.9).axes[0]
    assert texts(axes) == ["75", "25", "50", "50"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["hard (4)", "easy (2)"]
    assert [line.get_xdata()[0] for line in axes.lines] == [1, 4]


def test_rewards_are_stacked_up_to_their_sum_beside_the_advantages():
    figure = method_plots.plot_rewards({"format": [0.2, 0.1], "box": [0.5, 0.0]}, [1.5, -1.5])
    left, right = figure.axes
    tops = [bar.get_y() + bar.get_height() for bar in left.patches]
    assert tops == pytest.approx([0.2, 0.1, 0.7, 0.1])
    assert left.lines[0].get_ydata()[0] == pytest.approx(0.4), "the group's mean"
    assert heights(right) == [1.5, -1.5] and colours(right) == [CORRECT, PREDICTED]


def test_tokens_by_hand():
    assert method_plots.count_tokens(prompt=100, group=4, reply=10) == {"stock": 440, "kit": 140}
    assert method_plots.count_tokens(100, 1, 10) == {"stock": 110, "kit": 110}, "nothing to share"


def test_three_seeds_leave_two_and_a_half_standard_deviations():
    lines = method_plots.plot_seed_widths().axes[0].get_lines()
    student = dict(zip(*lines[0].get_data()))
    assert student[3] == pytest.approx(4.3027 / 3 ** 0.5, abs=1e-4)
    assert (lines[1].get_ydata() < lines[0].get_ydata()).all()
