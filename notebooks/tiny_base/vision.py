"""How the tiny base learnt to see (notebook 90): a vision tower trained with detection heads.

Learning from the language model's loss alone takes many times as long. The heads are thrown away.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mig_kit.common import progress_bar, write_json
from mig_kit.models.loading import PatchProduct
from mig_kit.world.scenes import (
    CELL,
    COLOURS,
    PATTERNS,
    PLAIN,
    SHAPES,
    SIZES,
    Scene,
    crop_scene,
    grid_size,
    object_cell,
    render_scene,
)
from tiny_base.config import TINY_HIDDEN, tiny_config

FEATURE_NORM = 2.0
RESTART = 200  # steps after which the random state starts again, as when the shipped base was made
CLASS_SIZES = (2, len(SHAPES), len(COLOURS), len(PATTERNS), 2)  # object?, ..., marked?
DIGIT_SIZES = (12, 10) * 4  # tens (0 to 11) and units of x1, y1, x2, y2
BOX_SIZE = 8  # two boxes


def codes() -> tuple[torch.Tensor, tuple[int, ...]]:
    """(codes, hidden): an orthonormal code per fact that a token can state, and the groups' sizes.
    """
    sizes = (*CLASS_SIZES, *DIGIT_SIZES)
    noise = torch.randn(TINY_HIDDEN, sum(sizes), generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(noise).Q.T.contiguous(), sizes


def vision_scene(rng: random.Random, size: tuple[int, int]) -> Scene:
    """A scene of 1 to 6 objects; some are cropped, or have large objects or a marked one."""
    kind = rng.random()
    if kind < 0.12:
        scene = PLAIN.arrange_scene(rng, PLAIN.pick_appearances(rng, rng.randint(1, 4)))
        x1, y1, x2, y2 = rng.choice(scene.objects).box
        margin = rng.uniform(1, 6)
        return crop_scene(scene, (x1 - margin, y1 - margin, x2 + margin, y2 + margin), size)
    if kind < 0.25:
        appearances = PLAIN.pick_appearances(rng, rng.randint(1, 2))
        return PLAIN.arrange_scene(rng, appearances, size, sides=(20, 34))
    appearances = PLAIN.pick_appearances(rng, rng.randint(1, 6))
    scene = PLAIN.arrange_scene(rng, appearances, size, sides=(11, 27))
    return replace(scene, mark=rng.choice(scene.objects).box) if kind < 0.45 else scene


def detection_targets(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """(cells, 5) int, object or none, shape, colour, pattern, marked or not; and (cells, 8) boxes.

    Boxes are in cell widths of the resized image, first from the cell's centre, then from the
    image's corner. Rows are in reading order, as the merged tokens are.
    """
    columns, rows = grid_size(scene.width, scene.height)
    classes = np.zeros((rows * columns, 5), np.int64)
    boxes = np.zeros((rows * columns, 8), np.float32)
    limits = [scene.width, scene.height] * 2
    scale = np.array([columns / scene.width, rows / scene.height] * 2)
    for obj in scene.objects:
        x, y = obj.centre
        if not (0 <= x < scene.width and 0 <= y < scene.height):
            continue
        column, row = object_cell(scene, obj)
        cell = row * columns + column
        classes[cell] = (1, SHAPES.index(obj.shape), list(COLOURS).index(obj.colour),
                         PATTERNS.index(obj.pattern), obj.box == scene.mark)
        box = np.clip(np.array(obj.box), 0, limits) * scale
        centre = np.array([column + 0.5, row + 0.5] * 2)
        boxes[cell] = [*(box - centre), *box]
    return classes, boxes


def image_processor() -> Qwen2VLImageProcessorPil:
    """The tiny base's image processor: Qwen2.5-VL's, with the kit's pixel limits."""
    return Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=401408)


class VisionBatch(NamedTuple):
    """Processed images of one size. classes: (cells, 5); boxes: (cells, 8)."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    classes: torch.Tensor
    boxes: torch.Tensor

    @property
    def has_object(self) -> torch.Tensor:
        """(cells,) bool."""
        return self.classes[:, 0] == 1


def _draw_batch(rng: random.Random, processor, images: int) -> VisionBatch:
    size = rng.choice(SIZES) if rng.random() < 0.5 else SIZES[0]
    scenes = [vision_scene(rng, size) for _ in range(images)]
    classes, boxes = zip(*[detection_targets(scene) for scene in scenes])
    inputs = processor([render_scene(scene) for scene in scenes], return_tensors="pt")
    return VisionBatch(inputs["pixel_values"], inputs["image_grid_thw"],
                       torch.from_numpy(np.concatenate(classes)),
                       torch.from_numpy(np.concatenate(boxes)))


def class_loss(groups: tuple[torch.Tensor, ...], batch: VisionBatch) -> torch.Tensor:
    """Cross-entropy of "object or none" everywhere, and of the other classes where an object is.

    groups: logits (cells, size) per group of CLASS_SIZES; more are ignored.
    """
    classes, has_object = batch.classes, batch.has_object
    loss = nn.functional.cross_entropy(groups[0], classes[:, 0])
    return loss + sum(
        nn.functional.cross_entropy(groups[i][has_object], classes[has_object, i])
        for i in range(1, len(CLASS_SIZES)))


def digit_loss(groups: tuple[torch.Tensor, ...], batch: VisionBatch) -> torch.Tensor:
    """Mean cross-entropy of tens and units of the four coordinates, pixels of the resized image.

    groups: logits (cells, size) per group of `codes`.
    """
    has_object = batch.has_object
    pixels = (batch.boxes[has_object, 4:] * CELL).round().long().clamp(0, 119)
    digits = [digit for coordinate in pixels.T for digit in (coordinate // 10, coordinate % 10)]
    losses = [nn.functional.cross_entropy(logits[has_object], digit)
              for logits, digit in zip(groups[len(CLASS_SIZES):], digits, strict=True)]
    return sum(losses) / len(losses)


class _Learner(nn.Module):
    """The tower with a small detection head per merged token, and the loss of both.

    A head tells the object's class and its box, from the cell's centre and from the image's corner.
    """

    def __init__(self):
        super().__init__()
        config = tiny_config(64).vision_config
        self.tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config)
        self.tower.patch_embed.proj = PatchProduct(self.tower.patch_embed.proj)
        self.heads = nn.Linear(TINY_HIDDEN, sum(CLASS_SIZES) + BOX_SIZE)
        self.codes, self.group_sizes = codes()

    def forward(self, batch: VisionBatch, spells: bool) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(loss, features (tokens, width), figures) of a batch.

        spells: features are learned as sums of `codes`, too. Figures: box error in pixels of the
        resized image, share of correct classes, loss of a digit.
        """
        features = self.tower(batch.pixel_values, grid_thw=batch.grid_thw).pooler_output
        has_object = batch.has_object
        *groups, box = self.heads(features).split((*CLASS_SIZES, BOX_SIZE), -1)
        box_loss = nn.functional.smooth_l1_loss(box[has_object], batch.boxes[has_object], beta=0.05)
        loss = class_loss(groups, batch) + 8 * box_loss
        figures = {"box_error_px": CELL * (box - batch.boxes)[has_object].abs().mean()}
        if spells:
            spelled = nn.functional.rms_norm(features, (TINY_HIDDEN,)) @ self.codes.T
            groups = spelled.split(self.group_sizes, -1)
            figures["digit_nats"] = digit_loss(groups, batch)
            loss = loss + class_loss(groups, batch) + 4 * figures["digit_nats"]
        is_correct = [(groups[i].argmax(-1) == batch.classes[:, i])[has_object]
                      for i in range(1, len(CLASS_SIZES))]
        figures["classes"] = torch.stack(is_correct).float().mean(1)
        return loss, features, figures


def train_vision(folder: Path, steps: Sequence[int], *, batch: int = 64,
                 seed: int = 0) -> dict:
    """Train the tower on fresh scenes, unless folder/vision.safetensors is there; returns figures.

    steps: of learning to locate, with heads, then to spell: every token's features become a sum of
    `codes`.
    """
    path, figures_path = folder / "vision.safetensors", folder / "vision.json"
    if path.is_file() and figures_path.is_file():
        return json.loads(figures_path.read_text())
    torch.manual_seed(seed)
    learner, figures = _Learner(), {}
    for name, n_steps, learning_rate in zip(("locate", "spell"), steps, (2e-3, 1e-3), strict=True):
        optimizer = torch.optim.AdamW(learner.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, n_steps,
                                                       pct_start=0.05)
        processor, bar = image_processor(), progress_bar(range(n_steps), name)
        for step in bar:
            if step % RESTART == 0:
                rng = random.Random(f"vision/{seed}/{name}/{step}")
            loss, features, batch_figures = learner(
                _draw_batch(rng, processor, batch), name == "spell")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 49 or step == n_steps - 1:
                figures |= {f"{name}_{figure}": np.round(value.tolist(), 3).tolist()
                            for figure, value in batch_figures.items()}
                bar.set_postfix(figures)
    # as long as a word's embedding, so that what the language model adds to a token can show
    with torch.no_grad():
        scale = FEATURE_NORM / features.norm(dim=-1).mean()
        last_layer = learner.tower.merger.mlp[2]
        last_layer.weight *= scale
        last_layer.bias *= scale
    weights = {name: value.contiguous() for name, value in learner.tower.state_dict().items()}
    save_file(weights, path)
    write_json(figures_path, figures)
    return figures
