"""The notebooks in JupyterLab, in headless Chromium: every cell run."""

import shutil
import sys
import time

import papermill
import pytest
from local_server import running_server

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import run_folders
from mig_kit.pipeline.plan import choose_params
from mig_kit.pipeline.run_folders import RECIPE

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [pytest.mark.nightly,
              pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
ERRORS = ".jp-OutputArea-output:has-text('Traceback (most recent call last)')"
KERNEL_NAME = ".jp-NotebookPanel-toolbar .jp-Toolbar-kernelName:not(:has-text('No Kernel'))"
IDLE = ".jp-Notebook-ExecutionIndicator[data-status='idle']"


def prepare(stage, run_id, path, **changes):
    """Write a notebook with smoke parameters and these put in, nothing run yet."""
    papermill.execute_notebook(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb", path,
                               choose_params(stage, "smoke", run_id, changes), prepare_only=True)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(address, folder, folder of runs): JupyterLab over the notebooks with smoke parameters."""
    folder, root = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("runs")
    for stage in run_folders.STAGES:
        prepare(stage, "lab", folder / f"{stage}.ipynb")
    (folder / "tiny_base").symlink_to(PROJECT_ROOT / "notebooks" / "tiny_base")  # for 90
    words = ("-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.port_retries=0",
             "--IdentityProvider.token=lab", f"--ServerApp.root_dir={folder}", "--LabApp.news_url=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIG_KIT_RUNS", str(root))
        with running_server(sys.executable, *words, "--port") as url:
            yield url.removesuffix("/v1"), folder, root


@pytest.fixture(scope="module")
def page():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_page(viewport={"width": 1200, "height": 1400})
        browser.close()


def show(page, address, name):
    page.goto(f"{address}/lab/tree/{name}.ipynb?token=lab&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=60_000)
    page.wait_for_selector(KERNEL_NAME, timeout=60_000)


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def choose_command(page, menu, command):
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.locator(f".lm-Menu-item[data-command='{command}']").click()


def wait_until(is_finished, page, max_errors=0):
    until = time.monotonic() + 300
    while not is_finished():
        assert page.locator(ERRORS).count() <= max_errors
        assert time.monotonic() < until, "not finished in five minutes"
        time.sleep(0.2)


def save_and_read(page, path):
    before = path.stat().st_mtime_ns
    choose_command(page, "File", "docmanager:save")
    until = time.monotonic() + 60
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < until, "the notebook was not saved"
        time.sleep(0.2)
    saved = papermill.iorw.load_notebook_node(str(path))
    return [output for cell in saved.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize("stage", run_folders.STAGES)
def test_every_cell_runs_in_lab(stage, lab, page):
    address, folder, root = lab
    show(page, address, stage)
    run_all(page)
    wait_until((root / "lab" / stage / "run.json").is_file, page)
    time.sleep(1.5)
    path = folder / f"{stage}.ipynb"
    outputs = save_and_read(page, path)
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures, f"{stage} shows no picture"
    choose_command(page, "Kernel", "kernelmenu:shutdown")
    time.sleep(1)


def test_an_interrupt_in_lab_loses_nothing(lab, page):
    address, folder, root = lab
    expected, interrupted = (root / run_id / "06_evaluate" for run_id in ("lab", "again"))
    if not (expected / "run.json").is_file():
        pytest.skip("needs the notebooks before it")
    for stage in RECIPE[:6]:
        shutil.copytree(root / "lab" / stage, root / "again" / stage)
    prepare("06_evaluate", "again", folder / "again.ipynb")
    show(page, address, "again")
    run_all(page)
    drawn = "06_evaluate.unfinished/replies/base_mig_bench_drawn.jsonl"
    wait_until(lambda: list((root / "again").glob(drawn)), page)
    choose_command(page, "Kernel", "kernelmenu:interrupt")
    page.wait_for_selector(IDLE, timeout=60_000)
    assert not (interrupted / "run.json").is_file()
    names = sorted(path.name for path in (expected / "replies").glob("*.jsonl"))
    assert len(list((root / "again").glob("06_evaluate.unfinished/replies/*.jsonl"))) < len(names)
    run_all(page)
    wait_until((interrupted / "run.json").is_file, page, max_errors=1)
    for name in ("metrics.json", *(f"replies/{name}" for name in names)):
        assert (interrupted / name).read_bytes() == (expected / name).read_bytes(), name
