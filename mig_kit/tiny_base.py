"""Notebook 90: how the shipped tiny base model was made.

Two steps. `train_vision` teaches the vision tower to see with one small detection head per merged token (localisation by
language-model loss alone is many times slower); `train_language` then teaches the language model on frozen features.
The heads are thrown away. What comes out is a plain Qwen2.5-VL in bfloat16 safetensors.
"""

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from mig_kit.scenes import (COLOURS, PATTERNS, SHAPES, SIZES, Scene, arrange, cell_of, cropped, draw, grid_of,
                            random_looks)

HIDDEN, VISION_HIDDEN = 256, 128


def config(vocab_size: int, hidden: int = HIDDEN, layers: int = 4, vision_hidden: int = VISION_HIDDEN,
           vision_layers: int = 4) -> Qwen2_5_VLConfig:
    """The tiny Qwen2.5-VL. Widths are multiples of 64, the block size of NF4; heads are 32 wide."""
    heads = hidden // 32
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab_size, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=2, pad_token_id=0),
        vision_config=dict(
            depth=vision_layers, hidden_size=vision_hidden, intermediate_size=vision_hidden * 2,
            num_heads=vision_hidden // 32, out_hidden_size=hidden, fullatt_block_indexes=list(range(vision_layers))),
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4, tie_word_embeddings=True)


class DetectionHeads(nn.Module):
    """Per merged token: is a thing centred here, which shape, colour, pattern, is it marked, and its box.

    The box is asked for twice, from the cell's centre and from the picture's corner: the language model reads whole
    coordinates off one token, so the token must know where in the picture it is.
    """

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (1, len(SHAPES), len(COLOURS), len(PATTERNS), 1, 8)
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """features: (tokens, width) -> one tensor (tokens, size) per head."""
        return self.out(features).split(self.sizes, -1)


def vision_scene(rng: random.Random, size: tuple[int, int]) -> Scene:
    """A scene to learn seeing from: 1 to 6 things, now and then blown up, seen from aside, or with a marked thing."""
    kind = rng.random()
    if kind < 0.12:
        scene = arrange(rng, random_looks(rng, rng.randint(1, 4)))
        x1, y1, x2, y2 = rng.choice(scene.things).box
        margin = rng.uniform(1, 6)
        return cropped(scene, (x1 - margin, y1 - margin, x2 + margin, y2 + margin), size)
    if kind < 0.25:
        return arrange(rng, random_looks(rng, rng.randint(1, 2)), size, sides=(20, 34))
    scene = arrange(rng, random_looks(rng, rng.randint(1, 6)), size, sides=(11, 27))
    return replace(scene, mark=rng.choice(scene.things).box) if kind < 0.45 else scene


def detection_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Classes (cells, 5) int: objectness, shape, colour, pattern, marked; boxes (cells, 8) float in cell
    widths of the resized picture, from the cell's centre (4) and from the corner (4). Rows in reading order, as the
    merged tokens are."""
    columns, rows = grid_of(scene.width, scene.height)
    classes, boxes = np.zeros((rows * columns, 5), np.int64), np.zeros((rows * columns, 8), np.float32)
    scale = np.array([columns / scene.width, rows / scene.height] * 2)
    for thing in scene.things:
        x, y = thing.centre
        if not (0 <= x < scene.width and 0 <= y < scene.height):
            continue
        column, row = cell_of(scene, thing)
        classes[row * columns + column] = (1, SHAPES.index(thing.shape), list(COLOURS).index(thing.colour),
                                           PATTERNS.index(thing.pattern), thing.box == scene.mark)
        box = np.clip(np.array(thing.box), 0, [scene.width, scene.height] * 2) * scale
        boxes[row * columns + column] = [*(box - np.array([column + 0.5, row + 0.5] * 2)), *box]
    return classes, boxes


def train_vision(image_processor, out: Path, steps: int = 4000, batch: int = 64, lr: float = 2e-3, seed: int = 0,
                 autocast: bool = True) -> dict:
    """Train the tower and write out/vision.pt-free safetensors; returns the last held-out figures.

    Resumes nothing: it takes minutes. Figures: box error in pixels, accuracy of every head on fresh scenes.
    """
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    rng = random.Random(f"vision/{seed}")
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config(64).vision_config)
    heads = DetectionHeads(HIDDEN)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="vision", mininterval=5)
    figures: dict = {}
    for step in bar:
        size = rng.choice(SIZES) if rng.random() < 0.5 else SIZES[0]
        scenes = [vision_scene(rng, size) for _ in range(batch)]
        inputs = image_processor([draw(s) for s in scenes], return_tensors="pt")
        targets = [detection_targets(s) for s in scenes]
        classes = torch.from_numpy(np.concatenate([t[0] for t in targets]))
        boxes = torch.from_numpy(np.concatenate([t[1] for t in targets]))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
        objectness, shape, colour, pattern, mark, box = heads(features.float())
        there = classes[:, 0] == 1
        parts = [
            nn.functional.binary_cross_entropy_with_logits(objectness[:, 0], classes[:, 0].float()),
            nn.functional.cross_entropy(shape[there], classes[there, 1]),
            nn.functional.cross_entropy(colour[there], classes[there, 2]),
            nn.functional.cross_entropy(pattern[there], classes[there, 3]),
            nn.functional.binary_cross_entropy_with_logits(mark[there, 0], classes[there, 4].float()),
            8 * nn.functional.smooth_l1_loss(box[there], boxes[there], beta=0.05),
        ]
        optimizer.zero_grad()
        sum(parts).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99 or step == steps - 1:
            figures = {
                "step": step + 1, "box_error_px": round(28 * (box - boxes)[there].abs().mean().item(), 3),
                "shape": round((shape.argmax(-1) == classes[:, 1])[there].float().mean().item(), 4),
                "colour": round((colour.argmax(-1) == classes[:, 2])[there].float().mean().item(), 4),
                "pattern": round((pattern.argmax(-1) == classes[:, 3])[there].float().mean().item(), 4),
                "marked": round(((mark[:, 0] > 0) == classes[:, 4])[there].float().mean().item(), 4)}
            bar.set_postfix(figures)
            print(figures, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, out / "vision.safetensors")
    return figures


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

    The fixed pieces of an answer are single tokens. The vocabulary is padded to `vocab_size` by the model, not here.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

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


class Writer:
    """Turns dialogues into token rows with a loss weight per token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}
        self.head = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, remembered."""
        if text not in self.cache:
            if len(self.cache) > 50000:
                self.cache.clear()
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def dialogue(self, turns, image_tokens: list[int] = (), user_weight: float = 0.0) -> tuple[list[int], list[float]]:
        """Ids and weights of a chat. turns: (user's words, [(assistant's words, weight), ...]); image_tokens: merged
        tokens of each picture, announced as "Image k: " before the first question."""
        ids, weights = list(self.head), [0.0] * len(self.head)
        for number, tokens in enumerate(image_tokens, 1):
            part = [*self.ids(f"Image {number}: <|vision_start|>"), *[5] * tokens, 4]
            ids += part
            weights += [0.0] * len(part)
        for turn, (question, pieces) in enumerate(turns):
            part = self.ids(question) if turn == 0 else self.ids("<|im_start|>user\n") + self.ids(question)
            ids += part
            weights += [user_weight] * len(part)
            part = self.ids("<|im_end|>\n<|im_start|>assistant\n")
            ids += part
            weights += [0.0] * len(part)
            for text, weight in pieces:
                ids += self.ids(text)
                weights += [weight] * len(self.ids(text))
            ids += [2, *self.ids("\n")]
            weights += [pieces[-1][1], 0.0]
        return ids, weights


@torch.no_grad()
def album_bank(tower, image_processor, rng: random.Random, albums: int, autocast: bool = True) -> list[list[tuple]]:
    """Pictures seen once and for all: per album a list of (scene, features (tokens, hidden) bf16, (rows, columns))."""
    from mig_kit.lessons import album, visible

    bank = []
    for _ in tqdm(range(albums), desc="album", mininterval=5):
        scenes = album(rng)
        inputs = image_processor([draw(s) for s in scenes], return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.to(torch.bfloat16)
        grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
        parts = features.split([h * w for h, w in grids])
        bank.append([(visible(s), f.clone(), g) for s, f, g in zip(scenes, parts, grids)])
    return bank


def positions(rows: list[list[int]], grids: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Qwen2.5-VL's three position ids per token (3, rows, longest row), for rows padded on the right.

    The rule of transformers' get_rope_index, without its per-token Python loops; a test holds the two together.
    """
    longest = -(-max(map(len, rows)) // 32) * 32
    out = np.zeros((3, len(rows), longest), np.int64)
    for r, (ids, row_grids) in enumerate(zip(rows, grids)):
        at = now = 0
        for height, width in row_grids:
            start = ids.index(5, at)
            out[:, r, at:start] = np.arange(now, now + start - at)
            now += start - at
            end = start + height * width
            out[0, r, start:end] = now
            out[1, r, start:end] = now + np.repeat(np.arange(height), width)
            out[2, r, start:end] = now + np.tile(np.arange(width), height)
            now += max(height, width)
            at = end
        out[:, r, at:] = np.arange(now, now + longest - at)
    return torch.from_numpy(out)


def language_loss(model, rows, weights, grids=None, features=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean cross-entropy of the rows, and the plain one of the tokens of weight >= 0.5 (for the log)."""
    longest = -(-max(map(len, rows)) // 32) * 32
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    weight = torch.zeros(len(rows), longest)
    for r, (row, w) in enumerate(zip(rows, weights)):
        ids[r, :len(row)] = torch.tensor(row)
        weight[r, :len(row)] = torch.tensor(w)
    language = model.model.language_model
    embeds = language.embed_tokens(ids)
    if features is not None:
        embeds = embeds.masked_scatter((ids == 5)[..., None], features.to(embeds.dtype))
    place = positions(rows, grids or [[] for _ in rows])
    hidden = language(inputs_embeds=embeds, position_ids=place, use_cache=False).last_hidden_state[:, :-1]
    wanted = weight[:, 1:] > 0
    logits = model.lm_head(hidden[wanted]).float()
    losses = nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    w = weight[:, 1:][wanted]
    heavy = w >= 0.5
    right = (logits.argmax(-1) == ids[:, 1:][wanted])[heavy].float().mean()
    return (losses * w).sum() / w.sum(), torch.stack([losses[heavy].mean().detach(), right])


def train_language(model, tokenizer, bank, rng: random.Random, steps: int, lr: float = 1.5e-3, visual_rows: int = 24,
                   text_rows: int = 24, autocast: bool = True, babble: list[str] = (), folder: Path | None = None) -> dict:
    """Teach the language model on the bank's features and on text puzzles; checkpoints to folder/language.pt.

    One picture a dialogue for the first twelfth, up to three until a quarter, then up to six.
    """
    from mig_kit.lessons import text_turns, visual_turns

    writer = Writer(tokenizer)
    parameters = [p for n, p in model.named_parameters() if "visual" not in n]
    decay = [p for p in parameters if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.02},
                                   {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps)))))
    first, history = 0, []
    path = folder / "language.pt" if folder else None
    if path and path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        rng = random.Random(f"language/{first}")
        for _ in range(first):
            schedule.step()
    bar = tqdm(range(first, steps), desc="language", mininterval=10)
    model.train()
    for step in bar:
        top = 1 if step < steps // 12 else 3 if step < steps // 4 else 6
        count = rng.choices(range(1, top + 1), (3, 6, 4, 3, 2, 2)[:top])[0]
        rows, weights, grids, features = [], [], [], []
        for _ in range(visual_rows):
            pictures = rng.sample(rng.choice(bank), count)
            turns = [(q, [(a, w)]) for q, a, w in visual_turns(rng, [p[0] for p in pictures], 6)]
            ids, weight = writer.dialogue(turns, [len(p[1]) for p in pictures])
            rows.append(ids)
            weights.append(weight)
            grids.append([p[2] for p in pictures])
            features += [p[1] for p in pictures]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            seen, seen_stats = language_loss(model, rows, weights, grids, torch.cat(features))
            rows, weights = [], []
            for _ in range(text_rows):
                turns = text_turns(rng, 2)
                if babble and rng.random() < 0.5:
                    turns.append((rng.choice(babble), [("", 0.0)]))
                ids, weight = writer.dialogue(turns, user_weight=0.03)
                rows.append(ids)
                weights.append(weight)
            read, read_stats = language_loss(model, rows, weights)
        optimizer.zero_grad()
        (seen + read).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        history.append([*seen_stats.tolist(), *read_stats.tolist()])
        if step % 25 == 24 or step == steps - 1:
            mean = np.mean(history[-25:], 0).round(3).tolist()
            print(dict(step=step + 1, images=top, visual=mean[:2], text=mean[2:]), flush=True)
        if path and (step % 200 == 199 or step == steps - 1):
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
    return {"visual_loss": mean[0], "visual_right": mean[1], "text_loss": mean[2], "text_right": mean[3]}
