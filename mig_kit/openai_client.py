"""OpenAI-compatible servers: their addresses, the key, and the one request that asks them.

Retries, time-outs, proxies and certificates are the openai package's.
"""

import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from mig_kit.common import UserError

KEY_VARIABLE = "MIG_KIT_API_KEY"
# JSON of a request's fields under other names, null to leave one out, as some servers want it:
# {"max_tokens": "max_completion_tokens", "temperature": null}
FIELDS_VARIABLE = "MIG_KIT_REQUEST_FIELDS"
# a web address without a name, key, query or fragment in it
ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:/[^\s?#]*)?",
                     re.IGNORECASE | re.ASCII)
# finish_reasons of cut replies, and of what no model has ended
CUT = re.compile("length|max_?tokens|token_limit", re.IGNORECASE)
FAILED = re.compile("error|abort|cancel|fail", re.IGNORECASE)
# words of an error inside an answer of HTTP 200 that may be gone at the next try
PASSING = re.compile(r"\b(?:408|429|5\d\d)\b|overload|rate.?limit|timed? ?out|unavailable|busy"
                     "|try again|capacity", re.IGNORECASE)


class RequestFailed(UserError):
    """A request that a server did not answer, in its words without the key; status: 0 for none."""

    def __init__(self, text: str, status: int):
        super().__init__(redact(" ".join(text.split())[:400]))
        self.status = status


def read_api_key() -> str:
    """The key of the environment, "" if there is none."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def redact(text: str) -> str:
    """The text without the key of the environment."""
    return text.replace(key, "***") if (key := read_api_key()) else text


def parse_server(server: str) -> list[str]:
    """The addresses that `server` lists; UserError if it lists something else."""
    words = server.replace(",", " ").split()
    if not words or not all(ADDRESS.fullmatch(word) for word in words):
        raise UserError("server must be addresses of running servers, such as "
                        "http://localhost:8000/v1, with no key in them")
    return [word.rstrip("/") for word in dict.fromkeys(words)]


def open_client(url: str, timeout: float = 900.0, retries: int = 5):
    """An openai.OpenAI for the server at `url`, up to and with /v1; threads may share it.

    timeout: seconds without a sign of the server. Redirects, which could send images elsewhere, are
    refused.
    """
    import openai  # seconds, which an address need not wait for

    # without a key of ours the client would take one of its own from the environment
    return openai.OpenAI(base_url=url, api_key=read_api_key() or "none", timeout=timeout,
                         max_retries=retries,
                         http_client=openai.DefaultHttpxClient(follow_redirects=False))


def request_json(client, path: str, body: dict | None = None) -> object:
    """What the server answers to a POST of `body`, or to a GET; its text if that is no JSON.

    Raises: RequestFailed for an error, a redirect or no connection.
    """
    import openai

    try:
        text = (client.get(path, cast_to=str) if body is None
                else client.post(path, cast_to=str, body=body))
    except openai.APIStatusError as error:
        place = error.response.headers.get("location")
        text = f"a redirect to {place}" if place else error.response.text
        raise RequestFailed(f"HTTP {error.status_code}: {text}", error.status_code) from None
    except openai.APIConnectionError as error:
        raise RequestFailed(f"no connection ({error.__cause__ or error})", 0) from None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def request_completion(client, body: dict) -> dict:
    """A chat completion as the server's JSON; body: as of the API. RequestFailed for an error.

    An error inside an answer is retried as the client retries one of HTTP.
    """
    names = read_request_fields()
    body = {names.get(name, name): value for name, value in body.items()
            if names.get(name, name) is not None}
    for attempt in range(client.max_retries + 1):
        if attempt:
            time.sleep(min(2.0 ** attempt / 4, 8))
        answer = request_json(client, "/chat/completions", body)
        parts = answer if isinstance(answer, dict) else {}
        choices = parts.get("choices") or [{}]
        error = parts.get("error") or isinstance(choices[0], dict) and choices[0].get("error")
        if not error or not PASSING.search(json.dumps(error)):
            break
    if parts.get("error") or not parts.get("choices"):
        raise RequestFailed(f"no completion but: {json.dumps(answer)}", 200)
    return answer


def read_request_fields() -> dict[str, str | None]:
    """The names of FIELDS_VARIABLE, {} if it is not set; UserError if it is no such JSON."""
    text = os.environ.get(FIELDS_VARIABLE, "").strip() or "{}"
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, dict) or not all(
            isinstance(name, str | None) for name in names.values()):
        raise UserError(f'{FIELDS_VARIABLE} is {text}; write other names of fields, null to leave '
                        'one out: {"max_tokens": "max_completion_tokens", "temperature": null}')
    return names


def ask(client, model: str, content: str | list[dict], **fields) -> str:
    """The reply's text to one chat question; content: text, or OpenAI's parts with images.

    fields: more of the request, such as temperature and max_tokens. Raises RequestFailed.
    """
    answer = request_completion(client, {
        "model": model, "messages": [{"role": "user", "content": content}], **fields})
    try:
        return read_completion(answer["choices"][0])[0]
    except (ValueError, AttributeError) as error:
        raise RequestFailed(f"no reply ({error}) but: {json.dumps(answer)}", 200) from error


def read_completion(choice: dict, opened_tag: str = "") -> tuple[str, str]:
    """Text and finish_reason of a choice of a chat completion's JSON; "length" for a cut reply.

    Reasoning in a field of its own is put before the answer. opened_tag: what the prompt opened the
    reply with. Raises ValueError for a choice without text and reason, or with an error.
    """
    message, reason = choice.get("message") or {}, choice.get("finish_reason") or ""
    if (error := choice.get("error")) or FAILED.search(str(reason)):
        raise ValueError(f"an error in place of a reply: {json.dumps(error or reason)[:200]}")
    fields = [message.get(key) for key in ("reasoning_content", "reasoning", "reasoning_details")]
    content, reasoning = _join(message.get("content")), next(filter(None, map(_join, fields)), "")
    if isinstance(message.get("content"), list):
        reasoning = reasoning or _join(message["content"], "thinking")
    reason = "refusal" if message.get("refusal") and not content else str(reason)
    if message.get("content") is None and not (reasoning or reason):
        raise ValueError("an answer without a text")
    reason = "length" if CUT.search(reason) else reason
    if content.lstrip().startswith("<think>"):
        return content, reason
    if reasoning:
        return f"<think>{reasoning}" + (f"</think>{content}" if content else ""), reason
    is_opened = "</think>" in content and "<think>" not in content
    tag = opened_tag or ("<think>" if is_opened else "")
    return (tag + content if content else ""), reason


def _join(content: object, key: str = "text") -> str:
    """The text of a message's field, be it a text or a list of parts."""
    if isinstance(content, list):
        return "".join(_join(part.get(key)) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def iter_results(work: Callable, items: Iterable, threads: int) -> Iterator:
    """Yield work(item) of every item in the order in which the threads finish.

    Items are read as they are needed. The first error is raised; no item is begun after it.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def run(item: object) -> None:
        try:
            results.put((work(item), None))
        except BaseException as error:
            results.put((None, error))

    todo, under_way = iter(items), 0
    while True:
        # only when the caller has dealt with the last result, so that a kill loses no more of them
        for item in islice(todo, threads - under_way):
            # a pool's threads would be waited for at the end, a silent server's for minutes
            threading.Thread(target=run, args=(item,), daemon=True).start()
            under_way += 1
        if not under_way:
            return
        result, error = results.get()
        under_way -= 1
        if error is not None:
            raise error
        yield result
