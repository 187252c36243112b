"""Your own data: JSON lines or a JSON list, one question each, checked before anyone trains on it.

    {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
     "box": [10, 20, 60, 90], "coordinates": "pixels"}          (on one line)

    images       paths below the image root, in prompt order; data sets' {"path": ...} is read, too
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
prompts.py): if only those did, the prompt would tell how many boxes there are. A number may be
written as text or as 2.0.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mig_kit.boxes import Box, Coordinates, rescale_box
from mig_kit.common import iter_lines, progress_bar
from mig_kit.data.line_checks import choice_problems, read_sizes_below, text_problem
from mig_kit.data.records import entry_word, iter_entries, read_columns
from mig_kit.image_files import (
    BadImage,
    EncodedImage,
    LazyImages,
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
NUMERIC = ("image", "box", "boxes", "targets", "reference")
NUMBER = re.compile(r"\s?[-+]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:e[-+]?[0-9])?\s?")
ADDRESS = re.compile("(?!file:)[a-z0-9]{2,5}://")
# a key of another project's layout -> the importer that reads it
IMPORTER_OF_KEY = {"objects": "swift", "query": "swift", "messages": "llava",
                   "conversations": "llava", "problem": "verl", "prompt": "verl",
                   "annotations": "coco", "sentences": "refcoco", "normal_caption": "refcoco"}


class OwnDataError(ValueError):
    """A line that cannot be used; the message names the line and the fix."""


@dataclass(frozen=True)
class Line:
    """A line of a file, checked.

    number: from 1. problems: sentences. sample: None where there are problems. reply: the line's
    own, or "". is_damaged: whether nothing is wrong but that image files cannot be read.
    """

    number: int
    problems: list[str]
    sample: Sample | None = None
    reply: str = ""
    is_damaged: bool = False


def simplify_line(data: dict) -> dict:
    """The line with numbers in place of text and of 2.0, and the paths of data sets' {"path": ...}.
    """
    simple = {key: _to_numbers(value) if key in NUMERIC else value for key, value in data.items()}
    if isinstance(data.get("images"), list):
        simple["images"] = [image["path"] if isinstance(image, dict) and image.get("path")
                            and not image.get("bytes") else image for image in data["images"]]
    return simple


def _to_numbers(value: object, depth: int = 3) -> object:
    """The value with its text of numbers as numbers, whole ones as int."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value % 1 == 0 and abs(value) < 1e9:
        return int(value)
    if isinstance(value, list) and depth:
        return [_to_numbers(part, depth - 1) for part in value]
    if isinstance(value, dict) and depth:
        return {key: _to_numbers(part, depth - 1) for key, part in value.items()}
    return value


def find_problems(data: dict) -> list[str]:
    """What is wrong with a line of `simplify_line` as far as it alone tells; files are not looked
    at.
    """
    return _layout_problems(data) or _key_problems(data) or _value_problems(data)


def _layout_problems(data: dict) -> list[str]:
    if "question" in data:
        return []
    for key, importer in IMPORTER_OF_KEY.items():
        if key in data:
            return [f"the key '{key}' is of another project's layout; mig-kit data import "
                    f"{importer} FILE --out OUT writes it as own data"]
    return [f"a list of questions under the key {key[:40]!r}; save that list as the file"
            for key, value in data.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
            and key not in REQUIRED + OPTIONAL][:1]


def _is_choice(data: dict) -> bool:
    return "options" in data or "letter" in data


def _key_problems(data: dict) -> list[str]:
    known = REQUIRED + OPTIONAL
    is_empty = _asks_for_all(data) and not data.get("targets") and "reference" not in data
    optional = {"image": "targets" in data, "coordinates": is_empty}
    missing = [key for key in (REQUIRED_FOR_CHOICE if _is_choice(data) else REQUIRED)
               if key not in data and not optional.get(key)]
    problems = [f"'{key}' is missing" for key in missing]
    for key in (key for key in data if key not in known):
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


def _value_problems(data: dict) -> list[str]:
    problems = _image_problems(data) + _text_problems(data)
    if _is_choice(data):
        problems += choice_problems(data["options"], data["letter"])
    coordinates = data.get("coordinates", Coordinates.PIXELS)
    if not isinstance(coordinates, str) or coordinates not in LIMITS:
        return [*problems, f"'coordinates' must be one of {', '.join(LIMITS)}"]
    if "boxes" in data and not (isinstance(data["boxes"], list) and data["boxes"]):
        return [*problems, "'boxes' must be a list of boxes"]
    if "targets" in data and (problem := _targets_problem(data["targets"], data["images"])):
        return [*problems, problem]
    named = [(name, _box_problem(holder[key], Coordinates(coordinates)))
             for name, _, holder, key in box_places(data)]
    return problems + [f"{name} {problem}" for name, problem in named if problem]


def _image_problems(data: dict) -> list[str]:
    images, number = data["images"], data.get("image", 1)
    is_list = isinstance(images, list) and 1 <= len(images) <= MAX_IMAGES
    is_usable = is_list and all(isinstance(path, str) and path for path in images)
    problems = [] if is_usable else [f"'images' must be a list of 1 to {MAX_IMAGES} paths"]
    if images == []:
        problems = ["'images' is empty; questions are divided into sets, and read together, by "
                    "their images: leave those without one out"]
    elif is_list and any(_is_content(image) for image in images):
        problems = ["an image is in the file itself; mig-kit data import own FILE --out OUT writes "
                    "such images as files"]
    elif is_usable and any(ADDRESS.match(image) for image in images):
        problems = ["an image is an address; download it, and give the path of the file"]
    if _asks_for_all(data):
        return problems
    if type(number) is not int or number < 1:
        problems.append("'image' must be the number of the target image, from 1")
    elif is_usable and number > len(images):
        problems.append(f"'image' is {number}, but there are {len(images)} images; "
                        "the first is number 1")
    return problems


def _is_content(image: object) -> bool:
    """Whether an image is given as its bytes or base64."""
    if isinstance(image, dict):
        return bool(image.get("bytes"))
    return isinstance(image, str) and image.startswith("data:")


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
    if problem := text_problem("'reply'", data.get("reply", "-"), may_hold_tags=True):
        problems.append(problem)
    return problems


def box_places(data: dict) -> list[tuple[str, int, dict | list, str | int]]:
    """(words for it, the number of its image, what holds it, its key there) of the line's boxes,
    the reference last.
    """
    if _asks_for_all(data):
        places = [(f"the box of 'targets' number {number}", target["image"], target, "box")
                  for number, target in enumerate(data.get("targets") or (), 1)]
    elif "box" in data:
        places = [("'box'", data["image"], data, "box")]
    else:
        places = [(f"'boxes' number {index + 1}", data["image"], data["boxes"], index)
                  for index in range(len(data.get("boxes", ())))]
    return places + [("'reference'", 1, data, "reference")] * ("reference" in data)


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

    sizes: of `read_sizes_below`.
    """
    problems = [f"image {number}: {size}" for number, size in enumerate(sizes, 1)
                if isinstance(size, BadImage)]
    if data.get("coordinates") != Coordinates.PIXELS:
        return problems
    for _, number, holder, key in box_places(data):
        box, size = holder[key], sizes[number - 1]
        width, height = (math.inf, math.inf) if isinstance(size, BadImage) else size
        if box[2] > width or box[3] > height:
            problems.append(f"{box} leaves image {number}, which is {width}x{height} pixels; "
                            "boxes are in pixels of the original")
    return problems


def check_file(path: Path, root: Path, orientation: str = "upright",
               measure: Callable[[Sample], str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """(line number, what is wrong with it) of every line; an empty list for a correct line.

    Reads the pixels of every image once. In memory: one line, one image, a hash per id, to find an
    id that is used twice, and the sizes of MAX_SIZES images. orientation: one of ORIENTATIONS.
    measure: gives a sentence on a sample that is too long for a model, or "".
    """
    for line in iter_checked_lines(path, root, orientation, decodes=True):
        problem = measure(line.sample) if measure and line.sample else ""
        yield line.number, [*line.problems, problem] if problem else line.problems


def find_file_problems(data: dict, read_sizes: Callable) -> tuple[list, list[str]]:
    """The sizes of the images of a line's object that is correct in itself, and what is wrong with
    their files. read_sizes: of `read_sizes_below`.
    """
    sizes = [read_sizes(name, takes_frames=_is_choice(data)) for name in data["images"]]
    return sizes, _file_problems(data, sizes)


def iter_checked_lines(path: Path, root: Path, orientation: str = "upright",
                       decodes: bool = False) -> Iterator[Line]:
    """Every line of the file; ValueError for a file that holds no JSON.

    orientation, decodes: of `read_sizes_below`.
    """
    read_sizes = read_sizes_below(root, orientation, decodes)
    hashes: set[int] = set()
    word = entry_word(path)
    if word == "row":
        names = read_columns(path)
        layout = next((form for key, form in IMPORTER_OF_KEY.items() if key in names), "own")
        raise OwnDataError(f"{path} is a parquet table; mig-kit data import {layout} {path} --out "
                           "OUT writes it and the images in it as own data")
    find_all = file_asks_for_all(path)
    for number, record, problem in iter_entries(path):
        if not problem and not isinstance(record, dict):
            problem = f"the {word} is no JSON object; write one {{...}} per {word}"
        data = {} if problem else simplify_line(record)
        problems = [problem] if problem else find_problems(data)
        sizes = []
        if not problems:
            sizes, problems = find_file_problems(data, read_sizes)
        if find_all and "boxes" in data:
            problems = [*problems, "'boxes' are alternatives, but other lines ask for all boxes; "
                                   "write 'targets', or put these lines into another file"]
        name = data.setdefault("id", f"{word}-{number}")
        if isinstance(name, str):
            if hash(name) in hashes:
                problems = [*problems, f"id {name[:40]!r} is there twice"]
            hashes.add(hash(name))
        if problems:
            n_damaged = sum(isinstance(size, BadImage) and size.reason == "unreadable image"
                            for size in sizes)
            yield Line(number, problems, is_damaged=len(problems) == n_damaged)
        else:
            yield Line(number, [], _make_sample(data, root, sizes, find_all),
                       data.get("reply", ""))


def file_asks_for_all(path: Path) -> bool:
    """Whether a line has "targets" or "image": null, so that all questions ask for all boxes."""
    is_possible = any(line is None or b"targets" in line or b"null" in line
                      for _, line in iter_lines(path))
    return is_possible and any(isinstance(record, dict) and _asks_for_all(record)
                               for _, record, _ in iter_entries(path))


def iter_usable_lines(path: Path, root: Path, limit: int | None = None,
                      orientation: str = "upright") -> Iterator[Line]:
    """Every line, at most `limit`; OwnDataError at the first that is wrong.

    Reads no pixels. A line whose only fault is a damaged image file is not wrong, and has no
    sample. orientation: one of ORIENTATIONS.
    """
    for line in islice(iter_checked_lines(path, root, orientation), limit):
        if line.problems and not line.is_damaged:
            raise _line_error(path, line)
        yield line


def require_correct_lines(path: Path, root: Path, limit: int | None = None,
                          orientation: str = "upright") -> int:
    """How many lines `iter_usable_lines` gives, and raises as it does; shows a bar."""
    n_lines = None
    if entry_word(path) == "line":
        n_lines = sum(1 for _ in islice(iter_lines(path), limit))
    bar = progress_bar(iter_usable_lines(path, root, limit, orientation), "check lines",
                       total=n_lines)
    return sum(1 for _ in bar)


def _line_error(path: Path, line: Line) -> OwnDataError:
    word = entry_word(path)
    return OwnDataError(f"{path} {word} {line.number}: {line.problems[0]} "
                        f"(mig-kit data check {path} lists every {word})")


def iter_samples(path: Path, root: Path, limit: int | None = None,
                 orientation: str = "upright") -> Iterator[Sample]:
    """The samples of `iter_usable_lines`; an image is decoded when it is looked at. OwnDataError
    for a damaged image, too: nothing is skipped.
    """
    for line in iter_usable_lines(path, root, limit, orientation):
        if line.problems:
            raise _line_error(path, line)
        yield line.sample


def _make_sample(data: dict, root: Path, sizes: list[tuple[int, int]],
                 find_all: bool) -> Sample:
    images = LazyImages(EncodedImage(resolve_under_root(root, name), size)
                        for name, size in zip(data["images"], sizes))
    coordinates = Coordinates(data.get("coordinates", Coordinates.PIXELS))
    targets = [Target(image, _to_pixels(holder[key], coordinates, sizes[image - 1]))
               for _, image, holder, key in box_places(data)]
    reference = targets.pop().box if "reference" in data else None
    return Sample(data["id"], "own", data.get("task", "own"), "train",
                  images, data["question"], tuple(targets), reference,
                  tuple(data.get("options", ())), data.get("letter", ""),
                  find_all=find_all and not _is_choice(data))


def _to_pixels(box: list, coordinates: str, size: tuple[int, int]) -> Box:
    limit = LIMITS[coordinates]
    source = size if coordinates == Coordinates.PIXELS else (limit, limit)
    return rescale_box(tuple(float(value) for value in box), source, size)
