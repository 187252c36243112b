"""Puzzles over short lists of names (notebook 90): they are solved by reading, without an image."""

import random
from dataclasses import dataclass

from mig_kit.world.scenes import PLAIN, object_name
from mig_kit.world.tasks import EXTREMES

# Kinds to draw from; one that stands here twice is drawn twice as often.
KINDS = ("new", "all", "has", "attribute", "attribute", "gone")
LOOSE_KINDS = ("new", "new", "all", "has", "has", "attribute", "attribute", "attribute", "same",
               "gone")
HARD_KINDS = ("new", "new", "new", "all", "all", "all", "has", "has", "has", "attribute", "same",
              "gone")


@dataclass(frozen=True)
class Puzzle:
    """A question over lists of names.

    Args:
        notes: the lists, worded as a trace words them.
        lead, word: the finding up to the word that solves the puzzle ("new:"), and this word.
        correct: the true option; it may be missing from the options.
        looked_up: listed name that leads to the word if one look-up is enough, else "".
    """

    kind: str
    question: str
    notes: str
    lead: str
    word: str
    options: tuple[str, ...]
    correct: str
    looked_up: str = ""

    @property
    def finding(self) -> str:
        """The sentence that solves the puzzle."""
        return f"{self.lead} {self.word}."


def make_puzzle(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> Puzzle:
    """One puzzle of one of `kinds`."""
    names = [object_name(appearance) for appearance in PLAIN.pick_appearances(rng, 9)]
    kind = rng.choice(kinds)
    if kind in ("new", "gone"):
        return _make_change(rng, names, kind)
    if kind == "attribute":
        return _make_attribute(rng)
    return {"all": _make_common, "has": _make_holder, "same": _make_same}[kind](rng, names)


def _format_lists(lists: list[list[str]]) -> str:
    return " ".join(f"image {number}: {', '.join(names)}." for number, names in enumerate(lists, 1))


def _make_change(rng: random.Random, names: list[str], kind: str) -> Puzzle:
    """Two lists that differ in one name; the others keep their places, or stand in any order."""
    new = names[7]
    first = names[:rng.randint(2, 5)]
    second = [new, *first[1:]]
    if rng.random() < 0.5:
        rng.shuffle(second)
    else:
        place = rng.randrange(len(first))
        second = list(first)
        second[place] = new
        for listed in (first, second):
            listed[0], listed[place] = listed[place], listed[0]
    gone = next(name for name in first if name not in second)
    notes = _format_lists([first, second])
    word, others = (new, [*second[:3], gone]) if kind == "new" else (gone, first[:3])
    options = tuple(rng.sample([word, *others], 3))
    return Puzzle(kind, f"Which thing is {kind}?", notes, f"{kind}:", word, options, word)


def _make_common(rng: random.Random, names: list[str]) -> Puzzle:
    """Two to five lists with one name in common, and only one."""
    common, *others = names
    while True:
        lists = [rng.sample([common, *rng.sample(others, rng.randint(1, 3))], k=2)
                 for _ in range(rng.randint(2, 5))]
        lists = [listed if common in listed else [common, *listed] for listed in lists]
        lists = [rng.sample(listed, len(listed)) for listed in lists]
        if not any(all(name in listed for listed in lists) for name in others):
            break
    options = tuple(rng.sample(names[:3], 3))
    return Puzzle("all", "Which thing is in every image?", _format_lists(lists), "in all:", common,
                  options, common)


def _make_holder(rng: random.Random, names: list[str]) -> Puzzle:
    """Two to five lists, one of which holds the name that is asked for."""
    wanted, *others = names
    count = rng.randint(2, 5)
    lists = [rng.sample(others, rng.randint(1, 3)) for _ in range(count)]
    number = rng.randint(1, count)
    holder = lists[number - 1]
    holder[rng.randrange(len(holder))] = wanted
    options = tuple(f"image {other}" for other in range(1, count + 1))
    return Puzzle("has", f"Which image shows the {wanted}?", _format_lists(lists),
                  f"{wanted}: image", str(number), options, f"image {number}", wanted)


def _make_same(rng: random.Random, names: list[str]) -> Puzzle:
    """One name, and a list that holds it."""
    listed = rng.sample(names[:5], rng.randint(2, 5))
    first, second = rng.choice(((1, rng.randint(2, 6)), (2, 1)))
    wanted = listed[0]
    start = rng.choice(["image {}: the box holds {}.", "image {}: {}."]).format(first, wanted)
    word = rng.choice(["same", "part"])
    listed = rng.sample(listed, len(listed))
    notes = f"{start} image {second}: {', '.join(listed)}."
    return Puzzle("same", f"Which thing is the {word}?", notes, f"the {word}:", wanted,
                  tuple(listed[:3]), wanted)


def _make_attribute(rng: random.Random) -> Puzzle:
    """One name, and a list in which one name alone has its colour, or its shape."""
    attribute = rng.randint(0, 1)
    while True:
        reference, *others = PLAIN.pick_appearances(rng, rng.randint(3, 5))
        match, *rest = [other[attribute] == reference[attribute] for other in others]
        if reference[:2] != others[0][:2] and match and not any(rest):
            break
    wanted = object_name(others[0])
    word = ("colour", "shape")[attribute]
    listed = rng.sample([object_name(other) for other in others], len(others))
    extreme = rng.choice(list(EXTREMES))
    start = rng.choice(["image 1: the box holds {}.", f"image 1: the {extreme} is {{}}.",
                        "image 1: {}."])
    notes = f"{start.format(object_name(reference))} image 2: {', '.join(listed)}."
    return Puzzle("attribute", f"Which thing has the same {word}?", notes, f"same {word}:", wanted,
                  tuple(listed[:3]), wanted, wanted)
