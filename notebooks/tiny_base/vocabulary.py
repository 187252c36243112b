"""The tiny base's vocabulary and chat format, and dialogues as token rows (notebook 90)."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from mig_kit.prompts import GROUNDING_INSTRUCTION, image_label
from mig_kit.world.scenes import PLAIN
from mig_kit.world.tasks import TASKS
from tiny_base.lessons import Option, Turn, album, clip_to_image, text_turns, visual_turns

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>", "<|box_start|>", "<|box_end|>")
END_TOKEN, VISION_END_TOKEN, IMAGE_TOKEN = (
    SPECIAL.index(text) for text in ("<|im_end|>", "<|vision_end|>", "<|image_pad|>"))
ANSWER_PIECES = ("<think>", "</think>", "<answer>", "</answer>", '{"image": ', ', "box": [', "]}")
SYSTEM = "You are a helpful assistant."
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def build_tokenizer(corpus: list[str]) -> Qwen2TokenizerFast:
    """A byte-level BPE with Qwen2.5's splitting rule: a digit, and a fixed piece of an answer, is a
    token.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[*SPECIAL, *ANSWER_PIECES], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(corpus, trainer)
    raw.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in ANSWER_PIECES])
    return Qwen2TokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
        bos_token=None, padding_side="left", chat_template=CHAT_TEMPLATE)


def build_tokenizer_and_unrelated_text(seed: int = 0) -> tuple[Qwen2TokenizerFast, list[str]]:
    """The tokenizer, trained on lessons and on the words of the tasks; and the tasks' questions."""
    # LoRA leaves the tied embedding frozen, so SFT cannot make a token likelier that the base has
    # not been trained on: the corpus holds every token that the recipe will use
    rng = random.Random(seed)
    corpus, unrelated_text = [], []
    for _ in range(3000):
        scenes = [clip_to_image(scene) for scene in album(rng, 3)]
        corpus += _texts(visual_turns(rng, scenes, 3))
        corpus += [f"Where is each thing in image {rng.randint(1, 6)}?", "; the"]
        corpus += _texts(text_turns(rng, 2))
    for draw_task in TASKS.values():
        for _ in range(200):
            spec = draw_task(rng, PLAIN)
            corpus += [spec.question, *spec.notes, spec.finding]
            unrelated_text.append(f"{spec.question} {GROUNDING_INSTRUCTION}")
    return build_tokenizer(corpus), unrelated_text


def _texts(turns: list[Turn]) -> list[str]:
    return [text for question, pieces in turns
            for text in (question, *(words for words, _, _ in pieces))]


@dataclass
class TokenRow:
    """A dialogue as tokens, an entry each; the last three are indices in the row, -1 for none."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # in the loss
    # what this token is about: the image token that holds the object, or the last token of a listed
    # name or of an option
    object_token: list[int] = field(default_factory=list)
    # the number that announces this image token's image; the list's number for the last token of a
    # listed name, the letter for that of an option
    image_number_token: list[int] = field(default_factory=list)
    # the last mention of the number of the image that this token is about, as in "List image 2"
    question_token: list[int] = field(default_factory=list)


class Writer:
    """Turns dialogues into token rows with a loss weight per token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.encode = lru_cache(50_000)(self._encode)  # most pieces come up again and again
        self.system = self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        self.before_number = {tuple(self.encode(text)) for text in (" image ", '{"image": ')}
        self.number_of_token = {self.encode(str(number))[0]: number for number in range(1, 10)}

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def write_dialogue(self, turns: list[Turn], image_tokens: Sequence[int] = (),
                       user_weight: float = 0.0) -> TokenRow:
        """A chat as a row.

        image_tokens: merged tokens of each image, announced as "Image k: " before the first
        question. user_weight: loss weight of the questions.
        """
        row, about_image = TokenRow(), []  # about_image: number of the image, or 0, per token

        def add(ids: list[int], weight: float = 0.0, object_token: int = -1,
                image_number_token: int = -1, image: int = 0) -> None:
            row.ids.extend(ids)
            row.weights.extend([weight] * len(ids))
            row.object_token.extend([object_token] * len(ids))
            row.image_number_token.extend([image_number_token] * len(ids))
            about_image.extend([image] * len(ids))

        add(self.system)
        first_token = {}  # image number -> its first image token
        for number, count in enumerate(image_tokens, 1):
            label = self.encode(f"{image_label(number)}<|vision_start|>")
            number_token = len(row.ids) + label.index(self.encode(str(number))[0])
            add(label)
            first_token[number] = len(row.ids)
            add([IMAGE_TOKEN] * count, image_number_token=number_token)
            add([VISION_END_TOKEN])
        for index, (question, pieces) in enumerate(turns):
            start = len(row.ids)
            if index:
                add(self.encode("<|im_start|>user\n"), user_weight)
            add(self.encode(question), user_weight)
            add(self.encode("<|im_end|>\n<|im_start|>assistant\n"))
            for text, weight, subject in pieces:
                object_token, image = -1, 0
                if isinstance(subject, str):
                    object_token, number_token = self._find_text(row.ids, start, subject)
                    row.image_number_token[object_token] = number_token
                elif subject:
                    image, cell = subject
                    object_token = first_token[image] + cell
                add(self.encode(text), weight, object_token, image=image)
            add([END_TOKEN], pieces[-1][1])
            add(self.encode("\n"))
        row.question_token = self._last_mentions(row.ids, about_image)
        return row

    def _last_mentions(self, ids: list[int], about_image: list[int]) -> list[int]:
        """Per token the index of the last mention, before it, of the image it is about; or -1."""
        mentions: dict[int, int] = {}
        result = []
        for index, (token, image) in enumerate(zip(ids, about_image)):
            result.append(mentions.get(image, -1))
            if token in self.number_of_token:
                before = ids[max(0, index - 2):index]
                if not self.before_number.isdisjoint((tuple(before), tuple(before[-1:]))):
                    mentions[self.number_of_token[token]] = index
        return result

    def _find_text(self, ids: list[int], start: int, subject: str) -> tuple[int, int]:
        """(last token of a text from `start` on, its list's number or its option's letter)."""
        words = self.encode(f" {subject}")
        if isinstance(subject, Option):
            first = next(index for index in range(start, len(ids))
                         if ids[index:index + len(words)] == words)
            return first + len(words) - 1, first
        separators = {self.encode(",")[0], self.encode(":")[0]}
        first = next(index for index in range(len(ids) - len(words), start, -1)
                     if ids[index:index + len(words)] == words and ids[index - 1] in separators)
        list_number = max(index for index in range(start, first)
                          if ids[index] in self.number_of_token)
        return first + len(words) - 1, list_number
