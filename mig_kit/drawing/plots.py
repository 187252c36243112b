"""Charts for notebooks and report; titles say what is shown, axes the unit."""

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from mig_kit.drawing.palette import (
    CORRECT,
    INK,
    SYSTEM_COLOURS,
    SYSTEM_LABELS,
    SYSTEM_MARKERS,
    piece_colours,
    text_colour,
)

# What a curve is called above its panel, with its unit.
CURVE_NAMES = {
    "reward": "reward, weighted sum", "length": "length, tokens", "entropy": "entropy, nats",
    "truth": "true claims, share", "coverage": "objects listed, share",
    "zero_std": "groups without spread, share",
    "clipped_ratio": "replies cut off, share", "loss": "loss, nats per token",
    "token_accuracy": "correct tokens, share", "visual_loss": "loss on images, nats",
    "visual_right": "correct on images, share", "text_loss": "loss on text, nats",
    "text_right": "correct on text, share", "looking": "attention on the object, share"}
WIDTH = 6.6  # inches of a figure: 700 px, at which its text is as large as a page's
PANELS = 3  # side by side
LEGEND = {"frameon": False, "loc": "outside lower center", "fontsize": 9}  # below the axes


def set_style() -> None:
    """The look of all figures; call once per notebook."""
    sns.set_theme(style="whitegrid", context="notebook", rc={
        "figure.figsize": (WIDTH, 3.2), "figure.dpi": 110, "figure.constrained_layout.use": True,
        "axes.titlesize": 11, "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "legend.fontsize": 9, "figure.titlesize": 11, "svg.hashsalt": "mig-kit",
        "text.parse_math": False})  # names hold "$"


def set_title(target: plt.Figure | Axes, title: str) -> None:
    """The wrapped title of a figure or of its one panel, at the left."""
    if isinstance(target, plt.Figure):
        target.suptitle(title, fontsize=11, x=0.01, ha="left")
    else:
        target.set_title(textwrap.fill(title, 80), loc="left", fontsize=11)


def plot_scores(rows: list[dict], by: str, title: str, value: str = "score",
                unit: str = "correct, percent") -> plt.Figure:
    """A line per `by`, on it a marker per system with its 95 % interval.

    rows: {by, "system", value, "ci95", "n"}, percent. Systems differ in marker and height, too.
    """
    table = pd.DataFrame(rows)
    names, systems = (list(dict.fromkeys(table[column])) for column in (by, "system"))
    height = 0.13 * len(systems) + 0.14
    figure, axes = plt.subplots(figsize=(WIDTH, height * len(names) + 1.3), layout="constrained")
    for place, system in enumerate(systems):
        part = table[table["system"] == system]
        offset = 0.62 * (place - (len(systems) - 1) / 2) / max(2, len(systems))
        heights = [names.index(name) + offset for name in part[by]]
        colour = SYSTEM_COLOURS.get(system, INK)
        low, high = zip(*part["ci95"])
        axes.hlines(heights, low, high, color=colour, linewidth=1.8)
        axes.plot(part[value], heights, SYSTEM_MARKERS.get(system, "v"), color=colour,
                  markersize=6, markeredgecolor=INK, markeredgewidth=0.6,
                  label=SYSTEM_LABELS.get(system, system))
    counts = table.groupby(by)["n"].first()
    axes.set_yticks(range(len(names)), [f"{name}, n = {counts[name]}" for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(-2, 102),
             xlabel=f"{unit}, with 95 % interval over questions")
    axes.hlines([place + 0.5 for place in range(len(names) - 1)], -2, 102, color="#DDDDDD",
                linewidth=0.8)
    axes.grid(False, axis="y")
    set_title(axes, title)
    figure.legend(ncols=len(systems), **LEGEND)
    return figure


def plot_bars(rows: list[dict], x: str, y: str, title: str, hue: str | None = None,
              palette: dict[str, str] | None = None) -> plt.Figure:
    """A bar per row, grouped by x, a colour per hue.

    palette: hue -> colour; else `piece_colours`, or blue if no bar is a good end.
    """
    table = pd.DataFrame(rows).astype({x: str})
    names = list(dict.fromkeys(table[x]))
    colours = palette or piece_colours(table[hue or x])
    if not hue and CORRECT not in colours.values():
        colours = dict.fromkeys(colours, CORRECT)
    figure, axes = plt.subplots(layout="constrained", figsize=(
        max(WIDTH, 0.31 * len(names) * (table[hue].nunique() if hue else 2)), 3.4))
    sns.barplot(table, x=x, y=y, hue=hue or x, palette=colours, saturation=1, errorbar=None,
                edgecolor="white", legend=bool(hue), ax=axes)
    for bars in axes.containers if not hue else ():
        texts = [f"{bar.get_height():,.0f}" if bar.get_height() >= 100 else
                 f"{bar.get_height():.3g}" for bar in bars]
        axes.bar_label(bars, texts, fontsize=9, padding=2)
    axes.margins(y=0.12)
    axes.set(xlabel="", ylabel=y)
    set_title(axes, title)
    wrapped = [textwrap.fill(name, max(9, 88 // len(names))) for name in names]
    crowded = max(len(line) for name in wrapped for line in name.split("\n")) > 100 // len(names)
    axes.set_xticks(range(len(names)), wrapped, rotation=30 if crowded else 0,
                    ha="right" if crowded else "center")
    if hue:
        handles, labels = axes.get_legend_handles_labels()
        axes.get_legend().remove()
        figure.legend(handles, labels, ncols=len(labels), **LEGEND)
    return figure


def _make_panels(count: int, height: float, **more) -> tuple[plt.Figure, list[Axes]]:
    """A figure with `count` panels, at most PANELS in a row; height: of one, inches."""
    columns = min(PANELS, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, layout="constrained",
                                figsize=(WIDTH * columns / PANELS if columns > 1 else 4.4,
                                         height * lines + 0.4), **more)
    for axis in list(axes.flat)[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat)[:count]


def plot_curves(rows: list[dict], names: list[str], title: str, smooth: int = 1, x: str = "step",
                unit: str = "update"):
    """A panel per name over x, a faint line of values, a strong one of their mean over `smooth`."""
    table = pd.DataFrame(rows)
    names = [n for n in names if n in table and table[n].notna().any()]
    figure, panels = _make_panels(len(names), 1.9)
    for axis, name in zip(panels, names):
        values = table[[x, name]].dropna().astype(float)
        if smooth > 1:
            axis.plot(values[x], values[name], color=CORRECT, alpha=0.3, linewidth=1)
        means = values[name].rolling(smooth, min_periods=1).mean()
        axis.plot(values[x], means, color=CORRECT, linewidth=2,
                  marker="o" if len(values) == 1 else None)
        axis.set_title(CURVE_NAMES.get(name, name.replace("_", " ")), fontsize=9)
        axis.set_xlabel(unit if x == "step" else x, fontsize=9)
        axis.tick_params(labelsize=8)
    mean = f" (strong: mean over {smooth} {unit}s)" if smooth > 1 and x == "step" else ""
    set_title(figure, f"{title}{mean}")
    return figure


def plot_stacked(counts: dict[str, dict[str, int]], title: str, unit: str = "count"):
    """Horizontal bars: one per outer key with its sum, a piece per inner key with its number."""
    table = pd.DataFrame(counts).T.fillna(0)
    table = table.loc[:, table.any()]
    sums = table.sum(axis=1)
    figure, axes = plt.subplots(figsize=(WIDTH, 0.34 * len(table) + 1.5), layout="constrained")
    colours = piece_colours(table.columns)
    table.plot.barh(stacked=True, color=colours, width=0.75, edgecolor="white", linewidth=1.2,
                    legend=False, ax=axes)
    for bars, (name, colour) in zip(axes.containers, colours.items()):
        labels = [f"{piece:.0f}" if piece > 0.05 * sums.max() else "" for piece in table[name]]
        axes.bar_label(bars, labels, label_type="center", fontsize=8, color=text_colour(colour))
    words = [SYSTEM_LABELS.get(name, name) for name in table.index]
    axes.set_yticks(range(len(table)), [f"{word}, n = {total:.0f}"
                                        for word, total in zip(words, sums)])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set(xlabel=unit, xlim=(0, sums.max() * 1.01))
    set_title(axes, title)
    figure.legend(ncols=min(4, len(table.columns)), **LEGEND)
    return figure


def plot_groups(rows: list[dict], system: str = "grpo", reference: str = "") -> plt.Figure:
    """A panel per suite: a point with its interval per group, a line at the reference's score.

    Args:
        rows: {suite, group, is_reference, value, low, high, by_run (values per run)}, percent.
        system: whose scores they are.
        reference: group that `rows` are differences to, in points, or "" for scores.
    """
    table = pd.DataFrame(rows)
    names, groups = (list(dict.fromkeys(table[column])) for column in ("suite", "group"))
    figure, panels = _make_panels(len(names), 0.8 + 0.28 * len(groups), sharey=True)
    for axis, name in zip(panels, names):
        for place, group in enumerate(groups):
            row = table[(table["suite"] == name) & (table["group"] == group)].iloc[0]
            colour = INK if row["is_reference"] else CORRECT
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.6)
            axis.plot(row["value"], place, "o", color=colour, markersize=5)
            if len(row["by_run"]) > 1:
                axis.plot(row["by_run"], [place + 0.25] * len(row["by_run"]), "|", color=colour,
                          markersize=5, markeredgewidth=1)
            if row["is_reference"]:
                axis.axvline(row["value"], color="#999999", linewidth=1, zorder=0)
        if reference:
            axis.axvline(0, color="#999999", linewidth=1, zorder=0)
        axis.set_title(textwrap.fill(name, 24), fontsize=9)
        axis.set_yticks(range(len(groups)), groups, fontsize=9)
        axis.tick_params(axis="x", labelsize=9)
        axis.set_ylim(len(groups) - 0.5, -0.5)
    title = f"Greedy score of the {SYSTEM_LABELS[system]} models, percent, with 95 % intervals"
    if reference:
        title = (f"{SYSTEM_LABELS[system]} models: difference to {reference}, points, with 95 % "
                 "intervals")
    set_title(figure, title)
    return figure
