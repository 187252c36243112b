"""What a reward pays for constructed replies to real questions, before a GPU hour is spent.

The right reply must earn most, an empty one less, and no wrong one more, such as the right box in
another frame. Replies are constructed, not drawn from a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mig_kit.boxes import BoxFormat, Coordinates, coordinate_size, iou, rescale_box
from mig_kit.common import UserError
from mig_kit.prompts import LETTERS, correct_answer, format_box
from mig_kit.rewards import REWARDS, Reward
from mig_kit.sample import Sample
from mig_kit.training.reward_loading import BatchReward, Score, as_completions, score_functions

QUESTIONS = 24  # that replies are constructed for, evenly spaced
MOST_TRIED = 1000  # questions that a reward without a value is tried on
CONSTANTS = 8  # boxes of other questions, and whole images, that are given to all questions
# by how much a wrong reply may earn more, as a share of the range from the lowest to the right one:
# of a sum of rewards (boxes are rounded), and of one part of it (which may depend on the length)
MARGIN, PART_MARGIN = 0.01, 0.2
SAME = 0.8  # IoU from which a box in another frame is the right one
RIGHT, EMPTY, CONSTANT, FORMAT = "right", "empty", "the best constant box", "format only"
WRONG_IMAGE, WRONG_LETTER = "right box in the wrong image", "another letter"
# wrong boxes: (shift, factor) of width and height, other frames, and orders of the four numbers
CHANGES = {"shifted by 10 %": (0.1, 1), "shifted by 30 %": (0.3, 1), "twice as large": (0, 2),
           "half as large": (0, 0.5)}
FRAMES = {"as pixels of the original": Coordinates.PIXELS,
          "as pixels of the resized image": Coordinates.ABSOLUTE,
          "as 0 to 1000": Coordinates.NORMALIZED_1000, "as 0 to 1": Coordinates.NORMALIZED_1}
ORDERS = {"as x, y, width, height": lambda a, b, c, d: (a, b, c - a, d - b),
          "as y1, x1, y2, x2": lambda a, b, c, d: (b, a, d, c)}
# of the right reply's form
WRONG_ANSWERS = (WRONG_IMAGE, WRONG_LETTER, *CHANGES, *FRAMES, "as percent", *ORDERS)


def _reply(answer: str) -> str:
    return f"<think>Search.</think><answer>{answer}</answer>"


def _box_reply(boxes: list[tuple[int, tuple]]) -> str:
    texts = [format_box(box) if max(box) > 2 else f"[{','.join(f'{x:.2f}' for x in box)}]"
             for _, box in boxes]
    return _reply(", ".join(f'{{"image": {image}, "box": {text}}}'
                            for (image, _), text in zip(boxes, texts)))


def _change(box: tuple, shift: float, factor: float) -> tuple:
    x1, y1, x2, y2 = box
    x, y, width, height = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    x, y, width, height = x + shift * width, y + shift * height, factor * width, factor * height
    return max(0, x - width / 2), max(0, y - height / 2), x + width / 2, y + height / 2


def constructed_replies(sample: Sample, box_format: BoxFormat) -> dict[str, str]:
    """Kind -> reply to the sample; RIGHT is the first, and all others are wrong.

    A kind that would be right is left out, such as a frame that is the right one.
    """
    answer = correct_answer(sample, box_format)
    replies = {RIGHT: _reply(answer), EMPTY: ""}
    if sample.targets or sample.options:
        cut = _reply(answer[:len(answer) // 2]).removesuffix("</answer>")
        replies |= {FORMAT: _reply(""), "cut": cut}
    if sample.options:
        other = LETTERS[(LETTERS.index(sample.letter) + 1) % len(sample.options)]
        return replies | {WRONG_LETTER: _reply(other)}
    if not sample.targets:
        return replies
    targets = sample.targets[:1]
    sizes = [sample.sizes[image - 1] for image, _ in targets]

    def scale(measure: Coordinates | None, factor: float = 1) -> list[tuple]:
        return [rescale_box(box, size, coordinate_size(size, measure, box_format) if measure
                            else (factor, factor)) for (_, box), size in zip(targets, sizes)]

    right = scale(box_format.coordinates)
    boxes = {name: [_change(box, *change) for box in right] for name, change in CHANGES.items()}
    frames = {name: scale(measure) for name, measure in FRAMES.items()}
    frames |= {"as percent": scale(None, 100),
               **{name: [order(*box) for box in right] for name, order in ORDERS.items()}}
    boxes |= {name: scaled for name, scaled in frames.items()
              if min(map(iou, scaled, right)) < SAME}
    images = [image for image, _ in targets]
    replies |= {name: _box_reply([*zip(images, changed)]) for name, changed in boxes.items()}
    if others := {*range(1, len(sample.images) + 1)} - {image for image, _ in sample.targets}:
        replies[WRONG_IMAGE] = _box_reply([(min(others), right[0])])
    return replies | {
        "no box": _reply(f'{{"image": {images[0]}}}'),
        "a box too many": _box_reply([*zip(images, right), (images[0],
                                                            _change(right[0], 0.5, 0.5))]),
        '"none"': _reply("none")}


def _constant_replies(samples: Sequence[Sample], box_format: BoxFormat) -> list[list[str]]:
    """For each sample the same boxes, measured by its images; [] for a sample with options."""
    boxes = [(target.image, rescale_box(target.box, sample.sizes[target.image - 1], (1, 1)))
             for sample in samples for target in sample.targets[:1]]
    boxes = [(1, (0, 0, 1, 1)), (2, (0, 0, 1, 1)), *boxes[::max(1, len(boxes) // CONSTANTS)]]

    def write(sample: Sample, number: int, box: tuple) -> str:
        number = min(number, len(sample.images))
        size = coordinate_size(sample.sizes[number - 1], box_format.coordinates, box_format)
        return _box_reply([(number, rescale_box(box, (1, 1), size))])

    return [[] if sample.options else [write(sample, *box) for box in boxes] for sample in samples]


@dataclass(frozen=True)
class Payment:
    """What kinds of replies earn; values: kind -> (questions,) float, NaN where it is not known."""

    name: str
    values: dict[str, np.ndarray]
    is_sum: bool  # what a reply earns in all; else a part of a sum

    def _mean(self, kind: str) -> float:
        return float(np.nanmean(self.values[kind]))

    def _gap(self, kind: str) -> float:
        """How much more the kind earns than the right reply to the same questions."""
        gaps = self.values[kind] - self.values[RIGHT]
        return float(np.nanmean(gaps)) if not np.isnan(gaps).all() else -np.inf

    def _describe(self, kind: str) -> str:
        asked = ~np.isnan(self.values[kind] - self.values[RIGHT])
        return (f"{kind} earns {self.values[kind][asked].mean():.2f} and the right reply "
                f"{self.values[RIGHT][asked].mean():.2f}")

    def judge(self) -> tuple[list[str], list[str]]:
        """(faults, warnings), each a sentence."""
        table = np.array(list(self.values.values()))
        known = ~np.isnan(table).all(0)
        spread = np.nanmax(table[:, known], 0) - np.nanmin(table[:, known], 0)
        is_blind = spread < 1e-6
        if is_blind.all():
            sentence = f"every reply earns the same ({table[:, known][0, 0]:.2f})"
            return ([sentence], []) if self.is_sum else ([], [sentence])
        margin = (MARGIN if self.is_sum else PART_MARGIN) * max(
            self._mean(RIGHT) - min(map(self._mean, self.values)), 1e-6)
        faults = [self._describe(kind) for kind in self.values
                  if (self.is_sum or kind in WRONG_ANSWERS) and self._gap(kind) > margin]
        warnings = []
        if self.is_sum and -margin <= self._gap(EMPTY) <= margin:
            faults.append(self._describe(EMPTY))
        if is_blind.any():
            warnings.append(f"to {is_blind.sum()} of {len(is_blind)} questions every reply earns "
                            "the same; return None where the reward does not apply")
        if faults or not self.is_sum:
            return faults, warnings
        gain = -self._gap(EMPTY)
        for kind, advice in ((FORMAT, "it pays for the format: add a reward of the answer, or "
                                      "weight it more"),
                             (CONSTANT, "it hardly depends on the image")):
            if kind in self.values and self._gap(kind) > -gain / 2:
                warnings.append(f"{self._describe(kind)}, more than half: {advice}")
        warnings += [f"{self._describe(kind)}: it does not judge {part}" for kind, part in (
            (WRONG_IMAGE, "the image"), (WRONG_LETTER, "the letter"))
            if kind in self.values and self._gap(kind) > -margin]
        return faults, warnings

    def table(self) -> str:
        """A line per kind: what it earns, and to how many questions it was given."""
        return "\n".join(f"{self._mean(kind):8.2f}  {kind} ({(~np.isnan(values)).sum()})"
                         for kind, values in self.values.items())


def measure_payments(rewards: dict[str, Reward], samples: Sequence[Sample], box_format: BoxFormat,
                     weights: dict[str, float], penalty: str = "none",
                     group: int = 1) -> list[Payment]:
    """What the weighted sum pays, then what each of the user's own rewards pays.

    Args:
        weights: by name, 1 for others. penalty: hallucinated_image_penalty of 05.
        group: replies to a question come in multiples of it, for a reward that divides a batch.
    Returns: [] if no reward is about one of the questions that are tried.
    Raises: UserError for a reward that never has a value, or one that is no number.
    """
    if not samples:
        raise UserError("there is no question to try rewards on; give a file with questions")
    count = min(QUESTIONS, len(samples))
    questions = [samples[len(samples) * number // count] for number in range(count)]
    replies = [constructed_replies(sample, box_format) for sample in questions]
    constants = _constant_replies(questions, box_format)
    kinds = list(dict.fromkeys(kind for by_kind in replies for kind in by_kind))
    scores = score_functions(rewards, box_format, penalty)
    payments, total = [], {}
    for name, score in scores.items():
        values = {kind: np.full(count, np.nan) for kind in kinds}
        of_constants = np.full((count, max(map(len, constants))), np.nan)
        for index, (sample, by_kind, more) in enumerate(zip(questions, replies, constants)):
            paid = np.array(_pay(score, [*by_kind.values(), *more], sample, group))
            if not np.isnan(paid).all():  # None, where other replies to the question are paid
                paid = np.nan_to_num(paid)
            for kind, value in zip(by_kind, paid):
                values[kind][index] = value
            of_constants[index, :len(more)] = paid[len(by_kind):]
        values |= {f"constant {number}": column for number, column in enumerate(of_constants.T)}
        values = {kind: weights.get(name, 1.0) * column for kind, column in values.items()}
        if rewards[name] is not REWARDS.get(name):
            if np.isnan(list(values.values())).all():
                _require_value(score, samples, group)
            elif weights.get(name, 1.0):
                payments.append(Payment(name, _best_constant(values), False))
        for kind, column in values.items():
            total.setdefault(kind, []).append(column)
    total = {kind: np.where(np.isnan(columns).all(0), np.nan, np.nansum(columns, 0))
             for kind, columns in total.items()}
    if np.isnan(list(total.values())).all():
        return []
    of_sum = Payment(" + ".join(rewards), _best_constant(total), True)
    return [of_sum, *(payments if len(rewards) > 1 else [])]


def _best_constant(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`values` with the best of the constant boxes alone, and without kinds that have no value."""
    values = {kind: column for kind, column in values.items() if not np.isnan(column).all()}
    constants = [values.pop(kind) for kind in list(values) if kind.startswith("constant ")]
    best = {CONSTANT: max(constants, key=np.nanmean)} if constants else {}
    return values | best


def _pay(score: Score, replies: list[str], sample: Sample, group: int = 1) -> list[float]:
    """What the replies earn, as one batch; NaN for None. Their tokens are letters."""
    padded, fields = [*replies, *[""] * (-len(replies) % group)], {}
    if isinstance(score.reward, BatchReward):
        from transformers import TrainerState

        fields = {"completions": as_completions(padded), "trainer_state": TrainerState(),
                  "completion_ids": [[*map(ord, reply), 0] for reply in padded],
                  "log_extra": lambda *_: None, "log_metric": lambda *_: None}
    values = score.score_batch(padded, [sample] * len(padded), **fields)[:len(replies)]
    return [np.nan if value is None else value for value in values]


def _require_value(score: Score, samples: Sequence[Sample], group: int) -> None:
    """UserError if a reward has no value for the right reply to any of many questions."""
    if not any(value == value for sample in samples[:MOST_TRIED] for value in _pay(
            score, [_reply(correct_answer(sample, score.box_format)), ""], sample, group)):
        raise UserError(f"the reward '{score.name}' gave None for every reply, so nothing would "
                        "learn from it: it may lack a return; return a number, or None only for "
                        "questions that it is not about")


def require_sound_rewards(rewards: dict[str, Reward], samples: Sequence[Sample],
                          box_format: BoxFormat, weights: dict[str, float],
                          penalty: str = "none", group: int = 1) -> None:
    """Print what is remarkable in what the rewards pay; see `measure_payments`.

    Raises: UserError if a wrong reply earns more than the right one, or an empty one as much.
    """
    if of_batches := [name for name in rewards if isinstance(rewards[name], BatchReward)]:
        print(f"warning: {', '.join(of_batches)} judge whole batches, as TRL gives them: the "
              "replies that are kept, and the report, show the other rewards alone", flush=True)
    for payment in measure_payments(rewards, samples, box_format, weights, penalty, group):
        faults, warnings = payment.judge()
        for sentence in warnings:
            print(f"warning: {payment.name}: {sentence}", flush=True)
        if faults:
            print(payment.table(), flush=True)
            raise UserError(f"the reward {payment.name} pays for the wrong thing: "
                            f"{'; '.join(faults)}; mend it, or look at it: mig-kit reward check")
