"""Replies of a model that servers hold, for stages 04, 05 and 06: one form of request.

So that servers draw as the kit's own loop does, a request holds the images as the model sees them
and every sampling parameter, and prompt ids are compared. Requests have no seed: served replies
cannot be repeated to the bit. What a server refuses is shown in its words.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from PIL import Image

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.image_files import to_data_url
from mig_kit.models.model_folders import ServedName, check_weights, load_generation_config
from mig_kit.models.processors import (
    StillImageProcessor,
    load_processor,
    render_prompt,
    resize_as_seen,
)
from mig_kit.openai_client import (
    RequestFailed,
    iter_results,
    open_client,
    parse_server,
    read_completion,
    request_completion,
    request_json,
)
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, end_token_ids, forbidden_token_ids

CHECKED_ANSWERS = 8  # the first ones, whose prompts are compared before any is used
FACTOR = 28  # images whose sides absolute boxes count are multiples of it, see boxes.smart_resize
FORBIDDEN_BIAS = -100.0  # the lowest that the API takes
FEWEST_IMAGE_TOKENS = 4  # Qwen2-VL's of its smallest image


class Server(NamedTuple):
    """A server and the names that it lists."""

    url: str
    client: object  # openai.OpenAI
    models: tuple[str, ...]


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
    finish_reason: str = ""  # as the server calls it, "length" for a cut one


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
    lock: Lock = field(default_factory=Lock, repr=False)  # the tokenizer serves one thread

    def ask(self, questions: Iterable[Question], sampling: SamplingOptions,
            with_logps: bool = False) -> Iterator[tuple[Question, list[ServedReply]]]:
        """Yields every question with its replies, in the order in which servers answer.

        Raises: RequestFailed with a server's words; UserError for an answer that cannot be used.
        """
        fields = self.sampling_fields(sampling, with_logps)

        def work(numbered: tuple[int, Question]) -> tuple[Question, dict]:
            number, question = numbered
            server = self.servers[number % len(self.servers)]
            body = {"model": self.name, "messages": self.messages(question.sample), **fields}
            try:
                answer = request_completion(
                    server.client, body | ({"n": question.replies} if question.replies > 1 else {}))
            except RequestFailed as failure:
                raise RequestFailed(f"the server {server.url} answered {failure}",
                                    failure.status) from None
            check_answering_model(answer.get("model"), self.name, server, with_logps)
            if question.prompt_ids is not None or number < CHECKED_ANSWERS:
                expected = question.prompt_ids or self.prompt_ids(question.sample)
                check_prompt_ids(answer, expected, question.sample.id, server.url)
            return question, answer

        answers = iter_results(work, enumerate(questions), self.concurrency)
        first, failure = [], None
        try:
            for answered in islice(answers, CHECKED_ANSWERS):
                first.append(answered)
        except RequestFailed as error:  # what came before it is kept, too
            failure = error
        if self.processor is None and first:
            samples = [question.sample for question, _ in first]
            self.check_images_count(max(samples, key=lambda sample: len(sample.images)), fields)
        for part in (first, answers):
            for question, answer in part:
                yield question, self.parse_replies(answer, question.replies, with_logps)
            if failure:
                raise failure

    def check_images_count(self, sample: Sample, fields: dict) -> None:
        """UserError if a server's prompt takes no more tokens than without its last image."""
        parts = self.messages(sample)[0]["content"]
        last = max(place for place, part in enumerate(parts) if part["type"] == "image_url")
        for server in self.servers:
            counts = [prompt_tokens(request_completion(server.client, {
                "model": self.name, "messages": [{"role": "user", "content": content}], **fields}))
                for content in (parts, parts[:last] + parts[last + 1:])]
            if all(counts) and counts[0] - counts[1] < FEWEST_IMAGE_TOKENS:
                raise UserError(
                    f"the server {server.url} counts {counts[0]} tokens for a prompt of "
                    f"{len(sample.images)} images, and {counts[1]} without the last one: it drops "
                    "images or cuts prompts; have it load its vision part, take so many images "
                    "(--limit-mm-per-prompt) and hold so many tokens (num_ctx, --max-model-len)")

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
        with self.lock:
            inputs = self.processor(text=[text], images=list(sample.images) or None)
        return list(inputs["input_ids"][0])

    def sampling_fields(self, sampling: SamplingOptions, with_logps: bool) -> dict:
        """The fields of a request that say how to draw; with_logps: ask for log-probabilities."""
        options = asdict(sampling)
        limits = {"max_tokens": options.pop("max_new_tokens")}
        if self.processor is None:
            return limits | {"temperature": sampling.temperature}
        limits["min_tokens"] = options.pop("min_new_tokens")
        # all of them, because a server reads a missing one from generation_config.json
        bias = {str(token): FORBIDDEN_BIAS for token in forbidden_token_ids(self.processor)}
        return limits | {
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, **options, "stop_token_ids": self.end_tokens,
            "logit_bias": bias, "skip_special_tokens": True, "return_token_ids": True,
            **({"logprobs": True} if with_logps else {})}

    def parse_replies(self, answer: dict, count: int, with_logps: bool) -> list[ServedReply]:
        """The `count` replies of a chat completion; UserError if it lacks some."""
        try:
            replies = [self._parse_choice(choice, with_logps) for choice in answer["choices"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the server of {self.name} gave an answer that cannot be read "
                            f"({error}): {str(answer)[:200]}") from error
        if len(replies) < count:
            raise UserError(f"the server of {self.name} gave {len(replies)} of {count} replies; "
                            "take one that has the API's field n, such as vLLM")
        return replies[:count]

    def _parse_choice(self, choice: dict, with_logps: bool) -> ServedReply:
        ids = choice.get("token_ids") if self.processor else None
        text, reason = read_completion(choice, self.processor.opened_tag if self.processor else "")
        if ids:  # decoded as in the kit's own loop
            with self.lock:
                text = self.processor.batch_decode([ids], skip_special_tokens=True)[0]
        if not with_logps:
            return ServedReply(text, ids, finish_reason=reason)
        logps = [float(token["logprob"])
                 for token in (choice.get("logprobs") or {}).get("content") or ()]
        if not ids or len(logps) != len(ids):
            raise ValueError(f"{len(ids or ())} token ids with {len(logps)} log-probabilities; "
                             "stage 05 needs a server that has return_token_ids and logprobs, such "
                             "as vLLM")
        return ServedReply(text, ids, logps, reason)


def check_answering_model(name: str | None, asked: str, server: Server,
                          is_exact: bool) -> None:
    """UserError if a server answers in another model's name than the one asked.

    is_exact: whether "qwen-2" is another model than "qwen"; servers add a tag, a date or a path.
    Another name that the server lists is another model.
    """
    is_same = name == asked if is_exact or name in server.models else name and (
        asked.lower() in name.lower() or name.lower() in asked.lower())
    if name and not is_same:
        cause = "has an old adapter; start it again" if is_exact else (
            "holds another model; ask for that one (--model), or have it load this one")
        raise UserError(f"the server {server.url} answered as '{name}', not as '{asked}': it "
                        f"{cause}")


def prompt_tokens(answer: dict) -> int | None:
    """The tokens that a server counts for an answer's prompt; None if it counts none."""
    usage = answer.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else None


def check_prompt_ids(answer: dict, expected: list[int] | None, sample_id: str, url: str) -> None:
    """UserError if the answer's prompt ids, or their number, are not the kit's `expected`."""
    served = answer.get("prompt_token_ids")
    n_served = prompt_tokens(answer) if served is None else len(served)
    if expected is None or served == expected or (
            served is None and n_served in (None, len(expected))):
        return
    raise UserError(f"the server {url} read other prompt ids than the kit for {sample_id} "
                    f"({n_served} tokens, the kit has {len(expected)}): its image settings, chat "
                    "template or tokenizer differ, so serve the model's own folder, without "
                    "--mm-processor-kwargs and --chat-template")


def list_models(client) -> tuple[str, ...]:
    """The names that a server lists: its model's, and its adapters'; RequestFailed for none."""
    page = request_json(client, "/models")
    try:
        return tuple(str(entry.get("id")) for entry in page.get("data") or ())
    except AttributeError:
        raise RequestFailed(f"no list but: {page}; is this its API's address, which often ends in "
                            "/v1?", 200) from None


def serve_model(server: str, concurrency: int, model: str | Path, system: str,
                box_format: BoxFormat) -> ServedModel:
    """A model on running servers.

    Args:
        server: their addresses, see `parse_server`.
        model: a folder, a hub name or a ServedName.
        system: another name by which a server may serve the model.
    Raises: UserError if no server lists the model; RequestFailed with a server's words.
    """
    processor, end_tokens, is_name = None, [], isinstance(model, ServedName)
    if not is_name:
        check_weights(model)  # of the folder that servers hold
        processor = load_processor(model, box_format)
        end_tokens = end_token_ids(load_generation_config(model), processor)
    names = (str(model), str(Path(model).resolve()), system)
    servers = []
    for url in parse_server(server):
        client = open_client(url)
        try:
            models = list_models(client)
        except RequestFailed as failure:
            if not is_name or not failure.status:
                raise RequestFailed(f"the server {url} lists no models: {failure}",
                                    failure.status) from None
            models = (str(model),)  # whose name the user has given
        servers.append(Server(url, client, models))
    name = next((name for name in names for server in servers if name in server.models), "")
    if not name:
        listed = ", ".join(sorted({model for server in servers for model in server.models}))
        raise UserError(
            f"no server serves the model {names[0]}, but only {listed[:300] or 'nothing'}; use one "
            "of these names, start a server with this folder, or with --served-model-name "
            f"{names[-1]} where it has another path")
    return ServedModel(name, [server for server in servers if name in server.models],
                       concurrency, processor, box_format, end_tokens)
