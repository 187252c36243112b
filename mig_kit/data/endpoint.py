"""Stage 01 with a model teacher: traces from any OpenAI-compatible endpoint (vLLM, SGLang, hosted).

Each sample costs two calls, a trace and a direct answer (prompts: teacher_prompt.py), which
`filters.drop_reason_of_model_teacher` compares. openai's client makes them and tries again where
that may help.

The key is read from the environment variable MIG_KIT_API_KEY when the calls are made and is written
nowhere. Every finished call is appended to a log at once and never made again; a kill loses at most
the `concurrency` calls under way.
"""

import asyncio
import fcntl
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import openai

from mig_kit.boxes import BoxFormat
from mig_kit.data.call_log import CallLog, LoggedReplies, load_call_log
from mig_kit.data.teacher_prompt import KINDS, teacher_messages, teacher_prompt
from mig_kit.image_files import image_digests
from mig_kit.openai_client import (
    ADDRESS,
    KEY_VARIABLE,
    TEMPORARY,
    authorization_header,
    open_client,
    read_api_key,
    redact,
    run_workers,
)
from mig_kit.sample import Sample, Trace

MAX_FAILURES_IN_A_ROW = 10
RETRY_DELAY = 0.5  # seconds per attempt made, after a reply that cannot be used
REFUSED_REQUEST = (400, 413, 422)  # statuses that speak of this request alone


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher is, and how hard to ask it.

    url: up to and with /v1. requests_per_minute: 0 for no limit. timeout: seconds without a sign of
    the server. attempts: of one call; between them openai's client waits 0.5 to 8 s, or as long as
    Retry-After says. token_field: the request's name for the limit on new tokens; some hosted
    models want "max_completion_tokens". Raises ValueError for an address that holds a key, among
    others.
    """

    url: str
    model: str
    concurrency: int = 4
    requests_per_minute: float = 0.0
    timeout: float = 120.0
    attempts: int = 6
    max_tokens: int = 1024
    temperature: float = 0.0
    token_field: str = "max_tokens"

    def __post_init__(self):
        if not ADDRESS.fullmatch(self.url) or not self.model:
            raise ValueError("endpoint_url must be like http://localhost:8000/v1, with no name, "
                             "key or query in it, and endpoint_model must be named; a key goes "
                             f"into the environment variable {KEY_VARIABLE}")
        if self.concurrency < 1 or self.attempts < 1:
            raise ValueError("concurrency and attempts must be at least 1")


@dataclass(frozen=True)
class Call:
    """One call to the teacher. key: a hash of all that decides the reply; kind: one of KINDS."""

    key: str
    kind: str
    sample: Sample
    box_format: BoxFormat


def make_call(sample: Sample, kind: str, endpoint: Endpoint, box_format: BoxFormat) -> Call:
    """The call with its key: model, settings, text and images; not the server's address, which may
    move.
    """
    settings = [endpoint.model, endpoint.max_tokens, endpoint.temperature, kind,
                astuple(box_format), teacher_prompt(sample, kind, box_format), sample.sizes]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image in image_digests(sample.images):
        digest.update(image)
    return Call(digest.hexdigest(), kind, sample, box_format)


async def make_calls(endpoint: Endpoint, calls: Iterable[Call], path: Path) -> CallLog:
    """Make the calls that the log `path` does not hold; the log, which then holds all of them.

    calls: read as they are needed, `concurrency` at a time. An entry has the "reply", or "failed"
    where the server refused this very request. A call that fails for other reasons in all its
    attempts gets no entry and is made again the next time. RuntimeError when going on makes no
    sense: a refused key, an unknown address or model, a redirect, MAX_FAILURES_IN_A_ROW.
    """
    key = read_api_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{path} is in use by another run; wait for it or give this run "
                               "another run_id") from None
        log = load_call_log(path)
        requested: set[str] = set()

        def iter_new_calls() -> Iterator[Call]:
            for call in calls:
                is_new = call.key not in requested and call.key not in log
                requested.add(call.key)
                if is_new:
                    yield call

        session = _Session(endpoint, key, file, log)
        new_calls = iter_new_calls()
        async with session.client:
            await run_workers(lambda: session.work(new_calls), endpoint.concurrency)
        if session.has_replied:
            log.write(file)
    return log


class _Session:
    """What the workers of one `make_calls` share: the client, the log, the count of failures."""

    def __init__(self, endpoint: Endpoint, key: str, file, log: CallLog):
        self.endpoint = endpoint
        self.key = key
        self.file = file
        self.call_log = log
        self.has_replied = False
        self.finished = self.failures_in_a_row = 0
        self.next_start = 0.0
        self.client = open_client(endpoint.url, key, endpoint.timeout,
                                  event_hooks={"request": [self.wait_for_turn]})

    async def wait_for_turn(self, request) -> None:
        """Keep every attempt, those of openai's client too, to the requests per minute."""
        rate = self.endpoint.requests_per_minute
        start = max(self.next_start, time.monotonic())
        self.next_start = start + (60 / rate if rate else 0.0)
        await asyncio.sleep(start - time.monotonic())

    async def work(self, calls: Iterator[Call]) -> None:
        """Make calls until there are none left; `calls` is shared with the other workers."""
        for call in calls:
            start = time.monotonic()
            entry, failure = await self.request(call)
            if entry is not None:
                seconds = round(time.monotonic() - start, 3)
                self.log({"key": call.key, "id": call.sample.id, "kind": call.kind,
                          "model": self.endpoint.model, **entry, "seconds": seconds})
            self.finished += 1
            if self.finished % 100 == 0:
                print(f"{self.finished} calls finished", flush=True)
            self.failures_in_a_row = self.failures_in_a_row + 1 if failure else 0
            if self.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise RuntimeError(
                    f"{MAX_FAILURES_IN_A_ROW} calls in a row failed, the last with: {failure}; "
                    "finished calls are kept, start again when the endpoint works")

    async def request(self, call: Call) -> tuple[dict | None, str]:
        """The entry for the log, None if the call may be made again, and why there is no reply."""
        messages = teacher_messages(call.sample, call.kind, call.box_format)
        attempts = 0
        while attempts < self.endpoint.attempts:
            client = self.client.with_options(max_retries=self.endpoint.attempts - attempts - 1)
            try:
                response = await client.chat.completions.with_raw_response.create(
                    model=self.endpoint.model, messages=messages,
                    temperature=self.endpoint.temperature,
                    extra_headers=authorization_header(self.key),
                    extra_body={self.endpoint.token_field: self.endpoint.max_tokens})
            except openai.APIStatusError as error:
                retries = int(error.request.headers["x-stainless-retry-count"])
                return self.read_refusal(error, attempts + retries + 1)
            except openai.APIConnectionError as error:
                return None, f"the connection failed ({type(error.__cause__).__name__})"
            attempts += response.retries_taken + 1
            completion = parse_completion(response.content)
            if completion is not None:
                reply = redact(completion["reply"], self.key)
                return {**completion, "reply": reply, "attempts": attempts}, ""
            await asyncio.sleep(RETRY_DELAY * attempts)
        return None, "an answer that is no complete chat completion"

    def read_refusal(self, error: openai.APIStatusError, attempts: int) -> tuple[dict | None, str]:
        """As `request`; RuntimeError if the status speaks of every call."""
        status = error.status_code
        failure = f"HTTP {status}: {redact(error.response.text, self.key)[:200]!r}"
        if status in REFUSED_REQUEST:
            return {"failed": failure, "attempts": attempts}, failure
        if status not in TEMPORARY and status < 500:
            raise RuntimeError(f"the endpoint answered {failure}; check endpoint_url, "
                               f"endpoint_model and the environment variable {KEY_VARIABLE}")
        wait = error.response.headers.get("retry-after")
        if wait and attempts < self.endpoint.attempts:  # longer than openai's client waits
            raise RuntimeError(f"the endpoint answered {failure} and asks to wait (Retry-After: "
                               f"{wait[:40]}); finished calls are kept, start again then")
        return None, failure

    def log(self, entry: dict) -> None:
        """Write the entry; a refusal only once a reply shows that the endpoint works."""
        self.call_log.add(entry)
        if "reply" in entry:
            self.has_replied = True
            self.call_log.write(self.file)


def parse_completion(body: bytes) -> dict | None:
    """Reply, finish reason and token counts (None where the server gave none) of a chat completion.

    None if this is no complete one; never raises.
    """
    try:
        data = json.loads(body)
        choice = data["choices"][0]
        reply, reason = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return None
    if not isinstance(reply, str) or not isinstance(reason, str | None):
        return None
    usage = data.get("usage")
    counts: dict[str, int | None] = {}
    for name in ("prompt_tokens", "completion_tokens"):
        count = usage.get(name) if isinstance(usage, dict) else None
        counts[name] = count if type(count) is int and count >= 0 else None
    return {"reply": reply, "finish_reason": reason, **counts}


async def request_traces(samples: Iterable[Sample], endpoint: Endpoint, path: Path,
                         box_format: BoxFormat) -> tuple[LoggedReplies, LoggedReplies]:
    """The teacher's trace and its direct answer for every sample, in order, each read from the log
    when it is looked at; "" where there is none.

    samples: with targets or options, or for all boxes; may be a generator, whose images are held
    only while they are asked about. path: the log of finished calls. Trace.error is "" or why there
    is no reply. In a script: asyncio.run(endpoint.request_traces(...)). Raises as `make_calls`, and
    ValueError for a sample without a target.
    """
    keys: dict[str, list[str]] = {kind: [] for kind in KINDS}

    def iter_calls() -> Iterator[Call]:
        for sample in samples:
            if not sample.targets and not sample.letter and not sample.find_all:
                raise ValueError(f"sample {sample.id} has no target, so there is nothing to check "
                                 "a trace against; leave it out")
            for kind in KINDS:
                call = make_call(sample, kind, endpoint, box_format)
                keys[kind].append(call.key)
                yield call

    log = await make_calls(endpoint, iter_calls(), path)
    trace_keys, direct_keys = (keys[kind] for kind in KINDS)
    return (LoggedReplies(log, trace_keys, _to_trace),
            LoggedReplies(log, direct_keys, lambda entry: entry.get("reply", "")))


def _to_trace(entry: dict) -> Trace:
    return Trace(entry.get("reply", ""), "endpoint", entry.get("failed", ""))


def summarize_usage(path: Path, price_in: float = 0.0, price_out: float = 0.0) -> dict:
    """What the calls in a log took.

    price_in, price_out: per million tokens; the cost is in their currency. "without_counts": calls
    for which the server told no token counts; they are not in the cost, nor are failed attempts.
    """
    usage: Counter = Counter()
    for entry in load_call_log(path).values():
        usage["calls"] += 1
        usage["failed"] += "failed" in entry
        usage["attempts"] += entry.get("attempts", 1)
        for name in ("prompt_tokens", "completion_tokens"):
            usage[name] += entry.get(name) or 0
        usage["without_counts"] += "reply" in entry and entry.get("prompt_tokens") is None
    cost = (usage["prompt_tokens"] * price_in + usage["completion_tokens"] * price_out) / 1e6
    names = ("calls", "failed", "attempts", "prompt_tokens", "completion_tokens", "without_counts")
    return {**{name: usage[name] for name in names}, "cost": round(cost, 4)}
