"""Figures about one group of replies: rewards, advantages, and what an update does to each reply.

Blue is above the group's mean, orange below; the sign says it in grey, too.
"""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt

from mig_kit.plots import CORRECT, PREDICTED

TERM_COLOURS = ("#BBBBBB", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")  # of rewards, in order
MEAN_LINE = {"color": "#222222", "linewidth": 1.2, "linestyle": "--"}


def plot_rewards(terms: dict[str, Sequence[float]], advantages: Sequence[float]) -> plt.Figure:
    """Left the weighted rewards of every reply, stacked, with the group's mean; right the
    advantages.

    terms: reward's name -> its weighted value for each reply; a reward that does not apply is left
    out or 0. The figure is closed: as a cell's last line it is shown once.
    """
    numbers = range(1, len(advantages) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3))
    bottoms = [0.0] * len(advantages)
    for (name, values), colour in zip(terms.items(), cycle(TERM_COLOURS)):
        left.bar(numbers, values, bottom=bottoms, label=name, color=colour, edgecolor="white")
        bottoms = [bottom + value for bottom, value in zip(bottoms, values)]
    left.axhline(sum(bottoms) / len(bottoms), label="mean", **MEAN_LINE)
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _label(left, "Rewards, weighted and summed", "reward", numbers)
    _draw_signed_bars(right, advantages, advantages)
    _label(right, "Advantages", "advantage (in σ)", numbers)
    return _close(figure)


def plot_change(change: Sequence[float], advantages: Sequence[float]) -> plt.Figure:
    """How much likelier one update has made every reply: the change of its log-probability.

    change: in nats, of the whole reply. Colours are those of the advantages. The figure is closed.
    """
    figure, axis = plt.subplots(figsize=(6.4, 3))
    _draw_signed_bars(axis, change, advantages)
    for number, value in enumerate(change, 1):
        above = value >= 0
        axis.annotate(f"{value:+.1f}", (number, value), (0, 2 if above else -3), ha="center",
                      va="bottom" if above else "top", textcoords="offset points", fontsize=8)
    axis.margins(y=0.15)
    _label(axis, "Change of each reply's log-probability by one update",
           "change (nats)", range(1, len(change) + 1))
    axis.set_xticks(range(1, len(change) + 1), [
        f"{number}\n({advantage:+.1f})" for number, advantage in enumerate(advantages, 1)])
    axis.set_xlabel("reply (its advantage)")
    return _close(figure)


def _draw_signed_bars(axis: plt.Axes, values: Sequence[float], signs: Sequence[float]) -> None:
    colours = [CORRECT if sign >= 0 else PREDICTED for sign in signs]
    axis.bar(range(1, len(values) + 1), values, color=colours, edgecolor="white")
    axis.axhline(0, color="#222222", linewidth=1)


def _label(axis: plt.Axes, title: str, unit: str, numbers: range) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set(xlabel="reply", ylabel=unit)
    axis.set_xticks(numbers)
    axis.grid(False, axis="x")


def _close(figure: plt.Figure) -> plt.Figure:
    figure.set_layout_engine("tight")
    plt.close(figure)
    return figure
