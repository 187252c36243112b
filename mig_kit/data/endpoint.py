"""Stage 01 with a model teacher: traces from any OpenAI-compatible endpoint (vLLM, SGLang, hosted).

Finished calls are logged at once and never made again. The key comes from the environment variable
MIG_KIT_API_KEY alone.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from PIL import Image

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.common import UserError, append_json_lines, load_json_lines
from mig_kit.image_files import image_digests, to_data_url
from mig_kit.openai_client import (
    KEY_VARIABLE,
    RequestFailed,
    iter_results,
    open_client,
    read_completion,
    redact,
    request_completion,
)
from mig_kit.prompts import correct_answers, format_question, image_label
from mig_kit.sample import Sample, Trace

# As in MG-Thinker (section 3.2, appendix B), the teacher gets the verified answer and must not
# reveal it. The wording is ours; edit it to try another.
RULES = ("Inside <think>, reason from what is visible, step by step: note what is characteristic "
         "of what is asked for, go through the images one by one, say what they share and where "
         "they differ, rule out what is only alike, and come to the conclusion last. Do not write "
         "coordinates there, and do not mention that an answer was given to you. Boxes are in "
         "{coordinates}.")
COORDINATES_IN_RULES = {
    "absolute": "pixels of the images as you see them",
    "normalized_1000": "thousandths of an image's width and height",
}
MAX_FAILURES_IN_A_ROW = 10
COUNTS = ("prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Endpoint:
    """Where the teacher is (an address that ends in /v1), and how to ask it."""

    url: str
    model: str
    concurrency: int = 4
    max_tokens: int = 1024
    temperature: float = 0.0


def teacher_prompt(sample: Sample, box_format: BoxFormat) -> str:
    """The text after the images: the question, the rules, and the verified answer."""
    truth = " or ".join(correct_answers(sample, box_format))
    rules = RULES.format(coordinates=COORDINATES_IN_RULES[box_format.coordinates])
    return ("You are an expert at reading several images together.\n\n"
            f"Question: {format_question(sample, box_format)}\n\n{rules}\n\n"
            "Only to check your conclusion, and never to be mentioned: "
            f"the verified answer is {truth}.")


def teacher_messages(sample: Sample, box_format: BoxFormat) -> list[dict]:
    """The chat in OpenAI's form: numbered images with their sizes, as JPEG, then the text."""
    content: list[dict] = []
    for number, image in enumerate(sample.images, 1):
        size = seen_size(image.size, box_format)
        resized = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
        url = to_data_url(resized, "JPEG", quality=95, subsampling=0)
        content += [{"type": "text", "text": image_label(number, size)},
                    {"type": "image_url", "image_url": {"url": url}}]
    content.append({"type": "text", "text": teacher_prompt(sample, box_format)})
    return [{"role": "user", "content": content}]


def call_key(sample: Sample, endpoint: Endpoint, box_format: BoxFormat) -> str:
    """A hash of all that decides the reply: model, settings, text and images, not the address."""
    settings = [endpoint.model, endpoint.max_tokens, endpoint.temperature, "trace",
                astuple(box_format), teacher_prompt(sample, box_format), sample.sizes]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for image in image_digests(sample.images):
        digest.update(image)
    return digest.hexdigest()


def request_traces(samples: Iterable[Sample], endpoint: Endpoint, path: Path,
                   box_format: BoxFormat) -> list[Trace]:
    """The teacher's trace for every sample, in order; its `error` says why there is no reply.

    Calls that the log `path` holds are not made again; those that failed are not in it.

    Args:
        samples: read as they are needed, so that of a generator's few images are in memory.
        path: in the run's folder, whose lock keeps other processes out.
    Raises: UserError after MAX_FAILURES_IN_A_ROW, with the server's words.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    keys: list[str] = []
    log, requested = {entry["key"]: entry for entry in load_json_lines(path)}, set()
    with path.open("a") as file, open_client(endpoint.url) as client:

        def iter_new_calls() -> Iterator[tuple[str, Sample]]:
            for sample in samples:
                key = call_key(sample, endpoint, box_format)
                keys.append(key)
                if key not in requested and key not in log:
                    requested.add(key)
                    yield key, sample

        def work(call: tuple[str, Sample]) -> dict:
            key, sample = call
            return {"key": key, "id": sample.id, "model": endpoint.model,
                    **_request_reply(endpoint, client, teacher_messages(sample, box_format))}

        failures_in_a_row = 0
        for entry in iter_results(work, iter_new_calls(), endpoint.concurrency):
            log[entry["key"]] = entry
            if "reply" in entry:
                append_json_lines(file, [entry])
            failure = find_failure(entry)
            failures_in_a_row = failures_in_a_row + 1 if failure else 0
            if failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise UserError(f"{MAX_FAILURES_IN_A_ROW} calls in a row failed, the last with: "
                                f"{failure}; finished calls are kept: check endpoint_url, "
                                f"endpoint_model and the variable {KEY_VARIABLE} (cut replies: "
                                "raise max_tokens of notebook 01's Endpoint), and start again")
    return [Trace(log[key].get("reply", ""), "endpoint", find_failure(log[key]))
            for key in keys]


def _request_reply(endpoint: Endpoint, client, messages: list[dict]) -> dict:
    """What a call's entry in the log says of the reply, or why it failed."""
    try:
        answer = request_completion(client, {
            "model": endpoint.model, "temperature": endpoint.temperature,
            "messages": messages, "max_tokens": endpoint.max_tokens})
        reply, reason = read_completion(answer["choices"][0])
    except RequestFailed as failure:
        return {"failed": str(failure)}
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        return {"failed": f"an answer without a reply ({error})"}
    usage = answer.get("usage") if isinstance(answer.get("usage"), dict) else {}
    return {"reply": redact(reply), "finish_reason": reason,
            **{name: usage.get(name) for name in COUNTS}}


def find_failure(entry: dict) -> str:
    """Why an entry of the log is no whole reply, "" for one that is."""
    reply, reason = entry.get("reply", ""), entry.get("finish_reason")
    is_whole = "</answer>" in reply or reply.strip() and reason != "length"
    return entry.get("failed") or (
        "" if is_whole else f"no whole reply (finish_reason {reason or 'unknown'})")


def summarize_usage(path: Path) -> dict:
    """What the logged calls took; "without_counts": for how many the server gave no counts."""
    entries = load_json_lines(path)
    return {"calls": len(entries),
            **{name: sum(entry.get(name) or 0 for entry in entries) for name in COUNTS},
            "without_counts": sum(entry["prompt_tokens"] is None for entry in entries)}
