"""Which rewards of stage 05 can be chosen, and what goes with them; anything else is refused before
a run starts.
"""

import ast
import difflib

from mig_kit.common import split_function_name

# the names of `mig_kit.rewards.REWARDS`, which is slow to import
KIT_REWARDS = ("format", "image", "box", "choice", "box_step", "box_mg_thinker", "box_squared",
               "box_giou", "box_ungated")
# what the curves of stage 05 hold besides the rewards
NAMES_OF_CURVES = ("step", "reward", "length", "entropy", "kl", "zero_std", "clipped_ratio",
                   "clip_ratio", "ratio", "staleness", "adapter", "method", "finding", "evidence")


def check_reward_params(params: dict, default_weights: dict[str, float]) -> None:
    """One sentence with the fix where rewards, their weights or their penalty cannot act.

    params: all of 05. Raises FileNotFoundError where a file of rewards does not exist, else
    ValueError.
    """
    references = params["rewards"]
    if not references or not all(isinstance(text, str) for text in references):
        raise ValueError(f"rewards is {references!r}; list names of rewards, such as [format, "
                         "image, box, choice], and functions as file.py:function")
    names = [_check_reference(text) for text in references]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two of rewards are called '{repeated[0]}'; leave one out or rename a "
                         "function")
    _check_file_names(references)
    _check_weights(params["reward_weights"], names, default_weights)
    if params["hallucinated_image_penalty"] == "format" and "format" not in names:
        raise ValueError("hallucinated_image_penalty is 'format', which is not one of rewards; set "
                         "it to none or all")
    _check_groups(params)


def _check_reference(text: str) -> str:
    """The name under which a reward is logged; raises as `check_reward_params`."""
    if ":" not in text:
        if text in KIT_REWARDS:
            return text
        near = difflib.get_close_matches(text, KIT_REWARDS, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"the kit's are {', '.join(KIT_REWARDS)}"
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


def _check_groups(params: dict) -> None:
    """What weighs or selects whole groups needs the shared prefix, and a pool a single process."""
    for name, is_set in (("difficulty_weight", params["difficulty_weight"]),
                         ("prompt_pool", params["prompt_pool"] > 1)):
        if is_set and not params["share_prefix"]:
            raise ValueError(f"{name} needs share_prefix, because TRL's own trainer has none; set "
                             "share_prefix to true")
    if params["prompt_pool"] < 1 or params["rollout_steps"] < 0:
        name = "prompt_pool" if params["prompt_pool"] < 1 else "rollout_steps"
        raise ValueError(f"{name} is {params[name]}; use {'1' if name == 'prompt_pool' else '0'} "
                         "or more")
    for name in ("launcher", "server"):
        if params["prompt_pool"] > 1 and params[name]:
            raise ValueError(f"prompt_pool above 1 chooses among the groups of one process, so it "
                             f"does not go with a {name}; set {name} to \"\"")


def _check_file_names(references: list[str]) -> None:
    paths = {split_function_name(text)[0] for text in references if ":" in text}
    names = [path.name for path in paths]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"rewards are in two files called {repeated[0]}; rename one of them")


def _check_weights(weights: dict[str, float], names: list[str],
                   default_weights: dict[str, float]) -> None:
    """A weight of a reward that is not chosen may only be the default's."""
    for name, weight in weights.items():
        if name not in names and default_weights.get(name) != weight:
            raise ValueError(f"reward_weights has '{name}', which is not one of rewards "
                             f"({', '.join(names)}); add it there, or take its weight out")
