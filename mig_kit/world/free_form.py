"""General questions beside the ten tasks, as MGrounding-630k has them; trained on, in no suite.

They keep a model reading the question, because the number of images alone nearly tells the ten
tasks apart.
"""

import random
from dataclasses import replace

from mig_kit.world.scenes import World, object_name
from mig_kit.world.tasks import (
    TASKS,
    SampleSpec,
    TaskFunction,
    letter_options,
    list_image_note,
    list_image_notes,
    make_scenes_with_holder,
    shuffle_options,
)


def name_object(rng: random.Random, world: World) -> SampleSpec:
    """What is in image k."""
    appearances = world.pick_appearances(rng, 8)
    scenes = [world.arrange_scene(rng, rng.sample(appearances[:6], rng.randint(1, 3)))
              for _ in range(rng.randint(1, 3))]
    k = rng.randint(1, len(scenes))
    visible = scenes[k - 1].names()
    correct = rng.choice(visible)
    absent = [name for name in map(object_name, reversed(appearances)) if name not in visible]
    return SampleSpec(scenes, f"What is in image {k}?", [], f"the same: {correct}.",
                      [list_image_note(k, scenes[k - 1])],
                      **shuffle_options(rng, correct, absent[:rng.randint(1, 2)]))


def find_image(rng: random.Random, world: World) -> SampleSpec:
    """Which image shows the named object."""
    scenes, k, name = make_scenes_with_holder(rng, world, 2, 4)
    return SampleSpec(scenes, f"Which image shows the {name}?", [], f"{name}: image {k}.",
                      list_image_notes(scenes), **_pick_images(rng, k, len(scenes)))


def _pick_images(rng: random.Random, k: int, count: int) -> dict:
    """Two or more of `count` images as options, in order; image k is correct."""
    # two at times, and a letter need not be its image's number: else a model learns to answer C
    # where only A and B are offered
    others = [number for number in range(1, count + 1) if number != k]
    numbers = sorted([k, *rng.sample(others, rng.randint(1, len(others)))])
    return letter_options([f"image {number}" for number in numbers], f"image {k}")


def common_to_all(rng: random.Random, world: World) -> SampleSpec:
    """Which object is in every image."""
    shared, *others = world.pick_appearances(rng, 5)
    scenes = [world.arrange_scene(rng, [shared, others[i]]) for i in range(rng.randint(2, 3))]
    wrong = [object_name(other) for other in others[:rng.randint(1, 2)]]
    return SampleSpec(scenes, "Which thing is in every image?", [],
                      f"in all: {object_name(shared)}.", list_image_notes(scenes),
                      **shuffle_options(rng, object_name(shared), wrong))


def task_as_choice(rng: random.Random, world: World) -> SampleSpec:
    """A question of the ten tasks with options: objects, or images for group_grounding."""
    task = rng.choice(list(TASKS))
    spec = TASKS[task](rng, world)
    (k, correct), = spec.answers
    if task == "group_grounding":
        choice = _pick_images(rng, k, len(spec.scenes))
    else:
        wrong = [name for name in spec.scenes[k - 1].names() if name != correct]
        wrong = rng.sample(wrong, min(rng.randint(1, 2), len(wrong)))
        choice = shuffle_options(rng, correct, wrong)
    return replace(spec, answers=[], box=None, **choice)


def locate_named(rng: random.Random, world: World) -> SampleSpec:
    """A box of the named object, wherever it is in one to four images."""
    count = rng.choice((1, 1, 1, 2, 3, 4))
    wanted, *others = world.pick_appearances(rng, 9)
    chosen = [rng.sample(others, rng.randint(2, 4)) for _ in range(count)]
    certain = rng.randint(1, count)
    extra = [number for number in range(1, count + 1) if rng.random() < 0.2]
    numbers = sorted({certain, *extra})
    for number in numbers:
        appearances = chosen[number - 1]
        appearances[rng.randrange(len(appearances))] = wanted
    scenes = [world.arrange_scene(rng, appearances) for appearances in chosen]
    name = object_name(wanted)
    question = rng.choice([f"Where is the {name}?", f"Point at the {name}.",
                           f"Look for the {name}."])
    return SampleSpec(scenes, question, [(number, name) for number in numbers],
                      f"{name}: image {numbers[0]}.", list_image_notes(scenes))


def locate_described(rng: random.Random, world: World) -> SampleSpec:
    """A box of an image's only object of a colour or a shape, in one of one to three images."""
    count = rng.choice((1, 1, 1, 1, 2, 3))
    k, attribute = rng.randint(1, count), rng.randint(0, 1)
    while True:
        scenes = [world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(2, 4)))
                  for _ in range(count)]
        candidates = scenes[k - 1].objects
        target = rng.choice(candidates)
        word = target.appearance[attribute]
        if sum(word == obj.appearance[attribute] for obj in candidates) == 1:
            break
    place = f" in image {k}" if count > 1 else ""
    description = f"{word} thing" if attribute == 0 else word
    question = rng.choice([f"Where is the {description}{place}?",
                           f"Point at the {description}{place}."])
    return SampleSpec(scenes, question, [(k, target.name)], f"{target.name}: image {k}.",
                      [list_image_note(k, scenes[k - 1])])


def locate_exception(rng: random.Random, world: World) -> SampleSpec:
    """A box of the only object of image k that no other of two to four images shows."""
    count = rng.choice((2, 3, 3, 4, 4))
    k = rng.randint(1, count)
    wanted, *others = world.pick_appearances(rng, rng.randint(4, 5))
    shared = others[:rng.randint(1, 2)]
    scenes = []
    for number in range(1, count + 1):
        shown = [*shared, *rng.sample(others[len(shared):], rng.randint(0, 1))]
        scenes.append(world.arrange_scene(rng, [wanted, *shared] if number == k else shown))
    name = object_name(wanted)
    question = rng.choice([f"Which thing is in image {k} only?",
                           f"What does image {k} show that no other image shows?"])
    return SampleSpec(scenes, question, [(k, name)], f"new: {name}.", list_image_notes(scenes))


def count_objects(rng: random.Random, world: World) -> SampleSpec:
    """How many objects, or how many striped ones, are in image k."""
    scenes = [world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(1, 4)))
              for _ in range(rng.randint(1, 3))]
    k = rng.randint(1, len(scenes))
    objects = scenes[k - 1].objects
    question, word, total = rng.choice([
        (f"How many things are in image {k}?", "things", len(objects)),
        (f"How many things of image {k} are striped?", "striped",
         sum(obj.appearance.pattern == "striped" for obj in objects))])
    wrong = rng.sample([str(count) for count in range(5) if count != total], rng.randint(1, 2))
    return SampleSpec(scenes, question, [], f"{word}: {total}.",
                      [list_image_note(k, scenes[k - 1])],
                      **shuffle_options(rng, str(total), wrong))


# The keys stand in the ids of samples and in the seeds that they are drawn with. No suite asks one
# word for word, but some are near: "choosing" to changes and shapes, "pointing" to image pairs,
# "telling" to single images, "excepting" to a film's new object, "tallying" to counting.
FREE_FORM: dict[str, TaskFunction] = {
    "naming": name_object, "showing": find_image, "sharing": common_to_all,
    "choosing": task_as_choice, "pointing": locate_named, "telling": locate_described,
    "excepting": locate_exception, "tallying": count_objects}
BOX_FORMS = ("pointing", "telling", "excepting")  # the kinds whose answer is a box
