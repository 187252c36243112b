"""What the tiny base is taught (notebook 90): to see, and to reason over short lists of text. Not the ten tasks.

Visual lessons are many short questions about one picture each, asked over an album of one to six pictures that share
their things' names, so that the image number matters. Text lessons are puzzles over lists of names, without pictures.
"""

import random
from dataclasses import dataclass, replace

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import CHOICE_INSTRUCTION, GROUNDING_INSTRUCTION, format_answer, format_box
from mig_kit.world.scenes import (
    Object,
    Scene,
    arrange_objects,
    crop_scene,
    grid_size,
    object_cell,
    object_name,
    random_appearances,
    random_size,
)
from mig_kit.world.tasks import EXTREMES, find_extreme

# What some words are about: image number and cell (in reading order) of a thing, or a name in the lists of text before, or one
# of the options ("B. red star")
Appearance = tuple[int, int] | str | None


Piece = tuple[str, float, Appearance]  # words of the assistant, their weight in the loss, what they are about


Turn = tuple[str, list[Piece]]  # what the user says, what the assistant says


KINDS = ("new", "all", "has", "attribute", "attribute", "gone")


LOOSE_KINDS = ("new", "new", "all", "has", "has", "attribute", "attribute", "attribute", "same", "gone")


HARD_KINDS = ("new", "new", "new", "all", "all", "all", "has", "has", "has", "attribute", "same", "gone")


HOLDERS = ("Which image shows the {}?", "Where is the {}?", "There is a {} in an image. Where?", "Look for the {}.",
           "Find the image with the {}.")


VERBS = ("Compare.", "Search.", "Track.", "Associate.", "List.", "Find.")


def album(rng: random.Random, pictures: int = 6, fewest: int = 5, alike: float = 0.0) -> list[Scene]:
    """Unrelated pictures that draw their things from the same `fewest` to 8 looks.

    alike: the share of albums whose pictures show the same 2 to 4 things at other places each, so that only the number tells.
    """
    if alike and rng.random() < alike:
        looks = random_appearances(rng, rng.randint(2, 4))
        return [arrange_objects(rng, rng.sample(looks, len(looks))) for _ in range(pictures)]
    looks = random_appearances(rng, rng.randint(fewest, 8))
    scenes = []
    for _ in range(pictures):
        kind = rng.random()
        if kind < 0.12:
            source = arrange_objects(rng, rng.sample(looks, min(len(looks), rng.randint(2, 4))))
            x1, y1, x2, y2 = rng.choice(source.things).box
            margin = rng.uniform(0.5, 4)
            scenes.append(crop_scene(source, (x1 - margin, y1 - margin, x2 + margin, y2 + margin), random_size(rng)))
        elif kind < 0.24:
            scenes.append(arrange_objects(rng, rng.sample(looks, rng.randint(1, 2)), sides=(20, 34)))
        else:
            scene = arrange_objects(rng, rng.sample(looks, min(len(looks), rng.randint(2, 5))), sides=(12, 26))
            scenes.append(replace(scene, mark=rng.choice(scene.things).box) if kind < 0.4 else scene)
    return scenes


def clip_to_image(scene: Scene) -> Scene:
    """The scene with only the things whose centre is in the picture, their boxes clipped to it."""
    things = tuple(
        replace(t, box=(max(0.0, t.box[0]), max(0.0, t.box[1]), min(scene.width, t.box[2]), min(scene.height, t.box[3])))
        for t in scene.things if 0 <= t.centre[0] < scene.width and 0 <= t.centre[1] < scene.height)
    return replace(scene, things=things)


def model_box(scene: Scene, thing: Object):
    """The thing's box in pixels of the resized picture."""
    return to_model_box(thing.box, (scene.width, scene.height), box_format=BoxFormat())


def object_token(scenes: list[Scene], number: int, thing: Object) -> Appearance:
    """The place of a thing: its image's number and its cell."""
    column, row = object_cell(scenes[number - 1], thing)
    return number, row * grid_size(scenes[number - 1].width, scenes[number - 1].height)[0] + column


def _find(rng: random.Random, scenes: list[Scene], number: int, thing: Object, what: str = "") -> Turn:
    answer = format_answer(number, model_box(scenes[number - 1], thing))
    where = object_token(scenes, number, thing)
    question = rng.choice(["Where is {} in image {}?", "Find {} in image {}."]).format(what or f"the {thing.name}", number)
    if rng.random() < 0.3:
        return f"{question} {GROUNDING_INSTRUCTION}", [(f"<answer>{answer}</answer>", 1.0, where)]
    return question, [(answer, 1.0, where)]


def _name_turn(question: str, scenes: list[Scene], number: int, thing: Object, lead: str = "") -> Turn:
    where = object_token(scenes, number, thing)
    if not lead:
        return question, [(thing.name, 1.0, where)]
    return question, [(f"image {number}: {lead}", 0.2, None), (f" {thing.name}", 1.0, where), (".", 0.2, None)]


def _list_turn(scenes: list[Scene], number: int, worded: bool) -> Turn:
    scene, question = scenes[number - 1], f"List image {number}."
    names = [(name, object_token(scenes, number, scene.find(name))) for name in scene.names()]
    if not worded:
        return question, [(", " * bool(i) + name, 1.0, where) for i, (name, where) in enumerate(names)]
    listed = [((", " if i else " ") + name, 1.0, where) for i, (name, where) in enumerate(names)]
    return question, [(f"image {number}:", 0.2, None), *listed, (".", 0.5, None)]


def survey_turn(scenes: list[Scene]) -> Turn:
    """Every picture listed in turn, and no more of them than there are."""
    pieces: list[Piece] = []
    for number in range(1, len(scenes) + 1):
        listed = _list_turn(scenes, number, True)[1]
        pieces += [(" " * (number > 1) + listed[0][0], 0.5, None), *listed[1:]]
    return "List every image.", pieces


def _count_turn(rng: random.Random, scene: Scene, at: str) -> Turn:
    thing = rng.choice(scene.things)
    word = rng.choice([f"{thing.colour} ", f"{thing.shape} ", ""])
    total = sum(word.strip() in (t.colour, t.shape, "") for t in scene.things)
    return f"How many {word}things are in {at}?", [(str(total), 1.0, None)]


def _choice_turn(rng: random.Random, scene: Scene, at: str) -> Turn:
    if len(scene.things) > 1 and rng.random() < 0.5:
        a, b = rng.sample(scene.things, 2)
        if abs(a.centre[0] - b.centre[0]) > 4:
            letter = "A" if a.centre[0] < b.centre[0] else "B"
            question = f"Is the {a.name} left of the {b.name} in {at}? A. yes B. no {CHOICE_INSTRUCTION}"
            return question, [(f"<answer>{letter}</answer>", 1.0, None)]
    right = rng.choice(scene.names())
    others = [object_name(look) for look in random_appearances(rng, 3) if object_name(look) not in scene.names()][:2]
    options = rng.sample([right, *others], len(others) + 1)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
    return f"What is in {at}? {listed} {CHOICE_INSTRUCTION}", [(f"<answer>{'ABC'[options.index(right)]}</answer>", 1.0, None)]


def locate_turns(rng: random.Random, scenes: list[Scene], count: int = 3) -> list[Turn]:
    """Whole pictures located: every thing's name and box, in random order, as (question, pieces with weights).

    The names carry almost no loss, for their order cannot be known; each box is looked up by the name right before it.
    Lists in reading order would teach a pointer that walks on instead of a look-up.
    """
    turns = []
    for number in rng.sample(range(1, len(scenes) + 1), min(count, len(scenes))):
        scene, pieces = scenes[number - 1], []
        for place, thing in enumerate(rng.sample(scene.things, len(scene.things))):
            pieces += [("; the " + thing.name if place else "the " + thing.name, 0.03, None),
                       (f" {format_box(model_box(scene, thing))}", 1.0, object_token(scenes, number, thing))]
        if pieces:
            turns.append((f"Where is each thing in image {number}?", pieces))
    return turns


def visual_turns(rng: random.Random, scenes: list[Scene], count: int = 8, worded: float = 0.0) -> list[Turn]:
    """At most `count` questions with answers, each about one picture of `scenes`.

    worded: the share of lists and names given as "image 2: red star, blue ring.", as a note would put it. No box is asked for or
    shown twice in a dialogue: the second time it could be copied from the first.
    """
    turns: list[Turn] = []
    fresh = {(i, t.name): t for i, scene in enumerate(scenes, 1) for t in scene.things}
    unlisted = [i for i, scene in enumerate(scenes, 1) if scene.things]
    for _ in range(2 * count):
        if len(turns) >= count or not fresh:
            break
        kind, name = rng.random(), ""
        number = rng.choice(list(fresh))[0]
        scene, at, noted = scenes[number - 1], f"image {number}", worded > 0 and rng.random() < worded
        if kind < 0.32:
            key = rng.choice(list(fresh))
            turns.append(_find(rng, scenes, key[0], fresh.pop(key)))
        elif kind < 0.44:
            key = rng.choice(list(fresh))
            thing, name = fresh.pop(key), key[1]
            question = rng.choice(["What is at {} in image {}?", "What does the box {} of image {} hold?"])
            question = question.format(format_box(model_box(scenes[key[0] - 1], thing)), key[0])
            turns.append(_name_turn(question, scenes, key[0], thing, "the box holds" * noted))
        elif kind < 0.72:
            if unlisted:
                place = unlisted.pop(rng.randrange(len(unlisted)))
                turns.append(_list_turn(scenes, place, noted))
        elif kind < 0.86:
            which = rng.choice(list(EXTREMES))
            found = find_extreme(scene, which)
            if found:
                turns.append(_name_turn(f"Which is the {which} thing in {at}?", scenes, number, found, f"the {which} is" * noted))
                name = found.name
        elif kind < 0.89:
            turns.append(_count_turn(rng, scene, at))
        elif kind < 0.92 and scene.mark:
            marked = next(t for t in scene.things if t.box == scene.mark)
            turns.append(_name_turn(f"What is marked in {at}?", scenes, number, marked))
            name = marked.name
        elif kind >= 0.92:
            turns.append(_choice_turn(rng, scene, at))
        if name and rng.random() < 0.5:
            places = [key for key in fresh if key[1] == name]
            if places:
                key = rng.choice(places)
                turns.append(_find(rng, scenes, key[0], fresh.pop(key), "it"))
    return turns


def _notes(pictures: list[list[str]]) -> str:
    return " ".join(f"image {i}: {', '.join(names)}." for i, names in enumerate(pictures, 1))


@dataclass(frozen=True)
class Puzzle:
    """A question over lists: what is asked, the lists as notes, the finding, the options and the right one.

    name: the listed name that must be looked up for the finding, where one look-up is all it takes; else "".
    """

    question: str
    notes: str
    finding: str
    options: tuple[str, ...]
    right: str
    name: str = ""

    def pieces(self, guided: float = 1.0) -> list[Piece]:
        """The finding, cut before the word that the look-up gives; `guided` is the weight of "new:" and its like."""
        if not self.name:
            kind, colon, rest = self.finding.partition(":")
            return [(kind + colon, guided, None), (rest, 1.0, None)] if colon else [(self.finding, 1.0, None)]
        before, word, after = self.finding.rpartition(f" {self.right.removeprefix('image ')}")
        return [(before, guided, None), (word, 1.0, self.name), (after, 1.0, None)]


def puzzle(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Puzzle:
    """One text puzzle over lists of names, of one of `kinds`."""
    looks = random_appearances(rng, 9)
    names = [object_name(look) for look in looks]
    kind = rng.choice(kinds)
    if kind in ("new", "gone"):
        first = names[:rng.randint(2, 5)]
        second = [names[7] if i == 0 else name for i, name in enumerate(first)]
        if rng.random() < 0.5:
            rng.shuffle(second)
        else:
            place = rng.randrange(len(first))
            second = list(first)
            second[place] = names[7]
            first[0], first[place] = first[place], first[0]
            second[0], second[place] = second[place], second[0]
        gone = next(name for name in first if name not in second)
        if kind == "new":
            return Puzzle("Which thing is new?", _notes([first, second]), f"new: {names[7]}.",
                          tuple(rng.sample([names[7], *second[:3], gone], 3)), names[7])
        return Puzzle("Which thing is gone?", _notes([first, second]), f"gone: {gone}.",
                      tuple(rng.sample([gone, *first[:3]], 3)), gone)
    if kind == "all":
        while True:
            pictures = [rng.sample([names[0], *rng.sample(names[1:], rng.randint(1, 3))], k=2) for _ in range(rng.randint(2, 5))]
            pictures = [p if names[0] in p else [names[0], *p] for p in pictures]
            pictures = [rng.sample(p, len(p)) for p in pictures]
            if not any(all(name in p for p in pictures) for name in names[1:]):
                break
        return Puzzle("Which thing is in every image?", _notes(pictures), f"in all: {names[0]}.",
                      tuple(rng.sample([names[0], *names[1:3]], 3)), names[0])
    if kind == "has":
        k, count = 0, rng.randint(2, 5)
        pictures = [rng.sample(names[1:], rng.randint(1, 3)) for _ in range(count)]
        k = rng.randint(1, count)
        pictures[k - 1][rng.randrange(len(pictures[k - 1]))] = names[0]
        return Puzzle(f"Which image shows the {names[0]}?", _notes(pictures), f"{names[0]}: image {k}.",
                      tuple(f"image {i}" for i in range(1, count + 1)), f"image {k}", names[0])
    if kind == "same":
        listed, (first, second) = rng.sample(names[:5], rng.randint(2, 5)), rng.choice(((1, rng.randint(2, 6)), (2, 1)))
        start = rng.choice(["image {}: the box holds {}.", "image {}: {}."]).format(first, listed[0])
        word, listed = rng.choice(["same", "part"]), rng.sample(listed, len(listed)) if len(listed) > 1 else listed
        right = start.removesuffix(".").split(": ")[1].removeprefix("the box holds ")
        return Puzzle(f"Which thing is the {word}?", f"{start} image {second}: {', '.join(listed)}.", f"the {word}: {right}.",
                      tuple(listed[:3]), right)
    attribute = rng.randint(0, 1)
    while True:
        one, *rest = random_appearances(rng, rng.randint(3, 5))
        if one[:2] != rest[0][:2] and [look[attribute] == one[attribute] for look in rest] == [True] + [False] * (len(rest) - 1):
            break
    word = ("colour", "shape")[attribute]
    listed = rng.sample([object_name(look) for look in rest], len(rest))
    start = rng.choice(["image 1: the box holds {}.", f"image 1: the {rng.choice(list(EXTREMES))} is {{}}.", "image 1: {}."])
    notes = f"{start.format(object_name(one))} image 2: {', '.join(listed)}."
    return Puzzle(f"Which thing has the same {word}?", notes, f"same {word}: {object_name(rest[0])}.", tuple(listed[:3]),
                  object_name(rest[0]), object_name(rest[0]))


def text_turns(rng: random.Random, count: int = 3, kinds: tuple[str, ...] = KINDS, strange: list[str] = (),
               unfit: float = 0.75, lettered: float = 0.25) -> list[Turn]:
    """Puzzles over lists as turns; they are about no picture.

    strange: questions that have nothing to do with the lists. A share `unfit` of the puzzles whose notes are thoughts stands
    behind one of them, so that the notes and the first words of the finding alone must lead to it; then how many images the
    notes are about carries no loss, for there are others. lettered: the share of puzzles with options, to be answered with a
    letter.
    """
    turns = []
    for _ in range(count):
        item, form = puzzle(rng, kinds), rng.random()
        if form < 0.35 and not strange:
            turns.append((f"{item.notes} {item.question}", item.pieces()))
            continue
        question, ending, guided = item.question, [("</think>", 1.0, None)], 1.0
        if form > 1 - lettered and item.right in item.options:
            letters = "ABCDE"[:len(item.options)]
            question += "".join(f" {a}. {option}" for a, option in zip(letters, item.options)) + f" {CHOICE_INSTRUCTION}"
            letter = letters[item.options.index(item.right)]
            ending = [("</think><answer>", 0.5, None), (letter, 2.0, f"{letter}. {item.right}"), ("</answer>", 0.5, None)]
        elif strange:
            ending = [*ending, ("", 0.0, None)]
            if item.right.startswith("image"):
                question = f"{rng.choice(HOLDERS).format(item.name)} {GROUNDING_INSTRUCTION}"
            elif rng.random() < unfit:
                question, guided = rng.choice(strange), 0.0
        verb = rng.choice(VERBS) + " " if rng.random() < (0.8 if strange else 0.5) else ""
        (head, weight, where), *rest = item.pieces(guided)  # a space belongs to the word behind it, as in a trace's tokens
        notes = (f"<think>{verb}{item.notes}", 0.0 if strange else 0.03, None)
        turns.append((question, [notes, (f" {head}", weight, where), *rest, *ending]))
    return turns
