"""Pages of executed notebooks: the converter on a small one, and the pages that are committed."""

import base64
import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mig_kit.pipeline import lesson_pages, store
from mig_kit.pipeline.lesson_pages import LESSONS, page_hash, render_page, source_hash


def picture_output(colour, size=(1000, 500)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode(),
                                       "text/plain": "<Figure>"})


def text_output(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def small_notebook(is_executed=True):
    cells = [
        new_markdown_cell("# 05 RL\n\nBack: [04](04_rejection_sampling.ipynb)."),
        new_code_cell("# parameters\nseed: int = 0  # of all", metadata={"tags": ["parameters"]}),
        new_code_cell("print('hello')"),
        new_markdown_cell("## Eight rollouts\n\nWith $\\{x\\}$."),
        new_code_cell("draw()", metadata={"tags": ["cover"]}),
        new_code_cell("secret = 1", metadata={"tags": ["hide-input"]})]
    if is_executed:
        cells[2].outputs = [text_output("a Warning", "stderr"), text_output("half\rin /srv/a\n"),
                            picture_output("red")]
        cells[4].outputs = [picture_output("blue"), picture_output("blue")]  # shown twice
        cells[5].outputs = [new_output("execute_result", {"text/plain": "'shown'"})]
        cells.insert(2, new_code_cell("# Parameters\nseed = 0",
                                      metadata={"tags": ["injected-parameters"]}))
    return new_notebook(cells=cells)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two stages; run 'mine' has executed the notebook of 05. Its folder."""
    notebooks, run = tmp_path / "notebooks", tmp_path / "runs" / "mine" / "05_grpo"
    notebooks.mkdir()
    run.mkdir(parents=True)
    for stage in ("05_grpo", "06_evaluate"):
        nbformat.write(small_notebook(is_executed=False), notebooks / f"{stage}.ipynb")
    nbformat.write(small_notebook(), run / "05_grpo.ipynb")
    record = {"params": {"seed": 0}, "started": "2030-01-02T03:04:05Z", "seconds": 90.0,
              "machine": "a machine"}
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(lesson_pages, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(lesson_pages.store, "STAGES", {"05_grpo": (), "06_evaluate": ()})
    return tmp_path


def test_a_page_has_what_a_reader_needs_and_its_pictures_beside_it():
    page, pictures = render_page(small_notebook(), "05")
    assert page.startswith("# 05 RL\n\nBack: [04](04.md).")
    parameters, rest = page.split("</details>")
    assert "<summary>Parameters</summary>" in parameters and "seed: int = 0  # of all" in parameters
    assert "```python\nprint('hello')\n```" in rest and "'shown'" in rest
    assert "```text\nin /srv/a\n```\n\n![05 RL](05_1.png)" in rest, "a bar's end, then the picture"
    assert "With $`\\{x\\}`$." in rest and "![Eight rollouts](05_2.png)" in rest
    for absent in ("Warning", "secret", "half", "Figure", "# Parameters"):
        assert absent not in page, absent
    opened = {name: Image.open(io.BytesIO(data)) for name, data in pictures.items()}
    assert {name: picture.size for name, picture in opened.items()} == {
        "05_1.png": (900, 450), "05_2.png": (900, 450), "05_cover.png": (640, 320)}
    cover = opened["05_cover.png"].convert("RGB")
    assert cover.getpixel((5, 5)) == (0, 0, 255), "the cell that is tagged, not the first"


def test_pages_of_a_run_are_of_its_notebook_and_outlive_it(project):
    folder, run = project / "lessons", project / "runs" / "mine"
    folder.mkdir()
    (folder / "05_7.png").write_bytes(b"")
    (folder / "mine.txt").write_text("no page")
    none = "no outputs: no run has it"
    assert lesson_pages.write_lessons(["none", "mine"], folder) == {
        "05_grpo": "run 'mine'", "06_evaluate": none}
    assert {path.name for path in folder.iterdir()} == {
        "05.md", "05_1.png", "05_2.png", "05_cover.png", "06.md", "mine.txt"}
    assert page_hash(folder / "05.md") == source_hash(small_notebook())
    page = (folder / "05.md").read_text()
    assert "# 05 RL\n\n<sub>[notebooks/05_grpo.ipynb](../../05_grpo.ipynb). Executed in run" in page
    assert "on 2030-01-02 in 1.5 minutes (a machine)." in page
    assert "No executed copy" in (folder / "06.md").read_text()
    (run / "05_grpo").rename(run / "06_evaluate")
    (run / "06_evaluate" / "05_grpo.ipynb").rename(run / "06_evaluate" / "06_evaluate.ipynb")
    Image.new("RGB", (1000, 500)).save(run / "06_evaluate" / "question.png")
    (run / "07_report").symlink_to(run / "06_evaluate")
    assert lesson_pages.write_lessons(["mine"], folder) == {
        "05_grpo": "its page as it was: no run has it", "06_evaluate": "run 'mine'"}
    assert (folder / "05.md").read_text() == page
    assert Image.open(folder / "question.png").size == (900, 450)
    with pytest.MonkeyPatch.context() as patch:  # as the command line names the guide's own folder
        patch.setattr(lesson_pages, "LESSONS", folder)
        patch.chdir(folder.parent)
        lesson_pages.write_lessons(["mine"], Path(folder.name))
    assert (folder.parent / "question.png").is_file()
    notebook = small_notebook(is_executed=False)
    for cell, origin in ((0, "its page as it was: no run has it"), (2, none)):
        notebook.cells[cell].source += " # why"  # words do not count, code does
        nbformat.write(notebook, project / "notebooks" / "05_grpo.ipynb")
        assert lesson_pages.write_lessons(["mine"], folder)["05_grpo"] == origin


def test_what_no_page_is_made_of(project):
    folder, run = project / "lessons", project / "runs" / "mine" / "05_grpo" / "05_grpo.ipynb"
    with pytest.raises(FileNotFoundError, match="no finished stage in other"):
        lesson_pages.write_lessons(["other"], folder)
    notebook = small_notebook()
    notebook.cells[3].source += "  # changed"
    nbformat.write(notebook, run)
    with pytest.raises(ValueError, match="mig-kit run 05 --run-id mine"):
        lesson_pages.write_lessons(["mine"], folder)
    assert not folder.exists()


def show(**data):
    return lesson_pages.output_text(new_output(
        "execute_result", {kind.replace("_", "/"): text for kind, text in data.items()}))


HTML = ("<div><style>th {}</style><table><thead><tr><th></th><th>a|b</th><th>n</th></tr></thead>"
        "<tr><th>0</th><td>&lt;think&gt; $x_1$</td><td>1.5</td></tr></table></div>")


@pytest.mark.parametrize(("output", "expected"), [
    (text_output("filter: 100%|====| 9/9 [00:01<00:00]\nkept\n"), "kept"),
    (text_output("step 24/484: loss 0.5; 7.9 min left\nloss 0.5"), "loss 0.5"),
    (text_output("\x1b[31mred\x1b[0m"), "red"),
    (text_output("a\nlib/save.py:3: UserWarning: no file\n  warnings.warn(\nb\n"), "a\nb"),
    (text_output("/home/a/runs/x/report.html, /tmp/q/z.json and/or 1/2"),
     "…/report.html, …/z.json and/or 1/2"),
    (text_output("see https://example.org/home/x"), "see https://example.org/home/x"),
    (text_output("05_grpo of run 'a': seed=0, beta=0\nend"), "05_grpo of run 'a'\nend"),
    (text_output("x" * 700), "x" * 600),
    (text_output("\n".join(map(str, range(100)))),
     "\n".join(map(str, range(40))) + "\n… (60 more lines)")])
def test_text_has_no_progress_warnings_or_folders_of_the_machine(output, expected):
    assert lesson_pages.output_text(output) == f"```text\n{expected}\n```"


def test_other_outputs_are_tables_or_text_that_says_something():
    assert show(text_html=HTML) == (
        "| a\\|b | n |\n| --- | --- |\n| &lt;think&gt; \\$x\\_1\\$ | 1.5 |")
    named = HTML.replace("<th>0</th>", "<th>SFT</th>")
    assert show(text_html=named).startswith("|  | a\\|b | n |\n| --- | --- | --- |\n| SFT |")
    rows = "".join(f"<tr><td>r{number}</td></tr>" for number in range(25))
    table = show(text_html=f"<table><tr><th>name</th></tr>{rows}</table>")
    assert table.count("\n| r") == 20 and table.endswith("The first 20 of 25 rows.")
    spread = show(text_html="<table><tr><th colspan=2>a</th></tr><tr><td>1</td></tr></table>")
    assert spread == "| a | a |\n| --- | --- |\n| 1 |  |"
    for nothing in (HTML.replace("<div>", "<div><progress value=1></progress>"), "<p>no table</p>",
                    "<table><tr><th></th></tr></table>", "<table></table>",
                    "<table><tr></tr></table>"):
        assert show(text_html=nothing) == ""
    for nothing in ("<Figure size 620x240 with 2 Axes>", "[<matplotlib.lines.Line2D at 0x7f>]",
                    "Text(0.5, 1.0, 'a')"):
        assert show(text_plain=nothing) == ""
    assert show(text_plain="a ```` b") == "`````text\na ```` b\n`````", "a longer fence"


def test_links_and_formulas_survive_markdown():
    assert lesson_pages.page_links(
        "[a](06_evaluate.ipynb#x) ![c](guide/speedup.png) [d](../README.md#e) [g](#below)") == (
        "[a](06.md#x) ![c](../speedup.png) [d](../../../README.md#e) [g](#below)")
    web = lesson_pages.web_formulas
    assert web("the sum $a + b$ costs 5 $ or 6 $") == "the sum $a + b$ costs 5 $ or 6 $"
    assert web(r"$\{a\}$ and $x_i y_i$") == r"$`\{a\}`$ and $`x_i y_i`$"
    assert web("a\n\n$$b$$\n\n$$\nc\n$$") == "a\n\n```math\nb\n```\n\n```math\nc\n```"
    assert web("```bash\necho $a_ $b_\n```") == "```bash\necho $a_ $b_\n```"


@pytest.mark.skipif(not LESSONS.is_dir(), reason="mig-kit lessons has made no pages yet")
class TestCommittedPages:
    @pytest.mark.parametrize("stage", store.STAGES)
    def test_a_stranger_can_read_them_and_they_are_of_the_present_notebooks(self, stage):
        page = (LESSONS / f"{stage[:2]}.md").read_text()
        assert page_hash(LESSONS / f"{stage[:2]}.md") == source_hash(
            lesson_pages._read_notebook(stage)), "of another version; run: mig-kit lessons RUN"
        assert not re.search(r"\w*Warning\b:|Traceback|\x1b", page)
        outputs = re.sub(r"(?ms)^```python.*?^```$", "", page)
        assert not re.search(r"!\[[^\]]*(?:style=|\w+\(\w+=)", outputs), "code as a picture's text"
        assert not re.search(r"(?<![\w./~-])/(?:home|root|tmp|usr|work|opt)/", outputs)
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", outputs):
            assert (LESSONS / link).exists(), link

    def test_pictures_are_few_and_used(self):
        pages = "".join(page.read_text() for page in LESSONS.glob("*.md"))
        index = (LESSONS.parents[1] / "README.md").read_text()
        for picture in LESSONS.glob("*.png"):
            assert Image.open(picture).width <= 900
            assert f"({picture.name})" in pages or picture.name in index, picture.name
        assert sum(path.stat().st_size for path in LESSONS.iterdir()) <= 6 * 2**20
