"""Addresses, keys and the client of OpenAI-compatible servers."""

import threading
import time

import pytest
from local_server import IS_JSON, LocalServer

from mig_kit import openai_client as client
from mig_kit.common import UserError
from mig_kit.openai_client import KEY_VARIABLE, RequestFailed, iter_results


def test_an_address_holds_no_name_key_or_query():
    for text in ("http://a", "https://a.b:8000/v1", "http://[::1]:8000/v1", "HTTP://A/v1"):
        assert client.ADDRESS.fullmatch(text), text
    assert client.parse_server("http://a:8000/v1, http://b/v1/ http://a:8000/v1") == [
        "http://a:8000/v1", "http://b/v1"]
    for text in ("a:8000", "http://me@a/v1", "http://a/v1?key=1", "http://a/v1#x", "ftp://a", "",
                 "vllm serve {model} --port {port}", "http://u:secret@a/v1"):
        with pytest.raises(UserError, match="addresses of running servers") as error:
            client.parse_server(text)
        assert "secret" not in str(error.value)


def serve(status, data, headers=()):
    """A client of a server that answers so."""
    server = LocalServer(lambda path, got, body: (status, data, headers))
    return client.open_client(server.url, 5.0, retries=0)


def test_a_question_gets_its_text():
    answer = {"choices": [{"message": {"content": "a cup"}, "finish_reason": "stop"}]}
    assert client.ask(serve(200, answer, IS_JSON), "m", "What is it?", max_tokens=9) == "a cup"


@pytest.mark.parametrize(("status", "data", "headers", "words"), [
    (404, {"error": {"message": "no model m"}}, IS_JSON, "HTTP 404: .*no model m"),
    (200, {"error": {"message": "key sk-1 is bad"}}, IS_JSON, "no completion but: .* is bad"),
    (200, {"choices": []}, IS_JSON, "no completion but: "),
    (200, {"choices": [{"message": {"content": None}}]}, IS_JSON, "no reply .an answer without a"),
    (200, {"choices": [{"error": {"code": 502}}]}, IS_JSON, "an error in place of a reply: .*502"),
    (200, b"<html>login</html>", [("Content-Type", "text/html")], "no completion but: .*login"),
    (302, b"", [("Location", "http://b/login")], "HTTP 302: a redirect to http://b/login")])
def test_what_a_server_says_is_shown_without_the_key(monkeypatch, status, data, headers, words):
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\n")
    with pytest.raises(RequestFailed, match=words) as error:
        client.ask(serve(status, data, headers), "m", "What is it?")
    assert "sk-1" not in str(error.value) and error.value.status == status


@pytest.mark.parametrize(("error", "n_asked"), [
    ({"message": "The engine is busy"}, 2), ({"code": 502}, 2), ({"message": "bad image"}, 1)])
@pytest.mark.parametrize("place", ["answer", "choice"])
def test_an_error_in_an_answer_is_asked_again_if_it_may_pass(error, n_asked, place):
    failed = {"error": error} if place == "answer" else {"choices": [{"error": error}]}
    answers = [failed, {"choices": [{"message": {"content": "a cup"}}]}]
    bodies = []
    server = LocalServer(lambda path, got, body: bodies.append(body) or (
        200, answers[len(bodies) - 1], IS_JSON))
    opened = client.open_client(server.url, 5.0, retries=1)
    if n_asked == 2:
        assert client.ask(opened, "m", "What is it?") == "a cup"
    else:
        with pytest.raises(RequestFailed, match="bad image"):
            client.ask(opened, "m", "What is it?")
    assert len(bodies) == n_asked


def test_fields_of_a_request_are_renamed_or_left_out(monkeypatch):
    bodies = []
    server = LocalServer(lambda path, got, body: bodies.append(body) or (
        200, {"choices": [{"message": {"content": "a cup"}}]}, IS_JSON))
    opened = client.open_client(server.url, 5.0, retries=0)
    monkeypatch.setenv(client.FIELDS_VARIABLE,
                       '{"max_tokens": "max_completion_tokens", "temperature": null}')
    client.ask(opened, "m", "What?", max_tokens=9, temperature=0)
    assert set(bodies[0]) == {"model", "messages", "max_completion_tokens"}
    monkeypatch.setenv(client.FIELDS_VARIABLE, "max_tokens")
    with pytest.raises(UserError, match="is max_tokens; write other names of fields"):
        client.ask(opened, "m", "What?")


def test_a_server_that_is_not_there():
    with pytest.raises(RequestFailed, match="no connection") as error:
        client.ask(client.open_client("http://127.0.0.1:9/v1", retries=0), "m", "What is it?")
    assert error.value.status == 0


def test_results_come_from_several_threads_and_items_are_read_as_needed():
    started, barrier = [], threading.Barrier(3, timeout=30)

    def work(item):
        barrier.wait()  # three are under way at a time, or it breaks
        return 2 * item

    def items():
        for number in range(9):
            started.append(number)
            yield number

    results = iter_results(work, items(), 3)
    assert started == []
    assert sorted(results) == list(range(0, 18, 2))


def test_whoever_stops_early_ends_the_rest_and_errors_come_through():
    done = []

    def work(item):
        time.sleep(0.01)
        done.append(item)
        if item == 3:
            raise RuntimeError("one sentence")

    with pytest.raises(RuntimeError, match="one sentence"):
        list(iter_results(work, range(10**6), 2))
    results = iter_results(work, range(10, 10**6), 2)
    next(results)
    results.close()
    time.sleep(0.2)
    n_done = len(done)
    time.sleep(0.1)
    assert len(done) == n_done < 30
