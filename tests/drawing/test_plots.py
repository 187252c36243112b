"""Charts: what is drawn where, read back."""

from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from mig_kit.drawing import palette, plots


def test_every_name_has_one_colour_in_every_figure():
    few = palette.piece_colours(["kept", "dropped: format"])
    many = palette.piece_colours(["dropped: a", "dropped: b", "kept", "no answer"])
    assert few["kept"] == many["kept"] == palette.CORRECT
    assert len(set(many.values())) == 4, "no two pieces of a figure look alike"
    names = [f"reason {number}" for number in range(20)]
    assert palette.piece_colours(names).keys() == set(names)


def test_scores_are_where_their_numbers_are():
    rows = [{"suite": suite, "system": system, "score": score, "ci95": [score - 5, score + 5],
             "n": 40} for suite, score in (("a", 20.0), ("b", 60.0)) for system in ("sft", "grpo")]
    figure = plots.plot_scores(rows, "suite", "Scores")
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a, n = 40", "b, n = 40"]
    lines = {line.get_label(): list(line.get_xdata()) for line in axis.get_lines()}
    assert lines["SFT"] == lines["GRPO"] == [20.0, 60.0]
    plt.close(figure)


def test_a_dollar_in_the_name_of_a_task_is_no_formula():
    """Two of them would enclose one, and matplotlib would raise on what it cannot read."""
    plots.set_style()
    rows = [{"task": "cost in $_$ or \\$", "system": "base", "acc@0.5": 10.0,
             "ci95": [5.0, 15.0], "n": 4}]
    figure = plots.plot_scores(rows, "task", "a $\\x$ b", "acc@0.5")
    figure.canvas.draw()
    plt.close(figure)


def test_bars_are_grouped_and_their_intervals_stand_on_them():
    rows = [{"stage": stage, "side": side, "s": seconds, "spread": [seconds - 1, seconds + 1]}
            for stage, seconds in (("a", 9.0), ("b", 4.0)) for side in ("stock", "kit")]
    axis = plots.plot_bars(rows, "stage", "s", "t", "side", palette.SIDE_COLOURS, "spread").axes[0]
    assert [bar.get_height() for bar in axis.patches] == [9, 4, 9, 4]
    assert [list(line.get_ydata()) for line in axis.lines] == [[8, 10], [3, 5]] * 2
    for bar, line in zip(axis.patches, axis.lines):
        assert bar.get_x() < line.get_xdata()[0] < bar.get_x() + bar.get_width()
    named = plots.plot_bars([{"o": "kept", "n": 3}, {"o": "leak", "n": 1}], "o", "n", "t").axes[0]
    assert [text.get_text() for text in named.texts] == ["3", "1"]
    assert to_hex(named.patches[0].get_facecolor()) == palette.CORRECT.lower()
    plt.close("all")
