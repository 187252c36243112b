"""Readers of the public benchmarks' own annotation files into plain items, and of prediction files beside them.

Nothing here opens an image, except for its size and only where a protocol needs one; image names must stay inside the image
root. Sources of the formats: thunlp/Migician (MIG-Bench, MMIU as it scores it), AMAP-ML/UniVG-R1 (revised MIG-Bench,
LISA-grounding, ReVOS-grounding), zeyofu/BLINK_Benchmark, FanqingM/MMIU-Benchmark (fields of MMIU), JierunChen/Ref-L4.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mig_kit.boxes import Box, Coordinates
from mig_kit.common import MAX_LINE, iter_lines
from mig_kit.image_files import DECODE_ERRORS, resolve_under_root
from mig_kit.scoring.parsers import ORDINALS

MIG_BENCH_TASKS = {"diff": 528, "view_diff": 94, "common_object": 816, "object_tracking": 550, "multi_view": 288, "region": 1203,
                   "refer_grounding": 99, "group_grounding": 499, "reasoning": 101, "correspondence": 117}


REVISED_TASKS = MIG_BENCH_TASKS | {"common_object": 815, "group_grounding": 485, "reasoning": 97}


TARGETS = {"region": 1, "view_diff": 2, "refer_grounding": 2, "reasoning": 2, "correspondence": 2}


@dataclass(frozen=True)
class BenchmarkItem:
    """One question, as annotated.

    index: place in the annotation file, from 0. id: the benchmark's own id, or "". box: xyxy in
    `coordinates`, or None. coordinates: of `box`; PIXELS are those of the target image. target:
    image number from 1, None where the file does not say. image_stated: whether the question itself
    names the image. size: (width, height) of the target image, pixels, where the file gives it.
    letter, options and choices: the correct letter, all letters and what they stand for, of a
    multiple-choice question.
    """

    index: int
    id: str
    task: str
    question: str
    images: tuple[str, ...] = ()
    box: Box | None = None
    coordinates: Coordinates = Coordinates.NORMALIZED_1
    target: int | None = None
    image_stated: bool = True
    size: tuple[int, int] | None = None
    letter: str = ""
    options: str = ""
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What errors call the item: its id, else its index."""
        return self.id or str(self.index)


@dataclass(frozen=True)
class Benchmark:
    """An annotation file, read. version: which release, told by content; complete: whether it has every item of it."""

    name: str
    version: str
    items: tuple[BenchmarkItem, ...]
    complete: bool


def read_records(path: str | Path, may_be_empty: bool = False) -> list[dict]:
    """The objects of a .json list, a .jsonl file or a .parquet table. Raises ValueError naming the file and line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give the path of the file that was downloaded or written")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open("rb") as file:
        opening = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if opening.startswith(b"["):
        numbered = list(enumerate(read_json(path), 1))
    else:
        numbered = [(n, _json(_text(line, n, path), f"line {n} of {path}")) for n, line in iter_lines(path)
                    if line is None or line.strip(b"\xef\xbb\xbf \t")]
    for number, record in numbered:
        if not isinstance(record, dict):
            raise ValueError(f"entry {number} of {path} is no JSON object; every entry must look like {{...}}")
    if not numbered and not may_be_empty:
        raise ValueError(f"{path} is empty; it needs one JSON object per item")
    return [record for _, record in numbered]


def read_json(path: str | Path):
    """The one JSON value of a file. Raises like read_records."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}; give the path of the file that was downloaded or written")
    try:
        return _json(Path(path).read_text(encoding="utf-8-sig"), f"{path}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _text(line: bytes | None, number: int, path: Path) -> str:
    if line is None:
        raise ValueError(f"line {number} of {path} is longer than {MAX_LINE} bytes; write one JSON object per line")
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"line {number} of {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}); write one JSON object per line, or one JSON list") from error


def _field(record: dict, name: str, kind: type | tuple, index: int, benchmark: str):
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"item {index} of the {benchmark} annotations has no usable '{name}'; is this the {benchmark} file?")
    return value


def is_four_numbers(values) -> bool:
    """Whether a JSON value is a list of four finite numbers of sane size."""
    return isinstance(values, list) and len(values) == 4 and all(type(v) in (int, float) and -1e9 < v < 1e9 for v in values)


def _box(values: list, index: int, benchmark: str) -> Box:
    if not is_four_numbers(values):
        raise ValueError(f"item {index} of the {benchmark} annotations has no box of four numbers; is this the {benchmark} file?")
    return tuple(float(v) for v in values)


def read_mig_bench(records: list[dict]) -> Benchmark:
    """MIG-Bench: `{task, images, question, answer: [x1,y1,x2,y2], additional_info, ...}`.

    Answers of the original (Migician) are in 0..1, of the revised file (UniVG-R1) in 0..1000: that tells the two apart.
    """
    boxes = [_box(record.get("answer"), i, "MIG-Bench") for i, record in enumerate(records)]
    revised = max(v for box in boxes for v in box) > 2  # the original's largest value is 1.048
    coordinates = Coordinates.NORMALIZED_1000 if revised else Coordinates.NORMALIZED_1
    items = []
    for i, (record, box) in enumerate(zip(records, boxes)):
        task = _field(record, "task", str, i, "MIG-Bench")
        if task not in MIG_BENCH_TASKS:
            raise ValueError(f"item {i} has task '{task}', which MIG-Bench has not; its tasks are {', '.join(MIG_BENCH_TASKS)}")
        question = _field(record, "question", str, i, "MIG-Bench")
        images = _field(record, "images", list, i, "MIG-Bench")
        target, stated = _mig_bench_target(task, question, str(record.get("additional_info", "")))
        if not images or (target or 1) > len(images) or not all(isinstance(name, str) for name in images):
            raise ValueError(f"item {i} of MIG-Bench asks for image {target} of {len(images)}; is the file whole?")
        items.append(BenchmarkItem(i, "", task, question, tuple(images), box, coordinates, target, stated))
    counts = Counter(item.task for item in items)
    return Benchmark("mig_bench", "revised" if revised else "original", tuple(items),
                     counts == Counter(REVISED_TASKS if revised else MIG_BENCH_TASKS))


def _mig_bench_target(task: str, question: str, info: str) -> tuple[int | None, bool]:
    """(image number or None, whether the question names it). A static difference is in the same place of both images."""
    if task in TARGETS:
        return TARGETS[task], True
    if task == "group_grounding":
        found = re.search(rf"\bin the ({'|'.join(ORDINALS)}) image", info)
        return (ORDINALS.index(found.group(1)) + 1 if found else None), False
    found = re.search(r"in the (\d+)(?:st|nd|rd|th) image", question)
    return (int(found.group(1)) if found else None), bool(found)


def read_lisa(records: list[dict]) -> Benchmark:
    """LISA-grounding: `{image_path, instruction, boxes: [[x1,y1,x2,y2], ...]}` in pixels; the first box is the answer."""
    items = []
    for i, record in enumerate(records):
        boxes = _field(record, "boxes", list, i, "LISA-grounding")
        items.append(BenchmarkItem(i, "", "lisa", _field(record, "instruction", str, i, "LISA-grounding"),
                          (_field(record, "image_path", str, i, "LISA-grounding"),),
                          _box(boxes[0] if boxes else None, i, "LISA-grounding"), Coordinates.PIXELS, 1))
    version = {200: "val", 779: "test"}.get(len(items), "subset")
    return Benchmark("lisa", version, tuple(items), version != "subset")


def read_revos(records: list[dict]) -> Benchmark:
    """ReVOS-grounding: `{video_id, frames, question, bbox_list}`; several frames, the answer is in the third.

    frames are places in the folder's sorted file list, so image names here are "video_id#place"; `image_file` resolves them.
    Box values are cut to whole pixels, as UniVG-R1's script does.
    """
    items = []
    for i, record in enumerate(records):
        video, frames = record.get("video_id"), _field(record, "frames", list, i, "ReVOS-grounding")
        boxes = _field(record, "bbox_list", list, i, "ReVOS-grounding")
        numbered = len(frames) >= 3 and all(type(frame) is int and frame >= 0 for frame in frames)
        if not isinstance(video, (str, int)) or len(boxes) < 3 or not numbered:
            raise ValueError(f"item {i} of the ReVOS-grounding annotations needs a video_id, three frame numbers and three boxes")
        box = _box(boxes[2], i, "ReVOS-grounding")
        items.append(BenchmarkItem(i, "", "revos", _field(record, "question", str, i, "ReVOS-grounding"),
                          tuple(f"{video}#{frame}" for frame in frames), tuple(float(int(v)) for v in box), Coordinates.PIXELS, 3))
    return Benchmark("revos", "", tuple(items), True)


def read_ref_l4(records: list[dict]) -> Benchmark:
    """Ref-L4: `{id, caption, bbox: [x,y,w,h] px, file_name, ...}`; tasks are the sizes small, medium, large.

    Sizes as its evaluator cuts them: sqrt(w*h) under 128, to 256, over.
    """
    items = []
    for i, record in enumerate(records):
        x, y, w, h = _box(record.get("bbox"), i, "Ref-L4")
        side = max(0, w * h) ** 0.5
        size = (record["width"], record["height"]) if type(record.get("width")) is type(record.get("height")) is int else None
        items.append(BenchmarkItem(i, str(record.get("id", "")), "small" if side < 128 else "medium" if side <= 256 else "large",
                          str(record.get("caption", "")), (str(record.get("file_name", "")),), (x, y, x + w, y + h), Coordinates.PIXELS, 1,
                          size=size))
    return Benchmark("ref_l4", "all" if len(items) == 45341 else "subset", tuple(items), len(items) == 45341)


def read_blink(records: list[dict]) -> Benchmark:
    """BLINK: `{idx, task or sub_task, answer: "(B)"}`, its own records; options from `choices`, else from the task's answers.

    `images`, file names, is ours: the benchmark holds the pictures themselves, which must be saved as files to be asked about.
    """
    items = []
    answers = defaultdict(set)
    for i, record in enumerate(records):
        found = re.fullmatch(r"\(?([A-Z])\)?", _field(record, "answer", str, i, "BLINK").strip())
        if not found:
            raise ValueError(f"item {i} of the BLINK annotations has answer '{record['answer']}'; scoring needs the letters "
                             "of the validation set")
        answers[record.get("task", record.get("sub_task"))].add(found.group(1))
    for i, record in enumerate(records):
        task = _field(record, "task" if "task" in record else "sub_task", str, i, "BLINK")
        name = _field(record, "idx", str, i, "BLINK")
        choices = tuple(map(str, record["choices"])) if isinstance(record.get("choices"), list) else ()
        count = len(choices) or ord(max(answers[task])) - ord("A") + 1
        images = tuple(map(str, record["images"])) if isinstance(record.get("images"), list) else ()
        items.append(BenchmarkItem(i, name, task, str(record.get("question") or record.get("prompt", "")), images,
                          letter=record["answer"].strip().strip("()"), options="ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count],
                          choices=choices))
    val = len(items) == 1901 and all(item.id.startswith("val_") for item in items)
    return Benchmark("blink", "val" if val else "subset", tuple(items), val)


def read_mmiu(records: list[dict]) -> Benchmark:
    """MMIU: `{task, options: "A: ... B: ...", question, context, input_image_path, output: "C"}`.

    Items without an output are left out, as the authors do.
    """
    items = []
    for i, record in enumerate(records):
        if record.get("output") is None:
            continue
        output = _field(record, "output", str, i, "MMIU").strip().strip(".")
        options, text, starts = "", str(record.get("options", "")), []
        for mark in re.finditer(r"(?:^|\s)\(?([A-Z])\)?\s*[:.]", text):
            if mark.group(1) == chr(ord("A") + len(options)):
                options += mark.group(1)
                starts.append(mark.span())
        ends = [start for start, _ in starts[1:]] + [len(text)]
        choices = tuple(text[start:end].strip() for (_, start), end in zip(starts, ends))
        images = record.get("input_image_path") or []
        asked = " ".join(str(record[name]).strip() for name in ("context", "question") if record.get(name))
        items.append(BenchmarkItem(i, "", _field(record, "task", str, i, "MMIU"), asked, tuple(images), letter=output,
                          options=options or "ABCDEFGH", choices=choices))
    return Benchmark("mmiu", "", tuple(items), len({item.task for item in items}) == 52)


READERS: dict[str, Callable[[list[dict]], Benchmark]] = {
    "mig_bench": read_mig_bench, "lisa": read_lisa, "revos": read_revos, "ref_l4": read_ref_l4, "blink": read_blink, "mmiu": read_mmiu}


def resolve_image_path(root: str | Path, name: str) -> Path:
    """The file a benchmark's image name means below the image root; image_files.BadImage where the name leaves the root."""
    path, (folder, _, place) = resolve_under_root(Path(root), name), name.rpartition("#")
    video = resolve_under_root(Path(root), folder) if folder and place.isdecimal() else path
    if video != path and video.is_dir():  # ReVOS: a place among the video's frames, sorted by the first number in their names
        files = sorted((f for f in video.iterdir() if f.suffix in (".jpg", ".png") and re.search(r"\d", f.name)),
                       key=lambda f: int(re.findall(r"\d+", f.name)[0]))
        return resolve_under_root(Path(root), f"{folder}/{files[int(place)].name}") if int(place) < len(files) else path
    return path


def add_image_sizes(items: tuple[BenchmarkItem, ...], root: str | Path | None) -> list[BenchmarkItem]:
    """The items with the size of each target image, read from the files. Raises ValueError listing what is missing."""
    from PIL import Image

    sized, missing, broken = [], [], []
    for item in items:
        if item.size is None and root is None:
            raise ValueError("these boxes need the images' sizes; pass --images FOLDER, which image names are relative to")
        if item.size is None:
            name = item.images[(item.target or len(item.images)) - 1]
            path = resolve_image_path(root, name)
            if not path.is_file():
                missing.append(name)
                continue
            try:
                with Image.open(path) as image:
                    item = replace(item, size=image.size)
            except DECODE_ERRORS:
                broken.append(name)
        sized.append(item)
    for words, names in (("images are missing below", missing), ("files are no readable images below", broken)):
        if names:
            raise ValueError(f"{len(names)} {words} {root} (first: {', '.join(names[:3])}); download them or correct --images")
    return sized


def align_predictions(items: tuple[BenchmarkItem, ...], predictions: list[dict], field: str, source: str, allow_missing: bool = False) -> list:
    """Each item's prediction line (None where one may be missing and is), in the items' order.

    A line names its item by "index" (place in the annotation file, from 0) or "id". Raises ValueError that lists lines
    without the field, and indices that are unknown, doubled or missing.
    """
    by_index = {str(item.index): item for item in items}
    by_id = {item.id: item for item in items if item.id} or by_index
    sample = f'a line looks like {{"index": 0, "{field}": ...}}'
    found, doubled, unknown = {}, [], []
    for number, line in enumerate(predictions, 1):
        place, name = line.get("index"), line.get("id", line.get("idx"))
        place = int(place) if isinstance(place, float) and place.is_integer() else place  # as pandas writes a column with gaps
        here = place is not None and (name is None or by_id is by_index)  # "id" tells nothing where the benchmark has none
        if not here and place is not None and by_index.get(str(place)) not in (None, by_id.get(str(name))):
            raise ValueError(f'prediction {number} of {source} has "index" {place} and "id" {name!r}, which are different items')
        name = place if here else name
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ValueError(f'prediction {number} of {source} has no "index" or "id"; {sample}')
        if field not in line:
            raise ValueError(f'prediction {number} of {source} has no "{field}"; {sample}')
        if field == "response" and not isinstance(line[field], str):
            raise ValueError(f'"response" of prediction {number} of {source} is no text; write "" where the model said nothing')
        item = (by_index if here else by_id).get(str(name))
        if item is None:
            unknown.append(str(name))
        elif item.index in found:
            doubled.append(item.name)
        else:
            found[item.index] = line
    missing = [item.name for item in items if item.index not in found]
    problems = [(f"unknown to the annotations: {_first(unknown)}", unknown), (f"given more than once: {_first(doubled)}", doubled),
                (f"missing: {_first(missing)}", [] if allow_missing else missing)]
    said = "; ".join(text for text, names in problems if names)
    if said:
        hint = " (or pass --allow-missing to count missing ones wrong)" if missing and not allow_missing else ""
        raise ValueError(f"{source}: {said}; give one prediction for each of the {len(items)} items{hint}")
    return [found.get(item.index) for item in items]


def _first(names: list[str], count: int = 10) -> str:
    return f"{len(names)} ({', '.join(names[:count])}{', ...' if len(names) > count else ''})"
