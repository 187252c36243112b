"""Specs: notes are read as they are written, and options know their letter."""

import random

from mig_kit.prompts import LETTERS
from mig_kit.world import specs
from mig_kit.world.scenes import Object, Scene


def test_notes_are_read_as_they_are_written():
    star = Object("red", "star", "striped", (2.0, 2.0, 22.0, 22.0))
    ring = Object("blue", "ring", "plain", (40.0, 2.0, 60.0, 22.0))
    note = specs.list_image_note(2, Scene(84, 84, (ring, star)))
    assert note == "image 2: striped red star, blue ring."
    assert specs.names_in_note(note) == ["striped red star", "blue ring"]
    assert specs.count_listed_objects([specs.reference_note("red star"), note]) == 3
    assert specs.count_listed_objects([]) == 0


def test_the_letter_is_that_of_the_correct_option():
    for seed in range(20):
        choice = specs.shuffle_options(random.Random(seed), "two", ["one", "three"])
        options, letter = choice["options"], choice["letter"]
        assert sorted(options) == ["one", "three", "two"]
        assert options[LETTERS.index(letter)] == "two"
