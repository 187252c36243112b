"""The command line, in this process or as its own, its notebooks in kernels or in this process.

In a module, because tests in folders with a conftest of their own cannot import from this one's.
"""

import logging
import os
import subprocess
import sys
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import nbformat
import papermill
from click.testing import CliRunner
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt
from nbformat.v4 import new_output
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from mig_kit.commands.main import cli, main
from mig_kit.pipeline import execute, run_folders

CLI = [sys.executable, "-c", "from mig_kit.commands.main import main; main()"]


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


@contextmanager
def notebooks_in_this_process():
    """While it lasts, papermill executes notebooks here: a kernel takes ten seconds more.

    So do the processes of 08; a thread trains instead.
    """
    with (patch.object(papermill, "execute_notebook", _execute_here), trainings_in_threads()):
        yield


@contextmanager
def trainings_in_threads():
    """While it lasts, `compare` trains in threads: a process first imports for ten seconds."""
    with patch("mig_kit.shared_prefix.compare.ProcessPoolExecutor",
               lambda workers, _: ThreadPoolExecutor(workers)):
        yield


def _execute_here(path, output, params, cwd, **_):
    notebook = parameterize_notebook(load_notebook_node(str(path)), params, kernel_name="python3",
                                     language="python")
    shell = InteractiveShell.instance(user_module=ModuleType("__main__"))
    try:
        with chdir(cwd):
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    with capture_output(stdout=False, stderr=False) as captured:
                        result = shell.run_cell(cell.source, store_history=True)
                    result.raise_error()
                    cell.execution_count = result.execution_count
                    cell.outputs = [new_output("display_data", {
                        kind: b64encode(value).decode() if isinstance(value, bytes) else value
                        for kind, value in part.data.items()}, metadata=part.metadata or {})
                        for part in captured.outputs]
    finally:
        InteractiveShell.clear_instance()
        plt.close("all")
        run_folders.unlock_run(Path(output).parent)
    nbformat.write(notebook, output)


def error_of(*words: str) -> str:
    """The sentence of a command that ends with an error."""
    error = CliRunner().invoke(cli, list(words)).exception
    assert error is not None and error.args, "the command was not refused"
    return str(error.args[0])


def output_of(*words: str, **environment: str) -> str:
    """What `mig-kit words` prints, which must end without an error."""
    result = run_mig_kit(*words, **environment)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    return result.stdout


def describe_files(folder: Path, pattern: str = "**/*") -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file of a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.glob(pattern)) if path.is_file()}


if __name__ == "__main__":
    # python command_line.py NOTEBOOKS OPTIONS: the recipe, and 08, with the notebooks of a folder
    notebooks, *options = sys.argv[1:]
    with patch.object(execute, "NOTEBOOKS", Path(notebooks)), notebooks_in_this_process():
        for stages in ((), ("08",)):
            cli(["run", *stages, *options], standalone_mode=False)
            print("the end of", *stages or ["the recipe"], file=sys.stderr)
