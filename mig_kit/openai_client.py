"""OpenAI-compatible servers: which addresses are taken, where the key is, the client and what it
does with errors.
"""

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

KEY_VARIABLE = "MIG_KIT_API_KEY"
# a web address without a name, key, query or fragment in it
ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:/[^\s?#]*)?",
                     re.IGNORECASE | re.ASCII)
TEMPORARY = (408, 409, 429)  # statuses that may pass, like those from 500 on


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


def first_line(body: bytes | str) -> str:
    """What a server said, in at most 300 characters."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        data = json.loads(text)
        error = data.get("error", data) if isinstance(data, dict) else {}
        text = error.get("message", text) if isinstance(error, dict) else text
    except ValueError:
        pass
    return " ".join(str(text).split())[:300]


async def run_workers(work: Callable[[], Awaitable], count: int) -> None:
    """Run work() `count` times side by side; the first error ends all and is raised as it is."""
    failure = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        failure = errors.exceptions[0]
    if failure is not None:  # raised in the block, a notebook would show it without its sentence
        raise failure


def authorization_header(key: str) -> dict:
    """The header with the key; without one, the client's own is left out."""
    import openai  # seconds, which an address need not wait for

    return {"Authorization": f"Bearer {key}" if key else openai.omit}


def parse_server(server: str) -> list[str]:
    """The addresses that `server` lists, [] for a command.

    ValueError where it is neither addresses nor a command with {model} and {port}.
    """
    words = server.replace(",", " ").split()
    if words and all(ADDRESS.fullmatch(word) for word in words):
        return [word.rstrip("/") for word in dict.fromkeys(words)]
    if any("://" in word for word in words[:1]) or not all(
            mark in server for mark in ("{model}", "{port}")):
        raise ValueError("server is neither an address nor a command; give addresses such as "
                         "http://localhost:8000/v1, with no key in them, or a command with "
                         "{model} and {port} in it")
    return []


def is_on_this_machine(url: str) -> bool:
    """Whether the address is one of this machine's own, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def open_client(url: str, key: str, timeout: float, **options):
    """An openai.AsyncOpenAI of the server at `url`, up to and with /v1; it follows no redirect.

    timeout: seconds without a sign of the server. options: as of httpx.AsyncClient. A proxy that
    the environment names is not used for this machine's own servers.
    """
    import openai

    # a redirect could lead the images elsewhere
    transport = openai.DefaultAsyncHttpxClient(
        follow_redirects=False, trust_env=not is_on_this_machine(url), **options)
    # without a key of ours the client would take one of its own from the environment
    return openai.AsyncOpenAI(base_url=url, api_key=key or "none", timeout=timeout,
                              http_client=transport)
