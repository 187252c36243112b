"""Real benchmarks for stage 06: their items as samples of the kit, and the models' replies judged by both protocols.

Images are opened a batch at a time and must lie below one root. All of them are looked for before any model is loaded.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mig_kit import image_files
from mig_kit.boxes import Box, BoxFormat, coordinate_size, rescale_box
from mig_kit.prompts import parse_reply
from mig_kit.sample import Sample
from mig_kit.scoring import score
from mig_kit.scoring.annotations import READERS, Benchmark, BenchmarkItem, read_records, resolve_image_path
from mig_kit.scoring.parsers import last_answer_block, parse_revised_mig_bench_box, parse_strict_answer
from mig_kit.scoring.result import paired_difference, summarize

RUNNABLE = ("mig_bench", "lisa", "revos", "ref_l4", "blink", "mmiu")  # MC-Bench and OdinW want every box of an image, with a score


_INLINE = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")


def read_runnable(name: str, annotations: str | Path, root: str | Path, limit: int = 0) -> Benchmark:
    """A benchmark whose images are all there. limit: only the first so many items of every task; 0 for all.

    Raises ValueError with one sentence for an unknown benchmark, items without images, and images that are missing.
    """
    if name not in RUNNABLE:
        raise ValueError(f"06_evaluate cannot run '{name}'; the benchmarks it runs are {', '.join(RUNNABLE)} "
                         "(mig-kit score judges finished predictions on the others)")
    benchmark = READERS[name](read_records(annotations))
    if limit:
        counts: dict[str, int] = {}
        kept = []
        for item in benchmark.items:
            counts[item.task] = counts.get(item.task, 0) + 1
            if counts[item.task] <= limit:
                kept.append(item)
        benchmark = replace(benchmark, items=tuple(kept), complete=False)
    bare = [item.name for item in benchmark.items if not item.images]
    if bare:
        raise ValueError(f"{len(bare)} items of {annotations} name no images (first: {', '.join(bare[:3])}); "
                         'give every record its "images", a list of file names below the image root')
    bare = [item.name for item in benchmark.items if item.letter and not 2 <= len(item.choices) <= 8]
    if bare:
        raise ValueError(f"{len(bare)} multiple-choice items of {annotations} have no 2 to 8 options that can be read (first: "
                         f"{', '.join(bare[:3])}); write BLINK's as a list, \"choices\", and MMIU's as \"A: ... B: ...\"")
    names = dict.fromkeys(name for item in benchmark.items for name in item.images)
    missing = [image for image in names if not image_files.is_regular_file(resolve_image_path(root, image))]
    if missing:
        raise ValueError(f"{len(missing)} of {len(names)} images are missing below {root} (first: {', '.join(missing[:3])}); "
                         "download and unpack them, or correct image_root")
    return benchmark


def image_sizes(benchmark: Benchmark, root: str | Path) -> dict[str, list[tuple[int, int]]]:
    """Sample id -> (width, height) of its original images, from their headers; BadImage for one that is none."""
    names = dict.fromkeys(name for item in benchmark.items for name in item.images)
    sizes = {name: image_files.read_size(resolve_image_path(root, name)) for name in names}
    return {f"{benchmark.name}/{item.index}": [sizes[name] for name in item.images] for item in benchmark.items}


def to_question(item: BenchmarkItem) -> tuple[str, tuple[int, ...] | None]:
    """(question, reference box in 0..1000 of the first image, or None); "{ref}" stands for it in the question."""
    text = item.question.replace("<|object_ref_start|>", "").replace("<|object_ref_end|>", "").strip()
    found = _INLINE.search(text)
    if not found:
        return text.replace("{ref}", "ref"), None
    return text[:found.start()] + "{ref}" + text[found.end():], tuple(int(v) for v in found.groups())


def to_sample(item: BenchmarkItem, benchmark: str, root: str | Path, opened: dict[str, Image.Image] | None = None) -> Sample:
    """The item with its images opened; boxes in pixels of the original images. BadImage for a broken one.

    opened: images by name, which are taken from there and added to it.
    """
    opened = {} if opened is None else opened
    for name in item.images:
        if name not in opened:
            opened[name] = image_files.open_rgb(resolve_image_path(root, name))
    images = tuple(opened[name] for name in item.images)
    question, inline = to_question(item)
    reference = rescale_box(tuple(map(float, inline)), (1000, 1000), images[0].size) if inline else None
    targets: tuple[tuple[int, Box], ...] = ()
    if item.box:
        numbers = [item.target] if item.target else range(1, len(images) + 1)  # a static difference is in either
        frames = {"unit": (1, 1), "thousand": (1000, 1000)}
        targets = tuple((n, rescale_box(item.box, frames.get(item.frame, images[n - 1].size), images[n - 1].size)) for n in numbers)
    return Sample(f"{benchmark}/{item.index}", benchmark, item.task, "test", images, question, targets, reference,
                  item.choices if item.letter else (), item.letter)


def iter_batches(benchmark: Benchmark, root: str | Path, size: int) -> Iterator[list[Sample]]:
    """Samples, `size` at a time, so that no more images are in memory.

    In the order of the file, but for questions about the same images, which follow the first of them; they share the image objects.
    """
    places: dict[tuple[str, ...], int] = {}
    for place, item in enumerate(benchmark.items):
        places.setdefault(item.images, place)
    items = sorted(benchmark.items, key=lambda item: places[item.images])
    for start in range(0, len(items), size):
        opened: dict[str, Image.Image] = {}
        yield [to_sample(item, benchmark.name, root, opened) for item in items[start:start + size]]


def parse_named_box(reply: str, exact: bool = False) -> tuple[int | None, Box | None]:
    """(image, box) that a reply names, as written: in the form the kit asks for, else in any that `mig-kit score` reads.

    exact: as the strict protocol reads, from the last <answer> alone; else, as the authors' scripts, from the whole reply, and of
    several boxes the first.
    """
    read = parse_reply(reply)
    if read.box is not None:
        return read.image, read.box
    found = parse_strict_answer(reply if exact or last_answer_block(reply) is not None else f"<answer>{reply}</answer>")
    return found.image, found.box if exact or found.box is not None else parse_revised_mig_bench_box(reply)


def to_normalized_1000(reply: str, sizes: list[tuple[int, int]], box_format: BoxFormat, exact: bool = False, target: int | None = None) -> str:
    """A reply's box in 0..1000 of the image it names, else of the target's, "(x1,y1),(x2,y2)", as the authors' scripts read it.

    Without this, boxes in pixels of the resized image would be read as thousandths, silently. exact: with decimals and not cut
    to the image, for the strict protocol; the scripts want whole numbers. sizes: of the original images; target: the number of
    the target image. A reply without a box stays as it is.
    """
    image, box = parse_named_box(reply, exact)
    if box is None:
        return reply
    place = image if image is not None and 1 <= image <= len(sizes) else target or 1
    box = rescale_box(box, coordinate_size(sizes[place - 1], box_format.coordinates, box_format), (1000, 1000))
    x1, y1, x2, y2 = (f"{v:.4f}" if exact else str(min(max(round(v), 0), 1000)) for v in box)
    return f"<answer>{'' if image is None else f'image {image}: '}({x1},{y1}),({x2},{y2})</answer>"


def prediction_lines(benchmark: Benchmark, replies: dict[str, list[str]], sizes: dict[str, list[tuple[int, int]]],
                box_format: BoxFormat, exact: bool = False) -> list[dict]:
    """Lines for `mig-kit score`: {"index", "response"}; of Ref-L4 also "pred_bbox", original pixels, and "format".

    replies and sizes (of the original images) by sample id. exact: see `in_thousandths`.
    """
    lines = []
    for item in benchmark.items:
        name = f"{benchmark.name}/{item.index}"
        reply = replies[name][0]
        line = {"index": item.index, "response": reply if item.letter else
                to_normalized_1000(reply, sizes[name], box_format, exact, item.target)}
        if benchmark.name == "ref_l4":
            _, box = parse_named_box(reply)
            frame = coordinate_size(sizes[name][0], box_format.coordinates, box_format)
            line |= {"pred_bbox": list(rescale_box(box, frame, sizes[name][0])) if box else [0, 0, 0, 0], "format": "xyxy"}
        lines.append(line)
    return lines


def score_systems(benchmark: Benchmark, replies: dict[str, dict[str, list[str]]], sizes: dict[str, list[tuple[int, int]]],
            root: str | Path, box_format: BoxFormat, pairs: list[tuple[str, str]]) -> dict:
    """{"name", "version", "complete", "systems": {system: {protocol: summary}}, "deltas": {pair: {protocol: difference}}}.

    replies: per system as in `predictions`; pairs: of systems, first minus second.
    """
    scored = {system: {protocol: score.score_predictions(benchmark, prediction_lines(benchmark, found, sizes, box_format, protocol == "strict"),
                                             f"the replies of {system}", protocol, "thousand", images=str(root))
                       for protocol in ("official", "strict")} for system, found in replies.items()}
    return {"name": benchmark.name, "version": benchmark.version, "complete": benchmark.complete,
            "systems": {system: {p: summarize(one) for p, one in found.items()} for system, found in scored.items()},
            "deltas": {f"{a}-{b}": {p: paired_difference(scored[a][p], scored[b][p]) for p in scored[a]} for a, b in pairs}}


def results_table(result: dict) -> list[dict]:
    """Rows {system, protocol, task -> headline metric in percent, avg} of `results`."""
    rows = []
    for system, found in result["systems"].items():
        for protocol, one in found.items():
            metric = next(name for name in one["avg"] if name != "ci95")
            rows.append({"system": system, "protocol": protocol, **{task: t[metric] for task, t in one["tasks"].items()},
                         "avg": one["avg"][metric], "ci95": one["avg"]["ci95"]})
    return rows
