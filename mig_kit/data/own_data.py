"""Your own data: a JSONL file, one question a line, checked line by line before anything is trained on it.

    {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2, "box": [10, 20, 60, 90], "unit": "pixels"}

| key | value |
|---|---|
| images | paths below the image root, in prompt order |
| question | text; "{ref}" where the reference box goes, if there is one |
| image | number of the target image, from 1 |
| box, or boxes | [x1, y1, x2, y2] in the target image, or a list of them, any of which is right |
| unit | of all boxes of the line: "pixels" (of the original image), "0-1000" or "0-1" (of its width and height) |
| reference | optional: a box in the first image |
| id, task | optional text; the id is unique in the file; the task chooses the teacher's prompt (mig_kit/endpoint.py) |
"""

import base64
import difflib
import html
import io
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mig_kit import plots
from mig_kit.boxes import Box, rescale_box
from mig_kit.common import MAX_LINE, iter_lines
from mig_kit.image_files import BadImage, open_rgb, read_size, resolve_under_root
from mig_kit.sample import Sample

MAX_IMAGES = 64
UNITS = {"pixels": 0, "0-1000": 1000, "0-1": 1}
REQUIRED, OPTIONAL = ("images", "question", "image", "unit"), ("box", "boxes", "reference", "id", "task")


class OwnDataError(ValueError):
    """A line that cannot be used; the message names the line and the fix."""


def parse_line(line: bytes | None) -> tuple[dict, list[str]]:
    """The line's object, and what is wrong with it as far as the line alone tells: sentences, empty if all is right."""
    if line is None:
        return {}, [f"the line is longer than {MAX_LINE} bytes; put one question on a line"]
    try:
        data = json.loads(line.decode("utf-8-sig"), parse_constant=lambda name: name)
    except UnicodeDecodeError:
        return {}, ["the line is not UTF-8; save the file as UTF-8"]
    except (ValueError, RecursionError) as error:
        return {}, [f"the line is no JSON object ({str(error)[:60]}); write one {{...}} per line"]
    if not isinstance(data, dict):
        return {}, ["the line is no JSON object; write one {...} per line"]
    return data, _wrong_keys(data) or _wrong_values(data)


def _wrong_keys(data: dict) -> list[str]:
    known = REQUIRED + OPTIONAL
    found = [f"'{key}' is missing" for key in REQUIRED if key not in data]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key[:40], known, 1, 0.5)
            found.append(f"unknown key {key[:40]!r}" + (f"; did you mean '{near[0]}'?" if near else ""))
    if ("box" in data) == ("boxes" in data):
        found.append("give either 'box' or 'boxes'")
    return found


def _wrong_values(data: dict) -> list[str]:
    found = []
    images, text = data["images"], data["question"]
    if not (isinstance(images, list) and 1 <= len(images) <= MAX_IMAGES and all(isinstance(i, str) and i for i in images)):
        found.append(f"'images' must be a list of 1 to {MAX_IMAGES} paths")
        images = None
    if not (isinstance(text, str) and text.strip()) or any("\ud800" <= c <= "\udfff" or c == "\0" for c in text):
        found.append("'question' must be text")
    elif ("{ref}" in text) != ("reference" in data):
        found.append("'{ref}' in the question and 'reference' go together; add the one that is missing")
    if type(data["image"]) is not int or data["image"] < 1:
        found.append("'image' must be the number of the target image, from 1")
    elif images and data["image"] > len(images):
        found.append(f"'image' is {data['image']}, but there are {len(images)} images; the first is number 1")
    for key in ("id", "task"):
        if key in data and not (isinstance(data[key], str) and data[key].isprintable() and data[key]):
            found.append(f"'{key}' must be printable text")
    if not isinstance(data["unit"], str) or data["unit"] not in UNITS:
        found.append(f"'unit' must be one of {', '.join(repr(u) for u in UNITS)}")
        return found
    boxes = [data["box"]] if "box" in data else data["boxes"]
    if not (isinstance(boxes, list) and boxes):
        return [*found, "'boxes' must be a list of boxes"]
    named = [("'box'" if "box" in data else f"'boxes' number {n}", box) for n, box in enumerate(boxes, 1)]
    if "reference" in data:
        named.append(("'reference'", data["reference"]))
    return found + [f"{name} {wrong}" for name, box in named if (wrong := _wrong_box(box, data["unit"]))]


def _wrong_box(box: object, unit: str) -> str:
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 and math.isfinite(v)
                                                            for v in box)):
        return "must be four numbers [x1, y1, x2, y2]"
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        return f"is {box}: x2 must be greater than x1 and y2 than y1 (is it x, y, width, height?)"
    if min(box) < 0 or (UNITS[unit] and max(box) > UNITS[unit]):
        return f"is {box}, outside '{unit}'; state the unit the numbers are in"
    if unit != "0-1" and min(width, height) < 1:
        return f"is {box}, less than 1 wide or high in '{unit}'; is the unit '0-1'?"
    return ""


def _wrong_files(data: dict, root: Path) -> list[str]:
    """What is wrong with the images: not there, not below the root, not readable, or a box in pixels that leaves its image."""
    found, sizes = [], {}
    for number, name in enumerate(data["images"], 1):
        try:
            sizes[number] = read_size(resolve_under_root(root, name))
        except BadImage as bad:
            found.append(f"image {number}: {bad}")
    if data["unit"] == "pixels":
        boxes = [(data["image"], b) for b in ([data["box"]] if "box" in data else data["boxes"])]
        for number, box in boxes + ([(1, data["reference"])] if "reference" in data else []):
            width, height = sizes.get(number, (math.inf, math.inf))
            if box[2] > width or box[3] > height:
                found.append(f"{box} leaves image {number}, which is {width}x{height} pixels; boxes are in pixels of the original")
    return found


def check_file(path: Path, root: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, what is wrong with it) of every line, an empty list for a line that is right. Reads no pixels.

    In memory: one line, and eight bytes or so per id, to find one that is there twice.
    """
    seen: set[int] = set()
    for number, line in iter_lines(path):
        data, wrong = parse_line(line)
        if not wrong:
            wrong = _wrong_files(data, root)
        if isinstance(name := data.get("id"), str):
            if hash(name) in seen:
                wrong = [*wrong, f"id {name[:40]!r} is there twice"]
            seen.add(hash(name))
        yield number, wrong


def iter_samples(path: Path, root: Path, limit: int | None = None) -> Iterator[Sample]:
    """The samples, images opened one line at a time; OwnDataError at the first line that is wrong: nothing is skipped."""
    for (number, line), (_, wrong) in islice(zip(iter_lines(path), check_file(path, root)), limit):
        if wrong:
            raise OwnDataError(f"{path} line {number}: {wrong[0]} (mig-kit data check {path} lists every line)")
        data, _ = parse_line(line)
        try:
            yield _sample(data, number, root)
        except BadImage as bad:
            raise OwnDataError(f"{path} line {number}: {bad}") from bad


def _sample(data: dict, number: int, root: Path) -> Sample:
    images = tuple(open_rgb(resolve_under_root(root, name)) for name in data["images"])
    boxes = [data["box"]] if "box" in data else data["boxes"]
    reference = _pixels(data["reference"], data["unit"], images[0].size) if "reference" in data else None
    targets = tuple((data["image"], _pixels(box, data["unit"], images[data["image"] - 1].size)) for box in boxes)
    return Sample(data.get("id", f"line-{number}"), "own", data.get("task", "own"), "train", images, data["question"], targets,
                  reference)


def _pixels(box: list, unit: str, size: tuple[int, int]) -> Box:
    side = UNITS[unit]
    return rescale_box(tuple(float(v) for v in box), (side, side) if side else size, size)


def write_preview(samples: Iterator[Sample], out: Path, height: int = 220) -> int:
    """Draw the samples' boxes on their images into a .png or a self-contained .html; the number drawn.

    ValueError for another ending. Text is escaped in HTML; in a PNG it is cut to one line.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise ValueError(f"{out} must end in .png or .html")
    strips = [(s.id, " ".join(s.question.split()), plots.draw_sample(s, height=height)) for s in samples]
    if not strips:
        raise ValueError("there is no question to draw; the file is empty")
    beside = out.with_name(out.name + ".tmp")
    if out.suffix.lower() == ".html":
        beside.write_text(_page(strips), encoding="utf-8")
    else:
        _sheet(strips).save(beside, format="PNG")
    beside.replace(out)
    return len(strips)


def _page(strips: list[tuple[str, str, Image.Image]]) -> str:
    rows = []
    for name, question, picture in strips:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        rows.append(f"<h2>{html.escape(name)}</h2><p>{html.escape(question)}</p><img alt='' src='data:image/png;base64,{data}'>")
    return ("<!doctype html><meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
            "img-src data:; style-src 'unsafe-inline'\"><title>Preview</title><style>body{font:15px sans-serif;margin:2em}"
            "h2{font-size:15px;margin:1.5em 0 0}p{margin:.3em 0}img{max-width:100%}</style>\n" + "\n".join(rows) + "\n")


def _sheet(strips: list[tuple[str, str, Image.Image]]) -> Image.Image:
    head = 24
    sheet = Image.new("RGB", (max(640, *(p.width for _, _, p in strips)), sum(p.height + head for _, _, p in strips)), "white")
    pen, y = ImageDraw.Draw(sheet), 0
    for name, question, picture in strips:
        pen.text((8, y + 4), f"{name}: {question}"[:160], fill="black", font=ImageFont.load_default(14))
        sheet.paste(picture, (0, y + head))
        y += picture.height + head
    return sheet
