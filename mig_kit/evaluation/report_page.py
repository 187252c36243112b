"""The page of a run: notebook 07 without its code, in one file that holds no script."""

from html import escape

import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

from mig_kit.common import write_atomically
from mig_kit.pipeline.runs import Run

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{margin:0 0 1rem}
table{border-collapse:collapse;margin:1rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid #8886;text-align:right}
th:first-child,td:first-child{text-align:left}
td{white-space:nowrap}
img{max-width:100%;background:#fff;border-radius:4px}
.output_html,.output_png{overflow-x:auto;background:
linear-gradient(to right,Canvas 30%,#0000) 0/3rem 100% no-repeat local,
linear-gradient(to left,Canvas 30%,#0000) 100%/3rem 100% no-repeat local,
linear-gradient(to right,#888a,#0000) 0/1rem 100% no-repeat,
linear-gradient(to left,#888a,#0000) 100%/1rem 100% no-repeat}
@media(max-width:46rem){img{max-width:36rem}}
small,.text_cell p{font-size:.9rem;opacity:.8}
"""


def write_page(run: Run) -> None:
    """Write report.html beside the executed notebook 07 of a run, unless it is there.

    The page has what the notebook's cells display, and the text directly above each.
    """
    folder = run.stage_folder("07_report")
    source, page = folder / "07_report.ipynb", folder / "report.html"
    if page.is_file() or not source.is_file():  # a notebook that was run by hand is elsewhere
        return
    notebook = nbformat.read(source, 4)
    notebook.cells = choose_cells(notebook.cells)
    exporter = HTMLExporter(template_name="basic", exclude_input=True, exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(notebook)
    html = ("<!doctype html>\n<html lang=en><meta charset=utf-8>"
            '<meta name=viewport content="width=device-width">\n'
            f"<title>mig-kit run {escape(run.id)}</title>\n<style>{STYLE}</style>\n"
            f"{body}</html>\n")
    write_atomically(page, lambda temporary: temporary.write_text(html, "utf-8"))


def choose_cells(cells: list[NotebookNode]) -> list[NotebookNode]:
    """The code cells that display something, and the text directly above each."""
    chosen, texts = [], []
    for cell in cells:
        if cell.cell_type == "markdown":
            texts = [cell]
            continue
        cell.outputs = [output for output in cell.outputs if output.output_type == "display_data"]
        chosen += [*texts, cell] if cell.outputs else []
        texts = []
    return chosen
