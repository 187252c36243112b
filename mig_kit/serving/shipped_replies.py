"""Replies of the shipped base that need not be drawn again: to the questions that 06 asks.

They lie beside the base (`make executed` writes them), under a key of all that decides them.
"""

import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mig_kit.boxes import BoxFormat
from mig_kit.common import digest_json, load_json_lines, model_folder, write_json_lines
from mig_kit.image_files import image_digests
from mig_kit.pipeline.stage_keys import model_fingerprint
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions

BASE = "tiny"
FILE = model_folder(BASE) / "replies.jsonl.gz"  # lines {"key", "rows" of a reply file}


def reply_key(samples: Sequence[Sample], box_format: BoxFormat, dtype: torch.dtype, replies: int,
              sampling: SamplingOptions, seed: int) -> str:
    """SHA-256 of what decides the base's replies: its files, prompts, images and sampling.

    dtype: of its weights. replies: to each sample. seed: of 06.
    """
    images = {name: value for name, value in vars(box_format).items() if name != "prompt"}
    digest = hashlib.sha256(digest_json(  # the prompt is in the messages
        [model_fingerprint(BASE), images, str(dtype), replies, vars(sampling),
         seed if sampling.temperature else 0]).encode())
    for sample in samples:
        digest.update(json.dumps([sample.id, chat_messages(sample, box_format)]).encode())
        digest.update(b"".join(image_digests(sample.images)))
    return digest.hexdigest()


def fetch_replies(key: str, path: Path) -> int:
    """Write the shipped replies of this key to the reply file `path`; how many there were."""
    for line in gzip.decompress(FILE.read_bytes()).splitlines() if FILE.is_file() else ():
        entry = json.loads(line)
        if entry["key"] == key:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json_lines(path, entry["rows"])
            return sum(len(row["replies"]) for row in entry["rows"])
    return 0


def ship_replies(paths: dict[str, Path]) -> None:
    """Put the rows of reply files into FILE; paths: by `reply_key`."""
    lines = [json.dumps({"key": key, "rows": load_json_lines(path)}) + "\n"
             for key, path in paths.items()]
    FILE.write_bytes(gzip.compress("".join(lines).encode(), 9, mtime=0))
