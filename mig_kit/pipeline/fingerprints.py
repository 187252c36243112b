"""What tells models, files and images apart: their SHA-256, or size and time for large ones."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mig_kit.common import (
    PROJECT_ROOT,
    digest_json,
    file_sha256,
    iter_lines,
    model_folder,
    progress_bar,
)
from mig_kit.image_files import is_regular_file
from mig_kit.pipeline.run_folders import runs_root

LARGE_FILE = 2**26  # bytes; larger files of a model folder are compared by size and time
LARGE_SET = 2**35  # bytes of images, likewise
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")
CACHE = ".images_{}.json"  # in the folder of runs: of a root's images, size and time, and SHA-256
JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?')  # one without an end takes the rest along


def model_fingerprint(model: str) -> dict[str, str]:
    """File name -> digest, of a model folder's weights and settings; {} for a hub name."""
    folder = model_folder(model)
    files = [path for kind in MODEL_FILES for path in folder.glob(kind)]
    return {path.name: (_size_and_time(path) if path.stat().st_size > LARGE_FILE
                        else file_sha256(path)) for path in sorted(files) if path.is_file()}


def _size_and_time(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def hash_named_files(params: dict) -> dict[str, str]:
    """{"data", "images"}: SHA-256 of 01's own data and of its images; {} without own data."""
    path = PROJECT_ROOT / params.get("data", "scenes")
    if path == PROJECT_ROOT / "scenes" or not path.is_file():
        return {}
    root = PROJECT_ROOT / params["image_root"] if params["image_root"] else path.parent
    return {"data": file_sha256(path), "images": hash_images(iter_own_images(path, root), root)}


def iter_own_images(file: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """(name, path) of every text in own data, since each may name an image."""
    is_by_line = file.suffix == ".jsonl"  # else a list, which has no lines to count
    lines = iter_lines(file) if is_by_line else [(1, file.read_bytes())]
    for _, line in lines:
        for text in JSON_STRING.finditer(line or b""):
            with suppress(ValueError):  # stage 01 refuses the line
                name = json.loads(text.group())
                yield name, root / name.removeprefix("file://")


def hash_images(named_paths: Iterable[tuple[str, Path]], root: Path) -> str:
    """SHA-256 over names and contents of images below `root`; known files are not read again."""
    images = dict(named_paths)
    facts = {name: _size_and_time(path) for name, path in images.items() if is_regular_file(path)}
    sizes = (int(fact.split()[0]) for fact in facts.values())
    digests = facts if sum(sizes) > LARGE_SET else _hash_files(root, images, facts)
    return digest_json(digests)


def _hash_files(root: Path, images: dict[str, Path], facts: dict[str, str]) -> dict[str, str]:
    """Name -> SHA-256 of images that are there, or were."""
    cache = runs_root() / CACHE.format(hashlib.sha256(str(root).encode()).hexdigest()[:16])
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):  # none yet, or broken
        known = {}
    base = root.resolve()  # what leads out of it is refused by the stage, and not read here
    moved = [name for name, fact in facts.items() if known.get(name, [""])[0] != fact
             and images[name].resolve().is_relative_to(base)]
    for name in progress_bar(moved, "hash images", delay=5):
        known[name] = [facts[name], file_sha256(images[name])]
    with suppress(OSError):  # a cache that cannot be written costs time alone
        if moved:
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.tmp")  # of this process alone
            temporary.write_text(json.dumps(known))
            temporary.replace(cache)
    return {name: known[name][1] for name in images if name in known}
