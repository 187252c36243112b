"""What is drawn: the suites of the evaluation, and the mix that the stages train on.

Each suite but the unseen things is the tiny world's counterpart of a benchmark. Only the questions
of MIG-Bench are asked in a training split too.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mig_kit.boxes import Box, iou
from mig_kit.sample import Sample
from mig_kit.world.free_form import BOX_FORMS, FREE_FORM
from mig_kit.world.scenes import (
    PLAIN,
    Appearance,
    Scene,
    World,
    crop_scene,
    object_name,
    random_size,
)
from mig_kit.world.tasks import (
    TASKS,
    SampleSpec,
    TaskFunction,
    find_extreme,
    letter_options,
    make_spec,
    moving_frames,
    pick_match_and_others,
    render_sample,
    shuffle_options,
    swap_appearance,
)


def lisa_like(rng: random.Random, world: World) -> SampleSpec:
    """LISA: one image and a query that describes its object without naming it."""
    while True:
        kind = rng.choice(["shares", "pattern", "extreme"])
        appearances = world.pick_appearances(rng, rng.randint(3, 5))
        scene = world.arrange_scene(rng, appearances)
        if kind == "shares":
            attribute = rng.randint(0, 1)
            question, matches = _ask_for_same_attribute(appearances, attribute)
        elif kind == "pattern":
            question = "Find the striped thing."
            matches = [object_name(appearance) for appearance in appearances
                       if appearance.pattern == "striped"]
        else:
            which = rng.choice(["leftmost", "rightmost", "largest", "smallest"])
            question = f"Find the {which} thing."
            extreme = find_extreme(scene, which)
            matches = [extreme.name] if extreme else []
        if len(matches) == 1:
            return SampleSpec([scene], question, [(1, matches[0])])


def _ask_for_same_attribute(appearances: list[Appearance],
                            attribute: int) -> tuple[str, list[str]]:
    """A question for what shares attribute 0 or 1 (colour, shape) with the first; its answers."""
    first, *others = appearances
    word = Appearance._fields[attribute]
    question = f"Which thing has the same {word} as the {object_name(first)}? Find it."
    return question, [object_name(other) for other in others
                      if other[attribute] == first[attribute]]


def revos_like(rng: random.Random, world: World) -> SampleSpec:
    """ReVOS: a video of three or four frames; find in frame 3 what appears, or what stays."""
    while True:
        appearances = world.pick_appearances(rng, rng.randint(3, 4))
        scene = world.arrange_scene(rng, appearances)
        frames = moving_frames(rng, scene, rng.randint(3, 4))
        if frames is None:
            continue
        answers = [(3, object_name(appearances[0]))]
        if rng.random() < 0.5:
            frames[:2] = [replace(frame, objects=frame.objects[1:]) for frame in frames[:2]]
            return SampleSpec(frames, "Which thing is new in image 3? Find it.", answers)
        frames = _hide_all_but_first(rng, frames)
        if frames:
            return SampleSpec(frames, "Find the thing of all frames in image 3.", answers)


def _hide_all_but_first(rng: random.Random, frames: list[Scene]) -> list[Scene] | None:
    """The frames, so that only the first object is in all; None if another one is, too."""
    others = range(1, len(frames[0].objects))
    hidden, remaining = set(), []
    for i, frame in enumerate(frames):
        missing = {j for j in others
                   if (i + j) % len(frames) == 0 or (i == 0 and rng.random() < 0.3)}
        hidden |= missing
        objects = tuple(obj for j, obj in enumerate(frame.objects) if j not in missing)
        remaining.append(replace(frame, objects=objects))
    return remaining if hidden == set(others) else None


def mc_bench_like(rng: random.Random, world: World) -> SampleSpec:
    """MC-Bench: an image pair; the named object is in one, in both, or (one in ten) in neither."""
    wanted, *others = world.pick_appearances(rng, 7)
    numbers = rng.choices([(1,), (2,), (1, 2), ()], (25, 25, 40, 10))[0]
    scenes = []
    for number, three in enumerate((others[:3], others[3:]), 1):
        last = wanted if number in numbers else three[2]
        scenes.append(world.arrange_scene(rng, [*three[:2], last]))
    name = object_name(wanted)
    return SampleSpec(scenes, f"Find the {name} in the images.",
                      [(number, name) for number in numbers])


def count_colour(rng: random.Random, world: World) -> SampleSpec:
    """BLINK, counting: how many objects have a colour."""
    appearances = world.pick_appearances(rng, rng.randint(3, 5))
    colour = appearances[0].colour
    scene = world.arrange_scene(rng, appearances)
    total = sum(obj.colour == colour for obj in scene.objects)
    wrong = [str(count) for count in (1, 2, 3) if count != total]
    return SampleSpec([scene], f"How many {colour} things are in image 1?",
                      **shuffle_options(rng, str(total), wrong))


def jigsaw(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: which of two pieces was cut out of image 1."""
    appearances = world.pick_appearances(rng, 4)
    scene = world.arrange_scene(rng, appearances[:3])
    unrelated = world.arrange_scene(rng, appearances[3:])
    pieces = []
    for source in (scene, unrelated):
        x1, y1, x2, y2 = source.objects[0].box
        window = (max(0, x1 - 2), max(0, y1 - 2),
                  min(source.width, x2 + 2), min(source.height, y2 + 2))
        pieces.append(crop_scene(source, window, random_size(rng)))
    order = rng.sample([0, 1], 2)
    return SampleSpec([scene, *(pieces[i] for i in order)], "Which image is a part of image 1?",
                      **letter_options(("image 2", "image 3"), f"image {order.index(0) + 2}"))


def visual_correspondence(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: which object of image 2 has the shape of the boxed object in image 1."""
    reference = world.pick_appearances(rng, 1)[0]
    candidates = pick_match_and_others(rng, reference, 1, 3)
    distractors = [other for other in world.pick_appearances(rng, 2) if other != reference]
    first = world.arrange_scene(rng, [reference, *distractors])
    correct, *wrong = map(object_name, candidates)
    choice = shuffle_options(rng, correct, wrong)
    second = world.arrange_scene(rng, candidates)
    question = "Which thing in image 2 has the same shape as the thing at {ref} in image 1?"
    return SampleSpec([first, second], question, reference=object_name(reference), **choice)


def relations(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: whether an object is left of another."""
    while True:
        scene = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(2, 4)))
        a, b = scene.objects[:2]
        if abs(a.centre[0] - b.centre[0]) > 6:
            is_left = a.centre[0] < b.centre[0]
            return SampleSpec([scene], f"Is the {a.name} left of the {b.name} in image 1?",
                              **letter_options(("yes", "no"), "yes" if is_left else "no"))


def frame_order(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: objects appear one by one; in which order were the shuffled frames taken."""
    scene = world.arrange_scene(rng, world.pick_appearances(rng, 3))
    frames = [replace(scene, objects=scene.objects[:count]) for count in (1, 2, 3)]
    order = rng.sample([0, 1, 2], 3)
    correct = " ".join(str(order.index(i) + 1) for i in range(3))
    orders = ("1 2 3", "1 3 2", "2 1 3", "2 3 1", "3 1 2", "3 2 1")
    wrong = rng.sample([other for other in orders if other != correct], 2)
    question = ("The images are frames of a film. Every image has one new thing. "
                "Which image is one, two, three?")
    return SampleSpec([frames[i] for i in order], question, **shuffle_options(rng, correct, wrong))


def retrieval(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: which image shows the same objects as image 1."""
    appearances = world.pick_appearances(rng, 8)
    wanted = appearances[:3]
    first = world.arrange_scene(rng, wanted)
    others = [world.arrange_scene(rng, [wanted[rng.randint(0, 2)], *two])
              for two in (appearances[3:5], appearances[5:7])]
    candidates = [world.arrange_scene(rng, wanted), *others]
    order = rng.sample([0, 1, 2], 3)
    return SampleSpec([first, *(candidates[i] for i in order)],
                      "Which image shows the same things as image 1?",
                      **letter_options(("image 2", "image 3", "image 4"),
                                       f"image {order.index(0) + 2}"))


def find_change(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: what is new in image 2."""
    first = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(3, 4)))
    second, name = swap_appearance(rng, first, world)
    unchanged = [other for other in second.names() if other != name]
    return SampleSpec([first, second], "Which thing is new in image 2?",
                      **shuffle_options(rng, name, rng.sample(unchanged, 2)))


Draw = Callable[[str, int, int], SampleSpec]  # (split, index, seed) -> the sample of that number


@dataclass(frozen=True)
class Suite:
    """All that is known of a drawn suite."""

    title: str  # in tables and figures
    tasks: dict[str, Draw]
    default: int  # questions per task in 06 unless `suites` says otherwise


def _draws(tasks: dict[str, TaskFunction], prefix: str = "",
           worlds: Sequence[World] = (PLAIN,)) -> dict[str, Draw]:
    """Name -> what draws a task's samples, from `worlds` in turn."""
    return {name: partial(make_spec, task_function, f"{prefix}{name}", worlds=worlds)
            for name, task_function in tasks.items()}


def _draw_unseen(split: str, index: int, seed: int) -> SampleSpec:
    """The ten tasks in turn, on unseen objects and textured backgrounds."""
    name = list(TASKS)[index % len(TASKS)]
    worlds = [World(unseen=True, textured=True)]
    return make_spec(TASKS[name], f"unseen/{name}", split, index, seed, worlds)


# Candidates for RL: in every second one, objects are too small for most boxes to be right.
CANDIDATE_WORLDS = (PLAIN, World(sides=(5, 12)))
# The names of suites and tasks stand in the ids of samples and in the seeds that they are drawn
# with. A drawn world is no benchmark, so the titles say "(drawn)".
SUITES = {
    "mig_bench": Suite("MIG-Bench-like (drawn)", _draws(TASKS), 100),
    "ood_grounding": Suite(
        "out of domain (drawn)",
        _draws({"lisa": lisa_like, "revos": revos_like, "mc_bench": mc_bench_like})
        | {"unseen": _draw_unseen}, 200),
    "blink": Suite(
        "BLINK-like (drawn)",
        _draws({"counting": count_colour, "jigsaw": jigsaw,
                "visual_correspondence": visual_correspondence, "relations": relations}),
        200),
    "mmiu": Suite(
        "MMIU-like (drawn)",
        _draws({"order": frame_order, "retrieval": retrieval, "change": find_change}),
        260)}
OUT_OF_DOMAIN = "ood_grounding"
OWN = "own"  # the suite of the held-out questions of own data
TASK_TITLES = {"lisa": "LISA-like (drawn)", "revos": "ReVOS-like (drawn)",
               "mc_bench": "MC-Bench-like (drawn)", "unseen": "unseen things (drawn)",
               "naming": "free form: name an object", "showing": "free form: find an image",
               "sharing": "free form: common to all", "choosing": "free form: multiple choice",
               "pointing": "free form: box of a name", "telling": "free form: box of a description",
               "excepting": "free form: the exception", "tallying": "free form: count"}


def suite_title(suite: str) -> str:
    """What tables and figures call a suite: its title if it is drawn or OWN, else its name."""
    if suite == OWN:
        return "own data (held out)"
    return SUITES[suite].title if suite in SUITES else suite


def task_title(task: str) -> str:
    """What tables and figures call a task: one out of domain is a suite of its own."""
    return TASK_TITLES.get(task, task)


def make_suite(suite: str, split: str, per_task: int, seed: int = 0) -> list[Sample]:
    """`per_task` samples of every task of a suite; ValueError for an unknown suite or split."""
    if suite not in SUITES:
        raise ValueError(f"no suite '{suite}'; the suites are {', '.join(SUITES)}")
    return list(_iter_tasks(suite, SUITES[suite].tasks, split, per_task, seed))


def _iter_tasks(suite: str, tasks: Mapping[str, Draw], split: str, per_task: int,
                seed: int) -> Iterator[Sample]:
    return (render_sample(draw(split, index, seed), suite, task, split, index)
            for task, draw in tasks.items() for index in range(per_task))


def iter_free_form(split: str, per_task: int, seed: int = 0, boxes: int | None = None,
                   worlds: Sequence[World] = (PLAIN,)) -> Iterator[Sample]:
    """General questions beside the ten tasks: `per_task` of each kind, drawn as they are asked for.

    boxes: how many of each kind in BOX_FORMS; None for `per_task`. worlds: drawn from in turn.
    """
    for kind, draw in _draws(FREE_FORM, worlds=worlds).items():
        count = boxes if boxes is not None and kind in BOX_FORMS else per_task
        yield from _iter_tasks("free_form", {kind: draw}, split, count, seed)


def iter_training_mix(split: str, per_task: int, free_form_per_task: int, seed: int,
                      boxes: int | None = None,
                      worlds: Sequence[World] = (PLAIN,)) -> Iterator[Sample]:
    """What the stages train on: the ten tasks and general questions.

    boxes: general questions of each kind that asks for a box; None for `free_form_per_task`.
    worlds: what tasks and general questions are drawn from, in turn.
    """
    yield from _iter_tasks("mig_bench", _draws(TASKS, worlds=worlds), split, per_task, seed)
    yield from iter_free_form(split, free_form_per_task, seed, boxes, worlds)


def list_object_boxes(spec: SampleSpec) -> list[list[Box]]:
    """Boxes of all objects, in pixels, per image; a part that is asked for counts as an object."""
    boxes = [[obj.box for obj in scene.objects] for scene in spec.scenes]
    if spec.box:
        for number, _ in spec.answers:
            boxes[number - 1].append(spec.box)
    return boxes


def is_on_target(box: Box, target: Box, objects: list[Box]) -> bool:
    """Whether the box overlaps the target, and no other object more (by IoU)."""
    overlap = iou(box, target)
    return overlap > 0 and overlap >= max((iou(box, other) for other in objects), default=0.0)
