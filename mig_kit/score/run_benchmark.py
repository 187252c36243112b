"""Real benchmarks for `mig-kit eval`: items as samples, and replies as lines for both protocols."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box
from mig_kit.common import UserError
from mig_kit.image_files import EncodedImage, LazyImages, is_regular_file, read_size
from mig_kit.sample import Sample, Target
from mig_kit.score.annotations import READERS, Benchmark, BenchmarkItem, resolve_image_path
from mig_kit.score.convert_boxes import convert_exactly, to_official_line
from mig_kit.score.records import read_records
from mig_kit.stats import group_by_task

# Not MC-Bench and OdinW, which ask for every box of an image, with a score.
RUNNABLE = tuple(READERS)
PROTOCOLS = ("official", "strict")

_INLINE_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")


def read_runnable(name: str, annotations: str | Path, root: str | Path,
                  limit: int = 0) -> tuple[Benchmark, list[Sample]]:
    """A benchmark of RUNNABLE and its items as samples; limit: items per task, 0 for all.

    Raises UserError for items without images, multiple choice without options, and missing images;
    BadImage for a file that is no image.
    """
    benchmark = READERS[name](read_records(annotations))
    if limit:
        rows = np.arange(len(benchmark.items))
        by_task = group_by_task((item.task for item in benchmark.items), rows)
        chosen = sorted(row for part in by_task.values() for row in part[:limit])
        benchmark = replace(benchmark, complete=False,
                            items=tuple(benchmark.items[row] for row in chosen))
    without_images = [item.name for item in benchmark.items if not item.images]
    if without_images:
        raise UserError(f"{len(without_images)} items of {annotations} name no images (first: "
                        f"{', '.join(without_images[:3])}); give every record its \"images\", "
                        "a list of file names below the image root")
    without_options = [item.name for item in benchmark.items
                       if item.letter and not 2 <= len(item.choices) <= 8]
    if without_options:
        raise UserError(f"{len(without_options)} multiple-choice items of {annotations} have no 2 "
                        f"to 8 options that can be read (first: {', '.join(without_options[:3])});"
                        ' write BLINK\'s as a list, "choices", and MMIU\'s as "A: ... B: ..."')
    names = dict.fromkeys(name for item in benchmark.items for name in item.images)
    paths = {name: resolve_image_path(root, name) for name in names}
    missing = [name for name, path in paths.items() if not is_regular_file(path)]
    if missing:
        raise UserError(f"{len(missing)} of {len(paths)} images are missing below {root} (first: "
                        f"{', '.join(missing[:3])}); download and unpack them, or correct "
                        "--images")
    images = {name: EncodedImage(path, read_size(path)) for name, path in paths.items()}
    return benchmark, [to_sample(item, benchmark.name,
                                 LazyImages(tuple(images[name] for name in item.images)))
                       for item in benchmark.items]


def to_sample(item: BenchmarkItem, benchmark: str, images: LazyImages) -> Sample:
    """The item as a sample; boxes in pixels of the original images, "{ref}" for one in the text."""
    question = item.question.replace("<|object_ref_start|>", "").replace("<|object_ref_end|>", "")
    question, reference = question.strip(), None
    if match := _INLINE_BOX.search(question):  # in 0..1000 of the first image
        reference = rescale_box(tuple(map(float, match.groups())), (1000, 1000), images.sizes[0])
        question = question[:match.start()] + "{ref}" + question[match.end():]
    else:
        question = question.replace("{ref}", "ref")
    numbers = [item.target] if item.target else range(1, len(images) + 1)
    sizes = [(number, images.sizes[number - 1]) for number in numbers if item.box]
    targets = tuple(Target(number, rescale_box(
        item.box, coordinate_size(size, item.coordinates, BoxFormat()), size))
        for number, size in sizes)
    options = item.choices if item.letter else ()
    return Sample(f"{benchmark}/{item.index}", benchmark, item.task, "test", images, question,
                  targets, reference, options, item.letter)


def prediction_lines(benchmark: Benchmark, samples: Sequence[Sample], replies: Sequence[str],
                     box_format: BoxFormat, exact: bool = False) -> list[dict]:
    """Lines for `mig-kit score`: {"index", "response"}; of Ref-L4 also "pred_bbox" and "format".

    Boxes are converted from the model's coordinates. exact: for the strict protocol.
    """
    lines = []
    for item, sample, reply in zip(benchmark.items, samples, replies, strict=True):
        line = {"index": item.index, "response": reply}
        is_read_as_it_is = (box_format.coordinates == Coordinates.NORMALIZED_1000
                            and benchmark.name != "ref_l4" and not exact)
        if exact and not item.letter:
            line["response"] = convert_exactly(reply, sample.sizes, item.target, box_format)
        elif not item.letter and not is_read_as_it_is:
            line = to_official_line(item, benchmark.name, line, sample.sizes,
                                    box_format.coordinates, box_format)
        lines.append(line)
    return lines
