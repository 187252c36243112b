"""Figures that explain the method: what they say, read back."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mig_kit import method_plots
from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.plots import CORRECT, PREDICTED, TARGET
from mig_kit.prompts import format_answer
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_runs_of_a_token_are_written_once():
    tokens, values = method_plots.merge_runs(["a", "p", "p", "p", "p", "b"], [0, 0, 0, 0, 1, 1])
    assert tokens == ["a", "p x 3 ", "p", "b"] and values == [0, 0, 1, 1]
    with pytest.raises(ValueError):
        method_plots.merge_runs(["a", "b"], [0])


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


@pytest.mark.parametrize("task", ["diff", "group_grounding", "object_tracking"])
def test_a_group_shows_every_box_in_its_image_and_colour(task):
    sample = make_sample(task, "val", 0)
    image, target = sample.targets[0]
    box = to_model_box(target, sample.sizes[image - 1], BOX_FORMAT)
    other = image % len(sample.images) + 1
    replies = [f"<think>Find.</think><answer>{format_answer(number, box)}</answer>"
               for number in (image, image, other, 99)]
    figure = method_plots.plot_group(sample, [*replies, "nothing"], BOX_FORMAT)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    colours = [[to_hex(patch.get_edgecolor()).upper() for patch in axes.patches]
               for axes in panels]
    assert len(panels) == len(sample.images)
    assert colours[image - 1] == [TARGET, CORRECT, CORRECT]
    assert colours[other - 1] == [PREDICTED] and texts(panels[other - 1]) == ["3"]
    assert figure.get_suptitle().startswith("2 of 5 replies")


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
