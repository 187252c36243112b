"""Real benchmarks for `mig-kit eval`: their items as samples of the kit, and models' replies as
lines that both protocols judge.

Images are opened a batch at a time and must lie below one root. All of them are looked for before
any model is loaded.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from PIL import Image

from mig_kit import image_files
from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.sample import Sample, Target
from mig_kit.score.annotations import (
    READERS,
    Benchmark,
    BenchmarkItem,
    resolve_image_path,
)
from mig_kit.score.choice_parsers import read_letter
from mig_kit.score.convert_boxes import convert_exactly, to_official_line
from mig_kit.score.records import read_records
from mig_kit.score.reply_boxes import parse_named_box

# Not MC-Bench and OdinW, which ask for every box of an image, with a score.
RUNNABLE = tuple(READERS)
PROTOCOLS = ("official", "strict")

_INLINE_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")


def read_runnable(name: str, annotations: str | Path, root: str | Path,
                  limit: int = 0) -> Benchmark:
    """A benchmark whose images all exist. limit: only so many first items of every task; 0 for all.

    Raises ValueError with one sentence for an unknown benchmark, items without images, multiple
    choice without options, and missing images.
    """
    if name not in RUNNABLE:
        raise ValueError(f"mig-kit eval cannot run '{name}'; the benchmarks it runs are "
                         f"{', '.join(RUNNABLE)} (mig-kit score judges finished predictions on the "
                         "others)")
    benchmark = _first_per_task(READERS[name](read_records(annotations)), limit)
    without_images = [item.name for item in benchmark.items if not item.images]
    if without_images:
        raise ValueError(f"{len(without_images)} items of {annotations} name no images (first: "
                         f"{', '.join(without_images[:3])}); give every record its \"images\", "
                         "a list of file names below the image root")
    without_options = [item.name for item in benchmark.items
                       if item.letter and not 2 <= len(item.choices) <= 8]
    if without_options:
        raise ValueError(f"{len(without_options)} multiple-choice items of {annotations} have no 2 "
                         f"to 8 options that can be read (first: {', '.join(without_options[:3])});"
                         ' write BLINK\'s as a list, "choices", and MMIU\'s as "A: ... B: ..."')
    images = dict(iter_image_paths(benchmark, root))
    missing = [image for image, path in images.items() if not image_files.is_regular_file(path)]
    if missing:
        raise ValueError(f"{len(missing)} of {len(images)} images are missing below {root} (first: "
                         f"{', '.join(missing[:3])}); download and unpack them, or correct "
                         "--images")
    return benchmark


def _first_per_task(benchmark: Benchmark, limit: int) -> Benchmark:
    """The benchmark with only so many first items of every task; as it is for 0."""
    if not limit:
        return benchmark
    counts: Counter = Counter()
    items = []
    for item in benchmark.items:
        counts[item.task] += 1
        if counts[item.task] <= limit:
            items.append(item)
    return replace(benchmark, items=tuple(items), complete=False)


def iter_image_paths(benchmark: Benchmark, root: str | Path) -> Iterator[tuple[str, Path]]:
    """Every image of a benchmark's items once, in the order of the file, and the file that it
    stands for.
    """
    for image in dict.fromkeys(name for item in benchmark.items for name in item.images):
        yield image, resolve_image_path(root, image)


def sample_id(benchmark: str, item: BenchmarkItem) -> str:
    """The id of the item's sample, by which replies and sizes are looked up."""
    return f"{benchmark}/{item.index}"


def image_sizes(benchmark: Benchmark, root: str | Path) -> dict[str, list[tuple[int, int]]]:
    """Sample id -> (width, height) of its original images, from their headers.

    Raises BadImage for a file that is no image.
    """
    sizes = {name: image_files.read_size(path) for name, path in iter_image_paths(benchmark, root)}
    return {sample_id(benchmark.name, item): [sizes[name] for name in item.images]
            for item in benchmark.items}


def to_sample(item: BenchmarkItem, benchmark: str, root: str | Path,
              images_by_name: dict[str, Image.Image] | None = None) -> Sample:
    """The item with its images opened; boxes in pixels of the original images. A static difference
    has a target in every image; "{ref}" stands for a box in the question.

    images_by_name: images that are open already, to which those of the item are added. Raises
    BadImage for a broken image.
    """
    if images_by_name is None:
        images_by_name = {}
    for name in item.images:
        if name not in images_by_name:
            images_by_name[name] = image_files.open_rgb(resolve_image_path(root, name))
    images = tuple(images_by_name[name] for name in item.images)
    question = item.question.replace("<|object_ref_start|>", "").replace("<|object_ref_end|>", "")
    question, reference = question.strip(), None
    if match := _INLINE_BOX.search(question):  # in 0..1000 of the first image
        reference = rescale_box(tuple(map(float, match.groups())), (1000, 1000), images[0].size)
        question = question[:match.start()] + "{ref}" + question[match.end():]
    else:
        question = question.replace("{ref}", "ref")
    numbers = [item.target] if item.target else range(1, len(images) + 1)
    sizes = [(number, images[number - 1].size) for number in numbers if item.box]
    targets = tuple(Target(number, rescale_box(
        item.box, coordinate_size(size, item.coordinates, BoxFormat()), size))
        for number, size in sizes)
    options = item.choices if item.letter else ()
    return Sample(sample_id(benchmark, item), benchmark, item.task, "test", images, question,
                  targets, reference, options, item.letter)


def iter_batches(benchmark: Benchmark, root: str | Path, size: int) -> Iterator[list[Sample]]:
    """Samples, `size` at a time, so that no more images are in memory.

    In the order of the file, but for questions about the same images, which follow the first of
    them; they share the image objects.
    """
    places: dict[tuple[str, ...], int] = {}
    for place, item in enumerate(benchmark.items):
        places.setdefault(item.images, place)
    items = sorted(benchmark.items, key=lambda item: places[item.images])
    for start in range(0, len(items), size):
        images_by_name: dict[str, Image.Image] = {}
        yield [to_sample(item, benchmark.name, root, images_by_name)
               for item in items[start:start + size]]


def names_answer(item: BenchmarkItem, reply: str) -> bool:
    """Whether the reply's text names a box or, of multiple choice, one option."""
    if item.letter:
        return bool(read_letter(item, reply))
    return parse_named_box(reply)[1] is not None


def prediction_lines(benchmark: Benchmark, replies: dict[str, list[str]],
                     sizes: dict[str, list[tuple[int, int]]], box_format: BoxFormat,
                     exact: bool = False) -> list[dict]:
    """Lines for `mig-kit score`: {"index", "response"}; of Ref-L4 also "pred_bbox" and "format".

    replies and sizes (of the original images) by sample id. Boxes are converted from the model's
    coordinates, see convert_boxes. exact: for the strict protocol, else for the authors' rules.
    """
    lines = []
    for item in benchmark.items:
        name = sample_id(benchmark.name, item)
        line = {"index": item.index, "response": replies[name][0]}
        is_read_as_it_is = (box_format.coordinates == Coordinates.NORMALIZED_1000
                            and benchmark.name != "ref_l4" and not exact)
        if exact and not item.letter:
            line["response"] = convert_exactly(line["response"], sizes[name], item.target,
                                               box_format)
        elif not item.letter and not is_read_as_it_is:
            line = to_official_line(item, benchmark.name, line, sizes[name],
                                    box_format.coordinates, box_format)
        lines.append(line)
    return lines
