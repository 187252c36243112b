"""Notebook 90: how the shipped tiny base model was made.

First the vision tower learns to see (`vision`), then the language model learns on its frozen
features (`lessons`, in the order of `curriculum`).
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import Qwen2_5_VLForConditionalGeneration

from mig_kit.boxes import BoxFormat
from mig_kit.common import file_sha256, progress_bar, release_memory, write_atomically
from mig_kit.evaluation.items import make_items, summarize_suite
from mig_kit.models.loading import Hardware, PatchProduct, load_policy
from mig_kit.models.processors import StillImageProcessor
from mig_kit.serving.reply_files import greedy_replies
from mig_kit.shared_prefix.prefixes import pad_rows, pad_to_multiple
from mig_kit.world.scenes import COLOURS, SHAPES
from mig_kit.world.suites import SUITES, make_suite
from tiny_base import attention
from tiny_base.config import tiny_config
from tiny_base.curriculum import Curriculum
from tiny_base.lesson_batches import (
    Batch,
    SeenImage,
    encode_albums,
    split_by_length,
    text_batch,
    total_weight,
    visual_batch,
)
from tiny_base.supervision import AttentionSupervision
from tiny_base.vision import RESTART, codes, image_processor
from tiny_base.vocabulary import IMAGE_TOKEN, Writer

VOCABULARY = 640
MUON = 2.0  # the learning rate of its matrices, as a multiple of all other weights'
# By number of images: how often a batch has so many, and how many dialogues it then has, as a
# multiple of `rows`.
IMAGES_WEIGHTS = (3, 6, 4, 3, 2, 2)
ROWS_FACTORS = (1.5, 1.3, 1.15, 1.0, 0.9, 0.8)
CURVE_STEPS = 25  # steps to a row of the curve
CURVES = ("visual_loss", "visual_right", "looking", "text_loss", "text_right")


def assemble(folder: Path, tokenizer, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A fresh language model on the trained, frozen tower of folder/vision.safetensors."""
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        tiny_config(VOCABULARY), attn_implementation=attention.NAME)
    tower = model.model.visual
    tower.patch_embed.proj = PatchProduct(tower.patch_embed.proj)
    tower.load_state_dict(load_file(folder / "vision.safetensors"))
    tower.requires_grad_(False)
    # The words of shapes, colours and patterns start on the tower's codes for them, so that the
    # token of a red star looks like "red star". The first two codes say whether there is an object;
    # those of patterns begin with "plain".
    words = ["", "", *SHAPES, *COLOURS, "", "striped"]
    embeddings = model.model.language_model.embed_tokens.weight
    with torch.no_grad():
        for word, code in zip(words, codes()[0]):
            if word:
                token, = tokenizer.encode(f" {word}")
                embeddings[token] = code
    return model


def language_loss(model, batch: Batch,
                  supervision: AttentionSupervision | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted mean cross-entropy, plus the supervision's if any; three figures) of a batch.

    Figures: nats and share correct of tokens of weight >= 0.5, and the supervision's attention.
    """
    rows = [dialogue.row for dialogue in batch]
    longest = pad_to_multiple(max(len(row.ids) for row in rows))
    ids = pad_rows([torch.tensor(row.ids) for row in rows], longest)
    weights = pad_rows([torch.tensor(row.weights) for row in rows], longest)[:, 1:]
    inputs = _embed(model, ids, batch)
    hidden = model.model.language_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    is_learned = weights > 0
    learned_weights, targets = weights[is_learned], ids[:, 1:][is_learned]
    logits = model.lm_head(hidden[is_learned]).float()
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    is_heavy = learned_weights >= 0.5
    share_correct = (logits.argmax(-1) == targets)[is_heavy].float().mean()
    loss, to_object = (losses * learned_weights).sum() / learned_weights.sum(), torch.zeros(())
    if supervision is not None:
        marks = [torch.tensor([row.object_token, row.image_number_token, row.question_token])
                 for row in rows]
        marks = pad_rows(marks, longest, fill=-1).transpose(0, 1)
        supervision_loss, to_object = supervision(ids, *marks)
        loss = loss + supervision_loss
    return loss, torch.stack([losses[is_heavy].mean().detach(), share_correct, to_object])


def _embed(model, ids: torch.Tensor, batch: Batch) -> dict:
    """Inputs of the language model: embeddings with the images' features, and positions."""
    embeds = model.model.language_model.embed_tokens(ids)
    is_image = ids == IMAGE_TOKEN
    images, grids = [image for dialogue in batch for image in dialogue.images], None
    if images:
        features = torch.cat([image.features for image in images]).to(embeds.dtype)
        embeds = embeds.masked_scatter(is_image[..., None], features)
        grids = torch.stack([image.grid for image in images])
    positions, _ = model.model.get_rope_index(ids, is_image.int(), grids)
    return {"inputs_embeds": embeds, "position_ids": positions}


def add_gradients(model, batch: Batch, supervision: AttentionSupervision | None) -> list[float]:
    """Add a batch's gradients, short and long rows apart; returns the figures of `language_loss`.
    """
    total, figures = total_weight(batch), torch.zeros(3)
    for part in split_by_length(batch):
        share = total_weight(part) / total
        loss, part_figures = language_loss(model, part, supervision)
        (share * loss).backward()
        figures += share * part_figures
    return figures.tolist()


def make_optimizers(model, supervision: AttentionSupervision,
                    learning_rate: float) -> list[torch.optim.Optimizer]:
    """AdamW; Muon, at MUON times the learning rate, for the matrices of the language model's
    layers.
    """
    # with AdamW alone the same lessons take more than twice as many steps
    matrices = [p for p in model.model.language_model.layers.parameters() if p.ndim > 1]
    muon_ids = {id(p) for p in matrices}
    others = [p for p in (*model.parameters(), *supervision.parameters())
              if p.requires_grad and id(p) not in muon_ids]
    decayed = {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.02}
    undecayed = {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0}
    adam = torch.optim.AdamW([decayed, undecayed], lr=learning_rate, betas=(0.9, 0.98))
    muon = torch.optim.Muon(matrices, lr=MUON * learning_rate, weight_decay=0.02,
                            adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def _make_schedule(optimizer: torch.optim.Optimizer, warmup_steps: int, steps: int):
    """Linear warm-up, and a cosine from the learning rate to 3 % of it."""

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1, step / steps)))
        return min(1, (step + 1) / warmup_steps) * (0.03 + 0.97 * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_language(model, tokenizer, folder: Path, course: Curriculum, *, steps: int, albums: int,
                   rows: Sequence[int], unrelated_text: Sequence[str] = (),
                   seed: int = 0) -> list[dict]:
    """Train one course, or load it from folder/<course>.pt; returns the curve, a row per
    CURVE_STEPS.

    rows: dialogues of a batch about four images each, of which fewer images have more, and of text
    puzzles.
    """
    path = folder / f"{course.name}.pt"
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        return json.loads(saved["curve"])
    torch.manual_seed(seed)
    writer, curve, recent = Writer(tokenizer), [], []
    supervision = AttentionSupervision(model, course.supervises_questions)
    parameters = [parameter for name, parameter in model.named_parameters() if "visual" not in name]
    parameters += supervision.parameters()
    optimizers = make_optimizers(model, supervision, course.learning_rate)
    schedules = [_make_schedule(optimizer, course.warmup_steps, steps) for optimizer in optimizers]
    seen_albums = encode_albums(
        model.model.visual, random.Random(f"{course.name}/albums/{seed}"), albums, course.fewest,
        course.alike)
    model.train()
    for step in progress_bar(range(steps), course.name):
        if step % RESTART == 0:
            rng = random.Random(f"{course.name}/{seed}/{step}")
        visual = _draw_visual(course, step / steps, rows[0], seen_albums, writer, rng)
        puzzles = text_batch(
            writer, rng, course.puzzle_factor * rows[1], unrelated_text,
            seen_albums if course.puzzles_have_images else (), kinds=course.kinds,
            unfit=course.unfit, lettered=course.lettered)
        for optimizer in optimizers:
            optimizer.zero_grad()
        visual_figures = add_gradients(model, visual, supervision)
        text_loss, text_right, _ = add_gradients(
            model, puzzles, supervision if course.puzzles_have_images else None)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for stepper in (*optimizers, *schedules):
            stepper.step()
        recent.append([*visual_figures, text_loss, text_right])
        if (step + 1) % CURVE_STEPS == 0 or step == steps - 1:
            figures = np.mean(recent, 0).round(4).tolist()
            curve.append({"step": step + 1, **dict(zip(CURVES, figures))})
            recent = []
            tqdm.write(str(curve[-1]))
            release_memory()
    supervision.close()
    state = {"model": model.state_dict(), "curve": json.dumps(curve)}
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    return curve


def _draw_visual(course: Curriculum, done: float, visual_rows: int, albums: list[list[SeenImage]],
                 writer: Writer, rng: random.Random) -> Batch:
    """A batch of visual dialogues; done: share of the course."""
    mix = course.plan(done)
    counts = range(1, mix.max_images + 1)
    images = rng.choices(counts, IMAGES_WEIGHTS[:mix.max_images])[0]
    rows = round(visual_rows * ROWS_FACTORS[images - 1])
    return visual_batch(albums, writer, rng, rows, images, located=mix.located,
                        name_weight=mix.name_weight, worded=course.worded,
                        surveyed=course.surveyed)


def save_base(model, tokenizer, folder: Path) -> None:
    """Write the base as a model folder: bfloat16 safetensors, tokenizer, processor."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = Qwen2_5_VLForConditionalGeneration._from_config(tiny_config(VOCABULARY))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    processor = StillImageProcessor(image_processor(), tokenizer, tokenizer.chat_template)
    processor.save_pretrained(folder)


def evaluate_base(folder: Path, hardware: Hardware, per_task: int) -> dict:
    """Greedy scores of the base on validation samples of every suite, percent."""
    policy = load_policy(folder, hardware, BoxFormat())
    scores = {}
    for suite in [name for name, suite in SUITES.items() if suite.default]:
        samples = make_suite(suite, "val", per_task)
        replies = {"greedy": greedy_replies(policy, samples), "drawn": [[]] * len(samples)}
        result = summarize_suite(make_items({suite: samples}, {"base": {suite: replies}},
                                            BoxFormat()))
        tasks = {task: values["acc@0.5"] for task, values in result["tasks"].items()}
        scores[suite] = {"score": result["score"], "tasks": tasks}
    return scores


def model_card(folder: Path, params: dict, vision: dict, curves: dict[str, list[dict]],
               scores: dict) -> str:
    """The model card in Markdown: data, seeds, command, hash and scores.

    params: the notebook's; vision, curves (by course), scores: what the trainings and
    `evaluate_base` return.
    """
    weights = next(folder.glob("*.safetensors"))
    millions = sum(tensor.numel() for tensor in load_file(weights).values()) / 1e6
    command = ", ".join(f"{name} {value}" for name, value in params.items() if name != "run_id")
    last_rows = [f"- {name.replace('_', ' ')}, last {CURVE_STEPS} steps: {json.dumps(curve[-1])}"
                 for name, curve in curves.items()]
    table = []
    for suite, result in scores.items():
        tasks = ", ".join(f"{task} {score:.1f}" for task, score in result["tasks"].items())
        table.append(f"| {suite} | {result['score']:.2f} | {tasks} |")
    return "\n".join([
        "---", "license: apache-2.0", "library_name: transformers",
        "pipeline_tag: image-text-to-text", "---",
        "# The tiny base of mig-kit", "",
        f"A Qwen2.5-VL of {millions:.2f} M parameters over drawn scenes. It names, lists, counts",
        "and locates objects in single images, answers simple multiple-choice questions, and",
        "solves puzzles over lists of text, in the wording that the recipe's reasoning uses. It",
        "has been taught neither the ten tasks nor to reason about images.", "",
        "- data: drawn scenes only, no image from anywhere else; objects of the unseen pairs never "
        "appear as text",
        f"- command: `mig-kit run 90` with {command}",
        f"- sha256 of {weights.name}: `{file_sha256(weights)}`",
        f"- vision, last batch: {json.dumps(vision)}",
        *last_rows, "",
        "Greedy scores on validation samples, percent (chance on the multiple-choice suites is 33 "
        "to 50):", "",
        "| suite | score | tasks |", "|---|---|---|", *table, ""])
