"""What a code cell put out, as markdown that a repository's web view shows: text, tables, pictures.

Progress, the standard error (where libraries warn), representations of objects and folders of the
machine are left out; long text is folded, and long tables are cut.
"""

import base64
import io
import posixpath
import re
import textwrap
from html import escape

from bs4 import BeautifulSoup
from PIL import Image

MAX_WIDTH = 900  # of a picture, pixels
MAX_ROWS = 20  # of a table
FOLD_LINES, MAX_LINES = 16, 60  # of text: folded beyond the first, cut at the second
MAX_CHARACTERS = 600  # of a line
WRAP = 110
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
PROGRESS = re.compile(r"\d+%\|.*\||\b[\d.]+ (?:s|min|h) left$")
WARNING = re.compile(r"^\S+\.py:\d+: \w*Warning: .*\n(?:  .*\n)*", re.MULTILINE)
STAGE_LINE = re.compile(r"^(\d\d_\w+ of run '[^']*'): .*$", re.MULTILINE)
OBJECT = re.compile(r"^[\[(]?<.*>[,\])]*$|^(?:Text|Axes)\(", re.DOTALL)
MACHINE_PATH = re.compile(
    r"(?<![\w./~-])/(?:home|root|tmp|usr|opt|var|mnt|work|content|kaggle|Users)/[^\s'\"`),;:|]+")
MARKDOWN_CHARACTERS = re.compile(r"([\\`*_{}\[\]|$~#])")
UNSAFE_IN_FORMULA = re.compile(r"\\[^A-Za-z]|\*|_.*_")


def clean_text(text: str, folders: dict[str, str]) -> str:
    """The text as a reader elsewhere needs it: no control codes, no progress bars, no folders of
    the machine.

    folders: absolute prefixes -> what stands in their place; others are shortened to "…/name".
    """
    lines = [line.rpartition("\r")[2] for line in ANSI.sub("", text).replace("\r\n", "\n")
             .split("\n")]
    kept = "\n".join(line for line in lines if not PROGRESS.search(line))
    kept = WARNING.sub("", kept + "\n")
    for prefix in sorted(folders, key=len, reverse=True):
        kept = kept.replace(prefix, folders[prefix])
    kept = MACHINE_PATH.sub(lambda match: "…/" + posixpath.basename(match[0].rstrip("/")), kept)
    return STAGE_LINE.sub(r"\1", kept).strip("\n")


def fence(text: str, language: str = "text") -> str:
    """A code block that ends where it should, whatever the text holds."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text}\n{ticks}"


def fold(summary: str, content: str) -> str:
    """Content that shows when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary>\n\n{content}\n\n</details>"


def text_block(text: str) -> str:
    """Text in a code block, its long lines wrapped; "" for blank text."""
    if not text.strip():
        return ""
    lines = []
    for line in text.split("\n"):
        if len(line) > MAX_CHARACTERS:
            line = line[:MAX_CHARACTERS] + " …"
        lines += textwrap.wrap(line, WRAP, subsequent_indent="    ", drop_whitespace=False,
                               break_on_hyphens=False) or [""]
    count = len(lines)
    if count > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"… ({count - MAX_LINES} more lines)"]
    block = fence("\n".join(line.rstrip() for line in lines))
    return fold(f"{count} lines", block) if count > FOLD_LINES else block


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


def output_text(output: dict, folders: dict[str, str]) -> str:
    """An output that is no picture, as markdown; "" for what no reader needs."""
    if output["output_type"] == "stream":
        return text_block(clean_text(output["text"], folders))
    data = output.get("data", {})
    if "text/html" in data:
        return html_tables(data["text/html"], folders)
    for kind in ("text/markdown", "text/latex"):
        if kind in data:
            return clean_text(data[kind], folders)
    if any(kind.startswith("application/vnd.jupyter.widget") for kind in data):
        return ""
    text = data.get("text/plain", "")
    return "" if OBJECT.match(text) else text_block(clean_text(text, folders))


def join_streams(outputs: list[dict]) -> list[dict]:
    """The outputs with each run of standard output as one; the standard error is left out."""
    joined: list[dict] = []
    for output in outputs:
        if output["output_type"] != "stream":
            joined.append(output)
        elif output["name"] == "stdout":
            if joined and joined[-1]["output_type"] == "stream":
                text = joined.pop()["text"] + output["text"]
                output = {**output, "text": text}
            joined.append(output)
    return joined


def output_picture(output: dict) -> bytes | None:
    """The picture of an output, as it was put out, or None."""
    data = output.get("data", {}).get("image/png")
    return base64.b64decode(data) if data else None


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
