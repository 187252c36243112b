"""Processors: load them with the run's pixel limits, save them, check what the model sees."""

import json
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.boxes import PROMPT, BoxFormat, Coordinates, seen_size
from mig_kit.common import UserError
from mig_kit.models.model_folders import (
    check_model_folder,
    find_file,
    load_config,
    load_generation_config,
)
from mig_kit.prompts import chat_messages
from mig_kit.sample import Sample
from mig_kit.shared_prefix.generation import end_token_ids
from mig_kit.shared_prefix.prompt_cache import ImagePrompts

SETTINGS_FILE = "mig_kit.json"  # of a model folder: what its other files have no place for
REPLY = '<think>In image 2.</think><answer>{"image": 2, "box": [12,30,26,44]}</answer>'
# mean and deviation of images, by the first letters of a family
COLOURS = {"qwen2": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
           "qwen3": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)}


class StillImageProcessor(ImagePrompts):
    """The processor of a model folder, whose replies may go on from a tag that the prompt opens.

    Args:
        stock_class: processor class of the model's family, which saved files name.
        coordinates, prompt: as in `BoxFormat`; kept in SETTINGS_FILE.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None,
                 stock_class: str = "Qwen2_5_VLProcessor",
                 coordinates: Coordinates | None = None, prompt: str = PROMPT, **kwargs):
        tokenizer.padding_side = "left"  # on the right, trainers misplace image tokens' positions
        self.stock_class, self.coordinates, self.prompt = stock_class, coordinates, prompt
        super().__init__(image_processor, tokenizer, chat_template)

    @cached_property
    def opened_tag(self) -> str:
        """"<think>" and what follows it, if the chat template ends a prompt with it, else ""."""
        messages = [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}]
        texts = [self.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
                 for asks in (False, True)]
        _, tag, rest = texts[1][len(os.path.commonprefix(texts)):].partition("<think>")
        # Qwen3.5 with thinking off closes the block as well; the reply then writes one of its own
        return "" if "</think>" in rest else tag + rest

    @cached_property
    def reply_ending(self) -> str:
        """What the chat template writes after a reply, such as "<|im_end|>"."""
        messages = [{"role": role, "content": [{"type": "text", "text": text}]}
                    for role, text in (("user", "Where is it?"), ("assistant", "It is there."))]
        return super().apply_chat_template(messages, tokenize=False).rpartition("It is there.")[2]

    def batch_decode(self, *args, **kwargs) -> list[str]:
        """Completions as replies: the tag that the prompt has opened, then what was generated."""
        return [self.opened_tag + text for text in super().batch_decode(*args, **kwargs)]

    def cut_opened(self, reply: str) -> str:
        """What a model has to write after its prompt for this to be its reply."""
        if reply.startswith(self.opened_tag):
            return reply.removeprefix(self.opened_tag)
        _, tag, rest = reply.partition("<think>")
        return rest.lstrip() if tag else f"</think>{reply}"  # without reasoning: close the block

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As transformers' method, but text with a reply is its prompt, what a model has to write,
        and its ending: some templates drop the reasoning or repeat the tag that the prompt opens.
        """
        *prompt, last = conversation
        if kwargs.get("tokenize") or isinstance(last, list) or last["role"] != "assistant":
            return super().apply_chat_template(conversation, *args, **kwargs)
        kwargs["add_generation_prompt"] = True
        content = last["content"]
        reply = content if isinstance(content, str) else "".join(part["text"] for part in content)
        return (super().apply_chat_template(prompt, *args, **kwargs) + self.cut_opened(reply)
                + self.reply_ending)

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """Write tokenizer, chat template and image settings."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.chat_template)
        self.save_image_settings(folder)

    def save_image_settings(self, folder: Path) -> None:
        """Write preprocessor_config.json, which names the stock class, and SETTINGS_FILE."""
        settings = self.image_processor.to_dict() | {"processor_class": self.stock_class}
        # older releases of transformers read these two, newer ones `size`
        settings["min_pixels"] = settings["size"]["shortest_edge"]
        settings["max_pixels"] = settings["size"]["longest_edge"]
        _write_settings(folder / "preprocessor_config.json", settings)
        (folder / "processor_config.json").unlink(missing_ok=True)  # it would win over this file
        if self.coordinates:
            _write_settings(folder / SETTINGS_FILE,
                            {"coordinates": self.coordinates, "prompt": self.prompt})


def _write_settings(path: Path, values: dict) -> None:
    """Write a settings file in transformers' form."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def load_processor(model: str | Path, box_format: BoxFormat) -> StillImageProcessor:
    """The processor of a model folder or hub name; the one place that sets its pixel limits.

    Raises: UserError without processor files, and unless the model sees images and
    writes boxes as `box_format` says.
    """
    check_model_folder(model)
    config = load_config(model)
    family = config.model_type
    if family != "qwen2_5_vl" and box_format.coordinates != Coordinates.NORMALIZED_1000:
        raise UserError(f"{model} is a {family}, which writes boxes in 0 to 1000; "
                         "set the parameter coordinates to normalized_1000")
    # The only place with limits: two would resize twice and shift every box. They are called
    # min_pixels and max_pixels, because a `size` loses against a published folder's own limits.
    limits = {"min_pixels": box_format.min_pixels, "max_pixels": box_format.max_pixels}
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        images = Qwen2VLImageProcessorPil.from_pretrained(model, **limits)
        template, old_file = tokenizer.chat_template, find_file(model, "chat_template.json")
        if old_file and not find_file(model, "chat_template.jinja"):  # which the tokenizer reads
            template = json.loads(old_file.read_text())["chat_template"]
    except Exception as error:  # what reads tokenizer.json raises nothing narrower
        raise UserError(f"tokenizer or image settings of {model}: {error}") from error
    processor = StillImageProcessor(
        images, tokenizer, template, stock_class=PROCESSOR_MAPPING_NAMES[family],
        coordinates=box_format.coordinates, prompt=box_format.prompt)
    check_chat_template(processor, box_format, model)
    check_settings(processor, config, model)
    return processor


def check_settings(processor: StillImageProcessor, config, model: str | Path) -> None:
    """UserError unless images are prepared as the model's vision tower was trained to read them,
    config.json and tokenizer agree on tokens, and the tags of a reply survive a decode.
    """
    tokenizer, vision = processor.tokenizer, config.vision_config
    mean, std = COLOURS[config.model_type[:5]]
    image, start = tokenizer.convert_tokens_to_ids([processor.image_token, "<|vision_start|>"])
    expected = [
        ("config.json", config, "its tokenizer has",
         {"image_token_id": image, "vision_start_token_id": start}),
        ("preprocessor_config.json", processor.image_processor,
         "its family's vision tower reads images with",
         {"do_resize": True, "patch_size": vision.patch_size,
          "merge_size": vision.spatial_merge_size,
          "temporal_patch_size": vision.temporal_patch_size, "do_rescale": True,
          "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std})]
    for file, settings, source, values in expected:
        for name, value in values.items():
            if not np.array_equal(getattr(settings, name, value), value):
                raise UserError(f"{name} in {file} of {model} is {getattr(settings, name)}, and "
                                f"{source} {value}; set it to that")
    ids = tokenizer(REPLY, add_special_tokens=False)["input_ids"]
    if (text := tokenizer.decode(ids, skip_special_tokens=True)) != REPLY:
        raise UserError(f"the tokenizer of {model} turns the reply {REPLY} into {text[:80]!r}; "
                        "take think and answer out of its special tokens")


def read_box_format(model: str | Path) -> BoxFormat:
    """The box format of a model folder or hub name: as the kit saved it, else its family's.

    Raises: as `load_config`; UserError for settings that cannot be used.
    """
    is_absolute = load_config(model).model_type == "qwen2_5_vl"
    settings = {"coordinates": (Coordinates.ABSOLUTE if is_absolute
                                else Coordinates.NORMALIZED_1000), "prompt": PROMPT}
    path = find_file(model, SETTINGS_FILE)
    try:
        size = Qwen2VLImageProcessorPil.from_pretrained(model).size
        if path:
            settings |= json.loads(path.read_text())
        return BoxFormat(size["shortest_edge"], size["longest_edge"], settings["coordinates"],
                         settings["prompt"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"preprocessor_config.json or {SETTINGS_FILE} of {model}: "
                        f"{error}") from error


def describe_other_format(model: str | Path, box_format: BoxFormat) -> str:
    """A sentence if the kit saved the model after training it with another box format, else ""."""
    if not (Path(model) / SETTINGS_FILE).is_file():
        return ""
    own = read_box_format(model)
    return "" if own == box_format else (
        f"{model} was trained on {own.description}, and this run has {box_format.description}; "
        "set min_pixels, max_pixels, coordinates and prompt of 01 to the model's unless you want "
        "to change them")


def check_chat_template(processor: StillImageProcessor, box_format: BoxFormat,
                        model: str | Path) -> None:
    """Raise UserError unless the template keeps a prompt's parts in their order, asks for a reply,
    and ends one with a token at which generation ends.
    """
    messages = chat_messages(Sample("", "", "", "", (None, None), "Where is it?"), box_format)
    try:
        without, text = (
            processor.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)
            for asks in (False, True))
        ending = processor.reply_ending.strip()
    except (ValueError, jinja2.TemplateError) as error:
        raise UserError(f"the chat template of {model}: {error}") from error
    parts = [part.get("text", processor.image_token).strip() for part in messages[0]["content"]]
    in_order = re.search(".*".join(map(re.escape, parts)), text, re.DOTALL)
    if text.count(processor.image_token) != 2 or not in_order or text == without:
        raise UserError(f"the chat template of {model} leaves images or their numbers out, changes "
                        "the order of a prompt's parts, or ignores add_generation_prompt; copy "
                        "chat_template.jinja or .json from the model that this one was made from")
    ids = processor.tokenizer(ending, add_special_tokens=False)["input_ids"]
    ends = end_token_ids(load_generation_config(model), processor)
    if ids and ids[0] not in ends:
        names = processor.tokenizer.convert_ids_to_tokens([ids[0], *ends])
        raise UserError(f"the chat template of {model} ends a reply with {names[0]}, and its "
                        f"generation_config.json and tokenizer end one at {', '.join(names[1:])}, "
                        "so replies would run on; add the token's id to eos_token_id")


def render_prompt(processor: StillImageProcessor, sample: Sample, box_format: BoxFormat) -> str:
    """The sample's prompt as text; UserError unless it has one place for each image."""
    text = processor.apply_chat_template(chat_messages(sample, box_format), tokenize=False,
                                         add_generation_prompt=True)
    token, n_images = processor.image_token, len(sample.images)
    if text.count(token) != n_images:
        raise UserError(f"the prompt of {sample.id} has {text.count(token)} places for its "
                         f"{n_images} images; take {token} out of the question")
    return text


def prompt_measure(model: str | Path, box_format: BoxFormat) -> Callable[[Sample], str]:
    """Makes a function of a sample that returns a sentence if its prompt is too long, else "".

    The function decodes no image and loads no weights.
    """
    processor = load_processor(model, box_format)
    limit = load_config(model).get_text_config().max_position_embeddings

    def measure(sample: Sample) -> str:
        n_tokens = count_prompt_tokens(processor, sample, box_format)
        return "" if n_tokens <= limit else (
            f"the prompt takes {n_tokens} tokens, "
            f"{count_image_tokens(processor, sample, box_format)} of them for images, and the "
            f"model reads {limit}; shorten the question, take fewer images, or lower max_pixels")

    return measure


def resize_as_seen(image: Image.Image, box_format: BoxFormat, factor: int,
                   resample: int) -> Image.Image:
    """The image at the size at which the model sees it, for servers and exports.

    factor: pixels of a token's side. In the kit's own loop transformers' processor resizes.
    """
    size = seen_size(image.size, box_format, factor)
    return image if image.size == size else image.resize(size, resample)


def count_image_tokens(processor: StillImageProcessor, sample: Sample,
                       box_format: BoxFormat) -> int:
    """Tokens of the sample's images; decodes none."""
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    seen = [seen_size(size, box_format, factor) for size in sample.sizes]
    return sum(width * height for width, height in seen) // factor**2


def count_prompt_tokens(processor: StillImageProcessor, sample: Sample,
                        box_format: BoxFormat) -> int:
    """Tokens of the sample's prompt; decodes no image."""
    n_tokens = len(processor.tokenizer(render_prompt(processor, sample, box_format))["input_ids"])
    return n_tokens - len(sample.images) + count_image_tokens(processor, sample, box_format)


def check_image_grids(processor: StillImageProcessor, box_format: BoxFormat,
                      grid_thw: torch.Tensor | None, sizes: list[tuple[int, int]]) -> None:
    """Raise UserError unless the model sees each image at the size for which boxes are computed.

    grid_thw: (images, 3) int, patches of each image; sizes: (width, height) of the originals.
    """
    grids = [] if grid_thw is None else grid_thw.tolist()
    patch = processor.image_processor.patch_size
    factor = patch * processor.image_processor.merge_size
    for number, ((_, rows, columns), size) in enumerate(zip(grids, sizes, strict=True), 1):
        seen, computed = (columns * patch, rows * patch), seen_size(size, box_format, factor)
        if seen != computed:
            raise UserError(
                f"image {number} of {size[0]}x{size[1]} px reaches the model at "
                f"{seen[0]}x{seen[1]} px, but boxes are computed for "
                f"{computed[0]}x{computed[1]} px (min_pixels {box_format.min_pixels}, max_pixels "
                f"{box_format.max_pixels})")
