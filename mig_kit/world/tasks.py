"""The ten MIG-Bench tasks over drawn scenes (Migician, arXiv 2501.05767), by official key.

A split owns the samples whose content hashes to it, so no two splits share one.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mig_kit.boxes import Box
from mig_kit.prompts import LETTERS
from mig_kit.sample import Sample, Target
from mig_kit.world.scenes import (
    COLOURS,
    PLAIN,
    SHAPES,
    UNSEEN_PAIRS,
    Appearance,
    Object,
    Scene,
    World,
    are_separate,
    change_viewpoint,
    crop_scene,
    object_name,
    random_size,
    render_scene,
    round_box,
)

SPLITS = ("base", "cot", "rl", "val", "test")


@dataclass(frozen=True)
class SampleSpec:
    """A sample before it is drawn; see `sample.Sample` for the fields without a comment."""

    scenes: list[Scene]
    question: str
    answers: Sequence[tuple[int, str]] = ()  # (image number, name of the object)
    finding: str = ""
    notes: Sequence[str] = ()
    reference: str = ""  # name of an object in image 1
    options: tuple[str, ...] = ()
    letter: str = ""
    box: Box | None = None  # the target's, if it is not the object's own


TaskFunction = Callable[[random.Random, World], SampleSpec]


def list_image_note(number: int, scene: Scene) -> str:
    """A note that lists an image: "image 2: red star, blue ring."."""
    return f"image {number}: {', '.join(scene.names())}."


def list_image_notes(scenes: list[Scene]) -> list[str]:
    """A note for every image, in order."""
    return [list_image_note(number, scene) for number, scene in enumerate(scenes, 1)]


def reference_note(name: str) -> str:
    """A note that says what the reference box holds."""
    return f"image 1: the box holds {name}."


def shuffle_options(rng: random.Random, correct: str, wrong: list[str]) -> dict:
    """{"options", "letter"} of a `SampleSpec`: options in random order, and the correct letter."""
    return letter_options(rng.sample([correct, *wrong], 1 + len(wrong)), correct)


def letter_options(options: Sequence[str], correct: str) -> dict:
    """{"options", "letter"} of a `SampleSpec`, in this order."""
    return {"options": tuple(options), "letter": LETTERS[options.index(correct)]}


def swap_appearance(rng: random.Random, scene: Scene, world: World) -> tuple[Scene, str]:
    """The scene with a new appearance for one of its objects, and that object's new name."""
    taken = {obj.appearance for obj in scene.objects}
    appearance = world.pick_appearances(rng, 1)[0]
    while appearance in taken:
        appearance = world.pick_appearances(rng, 1)[0]
    index = rng.randrange(len(scene.objects))
    objects = list(scene.objects)
    objects[index] = Object(*appearance, objects[index].box)
    return replace(scene, objects=tuple(objects)), object_name(appearance)


def _ask_for_new_object(rng: random.Random, first: Scene, second: Scene, world: World,
                        questions: list[str]) -> SampleSpec:
    """A question for the object of image 2 that is given a new appearance here."""
    second, name = swap_appearance(rng, second, world)
    return SampleSpec([first, second], rng.choice(questions), [(2, name)], f"new: {name}.",
                      list_image_notes([first, second]))


def diff(rng: random.Random, world: World) -> SampleSpec:
    """Static difference: two images, the same but for one object."""
    first = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(3, 4)))
    return _ask_for_new_object(rng, first, first, world, [
        "Find what changed in image 2.", "Which thing in image 2 is not in image 1?",
        "Where does image 2 differ from image 1?"])


def view_diff(rng: random.Random, world: World) -> SampleSpec:
    """Robust difference: the viewpoint moved, and one object really changed."""
    second = None
    while second is None:
        first = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(3, 4)))
        second = change_viewpoint(rng, first)
    return _ask_for_new_object(rng, first, second, world, [
        "The view moved and one thing changed. Find it in image 2.",
        "Image 2 is another view of image 1. Which thing is new in image 2?",
        "Despite the new view, where does image 2 differ from image 1?"])


def common_object(rng: random.Random, world: World) -> SampleSpec:
    """One object is in every image; find it in image k."""
    count = rng.randint(3, 5)
    shared, *others = world.pick_appearances(rng, 2 + count)
    while True:
        chosen = [[shared, *rng.sample(others, rng.randint(1, 2))] for _ in range(count)]
        if not any(all(other in appearances for appearances in chosen) for other in others):
            break
    scenes = [world.arrange_scene(rng, appearances) for appearances in chosen]
    k = rng.randint(1, count)
    question = rng.choice([f"Which thing is in every image? Find it in image {k}.",
                           f"Find the common thing of all images in image {k}.",
                           f"One thing is in all images. Where is it in image {k}?"])
    name = object_name(shared)
    return SampleSpec(scenes, question, [(k, name)], f"in all: {name}.", list_image_notes(scenes))


def _change_one_attribute(rng: random.Random, appearance: Appearance, world: World) -> Appearance:
    """Another appearance that shares two of its three attributes with `appearance`."""
    other_pattern = "plain" if appearance.pattern == "striped" else "striped"
    options = [appearance._replace(pattern=other_pattern)]
    options += [appearance._replace(shape=shape) for shape in SHAPES if shape != appearance.shape]
    options += [appearance._replace(colour=colour) for colour in COLOURS
                if colour != appearance.colour]
    return rng.choice([option for option in options
                       if (option[:2] in UNSEEN_PAIRS) == world.unseen
                       or option[:2] == appearance[:2]])


def moving_frames(rng: random.Random, first: Scene, count: int) -> list[Scene] | None:
    """A video in which each object keeps its own pace; None if objects collide or leave it."""
    steps = [(rng.uniform(-8, 8), rng.uniform(-8, 8)) for _ in first.objects]
    frames = [first]
    for i in range(1, count):
        objects = []
        for obj, (dx, dy) in zip(first.objects, steps):
            x1, y1, x2, y2 = obj.box
            box = round_box((x1 + dx * i, y1 + dy * i, x2 + dx * i, y2 + dy * i))
            objects.append(replace(obj, box=box))
        frames.append(replace(first, objects=tuple(objects)))
        if not are_separate(frames[-1]):
            return None
    return frames


def object_tracking(rng: random.Random, world: World) -> SampleSpec:
    """Six frames, look-alike distractors; the reference is boxed in the text and in frame 1."""
    frames = None
    while frames is None:
        appearance = world.pick_appearances(rng, 1)[0]
        appearances = [appearance, _change_one_attribute(rng, appearance, world)]
        if rng.random() < 0.5:
            appearances.append(_change_one_attribute(rng, appearance, world))
        if len(set(appearances)) < len(appearances):
            continue
        frames = moving_frames(rng, world.arrange_scene(rng, appearances), 6)
    target, k = frames[0].objects[0], rng.randint(2, 6)
    frames[0] = replace(frames[0], mark=target.box)
    question = rng.choice([
        f"Follow the thing at {{ref}} in image 1. Where is it in image {k}?",
        f"Track the marked thing at {{ref}} of image 1 to image {k}.",
        f"These are frames of a film. Find the thing at {{ref}} of image 1 in image {k}."])
    return SampleSpec(frames, question, [(k, target.name)], f"the same: {target.name}.",
                      [reference_note(target.name), list_image_note(k, frames[k - 1])],
                      reference=target.name)


def multi_view(rng: random.Random, world: World) -> SampleSpec:
    """Two to six views of one place; find the reference of view 1 in view k."""
    while True:
        scene = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(2, 4)))
        views = [change_viewpoint(rng, scene) for _ in range(rng.randint(1, 5))]
        if all(views):
            break
    target, k = rng.choice(scene.objects), rng.randint(2, len(views) + 1)
    scenes = [scene, *views]
    question = rng.choice([
        f"The images are views of one place. Find the thing at {{ref}} of image 1 in image {k}.",
        f"Where is the thing at {{ref}} of image 1 in the view of image {k}?",
        f"Find the thing at {{ref}} of image 1 again in image {k}."])
    return SampleSpec(scenes, question, [(k, target.name)], f"the same: {target.name}.",
                      [reference_note(target.name), list_image_note(k, scenes[k - 1])],
                      reference=target.name)


def region(rng: random.Random, world: World) -> SampleSpec:
    """Image 1 is the source, the others are magnified parts of it; find where part k was cut."""
    scene = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(3, 5)))
    chosen = rng.sample(scene.objects, rng.randint(1, 3))
    windows = []
    for obj in chosen:
        margin = rng.uniform(0.5, 2.5)
        x1, y1, x2, y2 = obj.box
        windows.append(round_box((max(0, x1 - margin), max(0, y1 - margin),
                                  min(scene.width, x2 + margin), min(scene.height, y2 + margin))))
    scenes = [scene, *(crop_scene(scene, window, random_size(rng)) for window in windows)]
    k = rng.randint(2, len(scenes))
    name = chosen[k - 2].name
    question = rng.choice([f"Image {k} is a part of image 1. Find it in image 1.",
                           f"Which region of image 1 does image {k} show?",
                           f"Where in image 1 was image {k} cut out?"])
    return SampleSpec(scenes, question, [(1, name)], f"the part: {name}.",
                      [f"image {k}: {name}.", list_image_note(1, scene)], box=windows[k - 2])


def refer_grounding(rng: random.Random, world: World) -> SampleSpec:
    """Image 1 shows one object; find it among others in image 2."""
    appearances = world.pick_appearances(rng, rng.randint(3, 5))
    first = world.arrange_scene(rng, appearances[:1], sides=(20, 34))
    second = world.arrange_scene(rng, appearances)
    name = object_name(appearances[0])
    question = rng.choice(["Find the thing of image 1 in image 2.",
                           "Image 1 shows a thing. Where is it in image 2?",
                           "Which thing in image 2 is the one of image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"the same: {name}.",
                      list_image_notes([first, second]))


def make_scenes_with_holder(rng: random.Random, world: World, fewest: int,
                            most: int) -> tuple[list[Scene], int, str]:
    """`fewest` to `most` scenes, the number of the only one that shows an object, and its name."""
    count = rng.randint(fewest, most)
    wanted, *others = world.pick_appearances(rng, count + 3)
    k = rng.randint(1, count)
    chosen = [rng.sample(others, rng.randint(2, 3)) for _ in range(count)]
    chosen[k - 1][0] = wanted
    scenes = [world.arrange_scene(rng, appearances) for appearances in chosen]
    return scenes, k, object_name(wanted)


def group_grounding(rng: random.Random, world: World) -> SampleSpec:
    """Three to five images; find the named object, which only one of them shows."""
    scenes, k, name = make_scenes_with_holder(rng, world, 3, 5)
    question = rng.choice([f"Find the {name}.", f"Which image shows the {name}? Find it.",
                           f"One image shows the {name}. Where is it?"])
    return SampleSpec(scenes, question, [(k, name)], f"{name}: image {k}.",
                      list_image_notes(scenes))


EXTREMES = {
    "leftmost": lambda obj: -obj.centre[0],
    "rightmost": lambda obj: obj.centre[0],
    "top": lambda obj: -obj.centre[1],
    "bottom": lambda obj: obj.centre[1],
    "largest": lambda obj: obj.side,
    "smallest": lambda obj: -obj.side,
}


def find_extreme(scene: Scene, which: str) -> Object | None:
    """The object that is first by one of EXTREMES; None unless it leads by 5 pixels."""
    measure = EXTREMES[which]
    ranked = sorted(scene.objects, key=measure, reverse=True)
    if len(ranked) > 1 and measure(ranked[0]) - measure(ranked[1]) < 5:
        return None
    return ranked[0]


def pick_match_and_others(rng: random.Random, appearance: Appearance, attribute: int,
                          count: int) -> list[Appearance]:
    """`count` appearances, of which only the first shares one attribute with `appearance`.

    attribute: 0 for colour, 1 for shape. The first differs from `appearance` in the other one.
    """
    while True:
        # of seen pairs only, because no two unseen ones share a colour or a shape
        match, *others = PLAIN.pick_appearances(rng, count)
        is_match = match[attribute] == appearance[attribute] and match[:2] != appearance[:2]
        if is_match and all(other[attribute] != appearance[attribute] for other in others):
            return [match, *others]


def reasoning(rng: random.Random, world: World) -> SampleSpec:
    """A relation in image 1 names an attribute that singles out an object of image 2."""
    which = rng.choice(list(EXTREMES))
    anchor = None
    while anchor is None:
        first = world.arrange_scene(rng, world.pick_appearances(rng, rng.randint(2, 4)))
        anchor = find_extreme(first, which)
    attribute = rng.randint(0, 1)
    word = Appearance._fields[attribute]
    appearances = pick_match_and_others(rng, anchor.appearance, attribute, rng.randint(3, 4))
    second = world.arrange_scene(rng, appearances)
    name = object_name(appearances[0])
    question = rng.choice([
        f"Which thing in image 2 has the {word} of the {which} thing in image 1?",
        f"Find the thing in image 2 with the same {word} as the {which} thing in image 1.",
        f"The {which} thing in image 1 has a {word}. Which thing in image 2 has it too?"])
    return SampleSpec([first, second], question, [(2, name)], f"same {word}: {name}.",
                      [f"image 1: the {which} is {anchor.name}.", list_image_note(2, second)])


def correspondence(rng: random.Random, world: World) -> SampleSpec:
    """Find what has the shape of image 1's reference in image 2, in another colour."""
    appearances = world.pick_appearances(rng, rng.randint(2, 4))
    first = world.arrange_scene(rng, appearances)
    target = first.objects[0]
    second_appearances = pick_match_and_others(rng, target.appearance, 1, rng.randint(3, 4))
    second = world.arrange_scene(rng, second_appearances)
    name = second.objects[0].name
    question = rng.choice([
        "Which thing in image 2 plays the part of the thing at {ref} in image 1?",
        "Find the partner of the thing at {ref} in image 1 in image 2.",
        "What in image 2 is to its image as the thing at {ref} is to image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"same shape: {name}.",
                      [reference_note(target.name), list_image_note(2, second)],
                      reference=target.name)


TASKS: dict[str, TaskFunction] = {task.__name__: task for task in (
    diff, view_diff, common_object, object_tracking, multi_view, region, refer_grounding,
    group_grounding, reasoning, correspondence)}


def owning_split(spec: SampleSpec) -> str:
    """The split that owns a spec, by a hash of its names and boxes."""
    content = repr([[(obj.name, obj.box) for obj in scene.objects] for scene in spec.scenes])
    return SPLITS[zlib.crc32(content.encode()) % len(SPLITS)]


def make_spec(task_function: TaskFunction, key: str, split: str, index: int, seed: int,
              worlds: Sequence[World] = (PLAIN,)) -> SampleSpec:
    """The spec that (seed, key, split, index) names; indices draw from `worlds` in turn.

    It is redrawn until the split owns it. Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split '{split}'; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{key}/{split}/{index}")
    while True:
        spec = task_function(rng, worlds[index % len(worlds)])
        if owning_split(spec) == split:
            return spec


def render_sample(spec: SampleSpec, suite: str, task: str, split: str, index: int) -> Sample:
    """The sample of a spec: its scenes are drawn, and names become boxes."""
    targets = []
    for number, name in spec.answers:
        box = spec.box or spec.scenes[number - 1].find(name).box
        targets.append(Target(number, box))
    reference = spec.scenes[0].find(spec.reference).box if spec.reference else None
    return Sample(
        id=f"{suite}/{task}/{split}/{index}", suite=suite, task=task, split=split,
        images=tuple(render_scene(scene) for scene in spec.scenes), question=spec.question,
        targets=tuple(targets), reference=reference, options=spec.options, letter=spec.letter,
        notes=tuple(spec.notes), finding=spec.finding, spec=spec)


def make_sample(task: str, split: str, index: int, seed: int = 0) -> Sample:
    """Sample number `index` of a task and split; ValueError if either is unknown."""
    if task not in TASKS:
        raise ValueError(f"no task '{task}'; the tasks are {', '.join(TASKS)}")
    spec = make_spec(TASKS[task], task, split, index, seed)
    return render_sample(spec, "mig_bench", task, split, index)
