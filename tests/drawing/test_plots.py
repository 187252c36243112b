"""Charts, and figures that explain the method: what is drawn where and what they say, read back."""

import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from mig_kit.drawing import method_plots, palette, plots
from mig_kit.drawing.palette import CORRECT


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
    assert to_hex(named.patches[0].get_facecolor()) == CORRECT.lower()


def test_tokens_by_hand():
    assert method_plots.count_tokens(prompt=100, group=4, reply=10) == {"stock": 440, "kit": 140}
    assert method_plots.count_tokens(100, 1, 10) == {"stock": 110, "kit": 110}, "nothing to share"
