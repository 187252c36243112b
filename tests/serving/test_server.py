"""Servers that draw replies: a double over the kit's own loop, and ones that drop what they get."""

import base64
import io
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
from mig_kit.serving.server import ServedModel, check_prompt_ids
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
    def draw_replies(server, questions=questions, folder=tmp_path, model=random_folder, **changes):
        params = SimpleNamespace(server=server, concurrency=3)
        with reply_files.open_policy(model, "sft", float32, BOX_FORMAT, params) as policy:
            return reply_files.sample_replies(policy, questions, folder / "replies.jsonl",
                                              **(DRAW | changes))

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
    (401, True, "answered HTTP 401: no such key"), (404, True, "answered HTTP 404: no such key"),
    (401, False, "lists no models: HTTP 401: no such key"),
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


@pytest.mark.parametrize(("name", "is_taken"), [
    ("odd", True), ("odd@main", True), ("Odd:7b", True), ("another", False), (None, True)])
def test_another_models_answers_are_not_taken(ask_stranger, questions, name, is_taken):
    def answer(images, letters):
        return {"content": "A"}, "stop", 300 * images

    if is_taken:
        assert len(ask_stranger(answer, questions, name)[0]) == len(questions)
        return
    with pytest.raises(UserError, match="answered as 'another', not as 'odd': it holds another"):
        ask_stranger(answer, questions, name)


@pytest.mark.parametrize(("count", "sentence"), [
    (lambda images, letters: 4096, "counts 4096 tokens for a prompt of 6 images, and 4096 witho"),
    (lambda images, letters: letters // 4, "drops images or cuts prompts; have it load its visi"),
    (lambda images, letters: letters // 4 + 200, "drops images or cuts prompts"),
    (lambda images, letters: letters // 4 + 200 * min(images, 2), "drops images or cuts prompts"),
    (lambda images, letters: 0, ""), (lambda images, letters: 60 * images + letters // 4, "")])
def test_a_server_that_cuts_prompts_or_drops_images_gives_no_reply(ask_stranger, questions, count,
                                                                   sentence, tmp_path):
    def answer(images, letters):
        return {"content": "A"}, "stop", count(images, letters)

    if not sentence:
        assert len(ask_stranger(answer, questions)[0]) == len(questions)
        return
    with pytest.raises(UserError, match=sentence):
        ask_stranger(answer, questions)
    assert not (tmp_path / "replies.jsonl").read_text()
