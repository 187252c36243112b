"""Rewards by name: the kit's own, and functions in files of users, tried before anything is
trained.
"""

import inspect
import math
import numbers
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from types import ModuleType

from mig_kit.boxes import BoxFormat
from mig_kit.common import split_function_name, write_atomically
from mig_kit.prompts import chat_messages, correct_answer
from mig_kit.rewards import REWARDS, Reward, cites_only_existing_images
from mig_kit.sample import Sample

Score = Callable[[str, Sample], float | None]  # a reward of a reply, as 05 counts it
MOST_TRIED = 1000  # questions that a reward without a value is tried on
FOLDER = "rewards"  # of a stage's folder, with copies of the files that its rewards are from
RL_NEEDS = ("RL makes likelier what a model sometimes gets right; let it learn from traces first "
            "(teacher own or endpoint in 01), or start from the folder of a model that answers "
            "some of these questions (start_from of 05, with min_pass_rate 0 in 04)")


def copy_reward_files(references: Sequence[str], folder: Path) -> None:
    """Copy the files that `references` name into the stage's folder, from where they are loaded.

    So a run documents what it was trained with, and who edits a file meanwhile changes nothing.
    """
    for path in {split_function_name(text)[0] for text in references if ":" in text}:
        (folder / FOLDER).mkdir(exist_ok=True)
        write_atomically(folder / FOLDER / path.name,
                         lambda temporary, path=path: shutil.copyfile(path, temporary))


def load_rewards(references: Sequence[str], folder: Path) -> dict[str, Reward]:
    """name -> function, in the order of `references`: names of the kit's and "file.py:function",
    which may have the kit's form or TRL's (`_adapt_trl_reward`).

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
        reward = getattr(module, name, None)
        if not callable(reward):
            raise ValueError(f"{path} has no function '{name}'")
        is_trls = "completions" in inspect.signature(reward).parameters
        rewards[name] = _adapt_trl_reward(reward) if is_trls else reward
    return rewards


def _adapt_trl_reward(reward: Callable) -> Reward:
    """A reward in TRL's form, f(prompts, completions, **columns) -> [number or None], in the kit's.

    It is called with one completion at a time. Columns: question, sizes ((width, height) of each
    image, pixels), targets ((image number, box) pairs, pixels of the original), options and letter.
    """
    @wraps(reward)
    def adapted(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
        columns = {"question": sample.question, "sizes": list(sample.sizes),
                   "targets": list(sample.targets), "options": sample.options,
                   "letter": sample.letter}
        values = reward(
            prompts=[chat_messages(sample, box_format)],
            completions=[[{"role": "assistant", "content": reply}]], trainer_state=None,
            log_extra=lambda *_: None, log_metric=lambda *_: None,
            **{name: [value] for name, value in columns.items()})
        if len(values) != 1:
            raise ValueError(f"it gave {len(values)} values for one completion")
        return values[0]

    return adapted


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
    try:
        value = reward(reply, sample, box_format)
    except Exception as error:
        place = describe_error(error, _source(reward)[0])
        raise ValueError(f"the reward '{name}' failed in {place}") from error
    if value is None:
        return None
    if not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"the reward '{name}'{_source(reward)[1]} gave {value!r} for sample "
                         f"{sample.id}; return a finite number, or None where it does not apply")
    return float(value)


def _source(reward: Reward) -> tuple[str, str]:
    """(file, " (file, line n)") of a function; both "" of what is none."""
    code = getattr(inspect.unwrap(reward), "__code__", None)
    return (code.co_filename, f" ({code.co_filename}, line {code.co_firstlineno})") if code else (
        "", "")


def score_functions(rewards: dict[str, Reward], box_format: BoxFormat,
                    hallucinated_image_penalty: str = "format") -> dict[str, Score]:
    """The rewards by name, checked and with the penalty, as functions of reply and sample.

    hallucinated_image_penalty: what a reply loses whose reasoning cites an image that the prompt
    does not have: "none", the "format" reward, or "all" of them.
    """
    penalised = {"none": (), "format": ("format",), "all": tuple(rewards)}
    return {name: partial(_score, name, reward, box_format,
                          name in penalised[hallucinated_image_penalty])
            for name, reward in rewards.items()}


def _score(name: str, reward: Reward, box_format: BoxFormat, is_penalised: bool, reply: str,
           sample: Sample) -> float | None:
    value = compute_reward(name, reward, reply, sample, box_format)
    if value is None:
        return None
    return 0.0 if is_penalised and not cites_only_existing_images(reply, sample) else value


def correct_reply(sample: Sample, box_format: BoxFormat) -> str:
    """A well-formed reply that answers the sample correctly."""
    return f"<think>Search.</think><answer>{correct_answer(sample, box_format)}</answer>"


def try_rewards(rewards: dict[str, Reward], samples: Sequence[Sample],
                box_format: BoxFormat) -> None:
    """Score a correct and an empty reply to the first question of each kind; raises as
    `compute_reward`, and ValueError for a reward of a file that has no value for any question.
    """
    kinds = {(bool(sample.options), bool(sample.targets), sample.find_all): sample
             for sample in reversed(samples[:64])}
    for name, reward in rewards.items():
        def has_value(sample: Sample, name=name, reward=reward) -> bool:
            values = [compute_reward(name, reward, reply, sample, box_format)
                      for reply in (correct_reply(sample, box_format), "")]
            return values != [None, None]

        counts = any([has_value(sample) for sample in kinds.values()])  # tries every kind
        is_own = reward is not REWARDS.get(name)
        if is_own and not counts and not any(map(has_value, samples[:MOST_TRIED])):
            raise ValueError(
                f"the reward '{name}'{_source(reward)[1]} gave None for every reply, so nothing "
                "would learn from it: it may lack a return; return a number, or None only for "
                "questions that it is not about")
