"""Scenes, tasks and suites: exact boxes, every sample on its own, splits that cannot meet."""

import random

import numpy as np
import pytest

from mig_kit.world.scenes import SHAPES, UNSEEN_PAIRS, Object, Scene, are_separate, arrange_objects, draw_scene, random_appearances
from mig_kit.world.suites import SUITES, make_suite, suite_tasks
from mig_kit.world.tasks import SPLITS, TASKS, make_sample


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", ["plain", "striped"])
def test_boxes_are_exact(shape, pattern):
    picture = np.asarray(draw_scene(Scene(84, 84, (Object("blue", shape, pattern, (20.0, 30.0, 44.0, 50.0)),), (255, 255, 255))))
    rows, columns = np.where((picture != 255).any(-1))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(found) - (20, 30, 44, 50)).max() <= 1


def test_things_keep_apart_and_inside():
    rng = random.Random(0)
    assert all(are_separate(arrange_objects(rng, random_appearances(rng, 5))) for _ in range(200))


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_needs_no_other(task):
    alone = make_sample(task, "rl", 7)
    for index in (3, 9):
        make_sample(task, "rl", index)
    again = make_sample(task, "rl", 7)
    assert alone.question == again.question and alone.targets == again.targets
    assert all(a.tobytes() == b.tobytes() for a, b in zip(alone.images, again.images))


def test_splits_cannot_overlap():
    """Across splits and across seeds: a sample's content decides which split owns it."""
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        for seed in (0, 1):
            for task in TASKS:
                for index in range(15):
                    content = b"".join(i.tobytes() for i in make_sample(task, split, index, seed).images)
                    assert seen.setdefault(content, split) == split


def test_the_tasks_mean_what_they_say():
    for index in range(30):
        sample = make_sample("diff", "val", index)
        changed = np.asarray(sample.images[0], int) - np.asarray(sample.images[1], int)
        rows, columns = np.where((changed != 0).any(-1))
        x1, y1, x2, y2 = sample.targets[0][1]
        assert columns.min() >= x1 - 1 and columns.max() < x2 + 1 and rows.min() >= y1 - 1 and rows.max() < y2 + 1
        common = make_sample("common_object", "val", index)
        lists = [note.split(": ")[1].rstrip(".").split(", ") for note in common.notes]
        assert 3 <= len(common.images) <= 5 and set.intersection(*map(set, lists)) == {common.finding.split(": ")[1][:-1]}
        track = make_sample("object_tracking", "val", index)
        assert len(track.images) == 6 and track.reference and "{ref}" in track.question
        group = make_sample("group_grounding", "val", index)
        name = group.finding.split(": image ")[0]
        assert [name in note.split(": ")[1].rstrip(".").split(", ") for note in group.notes].count(True) == 1
        assert make_sample("region", "val", index).targets[0][0] == 1


def test_images_of_one_prompt_differ_in_size():
    assert any(len(set(make_sample("group_grounding", "val", i).sizes)) > 1 for i in range(10))


@pytest.mark.parametrize("suite", SUITES)
def test_suites(suite):
    samples = make_suite(suite, "test", 10)
    assert list(dict.fromkeys(s.task for s in samples)) == suite_tasks(suite)
    assert len({s.id for s in samples}) == len(samples)
    for sample in samples:
        if sample.options:
            assert len(set(sample.options)) == len(sample.options) > "ABCDEFGH".index(sample.letter)
        for number, (x1, y1, x2, y2) in sample.targets:
            width, height = sample.sizes[number - 1]
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


def test_unseen_pairs_are_in_no_training_split():
    for split in ("cot", "rl"):
        words = " ".join(note for task in TASKS for i in range(40) for note in make_sample(task, split, i).notes)
        assert not any(f"{colour} {shape}" in words for colour, shape in UNSEEN_PAIRS)
