"""The command line: in this process, which is quick, or as a process of its own.

In a module, because tests in folders with a conftest of their own cannot import from this one's.
"""

import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from unittest.mock import patch

from mig_kit.cli import main

CLI = [sys.executable, "-c", "from mig_kit.cli import main; main()"]


def run_mig_kit(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """What `mig-kit words` does in this process, with these variables added to the environment."""
    stdout, stderr, code = StringIO(), StringIO(), 0
    with (patch.dict(os.environ, environment), patch.object(sys, "argv", ["mig-kit", *words]),
          patch.multiple(logging.root, handlers=[], level=logging.WARNING),
          redirect_stdout(stdout), redirect_stderr(stderr)):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    if isinstance(code, str):  # as the interpreter does with it
        stderr.write(f"{code}\n")
        code = 1
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


def start_mig_kit(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The finished process of `mig-kit words`, with these variables added to the environment."""
    return subprocess.run([*CLI, *words], capture_output=True, text=True,
                          env={**os.environ, **environment})
