"""Replies to multiple-choice items: the option that is read, and whether it is correct."""

from collections.abc import Callable

from mig_kit.score.annotations import BLINK_CHOICES, BenchmarkItem
from mig_kit.score.choice_parsers import read_choice
from mig_kit.score.official import last_answer_block

UNREAD = "unread"  # the problem of a reply that no rule reads
NOT_A_LETTER = "no single letter in <answer>"


def read_item(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """`read_choice` of a reply to an item; items with an id are BLINK's."""
    choices = BLINK_CHOICES.get(item.task.replace(" ", "_"), ()) if item.id else ()
    return read_choice(response, item.options, item.choices or choices, bool(item.id))


def read_strictly(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """The letter that is all of the last <answer>, and the rule's name; ("", "") without one."""
    letter = (last_answer_block(response) or "").strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options
    return (letter, "the last <answer>") if is_option else ("", "")


def official_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem) by the letter that the reply explicitly chooses."""
    letter, _ = read_item(item, response)
    return float(letter == item.letter), "" if letter else UNREAD


def strict_choice(item: BenchmarkItem, response: str) -> tuple[float, str]:
    """(1 or 0, problem): the last <answer> must hold the letter and nothing else."""
    if last_answer_block(response) is None:
        return 0.0, "no <answer> block"
    letter, _ = read_strictly(item, response)
    return float(letter == item.letter), "" if letter else NOT_A_LETTER


CHOICE_JUDGES: dict[str, Callable[[BenchmarkItem, str], tuple[float, str]]] = {
    "official": official_choice, "strict": strict_choice}
