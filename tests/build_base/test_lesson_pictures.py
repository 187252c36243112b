"""What the tiny base sees, and when: read back from the pictures."""

import random

import numpy as np
from matplotlib import pyplot as plt
from PIL import ImageColor

from mig_kit.build_base import curriculum, lesson_pictures
from mig_kit.palette import FRAME
from mig_kit.world import lessons


def test_cells_are_ruled():
    scenes = lessons.album(random.Random(0), 2)
    picture = lesson_pictures.draw_cells(scenes, 84)
    assert picture.height == 84
    assert (np.asarray(picture) == ImageColor.getrgb(FRAME)).all(-1).sum() > 84


def test_the_first_course_begins_with_one_image():
    figure = lesson_pictures.plot_courses({curriculum.SEEING: 800, curriculum.COMBINING: 300})
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    images = lines["images of a dialogue, at most"]
    steps, counts = map(list, images.get_data())
    assert counts[0] == 1 and counts[-1] == 6 and max(steps) < 1100
    assert counts[next(i for i, step in enumerate(steps) if step >= 250)] == 3
    plt.close(figure)
