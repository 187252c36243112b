"""The code that a stage's results follow from; only a change of it makes the stage stale.

It is the notebook's cells and every definition that these use, so another reward does not repeat
fine-tuning. Code counts by digest: definitions may move, and docstrings do not count.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from mig_kit.common import NOTEBOOKS, PACKAGE, digest_json, file_sha256

Name = tuple[str, str]  # (module, definition); (module, "") is the module itself

BASE_CODE = "tiny_base"  # what made the tiny base, beside notebook 90
PLUMBING = "mig_kit.pipeline"
# what no result follows from: packages and modules that keep runs, show something or check it
NOT_PART_OF_A_KEY = (
    PLUMBING, "mig_kit.drawing", "mig_kit.stages.report", "mig_kit.stages.report_gallery",
    "mig_kit.stages.sanity_checks")
STAGES_OF_PICTURES = {"07_report", "08_benchmark", "09_compare"}  # all of that counts but PLUMBING
# of cells: those that only draw, and mathematics by hand that no later cell uses
TAGS_OUTSIDE = {"parameters", "picture", "lesson"}
CHOSEN = "REWARDS"  # a dictionary of which only the entries count that a stage has chosen
MODULE_BODY = "<body>"  # what a module does when it is imported, such as registering a function


def notebook_cells(stage: str) -> list[dict]:
    """The code cells of a stage's notebook; [] if there is none."""
    path = NOTEBOOKS / f"{stage}.ipynb"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else []
    return [cell for cell in cells if cell["cell_type"] == "code"]


def describe_code(stage: str, rewards: Sequence[str]) -> dict:
    """{"code", "definition", "cell"} of a stage; `rewards` names the kit's rewards that it uses.

    code: digest of all code that its results follow from. definition ("module.name" -> digest) and
    cell (texts) say what that is, for `store.describe_staleness`.
    """
    source = "\n".join("".join(cell["source"]) for cell in notebook_cells(stage))
    imports = _imports(_parse(source))
    cells = []
    for cell in notebook_cells(stage):
        if not TAGS_OUTSIDE & set(cell["metadata"].get("tags", ())):
            tree, references = _resolve(_parse("".join(cell["source"])), imports)
            if text := ast.unparse(tree):  # JupyterLab adds an empty cell
                cells.append((text, references))
    definitions = _find_definitions({name for _, references in cells for name in references},
                                    stage, rewards)
    digests = {name: hashlib.sha256(code.encode()).hexdigest()[:16]
               for name, (code, _) in definitions.items()}
    digests |= {(module, file.name): file_sha256(file)[:16] for module in {m for m, _ in digests}
                for file in _files_beside(module)}

    def with_uses(digest: str, references: Iterable[Name]) -> list:
        # the name alone does not say which of two functions of that name is called
        return [digest, sorted({digests[name] for name in references if name in digests})]

    uses = [with_uses(digest, definitions.get(name, ("", ()))[1])
            for name, digest in digests.items()]
    return {"code": digest_json([sorted(uses), [with_uses(*cell) for cell in cells]]),
            "definition": {".".join(name): digests[name] for name in sorted(digests)},
            "cell": [text for text, _ in cells]}


def _find_definitions(names: Iterable[Name], stage: str,
                      rewards: Sequence[str]) -> dict[Name, tuple[str, frozenset[Name]]]:
    """(code, references) of these definitions and of all that they lead to."""
    left_out = (PLUMBING,) if stage in STAGES_OF_PICTURES else NOT_PART_OF_A_KEY
    todo, used = set(names), {}
    while todo:
        module, name = todo.pop()
        is_left_out = any(f"{module}.".startswith(f"{other}.") for other in left_out)
        if (module, name) in used or is_left_out:
            continue
        definitions = _definitions(_module_path(module))
        if name in definitions:
            used[module, name] = definitions[name]
            todo |= definitions[name][1]
        elif name == CHOSEN:
            todo |= {(module, f"{name}[{reward}]") for reward in rewards}
    return {name: definition for name, definition in used.items() if definition[0]}


def _module_path(module: str) -> Path:
    root, *parts = module.split(".")
    folder = NOTEBOOKS / root if root == BASE_CODE else PACKAGE
    return folder.joinpath(*parts).with_suffix(".py")


def _files_beside(module: str) -> list[Path]:
    """Files beside a module under its name, such as templates."""
    path = _module_path(module)
    return [file for file in path.parent.glob(f"{path.stem}.*") if file.suffix != ".py"]


def _definitions(path: Path) -> dict[str, tuple[str, frozenset[Name]]]:
    """Name -> (code, references) of a module's top-level definitions; {} without such a file."""
    return _read_definitions(path, path.stat().st_mtime_ns) if path.is_file() else {}


@cache
def _read_definitions(path: Path, modified: int) -> dict[str, tuple[str, frozenset[Name]]]:
    tree = _parse(path.read_text())
    is_kit = path.is_relative_to(PACKAGE)
    parts = path.relative_to(PACKAGE if is_kit else NOTEBOOKS).with_suffix("").parts
    module = ".".join(("mig_kit", *parts) if is_kit else parts)
    statements = [pair for statement in tree.body for pair in _split_choice(statement)]
    defined = {name for names, _ in statements for name in names}
    imported = _imports(tree)
    known = imported | {name: (module, name) for name in defined - {MODULE_BODY}}
    body = {(module, MODULE_BODY)} if MODULE_BODY in defined else set()
    # a name that is only imported here, and used from here, leads to where it is defined
    definitions = {name: ("", frozenset({origin})) for name, origin in imported.items()}
    own = {name: ("", frozenset(body)) for name in defined}
    for names, statement in statements:
        resolved, references = _resolve(statement, known)
        for name in names:
            code, others = own[name]
            own[name] = code + ast.dump(resolved), others | references - {(module, name)}
    return definitions | own


def _split_choice(statement: ast.stmt) -> list[tuple[list[str], ast.AST]]:
    """(names it defines, statement); for CHOSEN one entry per key, "REWARDS[box]"."""
    names = _defined_names(statement)
    if names != [CHOSEN] or not isinstance(statement.value, ast.Dict):
        return [(names, statement)]
    return [([f"{CHOSEN}[{ast.literal_eval(key)}]"], value)
            for key, value in zip(statement.value.keys, statement.value.values)]


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


def _is_kit_import(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (
        (node.module or "").split(".")[0] in ("mig_kit", BASE_CODE))


def _imports(tree: ast.AST) -> dict[str, Name]:
    """Local name -> what it stands for, for all imports from the kit."""
    names = {}
    for node in filter(_is_kit_import, ast.walk(tree)):
        for alias in node.names:
            module = f"{node.module}.{alias.name}"
            is_module = _module_path(module).is_file()
            names[alias.asname or alias.name] = (module, "") if is_module else (
                node.module, alias.name)
    return names


def _resolve(tree: ast.AST, names: dict[str, Name]) -> tuple[ast.AST, set[Name]]:
    """`tree` without hints at where the kit's definitions lie, and the names it uses."""
    resolver = _Resolver({**names, **_imports(tree)})
    return resolver.visit(tree), resolver.references


class _Resolver(ast.NodeTransformer):
    """Writes the kit's `module.name` as `name`, drops imports of the kit, collects references."""

    def __init__(self, names: dict[str, Name]):
        self.names = names
        self.references: set[Name] = set()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
        return None if _is_kit_import(node) else node

    def visit_Name(self, node: ast.Name) -> ast.Name:
        module, name = self.names.get(node.id, ("", ""))
        return self._refer(module, name, node) if name else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        if isinstance(node.value, ast.Name):
            module, name = self.names.get(node.value.id, ("", "no module"))
            if not name:
                return self._refer(module, node.attr, node)
        return self.generic_visit(node)

    def _refer(self, module: str, name: str, node: ast.expr) -> ast.Name:
        self.references.add((module, name))
        return ast.Name(name, node.ctx)
