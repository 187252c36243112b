"""The notebooks in JupyterLab itself: every numbered one opened in headless Chromium and run from first cell to last.

Skipped where there is no playwright (`pip install playwright`; no browser of its own is needed) or no Chromium. Screenshots
are left in the folder that MIG_KIT_SCREENSHOTS names.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import papermill
import pytest

from mig_kit.cli import chosen_params
from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder it serves, folder of runs): JupyterLab over the notebooks with smoke parameters put in, nothing run yet."""
    folder, root = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("runs")
    for stage in store.RECIPE:
        papermill.execute_notebook(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb", folder / f"{stage}.ipynb",
                                   chosen_params(stage, "smoke", "lab", {}), prepare_only=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ServerApp.port_retries=0",
         "--IdentityProvider.token=lab", f"--ServerApp.root_dir={folder}", "--LabApp.news_url="],
        env={**os.environ, "MIG_KIT_RUNS": str(root)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{address}/api?token=lab", timeout=2)
            break
        except OSError:
            time.sleep(0.5)
    yield address, folder, root
    server.terminate()
    server.wait(20)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of the system's Chromium."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1200, "height": 1400})
        browser.close()


ERRORS = ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']"


def show(page, address, name):
    page.goto(f"{address}/lab/tree/{name}.ipynb?token=lab&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector(".jp-NotebookPanel-toolbar .jp-Toolbar-kernelName:not(:has-text('No Kernel'))", timeout=60_000)


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def wait(finished, page, red=0):
    """Until `finished()`; no more than `red` errors may show meanwhile."""
    until = time.monotonic() + 300
    while not finished():
        assert page.locator(ERRORS).count() <= red
        assert time.monotonic() < until, "not finished in five minutes"
        time.sleep(0.2)


@pytest.mark.parametrize("stage", store.RECIPE)
def test_every_cell_runs_in_lab(stage, lab, page):
    address, folder, root = lab
    show(page, address, stage)
    run_all(page)
    wait(lambda: (root / "lab" / stage / "run.json").is_file(), page)
    time.sleep(1.5)
    shots = os.environ.get("MIG_KIT_SCREENSHOTS")
    if shots:
        Path(shots).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(shots) / f"{stage}.png")
    page.get_by_role("menuitem", name="File", exact=True).click()
    page.locator(".lm-Menu-item[data-command='docmanager:save']").click()
    time.sleep(1.5)
    saved = papermill.iorw.load_notebook_node(str(folder / f"{stage}.ipynb"))
    outputs = [output for cell in saved.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert not [output for output in outputs if output.output_type == "error"]
    assert pictures, f"{stage} shows no picture"
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator(".lm-Menu-item[data-command='kernelmenu:shutdown']").click()
    time.sleep(1)


def test_an_interrupt_in_lab_loses_nothing(lab, page):
    """An evaluation interrupted by Kernel > Interrupt, its cells run again: the same replies as in the run before."""
    address, folder, root = lab
    before = root / "lab" / "06_evaluate"
    if not (before / "run.json").is_file():
        pytest.skip("needs the notebooks before it")
    for stage in store.RECIPE[:6]:
        shutil.copytree(root / "lab" / stage, root / "again" / stage)
    papermill.execute_notebook(PROJECT_ROOT / "notebooks" / "06_evaluate.ipynb", folder / "again.ipynb",
                               chosen_params("06_evaluate", "smoke", "again", {}), prepare_only=True)
    done = root / "again" / "06_evaluate" / "run.json"
    show(page, address, "again")
    run_all(page)
    wait((done.parent / "replies" / "base_mig_bench_drawn.jsonl").is_file, page)
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.locator(".lm-Menu-item[data-command='kernelmenu:interrupt']").click()
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']", timeout=60_000)
    assert not done.is_file() and len(list(done.parent.glob("replies/*.jsonl"))) < len(list(before.glob("replies/*.jsonl")))
    run_all(page)
    wait(done.is_file, page, red=1)
    drawn = sorted(path.name for path in (before / "replies").glob("*.jsonl"))
    assert drawn and all((done.parent / "replies" / n).read_bytes() == (before / "replies" / n).read_bytes() for n in drawn)
    assert (done.parent / "metrics.json").read_bytes() == (before / "metrics.json").read_bytes()
