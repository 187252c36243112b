"""Your own data: a JSONL file, one question a line, checked before anything is trained on it.

    {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
     "box": [10, 20, 60, 90], "coordinates": "pixels"}          (on one line)

    images       paths below the image root, in prompt order
    question     text; "{ref}" where the reference box goes, if there is one
    image        number of the target image, from 1; or null: nothing in the images answers
    box          [x1, y1, x2, y2] in the target image; or
    boxes        a list of boxes, any of which is a correct answer
    targets      in place of these three: [{"image": 1, "box": [...]}, ...], which must all be found
    coordinates  of all boxes of the line: pixels (of the original image, upright),
                 normalized_1000 (0 to 1000 of its width and height) or normalized_1 (0 to 1)
    options      for multiple choice, in place of image, box and coordinates: 2 to 8 texts, and
    letter       the letter of the correct one, "A" for the first
    reference    optional: a box in the first image, with coordinates
    id           optional text, used once in the file
    task         optional text, which chooses the teacher's cue (CUE_OF_TASK in teacher_prompt.py)
    reply        optional text: the line's own reasoning and answer, as the model is to write them,
                 <think>...</think><answer>...</answer> with boxes in the run's own coordinates
                 (those of 01's parameters, not of the line); for the teacher "own" of stage 01

Where one line of a file has "targets" or "image": null, all its questions ask for all boxes (see
prompts.py): if only those did, the prompt would tell how many boxes there are.
"""

import difflib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mig_kit.boxes import Box, Coordinates, rescale_box
from mig_kit.common import MAX_LINE, iter_lines, progress_bar
from mig_kit.data.line_checks import ImageSizes, choice_problems, text_problem
from mig_kit.image_files import (
    BadImage,
    EncodedImage,
    LazyImages,
    SkipReport,
    resolve_under_root,
)
from mig_kit.prompts import MOST_BOXES
from mig_kit.sample import Sample, Target

MAX_IMAGES = 64
# the largest number that a box may hold; in pixels the image decides
LIMITS = {Coordinates.PIXELS: math.inf, Coordinates.NORMALIZED_1000: 1000,
          Coordinates.NORMALIZED_1: 1}
REQUIRED = ("images", "question", "image", "coordinates")
REQUIRED_FOR_CHOICE = ("images", "question", "options", "letter")
OPTIONAL = ("box", "boxes", "targets", "reference", "id", "task", "reply", "options", "letter")
# values of the key "unit", which "coordinates" replaced
NAME_OF_UNIT = {"pixels": "pixels", "0-1000": "normalized_1000", "0-1": "normalized_1"}


class OwnDataError(ValueError):
    """A line that cannot be used; the message names the line and the fix."""


def parse_line(line: bytes | None) -> tuple[dict, list[str]]:
    """The line's object, and what is wrong with it as far as the line alone tells.

    line: None for one over MAX_LINE bytes. The second value holds sentences, none if all is well.
    """
    data, problem = read_json(line)
    if not problem and not isinstance(data, dict):
        problem = "the line is no JSON object; write one {...} per line"
    return ({}, [problem]) if problem else (data, find_problems(data))


def read_json(line: bytes | None) -> tuple[object, str]:
    """What a line of JSON holds, and a sentence where it is none; line: as of `parse_line`."""
    if line is None:
        return None, f"the line is longer than {MAX_LINE} bytes; put one question on a line"
    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: name), ""
    except UnicodeDecodeError:
        return None, "the line is not UTF-8; save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        if not line.strip():
            return None, "the line is empty; delete it"
        is_syntax = isinstance(error, json.JSONDecodeError)
        reason = f"character {error.colno}: {error.msg}" if is_syntax else str(error)[:60]
        return None, f"the line is no JSON object ({reason}); write one {{...}} per line"


def find_problems(data: dict) -> list[str]:
    """What is wrong with a line's object as far as it alone tells; files are not looked at."""
    return _key_problems(data) or _value_problems(data)


def _is_choice(data: dict) -> bool:
    return "options" in data or "letter" in data


def _key_problems(data: dict) -> list[str]:
    known = REQUIRED + OPTIONAL
    is_empty = _names_no_box(data) and "reference" not in data
    optional = {"image": "targets" in data, "coordinates": is_empty}
    missing = [key for key in (REQUIRED_FOR_CHOICE if _is_choice(data) else REQUIRED)
               if key not in data and not optional.get(key)]
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
    if _is_choice(data):
        problems += [f"'{key}' does not go with 'options'; take one of them out"
                     for key in ("image", "box", "boxes", "targets") if key in data]
        if ("coordinates" in data) != ("reference" in data):
            problems.append("with 'options', 'coordinates' and 'reference' go together")
    elif _asks_for_all(data):
        extra = [key for key in ("image", "box", "boxes") if data.get(key) is not None]
        if extra:
            problems.append(f"'{extra[0]}' does not go with 'targets' or with 'image': null; "
                            "leave it out")
    elif ("box" in data) == ("boxes" in data):
        problems.append("give either 'box' or 'boxes'")
    return problems


def _asks_for_all(data: dict) -> bool:
    """Whether the line itself is a question for all boxes."""
    return "targets" in data or data.get("image", 0) is None


def _names_no_box(data: dict) -> bool:
    return _asks_for_all(data) and not data.get("targets")


def _old_unit_problem(unit: object) -> str:
    if isinstance(unit, str) and unit in NAME_OF_UNIT:
        return f'the key \'unit\' is now called \'coordinates\': "{NAME_OF_UNIT[unit]}"'
    return f"the key 'unit' is now called 'coordinates': one of {', '.join(LIMITS)}"


def _value_problems(data: dict) -> list[str]:
    problems = _image_problems(data) + _text_problems(data)
    if _is_choice(data):
        problems += choice_problems(data["options"], data["letter"])
    coordinates = data.get("coordinates", Coordinates.PIXELS)
    if not isinstance(coordinates, str) or coordinates not in LIMITS:
        renamed = NAME_OF_UNIT.get(coordinates) if isinstance(coordinates, str) else None
        hint = f"; '{coordinates}' is now called '{renamed}'" if renamed else ""
        return [*problems, f"'coordinates' must be one of {', '.join(LIMITS)}{hint}"]
    if "boxes" in data and not (isinstance(data["boxes"], list) and data["boxes"]):
        return [*problems, "'boxes' must be a list of boxes"]
    if "targets" in data and (problem := _targets_problem(data["targets"], data["images"])):
        return [*problems, problem]
    for name, box in _boxes_by_name(data):
        if problem := _box_problem(box, Coordinates(coordinates)):
            problems.append(f"{name} {problem}")
    return problems


def _image_problems(data: dict) -> list[str]:
    problems = []
    images, number = data["images"], data.get("image", 1)
    is_list = isinstance(images, list) and 1 <= len(images) <= MAX_IMAGES
    is_usable = is_list and all(isinstance(path, str) and path for path in images)
    if not is_usable:
        problems.append(f"'images' must be a list of 1 to {MAX_IMAGES} paths")
    if _asks_for_all(data):
        return problems
    if type(number) is not int or number < 1:
        problems.append("'image' must be the number of the target image, from 1")
    elif is_usable and number > len(images):
        problems.append(f"'image' is {number}, but there are {len(images)} images; "
                        "the first is number 1")
    return problems


def _targets_problem(targets: object, images: object) -> str:
    """What is wrong with 'targets' but for the numbers of its boxes; "" if nothing."""
    if not isinstance(targets, list) or not all(
            isinstance(target, dict) and target.keys() == {"image", "box"} for target in targets):
        return "'targets' must be a list of {\"image\": number, \"box\": [x1, y1, x2, y2]}"
    if len(targets) > MOST_BOXES:
        return f"'targets' holds {len(targets)} boxes; an answer has at most {MOST_BOXES}"
    for number, target in enumerate(targets, 1):
        if type(target["image"]) is not int or target["image"] < 1:
            return f"'targets' number {number}: 'image' must be the number of an image, from 1"
        if isinstance(images, list) and target["image"] > len(images):
            return (f"'targets' number {number} is in image {target['image']}, but there are "
                    f"{len(images)} images; the first is number 1")
        if target in targets[:number - 1]:
            return f"'targets' number {number} is there twice; leave one out"
    return ""


def _text_problems(data: dict) -> list[str]:
    problems = []
    question = data["question"]
    if problem := text_problem("'question'", question):
        problems.append(problem)
    elif ("{ref}" in question) != ("reference" in data):
        problems.append("'{ref}' in the question and 'reference' go together; "
                        "add the one that is missing")
    for key in ("id", "task"):
        text = data.get(key, "-")
        if not isinstance(text, str) or not text or not text.isprintable():
            problems.append(f"'{key}' must be printable text")
    if problem := text_problem("'reply'", data.get("reply", "-")):
        problems.append(problem)
    return problems


def _targets(data: dict) -> list[tuple[int, list]]:
    """The (image number, box) pairs of the line, in its coordinates."""
    if _asks_for_all(data):
        return [(target["image"], target["box"]) for target in data.get("targets") or ()]
    boxes = [data["box"]] if "box" in data else data.get("boxes", [])
    return [(data["image"], box) for box in boxes]


def _boxes_by_name(data: dict) -> list[tuple[str, object]]:
    """The line's boxes, each with the words for it in a message."""
    if _asks_for_all(data):
        boxes = [(f"the box of 'targets' number {number}", box)
                 for number, (_, box) in enumerate(_targets(data), 1)]
    elif "box" in data:
        boxes = [("'box'", data["box"])]
    else:
        boxes = [(f"'boxes' number {number}", box)
                 for number, box in enumerate(data.get("boxes", []), 1)]
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

    sizes: of `ImageSizes`.
    """
    problems = [f"image {number}: {size}" for number, size in enumerate(sizes, 1)
                if isinstance(size, BadImage)]
    if data.get("coordinates") != Coordinates.PIXELS:
        return problems
    boxes = _targets(data)
    if "reference" in data:
        boxes.append((1, data["reference"]))
    for number, box in boxes:
        size = sizes[number - 1]
        width, height = (math.inf, math.inf) if isinstance(size, BadImage) else size
        if box[2] > width or box[3] > height:
            problems.append(f"{box} leaves image {number}, which is {width}x{height} pixels; "
                            "boxes are in pixels of the original")
    return problems


def check_file(path: Path, root: Path, orientation: str = "upright"
               ) -> Iterator[tuple[int, list[str]]]:
    """(line number, what is wrong with it) of every line; an empty list for a correct line.

    Reads the pixels of every image once. In memory: one line, one image, a hash per id, to find an
    id that is used twice, and the sizes of MAX_SIZES images. orientation: one of ORIENTATIONS.
    """
    lines = _iter_checked(path, ImageSizes(root, orientation, decodes=True))
    return ((number, problems) for number, _, _, problems in lines)


def find_file_problems(data: dict, read_sizes: ImageSizes) -> tuple[list, list[str]]:
    """The sizes of the images of a line's object that is correct in itself, and what is wrong with
    their files.
    """
    sizes = [read_sizes(name) for name in data["images"]]
    return sizes, _file_problems(data, sizes)


def _iter_checked(path: Path, read_sizes: ImageSizes
                  ) -> Iterator[tuple[int, dict, list, list[str]]]:
    """(line number, its object, its images' sizes, what is wrong with it) of every line."""
    hashes: set[int] = set()
    find_all = file_asks_for_all(path)
    for number, line in iter_lines(path):
        data, problems = parse_line(line)
        sizes = []
        if not problems:
            sizes, problems = find_file_problems(data, read_sizes)
        if find_all and "boxes" in data:
            problems = [*problems, "'boxes' are alternatives, but other lines ask for all boxes; "
                                   "write 'targets', or put these lines into another file"]
        name = data.get("id", f"line-{number}")  # as `_make_sample` names it
        if isinstance(name, str):
            if hash(name) in hashes:
                problems = [*problems, f"id {name[:40]!r} is there twice"]
            hashes.add(hash(name))
        yield number, data, sizes, problems


def file_asks_for_all(path: Path) -> bool:
    """Whether a line has "targets" or "image": null, so that all questions ask for all boxes."""
    for _, line in iter_lines(path):
        if line is not None and (b"targets" in line or b"null" in line):
            if _asks_for_all(parse_line(line)[0]):
                return True
    return False


def require_correct_lines(path: Path, root: Path, limit: int | None = None,
                          orientation: str = "upright") -> int:
    """How many lines there are, at most `limit`; OwnDataError at the first that is wrong.

    Reads no pixels. A line whose only fault is a damaged image file is not wrong: `iter_samples`
    counts it. orientation: one of ORIENTATIONS.
    """
    n_lines = sum(1 for _ in islice(iter_lines(path), limit))
    lines = islice(_iter_checked(path, ImageSizes(root, orientation)), limit)
    for number, _, sizes, problems in progress_bar(lines, "check lines", total=n_lines):
        if problems and len(problems) > sum(map(_is_damaged, sizes)):
            raise _line_error(path, number, problems)
    return n_lines


def _is_damaged(size: tuple[int, int] | BadImage) -> bool:
    return isinstance(size, BadImage) and size.reason == "unreadable image"


def _line_error(path: Path, number: int, problems: list[str]) -> OwnDataError:
    return OwnDataError(f"{path} line {number}: {problems[0]} "
                        f"(mig-kit data check {path} lists every line)")


def iter_samples(path: Path, root: Path, limit: int | None = None,
                 orientation: str = "upright") -> Iterator[Sample]:
    """The samples; an image is decoded when it is looked at.

    limit: stop after so many lines. OwnDataError at the first wrong line: nothing is skipped.
    orientation: one of ORIENTATIONS.
    """
    for _, sample, _ in iter_replied_samples(path, root, limit, orientation=orientation):
        yield sample


def iter_replied_samples(path: Path, root: Path, limit: int | None = None,
                         report: SkipReport | None = None, orientation: str = "upright"
                         ) -> Iterator[tuple[int, Sample, str]]:
    """(line number, sample, the line's own reply or "") of every line; see `iter_samples`.

    report: where lines are counted, and those with a damaged image left out; None: an OwnDataError.
    """
    find_all = file_asks_for_all(path)
    lines = _iter_checked(path, ImageSizes(root, orientation))
    for number, data, sizes, problems in islice(lines, limit):
        if report is not None:
            report.read += 1
            if problems and len(problems) == sum(map(_is_damaged, sizes)):
                report.add("unreadable image", f"line {number}: {problems[0]}")
                continue
            report.kept += 1
        if problems:
            raise _line_error(path, number, problems)
        yield number, _make_sample(data, number, root, sizes, find_all), data.get("reply", "")


def _make_sample(data: dict, number: int, root: Path, sizes: list[tuple[int, int]],
                 find_all: bool) -> Sample:
    images = LazyImages(EncodedImage(resolve_under_root(root, name), size)
                        for name, size in zip(data["images"], sizes))
    coordinates = Coordinates(data.get("coordinates", Coordinates.PIXELS))
    targets = tuple(Target(image, _to_pixels(box, coordinates, sizes[image - 1]))
                    for image, box in _targets(data))
    reference = None
    if "reference" in data:
        reference = _to_pixels(data["reference"], coordinates, sizes[0])
    return Sample(data.get("id", f"line-{number}"), "own", data.get("task", "own"), "train",
                  images, data["question"], targets, reference,
                  tuple(data.get("options", ())), data.get("letter", ""),
                  find_all=find_all and not _is_choice(data))


def _to_pixels(box: list, coordinates: str, size: tuple[int, int]) -> Box:
    limit = LIMITS[coordinates]
    source = size if coordinates == Coordinates.PIXELS else (limit, limit)
    return rescale_box(tuple(float(value) for value in box), source, size)
