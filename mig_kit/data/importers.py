"""Data sets of other projects as files of own data: `mig-kit data import FORMAT FILE`.

A file is a JSON list, JSON lines, or a parquet table. The result passes the same checks as own
data. Images stay in place; those inside the file become files.
"""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from PIL import Image

from mig_kit.boxes import Coordinates, rescale_box
from mig_kit.common import write_atomically
from mig_kit.data.conversations import clean_question, conversation_lines, name_images, target_keys
from mig_kit.data.line_checks import (
    box_places,
    find_file_problems,
    find_problems,
    read_sizes_below,
    simplify_line,
)
from mig_kit.data.mgrounding import find_image_roots, locate_images, record_lines
from mig_kit.data.own_data import Remarks
from mig_kit.data.records import (
    ImportRules,
    Problem,
    SkipReport,
    entry_word,
    iter_entries,
    iter_records,
    require,
    require_records,
)
from mig_kit.image_files import DECODE_ERRORS, BadImage

FORMATS = (
    "own",  # own data whose images are in the file, or whose questions hold tags such as <image>
    "swift", "llava", "verl",  # conversations, see conversations.py
    "coco",  # a question per image and category, or per `caption` of an image (MDETR's RefCOCO)
    "refcoco",  # refs and their COCO file (`instances`), VLM-R1's list, or rows of lmms-lab
    "mgrounding")
MARGIN = 1.0  # pixels by which annotation tools let boxes leave the image
SYSTEM_REMARK = ("have a system turn that says how boxes are written ({!r}); it is left out, and "
                 "they are read as x1, y1, x2, y2 in {}")
OTHER_SPLIT = "of the split {0!r}, which --split {0} takes"
TURNS = ("rotation", "rotate", "angle", "theta")  # a box's, of CVAT, Label Studio and others
ASKS_FOR_CATEGORY, ASKS_FOR_PHRASE = "Find the {}.", "Find this: {}."


def import_file(form: str, path: Path, out: Path, rules: ImportRules,
                on_problem: Callable[[str], object]) -> SkipReport:
    """Write the correct questions of `path` to `out` as own data, and return the counts.

    Args:
        form: one of FORMATS.
        on_problem: called with a sentence for each thing that is left out.
    Raises: ValueError for rules that do not go together.
    """
    for given in filter(None, (path, rules.instances)):
        if out.exists() and out.samefile(given):
            raise ValueError(f"--out is {given} itself; name another file")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out} is in no folder that exists; make {out.parent} first")
    _check_rules(form, path, rules)
    folder = rules.root / f"{out.stem}_images"
    report = SkipReport()
    lines = _iter_correct(form, path, rules, folder, report, on_problem)
    first = next(lines, None)

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for place, line in chain([first], lines):
                file.write(json.dumps({"id": place.replace(" ", "-"), **line}) + "\n")

    if first is not None:  # else an older result stays
        write_atomically(out, write)
    return report


def _check_rules(form: str, path: Path, rules: ImportRules) -> None:
    require_records(path)
    coordinates = rules.coordinates
    require(form not in ("llava", "verl") or bool(coordinates),
            "files of this format do not say what their boxes are measured in; give "
            "--coordinates: pixels, normalized_1000 or normalized_1")
    require(form in ("swift", "llava", "verl") or not (coordinates or rules.is_padded),
            f"the format {form} says what its boxes are measured in; leave --coordinates and "
            "--padded out")
    require(form not in ("own", "mgrounding") or not rules.several,
            f"the format {form} says which boxes are meant; leave --several out")
    require(form != "coco" or entry_word(path) != "row",
            "the format coco is one JSON object with images, annotations and categories, and no "
            "parquet table; save it as that")
    require(rules.instances is None or form == "refcoco",
            "--instances is for the format refcoco; leave it out")
    require(not rules.is_padded or coordinates == Coordinates.NORMALIZED_1,
            "--padded is for boxes in 0 to 1 of the image padded to a square, as in LLaVA-1.5's "
            "files; add --coordinates normalized_1")


def _iter_correct(form: str, path: Path, rules: ImportRules, folder: Path, report: SkipReport,
                  on_problem: Callable[[str], object]) -> Iterator[tuple[str, dict]]:
    """(place, line) of every question that passes the checks; folder: for images in the file."""
    sizes = read_sizes_below(rules.root)
    roots = find_image_roots(rules.root) if form == "mgrounding" else []
    ids: set[int] = set()
    remarks = Remarks()
    for place, result in _iter_lines_of(form, path, rules):
        report.read += 1
        try:
            if isinstance(result, Problem):
                raise result
            line = locate_images(result, rules.root, roots) if roots else simplify_line(result)
            stated, box_rule = line.pop("stated_size", None), line.pop("box_rule", "")
            if isinstance(line.get("images"), list):
                line["images"] = [_image_name(image, rules.root, folder)
                                  for image in line["images"]]
            if rules.is_padded:
                _move_boxes(line, sizes, _unpad_box)
                line["coordinates"] = str(Coordinates.PIXELS)
            name = hash(str(line.get("id", place)))
            require(name not in ids, f"id {str(line.get('id'))[:40]!r} is there twice")
            problems = find_problems(line)
            if not problems and form in ("coco", "refcoco"):
                _compare_sizes(stated, sizes(line["images"][0]))
                _move_boxes(line, sizes, _trim_box)
            image_sizes = []
            if not problems:
                image_sizes, problems = find_file_problems(line, sizes)
            remarks.add(place, line, image_sizes, problems)
            require(not problems, "; ".join(problems))
        except (Problem, BadImage) as problem:
            report.add(problem.reason, place)
            on_problem(f"{place}: {problem}")
            continue
        report.kept += 1
        ids.add(name)
        if box_rule:
            remarks.notes[SYSTEM_REMARK.format(box_rule[:120], line.get("coordinates"))] += 1
        yield place, line
    report.remarks += remarks.sentences()


def _image_name(image: object, root: Path, folder: Path) -> str:
    """The path of an image below the root; bytes or base64 are written to `folder`."""
    content = image.get("bytes") if isinstance(image, dict) else None
    if isinstance(image, dict) and not content:
        image = image.get("path") or image.get("url")
    if isinstance(image, str) and image.startswith("data:"):
        content = image.partition(",")[2]
    if content:
        return _write_image(content, folder).relative_to(root).as_posix()
    require(isinstance(image, str) and bool(image), "an image must be named by its path")
    image = image.removeprefix("file://")
    require("://" not in image, f"the image {image[:60]!r} is an address; download it and name the "
                                "file")
    return image.removeprefix(os.path.abspath(root) + os.sep).removeprefix("./")


def _write_image(content: object, folder: Path) -> Path:
    """The file of an image's bytes, or of their base64, named by its SHA-256."""
    try:
        content = content if isinstance(content, bytes) else base64.b64decode(content)
        with Image.open(io.BytesIO(content)) as image:
            suffix = image.format.lower()
    except (*DECODE_ERRORS, TypeError) as error:
        raise Problem("the bytes of an image are none; write them into the file once more, or give "
                      "its path") from error
    path = folder / f"{hashlib.sha256(content).hexdigest()}.{suffix}"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def _move_boxes(line: dict, sizes: Callable, move: Callable[[list, tuple[int, int]], list]) -> None:
    """Replace every box of the line by `move` of it and its image's size."""
    for _, number, holder, key in box_places(line):
        require(1 <= number <= len(line["images"]), "the box is in an image that is not there")
        size = sizes(line["images"][number - 1])
        require(not isinstance(size, BadImage), str(size))
        holder[key] = move(holder[key], size)


def _compare_sizes(stated: tuple | None, size: tuple[int, int] | BadImage) -> None:
    """Problem where the file states another size of the image than its upright picture has."""
    if not isinstance(size, BadImage) and stated not in (None, size):
        raise Problem(f"the file says {stated[0]}x{stated[1]}, the image has {size[0]}x{size[1]} "
                      "pixels when it is upright; use the images that the file was made from, and "
                      "boxes of the upright picture")


def _trim_box(box: list, size: tuple[int, int]) -> list:
    """The box cut to the image, where it leaves it by no more than MARGIN."""
    return [min(value, limit) if value <= limit + MARGIN else value
            for value, limit in zip(box, (*size, *size))]


def _unpad_box(box: list, size: tuple[int, int]) -> list:
    require(all(0 <= value <= 1 for value in box), f"the box {box} is outside 0 to 1; are the "
                                                   "--coordinates others?")
    side = max(size)
    left, top = ((side - length) // 2 for length in size)
    x1, y1, x2, y2 = rescale_box(tuple(box), (1, 1), (side, side))
    return [min(max(x1 - left, 0), size[0]), min(max(y1 - top, 0), size[1]),
            min(max(x2 - left, 0), size[0]), min(max(y2 - top, 0), size[1])]


def _iter_lines_of(form: str, path: Path, rules: ImportRules
                   ) -> Iterator[tuple[str, dict | Problem]]:
    """(place, a question as a line of own data, or why there is none) of the file."""
    if form == "coco":
        yield from _iter_coco(path, rules)
        return
    annotations = _read_boxes(rules) if form == "refcoco" else {}
    word = entry_word(path)
    for number, record, problem in iter_entries(path):
        place = f"{word} {number}"
        try:
            require(not problem, problem)
            wrong_split = _wrong_split(rules.split, record, record.get("extra_info"))
            if form == "refcoco":
                lines = _refcoco_lines(record, annotations)
            elif form == "mgrounding":
                lines = record_lines(record)
            elif form == "own":
                lines = [_clean_line(record)]
            else:
                lines = conversation_lines(record, rules)
        except Problem as error:
            yield place, error
            continue
        for turn, line in enumerate(lines, 1):
            yield place if len(lines) == 1 else f"{place} turn {turn}", wrong_split or line


def _wrong_split(split: str, *records: object) -> Problem | None:
    """Why a question whose records name another split than this is left out; None if it is not."""
    names = [record["split"] for record in records
             if isinstance(record, dict) and isinstance(record.get("split"), str)]
    names = [name for name in names if name.strip().casefold() not in (split.casefold(), "")]
    return Problem(OTHER_SPLIT.format(names[0][:40])) if names else None


def _clean_line(record: dict) -> dict:
    """The line of own data as it is, but for tags in its question and options."""
    images, question, options = (record.get(key) for key in ("images", "question", "options"))
    line = {key: value for key, value in record.items() if key != "split"}
    if isinstance(question, str):
        line["question"] = clean_question(question, len(images) if isinstance(images, list) else 0)
    if isinstance(options, list):
        line["options"] = [name_images(option) if isinstance(option, str) else option
                           for option in options]
    return line


def _iter_coco(path: Path, rules: ImportRules) -> Iterator[tuple[str, dict | Problem]]:
    """A question per image and name of a category, or per image and caption."""
    groups: dict[tuple, list[dict]] = {}
    place = path.name
    try:
        images, categories = (_by_id(path, f"{key}.item") for key in ("images", "categories"))
        for number, record in enumerate(iter_records(path, prefix="annotations.item"), 1):
            place = f"annotation number {number}"
            try:
                require(isinstance(record, dict) and type(record.get("id")) in (int, str),
                        "an annotation must be an object with an id")
                place = f"annotation {record['id']!r}"
                image_id, category_id = record.get("image_id"), record.get("category_id")
                require(all(type(key) in (int, str) for key in (image_id, category_id)),
                        "'image_id' and 'category_id' must be ids")
                require(image_id in images, f"its image {image_id!r} is not in 'images'; use the "
                                            "file that lists it")
                image = images[image_id]
                name = image.get("caption") or categories.get(category_id, {}).get("name")
                require(isinstance(name, str), f"category {category_id!r} has no name; add it to "
                                               "'categories'")
                key = str(image.get("file_name", image_id)), " ".join(name.split()).casefold()
                groups.setdefault(key, []).append((record, name))
            except Problem as error:
                yield place[:200], error
        require(place != path.name, "there is no list 'annotations' with something in it; give a "
                                    "COCO instances file")
    except ValueError as error:  # the file is broken
        yield path.name, Problem(str(error))
        return
    for annotations in groups.values():
        first, name = annotations[0]
        image, boxes = images[first["image_id"]], []
        wrong_split = _wrong_split(rules.split, image, first)
        try:
            for annotation, _ in annotations:
                place = f"annotation {annotation['id']!r}"
                require(not annotation.get("iscrowd"),
                        "a crowd has no single box; leave annotations with iscrowd out")
                box = _corners(annotation)
                boxes += [box] * (box not in boxes)
            place = f"annotation {first['id']!r}"
            line = _ask_for(name, ASKS_FOR_PHRASE if image.get("caption") else ASKS_FOR_CATEGORY,
                            image)
            yield place, wrong_split or line | target_keys([1] * len(boxes), boxes, rules.several)
        except Problem as error:
            yield place, error


def _ask_for(name: str, question: str, image: dict) -> dict:
    """A line without its boxes; image: its record, with the path and perhaps the size."""
    sides = image.get("width"), image.get("height")
    is_stated = all(type(side) in (int, float) and side > 0 and side % 1 == 0 for side in sides)
    return {"images": [image.get("image") or image.get("file_name")],
            "coordinates": str(Coordinates.PIXELS),
            "question": question.format(name),
            "stated_size": (int(sides[0]), int(sides[1])) if is_stated else None}


def _by_id(path: Path, prefix: str) -> dict[int | str, dict]:
    """The objects of a list in a COCO file that have an id, by it."""
    return {record["id"]: record for record in iter_records(path, prefix=prefix)
            if isinstance(record, dict) and type(record.get("id")) in (int, str)}


def _corners(annotation: dict) -> list[float]:
    """[x1, y1, x2, y2] of COCO's [x, y, width, height], cut at 0 where at most MARGIN below."""
    box = annotation.get("bbox")
    for record in (annotation, *(part for part in annotation.values() if isinstance(part, dict))):
        for angle in (_to_angle(record.get(key)) for key in TURNS):
            require(angle % 360 == 0, "the box is turned, and a question has an upright one; write "
                                      f"the upright box around it (it is turned by {angle:g})")
    require(isinstance(box, list) and len(box) == 4
            and all(type(value) in (int, float) and abs(value) < 1e7 for value in box),
            "'bbox' must be four numbers [x, y, width, height]")
    x, y, width, height = box
    require(width > 0 and height > 0, f"'bbox' is {box}: width and height must be over 0")
    left, top = (0 if -MARGIN <= value < 0 else value for value in (x, y))
    return [left, top, x + width, y + height]


def _to_angle(value: object) -> float:
    """The number, also as text, or 0 for what is none."""
    value = simplify_line({"box": value})["box"]
    return value if type(value) in (int, float) and math.isfinite(value) else 0


def _read_boxes(rules: ImportRules) -> dict[int | str, tuple[dict, dict]]:
    """Annotation id -> (its image's record, itself) of the file `instances`; {} without one."""
    if rules.instances is None:
        return {}
    images = _by_id(rules.instances, "images.item")
    return {name: (images.get(record.get("image_id"), {}), record)
            for name, record in _by_id(rules.instances, "annotations.item").items()
            if type(record.get("image_id")) in (int, str)}


def _refcoco_lines(record: dict, annotations: dict) -> list[dict]:
    """A question per phrase of a ref or of a row of lmms-lab, or the one of a record of VLM-R1."""
    if "bbox" in record:
        phrases, box, image = record.get("answer"), _corners(record), record
        require(isinstance(phrases, list) and bool(phrases), "'answer' must be a list of phrases")
    elif "solution" in record:
        phrases, box = [record.get("normal_caption")], record["solution"]
        image = {**record, "file_name": record.get("image")}
    else:
        phrases = record.get("sentences")
        require(isinstance(phrases, list) and bool(phrases), "'sentences' must be a list")
        phrases = [phrase.get("sent") if isinstance(phrase, dict) else phrase for phrase in phrases]
        ann_id = record.get("ann_id")
        require(type(ann_id) in (int, str) and ann_id in annotations,
                f"annotation {str(ann_id)[:40]!r} is not there; give --instances with the "
                "instances.json of these refs")
        image, annotation = annotations[ann_id]
        box = _corners(annotation)
    require(all(isinstance(phrase, str) for phrase in phrases), "a phrase must be a text")
    return [{**_ask_for(phrase, ASKS_FOR_PHRASE, image), "image": 1, "box": box}
            for phrase in phrases]
