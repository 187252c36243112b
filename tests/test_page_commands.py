"""README and guide: their commands run as the pages print them, on smoke parameters, at night."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import own_questions
import page_shell
import pytest
from benchmark_files import write_benchmarks
from PIL import Image
from test_documents import TEXTS, read_blocks

from mig_kit.common import PACKAGE

pytestmark = pytest.mark.nightly
# installs, opens JupyterLab, needs a server (test_vllm.py has one), runs in another test, or
# compares with a run without 06, which is asked the recipe's questions and not the smoke run's
ELSEWHERE = re.compile(r"^(git|make|source|\.venv|vllm|export|VLLM|papermill|mig-kit data import) ?"
                       r"|endpoint|-p server|BENCHMARK|\.\.\.|--compare long")
PREDICTIONS = "".join(
    f'{{"index": {index}, "response": "<think>a</think><answer>(1,2),(3,4)</answer>"}}\n'
    for index in range(3))
REAL_RUN = "notebooks/guide/real_run.md"


def read_lines(page: str) -> list[str]:
    """The commands of a page's shell blocks that run here, loops as well."""
    text = "".join(read_blocks(TEXTS[page])).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines()
            if line.strip() and not ELSEWHERE.search(line.strip())]


PAGES = [page for page in TEXTS if page != "README.md" and read_lines(page)]
(CENTER,) = read_blocks(TEXTS["notebooks/guide/variants.md"], "python")


@pytest.fixture(scope="module")
def folder(smoke_runs, relatives, tmp_path_factory):
    """Where the pages' files lie: a finished run "default", own data, annotations, models."""
    folder = tmp_path_factory.mktemp("pages")
    shutil.copytree(smoke_runs / "smoke", folder / "runs" / "default")
    own_questions.write_questions(folder / "images", 60)
    write_benchmarks(folder / "images")
    shutil.copytree(folder / "images", folder, dirs_exist_ok=True)  # where no --root is given
    (folder / "eval" / "MIG-Bench").mkdir(parents=True)
    for name in ("MIG_data.json", "eval/MIG-Bench/revised_MIG_bench.json"):
        shutil.copy(folder / "mig_bench.json", folder / name)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (90, 70), "white").save(folder / name)
    (folder / "replies.jsonl").write_text(PREDICTIONS)
    (folder / "my_rewards.py").write_text(CENTER)
    (folder / "Qwen").mkdir()
    (folder / "Qwen" / "Qwen2.5-VL-7B-Instruct").symlink_to(PACKAGE / "tiny_base")
    (folder / "Qwen" / "Qwen3-VL-8B-Instruct").symlink_to(relatives["qwen3_vl"])
    (folder / "my-folder").symlink_to(folder / "runs/default/03_merge/merged")
    (folder / "my-adapter").symlink_to(folder / "runs/default/05_grpo/adapter")
    script = folder / "bin" / "mig-kit"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {page_shell.__file__} "$@"\n')
    script.chmod(0o755)
    run_lines(folder, read_lines("README.md"))
    shutil.copytree(folder / "runs/mine", folder / "runs/other")
    shutil.copytree(smoke_runs / "smoke", folder / "real_runs" / "mine")
    return folder


def run_lines(folder: Path, lines: list[str], runs: str = "runs") -> str:
    """What a page's lines print, in a shell that stops at the first error."""
    script = []
    for line in lines:
        # pages call predictions and own data by one name
        source = "replies.jsonl" if " score " in line else "images/own.jsonl"
        script += [f"cp {source} mine.jsonl", line]
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-ex", "-c", "\n".join(script)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PATH": path, "MIG_KIT_RUNS": str(folder / runs)})
    assert not result.returncode, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page, folder):
    shutil.rmtree(folder / "evals", ignore_errors=True)  # which pages name alike
    assert run_lines(folder, read_lines(page), "real_runs" if page == REAL_RUN else "runs")


def test_the_commands_of_the_readme_run(folder):
    """The fixture ran them."""
    assert {"default", "gentle", "mine"} <= {path.name for path in (folder / "runs").iterdir()}
