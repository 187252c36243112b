"""The option that a reply to a multiple-choice item chooses, by protocol."""

from collections.abc import Callable

from mig_kit.score.annotations import BLINK_CHOICES, BenchmarkItem
from mig_kit.score.choice_parsers import read_choice
from mig_kit.score.official import last_answer_block


def read_item(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """`read_choice` of a reply to an item; items with an id are BLINK's."""
    choices = BLINK_CHOICES.get(item.task.replace(" ", "_"), ()) if item.id else ()
    return read_choice(response, item.options, item.choices or choices, bool(item.id))


def read_strictly(item: BenchmarkItem, response: str) -> tuple[str, str]:
    """The letter that is all of the last <answer>, and the rule's name; ("", "") without one."""
    letter = (last_answer_block(response) or "").strip().strip("()[].")
    is_option = len(letter) == 1 and letter in item.options
    return (letter, "the last <answer>") if is_option else ("", "")


LETTER_READERS: dict[str, Callable[[BenchmarkItem, str], tuple[str, str]]] = {
    "official": read_item, "strict": read_strictly}
