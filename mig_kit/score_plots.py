"""Pictures that explain a score: what an IoU looks like, what a bootstrap draws, what seeds add."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.stats import t as student_t

from mig_kit.boxes import Box, iou
from mig_kit.palette import CORRECT, INK, MUTED, PREDICTED
from mig_kit.pictures import DASHES, draw_boxes
from mig_kit.plots import WIDTH
from mig_kit.sample import Sample, Target

OVERLAPS = (0.3, 0.4, 0.5, 0.7, 0.9)


def shift_to_iou(box: Box, wanted: float) -> Box:
    """The box moved to the right until its IoU with where it was is `wanted`, 0..1.

    Moved by a share s of its width it overlaps itself in 1 - s of 1 + s, so s is
    (1 - IoU) / (1 + IoU).
    """
    x1, y1, x2, y2 = box
    shift = (x2 - x1) * (1 - wanted) / (1 + wanted)
    return x1 + shift, y1, x2 + shift, y2


def draw_overlaps(sample: Sample, overlaps: tuple[float, ...] = OVERLAPS, threshold: float = 0.5,
                  height: int = 120) -> Image.Image:
    """The target once per IoU, with a box of that IoU: blue where it reaches the threshold, orange
    where it does not.

    sample: of a question with a target; height: of a cut-out, pixels.
    """
    number, box = sample.targets[0]
    x1, y1, x2, y2 = box
    width, tall = x2 - x1, y2 - y1
    window = tuple(round(edge) for edge in (x1 - 0.3 * width, y1 - 0.3 * tall,
                                            x2 + 0.7 * width, y2 + 0.3 * tall))
    cut_out = Image.new("RGB", (window[2] - window[0], window[3] - window[1]), "white")
    cut_out.paste(sample.images[number - 1].convert("RGB"), (-window[0], -window[1]))
    target = (x1 - window[0], y1 - window[1], x2 - window[0], y2 - window[1])
    alone = replace(sample, images=(cut_out,), targets=(Target(1, target),), reference=None)
    tiles = []
    for wanted in overlaps:
        moved = shift_to_iou(target, wanted)
        is_right = iou(target, moved) >= threshold - 1e-9
        colour = CORRECT if is_right else PREDICTED
        tile = draw_boxes(alone, [(1, moved, colour, DASHES)], height)
        pen = ImageDraw.Draw(tile)
        pen.rectangle((0, 0, tile.width, 20), fill="white")
        pen.text((10, 3), f"IoU {wanted:.1f}: {'correct' if is_right else 'wrong'}", fill=INK,
                 font=ImageFont.load_default(14))
        tiles.append(tile)
    sheet = Image.new("RGB", (sum(tile.width for tile in tiles), tiles[0].height), "white")
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width
    return sheet


def plot_resamples(means: np.ndarray, interval: list[float], title: str) -> plt.Figure:
    """How often the resamples of a bootstrap have which score, with the bounds that keep 95 %.

    means: (resamples,) of the score, 0..1. interval: [low, high], 0..1.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    values, counts = np.unique(np.round(100 * means, 1), return_counts=True)
    inside = (values >= 100 * interval[0] - 0.05) & (values <= 100 * interval[1] + 0.05)
    width = 0.8 * (np.diff(values).min() if len(values) > 1 else 1)
    axes.bar(values[inside], counts[inside], width, color=CORRECT, label="within the 95 %")
    axes.bar(values[~inside], counts[~inside], width, color=PREDICTED, hatch="//",
             edgecolor="white", label="cut off, 2.5 % on either side")
    axes.axvline(100 * means.mean(), color=INK, linewidth=1.5, linestyle="--", label="mean")
    axes.set(xlabel="score of a resample, percent", ylabel="resamples")
    axes.set_title(title, loc="left", fontsize=11)
    figure.legend(frameon=False, ncols=3, fontsize=9, loc="outside lower center")
    return figure


def plot_seed_widths(seeds: tuple[int, ...] = (2, 3, 4, 5, 6, 8, 10)) -> plt.Figure:
    """Half the width of a 95 % interval over seeds, in standard deviations of a seed's score, by
    the number of seeds: Student's t, and the normal value that few seeds make too narrow.
    """
    counts = np.array(seeds)
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
    axes.set_title("What is left open after so many seeds", loc="left", fontsize=11)
    figure.legend(frameon=False, ncols=2, fontsize=9, loc="outside lower center")
    return figure
