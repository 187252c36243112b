"""Replies in files, read without a model: of `reply_files`, and rollouts of `KeepRollouts`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from mig_kit.boxes import BoxFormat
from mig_kit.common import load_json_lines
from mig_kit.drawing import pictures
from mig_kit.sample import Sample

ROLLOUTS = "rollouts.jsonl"


def reply_file(folder: Path, system: str, suite: str, kind: str = "greedy") -> Path:
    """Where a system's replies to a suite are stored; kind: greedy, or drawn at temperature 1."""
    return folder / f"{system}_{suite}_{kind}.jsonl"


def load_replies(path: Path) -> dict[str, list[str]]:
    """Replies by sample id, of a reply file; raises as `load_json_lines`."""
    return {row["id"]: row["replies"] for row in load_json_lines(path)}


def reply_row(sample_id: str, replies: list[str], reasons: list[str]) -> dict:
    """A row of a reply file; reasons: finish_reasons, left out if all replies ended themselves."""
    others = {"finish_reasons": reasons} if {*reasons} - {"stop", ""} else {}
    return {"id": sample_id, "replies": replies, **others}


def count_endings(*paths: Path) -> dict:
    """How the replies in files of `reply_files.sample_replies` ended.

    Returns: {"replies", "cut": by the limit of tokens, "empty": finish_reason -> count of the
    others that hold no text}.
    """
    counts, empty = Counter(replies=0, cut=0), Counter()
    for path in paths:
        for row in load_json_lines(path):
            reasons = row.get("finish_reasons", ["stop"] * len(row["replies"]))
            for reply, reason in zip(row["replies"], reasons, strict=True):
                counts.update(replies=1, cut=reason == "length")
                if reason != "length" and not reply.strip():
                    empty[reason or "unknown"] += 1
    return {**counts, "empty": dict(empty)}


def describe_endings(endings: dict) -> str:
    """"3 cut, 2 empty (refusal 2)" of `count_endings`, "-" where none is."""
    reasons = ", ".join(f"{reason} {count}" for reason, count in endings["empty"].items())
    parts = [f"{endings['cut']} cut"] * bool(endings["cut"])
    parts += [f"{sum(endings['empty'].values())} empty ({reasons})"] * bool(reasons)
    return ", ".join(parts) or "-"


def load_rollouts(folder: Path) -> list[dict]:
    """The rows that a stage folder holds, in order; [] if none were kept.

    A row is a reply: step (updates before it), prompt (the index of its sample) and what
    `grpo.describe_answer` gives.
    """
    return load_json_lines(folder / ROLLOUTS)


def draw_first_rollouts(folder: Path, box_format: BoxFormat,
                        samples: Sequence[Sample]) -> Image | None:
    """Picture of the replies to the first prompt that asks for a box, over the updates, or None."""
    rows = load_rollouts(folder)
    prompts = {row["prompt"]: samples[row["prompt"]] for row in rows}
    with_box = [index for index, sample in prompts.items() if sample.targets] or list(prompts)
    if not with_box:
        return None
    rows = [row for row in rows if row["prompt"] == with_box[0]]
    return pictures.draw_rollouts(prompts[with_box[0]], rows, box_format)
