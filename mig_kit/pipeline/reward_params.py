"""Which rewards of stage 05 can be chosen, and what goes with them; anything else is refused before
a run starts.
"""

import ast

from mig_kit.common import split_function_name, suggest_word

# the names of `mig_kit.rewards.REWARDS`, which is slow to import
KIT_REWARDS = ("format", "image", "box", "choice")
# what the curves of stage 05 hold besides the rewards
NAMES_OF_CURVES = ("step", "reward", "length", "entropy", "kl", "zero_std", "clipped_ratio",
                   "clip_ratio", "ratio", "staleness", "adapter", "method", "finding", "evidence")


def check_reward_params(params: dict, default_weights: dict[str, float]) -> None:
    """One sentence with the fix where rewards or their weights cannot act.

    params: all of 05. Raises FileNotFoundError where a file of rewards does not exist, else
    ValueError.
    """
    references = params["rewards"]
    if not references:
        raise ValueError("rewards is []; list names of rewards, such as [format, image, box, "
                         "choice], and functions as file.py:function")
    names = [_check_reference(text) for text in references]
    paths = {split_function_name(text)[0] for text in references if ":" in text}
    for listed, sentence in (
            (names, "two of rewards are called '{}'; leave one out or rename a function"),
            ([path.name for path in paths], "rewards are in two files called {}; rename one")):
        if repeated := sorted({name for name in listed if listed.count(name) > 1}):
            raise ValueError(sentence.format(repeated[0]))
    for name, weight in params["reward_weights"].items():
        if name not in names and default_weights.get(name) != weight:  # a default may be idle
            raise ValueError(f"reward_weights has '{name}', which is not one of rewards "
                             f"({', '.join(names)}); add it there, or take its weight out")


def _check_reference(text: str) -> str:
    """The name under which a reward is logged; raises as `check_reward_params`."""
    if ":" not in text:
        if text in KIT_REWARDS:
            return text
        hint = suggest_word(text, KIT_REWARDS) or f"the kit's are {', '.join(KIT_REWARDS)}"
        raise ValueError(f"rewards has '{text}'; {hint} A function of your own is written as "
                         "file.py:function")
    path, function = split_function_name(text)
    if not path.is_file():
        raise FileNotFoundError(f"rewards names {path}, which does not exist; give its path from "
                                "the project's folder, or an absolute one")
    if function in NAMES_OF_CURVES:
        raise ValueError(f"the curves of 05 have a '{function}' of their own; rename the function "
                         f"in {path}")
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}, line {line}: {error.args[0]}; correct it") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in functions:
        raise ValueError(f"{path} has no function '{function}'; it has "
                         f"{', '.join(functions) or 'none'}")
    return function
