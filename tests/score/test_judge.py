"""A judge reads what no rule reads: held by a server that answers as BLINK's authors' model did."""

import json
import re

import pytest
from local_server import IS_JSON, LocalServer
from mig_bench_records import (
    BLINK_FILES,
    PUBLISHED_ACCURACY,
    needs_data,
    run_score,
    write_lines,
)

from mig_kit.common import UserError
from mig_kit.score import choice_parsers, judge
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import read_records


class Authors:
    """Answers each prompt by the released letter of its reply; fails after `limit` requests."""

    def __init__(self, letters_by_prompt, limit=10 ** 9):
        self.letters, self.asked, self.limit = letters_by_prompt, [], limit
        self.server = LocalServer(self.respond)

    def respond(self, path, headers, body):
        prompt = body["messages"][0]["content"]
        self.asked.append(prompt)
        if len(self.asked) > self.limit:
            return 400, {"error": {"message": "no credit"}}, IS_JSON
        return 200, {"choices": [{"message": {"content": self.letters[prompt]},
                                  "finish_reason": "stop"}]}, IS_JSON


def command(folder, path, server, *words):
    return run_score(folder, "blink", "--judge", server.url, "--judge-model", "mock", *words,
                     annotations=path.name, predictions=path.name)


@needs_data
@pytest.mark.parametrize("source", [
    pytest.param(path, id=path.stem, marks=[pytest.mark.nightly] * (path != BLINK_FILES[0]))
    for path in BLINK_FILES])
def test_with_the_authors_letters_averages_are_the_published_ones(source, tmp_path):
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    records = read_records(path)
    items = read_benchmark("blink", records).items
    pairs = [(item, record["full_prediction"]) for item, record in zip(items, records)]
    authors = Authors({judge.judge_prompt(*pair): record["prediction"]
                       for pair, record in zip(pairs, records)})
    result = command(tmp_path, path, authors.server, "--json", tmp_path / "o.json",
                     "--items", tmp_path / "i.jsonl")
    assert result.exit_code == 0, result.exception
    average = json.loads((tmp_path / "o.json").read_text())["avg"]["accuracy"]
    assert average == pytest.approx(PUBLISHED_ACCURACY[source.stem.removeprefix("val_")], abs=0.3)
    unread = {judge.judge_prompt(*pair) for pair in pairs
              if pair[1].strip() and not choice_parsers.read_item(*pair, True)[0]}
    assert set(authors.asked) == unread and len(authors.asked) == len(unread)
    rows = read_records(tmp_path / "i.jsonl")
    assert sum(row["rule"] == "the judge mock" for row in rows) >= len(unread)
    command(tmp_path, path, authors.server)
    assert len(authors.asked) == len(unread), "nothing is asked twice"


def write_unread(folder, count):
    """A file of replies that no rule reads, and the judge's prompt about each."""
    path = write_lines(folder / "p.jsonl", [
        {"idx": f"val_T_{n}", "task": "T", "answer": "(B)", "full_prediction": f"Hm, {n}."}
        for n in range(count)])
    items = read_benchmark("blink", read_records(path)).items
    return path, [judge.judge_prompt(item, f"Hm, {n}.") for n, item in enumerate(items)]


def test_the_judges_own_words_are_read_as_replies_are(tmp_path):
    """Each of its forms says B but the last two: no option, and nothing that is read."""
    forms = ["Answer: B", "(B) the second image", "<think>A or B?</think>B", "**B**", "Z", "A or B"]
    path, prompts = write_unread(tmp_path, len(forms))
    authors, kept = Authors(dict(zip(prompts, forms))), tmp_path / "p.jsonl.judge.jsonl"
    for _ in range(2):
        output = command(tmp_path, path, authors.server).output
        assert "| avg | 6 | 1 | 66.67 |" in output
        assert f"Replies, {judge.NO_OPTION}: 1." in output and "Replies, unread: 1." in output
        kept.write_bytes(kept.read_bytes()[:-20])  # a kill within the last line
    assert len(authors.asked) == 7, "the torn answer alone is asked again"


def test_a_judge_without_words_ends_in_a_sentence(tmp_path):
    path, (prompt,) = write_unread(tmp_path, 1)
    refused = command(tmp_path, path, Authors({prompt: None}).server)
    assert "does not answer (an answer without a text)" in str(refused.exception)


def test_answers_that_came_before_a_failure_are_kept(tmp_path):
    path, prompts = write_unread(tmp_path, 20)
    failing, whole = (Authors(dict.fromkeys(prompts, "B"), limit) for limit in (5, 20))
    refused = command(tmp_path, path, failing.server)
    assert isinstance(refused.exception, UserError)
    assert re.search(r"does not answer \(HTTP 400: .*same command", str(refused.exception))
    kept = len((tmp_path / "p.jsonl.judge.jsonl").read_text().splitlines())
    result = command(tmp_path, path, whole.server)
    assert "| avg | 20 | 100.00 |" in result.output and "unread" not in result.output
    assert 1 <= kept == 20 - len(whole.asked)
