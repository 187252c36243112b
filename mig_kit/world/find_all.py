"""Questions for all boxes: the named object is in no image, in one, or in several.

No stage and no suite has them unless a parameter asks for them (`cot_find_all_per_task` and
`rl_find_all_per_task` of 01, `find_all_per_task` of 06). The three kinds share their questions, the
numbers of images and of objects, so that only the images tell how many boxes there are.
"""

import random
from collections.abc import Iterator
from functools import partial

from mig_kit.sample import Sample
from mig_kit.world.scenes import object_name
from mig_kit.world.specs import SampleSpec, TaskFunction, World, list_image_notes
from mig_kit.world.tasks import draw_spec, render_sample

SUITE = "find_all"
QUESTIONS = ("Find every {}.", "Where is each {}?", "Find the {} in all images.")


def find_named(rng: random.Random, world: World, fewest: int, most: int) -> SampleSpec:
    """Two or three images with two or three objects each; the named one is in `fewest` to `most` of
    them.
    """
    count = rng.randint(2, 3)
    wanted, *others = world.draw_appearances(rng, 6)
    holders = sorted(rng.sample(range(1, count + 1), rng.randint(fewest, min(most, count))))
    scenes = []
    for number in range(1, count + 1):
        shown = rng.sample(others, rng.randint(2, 3))
        if number in holders:
            shown[rng.randrange(len(shown))] = wanted
        scenes.append(world.arrange_scene(rng, shown))
    name = object_name(wanted)
    places = ", ".join(f"image {number}" for number in holders or [0])
    return SampleSpec(scenes, rng.choice(QUESTIONS).format(name),
                      [(number, name) for number in holders], f"{name}: {places}.",
                      list_image_notes(scenes), find_all=True)


# The keys stand in the ids of samples and in the seeds that they are drawn with.
FIND_ALL: dict[str, TaskFunction] = {
    "in_none": partial(find_named, fewest=0, most=0),
    "in_one": partial(find_named, fewest=1, most=1),
    "in_several": partial(find_named, fewest=2, most=3)}


def draw_find_all(split: str, per_task: int, seed: int = 0) -> Iterator[Sample]:
    """`per_task` questions of each of FIND_ALL, drawn as they are asked for.

    ValueError for an unknown split.
    """
    for task, task_function in FIND_ALL.items():
        for index in range(per_task):
            spec = draw_spec(task_function, f"{SUITE}/{task}", split, index, seed, World())
            yield render_sample(spec, SUITE, task, split, index)
