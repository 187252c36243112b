"""Stage 01 with a real teacher: chain-of-thought traces from any OpenAI-compatible endpoint (vLLM, SGLang, hosted).

As MG-Thinker does (section 3.2 and appendix B of its paper), the teacher gets images, question and the verified answer as a
check that it must not reveal, with cues that depend on the kind of task; the wording is ours. A second call asks for a
direct answer without that check; trace_filter.py compares the two.

The images are sent as the student sees them, already resized, so the teacher's pixels are the student's pixels. The key is
read from the environment variable MIG_KIT_API_KEY when the calls are made and is written nowhere. Every finished call is
appended to a file at once; started again, only what is not in that file is asked: after a kill at most the `concurrency`
calls that were under way are asked twice.
"""

import asyncio
import base64
import fcntl
import hashlib
import io
import json
import os
import random
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from PIL import Image

from mig_kit.boxes import BoxFormat, seen_size, to_model_box
from mig_kit.prompts import (
    CHOICE_INSTRUCTION,
    GROUNDING_INSTRUCTION,
    format_answer,
    format_question,
)
from mig_kit.sample import Sample, Trace

KEY = "MIG_KIT_API_KEY"
KINDS = ("trace", "direct")
REPLY_LIMIT = 8 << 20
IN_A_ROW = 10
CUES = {
    "compare": "Go through the images side by side and note what they share and where they differ.",
    "search": "Note what is characteristic of what is asked for, then look for it in every image and rule out what is only alike.",
    "track": "Follow the thing from image to image: its looks, its place among its neighbours, how it moves or turns.",
    "associate": "Say what idea links the images, in use, meaning or position, then find what fits it."}
CUE_OF = {
    "diff": "compare", "view_diff": "compare", "common_object": "compare", "region": "search", "refer_grounding": "search",
    "group_grounding": "search", "object_tracking": "track", "multi_view": "track", "reasoning": "associate",
    "correspondence": "associate", "Difference": "compare", "Common_Object": "compare", "Region_Locating": "search",
    "Referring_Grounding": "search", "Group_Grounding": "search", "Object_Tracking": "track", "Free-Form": "associate"}
RULES = ("Inside <think>, reason from what is visible, step by step, and come to the conclusion last. Do not write coordinates "
         "there, and do not mention that an answer was given to you. Boxes are in {frame}.")
THERE = {"absolute": "pixels of the images as you see them", "normalized_1000": "thousandths of an image's width and height"}
DIRECT = 'Do not reason. Reply with nothing but <answer>{"image": number, "box": [x1,y1,x2,y2]}</answer>.'
DIRECT_CHOICE = "Do not reason. Reply with nothing but the letter in <answer></answer>."


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how hard. url: up to and with /v1; requests_per_minute: 0 for no limit; timeout, waits: seconds.

    token_field: the request's name for the limit on new tokens; some hosted models want "max_completion_tokens".
    """

    url: str
    model: str
    concurrency: int = 4
    requests_per_minute: float = 0.0
    timeout: float = 120.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 60.0
    max_tokens: int = 1024
    temperature: float = 0.0
    token_field: str = "max_tokens"

    def __post_init__(self):
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL:
            parts = httpx.URL("")
        if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query or not self.model:
            raise ValueError("endpoint_url must be like http://localhost:8000/v1, with no name, key or query in it, and "
                             f"endpoint_model must be named; a key goes into the environment variable {KEY}")
        if self.concurrency < 1 or self.attempts < 1:
            raise ValueError("concurrency and attempts must be at least 1")


@dataclass(frozen=True)
class Call:
    """One thing to ask. key: a hash of all that decides the reply; kind: one of KINDS."""

    key: str
    kind: str
    sample: Sample
    box_format: BoxFormat


def teacher_prompt(sample: Sample, kind: str, box_format: BoxFormat) -> str:
    """What is said after the images; "direct" has neither the truth nor the request to think."""
    question = format_question(sample, box_format)
    if kind == "direct":
        return question.removesuffix(CHOICE_INSTRUCTION).removesuffix(GROUNDING_INSTRUCTION) + (DIRECT_CHOICE if sample.options else DIRECT)
    truth = sample.letter or " or ".join(
        format_answer(n, to_model_box(box, sample.sizes[n - 1], box_format)) for n, box in sample.targets)
    cue, rules = CUES[CUE_OF.get(sample.task, "search")], RULES.format(frame=THERE[box_format.coordinates])
    return f"You are an expert at reading several images together. {cue}\n\nQuestion: {question}\n\n{rules}\n\n" \
           f"Only to check your conclusion, and never to be mentioned: the verified answer is {truth}."


def teacher_messages(sample: Sample, kind: str, box_format: BoxFormat) -> list[dict]:
    """The chat in the OpenAI form: images numbered, with their sizes, as JPEG data, resized as the student sees them."""
    content = []
    for number, image in enumerate(sample.images, 1):
        size = seen_size(image.size, box_format)
        buffer = io.BytesIO()
        image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=95, subsampling=0)
        data = base64.b64encode(buffer.getvalue()).decode()
        content += [{"type": "text", "text": f"Image {number} ({size[0]} x {size[1]} pixels): "},
                    {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": teacher_prompt(sample, kind, box_format)}]}]


def make_call(sample: Sample, kind: str, endpoint: Endpoint, box_format: BoxFormat) -> Call:
    """The call with its key: model, settings, text and images; not the server's address, which may move."""
    digest = hashlib.sha256(json.dumps([endpoint.model, endpoint.max_tokens, endpoint.temperature, kind, astuple(box_format),
                                        teacher_prompt(sample, kind, box_format), sample.sizes]).encode())
    for image in sample.images:
        digest.update(image.convert("RGB").tobytes())
    return Call(digest.hexdigest(), kind, sample, box_format)


def load_call_log(path: Path) -> dict[str, dict]:
    """Finished calls by key; a last line cut by a kill is dropped from the file. ValueError if any other line is broken."""
    found = {}
    if not path.is_file():
        return found
    with path.open("r+b") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(file.tell() - len(line))
                break
            try:
                entry = json.loads(line)
                found[entry["key"]] = entry
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} line {number} is broken; delete that line, and its call is made again") from error
    return found


async def ask_all(endpoint: Endpoint, calls: Iterable[Call], path: Path) -> dict[str, dict]:
    """Make the calls that `path` does not hold yet; the log's entries for all of them, by key.

    calls: read as they are needed, `concurrency` at a time. An entry has the "reply", or "failed" where the server refused
    this very request; a call that fails for other reasons in all its attempts gets no entry and is asked again the next time.
    Raises RuntimeError when going on makes no sense: a refused key, an unknown address or model, a redirect, IN_A_ROW failures
    in a row.
    """
    secret = os.environ.get(KEY, "").strip()
    if not (secret.isascii() and (secret + "k").isprintable()):
        raise ValueError(f"the environment variable {KEY} holds characters that no key has; set it again")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{path} is in use by another run; wait for it or give this run another run_id") from None
        done = load_call_log(path)
        log.seek(0, os.SEEK_END)
        run = _Run(endpoint, secret, log, done)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        limits = httpx.Limits(max_connections=endpoint.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=endpoint.timeout, limits=limits) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(run.produce(calls))
                    for _ in range(endpoint.concurrency):
                        group.create_task(run.work(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        if run.works and run.unwritten:
            log.write("".join(json.dumps(entry) + "\n" for entry in run.unwritten).encode())
    return {key: done[key] for key in run.asked if key in done}


class _Run:
    """What the workers of one `ask` share: the queue, the log, the pace."""

    def __init__(self, endpoint: Endpoint, secret: str, log, done: dict[str, dict]):
        self.endpoint, self.secret, self.log, self.done = endpoint, secret, log, done
        self.asked: dict[str, None] = {}
        self.queue: asyncio.Queue = asyncio.Queue(endpoint.concurrency)
        self.next_start = self.paused_until = 0.0
        self.in_a_row = self.finished = 0
        self.unwritten: list[dict] = []
        self.works = False

    async def produce(self, calls: Iterable[Call]) -> None:
        for call in calls:
            if call.key not in self.asked and call.key not in self.done:
                await self.queue.put(call)
            self.asked[call.key] = None
            await asyncio.sleep(0)
        for _ in range(self.endpoint.concurrency):
            await self.queue.put(None)

    async def work(self, client: httpx.AsyncClient) -> None:
        while (call := await self.queue.get()) is not None:
            start = time.time()
            entry, why = await self.attempts(client, call)
            if entry is not None:
                entry = {"key": call.key, "id": call.sample.id, "kind": call.kind, "model": self.endpoint.model, **entry,
                         "seconds": round(time.time() - start, 3)}
                self.done[call.key] = entry
                self.unwritten.append(entry)
            if entry and "reply" in entry:  # a refusal counts only once something else shows that the endpoint works
                self.log.write("".join(json.dumps(e) + "\n" for e in self.unwritten).encode())
                self.log.flush()
                os.fsync(self.log.fileno())
                self.unwritten, self.works = [], True
            self.finished += 1
            if self.finished % 100 == 0:
                print(f"{self.finished} calls finished", flush=True)
            self.in_a_row = 0 if entry and "reply" in entry else self.in_a_row + 1
            if self.in_a_row >= IN_A_ROW:
                raise RuntimeError(f"{IN_A_ROW} calls in a row failed, the last with: {why}; what is done is kept, start again "
                                   "when the endpoint works")

    async def attempts(self, client: httpx.AsyncClient, call: Call) -> tuple[dict | None, str]:
        """The entry to write, or None and why all attempts failed."""
        why = ""
        body = {"model": self.endpoint.model, "messages": teacher_messages(call.sample, call.kind, call.box_format),
                "temperature": self.endpoint.temperature, self.endpoint.token_field: self.endpoint.max_tokens}
        for attempt in range(1, self.endpoint.attempts + 1):
            await self.turn()
            after = None
            try:
                async with asyncio.timeout(self.endpoint.timeout):
                    status, headers, text = await self.post(client, body)
            except TimeoutError:
                why = f"no answer within {self.endpoint.timeout:g} s"
            except httpx.RequestError as error:  # of the connection, or an answer that cannot be decoded
                why = f"the connection failed ({type(error).__name__})"
            else:
                if status == 200:
                    entry = parse_completion(text)
                    if entry is not None:
                        return {**entry, "reply": self.redacted(entry["reply"]), "attempts": attempt}, ""
                    why = "an answer that is no whole chat completion"
                else:
                    why = f"HTTP {status}: {self.redacted(text.decode(errors='replace'))[:200]!r}"
                    after = retry_after(headers.get("retry-after", ""))
                    if status in (400, 413, 422):
                        return {"failed": why, "attempts": attempt}, why
                    if status not in (408, 409, 425, 429) and status < 500:
                        raise RuntimeError(f"the endpoint answered {why}; check endpoint_url, endpoint_model and the environment "
                                           f"variable {KEY}")
            if after is not None and after > 3600:
                raise RuntimeError(f"the endpoint asks to wait {after:.0f} s; what is done is kept, start again then")
            if attempt < self.endpoint.attempts:
                wait = min(self.endpoint.longest_wait, self.endpoint.first_wait * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                if after is not None:  # a limit on the account holds for every worker
                    self.paused_until = max(self.paused_until, time.monotonic() + after)
                await asyncio.sleep(wait)
        return None, why

    async def turn(self) -> None:
        """Wait until the rate and any Retry-After let another request go."""
        step = 60 / self.endpoint.requests_per_minute if self.endpoint.requests_per_minute else 0.0
        while (start := max(self.paused_until, self.next_start)) > time.monotonic():
            await asyncio.sleep(start - time.monotonic())
        self.next_start = time.monotonic() + step

    async def post(self, client: httpx.AsyncClient, body: dict) -> tuple[int, httpx.Headers, bytes]:
        async with client.stream("POST", self.endpoint.url.rstrip("/") + "/chat/completions", json=body) as response:
            text = b""
            async for block in response.aiter_bytes():
                text += block
                if len(text) > REPLY_LIMIT:
                    break
            return response.status_code, response.headers, text

    def redacted(self, text: str) -> str:
        return text.replace(self.secret, "***") if self.secret else text


def parse_completion(text: bytes) -> dict | None:
    """Reply, finish reason and token counts (None where the server gave none); None if this is no whole chat completion."""
    try:
        data = json.loads(text)
        reply, reason = data["choices"][0]["message"]["content"], data["choices"][0].get("finish_reason")
    except (ValueError, RecursionError, TypeError, KeyError, IndexError, AttributeError):
        return None
    if not isinstance(reply, str) or not isinstance(reason, str | None):
        return None
    usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
    counts = {name: usage.get(name) if type(usage.get(name)) is int and usage[name] >= 0 else None
              for name in ("prompt_tokens", "completion_tokens")}
    return {"reply": reply, "finish_reason": reason, **counts}


def retry_after(value: str) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or a date (RFC 9110); None if it is neither."""
    if seconds := re.fullmatch(r" *([0-9]{1,9}(?:\.[0-9]{1,6})?) *", value):
        return float(seconds.group(1))
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


async def request_traces(samples: Iterable[Sample], endpoint: Endpoint, path: Path, box_format: BoxFormat
                 ) -> tuple[list[Trace], list[str]]:
    """The teacher's trace and its direct answer for every sample, in order; "" where there is none.

    samples: with targets or options; may be a generator, whose images are held only while they are asked about. path: the
    log of finished calls. Trace.error is "" or why there is no reply. In a script: asyncio.run(endpoint.traces(...)).
    """
    keys: list[list[str]] = []

    def calls() -> Iterator[Call]:
        for sample in samples:
            if not sample.targets and not sample.letter:
                raise ValueError(f"sample {sample.id} has no target, so there is nothing to check a trace against; leave it out")
            pair = [make_call(sample, kind, endpoint, box_format) for kind in KINDS]
            keys.append([call.key for call in pair])
            yield from pair

    found = await ask_all(endpoint, calls(), path)
    entries = [[found.get(key, {"failed": "no reply in any attempt"}) for key in pair] for pair in keys]
    return ([Trace(trace.get("reply", ""), "endpoint", trace.get("failed", "")) for trace, _ in entries],
            [direct.get("reply", "") for _, direct in entries])


def summarize_usage(path: Path, price_in: float = 0.0, price_out: float = 0.0) -> dict:
    """What the calls in a log took. price_in, price_out: per million tokens; the cost is in their currency.

    "without_counts": calls for which the server told no token counts; they are not in the cost, nor are failed attempts.
    """
    entries = list(load_call_log(path).values())
    tokens = {name: sum(e.get(name) or 0 for e in entries) for name in ("prompt_tokens", "completion_tokens")}
    return {"calls": len(entries), "failed": sum("failed" in e for e in entries),
            "attempts": sum(e.get("attempts", 1) for e in entries), **tokens,
            "without_counts": sum(e.get("prompt_tokens") is None for e in entries if "reply" in e),
            "cost": round((tokens["prompt_tokens"] * price_in + tokens["completion_tokens"] * price_out) / 1e6, 4)}
