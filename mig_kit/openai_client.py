"""OpenAI-compatible servers: their addresses, the key, and the one client that asks them."""

import json
import os
import queue
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

KEY_VARIABLE = "MIG_KIT_API_KEY"
# a web address without a name, key, query or fragment in it
ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:/[^\s?#]*)?",
                     re.IGNORECASE | re.ASCII)
TEMPORARY = (408, 409, 429)  # statuses that may pass, like those from 500 on
NOT_READY = (0, 502, 503, 504)  # no connection, or a server behind this one does not answer yet
BY_PROXY = (*NOT_READY, 403, 407)  # what a proxy says in the place of a server
CERTIFICATES = {"SSL_CERT_FILE": "cafile", "SSL_CERT_DIR": "capath"}
FAILURES = ("abort", "error", "insufficient_system_resource")  # finish_reasons of no reply
FILTERS = ("content_filter", "content_policy_violation", "data_inspection_failed")  # error codes
FILTERED = {"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]}


def read_api_key() -> str:
    """The key of the environment, "" if there is none; ValueError if it cannot be a key."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {KEY_VARIABLE} holds characters that no key "
                         "has; set it again")
    return key


def redact(text: str, key: str) -> str:
    """The text without the key."""
    return text.replace(key, "***") if key else text


def first_line(text: str) -> str:
    """What a server said, in at most 300 characters: an error's message if it is JSON."""
    data = _read_json(text)
    error = data.get("error", data) if isinstance(data, dict) else None
    text = error.get("message", text) if isinstance(error, dict) else text
    return " ".join(str(text).split())[:300]


def _read_json(text: bytes | str) -> object:
    """What the text holds, None if it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def iter_results(work: Callable, items: Iterable, threads: int) -> Iterator:
    """Yield work(item) of every item in the order in which the threads finish.

    Items are read as they are needed. The first error is raised; no item is begun after it, nor
    after the caller stops.
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


def parse_server(server: str) -> list[str]:
    """The addresses that `server` lists, [] for a command; ValueError if it is neither."""
    words = server.replace(",", " ").split()
    if words and all(ADDRESS.fullmatch(word) for word in words):
        return [word.rstrip("/") for word in dict.fromkeys(words)]
    if any("://" in word for word in words[:1]) or not all(
            mark in server for mark in ("{model}", "{port}")):
        raise ValueError("server is neither an address nor a command; give addresses such as "
                         "http://localhost:8000/v1, with no key in them, or a command with "
                         "{model} and {port} in it")
    return []


def read_choice(choice: dict, opened_tag: str = "") -> tuple[str, str]:
    """Text and finish_reason of a choice of a chat completion's JSON.

    Reasoning in a field of its own is put before the answer. If the server gives a reason instead
    of a text, the text is "". opened_tag: what the prompt opened the reply with. Raises ValueError
    if there is neither.
    """
    message, reason = choice["message"], choice.get("finish_reason") or ""
    content = message.get("content")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if not content and message.get("refusal"):
        reason = "refusal"
    if content is None and (reason or reasoning):
        content = ""
    if not isinstance(content, str) or not isinstance(reason, str):
        raise ValueError("an answer without a text")
    if content.lstrip().startswith("<think>"):
        return content, reason
    if isinstance(reasoning, str) and reasoning:
        return f"<think>{reasoning}" + (f"</think>{content}" if content else ""), reason
    is_opened = "</think>" in content and "<think>" not in content
    tag = opened_tag or ("<think>" if is_opened else "")
    return (tag + content if content else ""), reason


def _find_failure(answer: object) -> str:
    """What a server says that went wrong, in an answer of status 200; "" for a completion."""
    answer = answer if isinstance(answer, dict) else {}
    choices = answer.get("choices") if isinstance(answer.get("choices"), list) else []
    if answer.get("error") and not choices:
        return first_line(json.dumps(answer))
    reasons = [choice.get("finish_reason") for choice in choices if isinstance(choice, dict)]
    return next((f"a reply that ended with {reason}" for reason in reasons if reason in FAILURES),
                "")


def is_on_this_machine(url: str) -> bool:
    """Whether the address is one of this machine's own, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _name_proxies(url: str) -> str:
    """The environment's variables whose proxies stand before `url`, "" if none does."""
    if is_on_this_machine(url) or proxy_bypass_environment(urlsplit(url).hostname or ""):
        return ""
    names = (f"{urlsplit(url).scheme}_proxy".lower(), "all_proxy")
    return " and ".join(sorted(name for name, value in os.environ.items()
                               if value and name.lower() in names))


def _open_transport(url: str):
    """The HTTP client for `url`; ValueError with a variable of the environment in the way."""
    import openai  # seconds, which an address need not wait for

    proxies, is_tls, verify = _name_proxies(url), url.lower().startswith("https"), True
    variable = next((name for name in CERTIFICATES if is_tls and os.environ.get(name)), "")
    try:
        if variable:
            os.stat(os.environ[variable])
            verify = ssl.create_default_context(**{CERTIFICATES[variable]: os.environ[variable]})
        return openai.DefaultHttpxClient(follow_redirects=False, trust_env=bool(proxies),
                                         verify=verify)
    except OSError as error:
        raise ValueError(f"the environment variable {variable or 'SSL_CERT_FILE'} names no "
                         f"certificates that can be read ({error}); correct or unset it") from None
    except Exception as error:  # of several types; the text may hold a password
        remedy = ("is a SOCKS proxy; run pip install socksio, or set NO_PROXY to the server's host"
                  if isinstance(error, ImportError) else
                  "is no proxy; write it as http://HOST:PORT, or unset it")
        raise ValueError(f"{proxies} in the environment {remedy}") from None


class RequestFailed(Exception):
    """A request that a server did not answer; its text is one line without the key."""

    def __init__(self, text: str, status: int, attempts: int, code: str = ""):
        super().__init__(text)
        self.status, self.attempts, self.code = status, attempts, code

    @property
    def is_temporary(self) -> bool:
        """Whether the same request may succeed later or elsewhere."""
        return not self.status or self.status in TEMPORARY or self.status >= 500


class Connection:
    """A client of the server at `url`, up to and with /v1; its requests raise RequestFailed.

    timeout: seconds without a sign of the server. Threads may share it. Redirects are not followed,
    since they could send the images elsewhere.
    """

    def __init__(self, url: str, key: str, timeout: float):
        import openai  # seconds, which an address need not wait for

        # without a key of ours the client would take one of its own from the environment
        self.client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=timeout,
                                    http_client=_open_transport(url))
        self.headers = {"Authorization": f"Bearer {key}" if key else openai.omit}
        self.url, self.key = url, key

    def close(self) -> None:
        """End the client's connections."""
        self.client.close()

    def chat(self, body: dict, retries: int = 0) -> tuple[object, int]:
        """The answer to a chat completion, None if it is no JSON, and the attempts that it took.

        retries: after temporary failures. A request that the server's filter refuses has no text.
        """
        fields = {name: value for name, value in body.items() if name not in ("model", "messages")}
        try:
            response = self._send(
                retries, lambda client: client.chat.completions.with_raw_response.create(
                    model=body["model"], messages=body["messages"], extra_body=fields,
                    extra_headers=self.headers))
        except RequestFailed as failure:
            if failure.code not in FILTERS:
                raise
            return FILTERED, failure.attempts
        answer, attempts = _read_json(response.content), response.retries_taken + 1
        if failure := _find_failure(answer):
            raise RequestFailed(redact(failure, self.key), 0, attempts)
        return answer, attempts

    def list_models(self, retries: int = 2, timeout: float = 60.0) -> tuple[str, ...]:
        """The names that the server lists: its model's, and its adapters'."""
        page = _read_json(self._send(retries, lambda client: client.get(
            "/models", cast_to=str, options={"headers": self.headers, "timeout": timeout})))
        entries = page.get("data", []) if isinstance(page, dict) else []
        return tuple(str(entry.get("id")) for entry in entries)

    def is_ready(self) -> bool:
        """Whether the server answers, be it that it lists nothing or wants a key."""
        try:
            self.list_models(0, 10.0)
        except RequestFailed as failure:
            return failure.status not in NOT_READY
        return True

    def post(self, path: str, body: dict) -> None:
        """Make one request whose answer says nothing."""
        self._send(0, lambda client: client.post(
            path, cast_to=str, body=body, options={"headers": self.headers}))

    def _send(self, retries: int, request: Callable):
        import openai

        code = ""
        try:
            return request(self.client.with_options(max_retries=retries))
        except openai.APIStatusError as error:
            status, code = error.status_code, str(error.code)
            text = f"HTTP {status}: {redact(first_line(error.response.text), self.key)}"
            attempts = int(error.request.headers["x-stainless-retry-count"]) + 1
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if refused := re.search(r"certificate verify failed: ([^(]+)", str(cause)):
                raise RuntimeError(
                    f"the certificate of {self.url} is refused ({refused[1].strip()}); the "
                    "environment variable SSL_CERT_FILE names the file of the certificates that "
                    "are trusted") from None
            text = f"the connection failed ({type(cause).__name__})"
            status, attempts = 0, retries + 1
        if status in BY_PROXY and (proxies := _name_proxies(self.url)):
            text += (f", through the proxy that {proxies} in the environment names: set NO_PROXY "
                     "to the server's host where it needs none")
        raise RequestFailed(text, status, attempts, code)
