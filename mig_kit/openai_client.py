"""OpenAI-compatible servers: which addresses are taken, where the key is, and the client."""

import os
import re
from urllib.parse import urlsplit

import openai

KEY_VARIABLE = "MIG_KIT_API_KEY"
# a web address without a name, key, query or fragment in it
ADDRESS = re.compile(r"https?://(?:[\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?(?:/[^\s?#]*)?",
                     re.IGNORECASE | re.ASCII)


def read_api_key() -> str:
    """The key of the environment, "" if there is none; ValueError if it cannot be a key."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {KEY_VARIABLE} holds characters that no key "
                         "has; set it again")
    return key


def authorization_header(key: str) -> dict:
    """The header with the key; without one, the client's own is left out."""
    return {"Authorization": f"Bearer {key}" if key else openai.omit}


def is_on_this_machine(url: str) -> bool:
    """Whether the address is one of this machine's own, which no proxy can reach."""
    host = urlsplit(url).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def open_client(url: str, key: str, timeout: float, **options) -> openai.AsyncOpenAI:
    """A client of the server at `url`, up to and with /v1; it follows no redirect.

    timeout: seconds without a sign of the server. options: as of httpx.AsyncClient. A proxy that
    the environment names is not used for this machine's own servers.
    """
    # a redirect could lead the images elsewhere
    transport = openai.DefaultAsyncHttpxClient(
        follow_redirects=False, trust_env=not is_on_this_machine(url), **options)
    # without a key of ours the client would take one of its own from the environment
    return openai.AsyncOpenAI(base_url=url, api_key=key or "none", timeout=timeout,
                              http_client=transport)
