"""Figures that explain the method."""

from collections.abc import Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.patches import FancyBboxPatch
from scipy.stats import t as student_t

from mig_kit.drawing.palette import CORRECT, INK, MUTED, PREDICTED, SIDE_COLOURS
from mig_kit.drawing.plots import LEGEND, WIDTH, set_style, set_title

# number -> (name, what it hands on)
STAGES = {
    "00": ("preflight", ""),
    "01": ("synthesise", "traces"),
    "02": ("SFT", "adapter"),
    "03": ("merge", "SFT model"),
    "04": ("rejection\nsampling", "kept prompts"),
    "05": ("RL (GRPO)", "GRPO model"),
    "06": ("evaluate", "scores"),
    "07": ("report", ""),
}
BESIDE = {"08": "benchmark", "09": "compare", "90": "tiny base"}
CORNER = 64  # rows and columns of a matrix that are drawn
TERM_COLOURS = ("#BBBBBB", "#56B4E9", "#009E73", "#E69F00", "#CC79A7")  # of rewards, in order


def _close(figure: plt.Figure) -> plt.Figure:
    """The figure, closed: as a cell's last line it then shows once, not twice."""
    plt.close(figure)
    return figure


def draw_pipeline(stage: str) -> plt.Figure:
    """All stages in a strip, the present one filled, and under each arrow what it hands on.

    Sets the style of all figures, as each notebook calls it first.

    stage: number, or name as "02_sft". 08, 09 and 90 stand beside the recipe, dashed.
    """
    set_style()
    number = stage[:2]
    beside = {number: (BESIDE[number], "")} if number in BESIDE else {}
    stages = beside | STAGES if number == "90" else STAGES | beside
    figure, axes = plt.subplots(figsize=(9.2, 1.15))
    for place, (key, (name, handed_on)) in enumerate(stages.items()):
        is_present = key == number
        axes.add_patch(FancyBboxPatch(
            (place + 0.14, 0.42), 0.72, 0.76, boxstyle="round,pad=0,rounding_size=0.08",
            facecolor=CORRECT if is_present else "white", edgecolor=MUTED,
            linestyle="--" if key in beside else "-"))
        axes.text(place + 0.5, 0.8, f"{key}\n{name}", ha="center", va="center", fontsize=8,
                  color="white" if is_present else INK,
                  fontweight="bold" if is_present else "normal")
        if handed_on:
            axes.annotate("", (place + 1.14, 0.8), (place + 0.86, 0.8),
                          arrowprops={"arrowstyle": "->", "color": INK, "shrinkA": 0,
                                      "shrinkB": 0})
            axes.text(place + 1, 0.28, handed_on, ha="center", va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, len(stages)), ylim=(0.1, 1.25))
    axes.axis("off")
    return _close(figure)


def plot_levels(scaled: np.ndarray, levels: Sequence[float]) -> plt.Figure:
    """A histogram of weights over their block's largest, and the values that four bits can hold.

    scaled: any shape, -1 to 1; levels: the values of the code book.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 2.7), layout="constrained")
    axes.hist(np.ravel(scaled)[:200_000], bins=80, color="#BBBBBB")
    for level in levels:
        axes.axvline(level, color=CORRECT, linewidth=1.3)
    set_title(axes, f"Weights of one matrix, and the {len(levels)} values (lines) that NF4 keeps")
    axes.set(xlabel="weight / largest |weight| of its block of 64", ylabel="weights")
    return _close(figure)


def plot_matrices(matrices: dict[str, np.ndarray]) -> plt.Figure:
    """The upper left corner of matrices of one shape, by name, each on a scale of its own."""
    figure, panels = plt.subplots(1, len(matrices), figsize=(WIDTH, 2.9), layout="constrained")
    for axes, (name, matrix) in zip(np.atleast_1d(panels), matrices.items()):
        limit = max(np.abs(matrix[:CORNER, :CORNER]).max(), 1e-12)
        axes.imshow(matrix[:CORNER, :CORNER], cmap="PuOr", vmin=-limit, vmax=limit)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"mean size {np.abs(matrix).mean():.4f}\ncolours to ±{limit:.3f}",
                        fontsize=9)
        axes.set(xticks=[], yticks=[])
    set_title(figure, f"One matrix, its rounding and its adapter (first {CORNER} rows, columns)")
    return _close(figure)


def plot_learning_signal(group: int, low: float, high: float) -> plt.Figure:
    """The variance p (1 - p) of a group's rewards, and the chance that replies differ, over p.

    p: chance that a reply is correct; group: replies to a prompt; low, high: pass rates that are
    kept.
    """
    p = np.linspace(0, 1, 201)
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 2.7), layout="constrained")
    panels = ((left, "Variance of the reward, p (1 - p)", p * (1 - p)),
              (right, f"Chance that {group} replies differ", 1 - p**group - (1 - p) ** group))
    for axes, title, values in panels:
        axes.plot(p, values, color=INK, linewidth=2)
        axes.set_title(title, loc="left", fontsize=10)
        axes.axvspan(low, high, color=CORRECT, alpha=0.15, linewidth=0)
        axes.set(xlabel="p", xlim=(0, 1), ylim=(0, None))
    set_title(figure, "Prompts that are never or always answered teach nothing (blue: kept)")
    return _close(figure)


def plot_pass_rates(tasks: Sequence[str], rates: Sequence[float], group: int, low: float,
                    high: float) -> plt.Figure:
    """A row per task: share of its prompts, percent, by correct replies; blue bounds what is kept.

    tasks, rates: of each prompt; group: replies to a prompt; low, high: pass rates that are kept.
    """
    counts = (np.asarray(rates) * group).round().astype(int)
    table = pd.crosstab(pd.Series(list(tasks)), counts).reindex(
        columns=range(group + 1), fill_value=0)
    shares = 100 * table.div(table.sum(axis=1), axis=0)
    order = (table @ np.arange(group + 1) / table.sum(axis=1)).sort_values().index
    names = [f"{name} ({table.loc[name].sum()})" for name in order]
    figure, axes = plt.subplots(figsize=(WIDTH, 0.27 * len(order) + 1.3), layout="constrained")
    sns.heatmap(shares.loc[order], mask=shares.loc[order] == 0, annot=True, fmt=".0f",
                cmap="Greys", vmin=0, vmax=100, cbar=False, yticklabels=names,
                annot_kws={"fontsize": 8}, linewidths=0.5, ax=axes)
    axes.grid(False)  # which empty cells would show
    kept = [count for count in table.columns if low <= count / group <= high]
    for edge in (kept[0], kept[-1] + 1) if kept else ():
        axes.axvline(edge, color=CORRECT, linewidth=3, clip_on=False)
    set_title(axes, f"Pass rates, % of prompts (blue: {low:g} to {high:g} is kept)")
    axes.set(xlabel=f"correct replies of {group}", ylabel="")
    axes.tick_params(axis="both", labelsize=8, rotation=0)
    return _close(figure)


def plot_rewards(terms: dict[str, Sequence[float]], advantages: Sequence[float]) -> plt.Figure:
    """Left each reply's weighted rewards, stacked, with the group's mean; right its advantage.

    terms: reward's name -> its weighted value for each reply, 0 if it does not apply.
    """
    numbers = range(1, len(advantages) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 3), layout="constrained")
    bottoms = [0.0] * len(advantages)
    for (name, values), colour in zip(terms.items(), cycle(TERM_COLOURS)):
        left.bar(numbers, values, bottom=bottoms, label=name, color=colour, edgecolor="white")
        bottoms = [bottom + value for bottom, value in zip(bottoms, values)]
    left.axhline(sum(bottoms) / len(bottoms), label="mean", color=INK, linewidth=1.2,
                 linestyle="--")
    left.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _label(left, "Rewards, weighted and summed", "reward", numbers)
    _draw_signed_bars(right, advantages, advantages)
    _label(right, "Advantages", "advantage (in σ)", numbers)
    return _close(figure)


def draw_loss(rewards: Sequence[float], advantages: np.ndarray,
              token_weights: dict[str, np.ndarray]) -> plt.Figure:
    """From a group to its loss: a row per reply, a cell per token, coloured by weight x advantage.

    token_weights: kind of loss -> (replies, tokens), 0 behind an end; advantages: (replies,).
    """
    colours = sns.blend_palette([PREDICTED, "white", CORRECT], as_cmap=True)
    names = [f"reply {number}: reward {reward:.2f}, advantage {advantage:+.2f}" for
             number, (reward, advantage) in enumerate(zip(rewards, advantages), 1)]
    figure, panels = plt.subplots(1, len(token_weights), sharey=True, layout="constrained",
                                  figsize=(8.6, 0.28 * len(names) + 1.8), squeeze=False)
    for axis, (name, weights) in zip(panels[0], token_weights.items()):
        pushes = weights * advantages[:, None]
        limit = max(np.abs(pushes).max(), 1e-12)
        sns.heatmap(pushes, mask=weights == 0, cmap=colours, vmin=-limit, vmax=limit, cbar=False,
                    xticklabels=20, yticklabels=names, linewidths=0.15, ax=axis)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("token")
        axis.tick_params(axis="both", labelsize=8, rotation=0)
        axis.grid(False)
    set_title(figure, "What each token adds to the loss (blue: more probable, orange: less)")
    return _close(figure)


def plot_change(change: Sequence[float], advantages: Sequence[float]) -> plt.Figure:
    """Change of each reply's log-probability by one update, in nats, coloured by advantage."""
    figure, axis = plt.subplots(figsize=(6.4, 3), layout="constrained")
    _draw_signed_bars(axis, change, advantages)
    axis.bar_label(axis.containers[0], fmt="{:+.2f}", fontsize=8, padding=2)
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
    axis.axhline(0, color=INK, linewidth=1)


def _label(axis: plt.Axes, title: str, unit: str, numbers: range) -> None:
    set_title(axis, title)
    axis.set(xlabel="reply", ylabel=unit, xticks=numbers)
    axis.grid(False, axis="x")


def count_tokens(prompt: int, group: int, reply: int) -> dict[str, int]:
    """Tokens that the model reads: "stock" reads the prompt before every reply, "kit" only once."""
    return {"stock": group * (prompt + reply), "kit": prompt + group * reply}


def draw_shared_prompt(prompt: int, group: int, reply: int) -> plt.Figure:
    """The rows of a batch as bars of tokens, as stock trainers and as the kit read them."""
    tokens = count_tokens(prompt, group, reply)
    figure, axes = plt.subplots(2, 1, sharex=True, layout="constrained", figsize=(
        WIDTH, 1.6 + 0.2 * group), height_ratios=(group, group + 1))
    stock, kit = axes
    stock.barh(range(group), [prompt] * group, color=SIDE_COLOURS["stock TRL"], edgecolor="white",
               label="prompt: images and question")
    stock.barh(range(group), [reply] * group, left=prompt, color=CORRECT, edgecolor="white",
               label="a reply")
    kit.barh([0], [prompt], color=SIDE_COLOURS["stock TRL"], edgecolor="white")
    kit.barh(range(1, group + 1), [reply] * group, left=prompt, color=CORRECT, edgecolor="white")
    for row in range(1, group + 1):  # every reply attends to the one prompt
        kit.plot([prompt / 2, prompt / 2, prompt], [0.45, row, row], color=INK, linewidth=0.6,
                 linestyle=":")
    titles = (f"Stock: the prompt is read {group} times, {tokens['stock']:,} tokens",
              f"Kit: it is read once, its keys and values are shared, {tokens['kit']:,} tokens")
    for axis, title in zip(axes, titles):
        set_title(axis, title)
        axis.set_yticks([])
        axis.invert_yaxis()
        axis.grid(False)
    kit.set_xlabel("tokens of a row")
    figure.legend(ncols=2, **LEGEND)
    return _close(figure)


def plot_seed_widths() -> plt.Figure:
    """Half the width of a 95 % interval, in standard deviations of a seed's score, by seeds."""
    counts = np.array([2, 3, 4, 5, 6, 8, 10])
    student = student_t.ppf(0.975, counts - 1) / np.sqrt(counts)
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    axes.plot(counts, student, "o-", color=CORRECT, label="Student's t: honest")
    axes.plot(counts, 1.96 / np.sqrt(counts), "s--", color=PREDICTED,
              label="1.96 standard errors: too narrow")
    for count, width in zip(counts, student):
        axes.annotate(f"{width:.1f}", (count, width), (4, 5), textcoords="offset points",
                      fontsize=9, color=MUTED)
    axes.set(xlabel="seeds", ylabel="half width, standard deviations",
             ylim=(0, 1.12 * student.max()), xticks=counts)
    set_title(axes, "What is left open after so many seeds")
    figure.legend(ncols=2, **LEGEND)
    return _close(figure)
