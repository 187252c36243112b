"""Addresses, keys and the client of OpenAI-compatible servers."""

import asyncio
import http.server
import threading

import openai
import pytest

from mig_kit.openai_client import (
    ADDRESS,
    KEY_VARIABLE,
    authorization_header,
    open_client,
    read_api_key,
)


def test_an_address_holds_no_name_key_or_query():
    for text in ("http://a", "https://a.b:8000/v1", "http://[::1]:8000/v1", "HTTP://A/v1"):
        assert ADDRESS.fullmatch(text), text
    for text in ("a:8000", "http://me@a/v1", "http://a/v1?key=1", "http://a/v1#x", "ftp://a"):
        assert not ADDRESS.fullmatch(text), text


def test_the_key_is_the_environments(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_api_key() == "" and authorization_header("")["Authorization"] is openai.omit
    monkeypatch.setenv(KEY_VARIABLE, " sk-1\n")
    assert read_api_key() == "sk-1"
    assert authorization_header("sk-1") == {"Authorization": "Bearer sk-1"}
    monkeypatch.setenv(KEY_VARIABLE, "sk-\u00e4")
    with pytest.raises(ValueError, match=f"{KEY_VARIABLE} holds characters that no key has"):
        read_api_key()


def test_the_client_follows_no_redirect_and_takes_no_other_key(monkeypatch):
    headers = []

    class Redirect(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            headers.append(dict(self.headers))
            self.send_response(302)
            self.send_header("Location", "/v1/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-the-environment")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    async def ask(key: str) -> None:
        async with open_client(f"http://127.0.0.1:{server.server_port}/v1", key, 10) as client:
            await client.with_options(max_retries=0).get(
                "/models", cast_to=object, options={"headers": authorization_header(key)})

    for key in ("", "sk-1"):
        with pytest.raises(openai.APIStatusError):
            asyncio.run(ask(key))
    server.shutdown()
    server.server_close()
    keys = [{name.lower(): value for name, value in sent.items()}.get("authorization")
            for sent in headers]
    assert keys == [None, "Bearer sk-1"]
