"""Replies of a model that servers hold, for stages 04, 05 and 06.

Servers share the work, and what a dead one leaves goes to the others. So that they draw as the
kit's own loop does, a request holds the images as the model sees them and every sampling parameter,
and prompt ids are compared. Requests have no seed: served replies cannot be repeated to the bit.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

from PIL import Image

from mig_kit.boxes import BoxFormat
from mig_kit.image_files import to_data_url
from mig_kit.models.processors import StillImageProcessor, render_prompt, resize_as_seen
from mig_kit.openai_client import KEY_VARIABLE, Connection, RequestFailed, iter_results, read_choice
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, forbidden_token_ids

ATTEMPTS = 5  # of one request at servers that live
RETRY_DELAY = 0.5  # seconds per attempt made
CHECKED_PROMPTS = 8  # of every server, whose ids are compared where none are known
REFUSED_FIELDS = (400, 422)
SET_KEY = f"set the environment variable {KEY_VARIABLE}"
REMEDIES = {401: SET_KEY, 403: SET_KEY, 404: "end its address in /v1"}  # by status
FACTOR = 28  # images whose sides absolute boxes count are multiples of it, see boxes.smart_resize
FORBIDDEN_BIAS = -100.0  # the lowest that the API takes
OF_ONE = ("model", "messages", "temperature", "top_p", "max_tokens", "logit_bias")  # OpenAI's
# What a request may hold; a server that refuses the first is asked with the next. Only models that
# the kit cannot load get to the last.
FORMS = (
    (),  # all fields that the kit has, vLLM's
    (*OF_ONE, "n"),
    OF_ONE,  # one reply a request
    ("model", "messages", "max_completion_tokens"))  # OpenAI's reasoning models


@dataclass
class Server:
    """One server; form: index in FORMS of the fields that it takes."""

    url: str
    connection: Connection
    under_way: int = 0
    form: int = 0
    answers: int = 0
    is_alive: bool = True
    models: tuple[str, ...] = ()


class Question(NamedTuple):
    """Asks for `replies` replies to a sample; prompt_ids: of the kit, None to compute them."""

    sample: Sample
    replies: int
    prompt_ids: list[int] | None = None


@dataclass(frozen=True)
class ServedReply:
    """One reply of a server."""

    text: str
    ids: list[int] | None = None  # with the end token; None if the server does not return them
    logps: list[float] | None = None  # log-probability of each id
    finish_reason: str = ""  # as the server calls it


@dataclass
class ServedModel:
    """A model that servers hold, used instead of a Policy."""

    name: str  # what requests call the model
    servers: list[Server]
    concurrency: int  # requests under way
    # None for a model that the kit cannot load, whose prompts are not compared
    processor: StillImageProcessor | None
    box_format: BoxFormat
    end_tokens: list[int]  # every token that ends a reply
    failure: Callable[[], str] = str  # why a server that the stage has started ended, or ""
    count_lock: Lock = field(default_factory=Lock, repr=False)
    probe_lock: Lock = field(default_factory=Lock, repr=False)
    tokenizer_lock: Lock = field(default_factory=Lock, repr=False)  # it serves one thread at a time

    def ask(self, questions: Iterable[Question], sampling: SamplingOptions,
            with_logps: bool = False) -> Iterator[tuple[Question, list[ServedReply]]]:
        """Yields every question with its replies, in the order in which servers answer.

        Raises: RuntimeError if an answer cannot be used, or no server is left.
        """
        fields = self.sampling_fields(sampling, with_logps)
        return iter_results(lambda question: (question, self._draw(question, fields)), questions,
                            self.concurrency)

    def _draw(self, question: Question, fields: dict) -> list[ServedReply]:
        """All replies to a question: servers without `n` give one at a time."""
        body = {"model": self.name, "messages": self.messages(question.sample), **fields}
        replies: list[ServedReply] = []
        attempts = 0
        while len(replies) < question.replies:
            body["n"] = question.replies - len(replies)
            server = self._pick()
            form, with_logps = server.form, "logprobs" in fields
            try:
                answer, _ = server.connection.chat(
                    {name: body[name] for name in FORMS[form] or body if name in body})
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
                replies += self.parse_replies(answer, with_logps)[:body["n"]]
            except ValueError as error:
                raise RuntimeError(f"the server {server.url} gave {error}") from error
        return replies

    def _pick(self) -> Server:
        """The least busy living server, which now has one more request; RuntimeError if none."""
        with self.count_lock:
            alive = [server for server in self.servers if server.is_alive]
            if alive:
                server = min(alive, key=lambda server: server.under_way)
                server.under_way += 1
                return server
        reason = self.failure() or "none answers any more"
        raise RuntimeError("no server is left; what is finished is kept, start the stage again "
                           f"when a server works: {reason}")

    def _handle_failure(self, server: Server, form: int, failure: RequestFailed,
                        with_logps: bool) -> None:
        """Leave a dead server out, or ask with fewer fields; RuntimeError if neither can help."""
        is_first = server.form > form or not server.answers
        last_form = 2 if self.processor else 3
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
        """Leave the server out with a printed sentence, unless it answers one of three probes."""
        with self.probe_lock:
            for wait in (0.2, 1.0, 2.0):
                if not server.is_alive or server.connection.is_ready():
                    return
                time.sleep(wait)
            server.is_alive = False
            others = sum(other.is_alive for other in self.servers)
            print(f"the server {server.url} is left out: {failure}; {others} go on", flush=True)

    def _check(self, server: Server, answer: dict, question: Question, with_logps: bool) -> None:
        """RuntimeError if another model has answered, or another prompt was read."""
        answered_by = answer.get("model")
        if answered_by not in (self.name, None) and with_logps:
            raise RuntimeError(f"the server {server.url} answered as '{answered_by}', not as "
                               f"'{self.name}': its adapter is stale; start it again")
        expected = question.prompt_ids
        if expected is None and server.answers <= CHECKED_PROMPTS:
            expected = self.prompt_ids(question.sample)
        if expected is not None:
            check_prompt_ids(answer, expected, question.sample.id, server.url)

    def messages(self, sample: Sample) -> list[dict]:
        """The sample's prompt in OpenAI's form; images are PNG of the size that the model sees."""
        images = iter(sample.images)
        messages = chat_messages(sample, self.box_format)
        for message in messages:
            message["content"] = [
                part if part["type"] == "text" else self._image_part(next(images))
                for part in message["content"]]
        return messages

    def _image_part(self, image: Image.Image) -> dict:
        factor, resample = FACTOR, Image.Resampling.BICUBIC
        if self.processor:
            images = self.processor.image_processor
            factor, resample = images.patch_size * images.merge_size, images.resample
        image = resize_as_seen(image.convert("RGB"), self.box_format, factor, resample)
        return {"type": "image_url", "image_url": {"url": to_data_url(image, compress_level=1)}}

    def prompt_ids(self, sample: Sample) -> list[int] | None:
        """Token ids of the sample's prompt, as the kit computes them; None without a processor."""
        if self.processor is None:
            return None
        text = render_prompt(self.processor, sample, self.box_format)
        with self.tokenizer_lock:
            inputs = self.processor(text=[text], images=list(sample.images) or None)
        return list(inputs["input_ids"][0])

    def sampling_fields(self, sampling: SamplingOptions, with_logps: bool) -> dict:
        """The fields of a request that say how to draw; with_logps: ask for log-probabilities."""
        if self.processor is None:
            return {"temperature": sampling.temperature, "top_p": sampling.top_p,
                    "max_tokens": sampling.max_new_tokens,
                    "max_completion_tokens": sampling.max_new_tokens}
        # all of them, because a server reads a missing one from generation_config.json
        bias = {str(token): FORBIDDEN_BIAS for token in forbidden_token_ids(self.processor)}
        fields = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "max_tokens": sampling.max_new_tokens, "min_tokens": sampling.min_new_tokens,
            "stop_token_ids": self.end_tokens, "logit_bias": bias, "skip_special_tokens": True,
            "return_token_ids": True}
        return fields | ({"logprobs": True} if with_logps else {})

    def parse_replies(self, answer: dict, with_logps: bool) -> list[ServedReply]:
        """The replies in a chat completion; ValueError if the completion is incomplete."""
        try:
            if not answer["choices"]:
                raise ValueError("an answer without choices is no complete chat completion")
            return [self._parse_choice(choice, with_logps) for choice in answer["choices"]]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError("an answer that is no complete chat completion") from error

    def _parse_choice(self, choice: dict, with_logps: bool) -> ServedReply:
        ids = choice.get("token_ids") if self.processor else None
        text, reason = read_choice(choice, self.processor.opened_tag if self.processor else "")
        if ids:  # decoded as in the kit's own loop
            with self.tokenizer_lock:
                text = self.processor.batch_decode([ids], skip_special_tokens=True)[0]
        if not with_logps:
            return ServedReply(text, ids, finish_reason=reason)
        if not ids or not choice.get("logprobs"):
            raise ValueError("an answer without token ids or log-probabilities; stage 05 needs a "
                             "server that has return_token_ids and logprobs, such as vLLM")
        logps = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
        if len(logps) != len(ids):
            raise ValueError(f"{len(ids)} tokens with {len(logps)} log-probabilities")
        return ServedReply(text, ids, logps, reason)


def check_prompt_ids(answer: dict, expected: list[int], sample_id: str, url: str) -> None:
    """RuntimeError if the answer's prompt ids, or their number, are not the kit's `expected`."""
    served, usage = answer.get("prompt_token_ids"), answer.get("usage") or {}
    n_served = len(served) if served is not None else usage.get("prompt_tokens")
    if served == expected or (served is None and n_served in (None, len(expected))):
        return
    cause = ("its image settings differ, so serve the model's own folder and set no "
             "--mm-processor-kwargs" if n_served != len(expected) else
             "its chat template or tokenizer differs, so serve the model's own folder and set no "
             "--chat-template")
    raise RuntimeError(f"the server {url} read other prompt ids than the kit for {sample_id} "
                       f"({n_served} tokens, the kit has {len(expected)}): {cause}")
