"""Replies in the files that a killed stage resumes from; reading them needs no model."""

import json
from pathlib import Path

from mig_kit.common import write_atomically


def load_replies(path: Path) -> dict[str, list[str]]:
    """Replies by sample id from a file of `reply_files.sample_replies`; a line cut by a kill is
    dropped, also in the file.
    """
    replies, whole = {}, []
    stored = path.read_bytes() if path.is_file() else b""
    for line in stored.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        replies[row["id"]] = row["replies"]
        whole.append(line + b"\n")
    if b"".join(whole) != stored:
        write_atomically(path, lambda temporary: temporary.write_bytes(b"".join(whole)))
    return replies
