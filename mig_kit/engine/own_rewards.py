"""Rewards by name: the kit's own, and functions in files of users, tried before anything is
trained.
"""

import math
import numbers
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from mig_kit.boxes import BoxFormat
from mig_kit.common import split_function_name, write_atomically
from mig_kit.prompts import correct_answer
from mig_kit.rewards import REWARDS, Reward, cites_only_existing_images
from mig_kit.sample import Sample

Score = Callable[[str, Sample], float | None]  # a reward of a reply, as 05 counts it
FOLDER = "rewards"  # of a stage's folder, with copies of the files that its rewards are from


def copy_reward_files(references: Sequence[str], folder: Path) -> None:
    """Copy the files that `references` name into the stage's folder, from where they are loaded.

    So a run documents what it was trained with, and who edits a file meanwhile changes nothing.
    """
    for path in {split_function_name(text)[0] for text in references if ":" in text}:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_atomically(folder / FOLDER / path.name,
                         lambda temporary, path=path: shutil.copyfile(path, temporary))


def load_rewards(references: Sequence[str], folder: Path) -> dict[str, Reward]:
    """name -> function, in the order of `references`: names of the kit's and "file.py:function".

    folder: of the stage, which has copies of the files. ValueError, with file and line, where a
    file cannot be imported or has no such function.
    """
    rewards = {}
    for text in references:
        if ":" not in text:
            rewards[text] = REWARDS[text]
            continue
        path, name = split_function_name(text)
        module = _import_file(folder / FOLDER / path.name, path)
        if not callable(getattr(module, name, None)):
            raise ValueError(f"{path} has no function '{name}'")
        rewards[name] = getattr(module, name)
    return rewards


def _import_file(copy: Path, path: Path) -> ModuleType:
    """The module in file `copy`, whose errors name the file `path` that it is a copy of."""
    module = ModuleType(f"own_rewards_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(copy.read_text(), str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ValueError(f"rewards: {describe_error(error, str(path))}") from error
    return module


def describe_error(error: Exception, file: str) -> str:
    """"file, line n: class: message" of an error; n: the last line of the file that it went
    through.
    """
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f"{file}, line {lines[-1]}" if lines else file
    return f"{place}: {type(error).__name__}: {error}"


def compute_reward(name: str, reward: Reward, reply: str, sample: Sample,
                   box_format: BoxFormat) -> float | None:
    """What the reward gives, a finite number or None; ValueError, with file and line, for anything
    else and for an error in it.
    """
    code = getattr(reward, "__code__", None)
    file = code.co_filename if code else ""
    try:
        value = reward(reply, sample, box_format)
    except Exception as error:
        raise ValueError(f"the reward '{name}' failed in {describe_error(error, file)}") from error
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        line = f", line {code.co_firstlineno}" if code else ""
        raise ValueError(f"the reward '{name}' ({file}{line}) gave {value!r} for sample "
                         f"{sample.id}; return a finite number, or None where it does not apply")
    return float(value)


def score_functions(rewards: dict[str, Reward], box_format: BoxFormat,
                    hallucinated_image_penalty: str = "format") -> dict[str, Score]:
    """The rewards by name, checked and with the penalty, as functions of reply and sample.

    hallucinated_image_penalty: what a reply loses whose reasoning cites an image that the prompt
    does not have: "none", the "format" reward, or "all" of them.
    """
    penalised = {"none": (), "format": ("format",), "all": tuple(rewards)}
    return {name: _score_function(name, reward, box_format,
                                  name in penalised[hallucinated_image_penalty])
            for name, reward in rewards.items()}


def _score_function(name: str, reward: Reward, box_format: BoxFormat, is_penalised: bool) -> Score:
    def score(reply: str, sample: Sample) -> float | None:
        value = compute_reward(name, reward, reply, sample, box_format)
        if value is None:
            return None
        return 0.0 if is_penalised and not cites_only_existing_images(reply, sample) else value

    return score


def correct_reply(sample: Sample, box_format: BoxFormat) -> str:
    """A well-formed reply that answers the sample correctly."""
    return f"<think>Search.</think><answer>{correct_answer(sample, box_format)}</answer>"


def try_rewards(rewards: dict[str, Reward], samples: Sequence[Sample],
                box_format: BoxFormat) -> None:
    """Score a correct and an empty reply to the first question of each kind; raises as
    `compute_reward`.
    """
    kinds = {(bool(sample.options), bool(sample.targets), sample.find_all): sample
             for sample in reversed(samples[:64])}
    for sample in kinds.values():
        for reply in (correct_reply(sample, box_format), ""):
            for name, reward in rewards.items():
                compute_reward(name, reward, reply, sample, box_format)
