"""The code that a stage's results depend on: the definitions that its notebook uses, and those they
use in turn.

A stage is stale when one of these definitions changes, and only then: another reward must not
repeat fine-tuning. Comments and docstrings do not count, nor does PLUMBING, nor do modules that
only show or check (DISPLAY_ONLY), except where a stage's results are pictures.
"""

import ast
import hashlib
import json
from functools import cache
from pathlib import Path

from mig_kit.common import PACKAGE, PROJECT_ROOT, file_sha256

DISPLAY_ONLY = {"mig_kit.plots", "mig_kit.lesson_plots", "mig_kit.method_plots",
                "mig_kit.token_plots", "mig_kit.group_plots", "mig_kit.palette",
                "mig_kit.pictures", "mig_kit.score_plots", "mig_kit.widgets",
                "mig_kit.engine.lesson_parts", "mig_kit.stages.report",
                "mig_kit.stages.report_gallery", "mig_kit.stages.report_tables",
                "mig_kit.stages.sanity_checks"}
PLUMBING = "mig_kit.pipeline."  # run folders, parameters and their rules: no result follows from it
STAGES_OF_PICTURES = {"07_report", "08_benchmark", "09_compare"}
MODULE_BODY = "<body>"  # what a module does when it is imported, such as registering a function


def notebook_cells(stage: str) -> list[dict]:
    """The code cells of a stage's notebook; [] where there is none."""
    path = PROJECT_ROOT / "notebooks" / f"{stage}.ipynb"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else []
    return [cell for cell in cells if cell["cell_type"] == "code"]


def notebook_code(stage: str) -> list[str]:
    """The code of a stage's notebook without its parameters cell, cell by cell, free of comments.
    """
    cells = [ast.unparse(_parse("".join(cell["source"]))) for cell in notebook_cells(stage)
             if "parameters" not in cell["metadata"].get("tags", ())]
    return [cell for cell in cells if cell]  # JupyterLab adds an empty one


def used_definitions(stage: str) -> dict[str, str]:
    """"module.name" -> SHA-256 of its code, of every definition of the kit that the stage's results
    depend on, and of the files that lie beside these modules under their names, as templates do.
    """
    is_picture = stage in STAGES_OF_PICTURES
    tree = _parse("\n".join("".join(cell["source"]) for cell in notebook_cells(stage)))
    todo = _references(tree, _imports(tree))
    used: dict[str, str] = {}
    while todo:
        module, name = todo.pop()
        key = f"{module}.{name}"
        is_ignored = module in DISPLAY_ONLY or module.startswith(PLUMBING)
        if key in used or (is_ignored and not is_picture):
            continue
        definition = _definitions(_module_path(module)).get(name)
        if definition is None:
            continue
        code, references = definition
        used[key] = hashlib.sha256(code.encode()).hexdigest()
        todo |= references
    modules = {key.rpartition(".")[0] for key in used}
    files = {file for path in map(_module_path, modules)
             for file in path.parent.glob(f"{path.stem}.*")}
    used |= {str(file.relative_to(PACKAGE)): file_sha256(file)
             for file in files if file.suffix != ".py"}
    return dict(sorted(used.items()))


def _module_path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _definitions(path: Path) -> dict[str, tuple[str, frozenset]]:
    """name -> (its code, what it refers to) of every top-level definition of a module; {} where
    there is no such file.
    """
    return _read_definitions(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _read_definitions(path: Path, modified: int) -> dict[str, tuple[str, frozenset]]:
    tree = _parse(path.read_text())
    module = ".".join(("mig_kit", *path.relative_to(PACKAGE).with_suffix("").parts))
    by_name = [(name, statement) for statement in tree.body for name in _defined_names(statement)]
    local = {name: (module, name) for name, _ in by_name if name != MODULE_BODY}
    imported = _imports(tree)
    # a name that is only imported here, and used from here, leads to where it is defined
    definitions = {name: ("", frozenset({origin})) for name, origin in imported.items()}
    body = {(module, MODULE_BODY)} if any(name == MODULE_BODY for name, _ in by_name) else set()
    for name in {name for name, _ in by_name}:
        statements = [statement for other, statement in by_name if other == name]
        code = "".join(ast.dump(statement) for statement in statements)
        references = set(body).union(
            *(_references(statement, {**imported, **local}) for statement in statements))
        definitions[name] = code, frozenset(references - {(module, name)})
    return definitions


def _parse(source: str) -> ast.Module:
    """The syntax tree of a module or of notebook cells, without docstrings and magics."""
    lines = ("" if line.startswith(("%", "!")) else line for line in source.splitlines())
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree = compile("\n".join(lines), "<source>", "exec", flags)
    for node in ast.walk(tree):
        is_documented = (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                         and ast.get_docstring(node) is not None)
        if is_documented:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _defined_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        nodes = [node for target in targets for node in ast.walk(target)]
        return [node.id for node in nodes if isinstance(node, ast.Name)]
    is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    is_import = isinstance(statement, ast.Import | ast.ImportFrom)
    return [] if is_docstring or is_import else [MODULE_BODY]


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Local name -> (module, name), or (module, "") for a module, of everything imported from the
    kit anywhere in `tree`.
    """
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mig_kit":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                is_module = _module_path(module).is_file()
                origin = (module, "") if is_module else (node.module, alias.name)
                names[alias.asname or alias.name] = origin
    return names


def _references(tree: ast.AST,
                imports: dict[str, tuple[str, str]]) -> set[tuple[str, str]]:
    """(module, name) of every definition of the kit that `tree` names."""
    imports = {**imports, **_imports(tree)}
    references = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and imports.get(node.id, ("", ""))[1]:
            references.add(imports[node.id])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = imports.get(node.value.id, ("", "x"))
            if not name:
                references.add((module, node.attr))
    return references
