"""The command line as a process of its own.

In a module, because tests in folders with a conftest of their own cannot import from this one's.
"""

import os
import subprocess
import sys

CLI = [sys.executable, "-c", "from mig_kit.cli import main; main()"]


def run_mig_kit(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The finished process of `mig-kit words`, with these variables added to the environment."""
    return subprocess.run([*CLI, *words], capture_output=True, text=True,
                          env={**os.environ, **environment})
