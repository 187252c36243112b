"""Your own data: a JSONL file, one question a line, checked before anything is trained on it.

    {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
     "box": [10, 20, 60, 90], "coordinates": "pixels"}          (on one line)

    images       paths below the image root, in prompt order
    question     text; "{ref}" where the reference box goes, if there is one
    image        number of the target image, from 1
    box          [x1, y1, x2, y2] in the target image; or
    boxes        a list of boxes, any of which is a correct answer
    coordinates  of all boxes of the line: pixels (of the original image), normalized_1000 (0 to
                 1000 of its width and height) or normalized_1 (0 to 1)
    reference    optional: a box in the first image
    id           optional text, used once in the file
    task         optional text, which chooses the teacher's cue (CUE_OF_TASK in teacher_prompt.py)
    reply        optional text: the line's own reasoning and answer, as the model is to write them,
                 <think>...</think><answer>...</answer> with boxes in the run's own coordinates
                 (those of 01's parameters, not of the line); for the teacher "own" of stage 01
"""

import difflib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mig_kit.boxes import Box, Coordinates, rescale_box
from mig_kit.common import MAX_LINE, iter_lines, progress_bar
from mig_kit.image_files import (
    BadImage,
    EncodedImage,
    LazyImages,
    SkipReport,
    read_size,
    resolve_under_root,
)
from mig_kit.sample import Sample, Target

MAX_IMAGES = 64
MAX_SIZES = 100_000  # of images whose sizes are kept in memory
# the largest number that a box may hold; in pixels the image decides
LIMITS = {Coordinates.PIXELS: math.inf, Coordinates.NORMALIZED_1000: 1000,
          Coordinates.NORMALIZED_1: 1}
REQUIRED = ("images", "question", "image", "coordinates")
OPTIONAL = ("box", "boxes", "reference", "id", "task", "reply")
# values of the key "unit", which "coordinates" replaced
NAME_OF_UNIT = {"pixels": "pixels", "0-1000": "normalized_1000", "0-1": "normalized_1"}


class OwnDataError(ValueError):
    """A line that cannot be used; the message names the line and the fix."""


def parse_line(line: bytes | None) -> tuple[dict, list[str]]:
    """The line's object, and what is wrong with it as far as the line alone tells.

    line: None for one over MAX_LINE bytes. The second value holds sentences, none if all is well.
    """
    if line is None:
        return {}, [f"the line is longer than {MAX_LINE} bytes; put one question on a line"]
    try:
        data = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: name)
    except UnicodeDecodeError:
        return {}, ["the line is not UTF-8; save the file as UTF-8"]
    except (ValueError, RecursionError) as error:
        reason = str(error)[:60]
        return {}, [f"the line is no JSON object ({reason}); write one {{...}} per line"]
    if not isinstance(data, dict):
        return {}, ["the line is no JSON object; write one {...} per line"]
    return data, _key_problems(data) or _value_problems(data)


def _key_problems(data: dict) -> list[str]:
    known = REQUIRED + OPTIONAL
    missing = [key for key in REQUIRED if key not in data]
    unknown = [key for key in data if key not in known]
    problems = []
    if "unit" in unknown:
        problems.append(_old_unit_problem(data["unit"]))
        unknown.remove("unit")
        missing = [key for key in missing if key != "coordinates"]
    problems += [f"'{key}' is missing" for key in missing]
    for key in unknown:
        near = difflib.get_close_matches(key[:40], known, 1, 0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        problems.append(f"unknown key {key[:40]!r}{hint}")
    if ("box" in data) == ("boxes" in data):
        problems.append("give either 'box' or 'boxes'")
    return problems


def _old_unit_problem(unit: object) -> str:
    if isinstance(unit, str) and unit in NAME_OF_UNIT:
        return f'the key \'unit\' is now called \'coordinates\': "{NAME_OF_UNIT[unit]}"'
    return f"the key 'unit' is now called 'coordinates': one of {', '.join(LIMITS)}"


def _value_problems(data: dict) -> list[str]:
    problems = _image_problems(data) + _text_problems(data)
    coordinates = data["coordinates"]
    if not isinstance(coordinates, str) or coordinates not in LIMITS:
        renamed = NAME_OF_UNIT.get(coordinates) if isinstance(coordinates, str) else None
        hint = f"; '{coordinates}' is now called '{renamed}'" if renamed else ""
        return [*problems, f"'coordinates' must be one of {', '.join(LIMITS)}{hint}"]
    if "boxes" in data and not (isinstance(data["boxes"], list) and data["boxes"]):
        return [*problems, "'boxes' must be a list of boxes"]
    for name, box in _boxes_by_name(data):
        if problem := _box_problem(box, Coordinates(coordinates)):
            problems.append(f"{name} {problem}")
    return problems


def _image_problems(data: dict) -> list[str]:
    problems = []
    images, number = data["images"], data["image"]
    is_list = isinstance(images, list) and 1 <= len(images) <= MAX_IMAGES
    is_usable = is_list and all(isinstance(path, str) and path for path in images)
    if not is_usable:
        problems.append(f"'images' must be a list of 1 to {MAX_IMAGES} paths")
    if type(number) is not int or number < 1:
        problems.append("'image' must be the number of the target image, from 1")
    elif is_usable and number > len(images):
        problems.append(f"'image' is {number}, but there are {len(images)} images; "
                        "the first is number 1")
    return problems


def _text_problems(data: dict) -> list[str]:
    problems = []
    question = data["question"]
    if not isinstance(question, str) or not question.strip() or _is_unwritable(question):
        problems.append("'question' must be text")
    elif ("{ref}" in question) != ("reference" in data):
        problems.append("'{ref}' in the question and 'reference' go together; "
                        "add the one that is missing")
    for key in ("id", "task"):
        text = data.get(key, "-")
        if not isinstance(text, str) or not text or not text.isprintable():
            problems.append(f"'{key}' must be printable text")
    reply = data.get("reply", "-")
    if not isinstance(reply, str) or not reply.strip() or _is_unwritable(reply):
        problems.append("'reply' must be text")
    return problems


def _is_unwritable(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" or character == "\0" for character in text)


def _target_boxes(data: dict) -> list:
    return [data["box"]] if "box" in data else data["boxes"]


def _boxes_by_name(data: dict) -> list[tuple[str, object]]:
    """The line's boxes, each with the words for it in a message."""
    if "box" in data:
        boxes = [("'box'", data["box"])]
    else:
        boxes = [(f"'boxes' number {number}", box) for number, box in enumerate(data["boxes"], 1)]
    if "reference" in data:
        boxes.append(("'reference'", data["reference"]))
    return boxes


def _box_problem(box: object, coordinates: Coordinates) -> str:
    """What is wrong with the box, as the end of a sentence; "" if nothing."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_coordinate, box)):
        return "must be four numbers [x1, y1, x2, y2]"
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return (f"is {box}: x2 must be greater than x1 and y2 than y1 "
                "(is it x, y, width, height?)")
    if min(box) < 0 or max(box) > LIMITS[coordinates]:
        return f"is {box}, outside '{coordinates}'; state the coordinates that the numbers are in"
    if coordinates != Coordinates.NORMALIZED_1 and min(width, height) < 1:
        return (f"is {box}, less than 1 wide or high in '{coordinates}'; "
                f"are the coordinates '{Coordinates.NORMALIZED_1}'?")
    return ""


def _is_coordinate(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9 and math.isfinite(value)


def _file_problems(data: dict, sizes: list[tuple[int, int] | BadImage]) -> list[str]:
    """What is wrong with the images: missing, outside the root, unreadable, or smaller than a box.

    sizes: of `_read_sizes`.
    """
    problems = [f"image {number}: {size}" for number, size in enumerate(sizes, 1)
                if isinstance(size, BadImage)]
    if data["coordinates"] != Coordinates.PIXELS:
        return problems
    boxes = [(data["image"], box) for box in _target_boxes(data)]
    if "reference" in data:
        boxes.append((1, data["reference"]))
    for number, box in boxes:
        size = sizes[number - 1]
        width, height = (math.inf, math.inf) if isinstance(size, BadImage) else size
        if box[2] > width or box[3] > height:
            problems.append(f"{box} leaves image {number}, which is {width}x{height} pixels; "
                            "boxes are in pixels of the original")
    return problems


class _Sizes:
    """Sizes of images below a root, read once each; the last MAX_SIZES are kept."""

    def __init__(self, root: Path):
        self.root, self.by_name = root, {}

    def __call__(self, name: str) -> tuple[int, int] | BadImage:
        if name not in self.by_name:
            if len(self.by_name) >= MAX_SIZES:
                self.by_name.clear()
            try:
                self.by_name[name] = read_size(resolve_under_root(self.root, name))
            except BadImage as error:
                return error
        return self.by_name[name]


def check_file(path: Path, root: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, what is wrong with it) of every line; an empty list for a correct line.

    Reads no pixels. In memory: one line, a hash per id, to find an id that is used twice, and the
    sizes of MAX_SIZES images.
    """
    return ((number, problems) for number, _, _, problems in _iter_checked(path, root))


def _iter_checked(path: Path, root: Path) -> Iterator[tuple[int, dict, list, list[str]]]:
    """(line number, its object, its images' sizes, what is wrong with it) of every line."""
    hashes: set[int] = set()
    read_sizes = _Sizes(root)
    for number, line in iter_lines(path):
        data, problems = parse_line(line)
        sizes = []
        if not problems:
            sizes = [read_sizes(name) for name in data["images"]]
            problems = _file_problems(data, sizes)
        name = data.get("id")
        if isinstance(name, str):
            if hash(name) in hashes:
                problems = [*problems, f"id {name[:40]!r} is there twice"]
            hashes.add(hash(name))
        yield number, data, sizes, problems


def require_correct_lines(path: Path, root: Path, limit: int | None = None) -> int:
    """How many lines there are, at most `limit`; OwnDataError at the first that is wrong.

    A line whose only fault is a damaged image file is not wrong: `iter_samples` counts it.
    """
    n_lines = sum(1 for _ in islice(iter_lines(path), limit))
    lines = islice(_iter_checked(path, root), limit)
    for number, _, sizes, problems in progress_bar(lines, "check lines", total=n_lines):
        if problems and len(problems) > sum(map(_is_damaged, sizes)):
            raise _line_error(path, number, problems)
    return n_lines


def _is_damaged(size: tuple[int, int] | BadImage) -> bool:
    return isinstance(size, BadImage) and size.reason == "unreadable image"


def _line_error(path: Path, number: int, problems: list[str]) -> OwnDataError:
    return OwnDataError(f"{path} line {number}: {problems[0]} "
                        f"(mig-kit data check {path} lists every line)")


def iter_samples(path: Path, root: Path, limit: int | None = None) -> Iterator[Sample]:
    """The samples; an image is decoded when it is looked at.

    limit: stop after so many lines. OwnDataError at the first wrong line: nothing is skipped.
    """
    for _, sample, _ in iter_replied_samples(path, root, limit):
        yield sample


def iter_replied_samples(path: Path, root: Path, limit: int | None = None,
                         report: SkipReport | None = None
                         ) -> Iterator[tuple[int, Sample, str]]:
    """(line number, sample, the line's own reply or "") of every line; see `iter_samples`.

    report: where lines are counted, and those with a damaged image left out; None: an OwnDataError.
    """
    for number, data, sizes, problems in islice(_iter_checked(path, root), limit):
        if report is not None:
            report.read += 1
            if problems and len(problems) == sum(map(_is_damaged, sizes)):
                report.add("unreadable image", f"line {number}: {problems[0]}")
                continue
            report.kept += 1
        if problems:
            raise _line_error(path, number, problems)
        yield number, _make_sample(data, number, root, sizes), data.get("reply", "")


def _make_sample(data: dict, number: int, root: Path, sizes: list[tuple[int, int]]) -> Sample:
    images = LazyImages(EncodedImage(resolve_under_root(root, name), size)
                        for name, size in zip(data["images"], sizes))
    coordinates = Coordinates(data["coordinates"])
    target_size = sizes[data["image"] - 1]
    targets = tuple(Target(data["image"], _to_pixels(box, coordinates, target_size))
                    for box in _target_boxes(data))
    reference = None
    if "reference" in data:
        reference = _to_pixels(data["reference"], coordinates, sizes[0])
    return Sample(data.get("id", f"line-{number}"), "own", data.get("task", "own"), "train",
                  images, data["question"], targets, reference)


def _to_pixels(box: list, coordinates: Coordinates, size: tuple[int, int]) -> Box:
    limit = LIMITS[coordinates]
    source = size if coordinates == Coordinates.PIXELS else (limit, limit)
    return rescale_box(tuple(float(value) for value in box), source, size)
