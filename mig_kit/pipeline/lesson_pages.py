"""Executed notebooks as pages for a repository's web view: `mig-kit lessons`."""

import base64
import hashlib
import io
import json
import posixpath
import re
from html import escape
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from nbformat import NotebookNode
from PIL import Image

from mig_kit.common import NOTEBOOKS
from mig_kit.pipeline import store
from mig_kit.pipeline.run_folders import format_run_command

LESSONS = NOTEBOOKS / "guide" / "lessons"
PLACE = "notebooks/guide/lessons"  # of the pages, whose links are relative to it
MAX_WIDTH, COVER_WIDTH = 900, 640  # of a picture, pixels
MAX_ROWS = 20  # of a table
MAX_LINES, MAX_CHARACTERS = 40, 600  # of text, and of a line of it
LINK = re.compile(r"(\]\(|\bsrc=\")(?![a-z]+:|#|/)([^)\s\"]+)")
# colours of a terminal, progress bars, warnings of libraries
NOISE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^.*(?:\d+%\|.*\|.*|\b[\d.]+ (?:s|min|h) left)$\n?"
                   r"|^\S+\.py:\d+: \w*Warning: .*\n(?:  .*\n)*", re.MULTILINE)
STAGE_LINE = re.compile(r"^(\d\d_\w+ of run '[^']*'): .*$", re.MULTILINE)
OBJECT = re.compile(r"^[\[(]?<.*>[,\])]*$|^(?:Text|Axes)\(", re.DOTALL)
MACHINE_PATH = re.compile(
    r"(?<![\w./~-])/(?:home|root|tmp|usr|opt|var|mnt|work|content|kaggle|Users)/[^\s'\"`),;:|]+")
MARKDOWN_CHARACTERS = re.compile(r"([\\`*_{}\[\]|$~#])")
UNSAFE_IN_FORMULA = re.compile(r"\\[^A-Za-z]|\*|_.*_")


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the code cells that a person wrote, without outputs and injected parameters."""
    cells = [cell.source.rstrip() for cell in notebook.cells
             if cell.cell_type == "code" and not _has_tag(cell, "injected-parameters")]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def page_hash(page: Path) -> str:
    """The hash that a page carries of its notebook; "" if it has none."""
    match = re.search(r"^<!-- source ([0-9a-f]{64}) -->$", page.read_text(), re.MULTILINE)
    return match[1] if match else ""


def write_lessons(run_ids: list[str], folder: Path = LESSONS) -> dict[str, str]:
    """Write a page NN.md per stage with its pictures, and question.png; returns each page's origin.

    A notebook comes from the first run that finished it. If none did, its page stays if it is of
    the present notebook, else it has no outputs. Raises ValueError for a copy of another version of
    the notebook, FileNotFoundError if no run has a finished stage; the old pages then stay.
    """
    copies = {stage: _find_copy(stage, run_ids) for stage in store.STAGES}
    if not any(copies.values()):
        raise FileNotFoundError(f"no finished stage in {', '.join(run_ids)}; name a run that "
                                "`mig-kit status` lists")
    origins, files = {}, {}
    for stage, run_id in copies.items():
        page, notebook = folder / f"{stage[:2]}.md", _read_notebook(stage)
        if not run_id and page.is_file() and page_hash(page) == source_hash(notebook):
            origins[stage] = "its page as it was: no run has it"
        else:
            origins[stage] = f"run '{run_id}'" if run_id else "no outputs: no run has it"
            files[stage[:2]] = _make_page(stage, run_id, notebook)
    folder.mkdir(parents=True, exist_ok=True)
    for number, by_name in files.items():
        for path in folder.glob(f"{number}[._]*"):
            path.unlink()
        for name, content in by_name.items():
            (folder / name).write_bytes(content)
    pictures = (store.stage_folder("07_report", run_id) / "question.png" for run_id in run_ids)
    if picture := next(filter(Path.is_file, pictures), None):
        place = folder.parent if folder.resolve() == LESSONS.resolve() else folder
        (place / picture.name).write_bytes(shrink_picture(picture.read_bytes()))
    return origins


def _read_notebook(stage: str, folder: Path | None = None) -> NotebookNode:
    return nbformat.read((folder or NOTEBOOKS) / f"{stage}.ipynb", as_version=4)


def _find_copy(stage: str, run_ids: list[str]) -> str:
    """The first run that finished the stage as a notebook; "" if none has."""
    return next((run_id for run_id in run_ids if store.load_record(stage, run_id)
                 and (store.stage_folder(stage, run_id) / f"{stage}.ipynb").is_file()), "")


def _make_page(stage: str, run_id: str, notebook: NotebookNode) -> dict[str, bytes]:
    """File name -> content of the page and its pictures; notebook: the present one."""
    header = ("No executed copy: the cells without their outputs. To run them: "
              f"`mig-kit run {stage[:2]}`.")
    expected = source_hash(notebook)
    if run_id:
        notebook = _read_notebook(stage, store.stage_folder(stage, run_id))
        if source_hash(notebook) != expected:
            raise ValueError(f"{stage} of run '{run_id}' is of another version of the notebook; "
                             f"run: {format_run_command(stage, run_id)}")
        header = _describe_run(stage, run_id)
    page, pictures = render_page(notebook, stage[:2])
    title, rest = page.split("\n", 1)
    link = f"[notebooks/{stage}.ipynb](../../{stage}.ipynb)"
    text = (f"<!-- made by mig-kit lessons; edit the notebook instead -->\n"
            f"<!-- source {expected} -->\n{title}\n\n"
            f"<sub>{link}. {header} [All lessons](../../README.md)</sub>\n{rest}")
    return {f"{stage[:2]}.md": text.encode(), **pictures}


def _describe_run(stage: str, run_id: str) -> str:
    record = store.load_record(stage, run_id)
    preflight = store.load_record("00_preflight", run_id) or {"params": {}}
    caution = (" Smoke parameters show what the cells do in seconds; the numbers mean nothing."
               if preflight["params"].get("profile") == "smoke" else "")
    return (f"Executed in run `{run_id}` on {record['started'][:10]} in "
            f"{record['seconds'] / 60:.1f} minutes ({record['machine']}).{caution}")


def render_page(notebook: NotebookNode, number: str) -> tuple[str, dict[str, bytes]]:
    """The notebook as markdown, and its pictures by name: NN_1.png, NN_2.png, ...

    NN_cover.png is a smaller copy: of the cell tagged "cover", else of the first picture.
    """
    heading, covers, parts = "", {}, []
    pictures: dict[str, bytes] = {}
    CoalesceStreamsPreprocessor().preprocess(notebook, {})
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = ["", heading, *re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)][-1]
            parts.append(page_links(web_formulas(cell.source)))
        if cell.cell_type != "code" or _has_tag(cell, "injected-parameters"):
            continue
        code = fence(cell.source, "python")
        if _has_tag(cell, "parameters"):
            parts.append(f"<details><summary>Parameters</summary>\n\n{code}\n\n</details>")
        elif cell.source.strip() and not _has_tag(cell, "hide-input"):
            parts.append(code)
        last = None
        for output in cell.outputs:
            picture = base64.b64decode(output.get("data", {}).get("image/png", ""))
            if not picture:
                parts.append(output_text(output))
            elif picture != last:  # a figure may be displayed, and shown again at the cell's end
                covers.setdefault(_has_tag(cell, "cover"), picture)
                name = f"{number}_{len(pictures) + 1}.png"
                pictures[name] = shrink_picture(picture)
                parts.append(f"![{alternative_text(output, heading)}]({name})")
            last = picture
    if covers:
        picture = covers.get(True) or covers[False]
        pictures[f"{number}_cover.png"] = shrink_picture(picture, COVER_WIDTH)
    return re.sub(r"\n{3,}", "\n\n", "\n\n".join(parts)).strip() + "\n", pictures


def _has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def page_links(markdown: str) -> str:
    """Links relative to notebooks/ as links relative to the pages, numbered notebooks as pages."""
    def resolve(match: re.Match) -> str:
        target, mark, anchor = match[2].partition("#")
        if re.fullmatch(r"\d\d_\w+\.ipynb", target):
            return f"{match[1]}{target[:2]}.md{mark}{anchor}"
        path = posixpath.relpath(posixpath.join("notebooks", target), PLACE)
        return f"{match[1]}{path}{mark}{anchor}"

    return LINK.sub(resolve, markdown)


def clean_text(text: str) -> str:
    """The text without NOISE, and with paths of the machine as "…/name"."""
    text = NOISE.sub("", text + "\n")
    text = MACHINE_PATH.sub(lambda match: "…/" + posixpath.basename(match[0].rstrip("/")), text)
    return STAGE_LINE.sub(r"\1", text).strip("\n")


def fence(text: str, language: str = "text") -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def text_block(text: str) -> str:
    """Text in a code block, long lines and long text cut; "" for blank text."""
    lines = [line[:MAX_CHARACTERS] for line in text.split("\n")]
    more = [f"… ({len(lines) - MAX_LINES} more lines)"] if len(lines) > MAX_LINES else []
    return fence("\n".join([*lines[:MAX_LINES], *more])) if text.strip() else ""


def html_tables(html: str) -> str:
    """The tables of an HTML output as markdown, MAX_ROWS rows each; "" for progress or no table."""
    soup = BeautifulSoup(html, "html.parser")
    tables = [] if soup.find("progress") else soup.find_all("table")
    return "\n\n".join(filter(None, map(_markdown_table, tables)))


def _markdown_table(table) -> str:
    rows = [[clean_text(" ".join(cell.get_text().split())) for cell in row.find_all(["th", "td"])
             for _ in range(int(cell.get("colspan", 1)))] for row in table.find_all("tr")]
    if not any(map(any, rows)):
        return ""
    width = max(map(len, rows))
    head, *body = [row + [""] * (width - len(row)) for row in rows]
    if not head[0] and [row[0] for row in body] == [str(n) for n in range(len(body))]:
        head, *body = (row[1:] for row in (head, *body))
    rows = [head, *body[:MAX_ROWS]]
    lines = ["| " + " | ".join(MARKDOWN_CHARACTERS.sub(r"\\\1", escape(cell, quote=False))
                               for cell in row) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join(["---"] * len(head)) + " |")
    more = [f"\nThe first {MAX_ROWS} of {len(body)} rows."] if len(body) > MAX_ROWS else []
    return "\n".join(lines + more)


def shrink_picture(data: bytes, max_width: int = MAX_WIDTH) -> bytes:
    """A picture as a PNG of at most 256 colours, on white, at most `max_width` pixels wide."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture, mask=picture.getchannel("A"))
    sheet.thumbnail((max_width, sheet.height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    sheet.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def output_text(output: NotebookNode) -> str:
    """An output without a picture, as markdown; "" for what no reader needs."""
    if output["output_type"] == "stream":
        is_shown = output["name"] == "stdout"  # libraries warn on the other one
        return text_block(clean_text(output["text"])) if is_shown else ""
    data = output.get("data", {})
    if "text/html" in data:
        return html_tables(data["text/html"])
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            return clean_text(data[kind])
    is_widget = any(kind.startswith("application/vnd.jupyter.widget") for kind in data)
    text = data.get("text/plain", "")
    return "" if is_widget or OBJECT.match(text) else text_block(clean_text(text))


def alternative_text(output: dict, heading: str) -> str:
    """What stands for a picture: its own sentence, else the heading above it."""
    text = " ".join(output["data"].get("text/plain", "").split())
    sentence = heading if not text or OBJECT.match(text) else text
    return re.sub(r"[\[\]$`<>|]", "", sentence)


def web_formulas(markdown: str) -> str:
    """Formulas in backticks or blocks if markdown would read their backslashes or underscores."""
    def protect(match: re.Match) -> str:
        formula = match[1]
        return f"$`{formula}`$" if UNSAFE_IN_FORMULA.search(formula) else match[0]

    blocks = re.sub(r"(?m)^[ \t]*\$\$\s*(.+?)\s*\$\$[ \t]*$", r"```math\n\1\n```", markdown,
                    flags=re.DOTALL)
    parts = re.split(r"(?ms)(^```.*?^```)", blocks)
    inline = re.compile(r"(?<![\\$`])\$(?!\$)([^$`\n]+?)(?<!\\)\$(?!\$)")
    return "".join(part if part.startswith("```") else inline.sub(protect, part) for part in parts)
