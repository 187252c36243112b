"""The picture of a prompt that is read once: its tokens by hand."""

from matplotlib import pyplot as plt

from mig_kit.speed import prompt_plots


def test_tokens_by_hand():
    assert prompt_plots.count_tokens(prompt=100, group=4, reply=10) == {"stock": 440, "kit": 140}
    assert prompt_plots.count_tokens(100, 1, 10) == {"stock": 110, "kit": 110}, "nothing to share"


def test_the_bars_are_as_long_as_the_tokens():
    figure = prompt_plots.draw_shared_prompt(100, 4, 10)
    widths = [sum(patch.get_width() for patch in axis.patches) for axis in figure.axes]
    assert widths == [440, 140] and "440 tokens" in figure.axes[0].get_title(loc="left")
    plt.close(figure)
