"""Data sets of other projects as files of own data: `mig-kit data import FORMAT FILE`.

Images stay in place; those inside the file become files. The result passes the checks of own data.
"""

import base64
import hashlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.common import write_atomically
from mig_kit.data.conversations import name_tags, read_record, target_keys
from mig_kit.data.line_checks import OwnLine, headers_below, parse_line, simplify
from mig_kit.data.records import Problem, entry_word, iter_entries, iter_records, require
from mig_kit.image_files import DECODE_ERRORS, BadImage

MARGIN = 1.0  # pixels by which annotation tools let boxes leave the image


@dataclass(frozen=True)
class ImportRules:
    """How a file of another project is read.

    Args:
        root: the folder that holds all images; folder: in it, of those that the file holds.
        coordinates: of all boxes, in place of what the file says; "" for the file's word.
        box_format: absolute boxes are pixels of an image that is resized to these limits.
        several: "any" if any of several boxes in an answer is correct, "": not used.
        split: the one that is taken, "" for train; the split of a table that names none.
    """

    root: Path
    folder: str
    coordinates: str = ""
    box_format: BoxFormat = BoxFormat()
    several: str = ""
    split: str = ""


def iter_own_records(form: str, path: Path, rules: ImportRules
                     ) -> Iterator[tuple[str, dict | Problem]]:
    """Yield (place, record) for every question of a file.

    place: words such as "line 3"; record: a line of own data, or the Problem for which it is none.

    Args:
        form: own (tables whose images are in the file, or whose questions hold <image>), swift,
            llava, mgrounding (conversations) or coco.
    """
    read = headers_below(rules.root)
    entries = _iter_coco(path, rules) if form == "coco" else _iter_lines_of(form, path, rules)
    for place, record in entries:
        try:
            if not isinstance(record, Problem):
                record = {"id": place.replace(" ", "-")} | _finish_record(record, read, rules)
        except BadImage as problem:
            record = Problem(problem.reason, str(problem), is_fault=False)
        except Problem as problem:
            record = problem
        yield place, record


def _finish_record(record: dict, read: Callable, rules: ImportRules) -> dict:
    """The record with paths of its images, in the coordinates that the rules state."""
    stated_size = record.pop("stated_size", None)
    record["images"] = [_image_name(image, rules) for image in record.get("images") or []]
    is_absolute = rules.coordinates == Coordinates.ABSOLUTE
    if rules.coordinates:
        record["coordinates"] = "pixels" if is_absolute else rules.coordinates
    line, problems = parse_line(record) if is_absolute or stated_size else (None, [])
    headers = [read(name) for name in line.images] if line else []
    if bad := [header for header in headers if isinstance(header, BadImage)]:
        raise bad[0]
    if is_absolute and not problems:
        sizes = [header.size for header in headers]
        record |= _to_pixels(line, sizes, rules.box_format)
    if headers and stated_size:
        require(stated_size == headers[0].size, "another size than the file says",
                "the file says {}x{}, the image has {}x{} pixels when it is upright; use the "
                "images that the file was made from, and boxes of the upright picture".format(
                    *stated_size, *headers[0].size))
    return record


def _to_pixels(line: OwnLine, sizes: list[tuple[int, int]], box_format: BoxFormat) -> dict:
    """The keys with boxes of a line in pixels of the resized images, in those of the originals."""
    def convert(number: int, box: tuple) -> list[float]:
        size = sizes[number - 1]
        seen = coordinate_size(size, Coordinates.ABSOLUTE, box_format)
        return [round(value, 2) for value in rescale_box(box, seen, size)]

    keys = {"box": line.box and convert(line.image, line.box),
            "boxes": line.boxes and [convert(line.image, box) for box in line.boxes],
            "reference": line.reference and convert(1, line.reference)}
    return {key: value for key, value in keys.items() if value}


def _image_name(image: object, rules: ImportRules) -> str:
    """The path of an image below the root; bytes or base64 become a file."""
    content = image.get("bytes") if isinstance(image, dict) else None
    if isinstance(image, dict) and not content:
        image = image.get("path")
    if isinstance(image, str) and image.startswith("data:"):
        content = image.partition(",")[2]
    if content:
        return _write_image(content, rules.root / rules.folder).relative_to(rules.root).as_posix()
    require(isinstance(image, str) and bool(image), "an image must be named by its path")
    image = image.removeprefix("file://").removeprefix(os.path.abspath(rules.root) + os.sep)
    return image.removeprefix("./")


def _write_image(content: object, folder: Path) -> Path:
    """The file of an image's bytes, or of their base64, named by its SHA-256."""
    try:
        content = content if isinstance(content, bytes) else base64.b64decode(content)
        with Image.open(io.BytesIO(content)) as image:
            suffix = image.format.lower()
    except (*DECODE_ERRORS, TypeError) as error:
        raise Problem("image bytes that are none", "the bytes of an image are none; write them "
                      "into the file once more, or give its path") from error
    path = folder / f"{hashlib.sha256(content).hexdigest()}.{suffix}"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
    return path


def _iter_lines_of(form: str, path: Path, rules: ImportRules
                   ) -> Iterator[tuple[str, dict | Problem]]:
    """(place, a question as a line of own data, or why there is none) of the file."""
    is_table = entry_word(path) == "row"
    for place, record in iter_entries(path):
        try:
            if isinstance(record, Problem):
                raise record
            _require_split(record, rules.split, is_table)
            lines = [_clean_line(record)] if form == "own" else read_record(
                form, record, rules.several)
        except Problem as error:
            lines = [error]
        for turn, line in enumerate(lines, 1):
            yield place if len(lines) == 1 else f"{place} turn {turn}", line


def _require_split(record: dict, split: str, is_table: bool = False) -> None:
    """Problem for a record of another split, and for one of no split that should name one."""
    own = str(record.get("split") or "").strip()
    require(bool(own or split) or not is_table, "no split named", "the table has no column "
            "'split', so its questions may be those of a test; say with --split train that it is "
            "the part to train on")
    require(bool(own or is_table or not split), "no split named", f"--split asks for {split}, and "
            "the record has no 'split'; leave the option out, or give a file of that split alone")
    require(not own or own.casefold() == (split or "train"), f"of the split {own[:40]!r}",
            is_fault=False)


def _clean_line(record: dict) -> dict:
    """The line of own data as it is, but for <image> tags at the question's start and end."""
    line = {key: value for key, value in simplify(record).items() if key != "split"}
    question = line.get("question")
    images = line.get("images")
    if isinstance(question, str) and isinstance(images, list):
        if question.count("<image>") == len(images):
            line["question"] = name_tags(question.rstrip().removesuffix("<image>" * len(images)))
    return line


def _iter_coco(path: Path, rules: ImportRules) -> Iterator[tuple[str, dict | Problem]]:
    """A question per image and name of a category."""
    images, categories = ({record["id"]: record for record in iter_records(path, f"{key}.item")}
                          for key in ("images", "categories"))
    groups: dict[tuple, list[tuple]] = {}
    for record in iter_records(path, "annotations.item"):
        place = f"annotation {record.get('id')!r}"
        image, category = images.get(record.get("image_id")), categories.get(
            record.get("category_id"))
        if image is None or category is None:
            yield place, Problem("an image or category that is not listed", "its image_id or "
                                 "category_id is not in 'images' or 'categories'; use the file "
                                 "that lists it")
            continue
        name = " ".join(str(category.get("name")).split()).casefold()
        groups.setdefault((image.get("file_name"), name), []).append(
            (place, record, image, category))
    for annotations in groups.values():
        place, _, image, category = annotations[0]
        try:
            _require_split(image, rules.split)
            boxes = []
            for place, record, *_ in annotations:  # noqa: B007
                require(not record.get("iscrowd"), "a crowd has no single box", is_fault=False)
                box = _corners(record, image)
                boxes += [(1, box)] * ((1, box) not in boxes)
            sides = image.get("width"), image.get("height")
            yield annotations[0][0], {
                "images": [image.get("file_name")], "question": f"Find the {category['name']}.",
                "coordinates": "pixels", **target_keys(boxes, rules.several),
                "stated_size": tuple(map(int, sides)) if all(sides) else None}
        except Problem as error:
            yield place, error
    if not groups:
        yield path.name, Problem("there is no list 'annotations' with something in it")


def _corners(annotation: dict, image: dict) -> list[float]:
    """The corners of COCO's [x, y, width, height], moved into the image by at most MARGIN."""
    box = annotation.get("bbox")
    require(isinstance(box, list) and len(box) == 4
            and all(isinstance(value, int | float) for value in box),
            "'bbox' must be four numbers [x, y, width, height]")
    left, top = (0 if -MARGIN <= value < 0 else value for value in box[:2])
    corners = [left, top, box[0] + box[2], box[1] + box[3]]
    limits = [image.get("width") or 0, image.get("height") or 0] * 2
    return [limit if limit < value <= limit + MARGIN else value
            for value, limit in zip(corners, limits)]
