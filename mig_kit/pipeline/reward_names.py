"""Users' functions in the parameters of 05 (rewards, advantage), checked without running them."""

import symtable
from collections.abc import Mapping, Sequence
from pathlib import Path

from mig_kit.common import UserError, split_function_name, suggest_word
from mig_kit.rewards import REWARDS

# what the curves of stage 05 hold besides the rewards
NAMES_OF_CURVES = ("step", "reward", "length", "entropy", "kl", "zero_std", "clipped_ratio",
                   "logp_difference", "clip_ratio", "ratio", "shared", "method", "finding",
                   "evidence", "truth", "coverage")


def list_own_functions(params: Mapping) -> list[str]:
    """The values "file.py:function" of rewards and advantage in the parameters of 05."""
    return [text for text in (*params.get("rewards", ()), params.get("advantage", ""))
            if ":" in text]


def list_own_files(references: Sequence[str]) -> set[Path]:
    """The files of "file.py:function" references; names of the kit's are passed over."""
    return {split_function_name(text)[0] for text in references if ":" in text}


def check_advantage(reference: str) -> None:
    """UserError for what is neither "" nor "file.py:function"."""
    if reference and ":" not in reference:
        raise UserError(f"advantage is '{reference}'; write file.py:function, or \"\" for TRL's")
    if reference:
        _check_function("advantage", reference)


def check_rewards(references: Sequence[str], weights: Mapping[str, float],
                  default_weights: Mapping[str, float]) -> None:
    """UserError if 05 could not count these rewards, or if a weight (no default) is of none.

    references: names of the kit's rewards, or "file.py:function".
    """
    if not references:
        raise UserError("rewards is []; list names of rewards, such as [format, image, box]")
    names = [_reward_name(text) for text in references]
    files = [path.name for path in list_own_files(references)]
    for listed, sentence in (
            (names, "two of rewards are called '{}'; leave one out or rename a function"),
            (files, "rewards are in two files called {}; rename one")):
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
