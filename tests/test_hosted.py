"""The cell of notebooks/README.md that installs the kit where there is only a notebook."""

import os
import re
import subprocess
import sys

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mig_kit.common import PROJECT_ROOT

pytestmark = pytest.mark.slow


def hosted_cell():
    readme = (PROJECT_ROOT / "notebooks" / "README.md").read_text()
    return re.search(r"```python\n(REPOSITORY = .*?)```", readme, re.DOTALL)[1]


@pytest.fixture
def repository(tmp_path):
    """A clone by URL has what is committed, so what is tracked here is committed to a new one."""
    folder = tmp_path / "kit"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT_ROOT, capture_output=True,
                           check=True, text=True).stdout.split("\0")
    for name in filter(None, files):
        if (PROJECT_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((PROJECT_ROOT / name).read_bytes())
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "--quiet"], ["add", "--all"], [*author, "commit", "-qm", "kit"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return f"file://{folder}"


def test_one_cell_installs_the_kit_and_goes_on(repository, tmp_path, monkeypatch):
    """In a venv of its own that sees the installed packages, so that only the kit is installed;
    MIG_KIT_HOSTED=1 installs all of them.
    """
    venv = tmp_path / "venv"
    python = str(venv / "bin" / "python")
    install = hosted_cell().replace("https://github.com/OWNER/mig-kit", repository)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    if os.environ.get("MIG_KIT_HOSTED"):
        subprocess.run([python, "-m", "pip", "install", "--quiet", "ipykernel"], check=True)
    else:
        packages = venv / "lib" / "python3.11" / "site-packages"
        # after the venv's own packages, so that its kit is the one that is found
        (packages / "shared.pth").write_text(os.path.dirname(os.path.dirname(nbformat.__file__)))
        assert "install --quiet -e" in install
        install = install.replace("install --quiet -e", "install --quiet --no-deps "
                                  "--no-build-isolation --no-index -e")
    source, result = tmp_path / "source.ipynb", tmp_path / "result.ipynb"
    cells = [new_code_cell(install),
             new_code_cell("from mig_kit.common import PROJECT_ROOT\nprint('at', PROJECT_ROOT)"),
             new_code_cell("from mig_kit.pipeline.params import profile_params\n"
                           "assert profile_params('05_grpo', 'smoke')")]
    nbformat.write(new_notebook(cells=cells), source)
    kernels = tmp_path / "share" / "jupyter" / "kernels" / "hosted"
    kernels.mkdir(parents=True)
    (kernels / "kernel.json").write_text(
        f'{{"argv": ["{python}", "-m", "ipykernel_launcher", "-f", "{{connection_file}}"],'
        ' "display_name": "hosted", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    executed = papermill.execute_notebook(source, result, kernel_name="hosted", cwd=str(tmp_path),
                                          progress_bar=False)
    texts = ["".join(output.get("text", "") for output in cell.outputs)
             for cell in executed.cells]
    assert "is ready" in texts[0]
    assert f"at {tmp_path / 'mig-kit'}" in texts[1]
