"""Replies of a model that servers hold, for stages 04, 05 and 06.

Several servers share the work. One that dies is left out, and its requests are asked again
elsewhere. Servers do data, tensor and pipeline parallelism on their own.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from transformers import GenerationConfig

from mig_kit.boxes import BoxFormat
from mig_kit.engine.model_folders import ServedName, load_config
from mig_kit.engine.processors import load_processor
from mig_kit.engine.server_process import ServerProcess, is_ready
from mig_kit.engine.server_requests import (
    FIELDS_OF_FORM,
    PromptEncoder,
    ServedReply,
    check_prompt_ids,
)
from mig_kit.openai_client import (
    KEY_VARIABLE,
    Connection,
    RequestFailed,
    iter_results,
    parse_server,
    read_api_key,
)
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, end_token_ids

TIMEOUT = 900.0  # seconds without a sign of a server
ATTEMPTS = 5  # of one request at servers that live
RETRY_DELAY = 0.5  # seconds per attempt made
CHECKED_PROMPTS = 8  # of every server, whose ids are compared where none are known
REFUSED_FIELDS = (400, 422)
LISTED_MODELS = 12  # of a server, in a sentence
SET_KEY = f"set the environment variable {KEY_VARIABLE}"
START = "start it first, or take it out of server"
REMEDIES = {401: SET_KEY, 403: SET_KEY, 404: "end its address in /v1"}  # by status


@dataclass
class Server:
    """One server. form: the fields that it takes, an index of FIELDS_OF_FORM."""

    url: str
    connection: Connection
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
    count_lock: Lock = field(default_factory=Lock, repr=False)
    probe_lock: Lock = field(default_factory=Lock, repr=False)

    def ask(self, questions: Iterable[Question], sampling: SamplingOptions,
            with_logps: bool = False) -> Iterator[tuple[Question, list[ServedReply]]]:
        """Every question with its replies, as they come.

        questions: read as they are needed. Raises RuntimeError with one sentence when a server's
        answer cannot be used, or no server is left.
        """
        if self.concurrency < 1:
            raise ValueError(f"concurrency is {self.concurrency}; use 1 or more")
        fields = self.encoder.sampling_fields(sampling, with_logps)
        return iter_results(lambda question: (question, self._draw(question, fields)), questions,
                            self.concurrency)

    def _draw(self, question: Question, fields: dict) -> list[ServedReply]:
        """All replies to a question: servers without `n` give one at a time."""
        body = {"model": self.name, "messages": self.encoder.messages(question.sample), **fields}
        replies: list[ServedReply] = []
        attempts = 0
        while len(replies) < question.replies:
            body["n"] = question.replies - len(replies)
            server = self._pick()
            form, with_logps = server.form, "logprobs" in fields
            try:
                answer, _ = server.connection.chat(
                    {name: body[name] for name in FIELDS_OF_FORM[form] or body if name in body})
            except RequestFailed as failure:
                self._handle_failure(server, form, failure, with_logps)
                attempts += server.is_alive
                if attempts >= ATTEMPTS:
                    raise RuntimeError(f"the server {server.url} failed {ATTEMPTS} times on "
                                       f"{question.sample.id}; look at its log") from None
                time.sleep(RETRY_DELAY * attempts)
                continue
            finally:
                with self.count_lock:
                    server.under_way -= 1
            with self.count_lock:
                server.answers += 1
            answer = answer if isinstance(answer, dict) else {}
            self._check(server, answer, question, with_logps)
            try:
                replies += self.encoder.parse_replies(answer, with_logps)[:body["n"]]
            except ValueError as error:
                raise RuntimeError(f"the server {server.url} gave {error}") from error
        return replies

    def _pick(self) -> Server:
        """The living server with the fewest requests under way, which now has one more;
        RuntimeError if none is left.
        """
        with self.count_lock:
            alive = [server for server in self.servers if server.is_alive]
            if alive:
                server = min(alive, key=lambda server: server.under_way)
                server.under_way += 1
                return server
        reason = self.process and self.process.failure() or "none answers any more"
        raise RuntimeError("no server is left; what is finished is kept, start the stage again "
                           f"when a server works: {reason}")

    def _handle_failure(self, server: Server, form: int, failure: RequestFailed,
                        with_logps: bool) -> None:
        """Leave a dead server out, or ask with fewer fields if these are refused; RuntimeError if
        asking again makes no sense.
        """
        is_first = server.form > form or not server.answers
        last_form = 2 if self.encoder.processor else 3
        if failure.is_temporary:
            self._leave_out_if_dead(server, failure)
        elif failure.status in REFUSED_FIELDS and is_first and form < last_form and not with_logps:
            if form == server.form == 2:
                print(f"the server {server.url} refuses temperature and top_p, and draws with its "
                      f"own: {failure}", flush=True)
            server.form = max(server.form, form + 1)
        else:
            remedy = REMEDIES.get(failure.status, "this request is not one that it takes")
            if failure.status == 404:
                remedy = f"it does not serve '{self.name}' (any more)"
            raise RuntimeError(f"the server {server.url} answered {failure}; {remedy}") from None

    def _leave_out_if_dead(self, server: Server, failure: RequestFailed) -> None:
        """Leave the server out, and say so, unless it answers a probe."""
        with self.probe_lock:
            for wait in (0.2, 1.0, 2.0):
                if not server.is_alive or is_ready(server.url):
                    return
                time.sleep(wait)
            server.is_alive = False
            others = sum(other.is_alive for other in self.servers)
            print(f"the server {server.url} is left out: {failure}; {others} go on", flush=True)

    def _check(self, server: Server, answer: dict, question: Question, with_logps: bool) -> None:
        """Raise RuntimeError unless the answer is this model's, to this prompt."""
        answered_by = answer.get("model")
        if answered_by not in (self.name, None) and with_logps:
            raise RuntimeError(f"the server {server.url} answered as '{answered_by}', not as "
                               f"'{self.name}': its adapter is stale; start it again")
        expected = question.prompt_ids
        if expected is None and server.answers <= CHECKED_PROMPTS:
            expected = self.encoder.prompt_ids(question.sample)
        if expected is not None:
            check_prompt_ids(answer, expected, question.sample.id, server.url)


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

    server: addresses or a command, see `parse_server`. model: a folder, a hub name or a ServedName.
    system: a name by which a server may serve the model, beside its folder's. Raises ValueError or
    RuntimeError before anything is drawn.
    """
    key, urls = read_api_key(), parse_server(server)
    encoder = PromptEncoder(None, box_format, [])
    if not isinstance(model, ServedName):
        processor = load_processor(model, box_format)
        ends = end_token_ids(_load_generation_config(model), processor)
        encoder = PromptEncoder(processor, box_format, ends)
    with ExitStack() as stack:
        process = None
        if not urls:
            process = stack.enter_context(closing(ServerProcess(server, model, log)))
            process.wait_until_ready()
            urls = [process.url]
        form = 0 if encoder.processor else 1
        servers = [Server(url, stack.enter_context(closing(Connection(url, key, TIMEOUT))),
                          form=form) for url in urls]
        names = (str(model), str(Path(model).resolve()), system)
        name = _find_served_name(servers, names, is_own=process is not None)
        chosen = [server for server in servers if name in server.models]
        yield ServedModel(name, chosen, encoder, concurrency, process)


def _find_served_name(servers: list[Server], names: tuple[str, ...], is_own: bool) -> str:
    """What the servers call the model; RuntimeError unless one of them serves it under `names`.

    A server that does not answer, as if it has died under another model of the stage, is left out.
    """
    failures = []
    for server in servers:
        try:
            server.models = server.connection.list_models()
        except RequestFailed as failure:
            failures.append(f"the server {server.url} does not list its models: {failure}; "
                            f"{REMEDIES.get(failure.status, START)}")
    served = {model for server in servers for model in server.models}
    name = next((name for name in names if name in served), None)
    if is_own:  # it was given the model, under whatever name; some servers list nothing
        servers[0].models = (name or (served.pop() if len(served) == 1 else names[0]),)
        return servers[0].models[0]
    if len(failures) == len(servers):
        raise RuntimeError(failures[0])
    for failure in failures:
        print(f"{failure}; it is left out", flush=True)
    if name is None:
        listed = ", ".join(sorted(served)[:LISTED_MODELS]) or "models that it does not list"
        others = f" and {len(served) - LISTED_MODELS} more" if len(served) > LISTED_MODELS else ""
        raise RuntimeError(
            f"no server serves the model {names[0]}, but only {listed}{others}; use one of these "
            f"names, start a server with this folder, or with --served-model-name {names[-1]} "
            "where it has another path, or give a command with {model} and {port}")
    return name
