"""Readers of the public benchmarks' own annotation files into plain items.

Images are opened only for their sizes, and must lie below the image root. Formats: thunlp/Migician,
AMAP-ML/UniVG-R1, zeyofu/BLINK_Benchmark, FanqingM/MMIU-Benchmark, JierunChen/Ref-L4.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase

from mig_kit.boxes import Box, Coordinates
from mig_kit.common import UserError, digest_json
from mig_kit.image_files import is_regular_file, read_size, resolve_under_root
from mig_kit.score.image_names import ORDINALS, find_names

MIG_BENCH_TASKS = ("diff", "view_diff", "common_object", "object_tracking", "multi_view", "region",
                   "refer_grounding", "group_grounding", "reasoning", "correspondence")
# task -> number of the target image, where it is the same in every question
TARGETS = {"region": 1, "view_diff": 2, "refer_grounding": 2, "reasoning": 2, "correspondence": 2}
# The answers of BLINK's Relative_Reflectance until September 2025, of which nearly all were wrong
# (zeyofu/BLINK_Benchmark, issue 13): digest of idx and letter, in the order of idx.
BLINK_OLD_ANSWERS = "7335556f929c0da9941f2c24fa161941f49d1cce764f52e93696b4ddeee3fc57"
# What the letters of BLINK's tasks stand for where it is the same in every question.
_LATTER_TWO = ("the second image", "the third image")
BLINK_CHOICES = {
    "Art_Style": _LATTER_TWO, "Jigsaw": _LATTER_TWO, "Visual_Similarity": _LATTER_TWO,
    "Multi-view_Reasoning": ("left", "right"), "Spatial_Relation": ("yes", "no"),
    "Object_Localization": ("Box A", "Box B"),
    "Relative_Depth": ("A is closer", "B is closer"),
    "Relative_Reflectance": ("A is darker", "B is darker", "About the same"),
    "Forensic_Detection": ("the first image", "the second image", "the third image",
                           "the fourth image")}
MMIU_OPTIONS = "ABCDEFGH"  # where an item's own options cannot be read
LARGEST = 1e9  # a coordinate or score beyond it is none


@dataclass(frozen=True)
class BenchmarkItem:
    """One question, as annotated."""

    index: int  # place in the annotation file, from 0
    id: str  # the benchmark's own, or ""
    task: str
    question: str
    images: tuple[str, ...] = ()
    box: Box | None = None  # xyxy
    coordinates: Coordinates = Coordinates.NORMALIZED_1  # of box; PIXELS are the target image's
    target: int | None = None  # image number from 1, None if the file does not say
    image_stated: bool = True  # whether the question itself names the image
    size: tuple[int, int] | None = None  # of the target image, pixels, if the file gives it
    letter: str = ""  # the correct one of a multiple-choice question
    options: str = ""  # all its letters
    choices: tuple[str, ...] = ()  # what the letters stand for
    usual_choices: tuple[str, ...] = ()  # the same where the record does not say it
    video: str = ""  # whose frames the images are
    category: str = ""  # kind of the object, of Ref-L4
    targets: tuple[tuple[int, Box], ...] = ()  # of own data: (image, box), any of which answers

    @property
    def name(self) -> str:
        """What errors call the item: its id, else its index."""
        return self.id or str(self.index)


@dataclass(frozen=True)
class Benchmark:
    """An annotation file, read."""

    items: tuple[BenchmarkItem, ...]
    version: str = ""  # told by content
    left_out: tuple[int, ...] = ()  # indices of records that have no answer to score
    name: str = ""
    complete: bool | None = None  # whether it has every item of its release; None if unknown


def is_number(value) -> bool:
    """Whether a JSON value is a finite number of sane size."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def is_four_numbers(values) -> bool:
    """Whether a JSON value is a list of four finite numbers of sane size."""
    return isinstance(values, list) and len(values) == 4 and all(map(is_number, values))


def _read_fields(record: dict, index: int, benchmark: str, **kinds) -> list:
    """The fields of item `index` by name; UserError for a missing one or one of another type."""
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            raise UserError(f"item {index} of the {benchmark} annotations has no usable '{name}'; "
                            f"is this the {benchmark} file?")
    return [record[name] for name in kinds]


def _to_box(values, index: int, benchmark: str) -> Box:
    """A JSON value as a box; UserError if it is none."""
    if not is_four_numbers(values):
        raise UserError(f"item {index} of the {benchmark} annotations has no box of four numbers; "
                        f"is this the {benchmark} file?")
    return tuple(map(float, values))


def read_mig_bench(records: list[dict]) -> Benchmark:
    """MIG-Bench: `{task, images, question, answer: [x1,y1,x2,y2], additional_info, ...}`.

    The original (Migician) answers in 0..1, the revised file (UniVG-R1) in 0..1000.
    """
    boxes = [_to_box(record.get("answer"), index, "MIG-Bench")
             for index, record in enumerate(records)]
    is_revised = max(max(box) for box in boxes) > 2  # the original's largest value is 1.048
    coordinates = Coordinates.NORMALIZED_1000 if is_revised else Coordinates.NORMALIZED_1
    items = []
    for index, (record, box) in enumerate(zip(records, boxes)):
        task, question, images = _read_fields(record, index, "MIG-Bench", task=str, question=str,
                                              images=list)
        if task not in MIG_BENCH_TASKS:
            raise UserError(f"item {index} has task '{task}', which MIG-Bench does not have; its "
                            f"tasks are {', '.join(MIG_BENCH_TASKS)}")
        target, is_stated = _mig_bench_target(task, question, str(record.get("additional_info")))
        if len(images) < (target or 1) or not all(isinstance(name, str) for name in images):
            raise UserError(f"item {index} of MIG-Bench asks for image {target} of {len(images)}; "
                            "is the file complete?")
        items.append(BenchmarkItem(index, "", task, question, tuple(images), box, coordinates,
                                   target, is_stated))
    return Benchmark(tuple(items), "revised" if is_revised else "original")


def _mig_bench_target(task: str, question: str, info: str) -> tuple[int | None, bool]:
    """(image number or None, whether the question names it)."""
    if task in TARGETS:
        return TARGETS[task], True
    if task == "group_grounding":
        ordinal = re.search(rf"\bin the ({'|'.join(ORDINALS)}) image", info)
        return (ORDINALS.index(ordinal.group(1)) + 1 if ordinal else None), False
    number = re.search(r"in the (\d+)(?:st|nd|rd|th) image", question)
    # a static difference is in the same place of both images, so it has no number
    return (int(number.group(1)), True) if number else (None, False)


def read_lisa(records: list[dict]) -> Benchmark:
    """LISA-grounding: `{image_path, instruction, boxes: [[x1,y1,x2,y2], ...]}` in pixels.

    The first box is the answer; nothing answers an item without one.
    """
    items = []
    for index, record in enumerate(records):
        boxes, question, image = _read_fields(record, index, "LISA-grounding", boxes=list,
                                              instruction=str, image_path=str)
        has_box = boxes and boxes[0] not in (None, [])
        box = _to_box(boxes[0], index, "LISA-grounding") if has_box else None
        items.append(BenchmarkItem(index, "", "lisa", question, (image,), box, Coordinates.PIXELS,
                                   target=1))
    return Benchmark(tuple(items))


def read_revos(records: list[dict]) -> Benchmark:
    """ReVOS-grounding: `{video_id, frames, question, bbox_list}`; the third frame has the answer.

    Images are named "video_id#place", a place in the video's sorted files. Boxes are cut to whole
    pixels, as in UniVG-R1's script. Nothing answers an item without a third box.
    """
    items = []
    for index, record in enumerate(records):
        frames, boxes, video, question = _read_fields(
            record, index, "ReVOS-grounding", frames=list, bbox_list=list, video_id=str | int,
            question=str)
        if len(frames) < 3 or not all(type(place) is int and place >= 0 for place in frames):
            raise UserError(f"item {index} of the ReVOS-grounding annotations needs three frame "
                            "numbers")
        box = None
        if len(boxes) >= 3 and boxes[2]:
            box = tuple(float(int(v)) for v in _to_box(boxes[2], index, "ReVOS-grounding"))
        items.append(BenchmarkItem(index, "", "revos", question,
                                   tuple(f"{video}#{place}" for place in frames), box,
                                   Coordinates.PIXELS, target=3,
                                   image_stated=bool(find_names(question)), video=str(video)))
    return Benchmark(tuple(items))


def read_ref_l4(records: list[dict]) -> Benchmark:
    """Ref-L4: `{id, caption, bbox: [x,y,w,h] px, file_name, ...}`; tasks are the boxes' sizes."""
    items = []
    for index, record in enumerate(records):
        x, y, width, height = _to_box(record.get("bbox"), index, "Ref-L4")
        side = max(0, width * height) ** 0.5
        size = (record.get("width"), record.get("height"))
        items.append(BenchmarkItem(
            index, str(record.get("id", "")),
            "small" if side < 128 else "medium" if side <= 256 else "large",
            str(record.get("caption", "")), (str(record.get("file_name", "")),),
            (x, y, x + width, y + height), Coordinates.PIXELS, target=1,
            size=size if all(type(side) is int for side in size) else None,
            category=str(record.get("ori_category_id", ""))))
    return Benchmark(tuple(items))


def read_blink(records: list[dict]) -> Benchmark:
    """BLINK: `{idx, task or sub_task, answer: "(B)"}`, and `choices` if the record has them.

    `images`, file names, is ours: the benchmark holds the pictures themselves.
    """
    items, last_letters = [], defaultdict(str)
    for index, record in enumerate(records):
        answer, name = _read_fields(record, index, "BLINK", answer=str, idx=str)
        letter = re.fullmatch(r"\(?([A-Z])\)?", answer.strip())
        if not letter:
            raise UserError(f"item {index} of the BLINK annotations has answer '{answer}'; "
                            "scoring needs the letters of the validation set")
        task = record.get("task", record.get("sub_task", "_".join(name.split("_")[1:-1])))
        if not task or not isinstance(task, str):
            raise UserError(f"item {index} of the BLINK annotations has no 'task' or 'sub_task', "
                            f"and its idx '{name}' names none, as val_Jigsaw_1 does; is this the "
                            "BLINK file?")
        last_letters[task] = max(last_letters[task], letter[1])
        question = str(record.get("question") or record.get("prompt", ""))
        items.append(BenchmarkItem(index, name, task, question, _text_list(record.get("images")),
                                   letter=letter[1], choices=_text_list(record.get("choices"))))
    names = Counter(item.id for item in items)
    if twice := next((name for name, count in names.items() if count > 1), ""):
        raise UserError(f"the BLINK annotations have idx '{twice}' twice; give each question once "
                        "(one model's file, not several joined)")
    items = [replace(item, usual_choices=BLINK_CHOICES.get(item.task.replace(" ", "_"), ()),
                     options=ascii_uppercase[:len(item.choices) or ascii_uppercase.index(
                         last_letters[item.task]) + 1]) for item in items]
    answers = sorted((item.id, item.letter) for item in items
                     if item.id.startswith("val_Relative_Reflectance_"))
    if len(answers) != 134:  # its whole task, which alone tells the versions
        return Benchmark(tuple(items))
    side = "until" if digest_json(answers) == BLINK_OLD_ANSWERS else "since"
    return Benchmark(tuple(items), f"answers {side} September 2025")


def _text_list(values) -> tuple[str, ...]:
    """A JSON list as texts; anything else as none."""
    return tuple(map(str, values)) if isinstance(values, list) else ()


def read_mmiu(records: list[dict]) -> Benchmark:
    """MMIU: `{task, options: "A: ... B: ...", question, context, input_image_path, output: "C"}`.

    As in OpenGVLab/MMIU, evaluate_correct.py, items without an output are left out.
    """
    items, left_out = [], []
    for index, record in enumerate(records):
        if record.get("output") is None:
            left_out.append(index)
            continue
        letter, task = _read_fields(record, index, "MMIU", output=str, task=str)
        choices = _split_options(str(record.get("options", "")))
        parts = [record.get("context"), record.get("question")]
        question = " ".join(str(part).strip() for part in parts if part)
        items.append(BenchmarkItem(index, "", task, question,
                                   tuple(record.get("input_image_path") or []),
                                   letter=letter.strip().strip(".").upper(),
                                   options=ascii_uppercase[:len(choices)] or MMIU_OPTIONS,
                                   choices=choices))
    if not items:
        raise UserError("no item of the MMIU annotations has an output, the correct letter; give "
                        "the file that has them")
    return Benchmark(tuple(items), left_out=tuple(left_out))


def _split_options(text: str) -> tuple[str, ...]:
    """The texts of "A: ... B: ...", as far as the letters follow each other from A on."""
    marks: list[re.Match] = []
    for mark in re.finditer(r"(?:^|\s)\(?([A-Z])\)?\s*[:.]", text):
        if mark.group(1) == chr(ord("A") + len(marks)):
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return tuple(text[mark.end():end].strip() for mark, end in zip(marks, ends))


def resolve_image_path(root: str | Path, name: str) -> Path:
    """The file below the root that a benchmark's image name means; BadImage if it leads out."""
    folder, _, place = name.rpartition("#")
    if folder and place.isdecimal():
        # sorted by the first number in their names
        frames = sorted((frame for frame in resolve_under_root(Path(root), folder).glob("*")
                         if frame.suffix in (".jpg", ".png") and re.search(r"\d", frame.name)),
                        key=lambda frame: int(re.search(r"\d+", frame.name)[0]))
        name = f"{folder}/{frames[int(place)].name}" if int(place) < len(frames) else name
    return resolve_under_root(Path(root), name)


def read_image_sizes(names: Iterable[str], root: str | Path | None) -> dict[str, tuple[int, int]]:
    """Image name -> upright (width, height), from the headers of the files below the root.

    Raises UserError listing missing images; BadImage for one that is refused or no image. For no
    names it needs no root.
    """
    names = dict.fromkeys(names)
    if names and root is None:
        raise UserError("these boxes need the images' sizes; pass --images FOLDER, which image "
                        "names are relative to")
    paths = {name: resolve_image_path(root, name) for name in names}
    if missing := [name for name, path in paths.items() if not is_regular_file(path)]:
        raise UserError(f"{len(missing)} of {len(paths)} images are missing below {root} (first: "
                        f"{', '.join(missing[:3])}); download them or correct --images")
    return {name: read_size(path) for name, path in paths.items()}
