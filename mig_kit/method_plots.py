"""Figures that explain the method in notebooks 02 and 04: four-bit weights, adapters, pass rates
and what a group of replies can teach.

A figure comes back closed: as a cell's last line it is shown once.
"""

from collections.abc import Sequence
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import Rectangle

from mig_kit.boxes import BoxFormat
from mig_kit.plots import CORRECT, PREDICTED, TARGET
from mig_kit.prompts import reply_boxes_in_original
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample

INK, MUTED = "#222222", "#777777"
SHOWN_VALUES = 200_000  # of a matrix, in a histogram
CORNER = 64  # rows and columns of a matrix that are drawn
IMAGE_SIDE = 600  # pixels; larger images are drawn smaller


def merge_runs(tokens: Sequence[str], values: Sequence[float]) -> tuple[list[str], list[float]]:
    """Tokens and values with each run of one token of one value written once, as "token x 9"."""
    merged = [(token, value, len(list(run)))
              for (token, value), run in groupby(zip(tokens, values, strict=True))]
    texts = [f"{token} x {count} " if count > 1 else token for token, _, count in merged]
    return texts, [value for _, value, _ in merged]


def plot_levels(scaled: np.ndarray, levels: Sequence[float]) -> plt.Figure:
    """Weights over their block's largest, as a histogram, and the values that four bits can hold.

    scaled: any shape, -1 to 1; levels: the values of the code book.
    """
    figure, axes = plt.subplots(figsize=(6.6, 2.7))
    axes.hist(np.ravel(scaled)[:SHOWN_VALUES], bins=80, color="#BBBBBB")
    for level in levels:
        axes.axvline(level, color=CORRECT, linewidth=1.3)
    axes.set_title(f"Weights of one matrix, and the {len(levels)} values (lines) that NF4 keeps",
                   loc="left", fontsize=11)
    axes.set(xlabel="weight / largest |weight| of its block of 64", ylabel="weights")
    return _close(figure)


def plot_matrices(matrices: dict[str, np.ndarray]) -> plt.Figure:
    """The upper left corner of several matrices of one shape, each on a scale of its own.

    matrices: what each is -> (rows, columns).
    """
    figure, panels = plt.subplots(1, len(matrices), figsize=(6.6, 2.9), layout="constrained")
    for axes, (name, matrix) in zip(np.atleast_1d(panels), matrices.items()):
        limit = max(np.abs(matrix[:CORNER, :CORNER]).max(), 1e-12)
        axes.imshow(matrix[:CORNER, :CORNER], cmap="PuOr", vmin=-limit, vmax=limit)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"mean size {np.abs(matrix).mean():.4f}\ncolours to ±{limit:.3f}",
                        fontsize=9)
        axes.set(xticks=[], yticks=[])
    figure.suptitle(f"One matrix, its rounding and its adapter (first {CORNER} rows, columns)",
                    fontsize=11, x=0.01, ha="left")
    plt.close(figure)
    return figure


def plot_learning_signal(group: int, low: float, high: float) -> plt.Figure:
    """What a group of replies can teach, over the chance p that one reply is correct: the variance
    of its rewards p (1 - p), and the chance that the replies differ.

    group: replies to a prompt; low, high: the pass rates that are kept.
    """
    p = np.linspace(0, 1, 201)
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 2.7))
    left.plot(p, p * (1 - p), color=INK, linewidth=2)
    left.set_title("Variance of the reward", loc="left", fontsize=10)
    left.set(xlabel="p", ylabel="p (1 - p)")
    right.plot(p, 1 - p**group - (1 - p) ** group, color=INK, linewidth=2)
    right.set_title(f"Chance that {group} replies differ", loc="left", fontsize=10)
    right.set(xlabel="p", ylabel="chance")
    for axes in (left, right):
        axes.axvspan(low, high, color=CORRECT, alpha=0.15, linewidth=0)
        axes.set(xlim=(0, 1), ylim=(0, None))
    figure.suptitle("Prompts that are never or always answered teach nothing (blue: kept)",
                    fontsize=11, x=0.01, ha="left")
    return _close(figure)


def plot_pass_rates(tasks: Sequence[str], rates: Sequence[float], group: int, low: float,
                    high: float) -> plt.Figure:
    """A row per task, a column per number of correct replies: the share of the task's prompts in
    percent. Lines are the bounds; on the right, the share of prompts between them.

    tasks, rates: of each prompt; group: replies to a prompt; low, high: the pass rates kept.
    """
    counts = (np.asarray(rates) * group).round().astype(int)
    table = pd.crosstab(pd.Series(list(tasks)), counts).reindex(
        columns=range(group + 1), fill_value=0)
    shares = 100 * table.div(table.sum(axis=1), axis=0)
    is_kept = [low <= count / group <= high for count in table.columns]
    kept = shares.loc[:, is_kept].sum(axis=1)
    order = (table @ np.arange(group + 1) / table.sum(axis=1)).sort_values().index
    names = [f"{name} ({table.loc[name].sum()})" for name in order]
    figure, axes = plt.subplots(figsize=(6.6, 0.27 * len(order) + 1.3))
    labels = shares.loc[order].map(lambda share: f"{share:.0f}" if share else "")
    sns.heatmap(shares.loc[order], annot=labels, fmt="", cmap="Greys", vmin=0, vmax=100,
                cbar=False, yticklabels=names, annot_kws={"fontsize": 8}, linewidths=0.5, ax=axes)
    edges = [place for place in range(group + 2)
             if (place > 0 and is_kept[place - 1]) != (place <= group and is_kept[place])]
    for edge in edges:
        axes.axvline(edge, color=CORRECT, linewidth=3, clip_on=False)
    for row, name in enumerate(order):
        axes.text(group + 1.2, row + 0.5, f"{kept[name]:.0f} %", va="center", fontsize=8, color=INK)
    axes.text(group + 1.2, -0.35, "within", fontsize=8, color=INK)
    axes.set_title(f"Pass rates, % of prompts (blue: {low:g} to {high:g} is kept)",
                   loc="left", fontsize=11, pad=20)
    axes.set(xlabel=f"correct replies of {group}", ylabel="")
    axes.tick_params(axis="both", labelsize=8, rotation=0)
    return _close(figure)


def plot_group(sample: Sample, replies: Sequence[str], box_format: BoxFormat) -> plt.Figure:
    """The images with the boxes of all replies, each with its number, correct ones blue and solid,
    others orange and dashed; targets green.
    """
    columns = min(3, len(sample.images))
    lines = -(-len(sample.images) // columns)
    figure, panels = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                  figsize=(6.6, 0.4 + lines * 6.6 / columns * 0.85))
    for number, (axes, image) in enumerate(zip(panels.flat, sample.images), 1):
        small = image.convert("RGB")
        small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        axes.imshow(small, extent=(0, image.width, image.height, 0))
        axes.set_title(f"Image {number}", fontsize=10)
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        for target in sample.targets:
            if target.image == number:
                _add_box(axes, target.box, TARGET, "-", 4)
    n_correct = 0
    for number, reply in enumerate(replies, 1):
        correct = is_correct(reply, sample, box_format)
        n_correct += correct
        for image, box in reply_boxes_in_original(sample, reply, box_format):
            axes = panels.flat[image - 1]
            colour, line = (CORRECT, "-") if correct else (PREDICTED, "--")
            _add_box(axes, box, colour, line, 1.5)
            place = (number - 1) / max(1, len(replies) - 1)  # apart where boxes agree
            axes.text(box[0] + place * (box[2] - box[0]), box[1], str(number), fontsize=8,
                      color=colour, ha="center", va="bottom", clip_on=True,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8})
    for axes in list(panels.flat)[len(sample.images):]:
        axes.set_visible(False)
    figure.suptitle(f"{n_correct} of {len(replies)} replies are correct (blue); target green",
                    fontsize=11, x=0.01, ha="left")
    plt.close(figure)
    return figure


def _add_box(axes: plt.Axes, box: Sequence[float], colour: str, line: str, width: float) -> None:
    x1, y1, x2, y2 = box
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour,
                             linestyle=line, linewidth=width))


def _close(figure: plt.Figure) -> plt.Figure:
    figure.set_layout_engine("tight")
    plt.close(figure)
    return figure
