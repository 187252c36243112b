"""The tiny base's vocabulary and chat format, and dialogues as token rows (notebook 90)."""

import random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from mig_kit.build_base.lessons import Turn, album, clip_to_image, text_turns, visual_turns
from mig_kit.prompts import GROUNDING_INSTRUCTION
from mig_kit.world.tasks import TASKS, World

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<|box_start|>", "<|box_end|>")


PIECES = ("<think>", "</think>", "<answer>", "</answer>", '{"image": ', ', "box": [', "]}")


SYSTEM = "You are a helpful assistant."


CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def build_tokenizer(corpus: list[str], vocab_size: int = 640):
    """A byte-level BPE with Qwen2.5's splitting rule (every digit a token of its own) and special tokens.

    The fixed pieces of an answer are single tokens. A small corpus may give fewer than `vocab_size` tokens.
    """
    split = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*SPECIAL, *PIECES], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(corpus, trainer)
    raw.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in PIECES])
    return Qwen2TokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
                              bos_token=None, padding_side="left", chat_template=CHAT_TEMPLATE)


def build_tokenizer_and_unrelated_text(seed: int = 0):
    """The tokenizer, trained on lessons and on the words of the tasks, and the tasks' questions as mere text.

    Every token that the recipe will use must have been trained in the base: LoRA leaves the tied embedding frozen, and an
    untrained token stays as unlikely as it began whatever fine-tuning does.
    """
    rng, corpus, babble = random.Random(seed), [], []
    for _ in range(3000):
        for question, pieces in visual_turns(rng, [clip_to_image(s) for s in album(rng, 3)], 3):
            corpus += [question, *[piece[0] for piece in pieces]]
        corpus += [f"Where is each thing in image {rng.randint(1, 6)}?", "; the"]
        for question, pieces in text_turns(rng, 2):
            corpus += [question, *[piece[0] for piece in pieces]]
    for task in TASKS.values():
        for _ in range(200):
            draft = task(rng, World())
            corpus += [draft.question, *draft.notes, draft.finding]
            babble.append(f"{draft.question} {GROUNDING_INSTRUCTION}")
    return build_tokenizer(corpus), babble


class Writer:
    """Turns dialogues into token rows with a loss weight per token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.head = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        self.before_number = {tuple(self.ids(text)) for text in (" image ", '{"image": ')}
        self.numbers = {self.ids(str(number))[0]: number for number in range(1, 10)}

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, remembered."""
        if text not in self.cache:
            if len(self.cache) > 50000:
                self.cache.clear()
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def dialogue(self, turns: list[Turn], image_tokens: list[int] = (), user_weight: float = 0.0):
        """A chat as (ids, weights, looks, homes, asks), one each per token.

        image_tokens: merged tokens of each picture, announced as "Image k: " before the first question. Indices in the row,
        or -1: looks, of the image token that a token is about; homes, of the number that announced an image token's image;
        asks, of the last mention of the number of the image that a token is about, as in "List image 2". A look may also be a
        name in a list of this turn ("image 2: red star, ..."): then it is the name's last token, whose home is its list's number;
        or an option of the question ("B. red star"): then the option's last token, whose home is the letter.
        """
        ids, weights, looks, homes, asks, starts, mentions = [], [], [], [], [], [], {}

        def add(part: list[int], weight: float, look: int = -1, home: int = -1, about: int = 0):
            for token in part:
                asks.append(mentions.get(about, -1))
                if token in self.numbers and not self.before_number.isdisjoint((tuple(ids[-2:]), tuple(ids[-1:]))):
                    mentions[self.numbers[token]] = len(ids)
                ids.append(token)
            weights.extend([weight] * len(part))
            looks.extend([look] * len(part))
            homes.extend([home] * len(part))

        add(self.head, 0.0)
        for number, tokens in enumerate(image_tokens, 1):
            label = self.ids(f"Image {number}: <|vision_start|>")
            home = len(ids) + label.index(self.ids(str(number))[0])
            add(label, 0.0)
            starts.append(len(ids))
            add([5] * tokens, 0.0, home=home)
            add([4], 0.0)
        for turn, (question, pieces) in enumerate(turns):
            begin = len(ids)
            add([*(self.ids("<|im_start|>user\n") if turn else []), *self.ids(question)], user_weight)
            add(self.ids("<|im_end|>\n<|im_start|>assistant\n"), 0.0)
            for text, weight, where in pieces:
                place, about = -1, 0
                if isinstance(where, str):
                    place, home = self.option(ids, begin, where) if where[1] == "." else self.listed(ids, begin, where)
                    homes[place] = home
                elif where:
                    place, about = starts[where[0] - 1] + where[1], where[0]
                add(self.ids(text), weight, place, about=about)
            add([2], pieces[-1][1])
            add(self.ids("\n"), 0.0)
        return ids, weights, looks, homes, asks

    def option(self, ids: list[int], begin: int, option: str) -> tuple[int, int]:
        """Where, from `begin` on, an option such as "B. red star" stands: indices of its last token and of its letter."""
        words = self.ids(f" {option}")
        place = next(i for i in range(begin, len(ids)) if ids[i:i + len(words)] == words)
        return place + len(words) - 1, place

    def listed(self, ids: list[int], begin: int, name: str) -> tuple[int, int]:
        """Where, from `begin` on, a list holds the name: indices of the name's last token and of the list's number."""
        words, marks = self.ids(f" {name}"), {self.ids(",")[0], self.ids(":")[0]}
        place = next(i for i in range(len(ids) - len(words), begin, -1) if ids[i:i + len(words)] == words and ids[i - 1] in marks)
        return place + len(words) - 1, max(i for i in range(begin, place) if ids[i] in self.numbers)
