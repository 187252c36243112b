"""Letters that no rule reads, from a chat model, as BLINK's and MMIU's authors get theirs.

Only unread replies are sent. The answers are kept in a file beside the predictions, a line each as
it comes, so none is asked twice, be it after a kill.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mig_kit.common import (
    UserError,
    append_json_lines,
    digest_json,
    load_json_lines,
    progress_bar,
)
from mig_kit.openai_client import RequestFailed, ask, iter_results, open_client, parse_server
from mig_kit.score.annotations import BenchmarkItem
from mig_kit.score.choice_parsers import read_choice

THREADS, TIMEOUT, RETRIES = 8, 120.0, 3
NO_OPTION, NONE = "no option chosen, says the judge", "Z"
PROMPT = """A model was asked a multiple-choice question. Which option does its reply choose?

Question: {question}
Options:
{options}

Reply:
{reply}

Answer with the letter of the option alone, or Z if the reply chooses none."""


@dataclass(frozen=True)
class Judge:
    """url: of an OpenAI-compatible server; model: its name there; file: where answers are kept."""

    url: str
    model: str
    file: Path


def judge_prompt(item: BenchmarkItem, reply: str) -> str:
    """What the judge is asked about a reply."""
    choices = item.choices or item.usual_choices
    options = "\n".join(f"({letter}) {words}".strip() for letter, words in zip(
        item.options, choices or [""] * len(item.options)))
    return PROMPT.format(question=item.question or item.task, options=options, reply=reply)


def ask_judge(judge: Judge, unread: list[tuple[BenchmarkItem, str]]) -> list[str]:
    """The letter that the judge reads in each (item, reply), NONE for no option.

    Its answer is read as any reply; "" for one that is not read.
    Raises: UserError for a server that does not answer; what it answered before is kept.
    """
    prompts = [judge_prompt(item, reply) for item, reply in unread]
    keys = [digest_json([judge.model, prompt]) for prompt in prompts]
    answers = {record["key"]: record["answer"] for record in load_json_lines(judge.file)}
    todo = {key: prompt for key, prompt in zip(keys, prompts) if key not in answers}
    url, = parse_server(judge.url)[:1]
    with closing(open_client(url, TIMEOUT, RETRIES)) as client, \
            judge.file.open("a") as file:
        def answer_of(pair: tuple[str, str]) -> tuple[str, str]:
            answer = ask(client, judge.model, pair[1], temperature=0)
            if not answer.strip():
                raise ValueError("an answer without a text")
            return pair[0], answer

        try:
            for key, answer in progress_bar(iter_results(answer_of, todo.items(), THREADS), "judge",
                                            total=len(todo), disable=not todo):
                append_json_lines(file, [{"key": key, "model": judge.model, "answer": answer}])
                answers[key] = answer
        except (RequestFailed, ValueError) as failure:
            raise UserError(f"the judge at {judge.url} does not answer ({failure}); give the same "
                            f"command again: what it has said is kept in {judge.file}") from None
    return [read_choice(answers[key], item.options + NONE, item.choices or item.usual_choices)[0]
            for key, (item, _) in zip(keys, unread, strict=True)]
