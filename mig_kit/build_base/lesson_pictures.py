"""What the tiny base sees, and in which order it learns (notebook 90), drawn."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw

from mig_kit.build_base.curriculum import Curriculum
from mig_kit.palette import CORRECT, FRAME, INK, PREDICTED
from mig_kit.plots import WIDTH
from mig_kit.world.scenes import Scene, draw_scene, grid_size


def draw_cells(scenes: list[Scene], height: int = 210) -> Image.Image:
    """Scenes side by side, each cut into the cells that become one token; height: pixels."""
    tiles = []
    for scene in scenes:
        width = round(scene.width * height / scene.height)
        tile = draw_scene(scene).resize((width, height), Image.Resampling.LANCZOS)
        pen, (columns, rows) = ImageDraw.Draw(tile), grid_size(scene.width, scene.height)
        for column in range(1, columns):
            pen.line((column * width / columns, 0, column * width / columns, height), fill=FRAME)
        for row in range(1, rows):
            pen.line((0, row * height / rows, width, row * height / rows), fill=FRAME)
        pen.rectangle((0, 0, width - 1, height - 1), outline=INK)
        tiles.append(tile)
    sheet = Image.new("RGB", (sum(tile.width + 12 for tile in tiles) - 12, height), "white")
    left = 0
    for tile in tiles:
        sheet.paste(tile, (left, 0))
        left += tile.width + 12
    return sheet


def plot_courses(courses: Mapping[Curriculum, int], points: int = 200) -> plt.Figure:
    """How many images a dialogue has at most, and how much names weigh, over the language model's
    training; courses: with their steps, in order.
    """
    figure, axes = plt.subplots(figsize=(WIDTH, 2.9), layout="constrained")
    start, places, images, weights = 0, [], [], []
    for course, steps in courses.items():
        for done in np.linspace(0, 1, points, endpoint=False):
            mix = course.plan(done)
            places.append(start + done * steps)
            images.append(mix.max_images)
            weights.append(mix.name_weight)
        axes.axvline(start, color=FRAME, linewidth=1)
        axes.text(start + steps / 2, 7.1, course.name.replace("_", "\n"), ha="center", va="center",
                  fontsize=9, color=INK)
        start += steps
    axes.plot(places, images, color=CORRECT, linewidth=2, label="images of a dialogue, at most")
    axes.plot(places, weights, "--", color=PREDICTED, linewidth=2,
              label="weight of names beside boxes")
    axes.set(xlabel="step of the language model", ylim=(0, 7.8), xlim=(0, start))
    axes.set_title("The curriculum: one image first, boxes before names", loc="left", fontsize=11)
    figure.legend(frameon=False, ncols=2, fontsize=9, loc="outside lower center")
    return figure
