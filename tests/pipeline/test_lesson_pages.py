"""Pages of executed notebooks: the converter on a small one, and the pages that are committed."""

import base64
import io
import json
import re
import shutil

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from mig_kit.pipeline import lesson_pages, store
from mig_kit.pipeline.lesson_pages import (
    LESSONS,
    alternative_text,
    clean_text,
    fence,
    html_tables,
    markdown_table,
    output_text,
    page_hash,
    page_links,
    render_page,
    shrink_picture,
    source_hash,
    text_block,
    web_formulas,
)


def picture_output(colour, size=(1000, 500)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return new_output("display_data", {"image/png": base64.b64encode(buffer.getvalue()).decode(),
                                       "text/plain": "<Figure>"})


def small_notebook(is_executed=True):
    cells = [
        new_markdown_cell("# 05 RL\n\nBack: [04](04_rejection_sampling.ipynb)."),
        new_code_cell("# parameters\nrun_id: str = 'default'\nseed: int = 0  # of all",
                      metadata={"tags": ["parameters"]}),
        new_code_cell("print('hello')"),
        new_markdown_cell("## Eight rollouts\n\nWith $\\{x\\}$."),
        new_code_cell("draw()", metadata={"tags": ["cover"]}),
        new_code_cell("secret = 1", metadata={"tags": ["hide-input"]})]
    if is_executed:
        injected = new_code_cell("# Parameters\nrun_id = 'mine'\nseed = 0",
                                 metadata={"tags": ["injected-parameters"]})
        cells[2].outputs = [new_output("stream", name="stderr", text="a Warning"),
                            new_output("stream", name="stdout", text="in /srv/kit/runs/mine/a\n"),
                            picture_output("red")]
        cells[4].outputs = [picture_output("blue"), picture_output("blue")]  # shown twice
        cells[5].outputs = [new_output("execute_result", {"text/plain": "'shown'"})]
        cells.insert(2, injected)
    notebook = new_notebook(cells=cells)
    notebook.metadata["papermill"] = {"input_path": "/srv/kit/notebooks/05_grpo.ipynb",
                                      "output_path": "/srv/kit/runs/mine/05_grpo/05_grpo.ipynb"}
    return notebook


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one stage, whose notebook run 'mine' has executed. Returns its folder."""
    notebooks, run = tmp_path / "notebooks", tmp_path / "runs" / "mine" / "05_grpo"
    notebooks.mkdir()
    run.mkdir(parents=True)
    nbformat.write(small_notebook(is_executed=False), notebooks / "05_grpo.ipynb")
    nbformat.write(small_notebook(), run / "05_grpo.ipynb")
    record = {"params": {"seed": 0}, "started": "2030-01-02T03:04:05Z", "seconds": 90.0,
              "machine": "a machine"}
    (run / "run.json").write_text(json.dumps(record))
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(lesson_pages, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(lesson_pages.store, "STAGES", {"05_grpo": ()})
    return tmp_path


def test_a_page_has_what_a_reader_needs(tmp_path):
    page = render_page(small_notebook(), "05", tmp_path, {"beta": 0.1})
    assert page.startswith("# 05 RL\n\nBack: [04](04.md).")
    parameters, rest = page.split("</details>")
    assert "<summary>Parameters</summary>" in parameters and "seed: int = 0  # of all" in parameters
    assert "This run sets:\n\n```python\nbeta = 0.1\n```" in parameters
    assert "```python\nprint('hello')\n```" in rest
    assert "```text\nin runs/mine/a\n```\n\n![05 RL](05_1.png)" in rest
    assert "With $`\\{x\\}`$." in rest and "![Eight rollouts](05_2.png)" in rest
    assert "'shown'" in rest
    for absent in ("Warning", "secret", "/srv", "Figure", "# Parameters"):
        assert absent not in page, absent


def test_pictures_lie_beside_the_page(tmp_path):
    render_page(small_notebook(), "05", tmp_path)
    sizes = {path.name: Image.open(path).size for path in tmp_path.iterdir()}
    assert sizes == {"05_1.png": (900, 450), "05_2.png": (900, 450), "05_cover.png": (640, 320)}
    cover = Image.open(tmp_path / "05_cover.png").convert("RGB")
    assert cover.getpixel((5, 5)) == (0, 0, 255), "the cell that is tagged, not the first"


def test_links_lead_to_pages_and_files():
    assert page_links("[a](06_evaluate.ipynb#x) [b](guide/results.md)") == (
        "[a](06.md#x) [b](../results.md)")
    assert page_links("![c](guide/speedup.png) [d](../README.md#e) [g](guide/lessons/01.md)") == (
        "![c](../speedup.png) [d](../../../README.md#e) [g](01.md)")
    kept = "[e](https://example.org/a.ipynb) [f](#below)"
    assert page_links(kept) == kept


def test_a_hash_is_of_the_code_that_a_person_wrote():
    notebook = small_notebook(is_executed=False)
    notebook.cells[0].source += " Other words."
    assert source_hash(notebook) == source_hash(small_notebook())
    notebook.cells[2].source += "  # changed"
    assert source_hash(notebook) != source_hash(small_notebook())


def test_pages_of_a_run(project):
    folder = project / "lessons"
    folder.mkdir()
    (folder / "04_1.png").write_bytes(b"")
    (folder / "mine.txt").write_text("no page")
    assert lesson_pages.write_lessons(["none", "mine"], folder) == {"05_grpo": "run 'mine'"}
    assert {path.name for path in folder.iterdir()} == {"05.md", "05_1.png", "05_2.png",
                                                        "05_cover.png", "mine.txt"}
    page = (folder / "05.md").read_text()
    assert page_hash(folder / "05.md") == source_hash(small_notebook())
    assert "# 05 RL\n\n<sub>[notebooks/05_grpo.ipynb](../../05_grpo.ipynb). Executed in" in page
    assert "run `mine`, a changed profile, on 2030-01-02 in 1.5 minutes (a machine)." in page


def test_a_notebook_that_nobody_ran_is_shown_without_outputs(project):
    (project / "runs" / "mine" / "06_evaluate").mkdir()
    lesson_pages.store.STAGES["06_evaluate"] = ()
    notebook = new_notebook(cells=[new_markdown_cell("# 06 Evaluate"), new_code_cell("score()")])
    nbformat.write(notebook, project / "notebooks" / "06_evaluate.ipynb")
    origins = lesson_pages.write_lessons(["mine"], project / "lessons")
    assert origins["06_evaluate"] == "no outputs: no run has it"
    page = (project / "lessons" / "06.md").read_text()
    assert "No executed copy" in page and "`mig-kit run 06`" in page and "score()" in page


def test_a_page_of_the_present_notebook_outlives_its_run(project):
    folder = project / "lessons"
    lesson_pages.write_lessons(["mine"], folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (project / "runs" / "mine").rename(project / "runs" / "gone")
    other = project / "runs" / "mine" / "06_evaluate"
    other.mkdir(parents=True)
    lesson_pages.store.STAGES["06_evaluate"] = ()
    for path in (project / "notebooks", other):
        nbformat.write(small_notebook(path == other), path / "06_evaluate.ipynb")
    shutil.copy(project / "runs" / "gone" / "05_grpo" / "run.json", other)
    origins = lesson_pages.write_lessons(["mine"], folder)
    assert origins == {"05_grpo": "its page as it was: no run has it",
                       "06_evaluate": "run 'mine'"}
    assert {name: (folder / name).read_bytes() for name in files} == files
    notebook = small_notebook(is_executed=False)
    notebook.cells[2].source += "  # changed"
    nbformat.write(notebook, project / "notebooks" / "05_grpo.ipynb")
    assert lesson_pages.write_lessons(["mine"], folder)["05_grpo"].startswith("no outputs")


def test_what_no_page_is_made_of(project, monkeypatch):
    folder, run = project / "lessons", project / "runs" / "mine" / "05_grpo" / "05_grpo.ipynb"
    with pytest.raises(FileNotFoundError, match="no finished stage in other"):
        lesson_pages.write_lessons(["other"], folder)
    monkeypatch.setattr(lesson_pages, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="fewer or smaller pictures"):
        lesson_pages.write_lessons(["mine"], folder)
    notebook = small_notebook()
    notebook.cells[3].outputs.append(new_output("error", ename="E", evalue="", traceback=[]))
    nbformat.write(notebook, run)
    with pytest.raises(ValueError, match="holds an error"):
        lesson_pages.write_lessons(["mine"], folder)
    notebook.cells[3].source += "  # changed"
    nbformat.write(notebook, run)
    with pytest.raises(ValueError, match="mig-kit run 05 --run-id mine"):
        lesson_pages.write_lessons(["mine"], folder)
    assert not folder.exists()


def test_the_picture_of_a_question(project):
    target = project / "question.png"
    assert not lesson_pages.copy_question(["mine"], target)
    report = project / "runs" / "mine" / "07_report"
    report.mkdir()
    Image.new("RGB", (1000, 500)).save(report / "question.png")
    assert lesson_pages.copy_question(["none", "mine"], target)
    assert Image.open(target).size == (900, 450)


def picture_bytes(size, colour="red"):
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(("text", "expected"), [
    ("kept\n", "kept"), ("filter: 100%|====| 9/9 [00:01<00:00]\n", ""),
    ("step 24/484: loss 0.5; 7.9 min left\nloss 0.5", "loss 0.5"), ("\x1b[31mred\x1b[0m", "red"),
    ("a\nlib/peft/save.py:313: UserWarning: no file\n  warnings.warn(\nb\n", "a\nb")])
def test_progress_warnings_and_control_codes_are_left_out(text, expected):
    assert clean_text(text, {}) == expected


def test_a_bar_that_is_printed_over_itself_shows_its_end(tmp_path):
    notebook = new_notebook(cells=[new_markdown_cell("# 05"), new_code_cell("run()")])
    notebook.cells[1].outputs = [
        new_output("stream", name="stdout", text=text) for text in ("half\rdone\n", "next\n")]
    assert render_page(notebook, "05", tmp_path).endswith("```text\ndone\nnext\n```\n")


def test_folders_of_the_machine_are_left_out():
    folders = {"/home/a/kit/": "", "/home/a/kit/runs/": "runs/"}
    text = "report: /home/a/kit/runs/x/report.html, /home/a/kit/params, /tmp/q/z.json and/or 1/2"
    assert clean_text(text, folders) == "report: runs/x/report.html, params, …/z.json and/or 1/2"
    assert clean_text("see https://example.org/home/x", {}) == "see https://example.org/home/x"
    assert clean_text("05_grpo of run 'a': seed=0, dtype=auto\nversions", {}) == (
        "05_grpo of run 'a'\nversions")


def test_a_fence_is_longer_than_what_it_holds():
    assert fence("a ```` b") == "`````text\na ```` b\n`````"
    assert text_block("<script>\n</details>") == "```text\n<script>\n</details>\n```"


def test_long_text_is_folded_and_cut():
    assert "<details>" not in text_block("\n".join("abc" for _ in range(16)))
    folded = text_block("\n".join("abc" for _ in range(17)))
    assert folded.startswith("<details><summary>17 lines</summary>\n\n```text\nabc")
    cut = text_block("\n".join(str(number) for number in range(100)))
    assert "\n59\n… (40 more lines)\n" in cut and "\n60\n" not in cut
    assert text_block("x" * 700).removeprefix("```text").count("x") == 600


def test_a_data_frame_becomes_a_table():
    html = ("<div><style>th {}</style><table><thead><tr><th></th><th>a|b</th><th>n</th>"
            "</tr></thead><tr><th>0</th><td>&lt;think&gt; $x_1$</td><td>1.5</td></tr></table>"
            "</div>")
    assert html_tables(html, {}) == (
        "| a\\|b | n |\n| --- | ---: |\n| &lt;think&gt; \\$x\\_1\\$ | 1.5 |")
    named = html.replace("<th>0</th>", "<th>SFT</th>")
    assert html_tables(named, {}).startswith("|  | a\\|b | n |\n| --- | --- | ---: |\n| SFT |")
    assert html_tables(html.replace("<div>", "<div><progress value=1></progress>"), {}) == ""
    assert html_tables("<p>no table</p>", {}) == ""
    assert html_tables("<table><tr><th></th></tr></table>", {}) == "", "an empty data frame"
    table = markdown_table([["name"], *([f"r{number}"] for number in range(25))])
    assert table.count("\n| r") == 20 and table.endswith("The first 20 of 25 rows.")


def test_representations_of_objects_are_no_output():
    def result(text):
        return output_text(new_output("execute_result", {"text/plain": text}), {})

    assert result("<Figure size 620x240 with 2 Axes>") == ""
    assert result("[<matplotlib.lines.Line2D at 0x7f>]") == ""
    assert result("Text(0.5, 1.0, 'a')") == ""
    assert result("0.75") == "```text\n0.75\n```"
    view = "application/vnd.jupyter.widget-view+json"
    widget = new_output("display_data", {view: {}, "text/plain": "VBox()"})
    assert output_text(widget, {}) == ""


def test_pictures_become_small():
    small = Image.open(io.BytesIO(shrink_picture(picture_bytes((1800, 600)))))
    assert small.size == (900, 300) and small.mode == "P"
    clear = Image.open(io.BytesIO(shrink_picture(picture_bytes((10, 10), (0, 0, 0, 0)))))
    assert clear.size == (10, 10) and clear.convert("RGB").getpixel((5, 5)) == (255, 255, 255)
    output = new_output("display_data", {"text/plain": "<PIL.Image.Image image>"})
    assert alternative_text(output, "Eight [rollouts]") == "Eight rollouts"
    output.data["text/plain"] = "Five boxes"
    assert alternative_text(output, "Eight rollouts") == "Five boxes"


def test_formulas_survive_markdown():
    assert web_formulas("the sum $a + b$ costs 5 $ or 6 $") == "the sum $a + b$ costs 5 $ or 6 $"
    assert web_formulas(r"$\{a\}$ and $x_i y_i$") == r"$`\{a\}`$ and $`x_i y_i`$"
    assert web_formulas("$$\n\\frac{a}{b}\n$$") == "```math\n\\frac{a}{b}\n```"
    two = web_formulas("a\n\n$$b$$\n\n$$c$$\n\nd")
    assert two == "a\n\n```math\nb\n```\n\n```math\nc\n```\n\nd", "blank lines stay"
    assert web_formulas("```bash\necho $a_ $b_\n```") == "```bash\necho $a_ $b_\n```"


@pytest.mark.skipif(not LESSONS.is_dir(), reason="mig-kit lessons has made no pages yet")
class TestCommittedPages:
    @pytest.mark.parametrize("stage", store.STAGES)
    def test_they_are_of_the_present_notebooks(self, stage):
        assert page_hash(LESSONS / f"{stage[:2]}.md") == source_hash(
            lesson_pages._read_notebook(stage)), (
            f"the page of {stage} is of another version; run: mig-kit lessons RUN")

    @pytest.mark.parametrize("stage", store.STAGES)
    def test_a_stranger_can_read_them(self, stage):
        page = (LESSONS / f"{stage[:2]}.md").read_text()
        assert not re.search(r"\w*Warning\b:|Traceback|\x1b", page)
        outputs = re.sub(r"(?ms)^```python.*?^```$", "", page)
        assert not re.search(r"!\[[^\]]*(?:style=|\w+\(\w+=)", outputs), "code as a picture's text"
        assert not re.search(r"(?<![\w./~-])/(?:home|root|tmp|usr|work|opt)/", outputs)
        for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
            assert table.count("\n") <= 22
        for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", outputs):
            assert (LESSONS / link).exists(), link

    def test_pictures_are_few_and_used(self):
        pages = "".join(page.read_text() for page in LESSONS.glob("*.md"))
        index = (LESSONS.parents[1] / "README.md").read_text()
        for picture in LESSONS.glob("*.png"):
            assert Image.open(picture).width <= 900
            assert f"({picture.name})" in pages or picture.name in index, picture.name
        assert sum(path.stat().st_size for path in LESSONS.iterdir()) <= lesson_pages.MAX_BYTES
