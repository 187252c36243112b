"""What the tiny base is taught (notebook 90): to see, and to reason over short lists of text.

It is not taught the ten tasks. Visual lessons are short questions about one of up to six images
that share their objects' names; text lessons are puzzles over lists of names.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import CHOICE_INSTRUCTION, GROUNDING_INSTRUCTION, format_answer, format_box
from mig_kit.world.scenes import (
    PLAIN,
    Appearance,
    Object,
    Scene,
    crop_scene,
    grid_size,
    object_cell,
    object_name,
    random_size,
)
from mig_kit.world.tasks import EXTREMES, find_extreme
from tiny_base.puzzles import KINDS, Puzzle, make_puzzle


class Option(str):
    """An option as the question lists it: "B. red star"."""


Place = tuple[int, int]  # image number, and number of the cell in reading order
# What words are about: an object, an option, a name in a list of the turn, or nothing of these.
Subject = Place | Option | str | None
Piece = tuple[str, float, Subject]  # words of the assistant, their weight in the loss
Turn = tuple[str, list[Piece]]  # what the user says, what the assistant says

HOLDER_QUESTIONS = (
    "Which image shows the {}?", "Where is the {}?", "There is a {} in an image. Where?",
    "Look for the {}.", "Find the image with the {}.")
VERBS = ("Compare.", "Search.", "Track.", "Associate.", "List.", "Find.")


def album(rng: random.Random, images: int = 6, fewest: int = 5, alike: float = 0.0) -> list[Scene]:
    """Unrelated scenes whose objects have the same `fewest` to 8 appearances.

    alike: share of albums that show the same 2 to 4 objects at other places in each image, so that
    only the image number tells them apart.
    """
    if alike and rng.random() < alike:
        appearances = PLAIN.pick_appearances(rng, rng.randint(2, 4))
        return [PLAIN.arrange_scene(rng, rng.sample(appearances, len(appearances)))
                for _ in range(images)]
    appearances = PLAIN.pick_appearances(rng, rng.randint(fewest, 8))
    return [_album_scene(rng, appearances) for _ in range(images)]


def _album_scene(rng: random.Random, appearances: list[Appearance]) -> Scene:
    """A scene of some of the appearances: cropped, with few large objects, marked or plain."""
    kind = rng.random()
    count = len(appearances)
    if kind < 0.12:
        source = PLAIN.arrange_scene(rng, rng.sample(appearances, min(count, rng.randint(2, 4))))
        x1, y1, x2, y2 = rng.choice(source.objects).box
        margin = rng.uniform(0.5, 4)
        window = (x1 - margin, y1 - margin, x2 + margin, y2 + margin)
        return crop_scene(source, window, random_size(rng))
    if kind < 0.24:
        return PLAIN.arrange_scene(rng, rng.sample(appearances, rng.randint(1, 2)), sides=(20, 34))
    shown = rng.sample(appearances, min(count, rng.randint(2, 5)))
    scene = PLAIN.arrange_scene(rng, shown, sides=(12, 26))
    return replace(scene, mark=rng.choice(scene.objects).box) if kind < 0.4 else scene


def clip_to_image(scene: Scene) -> Scene:
    """The scene with only those objects whose centre is in the image, their boxes clipped to it."""
    inside = []
    for obj in scene.objects:
        x, y = obj.centre
        if not (0 <= x < scene.width and 0 <= y < scene.height):
            continue
        x1, y1, x2, y2 = obj.box
        box = (max(0.0, x1), max(0.0, y1), min(scene.width, x2), min(scene.height, y2))
        inside.append(replace(obj, box=box))
    return replace(scene, objects=tuple(inside))


def model_box(scene: Scene, obj: Object):
    """The object's box in pixels of the resized image."""
    return to_model_box(obj.box, (scene.width, scene.height), BoxFormat())


def object_place(scenes: list[Scene], number: int, obj: Object) -> Place:
    """The place of an object of image `number`."""
    scene = scenes[number - 1]
    column, row = object_cell(scene, obj)
    columns, _ = grid_size(scene.width, scene.height)
    return number, row * columns + column


def _find_turn(rng: random.Random, scenes: list[Scene], number: int, obj: Object,
               called: str = "") -> Turn:
    """Asks for the box of an object, which the question calls by its name if not `called`."""
    answer = format_answer(number, model_box(scenes[number - 1], obj))
    place = object_place(scenes, number, obj)
    question = rng.choice(["Where is {} in image {}?", "Find {} in image {}."])
    question = question.format(called or f"the {obj.name}", number)
    if rng.random() < 0.3:
        return f"{question} {GROUNDING_INSTRUCTION}", [(f"<answer>{answer}</answer>", 1.0, place)]
    return question, [(answer, 1.0, place)]


def _name_turn(question: str, scenes: list[Scene], number: int, obj: Object,
               lead: str = "") -> Turn:
    """Asks for an object's name; with a lead the answer is worded as a note."""
    place = object_place(scenes, number, obj)
    if not lead:
        return question, [(obj.name, 1.0, place)]
    return question, [(f"image {number}: {lead}", 0.2, None), (f" {obj.name}", 1.0, place),
                      (".", 0.2, None)]


def _name_at_box_turn(rng: random.Random, scenes: list[Scene], number: int, obj: Object,
                      as_note: bool) -> Turn:
    """Asks what a box holds."""
    question = rng.choice(["What is at {} in image {}?", "What does the box {} of image {} hold?"])
    question = question.format(format_box(model_box(scenes[number - 1], obj)), number)
    return _name_turn(question, scenes, number, obj, "the box holds" if as_note else "")


def _list_turn(scenes: list[Scene], number: int, as_note: bool) -> Turn:
    """Asks for the names of all objects of an image."""
    scene = scenes[number - 1]
    pieces: list[Piece] = []
    for index, name in enumerate(scene.names()):
        first = " " if as_note else ""
        separator = ", " if index else first
        pieces.append((separator + name, 1.0, object_place(scenes, number, scene.find(name))))
    if as_note:
        pieces = [(f"image {number}:", 0.2, None), *pieces, (".", 0.5, None)]
    return f"List image {number}.", pieces


def survey_turn(scenes: list[Scene]) -> Turn:
    """Every image listed in turn, and no more of them than there are."""
    pieces: list[Piece] = []
    for number in range(1, len(scenes) + 1):
        (head, _, _), *listed = _list_turn(scenes, number, True)[1]
        pieces += [(f" {head}" if pieces else head, 0.5, None), *listed]
    return "List every image.", pieces


def _count_turn(rng: random.Random, scene: Scene, number: int) -> Turn:
    """Asks how many objects have a colour or a shape, or how many there are."""
    obj = rng.choice(scene.objects)
    word = rng.choice([obj.colour, obj.shape, ""])
    total = sum(word in (other.colour, other.shape, "") for other in scene.objects)
    described = f"{word} things" if word else "things"
    return f"How many {described} are in image {number}?", [(str(total), 1.0, None)]


def _choice_turn(rng: random.Random, scene: Scene, number: int) -> Turn:
    """A question with options: which of two objects is on the left, or what an image shows."""
    if len(scene.objects) > 1 and rng.random() < 0.5:
        a, b = rng.sample(scene.objects, 2)
        if abs(a.centre[0] - b.centre[0]) > 4:
            question = f"Is the {a.name} left of the {b.name} in image {number}? A. yes B. no"
            letter = "A" if a.centre[0] < b.centre[0] else "B"
            return f"{question} {CHOICE_INSTRUCTION}", [(f"<answer>{letter}</answer>", 1.0, None)]
    names = scene.names()
    correct = rng.choice(names)
    drawn = [object_name(appearance) for appearance in PLAIN.pick_appearances(rng, 3)]
    wrong = [name for name in drawn if name not in names][:2]
    options = rng.sample([correct, *wrong], len(wrong) + 1)
    listed = " ".join(f"{letter}. {option}" for letter, option in zip("ABC", options))
    letter = "ABC"[options.index(correct)]
    return (f"What is in image {number}? {listed} {CHOICE_INSTRUCTION}",
            [(f"<answer>{letter}</answer>", 1.0, None)])


def locate_turns(rng: random.Random, scenes: list[Scene], count: int = 3) -> list[Turn]:
    """At most `count` images located: every object's name and box, in random order.

    Lists in reading order would teach a pointer that walks on instead of a look-up by name.
    """
    turns = []
    for number in rng.sample(range(1, len(scenes) + 1), min(count, len(scenes))):
        scene = scenes[number - 1]
        pieces: list[Piece] = []
        for obj in rng.sample(scene.objects, len(scene.objects)):
            name = f"; the {obj.name}" if pieces else f"the {obj.name}"
            box = f" {format_box(model_box(scene, obj))}"
            # a name's order cannot be known, so it carries almost no loss
            pieces += [(name, 0.03, None), (box, 1.0, object_place(scenes, number, obj))]
        if pieces:
            turns.append((f"Where is each thing in image {number}?", pieces))
    return turns


def visual_turns(rng: random.Random, scenes: list[Scene], count: int = 8,
                 worded: float = 0.0) -> list[Turn]:
    """At most `count` questions with answers, each about one image.

    No box comes up twice, or it could be copied. worded: share of lists and names that are worded
    as a note ("image 2: red star, blue ring.").
    """
    turns: list[Turn] = []
    unseen = {(number, obj.name): obj  # objects whose boxes did not come up yet
              for number, scene in enumerate(scenes, 1) for obj in scene.objects}
    unlisted = [number for number, scene in enumerate(scenes, 1) if scene.objects]

    def take_unseen(name: str | None = None) -> tuple[int, Object]:
        key = rng.choice([key for key in unseen if name in (None, key[1])])
        return key[0], unseen.pop(key)

    for _ in range(2 * count):
        if len(turns) >= count or not unseen:
            break
        kind = rng.random()
        number, _ = rng.choice(list(unseen))
        scene = scenes[number - 1]
        as_note = worded > 0 and rng.random() < worded
        named = None  # the object that the next question may call "it"
        if kind < 0.32:
            turns.append(_find_turn(rng, scenes, *take_unseen()))
        elif kind < 0.44:
            number, named = take_unseen()
            turns.append(_name_at_box_turn(rng, scenes, number, named, as_note))
        elif kind < 0.72:
            if unlisted:
                listed = unlisted.pop(rng.randrange(len(unlisted)))
                turns.append(_list_turn(scenes, listed, as_note))
        elif kind < 0.86:
            extreme = rng.choice(list(EXTREMES))
            if named := find_extreme(scene, extreme):
                question = f"Which is the {extreme} thing in image {number}?"
                lead = f"the {extreme} is" if as_note else ""
                turns.append(_name_turn(question, scenes, number, named, lead))
        elif kind < 0.89:
            turns.append(_count_turn(rng, scene, number))
        elif kind >= 0.92:
            turns.append(_choice_turn(rng, scene, number))
        elif scene.mark:
            named = next(obj for obj in scene.objects if obj.box == scene.mark)
            question = f"What is marked in image {number}?"
            turns.append(_name_turn(question, scenes, number, named))
        if named and rng.random() < 0.5 and any(name == named.name for _, name in unseen):
            turns.append(_find_turn(rng, scenes, *take_unseen(named.name), called="it"))
    return turns


def text_turns(rng: random.Random, count: int = 3, kinds: tuple[str, ...] = KINDS,
               unrelated_text: Sequence[str] = (), unfit: float = 0.75,
               lettered: float = 0.25) -> list[Turn]:
    """`count` puzzles over lists as turns; they are about no image.

    Args:
        unrelated_text: questions that have nothing to do with the lists.
        unfit: share of puzzles behind such a question; their notes alone must lead to the finding.
        lettered: share of puzzles with options, which are answered with a letter.
    """
    turns = []
    for _ in range(count):
        puzzle, form = make_puzzle(rng, kinds), rng.random()
        if form < 0.35 and not unrelated_text:
            turns.append((f"{puzzle.notes} {puzzle.question}", _finding_pieces(puzzle)))
            continue
        lead_weight = 1.0
        if form > 1 - lettered and puzzle.correct in puzzle.options:
            question, ending = _letter_question(puzzle)
        else:
            question, ending = puzzle.question, [("</think>", 1.0, None)]
            if unrelated_text:
                ending.append(("", 0.0, None))
                if puzzle.kind == "has":
                    question = rng.choice(HOLDER_QUESTIONS).format(puzzle.looked_up)
                    question = f"{question} {GROUNDING_INSTRUCTION}"
                elif rng.random() < unfit:
                    question, lead_weight = rng.choice(unrelated_text), 0.0
        has_verb = rng.random() < (0.8 if unrelated_text else 0.5)
        verb = f"{rng.choice(VERBS)} " if has_verb else ""
        notes = (f"<think>{verb}{puzzle.notes}", 0.0 if unrelated_text else 0.03, None)
        # a space belongs to the word behind it, as in a trace's tokens
        (lead, weight, subject), *rest = _finding_pieces(puzzle, lead_weight)
        turns.append((question, [notes, (f" {lead}", weight, subject), *rest, *ending]))
    return turns


def _finding_pieces(puzzle: Puzzle, lead_weight: float = 1.0) -> list[Piece]:
    """The finding, cut before the word that solves the puzzle."""
    lead = (puzzle.lead, lead_weight, None)
    if puzzle.looked_up:
        return [lead, (f" {puzzle.word}", 1.0, puzzle.looked_up), (".", 1.0, None)]
    return [lead, (f" {puzzle.word}.", 1.0, None)]


def _letter_question(puzzle: Puzzle) -> tuple[str, list[Piece]]:
    """The question with its options, and the end of a reply that names the letter."""
    options = [Option(f"{letter}. {option}") for letter, option in zip("ABCDE", puzzle.options)]
    index = puzzle.options.index(puzzle.correct)
    question = f"{puzzle.question} {' '.join(options)} {CHOICE_INSTRUCTION}"
    return question, [("</think><answer>", 0.5, None), ("ABCDE"[index], 2.0, options[index]),
                      ("</answer>", 0.5, None)]
