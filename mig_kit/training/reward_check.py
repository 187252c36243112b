"""What rewards pay for constructed replies to real questions, before a GPU hour is spent.

A table to read: the right reply should earn most, and a wrong one little. No model is asked.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, rescale_box, to_model_box
from mig_kit.common import UserError
from mig_kit.prompts import LETTERS, Answer, correct_answer, format_answer, read_reply
from mig_kit.rewards import REWARDS, Reward
from mig_kit.sample import Sample
from mig_kit.training.reward_loading import Score, as_completions, score_functions, takes_batch

KINDS = ("right", "empty", "wrong image", "no such image", "shifted", "doubled box", "whole image",
         "dot", "other frame", "hedged", "long", "malformed")
QUESTIONS = 24  # that replies are constructed for, some of each task
MOST_READ = 1000  # questions that these are chosen from
SHIFT = 0.3  # of a box's width and height
SUM = "weighted sum"


def construct_replies(sample: Sample, box_format: BoxFormat) -> dict[str, str]:
    """Kind -> reply to the sample, in the order of KINDS.

    In multiple choice "wrong image" is another letter, and no kind is about a box.
    """
    right = correct_answer(sample, box_format)
    if sample.options:
        wrong = LETTERS[(LETTERS.index(sample.letter) + 1) % len(sample.options)]
        answers = {"wrong image": wrong}
    else:
        image, box = sample.targets[0]
        size, is_absolute = sample.sizes[image - 1], box_format.coordinates == Coordinates.ABSOLUTE
        other = Coordinates.NORMALIZED_1000 if is_absolute else Coordinates.ABSOLUTE
        x1, y1, x2, y2 = seen = to_model_box(box, size, box_format)
        x, y = SHIFT * (x2 - x1), SHIFT * (y2 - y1)
        with_target = {target.image for target in sample.targets}
        wrong = format_answer(min({*range(1, len(sample.images) + 2)} - with_target), seen)
        width, height = coordinate_size(size, box_format.coordinates, box_format)
        dx, dy, center = (x2 - x1) / 2, (y2 - y1) / 2, ((x1 + x2) // 2, (y1 + y2) // 2)
        answers = {
            "wrong image": wrong,
            "no such image": format_answer(len(sample.images) + 1, seen),
            "shifted": format_answer(image, (x1 + x, y1 + y, x2 + x, y2 + y)),
            "doubled box": format_answer(image, (max(x1 - dx, 0), max(y1 - dy, 0),
                                                 min(x2 + dx, width), min(y2 + dy, height))),
            "whole image": format_answer(image, (0, 0, width, height)),
            "dot": format_answer(image, (*center, center[0] + 1, center[1] + 1)),
            "other frame": format_answer(
                image, rescale_box(box, size, coordinate_size(size, other, box_format)))}
    answers |= {"hedged": f"{right}, {wrong}", "long": right}
    replies = {kind: f"<think>{'Search. ' * (200 if kind == 'long' else 1)}</think>"
                     f"<answer>{answer}</answer>" for kind, answer in answers.items()}
    first = f"<think>Search. </think><answer>{right}</answer>"
    return {"right": first, "empty": "", **replies, "malformed": first.removesuffix("</answer>")}


def choose_questions(samples: Sequence[Sample]) -> list[Sample]:
    """About QUESTIONS of MOST_READ samples, evenly spaced: as many of each task, at least one.

    Raises: UserError if there is none.
    """
    if not samples:
        raise UserError("there is no question to try rewards on; give a file with questions")
    by_task: dict[tuple[str, bool], list[Sample]] = {}
    for sample in samples[::-(-len(samples) // MOST_READ)]:
        by_task.setdefault((sample.task, bool(sample.options)), []).append(sample)
    each = max(1, QUESTIONS // len(by_task))
    return [sample for group in by_task.values() for sample in group[:each]]


def tabulate_payments(rewards: dict[str, Reward], samples: Sequence[Sample], box_format: BoxFormat,
                      weights: dict[str, float], penalty: str = "none",
                      group: int = 1) -> pd.DataFrame:
    """What each reward, and their weighted sum, pays on average for each of KINDS.

    Args:
        weights: by name, 1 for others. penalty: hallucinated_image_penalty of 05.
        group: a batch has a multiple of so many replies, for a reward that divides it.
    A wrong reply that earns no less than the right one is printed as a warning.

    Returns: a row per kind, NaN where a reward does not apply. Each reply is scored alone; a reward
        in TRL's form has a second column, "NAME, mixed": all kinds in one batch.
    Raises: UserError for a value that is not finite, and if all replies earn the same; what a
        reward raises.
    """
    questions = choose_questions(samples)
    answers = [{kind: read_reply(reply, sample, box_format)
                for kind, reply in construct_replies(sample, box_format).items()}
               for sample in questions]
    columns, parts = {}, []
    for name, score in score_functions(rewards, box_format, penalty).items():
        is_of_batch = takes_batch(score.reward)
        columns[name] = _pay_all(score, questions, answers, group if is_of_batch else 1)
        if is_of_batch:
            columns[f"{name}, mixed"] = _pay_all(score, questions, answers, group, is_mixed=True)
        if rewards[name] is not REWARDS.get(name) and columns[name].isna().all(axis=None):
            raise UserError(f"the reward '{name}' gave None for every reply, so nothing would "
                            "learn from it: it may lack a return; return a number, or None only "
                            "for questions that it is not about")
        parts.append(columns[name] * weights.get(name, 1.0))
    total = sum(part.fillna(0) for part in parts).where(
        ~np.all([part.isna() for part in parts], axis=0))
    if not ((total.max(axis=1) - total.min(axis=1)) > 1e-6).any():
        raise UserError(f"the rewards {', '.join(rewards)} pay the same for every reply to a "
                        "question, so nothing can be learnt; mend them, or add one that is about "
                        "these questions")
    for kind in total.columns.difference(["right", "long"], sort=False):
        wrong, right = total[[kind, "right"]].dropna().mean()  # of the same questions
        if wrong >= right - 1e-6:
            print(f"warning: the reply '{kind}' earns {wrong:.2f}, the right one no more than "
                  f"{right:.2f}: training would learn it", flush=True)
    if len(rewards) > 1 or weights.get(next(iter(rewards)), 1.0) != 1:
        columns[SUM] = total
    return pd.DataFrame({name: values.mean() for name, values in columns.items()},
                        index=pd.Index(KINDS, name="reply"))


def _pay_all(score: Score, questions: list[Sample], answers: list[dict[str, Answer]], group: int,
             is_mixed: bool = False) -> pd.DataFrame:
    """(questions, kinds); None counts 0 where other replies to the question are paid."""
    rows = []
    for sample, by_kind in zip(questions, answers):
        batch = list(by_kind.values())
        if is_mixed:
            paid = _pay(score, batch + [by_kind["empty"]] * (-len(batch) % group), sample)
        else:
            paid = [_pay(score, [answer] * group, sample)[0] for answer in batch]
        rows.append(dict(zip(by_kind, paid if np.isnan(paid).all() else np.nan_to_num(paid))))
    return pd.DataFrame(rows, columns=KINDS)


def _pay(score: Score, answers: list[Answer], sample: Sample) -> list[float]:
    """What the answers earn, as one batch; NaN for None. Their tokens are letters."""
    fields, replies = {}, [answer.text for answer in answers]
    if takes_batch(score.reward):
        from transformers import TrainerState

        fields = {"completions": as_completions(replies), "trainer_state": TrainerState(),
                  "completion_ids": [[*map(ord, reply), 0] for reply in replies],
                  "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    values = score.score_batch(answers, [sample] * len(answers), **fields)
    return [np.nan if value is None else value for value in values]
