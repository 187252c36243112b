"""Names: functions are verb phrases, values are nouns."""

import ast
import re

from mig_kit.common import PROJECT_ROOT

# participles, prepositions and nouns that once named functions and did not say what they do
VAGUE_FUNCTIONS = set(
    "stored opened confined checked needed finished outdated divided together shortened beside "
    "other forget joined said found given made whole naming showing sharing choosing pointing "
    "telling tallying defects pace expected machine flow verdict guards held".split())
VAGUE_VALUE = re.compile(r"^\s*(?:found|there|given|made|whole|said)\b[^=\n(]*=[^=]", re.MULTILINE)


def vague_functions(source: str) -> list[str]:
    definitions = (node.name for node in ast.walk(ast.parse(source))
                   if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return [name for name in definitions if name.strip("_") in VAGUE_FUNCTIONS]


def vague_values(source: str) -> list[str]:
    return [match.group().strip() for match in VAGUE_VALUE.finditer(source)]


def test_functions_and_values_say_what_they_are():
    vague = []
    for folder in ("mig_kit", "tests"):
        for path in sorted((PROJECT_ROOT / folder).rglob("*.py")):
            source = path.read_text()
            names = vague_functions(source) if folder == "mig_kit" else []
            vague += [f"{path}: {name}" for name in names + vague_values(source)]
    assert vague == []
