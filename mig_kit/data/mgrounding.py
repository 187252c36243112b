"""MGrounding-630k as published (Migician, arXiv 2501.05767) into samples, one record at a time.

One JSON array of records, each with paths of images, and archives that unpack below a nested home/
folder. mgrounding_records.py reads what a record says.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import ijson

from mig_kit.boxes import rescale_box
from mig_kit.data.mgrounding_records import NAME, GroundingQuestion, iter_questions
from mig_kit.image_files import (
    BadImage,
    EncodedImage,
    LazyImages,
    SkipReport,
    is_regular_file,
    read_size,
    resolve_under_root,
)
from mig_kit.sample import Sample, Target

MAX_JSON_DEPTH = 32
BOX_SCALE = (1000, 1000)


def iter_records(path: Path, on_bytes: Callable[[int], object] | None = None,
                 prefix: str = "item") -> Iterator[object]:
    """The elements of the annotation array, one in memory at a time.

    on_bytes: called with the number of bytes, whenever some were read. prefix: ijson's name of the
    elements, "images.item" for those of a list under the key "images". ValueError, with the remedy,
    if the file is broken.
    """
    try:
        with path.open("rb") as file:
            source = _CountedFile(file, on_bytes) if on_bytes else file
            events = _limit_depth(ijson.basic_parse(source, use_float=True), path)
            yield from ijson.items(ijson.parse(events), prefix)
    except (ijson.JSONError, UnicodeError) as error:
        reason = str(error)[:80]
        raise ValueError(f"{path} is cut or no JSON ({reason}); download it again") from error


class _CountedFile:
    """A file that tells how many bytes were read."""

    def __init__(self, file: BinaryIO, on_bytes: Callable[[int], object]):
        self.file, self.on_bytes = file, on_bytes

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        content = self.file.read(size)
        self.on_bytes(len(content))
        return content


def _limit_depth(events: Iterator, path: Path) -> Iterator:
    """The JSON events; ValueError where they nest over MAX_JSON_DEPTH.

    The names that ijson gives nested values grow with their depth, and memory with its square.
    """
    depth = 0
    for event in events:
        depth += event[0].startswith("start") - event[0].startswith("end_")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"{path} is nested over {MAX_JSON_DEPTH} deep, which no annotation "
                             "is; download it again")
        yield event


def find_image_roots(root: Path) -> list[Path]:
    """Folders below `root` that stand for ./MGrounding-630k: the folder itself, root, and any below
    a nested home/.
    """
    roots = [root / NAME, root]
    level = [root / "home"]
    for _ in range(5):
        children = [child for folder in level if folder.is_dir()
                    for child in sorted(folder.iterdir())]
        folders = [child for child in children if child.is_dir() and not child.is_symlink()]
        roots += [folder for folder in folders if folder.name == NAME]
        level = [folder for folder in folders if folder.name != NAME]
    return roots


def locate_image(root: Path, roots: list[Path], name: str) -> Path:
    """The file of an image path as written.

    roots: of `find_image_roots`. BadImage if the path leads out of `root` or is in none of them.
    """
    resolve_under_root(root, name)
    path_in_set = name
    if name.removeprefix("./").startswith(f"{NAME}/"):
        path_in_set = name.split(f"{NAME}/", 1)[-1]
    for folder in roots:
        path = resolve_under_root(root, f"{folder.relative_to(root).as_posix()}/{path_in_set}")
        if is_regular_file(path):
            return path
    raise BadImage("missing image", f"{name!r} is not below {root}; unpack its archive there")


def check_annotations(path: Path, root: Path, unstated: dict[str, int] | None = None,
                      limit: int | None = None, orientation: str = "upright") -> SkipReport:
    """Read everything but the pixels: what is kept, and what is left out and why.

    Arguments: as `iter_samples`. Run it before a model is loaded.
    """
    report = SkipReport()
    for _ in _iter_located(path, root, report, unstated, limit, orientation=orientation):
        pass
    return report


def iter_samples(path: Path, root: Path, report: SkipReport,
                 unstated: dict[str, int] | None = None,
                 limit: int | None = None,
                 on_bytes: Callable[[int], object] | None = None,
                 orientation: str = "upright") -> Iterator[Sample]:
    """The samples; `report` counts what is left out. An image is decoded when it is looked at.

    path: MGrounding-630k.json or one of the subsets' files. root: the folder the archives were
    unpacked in; no image is read from outside it. unstated: see `iter_questions`. limit: stop after
    so many samples. on_bytes: see `iter_records`. orientation: one of ORIENTATIONS. Boxes become
    pixels of the original images.
    """
    located = _iter_located(path, root, report, unstated, limit, on_bytes, orientation)
    for question, images in located:
        sizes = images.sizes
        targets = tuple(Target(number, rescale_box(box, BOX_SCALE, sizes[number - 1]))
                        for number, box in question.targets)
        reference = None
        if question.reference:
            reference = rescale_box(question.reference, BOX_SCALE, sizes[0])
        yield Sample(question.id, "mgrounding", question.subset or "mgrounding", "train", images,
                     question.question, targets, reference)


def _iter_located(path: Path, root: Path, report: SkipReport, unstated: dict[str, int] | None,
                  limit: int | None, on_bytes: Callable[[int], object] | None = None,
                  orientation: str = "upright"
                  ) -> Iterator[tuple[GroundingQuestion, LazyImages]]:
    """The questions whose images are all there, with the images."""
    roots = find_image_roots(root)
    for index, record in enumerate(iter_records(path, on_bytes)):
        report.read += 1
        for question in iter_questions(index, record, report, unstated):
            try:
                paths = [locate_image(root, roots, name) for name in question.images]
                images = LazyImages(EncodedImage(image_path, read_size(image_path, orientation))
                                    for image_path in paths)
            except BadImage as error:
                report.add(error.reason, f"{question.id}: {error}")
                continue
            report.kept += 1
            yield question, images
            if limit is not None and report.kept >= limit:
                return
