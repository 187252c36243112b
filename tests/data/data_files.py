"""Small files of own data, and what `mig-kit data` says of them."""

import json

from command_line import run_mig_kit

from mig_kit.data import own_data

GOOD = {"images": ["a.png", "b.png"], "question": "Find the cup of image 1.", "image": 2,
        "box": [10, 20, 60, 90], "coordinates": "pixels"}
CHOICE = {"images": ["a.png"], "question": "What is it?", "options": ["a cup", "a dog"],
          "letter": "B"}


def changed(row=GOOD, **keys):
    """The row with these values; ... takes a key out."""
    return {key: value for key, value in {**row, **keys}.items() if value is not ...}


def write_lines(folder, *rows, name="data.jsonl"):
    """A file with a row a line; bytes are lines as they are."""
    path = folder / name
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n"
                              for row in rows))
    return path


def check(path, root):
    """The problems of each line, as text."""
    return [list(map(str, line.problems)) for line in own_data.iter_checked_lines(path, root, True)]


def call(*words):
    """(exit code, everything that a command of `mig-kit data` says)."""
    result = run_mig_kit("data", *map(str, words))
    return result.returncode, (result.stdout + result.stderr.removeprefix("mig-kit: ")).rstrip()
