"""What a stage's results follow from, as digests: parameters, inputs, files and code.

Only a change of these makes a stage stale. Its code is the notebook's cells and every definition
that they use, so another reward does not repeat fine-tuning. Code counts by digest: definitions may
move, and docstrings do not count.
"""

import ast
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from mig_kit.common import (
    NOTEBOOKS,
    PACKAGE,
    PROJECT_ROOT,
    digest_json,
    file_sha256,
    iter_lines,
    model_folder,
    progress_bar,
    split_function_name,
)
from mig_kit.image_files import is_regular_file
from mig_kit.pipeline import run_folders
from mig_kit.pipeline.attempts import NOT_PRODUCTS
from mig_kit.pipeline.params import (
    EXECUTION_PARAMS,
    NAMES_OF_RUNS,
    RUN_PARAMS,
    notebook_cells,
    stage_parameters,
)
from mig_kit.pipeline.run_facts import run_params
from mig_kit.pipeline.run_folders import COLD_START, STAGES, require_record

KEY_FACTS = ("parameter", "file", "input", "code")
MODEL_PARAMS = ("base_model", "model", "start_from")  # each names a folder, a model or a word
LARGE_FILE = 2**26  # bytes; larger files of a model folder are compared by size and time
LARGE_SET = 2**35  # bytes of images; more are compared by size and time, too
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")
CACHE = ".images_{}.json"  # in the folder of runs: of a root's images, size and time, and SHA-256
JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"?')  # one without an end takes the rest along

Name = tuple[str, str]  # (module, definition); (module, "") is the module itself

BASE_CODE = "tiny_base"  # what made the tiny base, beside notebook 90
PLUMBING = "mig_kit.pipeline"
# what no result follows from: packages and modules that keep runs, show something or check it
NOT_PART_OF_A_KEY = (
    PLUMBING, "mig_kit.drawing", "mig_kit.stages.tables", "mig_kit.stages.sanity_checks")
STAGES_OF_PICTURES = {"07_report", "08_benchmark", "09_compare"}  # all of that counts but PLUMBING
# cells that decide nothing: they only draw, or compute by hand what no later cell uses
TAGS_OUTSIDE = {"parameters", "picture", "lesson"}
CHOSEN = "REWARDS"  # a dictionary of which only the entries count that a stage has chosen
MODULE_BODY = "<body>"  # what a module does when it is imported, such as registering a function


def input_stages(stage: str, run_id: str, params: dict) -> tuple[str, ...]:
    """The stages that this one reads. A run without a cold start has no 02 and 03."""
    if stage <= COLD_START[-1] or run_folders.has_cold_start(run_id):
        adapter = ("02_sft",) if params.get("start_from") == "adapter" else ()
        return adapter + STAGES[stage]
    return tuple(name for name in STAGES[stage] if name not in COLD_START)


def with_run_params(stage: str, run_id: str, params: dict) -> dict:
    """The stage's parameters; if it builds on earlier stages, also those of the whole run."""
    return {**params, **run_params(run_id, stage)} if STAGES[stage] else params


def load_inputs(stage: str, run_id: str, params: dict) -> dict[str, dict[str, str]]:
    """Stage -> digests of its files, for the stages that this one reads; raises if one is gone."""
    return {name: require_record(name, run_id, stage)["outputs"]
            for name in input_stages(stage, run_id, params)}


def stage_facts(stage: str, run_id: str, params: dict) -> dict:
    """All that a stage's results follow from, by kind (KEY_FACTS), and "key", their hash.

    A finished stage with another key is stale. Names of cells and definitions are for sentences.
    """
    params = with_run_params(stage, run_id, params)
    inputs = load_inputs(stage, run_id, params)
    if stage not in STAGES_OF_PICTURES:
        inputs = {name: select_products(outputs) for name, outputs in inputs.items()}
    files = hash_named_files(params)
    files |= {name: file_sha256(split_function_name(name)[0])
              for name in params.get("rewards", ()) if ":" in name}
    files |= {name: model_fingerprint(params[name]) for name in MODEL_PARAMS if params.get(name)}
    if params.get("control_run"):
        files["control_run"] = _control_outputs(params, run_id, stage)
    for group in params.get("groups", ()):
        members = str(group).rpartition("=")[2].split(",")
        files |= {f"group {name}": _member_digest(name) for name in map(str.strip, members)}
    params = {name: value for name, value in params.items()
              if name not in (*EXECUTION_PARAMS, *NAMES_OF_RUNS)}
    facts = {"parameter": params,
             "file": {name: digest_json(value) for name, value in files.items()},
             "input": {name: digest_json(outputs) for name, outputs in inputs.items()},
             **describe_code(stage, _chosen_rewards(stage, run_id, params))}
    return {**facts, "key": digest_json([facts[kind] for kind in KEY_FACTS])}


def select_products(outputs: dict[str, str]) -> dict[str, str]:
    """`outputs` without the files that hold times and names of runs."""
    return {name: digest for name, digest in outputs.items() if name not in NOT_PRODUCTS}


def _chosen_rewards(stage: str, run_id: str, params: dict) -> list[str]:
    """The rewards of a stage: its own parameter's, else those of the 05 that it builds on."""
    default = {"rewards": stage_parameters("05_grpo")["rewards"].default}
    trained = run_folders.load_record("05_grpo", run_id) if "05_grpo" in STAGES[stage] else None
    return {**default, **(trained or {}).get("params", {}), **params}["rewards"]


def _member_digest(name: str) -> str:
    """SHA-256 of what a comparison reads of a run, or of a recorded run's file; "" without it."""
    path = PROJECT_ROOT / name
    if not name.endswith(".json"):
        run_id = run_folders.validate_run_id(name)
        path = run_folders.stage_folder("06_evaluate", run_id) / "run.json"
    return file_sha256(path) if path.is_file() else ""


def _control_outputs(params: dict, run_id: str, stage: str) -> dict[str, str]:
    control = run_folders.validate_run_id(params["control_run"])
    outputs = require_record("03_merge", control, stage)["outputs"]
    other = run_params(control, stage)
    if name := next((name for name in RUN_PARAMS if other[name] != params[name]), ""):
        raise ValueError(f"control_run '{control}' has another {name} ({other[name]}) than run "
                         f"'{run_id}' ({params[name]}); compare runs of one model and box format")
    return select_products(outputs)


def model_fingerprint(model: str) -> dict[str, str]:
    """File name -> digest, of a model folder's weights and settings; {} for a hub name."""
    folder = model_folder(model)
    files = [path for kind in MODEL_FILES for path in folder.glob(kind)]
    return {path.name: (_size_and_time(path) if path.stat().st_size > LARGE_FILE
                        else file_sha256(path)) for path in sorted(files) if path.is_file()}


def _size_and_time(path: Path) -> str:
    facts = path.stat()
    return f"{facts.st_size} {facts.st_mtime_ns}"


def hash_named_files(params: dict) -> dict[str, str]:
    """{"data", "images"}: SHA-256 of 01's own data and of its images; {} without own data."""
    path = PROJECT_ROOT / params.get("data", "scenes")
    if path == PROJECT_ROOT / "scenes" or not path.is_file():
        return {}
    root = PROJECT_ROOT / params["image_root"] if params["image_root"] else path.parent
    images = {name: root / name.removeprefix("file://") for name in _iter_texts(path)}
    facts = {name: _size_and_time(path) for name, path in images.items() if is_regular_file(path)}
    sizes = (int(fact.split()[0]) for fact in facts.values())
    digests = facts if sum(sizes) > LARGE_SET else _hash_images(root, images, facts)
    return {"data": file_sha256(path), "images": digest_json(digests)}


def _iter_texts(file: Path) -> Iterator[str]:
    """Every text in own data, since each may name an image."""
    is_by_line = file.suffix == ".jsonl"  # else a list, which has no lines to count
    for _, line in iter_lines(file) if is_by_line else [(1, file.read_bytes())]:
        for text in JSON_STRING.finditer(line or b""):
            with suppress(ValueError):  # stage 01 refuses the line
                yield json.loads(text.group())


def _hash_images(root: Path, images: dict[str, Path], facts: dict[str, str]) -> dict[str, str]:
    """Name -> SHA-256 of images that are there, or were; known files are not read again."""
    cache = run_folders.runs_root() / CACHE.format(
        hashlib.sha256(str(root).encode()).hexdigest()[:16])
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):  # none yet, or broken
        known = {}
    base = root.resolve()  # what leads out of it is refused by the stage, and not read here
    moved = [name for name, fact in facts.items() if known.get(name, [""])[0] != fact
             and images[name].resolve().is_relative_to(base)]
    for name in progress_bar(moved, "hash images", delay=5):
        known[name] = [facts[name], file_sha256(images[name])]
    with suppress(OSError):  # a cache that cannot be written costs time alone
        if moved:
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.tmp")  # of this process alone
            temporary.write_text(json.dumps(known))
            temporary.replace(cache)
    return {name: known[name][1] for name in images if name in known}


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
