"""The contract of a served reply: what is asked for, what is read, what is refused."""

import asyncio

import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.engine.generation import Sampling
from mig_kit.engine.served_rollouts import ServedRollouts
from mig_kit.engine.server import ServedModel, Server, asyncio_run, iterate
from mig_kit.engine.server_requests import PromptEncoder, ServedReply
from mig_kit.openai_client import first_line, redact


@pytest.fixture
def encoder(processor):
    return PromptEncoder(processor, BoxFormat(), [2])


def choice(text="", ids=None, logps=None) -> dict:
    content = None if logps is None else {"content": [{"logprob": logp} for logp in logps]}
    return {"message": {"content": text}, "token_ids": ids, "logprobs": content}


def test_every_sampling_parameter_is_said(encoder):
    fields = encoder.sampling_fields(Sampling(0.7, 0.9, 33, 2), with_logps=True)
    expected = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 33, "min_tokens": 2, "top_k": -1,
                "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2], "logprobs": True}
    assert {name: fields[name] for name in expected} == expected
    assert fields["logit_bias"] == dict.fromkeys("3456", -100.0), "the vision tokens"
    assert "seed" not in fields, "vLLM's CPU engine dies of it"
    assert "logprobs" not in encoder.sampling_fields(Sampling(), with_logps=False)


def test_replies_are_read_from_ids_where_there_are_any(encoder):
    ids = encoder.processor.tokenizer.encode("Find it.") + [2]
    answer = {"choices": [choice("as the server has it", ids), choice("text alone")]}
    assert encoder.parse_replies(answer, with_logps=False) == [
        ServedReply("Find it.", ids), ServedReply("text alone")]
    logps = [-0.5] * len(ids)
    assert encoder.parse_replies({"choices": [choice("", ids, logps)]}, with_logps=True) == [
        ServedReply("Find it.", ids, logps)]


@pytest.mark.parametrize(("answer", "with_logps", "sentence"), [
    ({}, False, "no complete chat completion"),
    ({"choices": None}, False, "no complete chat completion"),
    ({"choices": [{"message": {}}]}, False, "no complete chat completion"),
    ({"choices": [choice(None)]}, False, "without a text"),
    ({"choices": [choice("a")]}, True, "return_token_ids and logprobs, such as vLLM"),
    ({"choices": [choice("a", [7, 2], [-1.0])]}, True, "2 tokens with 1 log-probabilities")])
def test_other_answers_are_refused(encoder, answer, with_logps, sentence):
    with pytest.raises(ValueError, match=sentence):
        encoder.parse_replies(answer, with_logps)


def test_what_a_server_said_is_short_and_without_the_key():
    assert first_line(b'{"error": {"message": "too\\n long"}}') == "too long"
    assert first_line('{"message": "no"}') == "no" and first_line("[1]\n") == "[1]"
    assert len(first_line(b"\xff" * 999)) == 300
    assert redact("key sk-1 is wrong", "sk-1") == "key *** is wrong"
    assert redact("no key", "") == "no key"


def test_log_probabilities_are_padded_by_row():
    served = ServedRollouts.__new__(ServedRollouts)
    served.logps = [[-1.0, -2.0], [-3.0]]
    assert served.padded_logps(torch.zeros(2, 3, dtype=torch.long)).tolist() == [
        [-1.0, -2.0, 0.0], [-3.0, 0.0, 0.0]]


def test_a_coroutine_runs_beside_a_notebooks_loop():
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def in_a_notebook() -> int:
        return asyncio_run(double(21))

    assert asyncio.run(in_a_notebook()) == 42


def test_whoever_stops_early_cancels_and_errors_come_through():
    ended = []

    async def produce(put) -> None:
        try:
            for number in range(10**9):
                put(number)
                await asyncio.sleep(0.001)
        finally:
            ended.append(True)

    numbers = iterate(produce)
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()
    assert ended == [True]

    async def fail(put) -> None:
        put(1)
        raise RuntimeError("one sentence")

    numbers = iterate(fail)
    assert next(numbers) == 1
    with pytest.raises(RuntimeError, match="one sentence"):
        next(numbers)


def test_no_concurrency_is_refused(encoder):
    served = ServedModel("m", [Server("http://127.0.0.1:1/v1")], encoder, 0)
    with pytest.raises(ValueError, match="concurrency is 0; use 1 or more"):
        list(served.ask([], Sampling()))
