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

from mig_kit import runs
from mig_kit.cli import chosen_params

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder it serves, folder of runs): JupyterLab over the notebooks with smoke parameters put in, nothing run yet."""
    folder, root = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("runs")
    for stage in runs.RECIPE:
        papermill.execute_notebook(runs.ROOT / "notebooks" / f"{stage}.ipynb", folder / f"{stage}.ipynb",
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


@pytest.mark.parametrize("stage", runs.RECIPE)
def test_every_cell_runs_in_lab(stage, lab, page):
    address, folder, root = lab
    page.goto(f"{address}/lab/tree/{stage}.ipynb?token=lab&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector(".jp-NotebookPanel-toolbar .jp-Toolbar-kernelName:not(:has-text('No Kernel'))", timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    until = time.monotonic() + 300
    while not (root / "lab" / stage / "run.json").is_file():
        assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']").count() == 0
        assert time.monotonic() < until, f"{stage} did not finish"
        time.sleep(0.5)
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

