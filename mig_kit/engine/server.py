"""Replies of a model that servers hold: one asynchronous client for stages 04, 05 and 06.

Several servers share the work. One that dies is left out, and its requests are asked again
elsewhere. Servers do data, tensor and pipeline parallelism on their own.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import openai
from transformers import GenerationConfig

from mig_kit.boxes import BoxFormat
from mig_kit.engine.generation import Sampling, end_token_ids
from mig_kit.engine.model_folders import load_config
from mig_kit.engine.processors import load_processor
from mig_kit.engine.server_process import ServerProcess, is_ready
from mig_kit.engine.server_requests import (
    OPENAI_FIELDS,
    PromptEncoder,
    ServedReply,
    check_prompt_ids,
)
from mig_kit.openai_client import (
    KEY_VARIABLE,
    TEMPORARY,
    authorization_header,
    first_line,
    open_client,
    parse_server,
    read_api_key,
    redact,
    run_workers,
)
from mig_kit.sample import Sample

TIMEOUT = 900.0  # seconds without a sign of a server
ATTEMPTS = 5  # of one request at servers that live
RETRY_DELAY = 0.5  # seconds per attempt made
CHECKED_PROMPTS = 8  # of every server, whose ids are compared where none are known
REFUSED_FIELDS = (400, 422)
SET_KEY = f"set the environment variable {KEY_VARIABLE}"
START = "start it first, or take it out of server"
REMEDIES = {401: SET_KEY, 403: SET_KEY, 404: "end its address in /v1"}  # by status


@dataclass
class Server:
    """One server. form: the fields that it takes, 0 all, 1 OpenAI's own, 2 those without `n`."""

    url: str
    under_way: int = 0
    form: int = 0
    answers: int = 0
    is_alive: bool = True
    models: tuple[str, ...] = ()


class Question(NamedTuple):
    """`replies` replies to a sample; prompt_ids: the kit's own, None to have them computed."""

    sample: Sample
    replies: int
    prompt_ids: list[int] | None = None


@dataclass
class ServedModel:
    """A model that servers hold; it takes the place of a Policy where replies are drawn.

    name: what requests call the model. concurrency: requests under way. process: the server that
    the stage has started, None for others' servers.
    """

    name: str
    servers: list[Server]
    encoder: PromptEncoder
    concurrency: int
    process: ServerProcess | None = None
    key: str = field(default_factory=read_api_key, repr=False)

    def ask(self, questions: Iterable[Question], sampling: Sampling,
            with_logps: bool = False) -> Iterator[tuple[Question, list[ServedReply]]]:
        """Every question with its replies, as they come.

        questions: read as they are needed. Raises RuntimeError with one sentence when a server's
        answer cannot be used, or no server is left.
        """
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; use 1 or more")

        async def produce(put: Callable) -> None:
            session = _Session(self, sampling, with_logps)
            shared = iter(questions)
            try:
                await run_workers(lambda: session.work(shared, put), self.concurrency)
            finally:
                await session.close()

        return iterate(produce)


class _Session:
    """What the requests of one `ask` share."""

    def __init__(self, model: ServedModel, sampling: Sampling, with_logps: bool):
        self.model, self.encoder, self.with_logps = model, model.encoder, with_logps
        self.fields = model.encoder.sampling_fields(sampling, with_logps)
        self.clients = {server.url: open_client(server.url, model.key, TIMEOUT)
                        for server in model.servers if server.is_alive}
        self.probe_lock = asyncio.Lock()

    async def close(self) -> None:
        for client in self.clients.values():
            await client.close()

    async def work(self, questions: Iterator[Question], put: Callable) -> None:
        """Ask until no question is left; `questions` is shared with the other workers."""
        for question in questions:
            put((question, await self.draw(question)))

    async def draw(self, question: Question) -> list[ServedReply]:
        """All replies to a question: servers without `n` give one at a time."""
        messages = await asyncio.to_thread(self.encoder.messages, question.sample)
        replies: list[ServedReply] = []
        attempts = 0
        while len(replies) < question.replies:
            server = self.pick()
            answer = await self.post(server, messages, question.replies - len(replies))
            if answer is None:
                attempts += server.is_alive
                if attempts >= ATTEMPTS:
                    raise RuntimeError(f"the server {server.url} failed {ATTEMPTS} times on "
                                       f"{question.sample.id}; look at its log")
                await asyncio.sleep(RETRY_DELAY * attempts)
                continue
            await self.check(server, answer, question)
            try:
                drawn = self.encoder.parse_replies(answer, self.with_logps)
            except ValueError as error:
                raise RuntimeError(f"the server {server.url} gave {error}") from error
            replies += drawn[:question.replies - len(replies)]
        return replies

    def pick(self) -> Server:
        """The living server with the fewest requests under way; RuntimeError if none is left."""
        alive = [server for server in self.model.servers if server.is_alive]
        if not alive:
            process = self.model.process
            reason = process and process.failure() or "none answers any more"
            raise RuntimeError("no server is left; what is finished is kept, start the stage again "
                               f"when a server works: {reason}")
        return min(alive, key=lambda server: server.under_way)

    async def post(self, server: Server, messages: list[dict], count: int) -> dict | None:
        """The server's answer; None if the request is to be made again, perhaps elsewhere."""
        form = server.form
        body = {"model": self.model.name, "messages": messages, **self.fields}
        if form < 2:
            body["n"] = count
        if form:
            body = {name: value for name, value in body.items() if name in OPENAI_FIELDS}
        server.under_way += 1
        try:
            answer = await self.clients[server.url].with_options(max_retries=0).post(
                "/chat/completions", cast_to=object, body=body,
                options={"headers": authorization_header(self.model.key)})
        except openai.APIStatusError as error:
            return await self.read_refusal(server, form, error)
        except openai.APIConnectionError as error:
            return await self.note_failure(server, type(error.__cause__ or error).__name__)
        finally:
            server.under_way -= 1
        server.answers += 1
        return answer if isinstance(answer, dict) else {}

    async def read_refusal(self, server: Server, form: int, error: openai.APIStatusError) -> None:
        """Find what to do about a status; RuntimeError if asking again makes no sense."""
        status = error.status_code
        message = redact(first_line(error.response.text), self.model.key)
        if status in TEMPORARY or status >= 500:
            return await self.note_failure(server, f"HTTP {status}: {message}")
        is_first = server.form > form or not server.answers
        if status in REFUSED_FIELDS and is_first and form < 2 and not self.with_logps:
            server.form = max(server.form, form + 1)
            return None
        hint = REMEDIES.get(status, "this request is not one that it takes")
        if status == 404:
            hint = f"it does not serve '{self.model.name}' (any more)"
        raise RuntimeError(f"the server {server.url} answered HTTP {status}, {hint}: {message}")

    async def note_failure(self, server: Server, failure: str) -> None:
        """Leave the server out if it is dead, and say so."""
        async with self.probe_lock:
            for wait in (0.2, 1.0, 2.0):
                if not server.is_alive:
                    return
                if await asyncio.to_thread(is_ready, server.url):
                    return
                await asyncio.sleep(wait)
            server.is_alive = False
            others = sum(other.is_alive for other in self.model.servers)
            print(f"the server {server.url} is left out ({failure}); {others} go on", flush=True)

    async def check(self, server: Server, answer: dict, question: Question) -> None:
        """Raise RuntimeError unless the answer is this model's, to this prompt."""
        answered_by = answer.get("model")
        if answered_by not in (self.model.name, None) and self.with_logps:
            raise RuntimeError(f"the server {server.url} answered as '{answered_by}', not as "
                               f"'{self.model.name}': its adapter is stale; start it again")
        expected = question.prompt_ids
        if expected is None:
            if server.answers > CHECKED_PROMPTS:
                return
            expected = await asyncio.to_thread(self.encoder.prompt_ids, question.sample)
        check_prompt_ids(answer, expected, question.sample.id, server.url)


def iterate(produce: Callable) -> Iterator:
    """What the coroutine produce(put) puts, as it comes.

    It runs in a thread with an event loop of its own, because a notebook's thread has one that runs
    already. When the caller stops or is interrupted, it is cancelled.
    """
    items: queue.SimpleQueue = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(produce(lambda item: items.put((True, item))))

    def run() -> None:
        try:
            loop.run_until_complete(task)
            items.put((False, None))
        except BaseException as error:
            items.put((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            goes_on, item = items.get()
            if not goes_on:
                break
            yield item
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()
        loop.close()
    if item is not None:
        raise item


def _load_generation_config(model: str | Path) -> GenerationConfig:
    """The model's, or what its config.json says where it has none."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(load_config(model))


@contextmanager
def serve_model(server: str, concurrency: int, model: str | Path, system: str,
                box_format: BoxFormat, log: Path) -> Iterator[ServedModel]:
    """A model on servers; a server that the stage starts ends with the context.

    server: addresses or a command, see `parse_server`. system: a name by which a server may serve
    the model, beside its folder's. Raises ValueError or RuntimeError before anything is drawn.
    """
    key, urls = read_api_key(), parse_server(server)
    processor = load_processor(model, box_format)
    ends = end_token_ids(_load_generation_config(model), processor)
    encoder = PromptEncoder(processor, box_format, ends)
    process = None if urls else ServerProcess(server, model, log)
    try:
        if process:
            process.wait_until_ready()
        servers = [Server(url) for url in urls or [process.url]]
        names = (str(model), str(Path(model).resolve()), system)
        name = asyncio_run(_find_served_name(servers, names, key, is_own=process is not None))
        chosen = [server for server in servers if name in server.models]
        yield ServedModel(name, chosen, encoder, concurrency, process, key)
    finally:
        if process:
            process.stop()


def asyncio_run(coroutine):
    """The result of a coroutine, also in a notebook's thread."""
    async def produce(put: Callable) -> None:
        put(await coroutine)

    return list(iterate(produce))[0]


async def list_models(client: openai.AsyncOpenAI, key: str) -> tuple[str, ...]:
    """The names that a server lists: its model's, and its adapters'."""
    page = await client.with_options(max_retries=2).get(
        "/models", cast_to=object, options={"headers": authorization_header(key)})
    entries = page.get("data", []) if isinstance(page, dict) else []
    return tuple(str(entry.get("id")) for entry in entries)


async def _find_served_name(servers: list[Server], names: tuple[str, ...], key: str,
                            is_own: bool) -> str:
    """What the servers call the model; RuntimeError unless one of them serves it under `names`.

    One that does not answer, as when it has died under another model of the stage, is left out.
    """
    failures = []
    for server in servers:
        async with open_client(server.url, key, 60.0) as client:
            try:
                server.models = await list_models(client, key)
            except openai.OpenAIError as error:
                cause, remedy = type(error.__cause__ or error).__name__, START
                if isinstance(error, openai.APIStatusError):
                    message = redact(first_line(error.response.text), key)
                    cause = f"HTTP {error.status_code}: {message}"
                    remedy = REMEDIES.get(error.status_code, START)
                failures.append(f"the server {server.url} does not list its models ({cause}); "
                                f"{remedy}")
    if failures and not is_own:  # a server of one's own is up, and may list nothing
        if len(failures) == len(servers):
            raise RuntimeError(failures[0])
        print(*(f"{failure}; it is left out" for failure in failures), sep="\n", flush=True)
    served = {model for server in servers for model in server.models}
    name = next((name for name in names if name in served), None)
    if is_own:  # it was given the model, under whatever name; some servers list nothing
        servers[0].models = (name or (served.pop() if len(served) == 1 else names[0]),)
        return servers[0].models[0]
    if name is None:
        listed = ", ".join(sorted(served)) or "models that it does not list"
        raise RuntimeError(
            f"no server serves the model {names[0]}, but only {listed}; start "
            f"one with this folder, or with --served-model-name {names[-1]} where it has another "
            "path, or give a command with {model} and {port}")
    return name
