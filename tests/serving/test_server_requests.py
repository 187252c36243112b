"""The contract of a served reply: what is asked for, what is read, what is refused."""

from dataclasses import make_dataclass

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.serving.server import ServedModel, ServedReply
from mig_kit.shared_prefix.generation import SamplingOptions


@pytest.fixture
def served(processor):
    return ServedModel("m", [], 1, processor, BoxFormat(), [2])


def choice(text="", ids=None, logps=None) -> dict:
    content = None if logps is None else {"content": [{"logprob": logp} for logp in logps]}
    return {"message": {"content": text}, "token_ids": ids, "logprobs": content}


def test_every_sampling_parameter_is_said(served):
    fields = served.sampling_fields(SamplingOptions(0.7, 0.9, 33, 2), with_logps=True)
    expected = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 33, "min_tokens": 2, "top_k": -1,
                "min_p": 0.0, "repetition_penalty": 1.0, "stop_token_ids": [2], "logprobs": True}
    assert {name: fields[name] for name in expected} == expected
    assert fields["logit_bias"] == dict.fromkeys("3456", -100.0), "the vision tokens"
    assert "seed" not in fields, "vLLM's CPU engine dies of it"
    more = make_dataclass("More", [("min_p", float, 0.2)], bases=(SamplingOptions,), frozen=True)
    fields = served.sampling_fields(more(), with_logps=False)
    assert fields["min_p"] == 0.2 and "logprobs" not in fields


def test_replies_are_read_from_ids_where_there_are_any(served):
    ids = served.processor.tokenizer.encode("Find it.") + [2]
    answer = {"choices": [choice("as the server has it", ids), choice("text alone")]}
    assert served.parse_replies(answer, 2, with_logps=False) == [
        ServedReply("Find it.", ids), ServedReply("text alone")]
    logps = [-0.5] * len(ids)
    assert served.parse_replies({"choices": [choice("", ids, logps)]}, 1, with_logps=True) == [
        ServedReply("Find it.", ids, logps)]


@pytest.mark.parametrize(("message", "text"), [
    ({"content": "so</think>x"}, "<think>\nso</think>x"),
    ({"content": "<think>so</think>x"}, "<think>so</think>x"),
    ({"reasoning_content": "so", "content": "x"}, "<think>so</think>x"),
    ({"reasoning": "so", "content": None}, "<think>so")])
def test_a_reply_begins_with_what_its_prompt_has_opened(served, monkeypatch, message, text):
    monkeypatch.setattr(served.processor, "opened_tag", "<think>\n")
    answer = {"choices": [{"message": message}]}
    assert served.parse_replies(answer, 1, with_logps=False) == [ServedReply(text)]


@pytest.mark.parametrize(("answer", "with_logps", "sentence"), [
    ({"choices": [{}]}, False, "cannot be read .an answer without a text"),
    ({"choices": [choice(None)]}, False, "without a text"), ({"choices": []}, False, "0 of 1"),
    ({"choices": [{**choice(""), "error": {"code": 502}}]}, False, "error in place of .*502"),
    ({"choices": [{**choice("a"), "finish_reason": "abort"}]}, False, "in place of .*abort"),
    ({"choices": [choice("a")]}, True, "return_token_ids and logprobs, such as vLLM"),
    ({"choices": [choice("a", [7, 2], [-1.0])]}, True, "2 token ids with 1 log-probabilities")])
def test_other_answers_are_refused(served, answer, with_logps, sentence):
    with pytest.raises(UserError, match=sentence):
        served.parse_replies(answer, 1, with_logps)
