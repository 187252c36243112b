"""MGrounding-630k as published (Migician, arXiv 2501.05767) into samples: one record at a time, nothing guessed.

Established from the authors' README and from a public converter of the data set: one JSON array; `images` as
"./MGrounding-630k/<Subset>/..."; `conversations` of several human/gpt turns, the first with an <image> tag per image; boxes
as <|box_start|>(x1,y1),(x2,y2)<|box_end|> in 0-1000 of the image they are in; answers that name the image by an ordinal
("It's in the third image."); archives that unpack below a nested home/ folder; tracking answers of one box per frame.

Not established, because no tracking record could be read: how a shuffled film says so. Here its question must say it
(SHUFFLED) and the numbers in the file names must give the order; its images are then put into time order, which makes
"the first image" true of the list as well. Whatever stays unclear is left out and counted, never guessed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ijson

from mig_kit.boxes import Box, rescale_box
from mig_kit.image_files import (
    BadImage,
    SkipReport,
    is_regular_file,
    open_rgb,
    read_size,
    resolve_under_root,
)
from mig_kit.sample import Sample

NAME = "MGrounding-630k"
MAX_TEXT = 20_000
BOX = re.compile(r"<\|box_start\|>\(([0-9.]{1,8}),\s?([0-9.]{1,8})\),\s?\(([0-9.]{1,8}),\s?([0-9.]{1,8})\)<\|box_end\|>")
WORDS = {w: n for n, w in enumerate("first second third fourth fifth sixth seventh eighth ninth tenth".split(), 1)}
ORDINAL = "(?:" + "|".join(WORDS) + r"|last|[0-9]{1,3}(?:st|nd|rd|th))"
AND = r"\s{0,3}(?:,\s{0,3}|\b(?:and|or)\b\s{0,3}){1,2}(?:in\s{1,3})?(?:the\s{1,3})?"
KIND = "(?:image|picture|photo|frame)s?"
MENTION = re.compile(rf"\b{ORDINAL}(?:{AND}{ORDINAL}){{0,9}}\s{{1,3}}{KIND}\b"
                     rf"|\b{KIND}[\s#_-]{{0,2}}[0-9]{{1,3}}(?:{AND}[0-9]{{1,3}}){{0,9}}\b", re.IGNORECASE)
JOINT = re.compile(r"(?:[\s,;.&]|\band\b|<\|object_ref_start\|>.{0,200}?<\|object_ref_end\|>)*", re.IGNORECASE | re.DOTALL)
SHUFFLED = re.compile(r"shuffl|scrambl|disorder|unordered|out of order|not in order|random(?:ly)? order|chronolog|temporal order",
                      re.IGNORECASE)
COMPARES = re.compile(r"compared|unlike|differ(?:s|ent|ently)? from|\bthan\b|instead|\bnot\b|n't\b|without|except", re.IGNORECASE)


@dataclass(frozen=True)
class GroundingQuestion:
    """One question of a record. images: paths as written, in prompt order; boxes: xyxy in 0-1000 of their image.

    reference: in the first image, "{ref}" in the question; targets: all in one image, any of them is right.
    """

    id: str
    subset: str
    images: tuple[str, ...]
    question: str
    targets: tuple[tuple[int, Box], ...]
    reference: Box | None


DEEPEST = 32  # levels of JSON


class _Skip(Exception):
    """Why a turn is left out; caught in this module."""


def iter_records(path: Path) -> Iterator[object]:
    """The elements of the annotation array, one in memory at a time; ValueError with the remedy if the file is broken."""

    def shallow(events: Iterator) -> Iterator:
        depth = 0
        for event in events:  # the names that ijson gives nested values grow with their depth, and memory with its square
            depth += event[0].startswith("start") - event[0].startswith("end_")
            if depth > DEEPEST:
                raise ValueError(f"{path} is nested over {DEEPEST} deep, which no annotation is; download it again")
            yield event

    try:
        with path.open("rb") as file:
            yield from ijson.items(ijson.parse(shallow(ijson.basic_parse(file, use_float=True))), "item")
    except (ijson.JSONError, UnicodeError) as error:
        raise ValueError(f"{path} is cut or no JSON array ({str(error)[:80]}); download it again") from error


def record_questions(index: int, record: object, report: SkipReport, unstated: dict[str, int] | None = None) -> Iterator[GroundingQuestion]:
    """The questions of one record; never raises: what cannot be used is counted in the report under its reason.

    index: the record's place in the file, from 0. unstated: the image number to take, per subset, where neither question
    nor answer names one (for example {"Difference": 2}, MIG-Bench's convention; for this data set it is not stated).
    An answer with boxes in several images becomes one question per image.
    """
    try:
        images, turns, name = _shape(record)
    except _Skip as skip:
        report.add(str(skip), f"record {index}")
        return
    subset = _subset(images[0])
    for number, (asked, answered) in enumerate(turns, 1):
        try:
            ordered, shuffled = _in_time(images, " ".join(a for a, _ in turns)) if subset == "Object_Tracking" else (images, False)
            yield from _turn(f"{index}-{number}", subset, ordered, shuffled, asked, answered, unstated or {})
        except _Skip as skip:
            report.add(str(skip), f"record {index} turn {number} ({name})")


def _shape(record: object) -> tuple[tuple[str, ...], list[tuple[str, str]], str]:
    if not isinstance(record, dict):
        raise _Skip("record shape")
    images, talk = record.get("images"), record.get("conversations")
    if not (isinstance(images, list) and images and all(isinstance(i, str) and i for i in images)):
        raise _Skip("record shape")
    if not (isinstance(talk, list) and talk and all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in talk)):
        raise _Skip("record shape")
    if [t.get("from") for t in talk] != ["human", "gpt"] * (len(talk) // 2):
        raise _Skip("turns not human and gpt in turn")
    texts = [t["value"] for t in talk]
    if max(map(len, texts)) > MAX_TEXT or any("{ref}" in t for t in texts):
        raise _Skip("text too long or with {ref}")
    if [t.count("<image>") for t in texts] != [len(images)] + [0] * (len(texts) - 1):
        raise _Skip("image tags do not fit the images")
    return tuple(images), list(zip(texts[::2], texts[1::2])), str(record.get("id", ""))


def _subset(path: str) -> str:
    parts = path.split("/")
    return parts[parts.index(NAME) + 1] if NAME in parts[:-2] else ""


def _turn(name: str, subset: str, images: tuple[str, ...], shuffled: bool, asked: str, answered: str, unstated: dict
          ) -> Iterator[GroundingQuestion]:
    n = len(images)
    answer_boxes = _boxes(answered)
    if not answer_boxes:
        raise _Skip("no box in the answer")
    question, reference, marked = _question(asked, n)
    numbers = _numbers(answered, answer_boxes, n)
    if numbers is None:
        numbers = _elsewhere(question, marked, n, subset, len(answer_boxes), shuffled, unstated)
    if any(not 1 <= k <= n for k in numbers):
        raise _Skip("no such image")
    for _, _, box in answer_boxes:
        _checked(box)
    per_image: dict[int, list[Box]] = {}
    for k, (_, _, box) in zip(numbers, answer_boxes):
        per_image.setdefault(k, []).append(box)
    if reference is not None and per_image.get(1) == [reference]:  # the answer repeats the box that the question gave
        del per_image[1]
    if not per_image:
        raise _Skip("answer given in the question")
    for k, boxes in per_image.items():
        several = len(numbers) > len(boxes)
        yield GroundingQuestion(f"{name}-{k}" if several else name, subset, images,
                   f"{question} Answer for image {k} only." if several else question, tuple((k, b) for b in boxes), reference)


def _boxes(text: str) -> list[tuple[int, int, Box]]:
    found = list(BOX.finditer(text))
    if len(found) != text.count("<|box_start|>") or len(found) != text.count("<|box_end|>"):
        raise _Skip("box text cannot be read")
    try:
        return [(m.start(), m.end(), tuple(float(v) for v in m.groups())) for m in found]
    except ValueError:
        raise _Skip("box text cannot be read") from None


def _checked(box: Box) -> None:
    if not all(0 <= v <= 1000 for v in box):
        raise _Skip("box outside 0-1000")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise _Skip("degenerate box")


def _mentions(text: str, n: int) -> list[int]:
    words = [w for m in MENTION.finditer(text) for w in re.findall(ORDINAL + "|[0-9]{1,3}", m.group().lower())]
    return [n if w == "last" else WORDS.get(w) or int(re.match("[0-9]+", w).group()) for w in words]


def _question(asked: str, n: int) -> tuple[str, Box | None, int | None]:
    """The question as plain text, its reference box, and the number of the image which that is in."""
    boxes = _boxes(asked)
    reference = marked = None
    if len(boxes) > 1:
        raise _Skip("several reference boxes")
    if boxes:
        start, end, reference = boxes[0]
        _checked(reference)
        named = _mentions(asked[:start], n)
        marked = named[-1] if named else 1 if n == 1 else None
        if marked != 1:
            raise _Skip("reference box not said to be in the first image")
        asked = f"{asked[:start]}{{ref}}{asked[end:]}"
    asked = re.sub(r"^(?:\s*<image>)+", "", asked)
    for k in range(n - asked.count("<image>") + 1, n + 1):  # a tag inside the text stands for its image
        asked = asked.replace("<image>", f"image {k}", 1)
    text = " ".join(re.sub(r"<\|object_ref_(?:start|end)\|>", "", asked).split())
    if not text or "<|" in text:
        raise _Skip("question text cannot be read")
    return text, reference, marked


def _numbers(text: str, boxes: list, n: int) -> list[int] | None:
    """The image number of every box, said before the boxes or after them; None if the answer names no image."""
    gaps = [text[a:b] for a, b in zip([0, *(e for _, e, _ in boxes)], [*(s for s, _, _ in boxes), len(text)])]
    said = [sorted(set(_mentions(gap, n))) for gap in gaps]
    if not any(said):
        return None
    if any(found and COMPARES.search(gap) for gap, found in zip(gaps, said)):
        raise _Skip("image of a box unclear")
    if len(said[0]) == 1:
        numbers = said[0]
        for gap, found in zip(gaps[1:-1], said[1:-1]):
            if len(found) == 1:
                numbers = [*numbers, found[0]]
            elif not found and JOINT.fullmatch(gap):
                numbers = [*numbers, numbers[-1]]
            else:
                raise _Skip("image of a box unclear")
        return numbers
    if not said[0] and all(len(found) == 1 for found in said[1:]):
        return [found[0] for found in said[1:]]
    raise _Skip("image of a box unclear")


def _elsewhere(question: str, marked: int | None, n: int, subset: str, count: int, shuffled: bool, unstated: dict) -> list[int]:
    """The image numbers when the answer names none: one image, a box per frame, the question's image, or `unstated`."""
    if n == 1:
        return [1] * count
    if subset == "Object_Tracking" and count > 1:
        if shuffled:
            raise _Skip("shuffled film, order of the boxes unclear")
        if count != n:
            raise _Skip("tracking boxes do not fit the frames")
        return list(range(1, n + 1))
    named = set(_mentions(question, n)) - {marked}
    if len(named) == 1 and not COMPARES.search(question):
        return list(named) * count
    if subset in unstated and not named:
        return [unstated[subset]] * count
    raise _Skip("image not named")


def _in_time(images: tuple[str, ...], asked: str) -> tuple[tuple[str, ...], bool]:
    """The frames in time order, and whether the film was shuffled."""
    stamps = [re.search(r"([0-9]{1,12})\.[A-Za-z]+$", i) for i in images]
    known = all(stamps) and len({i.rsplit("/", 1)[0] for i in images}) == 1
    times = [int(s.group(1)) for s in stamps] if known else []
    in_order = times == sorted(times)
    if SHUFFLED.search(asked):
        if len(set(times)) != len(images):
            raise _Skip("shuffled film, order in time unknown")
        return tuple(image for _, image in sorted(zip(times, images))), not in_order
    if not in_order:
        raise _Skip("frames out of time order, which no question says")
    return images, False


def find_image_roots(root: Path) -> list[Path]:
    """Folders below `root` that stand for ./MGrounding-630k: the folder itself, root, and any below a nested home/."""
    found = [root / NAME, root]
    level = [root / "home"]
    for _ in range(5):
        level = [p for folder in level if folder.is_dir() for p in sorted(folder.iterdir()) if p.is_dir() and not p.is_symlink()]
        found += [p for p in level if p.name == NAME]
        level = [p for p in level if p.name != NAME]
    return found


def locate_image(root: Path, roots: list[Path], name: str) -> Path:
    """The file of an image path as written; BadImage if it leads out of `root` or is in none of the `roots`."""
    resolve_under_root(root, name)
    inner = name.split(f"{NAME}/", 1)[-1] if name.removeprefix("./").startswith(f"{NAME}/") else name
    for folder in roots:
        path = resolve_under_root(root, f"{folder.relative_to(root).as_posix()}/{inner}")
        if is_regular_file(path):
            return path
    raise BadImage("missing image", f"{name!r} is not below {root}; unpack its archive there")


def check_annotations(path: Path, root: Path, unstated: dict[str, int] | None = None, limit: int | None = None) -> SkipReport:
    """Read everything but the pixels: the quarantine report, missing images included. Run it before a model is loaded."""
    report = SkipReport()
    for _ in _located(path, root, report, unstated, limit):
        pass
    return report


def iter_samples(path: Path, root: Path, report: SkipReport, unstated: dict[str, int] | None = None, limit: int | None = None
            ) -> Iterator[Sample]:
    """The samples, images opened one question at a time; what is left out is counted in `report`.

    path: MGrounding-630k.json or one of the subsets' files. root: the folder the archives were unpacked in; no image is read
    from outside it. unstated: see `items`. limit: stop after so many samples. Boxes become pixels of the original images.
    """
    for item, paths in _located(path, root, report, unstated, limit):
        try:
            images = tuple(open_rgb(p) for p in paths)
        except BadImage as bad:
            report.kept -= 1
            report.add(bad.reason, f"{item.id}: {bad}")
            continue
        scale = [(k, rescale_box(box, (1000, 1000), images[k - 1].size)) for k, box in item.targets]
        reference = rescale_box(item.reference, (1000, 1000), images[0].size) if item.reference else None
        yield Sample(item.id, "mgrounding", item.subset or "mgrounding", "train", images, item.question, tuple(scale), reference)


def _located(path: Path, root: Path, report: SkipReport, unstated: dict | None, limit: int | None
             ) -> Iterator[tuple[GroundingQuestion, list[Path]]]:
    roots = find_image_roots(root)
    for index, record in enumerate(iter_records(path)):
        report.read += 1
        for item in record_questions(index, record, report, unstated):
            try:
                paths = [locate_image(root, roots, name) for name in item.images]
                for found in paths:
                    read_size(found)
            except BadImage as bad:
                report.add(bad.reason, f"{item.id}: {bad}")
                continue
            report.kept += 1
            yield item, paths
            if limit is not None and report.kept >= limit:
                return
