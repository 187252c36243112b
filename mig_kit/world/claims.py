"""What a reply's reasoning claims, in the teacher's grammar, and whether that is true.

A claim is about images ("image 2: red star, blue ring.") or a conclusion ("new: red star."). It is
judged by the scene graph of a sample just drawn, or by the notes of one read from a file; what is
outside the grammar, or what the notes leave open, is not judged.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from mig_kit.prompts import LETTERS, Answer
from mig_kit.sample import Sample
from mig_kit.world.scenes import COLOURS, SHAPES
from mig_kit.world.tasks import EXTREMES, find_extreme
from mig_kit.world.teacher import DEFAULT_METHOD, METHOD

OBJECT = rf"(?:striped )?(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
DETAIL = rf"image \d{{1,3}}: the (?:box holds|(?:{'|'.join(EXTREMES)}) is)"
FORMS = {  # kind of claim -> its sentence, without the full stop
    "list": re.compile(rf"image (?P<image>\d{{1,3}}): (?P<names>{OBJECT}(?:, {OBJECT})*)"),
    "detail": re.compile(rf"(?P<head>{DETAIL}) (?P<names>{OBJECT})"),
    "place": re.compile(rf"(?P<names>{OBJECT}): image \d{{1,3}}(?:, image \d{{1,3}})*"),
    "conclusion": re.compile(rf"(?P<head>{'|'.join(METHOD)}|striped): (?P<names>{OBJECT}|\d+)")}
METHODS = {*METHOD.values(), DEFAULT_METHOD}  # sentences that claim nothing


class Claim(NamedTuple):
    """A sentence of a reply's reasoning, reply[start:end]."""

    start: int
    end: int
    kind: str  # one of FORMS; "" outside the grammar
    is_true: bool | None  # None if it is not judged
    images: Sequence[int] = ()  # numbers of those that it is about; none of a conclusion
    objects: Sequence[tuple[int, str]] = ()  # (image number, name) of all that a list names


class ClaimCounts(NamedTuple):
    """Of one reply."""

    true: int
    judged: int  # claims that are true or false
    unjudged: int  # other sentences
    listed: int  # of the objects to list
    to_list: int  # what the notes list, or all objects; 0 if the reply lists no image


def count_claims(answer: Answer, sample: Sample) -> ClaimCounts:
    """How much of a reply's reasoning is true, and how complete it is where it lists images."""
    claims = read_claims(answer.text, sample)
    judged = [claim.is_true for claim in claims if claim.is_true is not None]
    listed = {named for claim in claims for named in claim.objects}
    wanted = known_objects(replace(sample, spec=None) if sample.notes else sample)
    to_list = {(number, name) for number, names in wanted.items() for name in names or ()}
    return ClaimCounts(sum(judged), len(judged), len(claims) - len(judged),
                       len(listed & to_list), len(to_list) if listed else 0)


def read_claims(reply: str, sample: Sample) -> list[Claim]:
    """The sentences of a reply's <think> block, in order, but for those that name a method.

    A claim about images is true if all that it names is there, as often as it is named; it may
    leave objects out. A conclusion is true if it names what the question asks for, and not judged
    if it is of another kind of question. Returns [] for own data, of which nothing is known.
    """
    block = re.search(r"<think>(.*?)</think>", reply, re.DOTALL)
    if not block or not (sample.spec or sample.notes):
        return []
    return [_read_claim(match, block.start(1), sample)
            for match in re.finditer(r"[^\s.][^.]*\.?", block[1]) if match[0] not in METHODS]


def _read_claim(sentence: re.Match, offset: int, sample: Sample) -> Claim:
    start, end = offset + sentence.start(), offset + sentence.end()
    text = sentence[0].rstrip(" .\n")
    for kind, form in FORMS.items():
        if match := form.fullmatch(text):
            images = [int(number) for number in re.findall(r"image (\d+)", text)]
            names = match["names"].split(", ")
            is_true = (_is_answer(match["head"], names[0], sample) if kind == "conclusion" else
                       _is_shown(kind, match, images, sample))
            listed = [(images[0], name) for name in names] if kind == "list" else []
            return Claim(start, end, kind, is_true, images, listed)
    return Claim(start, end, "", None)


def known_objects(sample: Sample) -> dict[int, list[str] | None]:
    """Image number -> names of its objects; None for an image that notes from a file leave out."""
    if sample.spec:
        return {number: scene.names() for number, scene in enumerate(sample.spec.scenes, 1)}
    lists = [match for note in sample.notes if (match := FORMS["list"].fullmatch(note[:-1]))]
    return dict.fromkeys(range(1, len(sample.images) + 1)) | {
        int(match["image"]): match["names"].split(", ") for match in lists}


def _is_shown(kind: str, match: re.Match, images: list[int], sample: Sample) -> bool | None:
    """Whether the images show what a claim says; None if what is known does not tell."""
    objects, names = known_objects(sample), Counter(match["names"].split(", "))
    is_nowhere = kind == "place" and images == [0]
    shown = [objects.get(number, []) for number in (objects if is_nowhere else images)]
    parts = [None if part is None else bool(names - Counter(part)) == is_nowhere for part in shown]
    if kind == "detail" and False not in parts:
        expected = _find_detail(match["head"], sample)
        return None if expected is None else match["names"] == expected
    return False if False in parts else None if None in parts else True


def _find_detail(head: str, sample: Sample) -> str | None:
    """The object of "image 1: the box holds" or the like; "" if there is none, None if unknown."""
    for note in sample.notes:
        if note.startswith(head):
            return note.removeprefix(f"{head} ")[:-1]
    number, what = re.search(r"(\d+): the (\w+)", head).groups()
    if what == "box":
        return sample.spec.reference if sample.spec and number == "1" else ""
    extreme = sample.spec and find_extreme(sample.spec.scenes[int(number) - 1], what)
    return extreme.name if extreme else None


def _is_answer(head: str, name: str, sample: Sample) -> bool | None:
    """Whether the question asks for it, or for an image that shows it; None if for other things."""
    answer = sample.options[LETTERS.index(sample.letter)] if sample.letter else ""
    if sample.finding:
        expected, _, answer = sample.finding.removesuffix(".").partition(": ")
        if head != expected:
            return None
    elif sample.spec and sample.spec.answers:
        answer = sample.spec.answers[0][1]
    if (image := re.fullmatch(r"image (\d+)", answer)) and not name.isdigit():
        names = known_objects(sample)[int(image[1])]
        return None if names is None else name in names
    is_comparable = re.fullmatch(r"\d+" if name.isdigit() else OBJECT, answer)
    return name == answer if is_comparable else None
