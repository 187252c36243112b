"""Executed notebooks as pages that can be read in a repository's web view: `mig-kit lessons`.

A page is made by nbconvert's markdown exporter; what is put before it folds the parameters, keeps
of the outputs what a reader needs, and turns links between notebooks into links between pages.
"""

import ast
import hashlib
import json
import posixpath
import re
import shutil
from pathlib import Path, PurePath

import nbformat
from nbconvert import MarkdownExporter
from nbformat import NotebookNode

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store
from mig_kit.pipeline.lesson_outputs import (
    alternative_text,
    fence,
    fold,
    join_streams,
    output_picture,
    output_text,
    shrink_picture,
    web_formulas,
)
from mig_kit.pipeline.params import list_profiles, profile_params
from mig_kit.pipeline.run_folders import run_command

LESSONS = PROJECT_ROOT / "notebooks" / "guide" / "lessons"
PLACE = "notebooks/guide/lessons"  # of the pages, whose links are relative to it
MAX_BYTES = 6 * 2**20  # of all pages with their pictures
COVER_WIDTH = 640  # pixels
INJECTED, PARAMETERS, COVER, HIDE_INPUT = (
    "injected-parameters", "parameters", "cover", "hide-input")
LINK = re.compile(r"(\]\(|\bsrc=\")(?![a-z]+:|#|/)([^)\s\"]+)")


def source_hash(notebook: NotebookNode) -> str:
    """SHA-256 of the cells that a person wrote, without outputs and injected parameters."""
    cells = [[cell.cell_type, cell.source.rstrip()] for cell in notebook.cells
             if INJECTED not in cell.metadata.get("tags", ())]
    return hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def notebook_hash(stage: str) -> str:
    """`source_hash` of a stage's notebook as it is now."""
    return source_hash(_read_notebook(stage))


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
        if not run_id and _is_present(stage, folder / page):
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
    return nbformat.read(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)


def _is_present(stage: str, page: Path) -> bool:
    return page.is_file() and page_hash(page) == notebook_hash(stage)


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
    expected = source_hash(notebook)
    if run_id:
        path = store.stage_folder(stage, run_id) / f"{stage}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        if source_hash(notebook) != expected:
            raise ValueError(f"{stage} of run '{run_id}' is of another version of the notebook; "
                             f"run: {run_command(stage, run_id)}")
        header = _describe_run(stage, run_id)
    _refuse_errors(notebook, stage, run_id)
    nbformat.validator.normalize(notebook)
    page = render_page(notebook, stage[:2], folder)
    title, rest = page.split("\n", 1)
    link = f"[notebooks/{stage}.ipynb](../../{stage}.ipynb)"
    return (f"<!-- made by mig-kit lessons; edit the notebook instead -->\n"
            f"<!-- source {expected} -->\n{title}\n\n"
            f"<sub>{link}. {header} [All lessons](../../README.md)</sub>\n{rest}")


def _refuse_errors(notebook: NotebookNode, stage: str, run_id: str) -> None:
    for cell in notebook.cells:
        if any(output.output_type == "error" for output in cell.get("outputs", ())):
            raise ValueError(f"{stage} of run '{run_id}' holds an error; run it again")


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


def render_page(notebook: NotebookNode, number: str, folder: Path) -> str:
    """The notebook as markdown; its pictures go to the folder as NN_1.png, NN_2.png, ..., and one
    of them, the first of the cell tagged "cover" or else the first, smaller as NN_cover.png.
    """
    exporter = MarkdownExporter()
    exporter.register_preprocessor(
        lambda source, resources: (_prepare_cells(source, number, folder), resources),
        enabled=True)
    page, _ = exporter.from_notebook_node(notebook)
    return re.sub(r"\n{3,}", "\n\n", page).strip() + "\n"


def _prepare_cells(notebook: NotebookNode, number: str, folder: Path) -> NotebookNode:
    """The cells as the page has them: outputs as markdown, parameters folded, links set."""
    folders = _folders_of(notebook)
    injected = next((cell.source for cell in notebook.cells if _has_tag(cell, INJECTED)), "")
    heading, covers, cells = "", {}, []
    n_pictures = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)
            heading = headings[-1] if headings else heading
            cells.append(nbformat.v4.new_markdown_cell(page_links(web_formulas(cell.source))))
        if cell.cell_type != "code" or _has_tag(cell, INJECTED):
            continue
        parts, last = [], None
        for output in join_streams(cell.outputs):
            picture = output_picture(output)
            if picture is None:
                parts.append(output_text(output, folders))
                continue
            if picture == last:  # a figure that is displayed, and shown again at the cell's end
                continue
            last = picture
            n_pictures += 1
            name = f"{number}_{n_pictures}.png"
            (folder / name).write_bytes(shrink_picture(picture))
            parts.append(f"![{alternative_text(output, heading)}]({name})")
            covers.setdefault(_has_tag(cell, COVER), picture)
        cells += _page_cells(cell, "\n\n".join(filter(None, parts)), injected)
    if covers:
        picture = covers.get(True) or covers[False]
        (folder / f"{number}_cover.png").write_bytes(shrink_picture(picture, COVER_WIDTH))
    notebook.cells = cells
    notebook.metadata.setdefault("language_info", {"name": "python"})  # of the code blocks
    return notebook


def _has_tag(cell: NotebookNode, tag: str) -> bool:
    return tag in cell.metadata.get("tags", ())


def _page_cells(cell: NotebookNode, shown: str, injected: str) -> list[NotebookNode]:
    """A code cell as the cells of a page; shown: its outputs, as markdown."""
    if _has_tag(cell, PARAMETERS):
        content = fence(cell.source, "python")
        changes = _changed_parameters(cell.source, injected)
        if changes:
            content += "\n\nThis run sets:\n\n" + fence(changes, "python")
        return [nbformat.v4.new_markdown_cell(fold("Parameters", content))]
    outputs = [nbformat.v4.new_markdown_cell(shown)] if shown else []
    if _has_tag(cell, HIDE_INPUT) or not cell.source.strip():
        return outputs
    return [nbformat.v4.new_code_cell(cell.source), *outputs]


def _changed_parameters(defaults: str, injected: str) -> str:
    """The lines of papermill's cell that give another value than the notebook's own."""
    values = _assigned_values(defaults)
    return "\n".join(f"{name} = {value!r}" for name, value in _assigned_values(injected).items()
                     if name not in values or values[name] != value)


def _assigned_values(source: str) -> dict[str, object]:
    values = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            values[ast.unparse(target)] = ast.literal_eval(node.value)
    return values


def _folders_of(notebook: NotebookNode) -> dict[str, str]:
    """Folders of the machine that executed the notebook -> how a reader knows them."""
    folders = {f"{store.runs_root()}/": "runs/", f"{PROJECT_ROOT}/": ""}
    papermill = notebook.metadata.get("papermill", {})
    if papermill.get("output_path"):
        folders[f"{PurePath(papermill['output_path']).parents[2]}/"] = "runs/"
    if papermill.get("input_path"):
        folders[f"{PurePath(papermill['input_path']).parents[1]}/"] = ""
    return folders


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
