"""What is sent to a server, and what comes back: the contract of a served reply.

A server has to draw from the distribution that the kit's own loop draws from. So the request has
the images at the size that the model sees, and says every sampling parameter: a server would take
those that are missing from the model's generation_config.json. The ids of the server's prompt have
to equal the kit's own. There is no seed: served replies cannot be drawn again to the bit.
"""

from dataclasses import dataclass, field
from threading import Lock

from PIL import Image

from mig_kit.boxes import BoxFormat, seen_size
from mig_kit.engine.processors import StillImageProcessor, render_prompt
from mig_kit.image_files import to_data_url
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import SamplingOptions, forbidden_token_ids

FACTOR = 28  # images whose sides absolute boxes count are multiples of it, see boxes.smart_resize
FORBIDDEN_BIAS = -100.0  # the lowest that the API takes
# a server that refuses some fields is asked with fewer: all, OpenAI's own, those without `n`; one
# that holds a model which the kit cannot load, at last with those of OpenAI's reasoning models
WITHOUT_N = ("model", "messages", "temperature", "top_p", "max_tokens", "logit_bias")
FIELDS_OF_FORM = ((), (*WITHOUT_N, "n"), WITHOUT_N, ("model", "messages", "max_completion_tokens"))


@dataclass(frozen=True)
class ServedReply:
    """One reply. ids, logps: its tokens with the end token, and their log-probabilities; None where
    the server does not tell them.
    """

    text: str
    ids: list[int] | None = None
    logps: list[float] | None = None


@dataclass
class PromptEncoder:
    """Prompts as a server takes them, and as the kit reads them.

    processor: None for a model that the kit cannot load; its prompts cannot be compared, and it is
    asked with OpenAI's fields alone. end_tokens: every token that ends a reply. Threads may share
    it.
    """

    processor: StillImageProcessor | None
    box_format: BoxFormat
    end_tokens: list[int]
    # a tokenizer serves one thread at a time
    tokenizer_lock: Lock = field(default_factory=Lock, repr=False)

    def messages(self, sample: Sample) -> list[dict]:
        """The sample's prompt in OpenAI's form, its images as PNG at the size the model sees."""
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
        image, size = image.convert("RGB"), seen_size(image.size, self.box_format, factor)
        if image.size != size:
            image = image.resize(size, resample)
        return {"type": "image_url", "image_url": {"url": to_data_url(image, compress_level=1)}}

    def prompt_ids(self, sample: Sample) -> list[int] | None:
        """The kit's own token ids of the sample's prompt; None without a processor."""
        if self.processor is None:
            return None
        text = render_prompt(self.processor, sample, self.box_format)
        with self.tokenizer_lock:
            inputs = self.processor(text=[text], images=list(sample.images) or None)
        return list(inputs["input_ids"][0])

    def sampling_fields(self, sampling: SamplingOptions, with_logps: bool) -> dict:
        """The fields of a request that say how to draw; logps: of processed logits."""
        if self.processor is None:
            return {"temperature": sampling.temperature, "top_p": sampling.top_p,
                    "max_tokens": sampling.max_new_tokens,
                    "max_completion_tokens": sampling.max_new_tokens}
        bias = {str(token): FORBIDDEN_BIAS for token in forbidden_token_ids(self.processor)}
        fields = {
            "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": -1, "min_p": 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "max_tokens": sampling.max_new_tokens, "min_tokens": sampling.min_new_tokens,
            "stop_token_ids": self.end_tokens, "logit_bias": bias, "skip_special_tokens": True,
            "return_token_ids": True}
        return fields | ({"logprobs": True} if with_logps else {})

    def parse_replies(self, answer: dict, with_logps: bool) -> list[ServedReply]:
        """The replies of a chat completion.

        ValueError if this is no complete one, or lacks what with_logps needs.
        """
        try:
            return [self._parse_choice(choice, with_logps) for choice in answer["choices"]]
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError("an answer that is no complete chat completion") from error

    def _parse_choice(self, choice: dict, with_logps: bool) -> ServedReply:
        ids = choice.get("token_ids") if self.processor else None
        if ids:  # the text that the kit's own loop gives
            with self.tokenizer_lock:
                text = self.processor.batch_decode([ids], skip_special_tokens=True)[0]
        else:
            text = self._join_message(choice["message"])
        if not isinstance(text, str):
            raise ValueError("an answer without a text")
        if not with_logps:
            return ServedReply(text, ids)
        if not ids or not choice.get("logprobs"):
            raise ValueError("an answer without token ids or log-probabilities; stage 05 needs a "
                             "server that has return_token_ids and logprobs, such as vLLM")
        logps = [float(token["logprob"]) for token in choice["logprobs"]["content"]]
        if len(logps) != len(ids):
            raise ValueError(f"{len(ids)} tokens with {len(logps)} log-probabilities")
        return ServedReply(text, ids, logps)

    def _join_message(self, message: dict) -> str | None:
        """The reply whole: a server with a reasoning parser tells the reasoning apart, and one
        without it tells only what the model wrote after an opened <think>.
        """
        content = message["content"]
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if reasoning:
            return f"<think>{reasoning}" + (f"</think>{content}" if content else "")
        if not isinstance(content, str) or content.lstrip().startswith("<think>"):
            return content
        if self.processor:
            return self.processor.opened_tag + content
        is_opened = "</think>" in content and "<think>" not in content
        return f"<think>{content}" if is_opened else content


def check_prompt_ids(answer: dict, expected: list[int], sample_id: str, url: str) -> None:
    """Raise RuntimeError unless the server has read the prompt that the kit would have read.

    A server that tells no ids is checked by their number.
    """
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
