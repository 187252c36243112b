"""Real benchmarks for `mig-kit eval`: their items as samples."""

import re
from dataclasses import replace
from pathlib import Path

from mig_kit.boxes import BoxFormat, coordinate_size, rescale_box
from mig_kit.common import UserError
from mig_kit.image_files import EncodedImage, LazyImages
from mig_kit.sample import Sample, Target
from mig_kit.score.annotations import (
    Benchmark,
    BenchmarkItem,
    read_image_sizes,
    resolve_image_path,
)
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import read_records
from mig_kit.stats import first_rows

_INLINE_BOX = re.compile(r"<\|box_start\|>\((\d+),(\d+)\),\((\d+),(\d+)\)<\|box_end\|>")


def read_runnable(name: str, annotations: str | Path, root: str | Path,
                  limit: int = 0) -> tuple[Benchmark, list[Sample]]:
    """A benchmark and its items as samples.

    Args:
        name: one of `benchmarks.RUNNABLE`. limit: items per task, 0 for all.
    Raises: UserError for items without images, multiple choice without options, and images that are
    missing or none.
    """
    benchmark = read_benchmark(name, read_records(annotations))
    if limit:
        chosen = first_rows([item.task for item in benchmark.items], limit)
        benchmark = replace(benchmark, complete=False,
                            items=tuple(benchmark.items[row] for row in chosen))
    for is_usable, problem in (
            (lambda item: item.images, 'name no images; give every record its "images", a list of '
                                       "file names below the image root"),
            (lambda item: not item.letter or 2 <= len(item.choices) <= 8,
             'have no 2 to 8 options that can be read; write BLINK\'s as a list, "choices", and '
             'MMIU\'s as "A: ... B: ..."')):
        if bad := [item.name for item in benchmark.items if not is_usable(item)]:
            raise UserError(f"{len(bad)} items of {annotations} (first: {', '.join(bad[:3])}) "
                            f"{problem}")
    sizes = read_image_sizes((name for item in benchmark.items for name in item.images), root)
    images = {name: EncodedImage(resolve_image_path(root, name), size)
              for name, size in sizes.items()}
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
