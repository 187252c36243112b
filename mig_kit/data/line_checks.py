"""What is wrong with a line of own data: its keys, texts, options, boxes and image files."""

import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from mig_kit.boxes import Coordinates
from mig_kit.common import suggest_word
from mig_kit.image_files import (
    BadImage,
    check_decodes,
    read_image_file,
    read_size,
    resolve_under_root,
)
from mig_kit.prompts import LETTERS, MOST_BOXES

MAX_IMAGES = 64
MAX_SIZES = 100_000  # of images whose sizes are kept in memory
# the largest number that a box may hold; in pixels the image decides
LIMITS = {Coordinates.PIXELS: math.inf, Coordinates.NORMALIZED_1000: 1000,
          Coordinates.NORMALIZED_1: 1}
REQUIRED = ("images", "question", "image", "coordinates")
REQUIRED_FOR_CHOICE = ("images", "question", "options", "letter")
KNOWN = (*REQUIRED, "box", "boxes", "targets", "reference", "id", "task", "reply", "options",
         "letter")
NUMERIC = ("image", "box", "boxes", "targets", "reference")
NUMBER = re.compile(r" ?[-+]?(?:[0-9]{1,20}\.?[0-9]{0,20}|\.[0-9]{1,20})(?:e[-+]?[0-9])? ?")
ADDRESS = re.compile("(?!file:)[a-z0-9]{2,5}://")
# a key of another project's layout -> the importer that reads it
IMPORTER_OF_KEY = {"objects": "swift", "query": "swift", "messages": "llava",
                   "conversations": "llava", "problem": "verl", "prompt": "verl",
                   "annotations": "coco", "sentences": "refcoco", "normal_caption": "refcoco"}
BOXES_ALONE = (
    "'objects' without 'messages' holds boxes without a question, as in imagefolder and cppe-5; "
    "save them as a COCO instances file, with images, annotations and categories, and mig-kit data "
    "import coco FILE --out OUT asks for each category")
# <|im_start|>, <|image_pad|> and the like: text that a tokenizer reads as a control token
CONTROL_TOKEN = re.compile(r"<\|[a-z0-9_]{1,40}\|>")
UNWRITABLE = re.compile("[\ud800-\udfff\0]")
# what other projects write where an image stands, with its number if it has one: <image>, <image_1>
IMAGE_TAG = re.compile(
    r"<img>[^<>\n]{1,300}</img>|</?\s?(?:(?:start|end)_of_)?(?:image|img|im|picture|photo|frame)"
    r"(?:[\s_-]?(?:soft|here|token|pad|placeholder|patch|start|end))*(?:[\s_#-]{0,2}([0-9]{1,3}))?"
    r"\s?/?>|<img\b[^<>\n]{1,300}>|!\[[^\[\]\n]{0,99}\]\([^()\n]{1,300}\)"
    r"|\[(?:IMG|IMAGE)(?:[\s_]?([0-9]{1,3}))?\]|\{(?:image|img)(?:[\s_]?([0-9]{1,3}))?\}",
    re.IGNORECASE)
# where a box, a region, its name, a video or a sound stands
BOX_TAG = re.compile(r"</?(?:bbox|box|ref|ref-object|object|obj|region|point|loc|mask|seg|quad|p"
                     r"|video|audio)(?:[\s_-]?[0-9]{1,4})?\s?/?>|\{(?:bbox|box)\}", re.IGNORECASE)


def simplify_line(data: dict) -> dict:
    """The line with numbers for text and 2.0, and paths for data sets' {"path": ...}."""
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


def is_choice(data: dict) -> bool:
    """Whether the line is a multiple-choice question."""
    return "options" in data or "letter" in data


def asks_for_all(data: dict) -> bool:
    """Whether the line itself is a question for all boxes."""
    return "targets" in data or data.get("image", 0) is None


def find_problems(data: dict) -> list[str]:
    """What is wrong with a line from `simplify_line`, without a look at its image files."""
    return _layout_problems(data) or _key_problems(data) or _value_problems(data)


def _layout_problems(data: dict) -> list[str]:
    is_lmms_lab = {"bbox", "answer"} <= data.keys()
    if "question" in data and not is_lmms_lab:
        return []
    if "objects" in data and not {"messages", "query", "conversations", "problem"} & data.keys():
        return [BOXES_ALONE]
    for key, importer in [*[("answer", "refcoco")] * is_lmms_lab, *IMPORTER_OF_KEY.items()]:
        if key in data:
            return [f"the key '{key}' is of another project's layout; mig-kit data import "
                    f"{importer} FILE --out OUT writes it as own data"]
    return [f"a list of questions under the key {key[:40]!r}; save that list as the file"
            for key, value in data.items()
            if isinstance(value, list) and value and isinstance(value[0], dict)
            and key not in KNOWN][:1]


def _key_problems(data: dict) -> list[str]:
    is_empty = asks_for_all(data) and not data.get("targets") and "reference" not in data
    is_optional = {"image": "targets" in data, "coordinates": is_empty}
    problems = [f"'{key}' is missing"
                for key in (REQUIRED_FOR_CHOICE if is_choice(data) else REQUIRED)
                if key not in data and not is_optional.get(key)]
    for key in (key for key in data if key not in KNOWN):
        hint = suggest_word(key[:40], KNOWN, 0.5)
        problems.append("; ".join(filter(None, (f"unknown key {key[:40]!r}", hint))))
    if is_choice(data):
        problems += [f"'{key}' does not go with 'options'; take one of them out"
                     for key in ("image", "box", "boxes", "targets") if key in data]
        if ("coordinates" in data) != ("reference" in data):
            problems.append("with 'options', 'coordinates' and 'reference' go together")
    elif asks_for_all(data):
        problems += [f"'{key}' does not go with 'targets' or with 'image': null; leave it out"
                     for key in ("image", "box", "boxes") if data.get(key) is not None][:1]
    elif ("box" in data) == ("boxes" in data):
        problems.append("give either 'box' or 'boxes'")
    return problems


def _value_problems(data: dict) -> list[str]:
    problems = [_images_problem(data["images"])]
    if not is_choice(data) and not asks_for_all(data):
        hint = "; null says that no image shows it" if data["image"] == 0 else ""
        problems.append(_number_problem(data["image"], data["images"]) + hint)
    problems.append(text_problem("'question'", data["question"]))
    if not problems[-1] and ("{ref}" in data["question"]) != ("reference" in data):
        problems.append("'{ref}' in the question and 'reference' go together; "
                        "add the one that is missing")
    for key in ("id", "task"):
        text = data.get(key, "-")
        is_printable = isinstance(text, str) and text and text.isprintable()
        problem = "" if is_printable else f"'{key}' must be printable text"
        problems.append(_unwritable_problem(f"'{key}'", text) or problem)
    problems.append(text_problem("'reply'", data.get("reply", "-"), may_hold_tags=True))
    if is_choice(data):
        problems += _choice_problems(data["options"], data["letter"])
    coordinates = data.get("coordinates", Coordinates.PIXELS)
    if coordinates not in list(LIMITS):
        problems.append(f"'coordinates' must be one of {', '.join(LIMITS)}")
    elif "boxes" in data and not (isinstance(data["boxes"], list) and data["boxes"]):
        problems.append("'boxes' must be a list of boxes")
    elif "targets" in data and (problem := _targets_problem(data["targets"], data["images"])):
        problems.append(problem)
    else:
        problems += [f"{name} {problem}" for name, _, holder, key in box_places(data)
                     if (problem := _box_problem(holder[key], Coordinates(coordinates)))]
    return [problem for problem in problems if problem]


def _images_problem(images: object) -> str:
    if images == []:
        return ("'images' is empty; questions are divided into sets, and read together, by their "
                "images: leave those without one out")
    is_list = isinstance(images, list) and len(images) <= MAX_IMAGES
    if is_list and any(image.get("bytes") if isinstance(image, dict) else
                       isinstance(image, str) and image.startswith("data:") for image in images):
        return ("an image is in the file itself; mig-kit data import own FILE --out OUT writes "
                "such images as files")
    if not is_list or not all(isinstance(path, str) and path for path in images):
        return f"'images' must be a list of 1 to {MAX_IMAGES} paths"
    if problem := _unwritable_problem("the path of an image", "".join(images)):
        return problem
    if any(ADDRESS.match(image) for image in images):
        return "an image is an address; download it, and give the path of the file"
    return ""


def _number_problem(number: object, images: object) -> str:
    if type(number) is not int or number < 1:
        return "'image' must be the number of an image, from 1"
    if isinstance(images, list) and 0 < len(images) < number:
        return f"'image' is {number}, but there are {len(images)} images; the first is number 1"
    return ""


def _targets_problem(targets: object, images: object) -> str:
    """What is wrong with 'targets', without the numbers of its boxes; "" if nothing."""
    if not isinstance(targets, list) or not all(
            isinstance(target, dict) and target.keys() == {"image", "box"} for target in targets):
        return "'targets' must be a list of {\"image\": number, \"box\": [x1, y1, x2, y2]}"
    if len(targets) > MOST_BOXES:
        return f"'targets' holds {len(targets)} boxes; an answer has at most {MOST_BOXES}"
    for number, target in enumerate(targets, 1):
        if problem := _number_problem(target["image"], images):
            return f"'targets' number {number}: {problem}"
        if target in targets[:number - 1]:
            return f"'targets' number {number} is there twice; leave one out"
    return ""


def box_places(data: dict) -> list[tuple[str, int, dict | list, str | int]]:
    """(words, image number, holder, key in the holder) of every box; the reference is last."""
    if asks_for_all(data):
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
    if not isinstance(box, list) or len(box) != 4 or not all(
            type(value) in (int, float) and abs(value) < 1e9 for value in box):
        has_text = isinstance(box, str) or (
            isinstance(box, list) and any(isinstance(value, str) for value in box))
        return f"must be four numbers [x1, y1, x2, y2]{', not text in quotes' * has_text}"
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


def _unwritable_problem(name: str, text: object) -> str:
    if isinstance(text, str) and (match := UNWRITABLE.search(text)):
        what = "the character" if match[0] == "\0" else "half an emoji,"
        return (f"{name} holds {what} \\u{ord(match[0]):04x}, which no file of text can hold; "
                "write the whole character, or take it out")
    return ""


def text_problem(name: str, text: object, may_hold_tags: bool = False) -> str:
    """Why the text called `name` cannot stand in a prompt, or in a reply (with tags); "" if it can.
    """
    if problem := _unwritable_problem(name, text):
        return problem
    if not isinstance(text, str) or not text.strip():
        return f"{name} must be text"
    if token := CONTROL_TOKEN.search(text):
        return (f"{name} holds {token.group()}, which the model reads as a control token and not "
                "as text; take it out")
    if not may_hold_tags and (tag := IMAGE_TAG.search(text)):
        return (f"{name} holds {tag.group()[:40]}, which is text to the model and costs points: "
                "images stand before the question, in their order, and are called image 1, image "
                "2; mig-kit data import own FILE --out OUT takes such tags out")
    if not may_hold_tags and (tag := BOX_TAG.search(text)):
        return (f"{name} holds {tag.group()}, which is text to the model and costs points: write "
                "{ref} for the box 'reference', else take it out")
    return ""


def _choice_problems(options: object, letter: object) -> list[str]:
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        return [f"'options' must be a list of 2 to {len(LETTERS)} texts"]
    problems = [text_problem(f"'options' number {number}", option)
                for number, option in enumerate(options, 1)]
    texts = [" ".join(str(option).split()) for option in options]
    problems += [f"'options' number {texts.index(text) + 1} and {number} are the same; no letter "
                 "is the correct one" for number, text in enumerate(texts, 1)
                 if texts.index(text) + 1 < number]
    if letter not in list(LETTERS[:len(options)]):
        problems.append(f"'letter' must be that of the correct option, A to "
                        f"{LETTERS[len(options) - 1]}")
    return problems


def find_file_problems(data: dict, read_sizes: Callable) -> tuple[list, list[str]]:
    """The images' sizes, and what is wrong with the image files of an otherwise correct line."""
    sizes = [read_sizes(name, takes_frames=is_choice(data)) for name in data["images"]]
    problems = [f"image {number}: {size}" for number, size in enumerate(sizes, 1)
                if isinstance(size, BadImage)]
    if data.get("coordinates") == Coordinates.PIXELS:
        for _, number, holder, key in box_places(data):
            box, size = holder[key], sizes[number - 1]
            if not isinstance(size, BadImage) and (box[2] > size[0] or box[3] > size[1]):
                problems.append(f"{box} leaves image {number}, which is {size[0]}x{size[1]} "
                                "pixels; boxes are in pixels of the original")
    return sizes, problems


def read_sizes_below(root: Path, decodes: bool = False
                     ) -> Callable[..., tuple[int, int] | BadImage]:
    """A function from an image's name to its upright (width, height), pixels, or to a BadImage.

    Args:
        root: the folder that names are relative to.
        decodes: also read all pixels, so that cut files are found.
    Returns: a function of (name, takes_frames), which remembers MAX_SIZES images. takes_frames:
        whether the image may be a film, of which the first frame counts.
    """
    @lru_cache(MAX_SIZES)
    def read(name: str, takes_frames: bool = False) -> tuple[int, int] | BadImage:
        try:
            path = resolve_under_root(root, name)
            size = read_size(path, takes_frames)
            if decodes:
                check_decodes(read_image_file(path), path)
        except BadImage as error:
            return error.with_traceback(None)
        return size

    return read
