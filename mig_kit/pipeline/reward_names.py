"""Users' functions in the parameters of 05 (rewards, advantage), checked without running them."""

import ast
import symtable
from collections.abc import Mapping, Sequence
from pathlib import Path

from mig_kit.common import UserError, split_function_name, suggest_word
from mig_kit.rewards import REWARDS

OWN_MODULE = "own_rewards_"  # what the name of a user's module begins with
# what the curves of stage 05 hold besides the rewards
NAMES_OF_CURVES = ("step", "reward", "length", "entropy", "kl", "zero_std", "clipped_ratio",
                   "logp_difference", "clip_ratio", "ratio", "shared", "method", "finding",
                   "evidence", "truth", "coverage")


def list_own_functions(params: Mapping) -> list[str]:
    """The values "file.py:function" of rewards and advantage in the parameters of 05."""
    return [text for text in (*params.get("rewards", ()), params.get("advantage", ""))
            if ":" in text]


def list_own_files(references: Sequence[str]) -> list[Path]:
    """The files of "file.py:function" references, and what these use from their folder: modules
    that they import, in turn, and names in a line `FILES = [...]`. The kit's names are passed over.
    """
    files = list(dict.fromkeys(split_function_name(text)[0] for text in references if ":" in text))
    for path in files:  # it grows
        files += [file for file in dict.fromkeys(_list_used(path)) if file not in files]
    return files


def _list_used(path: Path) -> list[Path]:
    if path.suffix != ".py":
        return []
    names, files = [], []
    for node in ast.walk(ast.parse(path.read_text("utf-8-sig"), path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FILES":
            files += ast.literal_eval(node.value)
    modules = [path.with_name(f"{name}.py") for name in names]
    return [file for file in modules if file.is_file()] + [path.with_name(name) for name in files]


def check_rewards(references: Sequence[str], weights: Mapping[str, float],
                  default_weights: Mapping[str, float], advantage: str = "") -> None:
    """UserError if 05 could not count these rewards, or if a weight (no default) is of none.

    references: names of the kit's rewards, or "file.py:function". advantage: the latter, or "".
    """
    if advantage and ":" not in advantage:
        raise UserError(f"advantage is '{advantage}'; write file.py:function, or \"\" for TRL's")
    if advantage:
        _check_function("advantage", advantage)
    if not references:
        raise UserError("rewards is []; list names of rewards, such as [format, image, box]")
    names = [_reward_name(text) for text in references]
    files = [path.name for path in list_own_files([*references, advantage])]
    for listed, sentence in (
            (names, "two of rewards are called '{}'; leave one out or rename a function"),
            (files, "rewards or advantage use two files called {}; rename one")):
        if repeated := sorted({name for name in listed if listed.count(name) > 1}):
            raise UserError(sentence.format(repeated[0]))
    for name, weight in weights.items():
        if name not in names and default_weights.get(name) != weight:
            raise UserError(f"reward_weights has '{name}', which is not one of rewards "
                            f"({', '.join(names)}); add it there, or take its weight out")


def _reward_name(text: str) -> str:
    """The name under which a reward is logged; raises as `check_rewards`."""
    if text in REWARDS:
        return text
    if ":" not in text:
        hint = suggest_word(text, REWARDS) or f"the kit's are {', '.join(REWARDS)}"
        raise UserError(f"rewards has '{text}'; {hint} A function of your own is written as "
                        "file.py:function")
    path, function = _check_function("rewards", text)
    if function in NAMES_OF_CURVES:
        raise UserError(f"the curves of 05 have a '{function}' of their own; rename the function "
                        f"in {path}")
    return function


def _check_function(name: str, text: str) -> tuple[Path, str]:
    """(file, function) of a value of parameter `name`; UserError if one of them does not exist."""
    path, function = split_function_name(text)
    if not path.is_file():
        raise UserError(f"{name} names {path}, which does not exist; give its path from the "
                        "project, or an absolute one")
    source = path.read_text("utf-8-sig")
    table = symtable.symtable(source, str(path), "exec")  # a SyntaxError shows its line
    names = [symbol.get_name() for symbol in table.get_symbols()
             if symbol.is_assigned() or symbol.is_imported()]
    if function not in names:
        raise UserError(f"{path} has no function '{function}'; it has {', '.join(names) or 'none'}")
    return path, function
