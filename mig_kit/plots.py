"""Pictures for notebooks and report: boxes on images, bars with intervals, curves. Colours are safe
for the colour-blind.
"""

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from PIL import Image, ImageDraw, ImageFont

from mig_kit.boxes import Box, BoxFormat
from mig_kit.prompts import format_question, reply_boxes_in_original
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample

# Drawn suites are named so wherever a number of theirs stands: a drawn world is no benchmark.
SUITE_NAMES = {"mig_bench": "MIG-Bench-like (drawn)", "ood_grounding": "out of domain (drawn)",
               "blink": "BLINK-like (drawn)", "mmiu": "MMIU-like (drawn)",
               "find_all": "none, one or several (drawn)"}
# the held-out part of real data, by the parameter `data` of 01
HELD_OUT_NAMES = {"own": "own data (held out)", "mgrounding": "MGrounding-630k (held out)"}
# out of domain, by task
OOD_NAMES = {"lisa": "LISA-like (drawn)", "revos": "ReVOS-like (drawn)",
             "mc_bench": "MC-Bench-like (drawn)", "unseen": "unseen things (drawn)"}
SYSTEM_COLOURS = {"base": "#999999", "sft": "#E69F00", "grpo": "#0072B2", "sft_long": "#CC79A7"}
SIDE_COLOURS = {"stock": "#999999", "kit": "#0072B2"}
TARGET, PREDICTED, REFERENCE = "#009E73", "#D55E00", "#CC00CC"
CORRECT = "#0072B2"  # a reply's box among those of other replies


def suite_name(suite: str) -> str:
    """How a suite is called in tables and figures."""
    return (SUITE_NAMES | HELD_OUT_NAMES)[suite]


def set_style() -> None:
    """The look of all figures; call once per notebook."""
    sns.set_theme(style="whitegrid", context="notebook",
                  rc={"figure.figsize": (8, 3.2), "figure.dpi": 110})


def _dashed(pen: ImageDraw.ImageDraw, box: Box, colour: str, width: int, step: int = 10) -> None:
    x1, y1, x2, y2 = box
    for start in range(int(x1), int(x2), step):
        for y in (y1, y2):
            pen.line((start, y, min(start + step // 2, x2), y), fill=colour, width=width)
    for start in range(int(y1), int(y2), step):
        for x in (x1, x2):
            pen.line((x, start, x, min(start + step // 2, y2)), fill=colour, width=width)


def _cut_to_image(box: Box, size: tuple[int, int], margin: int = 10) -> Box:
    """The box with edges that lie far outside an image of `size` moved to `margin` pixels from it.
    """
    return tuple(min(max(value, -margin), limit + margin) for value, limit in zip(box, size * 2))


def draw_sample(sample: Sample, reply: str = "", box_format: BoxFormat | None = None,
                height: int = 200) -> Image.Image:
    """All images of a sample side by side, numbered: targets solid green, the reply's boxes dashed
    orange, reference pink.

    box_format: of the reply; a reply without one is a ValueError. height: of the images, pixels.
    """
    if reply and box_format is None:
        raise ValueError("a reply's box cannot be drawn without its box_format")
    boxes = reply_boxes_in_original(sample, reply, box_format) if reply else []
    answers = [(image, box, PREDICTED) for image, box in boxes]
    return _draw_images(sample, answers, height)


def _draw_images(sample: Sample, answers: list[tuple[int, Box, str]], height: int) -> Image.Image:
    """answers: image number, box in pixels of its original, colour of its dashes."""
    tiles = []
    for number, image in enumerate(sample.images, 1):
        scale = height / image.height
        size = max(1, round(image.width * scale)), height
        tile = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        pen = ImageDraw.Draw(tile)
        boxes = [(target.box, TARGET, False) for target in sample.targets if target.image == number]
        if number == 1 and sample.reference:
            boxes.append((sample.reference, REFERENCE, False))
        boxes += [(box, colour, True) for image, box, colour in answers if image == number]
        for box, colour, dashed in boxes:
            scaled = tuple(v * scale for v in box)
            if dashed:
                _dashed(pen, _cut_to_image(scaled, size), colour, 3)
            elif scaled[2] > scaled[0] and scaled[3] > scaled[1]:
                pen.rectangle(scaled, outline=colour, width=3)
        tiles.append(tile)
    gap, head = 8, 22
    width = sum(tile.width for tile in tiles) + gap * (len(tiles) + 1)
    sheet = Image.new("RGB", (width, height + head + gap), "white")
    pen, x = ImageDraw.Draw(sheet), gap
    for number, tile in enumerate(tiles, 1):
        pen.text((x, 3), f"Image {number}", fill="#333333", font=ImageFont.load_default(14))
        sheet.paste(tile, (x, head))
        x += tile.width + gap
    return sheet


def plot_bars(rows: list[dict], x: str, y: str, title: str, hue: str | None = None, palette=None,
              interval: str | None = None) -> plt.Figure:
    """A bar per row; interval: the key of a [low, high] pair drawn as an error bar. Returns the
    figure.
    """
    table = pd.DataFrame(rows)
    hues = list(dict.fromkeys(table[hue])) if hue else [None]
    names = list(dict.fromkeys(table[x]))
    figure, axes = plt.subplots(figsize=(max(6.5, 0.62 * len(names) * max(1, len(hues) / 2)), 3.4))
    sns.barplot(table, x=x, y=y, hue=hue, palette=palette, ax=axes, errorbar=None, order=names,
                hue_order=hues if hue else None)
    if interval:
        width = 0.8 / len(hues)
        for index, name in enumerate(names):
            for place, level in enumerate(hues):
                match = table[(table[x] == name) & ((table[hue] == level) if hue else True)]
                if len(match) and match.iloc[0][interval] is not None:
                    low, high = match.iloc[0][interval]
                    at = index - 0.4 + width * (place + 0.5)
                    axes.plot([at, at], [low, high], color="#222222", linewidth=1.2)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(xlabel="", ylabel=y)
    axes.tick_params(axis="x", rotation=30 if max(map(len, map(str, names))) > 8 else 0)
    plt.setp(axes.get_xticklabels(), ha="right" if max(map(len, map(str, names))) > 8 else "center")
    if hue:
        axes.legend(frameon=False, ncols=len(hues), loc="upper right", bbox_to_anchor=(1, 1.17),
                    fontsize=9)
    figure.tight_layout()
    return figure


def plot_curves(rows: list[dict], names: list[str], title: str, smooth: int = 1, x: str = "step"):
    """One small panel per name over x; a faint line for the values, a strong one for their running
    mean over `smooth`.
    """
    table = pd.DataFrame(rows)
    names = [n for n in names if n in table and table[n].notna().any()]
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.4 * lines), squeeze=False)
    for axis, name in zip(axes.flat, names):
        values = table[[x, name]].dropna().astype(float)
        if smooth > 1:
            axis.plot(values[x], values[name], color="#0072B2", alpha=0.25, linewidth=1)
        means = values[name].rolling(smooth, min_periods=1).mean()
        axis.plot(values[x], means, color="#0072B2", linewidth=2)
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(x, fontsize=9)
    for axis in list(axes.flat)[len(names):]:
        axis.set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    return figure


def plot_stacked(counts: dict[str, dict[str, int]], title: str):
    """Horizontal stacked bars: a bar per outer key, a piece per inner key that counts anything."""
    table = pd.DataFrame(counts).T.fillna(0)
    table = table.loc[:, table.any()]
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(table) + 1.3))
    colours = sns.color_palette("colorblind", len(table.columns))
    table.plot.barh(stacked=True, ax=axes, color=colours, width=0.75)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, ncols=min(4, len(table.columns)), loc="upper center", fontsize=9,
                # 0.3 inches below the axis, whatever its height
                bbox_to_anchor=(0.45, -0.3 / (0.34 * len(table) + 0.2)))
    figure.tight_layout()
    return figure


def plot_groups(rows: list[dict]) -> plt.Figure:
    """A panel per suite: a point with its interval per group, a line at the reference's score.

    rows: {suite, group, is_reference, value, low, high}, percent.
    """
    table = pd.DataFrame(rows)
    names, groups = (list(dict.fromkeys(table[column])) for column in ("suite", "group"))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(lines, columns, squeeze=False, sharey=True,
                                figsize=(3 * columns, lines * (0.9 + 0.28 * len(groups))))
    for axis, name in zip(axes.flat, names):
        for place, group in enumerate(groups):
            row = table[(table["suite"] == name) & (table["group"] == group)].iloc[0]
            colour = "#222222" if row["is_reference"] else "#0072B2"
            axis.plot([row["low"], row["high"]], [place, place], color=colour, linewidth=1.6)
            axis.plot(row["value"], place, "o", color=colour, markersize=5)
            if row["is_reference"]:
                axis.axvline(row["value"], color="#999999", linewidth=1, zorder=0)
        axis.set_title(name, fontsize=10)
        axis.set_yticks(range(len(groups)), groups, fontsize=9)
        axis.tick_params(axis="x", labelsize=9)
        axis.set_ylim(len(groups) - 0.5, -0.5)
    for axis in list(axes.flat)[len(names):]:
        axis.set_visible(False)
    figure.suptitle("GRPO model, greedy, percent, with 95 % intervals", fontsize=11, x=0.01,
                    ha="left")
    figure.tight_layout()
    return figure


def plot_speedup(rows: list[dict], title: str):
    """Four panels over images' tokens, replies, tokens of a reply and prompts; a line per stage.
    rows: of `benchmark.sweep`.
    """
    table = pd.DataFrame(rows)
    usual = {key: table[key].mode()[0] for key in ("images", "group", "tokens", "prompts")}
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.9), sharey=True)
    panels = (("images", "prompt_tokens", "tokens of the prompt"),
              ("group", "group", "replies to a prompt"),
              ("tokens", "tokens", "tokens of a reply"),
              ("prompts", "prompts", "prompts of a step"))
    for axis, (key, x, label) in zip(axes, panels):
        is_usual = [all(row[other] == usual[other] for other in usual if other != key)
                    for _, row in table.iterrows()]
        part = table[is_usual]
        sns.lineplot(part, x=x, y="ratio", hue="stage", style="stage", markers=True,
                     dashes=False, palette="colorblind", ax=axis,
                     errorbar=None, legend=axis is axes[0])
        axis.axhline(1, color="#555555", linewidth=1)
        axis.set(xlabel=label, ylabel="times as fast", xticks=sorted(part[x].unique()))
    axes[0].set_ylim(0, 1.08 * max(1, table["ratio"].max()))  # of all panels, which share it
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=9, ncol=2,
                  loc="upper right")
    axes[0].get_legend().remove()
    figure.suptitle(title, fontsize=11, x=0.06, ha="left")
    figure.tight_layout()
    return figure


def draw_replies(sample: Sample, replies: dict[str, str], box_format: BoxFormat,
                 height: int = 150) -> Image.Image:
    """The question, and below it per system its reply with its box on the images.

    replies: system -> reply. height: of the images, pixels.
    """
    font, bold = ImageFont.load_default(15), ImageFont.load_default(17)
    question = format_question(sample, box_format, with_instruction=False)
    rows = [(draw_sample(sample, reply, box_format, height), f"{system}: {reply}",
             TARGET if is_correct(reply, sample, box_format) else PREDICTED)
            for system, reply in replies.items()]
    width = max(sheet.width for sheet, _, _ in rows)
    characters = width // 8
    texts = [textwrap.fill(text, characters) for _, text, _ in rows]
    heights = [sheet.height + 20 * (text.count("\n") + 1) + 18
               for (sheet, _, _), text in zip(rows, texts)]
    page = Image.new("RGB", (width + 16, 40 + sum(heights)), "white")
    pen, top = ImageDraw.Draw(page), 40
    pen.text((12, 10), question, fill="#111111", font=bold)
    for (sheet, _, colour), text, row_height in zip(rows, texts, heights):
        page.paste(sheet, (8, top))
        pen.multiline_text((16, top + sheet.height), text, fill="#222222", font=font)
        pen.rectangle((0, top, 5, top + row_height - 12), fill=colour)
        top += row_height
    return page


def draw_rollouts(sample: Sample, rows: list[dict], box_format: BoxFormat, height: int = 110,
                  steps: int = 6) -> Image.Image:
    """The replies to one question over the updates of a training: per update the images with the
    boxes of all replies, dashed blue where correct and orange where not, and the first reply.

    rows: {step, reply, reward, correct, image, box} each, of a question for all boxes with "boxes",
    (image, box) pairs, in place of the last two. steps: how many updates are shown at most, the
    first and the last among them.
    """
    by_step: dict[int, list[dict]] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    picked = [list(by_step)[index] for index in _spread_indices(len(by_step), steps)]
    parts = [_draw_step(sample, step, by_step[step], height) for step in picked]
    bold = ImageFont.load_default(16)
    question = format_question(sample, box_format, with_instruction=False)
    width = max(part.width for part in parts)
    title = textwrap.fill(question, width // 9)
    head = 22 * (title.count("\n") + 1) + 12
    page = Image.new("RGB", (width, head + sum(part.height for part in parts)), "white")
    ImageDraw.Draw(page).multiline_text((8, 8), title, fill="#111111", font=bold)
    for part in parts:
        page.paste(part, (0, head))
        head += part.height
    return page


def _spread_indices(count: int, most: int) -> list[int]:
    """At most `most` of the indices below `count`, evenly spread from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _draw_step(sample: Sample, step: int, rows: list[dict], height: int) -> Image.Image:
    """The images with the boxes of the replies of one update, a line about them, and a reply."""
    colours = {True: CORRECT, False: PREDICTED}
    answers = [(image, tuple(box), colours[row["correct"]]) for row in rows
               for image, box in row.get("boxes") or [(row.get("image"), row.get("box"))] if box]
    sheet = _draw_images(sample, answers, height)
    n_correct = sum(row["correct"] for row in rows)
    reward = sum(row["reward"] for row in rows) / len(rows)
    line = f"update {step}: {n_correct} of {len(rows)} correct, mean reward {reward:.2f}"
    width = max(sheet.width, 560)
    reply = textwrap.shorten(rows[0]["reply"], 400, placeholder=" ...")
    text = textwrap.fill(f'first reply: "{reply}"', width // 7)
    size = sheet.height + 22 + 18 * (text.count("\n") + 1) + 14
    part = Image.new("RGB", (width, size), "white")
    pen = ImageDraw.Draw(part)
    pen.line((8, 0, width - 8, 0), fill="#CCCCCC")
    pen.text((8, 4), line, fill="#111111", font=ImageFont.load_default(14))
    part.paste(sheet, (0, 22))
    below = 8, 22 + sheet.height
    pen.multiline_text(below, text, fill="#333333", font=ImageFont.load_default(13))
    return part


def plot_shares(rows: list[dict], names: list[str], title: str, smooth: int = 10,
                x: str = "step") -> plt.Figure:
    """Shares that add up to 1, stacked over x, as running means over `smooth`; the legend has the
    means of the first and the last rows. Rows without shares are left out.
    """
    table = pd.DataFrame(rows).dropna(subset=names)
    means = table[names].astype(float).rolling(smooth, min_periods=1).mean() * 100
    figure, axis = plt.subplots(figsize=(7, 3))
    colours = sns.color_palette("colorblind", len(names))
    ends = means.iloc[[min(smooth, len(means)) - 1, -1]]
    labels = [f"{name} {ends[name].iloc[0]:.0f} to {ends[name].iloc[1]:.0f} %" for name in names]
    axis.stackplot(table[x], *(means[name] for name in names), labels=labels, colors=colours,
                   alpha=0.85)
    axis.legend(frameon=False, reverse=True, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    axis.set(ylim=(0, 100), xlim=(table[x].min(), table[x].max()), xlabel=x, ylabel="% of replies")
    axis.set_title(title, loc="left", fontsize=11)
    figure.tight_layout()
    return figure
