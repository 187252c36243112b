"""Scenes: boxes are exact, objects keep apart, and names read in order."""

import random

import numpy as np
import pytest

from mig_kit.world import scenes
from mig_kit.world.scenes import Appearance, Object, Scene

WHITE = (255, 255, 255)


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("pattern", scenes.PATTERNS)
def test_boxes_are_exact(shape, pattern):
    obj = Object("blue", shape, pattern, (20.0, 30.0, 44.0, 50.0))
    pixels = np.asarray(scenes.render_scene(Scene(84, 84, (obj,), WHITE)))
    rows, columns = np.where((pixels != 255).any(-1))
    drawn_box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    assert np.abs(drawn_box - obj.box).max() <= 1


def test_what_is_not_separate():
    def scene(*boxes):
        return Scene(84, 84, tuple(Object("red", "circle", "plain", box) for box in boxes))

    assert scenes.are_separate(scene((1, 1, 20, 20), (40, 40, 60, 60)))
    assert not scenes.are_separate(scene((1, 1, 20, 20), (19, 1, 40, 20))), "they overlap"
    assert not scenes.are_separate(scene((1, 1, 9, 9), (12, 12, 20, 20))), "they share a cell"
    assert not scenes.are_separate(scene((70, 1, 85, 20))), "it leaves the image"


def test_names_and_cells_in_reading_order():
    assert scenes.object_name(Appearance("red", "star", "striped")) == "striped red star"
    low = Object("red", "star", "plain", (2.0, 60.0, 22.0, 80.0))
    right = Object("blue", "ring", "plain", (60.0, 2.0, 80.0, 22.0))
    left = Object("green", "cross", "plain", (2.0, 6.0, 22.0, 26.0))
    scene = Scene(84, 84, (low, right, left))
    assert scene.names() == ["green cross", "blue ring", "red star"]
    assert [scenes.object_cell(scene, obj) for obj in scene.objects] == [(0, 2), (2, 0), (0, 0)]
    assert scene.find("blue ring") is right
    with pytest.raises(KeyError):
        scene.find("red ring")


def test_a_crop_by_hand():
    inside = Object("red", "star", "plain", (20.0, 20.0, 30.0, 40.0))
    outside = Object("blue", "ring", "plain", (60.0, 60.0, 80.0, 80.0))
    crop = scenes.crop_scene(Scene(84, 84, (inside, outside)), (10, 10, 40, 50), (60, 80))
    assert (crop.width, crop.height) == (60, 80)
    assert [obj.box for obj in crop.objects] == [(20.0, 20.0, 40.0, 60.0)]


def test_seen_and_unseen_pairs_do_not_mix():
    rng = random.Random(0)
    for unseen in (False, True):
        appearances = scenes.World(unseen).pick_appearances(rng, 10)
        assert all((pair[:2] in scenes.UNSEEN_PAIRS) == unseen for pair in appearances)
