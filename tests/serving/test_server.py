"""Servers that draw replies: a double over the kit's own loop, and ones that drop what they get;
what a request says, and what is read of an answer.
"""

import base64
import io
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
from local_server import IS_JSON, LocalServer
from PIL import Image
from rollout_server import RolloutServer

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.models import loading
from mig_kit.models.model_folders import ServedName
from mig_kit.serving import reply_files, stored_replies
from mig_kit.serving.server import (
    ServedModel,
    ServedReply,
    Server,
    check_answering_model,
    check_prompt_ids,
)
from mig_kit.shared_prefix.generation import SamplingOptions
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
DRAW = {"replies": 1, "temperature": 0.0, "max_new_tokens": 8, "seed": 0}


@pytest.fixture
def questions():
    return [make_sample(task, "val", 5) for task in list(TASKS)[:4]]


@pytest.fixture
def start_server(random_folder, float32):
    """Call it for a double of a server that holds the random model."""
    return lambda **options: RolloutServer(
        loading.load_policy(random_folder, float32, BOX_FORMAT), **options)


@pytest.fixture
def draw(random_folder, float32, tmp_path, questions):
    """Call it with a server, "" for the local loop, for the replies that it draws."""
    def draw_replies(server, questions=questions, folder=tmp_path, model=random_folder):
        params = SimpleNamespace(server=server, concurrency=3)
        with reply_files.open_policy(model, "sft", float32, BOX_FORMAT, params) as policy:
            return reply_files.sample_replies(policy, questions, folder / "replies.jsonl",
                                              **DRAW)

    return draw_replies


def test_images_arrive_as_the_model_sees_them(processor):
    sample = make_sample("diff", "val", 0)
    served = ServedModel("m", [], 1, processor, BoxFormat(max_pixels=28 * 28 * 6), [2])
    parts = [part for part in served.messages(sample)[0]["content"] if "image_url" in part]
    for part, image in zip(parts, sample.images, strict=True):
        data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
        seen = Image.open(io.BytesIO(data))
        assert seen.size != image.size and seen.size[0] * seen.size[1] <= 28 * 28 * 6
        assert seen.size[0] % 28 == seen.size[1] % 28 == 0


def test_served_replies_equal_the_local_loops(start_server, draw, questions, tmp_path):
    server = start_server()
    served = draw(server.url)
    assert served == draw("", folder=tmp_path / "local")
    assert stored_replies.load_replies(tmp_path / "replies.jsonl") == served
    expected = {"temperature": 0.0, "max_tokens": 8, "return_token_ids": True}
    assert expected.items() <= server.bodies[0].items()
    draw(server.url)
    assert len(server.bodies) == len(questions), "what is stored was drawn again"


def test_several_servers_share_the_work_and_what_is_drawn_is_kept(start_server, draw, tmp_path):
    questions = [make_sample("diff", "val", i) for i in range(24)]
    servers = [start_server(), start_server()]
    assert len(draw(" ".join(server.url for server in servers), questions[:20])) == 20
    assert [len(server.bodies) for server in servers] == [10, 10]
    dead = start_server(change=lambda body, answer: {"error": {"message": "out of memory"}})
    with pytest.raises(UserError, match=f"the server {dead.url} answered HTTP 400: .*out of mem"):
        draw(dead.url, questions)
    assert len(stored_replies.load_replies(tmp_path / "replies.jsonl")) == 20


def test_other_prompt_ids_and_models_are_refused(start_server, draw):
    server = start_server(change=lambda body, answer: {
        **answer, "prompt_token_ids": answer["prompt_token_ids"][1:]})
    with pytest.raises(UserError, match="other prompt ids.*--mm-processor-kwargs"):
        draw(server.url)
    with pytest.raises(UserError, match="its image settings, chat template or tokenizer differ"):
        check_prompt_ids({"prompt_token_ids": [1, 2]}, [1, 3], "a", "http://a/v1")
    check_prompt_ids({"usage": {"prompt_tokens": 2}}, [1, 3], "a", "http://a/v1")
    with pytest.raises(UserError, match="no server serves the model .* but only other"):
        draw(start_server(name="other").url)


@pytest.mark.parametrize(("status", "lists_models", "sentence"), [
    (401, True, "answered HTTP 401: no such key"),
    (404, False, "lists no models: HTTP 404: no such key"),
    (307, True, "answered HTTP 307: a redirect to http://b/")])
def test_what_a_server_refuses_is_shown_in_its_words(draw, questions, status, lists_models,
                                                     sentence):
    def respond(path, headers, body):
        if body is None and lists_models:
            return 200, {"data": [{"id": "sft"}]}, IS_JSON
        place = [("Location", "http://b/")] * (status == 307)
        return status, b"no such key", place

    server = LocalServer(respond)
    with pytest.raises(UserError) as error:
        draw(server.url, questions[:1])
    assert str(error.value).startswith(f"the server {server.url} {sentence}")


def test_what_came_before_a_failure_is_kept(start_server, draw, questions, tmp_path):
    """Also among the first answers, whose prompts are compared before any is used."""
    answers = []

    def fail_at_the_third(body, answer):
        answers.append(answer)
        return {"error": {"message": "out of memory"}} if len(answers) == 3 else answer

    with pytest.raises(UserError, match="out of memory"):
        draw(start_server(change=fail_at_the_third).url, questions)
    assert stored_replies.load_replies(tmp_path / "replies.jsonl")


@pytest.mark.parametrize(("listed", "is_refused"), [(("odd", "odd-mini"), True), (("odd",), False)])
def test_another_name_that_a_server_lists_is_another_model(listed, is_refused):
    server = Server("http://a/v1", None, listed)
    check_answering_model("odd", "odd", server, False)
    if is_refused:
        with pytest.raises(UserError, match="answered as 'odd-mini', not as 'odd'"):
            check_answering_model("odd-mini", "odd", server, False)
    else:
        check_answering_model("odd-mini", "odd", server, False)


def test_a_page_in_place_of_a_list_of_models_is_one_sentence(draw, questions):
    server = LocalServer(lambda path, headers, body: (200, b"<html>", [("Content-Type", "x")]))
    with pytest.raises(UserError, match="lists no models: no list but: <html>; is this its API's"):
        draw(server.url, questions[:1])


CUTS = ("MAX_TOKENS", "max_tokens", "model_length", "LENGTH", "length")


@pytest.fixture
def ask_stranger(draw, tmp_path):
    """Call it with answer(number of images, letters) -> (message, reason, prompt tokens).

    name: in which the server answers.
    """
    def ask(answer, questions, name="odd"):
        def respond(path, headers, body):
            if body is None:
                return 404, b"there is no list of models"
            parts = body["messages"][0]["content"]
            letters = sum(len(part.get("text", "")) for part in parts)
            message, reason, count = answer(sum("image_url" in part for part in parts), letters)
            usage = {"prompt_tokens": count} if count else None
            return 200, {"choices": [{"message": message, "finish_reason": reason}],
                         "model": name, "usage": usage}, IS_JSON

        server = LocalServer(respond)
        replies = draw(server.url, questions, model=ServedName("odd"))
        return replies, stored_replies.count_endings(tmp_path / "replies.jsonl")

    return ask


@pytest.mark.parametrize(("message", "reason", "text"), [
    ({"content": [{"type": "text", "text": "<answer>A</answer>"}]}, "stop", "<answer>A</answer>"),
    ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Look."}]},
                  {"type": "text", "text": "A"}]}, "STOP", "<think>Look.</think>A"),
    ({"content": "A", "reasoning_details": [{"text": "Look."}]}, "end_turn",
     "<think>Look.</think>A"),
    *(({"content": "A"}, reason, "A") for reason in CUTS),
    ({}, "MAX_TOKENS", ""), ({"content": None}, "length", "")])
def test_answers_of_other_servers_are_read(ask_stranger, questions, message, reason, text):
    replies, endings = ask_stranger(lambda images, letters: (message, reason, 300 * images + 80),
                                    questions)
    assert {reply for (reply,) in replies.values()} == {text}
    assert endings["cut"] == len(questions) * (reason in CUTS) and not endings["empty"]


def count_by_image(images, letters):
    return 300 * images


@pytest.mark.parametrize(("name", "count", "sentence"), [
    *((name, count_by_image, "") for name in ("odd", "odd@main", "Odd:7b", None)),
    ("odd", lambda images, letters: 0, ""),
    ("odd", lambda images, letters: 60 * images + letters // 4, ""),
    ("another", count_by_image, "answered as 'another', not as 'odd': it holds another"),
    *(("odd", count, sentence) for count, sentence in (
        (lambda *_: 4096, "counts 4096 tokens for a prompt of 6 images, and 4096 without"),
        (lambda images, letters: letters // 4, "cuts prompts; have it load its vision part"),
        (lambda images, letters: letters // 4 + 200, "drops images or cuts prompts"),
        (lambda images, letters: letters // 4 + 200 * min(images, 2), "drops images or cuts")))])
def test_a_stranger_gives_replies_or_answers_otherwise_than_it_was_asked(
        ask_stranger, questions, name, count, sentence, tmp_path):
    """It may add to its model's name; one that drops images or cuts prompts gives no reply."""
    def answer(images, letters):
        return {"content": "A"}, "stop", count(images, letters)

    if not sentence:
        assert len(ask_stranger(answer, questions, name)[0]) == len(questions)
        return
    with pytest.raises(UserError, match=sentence):
        ask_stranger(answer, questions, name)
    assert not (tmp_path / "replies.jsonl").read_text()


@pytest.fixture
def served(processor):
    return ServedModel("m", [], 1, processor, BOX_FORMAT, [2])


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
    ({"choices": []}, False, "0 of 1"),
    ({"choices": [{**choice("a"), "finish_reason": "abort"}]}, False, "in place of .*abort"),
    ({"choices": [choice("a")]}, True, "return_token_ids and logprobs, such as vLLM"),
    ({"choices": [choice("a", [7, 2], [-1.0])]}, True, "2 token ids with 1 log-probabilities")])
def test_other_answers_are_refused(served, answer, with_logps, sentence):
    with pytest.raises(UserError, match=sentence):
        served.parse_replies(answer, 1, with_logps)
