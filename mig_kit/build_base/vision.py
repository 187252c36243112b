"""How the tiny base learnt to see (notebook 90): a vision tower trained with one small detection head per merged token.

Localisation by language-model loss alone is many times slower. The heads are thrown away.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.common import progress_bar, write_json
from mig_kit.engine.models import TINY_HIDDEN, PatchProduct, tiny_config
from mig_kit.world.scenes import (
    COLOURS,
    PATTERNS,
    SHAPES,
    SIZES,
    Scene,
    arrange_objects,
    crop_scene,
    draw_scene,
    grid_size,
    object_cell,
    random_appearances,
)

FEATURE_NORM = 2.0


CHECKPOINT = 200  # steps; every so many the random state starts anew, so that a resumed run draws what another would


class DetectionHeads(nn.Module):
    """Per merged token: is a thing centred here, which shape, colour, pattern, is it marked, and its box.

    The box is asked for twice, from the cell's centre and from the picture's corner: the language model reads whole
    coordinates off one token, so the token must know where in the picture it is.
    """

    def __init__(self, width: int):
        super().__init__()
        self.sizes = (2, len(SHAPES), len(COLOURS), len(PATTERNS), 2, 8)
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """features: (tokens, width) -> one tensor (tokens, size) per head; the last is the box."""
        return self.out(features).split(self.sizes, -1)


def codes(width: int = TINY_HIDDEN) -> tuple[torch.Tensor, tuple[int, ...]]:
    """An orthonormal code per thing that a token can say, (codes, width), and the sizes of the groups.

    The groups: objectness, shape, colour, pattern, mark, then tens (0 to 11) and units of x1, y1, x2, y2. The language
    model starts with the words' embeddings on the codes of shape, colour and pattern, so that a token of a red star
    looks like the words "red star" with its digits beside them.
    """
    sizes = (2, len(SHAPES), len(COLOURS), len(PATTERNS), 2, *(12, 10) * 4)
    noise = torch.randn(width, sum(sizes), generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.T.contiguous(), sizes


def vision_scene(rng: random.Random, size: tuple[int, int]) -> Scene:
    """A scene to learn seeing from: 1 to 6 things, now and then blown up, seen from aside, or with a marked thing."""
    kind = rng.random()
    if kind < 0.12:
        scene = arrange_objects(rng, random_appearances(rng, rng.randint(1, 4)))
        x1, y1, x2, y2 = rng.choice(scene.things).box
        margin = rng.uniform(1, 6)
        return crop_scene(scene, (x1 - margin, y1 - margin, x2 + margin, y2 + margin), size)
    if kind < 0.25:
        return arrange_objects(rng, random_appearances(rng, rng.randint(1, 2)), size, sides=(20, 34))
    scene = arrange_objects(rng, random_appearances(rng, rng.randint(1, 6)), size, sides=(11, 27))
    return replace(scene, mark=rng.choice(scene.things).box) if kind < 0.45 else scene


def detection_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Classes (cells, 5) int: objectness, shape, colour, pattern, marked; boxes (cells, 8) float in cell
    widths of the resized picture, from the cell's centre (4) and from the corner (4). Rows in reading order, as the
    merged tokens are."""
    columns, rows = grid_size(scene.width, scene.height)
    classes, boxes = np.zeros((rows * columns, 5), np.int64), np.zeros((rows * columns, 8), np.float32)
    scale = np.array([columns / scene.width, rows / scene.height] * 2)
    for thing in scene.things:
        x, y = thing.centre
        if not (0 <= x < scene.width and 0 <= y < scene.height):
            continue
        column, row = object_cell(scene, thing)
        classes[row * columns + column] = (1, SHAPES.index(thing.shape), list(COLOURS).index(thing.colour),
                                           PATTERNS.index(thing.pattern), thing.box == scene.mark)
        box = np.clip(np.array(thing.box), 0, [scene.width, scene.height] * 2) * scale
        boxes[row * columns + column] = [*(box - np.array([column + 0.5, row + 0.5] * 2)), *box]
    return classes, boxes


def image_processor() -> Qwen2VLImageProcessorPil:
    """The tiny base's image processor: Qwen2.5-VL's, with the kit's pixel limits."""
    return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=401408)


def _batch(rng: random.Random, processor, size: int):
    """Processed pictures of one random size, and their targets: classes (cells, 5), boxes (cells, 8)."""
    shape = rng.choice(SIZES) if rng.random() < 0.5 else SIZES[0]
    scenes = [vision_scene(rng, shape) for _ in range(size)]
    targets = [detection_targets(s) for s in scenes]
    classes = torch.from_numpy(np.concatenate([t[0] for t in targets]))
    boxes = torch.from_numpy(np.concatenate([t[1] for t in targets]))
    return processor([draw_scene(s) for s in scenes], return_tensors="pt"), classes, boxes


def class_loss(groups, classes: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of objectness everywhere, and of shape, colour, pattern and mark where a thing is."""
    there = classes[:, 0] == 1
    loss = nn.functional.cross_entropy(groups[0], classes[:, 0])
    return loss + sum(nn.functional.cross_entropy(groups[i][there], classes[there, i]) for i in range(1, 5))


def digit_loss(groups, boxes: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the tens and units of the four coordinates, whole pixels of the resized picture."""
    whole = (boxes[there, 4:] * 28).round().long().clamp(0, 119)
    pairs = [(groups[5 + 2 * i + k][there], whole[:, i] // 10 if k == 0 else whole[:, i] % 10) for i in range(4) for k in (0, 1)]
    return sum(nn.functional.cross_entropy(logits, digit) for logits, digit in pairs) / len(pairs)


def save_checkpoint(path: Path, **state) -> None:
    """What a training needs to go on (tensors and plain values), written beside and renamed."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train_vision(folder: Path, *, locate_steps: int, spell_steps: int, batch: int = 64, seed: int = 0,
                 autocast: bool = True) -> dict:
    """Train the tower on fresh scenes and write folder/vision.safetensors; returns the figures of the last batches.

    First it learns to locate (trained heads), then to spell: every token's features become a sum of `codes`. Figures:
    box error in pixels of the resized picture, share of right classes and digits. Checkpointed to folder/vision.pt every
    CHECKPOINT steps; a run that was killed goes on from there and ends on the same weights.
    """
    path, notes = folder / "vision.safetensors", folder / "vision.json"
    if path.is_file() and notes.is_file():
        return json.loads(notes.read_text())
    torch.manual_seed(seed)
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(tiny_config(64).vision_config)
    tower.patch_embed.proj = PatchProduct(tower.patch_embed.proj)
    heads, processor, figures = DetectionHeads(TINY_HIDDEN), image_processor(), {}
    table, sizes = codes()
    checkpoint = folder / "vision.pt"
    saved = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else {}
    if saved:
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        figures = json.loads(saved["figures"])
    for phase, steps, lr in (("locate", locate_steps, 2e-3), ("spell", spell_steps, 1e-3)):
        going_on = saved.get("phase") == phase
        if not going_on and phase == "locate" and saved:
            continue
        parameters = [*tower.parameters(), *heads.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
        first = saved["step"] if going_on else 0
        if going_on:
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
        bar = progress_bar(range(first, steps), phase, initial=first, total=steps)
        for step in bar:
            if step % CHECKPOINT == 0:
                rng = random.Random(f"vision/{seed}/{phase}/{step}")
            inputs, classes, boxes = _batch(rng, processor, batch)
            there = classes[:, 0] == 1
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                features = tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output
            features = features.float()
            *groups, box = heads(features)
            loss = class_loss(groups, classes) + 8 * nn.functional.smooth_l1_loss(box[there], boxes[there], beta=0.05)
            if phase == "spell":
                spelt = nn.functional.rms_norm(features, (TINY_HIDDEN,)) @ table.T
                groups = spelt.split(sizes, -1)
                digits = digit_loss(groups, boxes, there)
                loss = loss + class_loss(groups, classes) + 4 * digits
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 49 or step == steps - 1:
                right = [(groups[i].argmax(-1) == classes[:, i])[there].float().mean().item() for i in range(1, 5)]
                figures |= {f"{phase}_box_error_px": round(28 * (box - boxes)[there].abs().mean().item(), 3),
                            f"{phase}_classes": [round(r, 3) for r in right]}
                if phase == "spell":
                    figures["digit_nats"] = round(digits.item(), 3)
                bar.set_postfix(figures)
            if (step + 1) % CHECKPOINT == 0 and (phase, step + 1) != ("spell", steps):
                save_checkpoint(checkpoint, phase=phase, step=step + 1, tower=tower.state_dict(), heads=heads.state_dict(),
                                optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), figures=json.dumps(figures))
    with torch.no_grad():  # as long as a word's embedding, so that what the language model adds to a token can show
        scale = FEATURE_NORM / features.norm(dim=-1).mean()
        tower.merger.mlp[2].weight *= scale
        tower.merger.mlp[2].bias *= scale
    save_file({k: v.contiguous() for k, v in tower.state_dict().items()}, path)
    write_json(notes, figures)
    return figures
