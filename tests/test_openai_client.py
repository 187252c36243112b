"""Addresses, keys and the client of OpenAI-compatible servers."""

import threading
import time
from contextlib import closing

import pytest
from local_server import IS_JSON, LocalServer

from mig_kit import openai_client as client
from mig_kit.openai_client import KEY_VARIABLE, Connection, RequestFailed, iter_results


def test_an_address_holds_no_name_key_or_query():
    for text in ("http://a", "https://a.b:8000/v1", "http://[::1]:8000/v1", "HTTP://A/v1"):
        assert client.ADDRESS.fullmatch(text), text
    for text in ("a:8000", "http://me@a/v1", "http://a/v1?key=1", "http://a/v1#x", "ftp://a"):
        assert not client.ADDRESS.fullmatch(text), text


def test_a_server_is_addresses_or_a_command():
    assert client.parse_server("http://a:8000/v1, http://b/v1/ http://a:8000/v1") == [
        "http://a:8000/v1", "http://b/v1"]
    assert client.parse_server("vllm serve {model} --port {port}") == []
    for server in ("http://u:secret@a/v1", "vllm serve {model}", "serve", "a b"):
        with pytest.raises(ValueError, match="give addresses such as"):
            client.parse_server(server)


def test_the_key_is_the_environments(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert client.read_api_key() == ""
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\n")
    assert client.read_api_key() == "sk-1"
    monkeypatch.setenv(KEY_VARIABLE, "sk-\u00e4")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} holds characters that no key has"):
        client.read_api_key()


def test_what_a_server_said_is_short_and_without_the_key():
    assert client.first_line('{"error": {"message": "too\\n long"}}') == "too long"
    assert client.first_line('{"message": "no"}') == "no" and client.first_line("[1]\n") == "[1]"
    assert len(client.first_line("x" * 999)) == 300
    assert client.redact("key sk-1 is wrong", "sk-1") == "key *** is wrong"
    assert client.redact("no key", "") == "no key"


@pytest.mark.parametrize(("status", "is_ready"), [
    (200, True), (401, True), (500, True), (503, False)])
def test_a_server_is_ready_where_it_answers(status, is_ready):
    server = LocalServer(lambda *request: (status, {"data": []}, IS_JSON))
    connection = Connection(server.url, "", 10.0)
    assert connection.is_ready() == is_ready
    server.stop()
    assert not connection.is_ready()


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


@pytest.mark.parametrize(("name", "value", "sentence"), [
    ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", "ALL_PROXY in the environment is a SOCKS"),
    ("https_proxy", "x://me:secret@a", "https_proxy in the environment is no proxy; write it"),
    ("HTTPS_PROXY", "http://me:secret@127.0.0.1:9", "through the proxy that HTTPS_PROXY in the"),
    ("SSL_CERT_FILE", "none.pem", "SSL_CERT_FILE names no certificates that can be read"),
    ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE names no certificates that can be read")])
def test_what_stands_between_is_named_by_its_variable(monkeypatch, name, value, sentence):
    for other in ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", *client.CERTIFICATES):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, RequestFailed), match=sentence) as error:
        Connection("https://server.invalid/v1", "", 5.0).list_models(0)
    assert "secret" not in str(error.value)
    monkeypatch.setenv("NO_PROXY", "server.invalid")
    if "PROXY" in name.upper():
        with pytest.raises(RequestFailed, match=r"failed \(\w+\)$"):
            Connection("https://server.invalid/v1", "", 5.0).list_models(0)


def test_a_filter_answers_and_a_failure_does_not():
    answers = [(400, {"error": {"code": "content_filter", "message": "no"}}),
               (200, {"error": {"message": "upstream"}}),
               (200, {"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]})]
    server = LocalServer(lambda path, headers, body: (*answers[body["seed"]], IS_JSON))
    with closing(Connection(server.url, "", 5.0)) as connection:
        ask = [{"model": "m", "messages": [], "seed": number} for number in range(3)]
        choice = connection.chat(ask[0])[0]["choices"][0]
        assert client.read_choice(choice) == ("", "content_filter")
        for body, word in zip(ask[1:], ("upstream", "ended with abort")):
            with pytest.raises(RequestFailed, match=word) as error:
                connection.chat(body)
            assert error.value.is_temporary
    server.stop()
