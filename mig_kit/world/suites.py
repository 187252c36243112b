"""The other suites of the evaluation: out-of-domain grounding, and multiple-choice perception.

Each is the tiny world's counterpart of a benchmark the paper reports: LISA (implicit queries in one image), ReVOS (film,
answered in the third frame), MC-Bench (image pairs), the ten tasks on unseen things and textures; BLINK and MMIU.
None of their questions is asked in any training split.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from mig_kit.sample import Sample
from mig_kit.world.scenes import crop_scene, object_name, random_size
from mig_kit.world.tasks import (
    TASKS,
    SampleSpec,
    World,
    draw_spec,
    find_extreme,
    list_image_note,
    make_sample,
    moving_frames,
    render_sample,
    similar_appearances,
    swap_appearance,
)


def lisa_like(rng: random.Random, world: World) -> SampleSpec:
    """One picture and a query that describes its thing without naming it."""
    while True:
        kind = rng.choice(["shares", "pattern", "extreme"])
        looks = world.looks(rng, rng.randint(3, 5))
        scene = world.scene(rng, looks)
        if kind == "shares":
            attribute = rng.randint(0, 1)
            mates = [look for look in looks[1:] if look[attribute] == looks[0][attribute]]
            if len(mates) == 1:
                word = ("colour", "shape")[attribute]
                question = f"Which thing has the same {word} as the {object_name(looks[0])}? Find it."
                return SampleSpec([scene], question, [(1, object_name(mates[0]))], "", [])
        elif kind == "pattern":
            striped = [look for look in looks if look[2] == "striped"]
            if len(striped) == 1:
                return SampleSpec([scene], "Find the striped thing.", [(1, object_name(striped[0]))], "", [])
        else:
            which = rng.choice(["leftmost", "rightmost", "largest", "smallest"])
            found = find_extreme(scene, which)
            if found:
                return SampleSpec([scene], f"Find the {which} thing.", [(1, found.name)], "", [])


def revos_like(rng: random.Random, world: World) -> SampleSpec:
    """A film of three or four frames; the thing that appears, or the one that stays, boxed in frame 3."""
    while True:
        looks = world.looks(rng, rng.randint(3, 4))
        film = moving_frames(rng, world.scene(rng, looks), rng.randint(3, 4))
        if film is None:
            continue
        if rng.random() < 0.5:
            film = [replace(f, things=f.things[1:]) if i < 2 else f for i, f in enumerate(film)]
            return SampleSpec(film, "Which thing is new in image 3? Find it.", [(3, object_name(looks[0]))], "", [])
        gone = 0
        shown = []
        for i, frame in enumerate(film):  # every thing but the first is missing from one frame or more
            missing = {j for j in range(1, len(looks)) if (i + j) % len(film) == 0 or (i == 0 and rng.random() < 0.3)}
            gone |= sum(1 << j for j in missing)
            shown.append(replace(frame, things=tuple(t for j, t in enumerate(frame.things) if j not in missing)))
        if gone == sum(1 << j for j in range(1, len(looks))):
            return SampleSpec(shown, "Find the thing of all frames in image 3.", [(3, object_name(looks[0]))], "", [])


def mc_bench_like(rng: random.Random, world: World) -> SampleSpec:
    """An image pair; the thing asked for is in one image, in both, or (one in ten) in neither."""
    looks = world.looks(rng, 7)
    where = rng.choices([(1,), (2,), (1, 2), ()], (25, 25, 40, 10))[0]
    scenes = [world.scene(rng, [*looks[1 + 3 * i:3 + 3 * i], looks[0] if i + 1 in where else looks[3 + 3 * i]]) for i in (0, 1)]
    question = f"Find the {object_name(looks[0])} in the images."
    return SampleSpec(scenes, question, [(k, object_name(looks[0])) for k in where], "", [])


def _shuffled_options(rng: random.Random, right: str, wrong: list[str]) -> tuple[tuple[str, ...], str]:
    """Options in random order, and the letter of the right one."""
    options = rng.sample([right, *wrong], 1 + len(wrong))
    return tuple(options), "ABCDEFGH"[options.index(right)]


def counting(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: how many things of a colour."""
    colour_look, *looks = world.looks(rng, rng.randint(3, 5))
    colour = colour_look[0]
    scene = world.scene(rng, [colour_look, *looks])
    total = sum(t.colour == colour for t in scene.things)
    options, letter = _shuffled_options(rng, str(total), [str(n) for n in (1, 2, 3) if n != total])
    return SampleSpec([scene], f"How many {colour} things are in image 1?", [], "", [], options=options, letter=letter)


def jigsaw(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: which of two pieces was cut out of image 1."""
    looks = world.looks(rng, 4)
    scene, other = world.scene(rng, looks[:3]), world.scene(rng, [looks[3]])
    pieces = []
    for source in (scene, other):
        x1, y1, x2, y2 = source.things[0].box
        pieces.append(crop_scene(source, (max(0, x1 - 2), max(0, y1 - 2), min(source.width, x2 + 2), min(source.height, y2 + 2)),
                              random_size(rng)))
    order = rng.sample([0, 1], 2)
    return SampleSpec([scene, *(pieces[i] for i in order)], "Which image is a part of image 1?", [], "", [],
                 options=("image 2", "image 3"), letter="AB"[order.index(0)])


def visual_correspondence(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: which thing of image 2 has the shape of the boxed thing in image 1."""
    look = world.looks(rng, 1)[0]
    others = similar_appearances(rng, look, 1, 3)
    first = world.scene(rng, [look, *(o for o in world.looks(rng, 2) if o != look)])
    options, letter = _shuffled_options(rng, object_name(others[0]), [object_name(o) for o in others[1:]])
    return SampleSpec([first, world.scene(rng, others)], "Which thing in image 2 has the same shape as the thing at {ref} in image 1?",
                 [], "", [], object_name(look), options, letter)


def relations(rng: random.Random, world: World) -> SampleSpec:
    """BLINK: is one thing left of another."""
    while True:
        scene = world.scene(rng, world.looks(rng, rng.randint(2, 4)))
        a, b = scene.things[:2]
        if abs(a.centre[0] - b.centre[0]) > 6:
            right = "yes" if a.centre[0] < b.centre[0] else "no"
            return SampleSpec([scene], f"Is the {a.name} left of the {b.name} in image 1?", [], "", [],
                         options=("yes", "no"), letter="AB"[right == "no"])


def frame_order(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: things come one by one; in which order were the shuffled frames taken."""
    scene = world.scene(rng, world.looks(rng, 3))
    film = [replace(scene, things=scene.things[:n]) for n in (1, 2, 3)]
    shuffle = rng.sample([0, 1, 2], 3)
    right = " ".join(str(shuffle.index(n) + 1) for n in range(3))
    wrong = [w for w in ("1 2 3", "1 3 2", "2 1 3", "2 3 1", "3 1 2", "3 2 1") if w != right]
    options, letter = _shuffled_options(rng, right, rng.sample(wrong, 2))
    question = "The images are frames of a film. Every image has one new thing. Which image is one, two, three?"
    return SampleSpec([film[n] for n in shuffle], question, [], "", [], options=options, letter=letter)


def retrieval(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: which image shows the same things as image 1."""
    looks = world.looks(rng, 8)
    first = world.scene(rng, looks[:3])
    others = [world.scene(rng, [looks[rng.randint(0, 2)], *looks[3 + 2 * i:5 + 2 * i]]) for i in (0, 1)]
    images = [world.scene(rng, looks[:3]), *others]
    shuffle = rng.sample([0, 1, 2], 3)
    return SampleSpec([first, *(images[i] for i in shuffle)], "Which image shows the same things as image 1?", [], "", [],
                 options=("image 2", "image 3", "image 4"), letter="ABC"[shuffle.index(0)])


def find_change(rng: random.Random, world: World) -> SampleSpec:
    """MMIU: what is new in image 2."""
    first = world.scene(rng, world.looks(rng, rng.randint(3, 4)))
    second, name = swap_appearance(rng, first, world)
    kept = [n for n in second.names() if n != name]
    options, letter = _shuffled_options(rng, name, rng.sample(kept, 2))
    return SampleSpec([first, second], "Which thing is new in image 2?", [], "", [], options=options, letter=letter)


def name_object(rng: random.Random, world: World) -> SampleSpec:
    """Free form: what is in image k."""
    looks = world.looks(rng, 8)
    scenes = [world.scene(rng, rng.sample(looks[:6], rng.randint(1, 3))) for _ in range(rng.randint(1, 3))]
    k = rng.randint(1, len(scenes))
    right = rng.choice(scenes[k - 1].names())
    options, letter = _shuffled_options(rng, right, [n for n in map(object_name, reversed(looks)) if n not in scenes[k - 1].names()][:2])
    return SampleSpec(scenes, f"What is in image {k}?", [], f"the same: {right}.", [list_image_note(k, scenes[k - 1])], options=options,
                 letter=letter)


def find_image(rng: random.Random, world: World) -> SampleSpec:
    """Free form: which image shows the named thing."""
    count = rng.randint(2, 4)
    looks = world.looks(rng, count + 3)
    k = rng.randint(1, count)
    chosen = [rng.sample(looks[1:], rng.randint(2, 3)) for _ in range(count)]
    chosen[k - 1][0] = looks[0]
    scenes = [world.scene(rng, picture) for picture in chosen]
    return SampleSpec(scenes, f"Which image shows the {object_name(looks[0])}?", [], f"{object_name(looks[0])}: image {k}.",
                 [list_image_note(i, s) for i, s in enumerate(scenes, 1)], options=tuple(f"image {i}" for i in range(1, count + 1)),
                 letter="ABCD"[k - 1])


def common_to_all(rng: random.Random, world: World) -> SampleSpec:
    """Free form: which thing is in every image."""
    looks = world.looks(rng, 5)
    scenes = [world.scene(rng, [looks[0], looks[1 + i]]) for i in range(rng.randint(2, 3))]
    options, letter = _shuffled_options(rng, object_name(looks[0]), [object_name(looks[1]), object_name(looks[2])])
    return SampleSpec(scenes, "Which thing is in every image?", [], f"in all: {object_name(looks[0])}.",
                 [list_image_note(i, s) for i, s in enumerate(scenes, 1)], options=options, letter=letter)


def task_as_choice(rng: random.Random, world: World) -> SampleSpec:
    """Free form: a question of the ten tasks, with things (or, where any image may be the one, images) to choose from."""
    task = rng.choice(list(TASKS))
    draft = TASKS[task](rng, world)
    (k, right), = draft.answers
    if task == "group_grounding":
        options, letter = tuple(f"image {i}" for i in range(1, len(draft.scenes) + 1)), "ABCDE"[k - 1]
    else:
        others = [name for name in draft.scenes[k - 1].names() if name != right]
        options, letter = _shuffled_options(rng, right, rng.sample(others, min(2, len(others))))
    return replace(draft, answers=[], box=None, options=options, letter=letter)


def locate_named(rng: random.Random, world: World) -> SampleSpec:
    """Free form: the named thing, wherever it is, in one to four images; a box, not a letter."""
    count = rng.choice((1, 1, 1, 2, 3, 4))
    looks = world.looks(rng, 9)
    chosen = [rng.sample(looks[1:], rng.randint(2, 4)) for _ in range(count)]
    where = sorted({rng.randint(1, count), *(k for k in range(1, count + 1) if rng.random() < 0.2)})
    for k in where:
        chosen[k - 1][rng.randrange(len(chosen[k - 1]))] = looks[0]
    scenes, name = [world.scene(rng, picture) for picture in chosen], object_name(looks[0])
    question = rng.choice([f"Where is the {name}?", f"Point at the {name}.", f"Look for the {name}."])
    return SampleSpec(scenes, question, [(k, name) for k in where], f"{name}: image {where[0]}.",
                 [list_image_note(i, s) for i, s in enumerate(scenes, 1)])


def locate_described(rng: random.Random, world: World) -> SampleSpec:
    """Free form: the only thing of a colour or of a shape in one of one to three images; a box, not a letter."""
    count = rng.choice((1, 1, 1, 1, 2, 3))
    k, attribute = rng.randint(1, count), rng.randint(0, 1)
    while True:
        scenes = [world.scene(rng, world.looks(rng, rng.randint(2, 4))) for _ in range(count)]
        thing = rng.choice(scenes[k - 1].things)
        word = (thing.colour, thing.shape)[attribute]
        if sum(word in (t.colour, t.shape) for t in scenes[k - 1].things) == 1:
            break
    where = f" in image {k}" if count > 1 else ""
    what = f"{word} thing" if attribute == 0 else word
    question = rng.choice([f"Where is the {what}{where}?", f"Point at the {what}{where}."])
    return SampleSpec(scenes, question, [(k, thing.name)], f"{thing.name}: image {k}.", [list_image_note(k, scenes[k - 1])])


def count_objects(rng: random.Random, world: World) -> SampleSpec:
    """Free form: how many things are in image k."""
    scenes = [world.scene(rng, world.looks(rng, rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
    k = rng.randint(1, len(scenes))
    total = len(scenes[k - 1].things)
    options, letter = _shuffled_options(rng, str(total), rng.sample([str(n) for n in range(1, 5) if n != total], 2))
    return SampleSpec(scenes, f"How many things are in image {k}?", [], f"things: {total}.", [list_image_note(k, scenes[k - 1])],
                 options=options, letter=letter)


Maker = Callable[[random.Random, World], SampleSpec]


GROUNDING: dict[str, Maker] = {"lisa": lisa_like, "revos": revos_like, "mc_bench": mc_bench_like}


BLINK: dict[str, Maker] = {"counting": counting, "jigsaw": jigsaw, "visual_correspondence": visual_correspondence,
                           "relations": relations}


MMIU: dict[str, Maker] = {"order": frame_order, "retrieval": retrieval, "change": find_change}


FREE_FORM: dict[str, Maker] = {"naming": name_object, "showing": find_image, "sharing": common_to_all, "choosing": task_as_choice,
                              "pointing": locate_named, "telling": locate_described, "tallying": count_objects}  # trained on, in no suite


BOX_FORMS = ("pointing", "telling")  # those whose answer is a box


SIZES = {"mig_bench": "mig_per_task", "ood_grounding": "ood_per_task", "blink": "blink_per_task",
         "mmiu": "mmiu_per_task"}  # suite -> the parameter of 06 that says how many samples a task has


SUITES = tuple(SIZES)


def suite_tasks(suite: str) -> list[str]:
    """The task keys of a suite; "unseen" stands for the ten tasks on unseen things and textured backgrounds."""
    return {"mig_bench": list(TASKS), "ood_grounding": [*GROUNDING, "unseen"], "blink": list(BLINK), "mmiu": list(MMIU)}[suite]


def make_suite(suite: str, split: str, per_task: int, seed: int = 0) -> list[Sample]:
    """`per_task` samples of every task of a suite, in order of task and index."""
    if suite not in SUITES:
        raise ValueError(f"no suite '{suite}'; the suites are {', '.join(SUITES)}")
    if suite == "mig_bench":
        return [make_sample(task, split, i, seed) for task in TASKS for i in range(per_task)]
    samples = []
    makers = {"ood_grounding": GROUNDING, "blink": BLINK, "mmiu": MMIU}[suite]
    for task, maker in makers.items():
        samples += [render_sample(draw_spec(maker, task, split, i, seed, World()), suite, task, split, i) for i in range(per_task)]
    if suite == "ood_grounding":
        names = list(TASKS)
        for i in range(per_task):
            draft = draw_spec(TASKS[names[i % 10]], f"unseen/{names[i % 10]}", split, i, seed, World(True, True))
            samples.append(render_sample(draft, suite, "unseen", split, i))
    return samples


def make_free_form(split: str, per_task: int, seed: int = 0, boxes: int | None = None) -> list[Sample]:
    """General questions beside the ten tasks, as MGrounding-630k has them: `per_task` of every kind.

    boxes: how many of each kind in BOX_FORMS; None for `per_task`.

    They keep the model answering with a letter where it is asked to choose, and reading the question: the ten tasks are nearly
    told apart by the number of their images. No suite asks one of them word for word, but some are near: "choosing" to what
    is asked about changes and shapes, "pointing" to the image pairs, "telling" to the single images, "tallying" to counting.
    """
    counts = {task: per_task if boxes is None or task not in BOX_FORMS else boxes for task in FREE_FORM}
    return [render_sample(draw_spec(maker, task, split, i, seed, World()), "free_form", task, split, i)
            for task, maker in FREE_FORM.items() for i in range(counts[task])]


def draw_training_mix(split: str, per_task: int, free_form_per_task: int, seed: int, boxes: int | None = None) -> list[Sample]:
    """What is trained on: the ten tasks and general questions, `boxes` of each of their kinds that asks for a box."""
    return draw_task_samples(split, per_task, seed) + make_free_form(split, free_form_per_task, seed, boxes)


def draw_task_samples(split: str, per_task: int, seed: int) -> list[Sample]:
    """`per_task` samples of each of the ten tasks."""
    return [make_sample(task, split, i, seed) for task in TASKS for i in range(per_task)]
