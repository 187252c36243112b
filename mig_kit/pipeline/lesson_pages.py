"""Executed notebooks as pages that can be read in a repository's web view: `mig-kit lessons`.

A page is made by nbconvert's markdown exporter. Put before it, `_prepare_cells` folds the
parameters, keeps of the outputs what a reader needs (text, tables, pictures; no progress, warnings,
objects or folders of the machine), and turns links between notebooks into links between pages.
"""

import base64
import hashlib
import io
import json
import posixpath
import re
import shutil
from html import escape
from pathlib import Path, PurePath

import nbformat
from bs4 import BeautifulSoup
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell
from PIL import Image

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline import store
from mig_kit.pipeline.params import list_profiles, profile_params
from mig_kit.pipeline.run_facts import changed_params
from mig_kit.pipeline.run_folders import format_run_command

LESSONS = NOTEBOOKS / "guide" / "lessons"
PLACE = "notebooks/guide/lessons"  # of the pages, whose links are relative to it
MAX_BYTES = 6 * 2**20  # of all pages with their pictures
MAX_WIDTH, COVER_WIDTH = 900, 640  # of a picture, pixels
MAX_ROWS = 20  # of a table
FOLD_LINES, MAX_LINES = 16, 60  # of text: folded beyond the first, cut at the second
MAX_CHARACTERS = 600  # of a line
INJECTED, PARAMETERS, COVER, HIDE_INPUT = (
    "injected-parameters", "parameters", "cover", "hide-input")
LINK = re.compile(r"(\]\(|\bsrc=\")(?![a-z]+:|#|/)([^)\s\"]+)")
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PROGRESS = re.compile(r"^.*(?:\d+%\|.*\|.*|\b[\d.]+ (?:s|min|h) left)$\n?", re.MULTILINE)
WARNING = re.compile(r"^\S+\.py:\d+: \w*Warning: .*\n(?:  .*\n)*", re.MULTILINE)
STAGE_LINE = re.compile(r"^(\d\d_\w+ of run '[^']*'): .*$", re.MULTILINE)
OBJECT = re.compile(r"^[\[(]?<.*>[,\])]*$|^(?:Text|Axes)\(", re.DOTALL)
MACHINE_PATH = re.compile(
    r"(?<![\w./~-])/(?:home|root|tmp|usr|opt|var|mnt|work|content|kaggle|Users)/[^\s'\"`),;:|]+")
MARKDOWN_CHARACTERS = re.compile(r"([\\`*_{}\[\]|$~#])")
UNSAFE_IN_FORMULA = re.compile(r"\\[^A-Za-z]|\*|_.*_")



def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the code cells that a person wrote, without outputs and injected parameters."""
    cells = [cell.source.rstrip() for cell in notebook.cells
             if cell.cell_type == "code" and INJECTED not in cell.metadata.get("tags", ())]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def page_hash(page: Path) -> str:
    """The hash that a page carries of the notebook that it was made from; "" if it has none."""
    match = re.search(r"^<!-- source ([0-9a-f]{64}) -->$", page.read_text(), re.MULTILINE)
    return match[1] if match else ""


def write_lessons(run_ids: list[str], folder: Path = LESSONS) -> dict[str, str]:
    """Write a page NN.md per stage, its pictures beside it, and drop older pages.

    Each notebook is taken from the first of the runs that has finished it. One that none has keeps
    its page if that is of the present notebook, else it gets a page without outputs. Returns by
    stage what its page is of. ValueError for a copy of another version of the notebook or one with
    an error, and for pages that take more than MAX_BYTES; FileNotFoundError for runs that have no
    finished stage. The old pages then stay.
    """
    copies = {stage: _find_copy(stage, run_ids) for stage in store.STAGES}
    if not any(copies.values()):
        raise FileNotFoundError(f"no finished stage in {', '.join(run_ids)}; name a run that "
                                "`mig-kit status` lists")
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    origins = {}
    for stage, run_id in copies.items():
        page = f"{stage[:2]}.md"
        hash_now = source_hash(_read_notebook(stage))
        if not run_id and (folder / page).is_file() and page_hash(folder / page) == hash_now:
            for path in (folder / page, *folder.glob(f"{stage[:2]}_*.png")):
                shutil.copy2(path, temporary)
            origins[stage] = "its page as it was: no run has it"
            continue
        (temporary / page).write_text(_make_page(stage, run_id, temporary))
        origins[stage] = f"run '{run_id}'" if run_id else "no outputs: no run has it"
    size = sum(path.stat().st_size for path in temporary.iterdir())
    if size > MAX_BYTES:
        raise ValueError(f"the pages would take {size / 2**20:.1f} MB, {MAX_BYTES / 2**20:.0f} are "
                         "allowed; show fewer or smaller pictures in the notebooks")
    folder.mkdir(exist_ok=True)
    for path in [*folder.glob("[0-9][0-9].md"), *folder.glob("[0-9][0-9]_*.png")]:
        path.unlink()
    for path in temporary.iterdir():
        path.rename(folder / path.name)
    temporary.rmdir()
    return origins


def copy_question(run_ids: list[str], path: Path) -> bool:
    """Write the picture that 07 made of one question, SFT's reply and GRPO's; whether a run has it.
    """
    for run_id in run_ids:
        picture = store.stage_folder("07_report", run_id) / "question.png"
        if picture.is_file():
            path.write_bytes(shrink_picture(picture.read_bytes()))
            return True
    return False


def _read_notebook(stage: str) -> NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4)


def _find_copy(stage: str, run_ids: list[str]) -> str:
    """The first of the runs that has finished the stage as a notebook; "" if none has."""
    for run_id in run_ids:
        has_notebook = (store.stage_folder(stage, run_id) / f"{stage}.ipynb").is_file()
        if has_notebook and store.load_record(stage, run_id):
            return run_id
    return ""


def _make_page(stage: str, run_id: str, folder: Path) -> str:
    notebook = _read_notebook(stage)
    header = ("No executed copy: the cells without their outputs. To run them: "
              f"`mig-kit run {stage[:2]}`.")
    expected, changes = source_hash(notebook), {}
    if run_id:
        notebook = nbformat.read(store.stage_folder(stage, run_id) / f"{stage}.ipynb", as_version=4)
        if source_hash(notebook) != expected:
            raise ValueError(f"{stage} of run '{run_id}' is of another version of the notebook; "
                             f"run: {format_run_command(stage, run_id)}")
        header = _describe_run(stage, run_id)
        changes = changed_params(run_id, [stage]).get(stage, {})
    if any(output.output_type == "error" for cell in notebook.cells
           for output in cell.get("outputs", ())):
        raise ValueError(f"{stage} of run '{run_id}' holds an error; run it again")
    nbformat.validator.normalize(notebook)
    title, rest = render_page(notebook, stage[:2], folder, changes).split("\n", 1)
    link = f"[notebooks/{stage}.ipynb](../../{stage}.ipynb)"
    return (f"<!-- made by mig-kit lessons; edit the notebook instead -->\n"
            f"<!-- source {expected} -->\n{title}\n\n"
            f"<sub>{link}. {header} [All lessons](../../README.md)</sub>\n{rest}")


def _describe_run(stage: str, run_id: str) -> str:
    record = store.load_record(stage, run_id)
    profile = _profile_of(stage, record["params"])
    caution = (" Smoke parameters show what the cells do in seconds; the numbers mean nothing."
               if profile == "smoke" else "")
    return (f"Executed in run `{run_id}`, {profile} profile, on {record['started'][:10]} in "
            f"{record['seconds'] / 60:.1f} minutes ({record['machine']}).{caution}")


def _profile_of(stage: str, params: dict) -> str:
    """The profile that these parameters of a stage are of; "a changed" if they are of none."""
    for profile in dict.fromkeys(["tiny", *list_profiles()]):
        expected = profile_params(stage, profile)
        if all(params.get(name) == value for name, value in expected.items()
               if name not in ("run_id", "profile", "groups")):
            return profile
    return "a changed"


def render_page(notebook: NotebookNode, number: str, folder: Path,
                changes: dict | None = None) -> str:
    """The notebook as markdown; its pictures go to the folder as NN_1.png, NN_2.png, ..., and one
    of them, the first of the cell tagged "cover" or else the first, smaller as NN_cover.png.

    changes: parameters of the run that are not at their defaults.
    """
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor(enabled=True)])
    exporter.register_preprocessor(
        lambda source, resources: (_prepare_cells(source, number, folder, changes or {}),
                                   resources), enabled=True)
    page, _ = exporter.from_notebook_node(notebook)
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _prepare_cells(notebook: NotebookNode, number: str, folder: Path,
                   changes: dict) -> NotebookNode:
    """The cells as the page has them: outputs as markdown, parameters folded, links set."""
    folders = _folders_of(notebook)
    heading, covers, cells, n_pictures = "", {}, [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = ["", heading, *re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)][-1]
            cells.append(new_markdown_cell(page_links(web_formulas(cell.source))))
        if cell.cell_type != "code" or _has_tag(cell, INJECTED):
            continue
        parts, last = [], None
        for output in cell.outputs:
            picture = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if not picture:
                parts.append(output_text(output, folders))
            elif picture != last:  # a figure may be displayed, and shown again at the cell's end
                n_pictures += 1
                name = f"{number}_{n_pictures}.png"
                (folder / name).write_bytes(shrink_picture(picture))
                parts.append(f"![{alternative_text(output, heading)}]({name})")
                covers.setdefault(_has_tag(cell, COVER), picture)
            last = picture
        if _has_tag(cell, PARAMETERS):
            parts = [fold("Parameters", _describe_parameters(cell.source, changes))]
        elif not _has_tag(cell, HIDE_INPUT) and cell.source.strip():
            cells.append(new_code_cell(cell.source))
        cells.append(new_markdown_cell("\n\n".join(filter(None, parts))))
    if covers:
        picture = covers.get(True) or covers[False]
        (folder / f"{number}_cover.png").write_bytes(shrink_picture(picture, COVER_WIDTH))
    notebook.cells = cells
    notebook.metadata.setdefault("language_info", {"name": "python"})  # of the code blocks
    return notebook


def _has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def _describe_parameters(source: str, changes: dict) -> str:
    lines = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    return fence(source, "python") + (f"\n\nThis run sets:\n\n{fence(lines, 'python')}"
                                      if lines else "")


def _folders_of(notebook: NotebookNode) -> dict[str, str]:
    """Folders of the machine that executed the notebook -> how a reader knows them."""
    executed = notebook.metadata.get("papermill", {})
    places = (("input_path", 1, ""), ("output_path", 2, "runs/"))
    return {f"{PurePath(executed[name]).parents[up]}/": shown for name, up, shown in places
            if executed.get(name)}


def page_links(markdown: str) -> str:
    """Links relative to notebooks/ as links relative to the pages; those to numbered notebooks go
    to their pages.
    """
    def resolve(match: re.Match) -> str:
        target, mark, anchor = match[2].partition("#")
        if re.fullmatch(r"\d\d_\w+\.ipynb", target):
            return f"{match[1]}{target[:2]}.md{mark}{anchor}"
        path = posixpath.relpath(posixpath.join("notebooks", target), PLACE)
        return f"{match[1]}{path}{mark}{anchor}"

    return LINK.sub(resolve, markdown)


def clean_text(text: str, folders: dict[str, str]) -> str:
    """The text as a reader elsewhere needs it: no control codes, no progress bars, no folders of
    the machine.

    folders: absolute prefixes -> what stands in their place; others are shortened to "…/name".
    """
    text = WARNING.sub("", PROGRESS.sub("", ANSI.sub("", text) + "\n"))
    for prefix in sorted(folders, key=len, reverse=True):
        text = text.replace(prefix, folders[prefix])
    text = MACHINE_PATH.sub(lambda match: "…/" + posixpath.basename(match[0].rstrip("/")), text)
    return STAGE_LINE.sub(r"\1", text).strip("\n")


def fence(text: str, language: str = "text") -> str:
    """A code block that ends where it should, whatever the text holds."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def fold(summary: str, content: str) -> str:
    """Content that shows when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>\n\n{content}\n\n</details>"


def text_block(text: str) -> str:
    """Text in a code block; "" for blank text."""
    if not text.strip():
        return ""
    lines = [line if len(line) <= MAX_CHARACTERS else line[:MAX_CHARACTERS] + " …"
             for line in text.split("\n")]
    more = [f"… ({len(lines) - MAX_LINES} more lines)"] if len(lines) > MAX_LINES else []
    block = fence("\n".join([*lines[:MAX_LINES], *more]))
    return fold(f"{len(lines)} lines", block) if len(lines) > FOLD_LINES else block


def html_tables(html: str, folders: dict[str, str]) -> str:
    """The tables of an HTML output as markdown, without their index if it only counts; "" if it
    holds none, or shows progress.
    """
    soup = BeautifulSoup(html, "html.parser")
    if soup.find("progress"):
        return ""
    tables = [[[clean_text(" ".join(cell.get_text().split()), folders)
                for cell in row.find_all(["th", "td"])
                for _ in range(int(cell.get("colspan", 1)))] for row in table.find_all("tr")]
              for table in soup.find_all("table")]
    return "\n\n".join(markdown_table(rows) for rows in tables if any(map(any, rows)))


def markdown_table(rows: list[list[str]]) -> str:
    """A table of texts, the first row its head; numbers stand right, rows beyond MAX_ROWS fall off.
    """
    width = max(map(len, rows))
    rows = [[*row, *[""] * (width - len(row))] for row in rows]
    if rows[0][0] == "" and [row[0] for row in rows[1:]] == [str(n) for n in range(len(rows) - 1)]:
        rows = [row[1:] for row in rows]
    head, body = rows[0], rows[1:]
    is_number = [all(re.fullmatch(r"[-+]?[\d.,]+%?|", row[k]) for row in body)
                 for k in range(len(head))]
    ruler = ["---:" if numeric else "---" for numeric in is_number]
    lines = ["| " + " | ".join(row) + " |"
             for row in ([escape_markdown(cell) for cell in head], ruler,
                         *([escape_markdown(cell) for cell in row] for row in body[:MAX_ROWS]))]
    if len(body) > MAX_ROWS:
        lines += ["", f"The first {MAX_ROWS} of {len(body)} rows."]
    return "\n".join(lines)


def escape_markdown(text: str) -> str:
    """Text that shows as it is inside a paragraph or a table's cell."""
    return MARKDOWN_CHARACTERS.sub(r"\\\1", escape(text, quote=False))


def shrink_picture(data: bytes, max_width: int = MAX_WIDTH) -> bytes:
    """A picture as a small PNG of at most 256 colours, on white, at most `max_width` pixels wide.
    """
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture, mask=picture.getchannel("A"))
    if sheet.width > max_width:
        size = max_width, round(sheet.height * max_width / sheet.width)
        sheet = sheet.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    sheet.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def output_text(output: NotebookNode, folders: dict[str, str]) -> str:
    """An output that is no picture, as markdown; "" for what no reader needs."""
    if output["output_type"] == "stream":
        is_shown = output["name"] == "stdout"  # libraries warn on the other one
        return text_block(clean_text(output["text"], folders)) if is_shown else ""
    data = output.get("data", {})
    if "text/html" in data:
        return html_tables(data["text/html"], folders)
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            return clean_text(data[kind], folders)
    is_widget = any(kind.startswith("application/vnd.jupyter.widget") for kind in data)
    text = data.get("text/plain", "")
    return "" if is_widget or OBJECT.match(text) else text_block(clean_text(text, folders))


def alternative_text(output: dict, heading: str) -> str:
    """What stands for a picture: its own sentence where it has one, else the heading above it."""
    text = " ".join(output["data"].get("text/plain", "").split())
    sentence = heading if not text or OBJECT.match(text) else text
    return re.sub(r"[\[\]$`<>|]", "", sentence)


def web_formulas(markdown: str) -> str:
    """Formulas in the form that a web view leaves alone: in backticks, or as a block, where a
    backslash or an underscore would be read as markdown's.
    """
    def protect(match: re.Match) -> str:
        formula = match[1]
        return f"$`{formula}`$" if UNSAFE_IN_FORMULA.search(formula) else match[0]

    blocks = re.sub(r"(?m)^[ \t]*\$\$\s*(.+?)\s*\$\$[ \t]*$", r"```math\n\1\n```", markdown,
                    flags=re.DOTALL)
    parts = re.split(r"(?ms)(^```.*?^```)", blocks)
    inline = re.compile(r"(?<![\\$`])\$(?!\$)([^$`\n]+?)(?<!\\)\$(?!\$)")
    return "".join(part if part.startswith("```") else inline.sub(protect, part)
                   for part in parts)
