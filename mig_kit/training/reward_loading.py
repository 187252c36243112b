"""Rewards by name, the kit's and those in users' files, as 05 counts them; and users' advantages.

A completion's way to its reward: TRL calls a function of `grpo.reward_functions`, this calls
`Score.score_batch` with the answers of a batch, and that calls a function of `rewards` per answer.
"""

import asyncio
import importlib
import inspect
import math
import numbers
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError, split_function_name, write_atomically
from mig_kit.pipeline.reward_names import OWN_MODULE, list_own_files
from mig_kit.prompts import Answer, chat_messages, correct_answer
from mig_kit.rewards import REWARDS, Reward, cites_only_existing_images
from mig_kit.sample import Sample

FOLDER = "rewards"  # in a stage's folder: copies of the files of its rewards and advantage
RL_NEEDS = ("RL only strengthens what a model sometimes gets right; let it learn from traces first "
            "(teacher own or endpoint in 01), or start from the folder of a model that answers "
            "some of these questions (start_from of 05, with min_pass_rate 0 in 04); stages that "
            "have begun take other values with --force")


def copy_own_files(references: Sequence[str], folder: Path) -> None:
    """Copy the files of `references` ("file.py:function"), and what they use, to a stage's folder.
    """
    for path in list_own_files(references):
        (folder / FOLDER).mkdir(exist_ok=True)
        write_atomically(folder / FOLDER / path.name,
                         lambda temporary, path=path: shutil.copyfile(path, temporary))


def load_rewards(references: Sequence[str], folder: Path | None) -> dict[str, Reward]:
    """Name -> reward.

    Args:
        references: names that `reward_names.check_rewards` accepts.
        folder: the stage's, which holds copies of the files; None to read the files.
    Raises: whatever a file raises; UserError for a function that takes other arguments.
    """
    rewards = {}
    for text in references:
        if ":" not in text:
            rewards[text] = REWARDS[text]
            continue
        path, name = split_function_name(text)
        rewards[name] = load_function(text, folder)
        if not takes_batch(rewards[name]) and not _takes_answer(rewards[name]):
            raise UserError(f"{path}: a reward is called as {name}(answer, sample); write it so: "
                            "answer.text is the reply, answer.image, answer.box (in pixels of "
                            "the original) and answer.letter what it says")
    return rewards


def load_function(reference: str, folder: Path | None) -> Callable:
    """The function of "file.py:function"; folder and errors: as of `load_rewards`."""
    path, name = split_function_name(reference)
    return getattr(_import_file(folder / FOLDER / path.name if folder else path, path), name)


def takes_batch(reward: Callable) -> bool:
    """Whether a reward has TRL's form, of a whole batch: it takes TRL's arguments by name, and not
    the kit's two by position.
    """
    parameters = inspect.signature(reward).parameters
    kinds = [parameter.kind for parameter in parameters.values()]
    kind = inspect.Parameter
    takes_rest = kind.VAR_KEYWORD in kinds and kind.VAR_POSITIONAL not in kinds
    return bool(parameters.keys() & {"prompts", "completions", "completion_ids"}) or (
        takes_rest and len(kinds) < 3)


def _takes_answer(reward: Callable) -> bool:
    try:
        inspect.signature(reward).bind("answer", "sample")
    except TypeError:
        return False
    return True


def _import_file(copy: Path, path: Path) -> ModuleType:
    """The module in file `copy`; its tracebacks name `path`, of which it is the copy."""
    module = ModuleType(f"{OWN_MODULE}{path.stem}")
    module.__file__ = str(copy)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    with _import_from(copy):
        exec(compile(copy.read_text("utf-8-sig"), str(path), "exec"), module.__dict__)
    return module


@contextmanager
def _import_from(file: Path) -> Iterator[None]:
    """Imports the modules beside a file that it uses, read anew, as if it were a script."""
    names = {path.stem for path in list_own_files([f"{file.resolve()}:"])}
    others = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    writes_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.path.insert(0, str(file.parent.resolve()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        del sys.path[0]
        sys.dont_write_bytecode = writes_bytecode
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(others)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop for all calls of async rewards, as TRL has; in a thread, since a notebook has one."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


@contextmanager
def _show_reply(name: str, answers: Sequence[Answer]) -> Iterator[None]:
    """Adds to an error of a reward the shortest of the replies that it was given."""
    replies = [answer.text for answer in answers]
    try:
        yield
    except Exception as error:
        error.add_note(f"the reward '{name}' was given {min(replies, key=len)[:400]!r}"
                       + f", the shortest of {len(replies)} replies" * (len(replies) > 1))
        raise


@dataclass(frozen=True)
class Score:
    """A reward as 05 counts it: its value is checked, and lost if the penalty applies."""

    name: str
    reward: Reward
    box_format: BoxFormat
    is_penalised: bool = False

    def __call__(self, answer: Answer, sample: Sample) -> float | None:
        """What one answer earns; None if the reward does not apply, or judges whole batches."""
        return None if takes_batch(self.reward) else self.score_batch([answer], [sample])[0]

    def score_batch(self, answers: Sequence[Answer], samples: Sequence[Sample],
                    **given) -> list[float | None]:
        """What each answer of a batch earns.

        given: TRL's arguments, for a reward in its form, which also gets the columns question,
        sizes ((width, height), pixels), targets ((image number, box), pixels of the original),
        options, letter and solution (a correct answer as the model writes it).

        >>> from mig_kit.prompts import parse_reply
        >>> score = Score("thinks", lambda answer, sample: answer.thinking != "", BoxFormat())
        >>> score.score_batch([parse_reply("<think>A.</think>"), parse_reply("A.")], [None, None])
        [1.0, 0.0]
        """
        values = []
        if takes_batch(self.reward):
            arguments = given | _batch_columns(samples, self.box_format)
            with _show_reply(self.name, answers):
                results = self.reward(**arguments)
                if inspect.iscoroutine(results):
                    results = asyncio.run_coroutine_threadsafe(results, _event_loop()).result()
            values = [None if value != value else value for value in results]  # NaN is TRL's None
        else:
            for answer, sample in zip(answers, samples):
                with _show_reply(self.name, [answer]):
                    values.append(self.reward(answer, sample))
        if len(values) != len(answers):
            raise UserError(f"the reward '{self.name}' gave {len(values)} values for "
                            f"{len(answers)} completions")
        return list(map(self._check_value, values, answers, samples))

    def _check_value(self, value: object, answer: Answer, sample: Sample) -> float | None:
        """The value as a number, 0 if the penalty applies; UserError if it is none."""
        if type(value).__module__ in ("torch", "numpy"):  # of no dimension
            value = value.item()
        if value is None:
            return None
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(f"the reward '{self.name}' gave {value!r} for sample {sample.id}; "
                            "return a finite number, or None where it does not apply")
        is_lost = self.is_penalised and not cites_only_existing_images(answer, sample)
        return 0.0 if is_lost else float(value)


def _batch_columns(samples: Sequence[Sample], box_format: BoxFormat) -> dict[str, list]:
    """prompts and images as TRL gives them, and the columns of `Score.score_batch`."""
    from trl.data_utils import prepare_multimodal_messages  # takes seconds to import

    images = {id(sample): list(sample.images) for sample in samples}  # decoded once
    prompts = {id(sample): prepare_multimodal_messages(
        chat_messages(sample, box_format), images=images[id(sample)]) for sample in samples}
    return {
        "prompts": [prompts[id(sample)] for sample in samples],
        "images": [images[id(sample)] for sample in samples],
        "question": [sample.question for sample in samples],
        "sizes": [list(sample.sizes) for sample in samples],
        "targets": [list(sample.targets) for sample in samples],
        "options": [sample.options for sample in samples],
        "letter": [sample.letter for sample in samples],
        "solution": [correct_answer(sample, box_format) for sample in samples]}


def as_completions(replies: Sequence[str]) -> list[list[dict]]:
    """Replies in TRL's conversational form."""
    return [[{"role": "assistant", "content": reply}] for reply in replies]


def score_functions(rewards: dict[str, Reward], box_format: BoxFormat,
                    hallucinated_image_penalty: str = "format") -> dict[str, Score]:
    """Name -> Score of every reward.

    hallucinated_image_penalty: what a reply that cites a missing image loses: "none", the "format"
    reward, or "all" rewards.
    """
    penalised = {"none": (), "format": ("format",), "all": tuple(rewards)}
    return {name: Score(name, reward, box_format, name in penalised[hallucinated_image_penalty])
            for name, reward in rewards.items()}
