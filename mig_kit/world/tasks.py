"""The ten MIG-Bench tasks over drawn scenes, under their official keys (Migician, arXiv 2501.05767).

`make(task, split, index, seed)` draws any sample alone. A split owns the samples whose content hashes to it, so two
splits cannot hold the same sample, whatever the seeds.
"""

import random
import zlib
from dataclasses import dataclass, replace

from mig_kit.sample import Sample
from mig_kit.world.scenes import (
    COLOURS,
    SHAPES,
    UNSEEN_PAIRS,
    Object,
    Scene,
    are_separate,
    arrange_objects,
    change_viewpoint,
    crop_scene,
    draw_scene,
    object_name,
    random_appearances,
    random_size,
    round_box,
)

SPLITS = ("base", "cot", "rl", "val", "test")


@dataclass(frozen=True)
class World:
    """What a suite draws from: seen or unseen shape-colour pairs, plain or textured backgrounds."""

    unseen: bool = False
    textured: bool = False

    def looks(self, rng: random.Random, count: int) -> list[tuple[str, str, str]]:
        """`count` different (colour, shape, pattern)."""
        return random_appearances(rng, count, self.unseen)

    def scene(self, rng: random.Random, looks, size=None, **options) -> Scene:
        """A scene with one thing per look."""
        return arrange_objects(rng, looks, size, self.textured, **options)


@dataclass(frozen=True)
class SampleSpec:
    """A sample before it is drawn. answers: (image number, name of the thing) pairs."""

    scenes: list[Scene]
    question: str
    answers: list[tuple[int, str]]
    finding: str
    notes: list[str]
    reference: str = ""
    options: tuple[str, ...] = ()
    letter: str = ""
    box: tuple[float, float, float, float] | None = None


def list_image_note(number: int, scene: Scene) -> str:
    """A note that lists an image: "image 2: red star, blue ring."."""
    return f"image {number}: {', '.join(scene.names())}."


def reference_note(name: str) -> str:
    """A note that says what the reference box holds."""
    return f"image 1: the box holds {name}."


def swap_appearance(rng: random.Random, scene: Scene, world: World) -> tuple[Scene, str]:
    """The scene with one thing's look replaced by a new one; the new name."""
    taken = [(t.colour, t.shape, t.pattern) for t in scene.things]
    look = next(look for look in iter(lambda: world.looks(rng, 1)[0], None) if look not in taken)
    place = rng.randrange(len(scene.things))
    things = list(scene.things)
    things[place] = Object(*look, things[place].box)
    return replace(scene, things=tuple(things)), object_name(look)


def diff(rng: random.Random, world: World) -> SampleSpec:
    """Static difference: two pictures, the same but for one thing."""
    first = world.scene(rng, world.looks(rng, rng.randint(3, 4)))
    second, name = swap_appearance(rng, first, world)
    question = rng.choice(["Find what changed in image 2.", "Which thing in image 2 is not in image 1?",
                           "Where does image 2 differ from image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"new: {name}.", [list_image_note(1, first), list_image_note(2, second)])


def view_diff(rng: random.Random, world: World) -> SampleSpec:
    """Robust difference: the viewpoint moved, and one thing really changed."""
    second = None
    while second is None:
        first = world.scene(rng, world.looks(rng, rng.randint(3, 4)))
        second = change_viewpoint(rng, first, random_size(rng))
    second, name = swap_appearance(rng, second, world)
    question = rng.choice(["The view moved and one thing changed. Find it in image 2.",
                           "Image 2 is another view of image 1. Which thing is new in image 2?",
                           "Despite the new view, where does image 2 differ from image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"new: {name}.", [list_image_note(1, first), list_image_note(2, second)])


def common_object(rng: random.Random, world: World) -> SampleSpec:
    """One thing is in every picture; find it in picture k."""
    count = rng.randint(3, 5)
    looks = world.looks(rng, 2 + count)
    shared, rest = looks[0], looks[1:]
    while True:
        chosen = [[shared, *rng.sample(rest, rng.randint(1, 2))] for _ in range(count)]
        if not any(all(look in picture for picture in chosen) for look in rest):
            break
    scenes = [world.scene(rng, picture) for picture in chosen]
    k = rng.randint(1, count)
    question = rng.choice([f"Which thing is in every image? Find it in image {k}.",
                           f"Find the common thing of all images in image {k}.",
                           f"One thing is in all images. Where is it in image {k}?"])
    return SampleSpec(scenes, question, [(k, object_name(shared))], f"in all: {object_name(shared)}.",
                 [list_image_note(i, s) for i, s in enumerate(scenes, 1)])


def _similar_appearance(rng: random.Random, look: tuple[str, str, str], world: World) -> tuple[str, str, str]:
    """Another look that shares two of the three attributes with `look`."""
    options = [(look[0], look[1], "plain" if look[2] == "striped" else "striped")]
    options += [(look[0], shape, look[2]) for shape in SHAPES if shape != look[1]]
    options += [(colour, look[1], look[2]) for colour in COLOURS if colour != look[0]]
    return rng.choice([o for o in options if (o[:2] in UNSEEN_PAIRS) == world.unseen or o[:2] == look[:2]])


def moving_frames(rng: random.Random, first: Scene, count: int) -> list[Scene] | None:
    """`count` frames in which every thing of `first` moves on at its own steady pace; None if they would collide."""
    pace = [(rng.uniform(-8, 8), rng.uniform(-8, 8)) for _ in first.things]
    film = [first]
    for step in range(1, count):
        things = tuple(
            replace(t, box=round_box((t.box[0] + dx * step, t.box[1] + dy * step, t.box[2] + dx * step, t.box[3] + dy * step)))
            for t, (dx, dy) in zip(first.things, pace))
        film.append(replace(first, things=things))
        if not are_separate(film[-1]):
            return None
    return film


def object_tracking(rng: random.Random, world: World) -> SampleSpec:
    """Six frames, moving things, look-alike distractors; the reference is boxed in the text and in frame 1."""
    film = None
    while film is None:
        look = world.looks(rng, 1)[0]
        looks = [look, _similar_appearance(rng, look, world)]
        if rng.random() < 0.5:
            looks.append(_similar_appearance(rng, look, world))
        if len(set(looks)) < len(looks):
            continue
        film = moving_frames(rng, world.scene(rng, looks), 6)
    target, k = film[0].things[0], rng.randint(2, 6)
    film[0] = replace(film[0], mark=target.box)
    question = rng.choice([f"Follow the thing at {{ref}} in image 1. Where is it in image {k}?",
                           f"Track the marked thing at {{ref}} of image 1 to image {k}.",
                           f"These are frames of a film. Find the thing at {{ref}} of image 1 in image {k}."])
    return SampleSpec(film, question, [(k, target.name)], f"the same: {target.name}.",
                 [reference_note(target.name), list_image_note(k, film[k - 1])], target.name)


def multi_view(rng: random.Random, world: World) -> SampleSpec:
    """Two to six views of one place; find the reference of view 1 in view k."""
    while True:
        scene = world.scene(rng, world.looks(rng, rng.randint(2, 4)))
        views = [change_viewpoint(rng, scene, random_size(rng)) for _ in range(rng.randint(1, 5))]
        if all(views):
            break
    target, k = rng.choice(scene.things), rng.randint(2, len(views) + 1)
    pictures = [scene, *views]
    question = rng.choice([f"The images are views of one place. Find the thing at {{ref}} of image 1 in image {k}.",
                           f"Where is the thing at {{ref}} of image 1 in the view of image {k}?",
                           f"Find the thing at {{ref}} of image 1 again in image {k}."])
    return SampleSpec(pictures, question, [(k, target.name)], f"the same: {target.name}.",
                 [reference_note(target.name), list_image_note(k, pictures[k - 1])], target.name)


def region(rng: random.Random, world: World) -> SampleSpec:
    """Image 1 is the source, the others are parts of it blown up; find where one of them was cut."""
    scene = world.scene(rng, world.looks(rng, rng.randint(3, 5)))
    chosen = rng.sample(scene.things, rng.randint(1, 3))
    windows = []
    for thing in chosen:
        margin = rng.uniform(0.5, 2.5)
        x1, y1, x2, y2 = thing.box
        windows.append(round_box((max(0, x1 - margin), max(0, y1 - margin), min(scene.width, x2 + margin),
                                min(scene.height, y2 + margin))))
    pictures = [scene, *(crop_scene(scene, window, random_size(rng)) for window in windows)]
    k = rng.randint(2, len(pictures))
    name = chosen[k - 2].name
    question = rng.choice([f"Image {k} is a part of image 1. Find it in image 1.",
                           f"Which region of image 1 does image {k} show?",
                           f"Where in image 1 was image {k} cut out?"])
    return SampleSpec(pictures, question, [(1, name)], f"the part: {name}.", [f"image {k}: {name}.", list_image_note(1, scene)],
                 box=windows[k - 2])


def refer_grounding(rng: random.Random, world: World) -> SampleSpec:
    """Image 1 shows one thing; find it among others in image 2."""
    looks = world.looks(rng, rng.randint(3, 5))
    first = world.scene(rng, looks[:1], sides=(20, 34))
    second = world.scene(rng, looks)
    name = object_name(looks[0])
    question = rng.choice(["Find the thing of image 1 in image 2.", "Image 1 shows a thing. Where is it in image 2?",
                           "Which thing in image 2 is the one of image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"the same: {name}.", [list_image_note(1, first), list_image_note(2, second)])


def group_grounding(rng: random.Random, world: World) -> SampleSpec:
    """Three to five pictures; find the named thing, which only one of them shows."""
    count = rng.randint(3, 5)
    looks = world.looks(rng, count + 3)
    k = rng.randint(1, count)
    chosen = [rng.sample(looks[1:], rng.randint(2, 3)) for _ in range(count)]
    chosen[k - 1][0] = looks[0]
    scenes = [world.scene(rng, picture) for picture in chosen]
    name = object_name(looks[0])
    question = rng.choice([f"Find the {name}.", f"Which image shows the {name}? Find it.",
                           f"One image has a {name}. Where is it?"])
    return SampleSpec(scenes, question, [(k, name)], f"{name}: image {k}.", [list_image_note(i, s) for i, s in enumerate(scenes, 1)])


EXTREMES = {
    "leftmost": lambda t: -t.centre[0], "rightmost": lambda t: t.centre[0], "top": lambda t: -t.centre[1],
    "bottom": lambda t: t.centre[1], "largest": lambda t: t.side, "smallest": lambda t: -t.side,
}


def find_extreme(scene: Scene, which: str, margin: float = 5.0) -> Object | None:
    """The leftmost, rightmost, top, bottom, largest or smallest thing; None unless it leads by `margin` pixels."""
    ranked = sorted(scene.things, key=EXTREMES[which], reverse=True)
    if len(ranked) > 1 and EXTREMES[which](ranked[0]) - EXTREMES[which](ranked[1]) < margin:
        return None
    return ranked[0]


def similar_appearances(rng: random.Random, look, attribute: int, count: int) -> list[tuple[str, str, str]]:
    """`count` looks, the first alone in sharing attribute 0 (colour) or 1 (shape) with `look`, and different from it.

    Every unseen pair has a colour and a shape of its own, so what shares one with it comes from the seen pairs.
    """
    while True:
        looks = random_appearances(rng, count)
        if (looks[0][attribute] == look[attribute] and looks[0][:2] != look[:2]
                and all(other[attribute] != look[attribute] for other in looks[1:])):
            return looks


def reasoning(rng: random.Random, world: World) -> SampleSpec:
    """A relation in image 1 names an attribute that singles out a thing of image 2."""
    which = rng.choice(list(EXTREMES))
    anchor = None
    while anchor is None:
        first = world.scene(rng, world.looks(rng, rng.randint(2, 4)))
        anchor = find_extreme(first, which)
    attribute = rng.randint(0, 1)
    word = ("colour", "shape")[attribute]
    looks = similar_appearances(rng, (anchor.colour, anchor.shape, anchor.pattern), attribute, rng.randint(3, 4))
    second = world.scene(rng, looks)
    name = object_name(looks[0])
    question = rng.choice([f"Which thing in image 2 has the {word} of the {which} thing in image 1?",
                           f"Find the thing in image 2 with the same {word} as the {which} thing in image 1.",
                           f"The {which} thing in image 1 has a {word}. Which thing in image 2 has it too?"])
    return SampleSpec([first, second], question, [(2, name)], f"same {word}: {name}.",
                 [f"image 1: the {which} is {anchor.name}.", list_image_note(2, second)])


def correspondence(rng: random.Random, world: World) -> SampleSpec:
    """The reference of image 1 plays a part (its shape); find what plays it in image 2, in another colour."""
    looks = world.looks(rng, rng.randint(2, 4))
    first = world.scene(rng, looks)
    target = first.things[0]
    second = world.scene(rng, similar_appearances(rng, looks[0], 1, rng.randint(3, 4)))
    name = second.things[0].name
    question = rng.choice(["Which thing in image 2 plays the part of the thing at {ref} in image 1?",
                           "Find the partner of the thing at {ref} in image 1 in image 2.",
                           "What in image 2 is to its image as the thing at {ref} is to image 1?"])
    return SampleSpec([first, second], question, [(2, name)], f"same shape: {name}.",
                 [reference_note(target.name), list_image_note(2, second)], target.name)


TASKS = {task.__name__: task for task in (
    diff, view_diff, common_object, object_tracking, multi_view, region, refer_grounding, group_grounding, reasoning,
    correspondence)}


def render_sample(draft: SampleSpec, suite: str, task: str, split: str, index: int) -> Sample:
    """Draw a draft: scenes become pictures, names become boxes."""
    targets = tuple((k, draft.box or draft.scenes[k - 1].find(name).box) for k, name in draft.answers)
    reference = draft.scenes[0].find(draft.reference).box if draft.reference else None
    return Sample(
        id=f"{suite}/{task}/{split}/{index}", suite=suite, task=task, split=split,
        images=tuple(draw_scene(scene) for scene in draft.scenes), question=draft.question, targets=targets,
        reference=reference, options=draft.options, letter=draft.letter, notes=tuple(draft.notes), finding=draft.finding)


def owning_split(draft: SampleSpec) -> str:
    """The split that owns a draft: a hash of its things and boxes, so that no two splits can share a sample."""
    content = repr([[(t.name, t.box) for t in scene.things] for scene in draft.scenes])
    return SPLITS[zlib.crc32(content.encode()) % len(SPLITS)]


def draw_spec(maker, key: str, split: str, index: int, seed: int, world: World) -> SampleSpec:
    """The draft that (seed, split, index) names: redrawn until the split owns it."""
    if split not in SPLITS:
        raise ValueError(f"no split '{split}'; the splits are {', '.join(SPLITS)}")
    rng = random.Random(f"{seed}/{key}/{split}/{index}")
    while True:
        draft = maker(rng, world)
        if owning_split(draft) == split:
            return draft


def make_sample(task: str, split: str, index: int, seed: int = 0) -> Sample:
    """Sample number `index` of a task and split, drawn from (seed, split, index) alone."""
    if task not in TASKS:
        raise ValueError(f"no task '{task}'; the tasks are {', '.join(TASKS)}")
    return render_sample(draw_spec(TASKS[task], task, split, index, seed, World()), "mig_bench", task, split, index)
