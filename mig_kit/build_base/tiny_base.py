"""Notebook 90: how the shipped tiny base model was made.

Two steps: the vision tower learns to see (`mig_kit.vision`), then the language model learns on the frozen tower's features
(`mig_kit.lessons` says what). What comes out is a plain Qwen2.5-VL in bfloat16 safetensors, which has been taught neither
the ten tasks nor how to reason about pictures.
"""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.build_base.lesson_batches import Batch, album_bank, position_ids, text_batch, visual_batch
from mig_kit.build_base.lessons import HARD_KINDS, KINDS, LOOSE_KINDS
from mig_kit.build_base.vision import CHECKPOINT, codes, image_processor, save_checkpoint
from mig_kit.build_base.vocabulary import Writer
from mig_kit.common import file_sha256, progress_bar, release_memory
from mig_kit.engine import attention
from mig_kit.engine.models import (
    Hardware,
    PatchProduct,
    StillImageProcessor,
    load_model,
    load_processor,
    tiny_config,
)
from mig_kit.engine.prefixes import pad_to_multiple
from mig_kit.engine.sampling import greedy_replies
from mig_kit.stages.evaluate import summarize_suite
from mig_kit.world.scenes import COLOURS, SHAPES
from mig_kit.world.suites import SUITES, make_suite

VOCABULARY = 640


MUON = 2.0  # the learning rate of its matrices, as a multiple of all other weights'


LOOKING_LAYER, LOOKERS, HOMING, ASKING_LAYER, ASKING = 2, (0, 2, 4, 6), (1, 5), 1, (1, 5)


def assemble(folder: Path, tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh language model on the trained, frozen tower of folder/vision.safetensors.

    The embeddings of the words for shapes, colours and patterns start on the tower's codes for them.
    """
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(tiny_config(VOCABULARY), attn_implementation=attention.NAME)
    patch_embed = model.model.visual.patch_embed
    patch_embed.proj = PatchProduct(patch_embed.proj)
    model.model.visual.load_state_dict(load_file(folder / "vision.safetensors"))
    model.model.visual.requires_grad_(False)
    table, sizes = codes()
    words = {word: 2 + i for i, word in enumerate((*SHAPES, *COLOURS))} | {"striped": 2 + len(SHAPES) + len(COLOURS) + 1}
    with torch.no_grad():
        for word, row in words.items():
            token, = tokenizer.encode(f" {word}")
            model.model.language_model.embed_tokens.weight[token] = table[row]
    return model


def _attended(blocks: list[torch.Tensor], target: torch.Tensor, heads: tuple[int, ...]) -> torch.Tensor:
    """What `heads` attend from every position with a target >= 0 to that target: (positions, heads), at least 1e-6.

    blocks: the weights, as `attention` gives them in blocks.
    """
    row, place = (target >= 0).nonzero(as_tuple=True)
    goal, order, found = target[row, place], [], []
    for number, weights in enumerate(blocks):
        here = (place // attention.BLOCK == number).nonzero()[:, 0]
        where = row[here, None], torch.tensor(heads), place[here, None] % attention.BLOCK, goal[here, None]
        order.append(here)
        found.append(weights[where].float().clamp(min=1e-6))
    return torch.cat(found)[torch.cat(order).argsort()]


class AttentionSupervision(nn.Module):
    """Supervises how the language model looks things up, which otherwise forms only after a long plateau.

    Always: what the LOOKERS (half the heads of one layer) attend from the words about a thing to that thing's token, and what
    two heads of the first layer attend from an image token (or a listed name) to its image's number. With `asking` also what
    two heads of the layer between attend from those words to the number in the question, and that a linear reader, thrown away
    afterwards, tells the number from what the looking layer is given, on both sides: a query that does not hold the number
    looks the thing up in all images at once.
    """

    def __init__(self, model, asking: bool):
        super().__init__()
        self.seen: dict = {}
        language = model.model.language_model
        self.layers = [*language.layers]
        self.watched = {0, LOOKING_LAYER} | ({ASKING_LAYER} if asking else set())
        self.modules_watched = [language.layers[i].self_attn for i in self.watched]
        for module in self.modules_watched:
            module.keep_weights = True
        for layer in language.layers:
            layer.self_attn.in_blocks = True
        self.hooks = [language.layers[i].self_attn.register_forward_hook(
            lambda module, given, result, i=i: self.seen.update({i: result[1]})) for i in self.watched]
        self.hooks.append(language.layers[LOOKING_LAYER].input_layernorm.register_forward_hook(
            lambda module, given, result: self.seen.update(given=result)))
        self.reader = nn.Linear(language.config.hidden_size, VOCABULARY) if asking else None

    def forward(self, ids: torch.Tensor, look: torch.Tensor, home: torch.Tensor, ask: torch.Tensor):
        """(rows, tokens) each, as `Writer.dialogue` gives them; the loss, and attention from first words to the thing.

        The first words about a thing weigh four times as much: once a digit is written, it gives the thing away.
        """
        look, ask = look[:, 1:], ask[:, 1:]
        if not ((look >= 0).any() and (home >= 0).any()):
            return torch.zeros(()), torch.zeros(())
        looked, found = _attended(self.seen[LOOKING_LAYER], look, LOOKERS), _attended(self.seen[0], home, HOMING)
        first = (look != torch.roll(look, 1, 1))[look >= 0]
        weight = 1 + 3 * first.float()
        loss = -0.5 * (looked.log() * weight[:, None]).mean() / weight.mean() - 0.5 * found.log().mean()
        figure = looked[first].mean().detach()
        if self.reader is None or not (ask >= 0).any():
            return loss, figure
        loss = loss - 0.5 * _attended(self.seen[ASKING_LAYER], ask, ASKING).log().mean()
        for place, given in ((home, self.seen["given"]), (ask, self.seen["given"][:, :-1])):
            there = place >= 0
            number = ids.gather(1, place.clamp(min=0))[there]
            loss = loss + 0.5 * nn.functional.cross_entropy(self.reader(given[there]).float(), number)
        return loss, figure

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self.hooks:
            hook.remove()
        for module in self.modules_watched:
            module.keep_weights = False
        for layer in self.layers:
            layer.self_attn.in_blocks = False


def language_loss(model, batch: Batch, tutor: AttentionSupervision | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch, and for the log: nats and share right of the tokens of weight >= 0.5, and the tutor's figure.

    The loss is the weighted mean cross-entropy plus the tutor's, if there is one.
    """
    longest = pad_to_multiple(max(map(len, batch.ids)))
    ids = torch.zeros(len(batch.ids), longest, dtype=torch.long)
    weight, marks = torch.zeros(ids.shape), torch.full((3, *ids.shape), -1)
    for r, row in enumerate(batch.ids):
        ids[r, :len(row)], weight[r, :len(row)] = torch.tensor(row), torch.tensor(batch.weights[r])
        marks[:, r, :len(row)] = torch.tensor([batch.looks[r], batch.homes[r], batch.asks[r]])
    language = model.model.language_model
    embeds = language.embed_tokens(ids)
    if batch.features:
        embeds = embeds.masked_scatter((ids == 5)[..., None], torch.cat(batch.features).to(embeds.dtype))
    place = position_ids(batch.ids, batch.grids)
    hidden = language(inputs_embeds=embeds, position_ids=place, use_cache=False).last_hidden_state[:, :-1]
    weight, wanted = weight[:, 1:], weight[:, 1:] > 0
    logits, said = model.lm_head(hidden[wanted]).float(), ids[:, 1:][wanted]
    losses = nn.functional.cross_entropy(logits, said, reduction="none")
    heavy = weight[wanted] >= 0.5
    right = (logits.argmax(-1) == said)[heavy].float().mean()
    loss, figure = (losses * weight[wanted]).sum() / weight[wanted].sum(), torch.zeros(())
    if tutor is not None:
        taught, figure = tutor(ids, *marks)
        loss = loss + taught
    return loss, torch.stack([losses[heavy].mean().detach(), right, figure])


def gradients(model, batch: Batch, tutor: AttentionSupervision | None, autocast: bool) -> list[float]:
    """Add the gradients of a batch, part by part; the figures of `language_loss`. A part counts as much as its tokens weigh."""
    whole, figures = batch.weight(), torch.zeros(3)
    for part in batch.parts():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, found = language_loss(model, part, tutor)
        (part.weight() / whole * loss).backward()
        figures += part.weight() / whole * found
    return figures.tolist()


@dataclass(frozen=True)
class Curriculum:
    """A course of lessons. name: of its checkpoint and curve; lr: see `optimizers_of`; fewest: looks an album draws from, at
    least; asking: see Tutor; plan: share of the course done -> (most pictures a dialogue, share of locating dialogues, weight of
    names), the last two as in `visual_batch`, like worded; pictured: text puzzles stand behind pictures; kinds: of puzzles;
    unfit: see `text_turns`; alike: see `album`; texts: how many times the usual number of puzzles.
    """

    name: str
    lr: float
    warmup: int
    fewest: int
    asking: bool
    plan: Callable[[float], tuple[int, float, float]]
    worded: float = 0.0
    pictured: bool = False
    kinds: tuple[str, ...] = KINDS
    unfit: float = 0.75
    alike: float = 0.0
    texts: int = 1
    lettered: float = 0.25
    surveyed: float = 0.0


def _seeing(done: float) -> tuple[int, float, float]:
    return 1 if done < 0.235 else 3 if done < 0.5 else 6, 0.6 if done < 0.4 else 0.3, 1.0 if done < 0.4 else 3.0


# One picture a dialogue for the first quarter, up to three until half, then up to six: with several from the start the model
# sits on a plateau, reading none of them. Boxes come first; after two fifths names weigh more.
SEEING = Curriculum("seeing", 1.5e-3, 100, 5, False, _seeing)


# After the first course the model reads one picture but mixes up several. Here an album's pictures hold the same few things, so
# that the image's number decides.
TELLING_APART = Curriculum("telling_apart", 1.5e-3, 50, 3, True, lambda done: (6, 0.3, 3.0))


# Now it sees, and it solves puzzles over lists, but not with pictures before it: they distract it. Here they stand before most
# puzzles, and lists are worded as a puzzle's.
COMBINING = Curriculum("combining", 1e-3, 50, 3, True, lambda done: (6, 0.3, 3.0), 0.6, True,
                   LOOSE_KINDS)


# The hardest puzzles again, more of them behind their own question, half with options to choose from by letter; films, whose
# pictures all show the same things; and all pictures listed in turn, for before it did not know how many there are.
CONCLUDING = Curriculum("concluding", 1e-3, 50, 3, True, lambda done: (6, 0.3, 3.0), 0.6, True, HARD_KINDS, 0.5, 0.35, 2, 0.5, 0.25)


def make_optimizers(model, tutor: AttentionSupervision, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the language model's layers, at MUON times `lr`; AdamW for all else that is learned.

    With AdamW for all the same lessons take more than twice as many steps.
    """
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim > 1]
    inside = {id(p) for p in matrices}
    others = [p for p in (*model.parameters(), *tutor.parameters()) if p.requires_grad and id(p) not in inside]
    adam = torch.optim.AdamW([{"params": [p for p in others if p.ndim > 1], "weight_decay": 0.02},
                              {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.98))
    return [adam, torch.optim.Muon(matrices, lr=MUON * lr, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")]


def train_language(model, tokenizer, folder: Path, course: Curriculum, *, steps: int, albums: int, visual_rows: int = 24,
                   text_rows: int = 24, babble: list[str] = (), seed: int = 0, autocast: bool = True) -> list[dict]:
    """One course of lessons; checkpoints to folder/<course>.pt every CHECKPOINT steps. Returns the curve in rows of 25 steps.

    `visual_rows` is the number of dialogues of many pictures; short ones are more.
    """
    torch.manual_seed(seed)
    writer = Writer(tokenizer)
    tutor = AttentionSupervision(model, course.asking)
    parameters = [p for n, p in model.named_parameters() if "visual" not in n] + list(tutor.parameters())
    optimizers = make_optimizers(model, tutor, course.lr)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / course.warmup) * (
        0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * min(1, s / steps))))) for optimizer in optimizers]
    path, first, curve, recent = folder / f"{course.name}.pt", 0, [], []
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        tutor.load_state_dict(saved["tutor"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(state)
        first, curve = saved["step"], json.loads(saved["curve"])
        for schedule in schedules * first:
            schedule.step()
    albums = albums if first < steps else 0
    bank = album_bank(model.model.visual, random.Random(f"{course.name}/albums/{seed}"), albums, autocast, course.fewest,
                      course.alike)
    model.train()
    for step in progress_bar(range(first, steps), course.name, initial=first, total=steps):
        if step % CHECKPOINT == 0:
            rng = random.Random(f"{course.name}/{seed}/{step}")
        top, *mix = course.plan(step / steps)
        count = rng.choices(range(1, top + 1), (3, 6, 4, 3, 2, 2)[:top])[0]
        rows = round(visual_rows * (1.5, 1.3, 1.15, 1.0, 0.9, 0.8)[count - 1])
        batch = visual_batch(bank, writer, rng, rows, count, *mix, course.worded, course.surveyed)
        puzzles = text_batch(writer, rng, course.texts * text_rows, babble, bank if course.pictured else (), course.kinds,
                             course.unfit, course.lettered)
        for optimizer in optimizers:
            optimizer.zero_grad()
        seen, read = (gradients(model, given, teacher, autocast)
                      for given, teacher in ((batch, tutor), (puzzles, tutor if course.pictured else None)))
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for each in (*optimizers, *schedules):
            each.step()
        recent.append([*seen, *read[:2]])
        if step % 25 == 24 or step == steps - 1:
            mean = np.mean(recent, 0).round(4).tolist()
            recent = []
            names = ("step", "visual_loss", "visual_right", "looking", "text_loss", "text_right")
            curve.append(dict(zip(names, [step + 1, *mean])))
            tqdm.write(str(curve[-1]))
            release_memory()
        if step % CHECKPOINT == CHECKPOINT - 1 or step == steps - 1:
            save_checkpoint(path, model=model.state_dict(), tutor=tutor.state_dict(), step=step + 1, curve=json.dumps(curve),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers])
    tutor.close()
    return curve


def save_base(model, tokenizer, folder: Path) -> None:
    """The base as a model folder: bfloat16 safetensors, tokenizer, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = Qwen2_5_VLForConditionalGeneration._from_config(tiny_config(VOCABULARY))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    StillImageProcessor(image_processor(), tokenizer, tokenizer.chat_template).save_pretrained(folder)


def evaluate_base(folder: Path, hw: Hardware, per_task: int) -> dict:
    """Greedy scores of the base on validation samples of every suite, percent, and on questions it was taught."""
    policy = load_policy(folder, hw, BoxFormat())
    scores = {}
    for suite in SUITES:
        samples = make_suite(suite, "val", per_task)
        result = summarize_suite(samples, greedy_replies(policy, samples), [], BoxFormat())
        scores[suite] = {"score": result["score"], "tasks": {k: t["acc@0.5"] for k, t in result["tasks"].items()}}
    return scores


def model_card(folder: Path, params: dict, vision: dict, courses: dict, scores: dict) -> str:
    """The model card in Markdown: data, seeds, command, hash and scores."""
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    lines = [f"| {suite} | {result['score']} | {', '.join(f'{k} {v:g}' for k, v in result['tasks'].items())} |"
             for suite, result in scores.items()]
    return "\n".join([
        "---", "license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text", "---",
        "# The tiny base of mig-kit", "",
        f"A Qwen2.5-VL of {sum(t.numel() for t in tensors.values()) / 1e6:.2f} M parameters over drawn scenes. It names, lists,",
        "counts and locates things in single pictures, answers simple multiple-choice questions, and solves puzzles over",
        "lists of text, in the wording that the recipe's reasoning uses. It has been taught neither the ten tasks nor to",
        "reason about pictures.", "",
        "- data: drawn scenes only, no picture from anywhere else; things of the unseen pairs never appear as text",
        f"- command: `mig-kit run 90` with {', '.join(f'{k} {v}' for k, v in params.items() if k != 'run_id')}",
        f"- sha256 of {weights.name}: `{file_sha256(weights)}`",
        f"- vision, last batch: {json.dumps(vision)}",
        *(f"- {name.replace('_', ' ')}, last 25 steps: {json.dumps(rows[-1])}" for name, rows in courses.items()), "",
        "Greedy scores on validation samples, percent (chance on the multiple-choice suites is 33 to 50):", "",
        "| suite | score | tasks |", "|---|---|---|", *lines, ""])
