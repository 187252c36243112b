"""Scenes of the tiny profile: coloured, patterned shapes with exact boxes, xyxy in pixels.

A scene is data, drawn from a random state alone; `render_scene` turns it into pixels.
"""

import math
import random
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from PIL import Image, ImageChops, ImageDraw

from mig_kit.boxes import Box

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
COLOURS = {
    "red": (214, 39, 40), "green": (34, 139, 54), "blue": (31, 80, 200), "yellow": (240, 200, 20),
    "purple": (130, 50, 170), "orange": (255, 127, 14), "black": (25, 25, 25),
}
PATTERNS = ("plain", "striped")

# One (colour, shape) pair per shape and per colour is in no training split; the task "unseen" of
# the out-of-domain suite draws from these.
UNSEEN_PAIRS = frozenset({
    ("purple", "star"), ("green", "ring"), ("blue", "cross"), ("black", "circle"),
    ("orange", "square"), ("yellow", "triangle"), ("red", "diamond"),
})
BACKGROUNDS = ((255, 255, 255), (236, 236, 230), (225, 234, 245), (245, 232, 225), (228, 242, 228))
TEXTURES = ("checks", "lines", "grain")
# Pixels: about one merged vision token of Qwen2.5-VL. No two objects share a cell, so that a model
# of a few million parameters can tell them apart in an image of 3x3 tokens.
CELL = 28

# (width, height) in pixels. The last two are no multiples of 28, so the processor resizes them.
SIZES = ((84, 84), (84, 112), (112, 84), (90, 80), (76, 104))
SIZE_WEIGHTS = (6, 1, 1, 1, 1)
SIDES = (14, 26)  # shortest and longest side of an object, pixels
SUPERSAMPLING = 3
MARK_COLOUR = (255, 0, 255)


class Appearance(NamedTuple):
    """What tells an object from another: values of COLOURS, SHAPES and PATTERNS."""

    colour: str
    shape: str
    pattern: str


def object_name(appearance: Appearance) -> str:
    """What questions and notes call an object: "red star", "striped red star"."""
    prefix = "striped " if appearance.pattern == "striped" else ""
    return f"{prefix}{appearance.colour} {appearance.shape}"


@dataclass(frozen=True)
class Object:
    """One shape; box: xyxy, pixels of the scene, tight around what is drawn."""

    colour: str
    shape: str
    pattern: str
    box: Box

    @property
    def appearance(self) -> Appearance:
        """Its colour, shape and pattern."""
        return Appearance(self.colour, self.shape, self.pattern)

    @property
    def name(self) -> str:
        """Its name, as `object_name` gives it."""
        return object_name(self.appearance)

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box (x, y), pixels."""
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    @property
    def side(self) -> float:
        """Longer side of the box, pixels."""
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """Objects on a background; width and height in pixels."""

    width: int
    height: int
    objects: tuple[Object, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]
    texture: str | None = None  # one of TEXTURES
    mark: Box | None = None  # outlined in the image: the reference of a question

    def names(self) -> list[str]:
        """Names in reading order: by row of cells, then from left to right."""
        ordered = sorted(self.objects, key=lambda obj: (object_cell(self, obj)[1], obj.centre[0]))
        return [obj.name for obj in ordered]

    def find(self, name: str) -> Object:
        """The object of that name; KeyError if there is none."""
        return {obj.name: obj for obj in self.objects}[name]


def grid_size(width: float, height: float) -> tuple[int, int]:
    """Columns and rows of 28 px cells, as Qwen2.5-VL's processor rounds them."""
    return max(1, round(width / CELL)), max(1, round(height / CELL))


def object_cell(scene: Scene, obj: Object) -> tuple[int, int]:
    """The (column, row) of the cell that holds the object's centre."""
    columns, rows = grid_size(scene.width, scene.height)
    x, y = obj.centre
    column, row = int(x * columns / scene.width), int(y * rows / scene.height)
    return min(columns - 1, max(0, column)), min(rows - 1, max(0, row))


def are_separate(scene: Scene) -> bool:
    """Whether all boxes are in the image, none overlap or touch, and no cell holds two centres."""
    boxes = [obj.box for obj in scene.objects]
    if any(x1 < 0 or y1 < 0 or x2 > scene.width or y2 > scene.height for x1, y1, x2, y2 in boxes):
        return False
    if any(a[0] < b[2] + 1 and b[0] < a[2] + 1 and a[1] < b[3] + 1 and b[1] < a[3] + 1
           for a, b in combinations(boxes, 2)):
        return False
    return len({object_cell(scene, obj) for obj in scene.objects}) == len(boxes)


def random_size(rng: random.Random) -> tuple[int, int]:
    """An image size (width, height), mostly 84x84."""
    return rng.choices(SIZES, SIZE_WEIGHTS)[0]


@dataclass(frozen=True)
class World:
    """What scenes are drawn from: seen or unseen (colour, shape) pairs, and backgrounds."""

    unseen: bool = False
    textured: bool = False
    sides: tuple[float, float] = SIDES  # shortest and longest side of an object, pixels

    def pick_appearances(self, rng: random.Random, count: int) -> list[Appearance]:
        """`count` different appearances, of UNSEEN_PAIRS only or of all other pairs only."""
        appearances: list[Appearance] = []
        while len(appearances) < count:
            pair = rng.choice(list(COLOURS)), rng.choice(SHAPES)
            if (pair in UNSEEN_PAIRS) == self.unseen:
                appearance = Appearance(*pair, "striped" if rng.random() < 0.25 else "plain")
                appearances += [appearance] * (appearance not in appearances)
        return appearances

    def arrange_scene(self, rng: random.Random, appearances: list[Appearance],
                      size: tuple[int, int] | None = None,
                      sides: tuple[float, float] | None = None) -> Scene:
        """A scene with one object per appearance, each in a cell of its own.

        size: (width, height), None for a random one; sides: of objects, None for the world's;
        pixels.
        """
        width, height = size or random_size(rng)
        columns, rows = grid_size(width, height)
        all_cells = [(column, row) for column in range(columns) for row in range(rows)]
        background = rng.choice(BACKGROUNDS)
        texture = rng.choice(TEXTURES) if self.textured else None
        while True:
            cells = rng.sample(all_cells, len(appearances))
            objects = tuple(
                Object(*appearance, _random_box(rng, cell, (width, height), sides or self.sides))
                for appearance, cell in zip(appearances, cells))
            scene = Scene(width, height, objects, background, texture)
            if are_separate(scene):
                return scene


PLAIN = World()


def _random_box(rng: random.Random, cell: tuple[int, int], size: tuple[int, int],
                sides: tuple[float, float]) -> Box:
    """A box about the middle of a cell of an image of `size`."""
    width, height = size
    columns, rows = grid_size(width, height)
    cell_width, cell_height = width / columns, height / rows
    w = rng.uniform(*sides)
    h = min(max(w * rng.uniform(0.8, 1.25), sides[0]), sides[1])
    x = (cell[0] + 0.5) * cell_width + rng.uniform(-0.24, 0.24) * cell_width
    y = (cell[1] + 0.5) * cell_height + rng.uniform(-0.24, 0.24) * cell_height
    x = min(max(x, w / 2 + 1), width - w / 2 - 1)
    y = min(max(y, h / 2 + 1), height - h / 2 - 1)
    return round_box((x - w / 2, y - h / 2, x + w / 2, y + h / 2))


def round_box(box: Box) -> Box:
    """The box on whole pixels."""
    return tuple(float(round(value)) for value in box)


def change_viewpoint(rng: random.Random, scene: Scene) -> Scene | None:
    """The scene scaled and shifted, in an image of another size; None if none of 40 tries fits."""
    width, height = random_size(rng)
    centre_x, centre_y = scene.width / 2, scene.height / 2
    for _ in range(40):
        scale = rng.uniform(0.8, 1.15)
        dx, dy = rng.uniform(-16, 16), rng.uniform(-16, 16)
        objects = []
        for obj in scene.objects:
            x1, x2 = ((x - centre_x) * scale + width / 2 + dx for x in obj.box[::2])
            y1, y2 = ((y - centre_y) * scale + height / 2 + dy for y in obj.box[1::2])
            objects.append(replace(obj, box=round_box((x1, y1, x2, y2))))
        view = replace(scene, width=width, height=height, objects=tuple(objects), mark=None)
        if are_separate(view) and abs(dx) + abs(dy) > 6:
            return view
    return None


def crop_scene(scene: Scene, box: Box, size: tuple[int, int]) -> Scene:
    """What `box` (xyxy, scene pixels) shows, resized to `size` (width, height).

    An object that the edge cuts keeps its whole box, which then reaches beyond the image.
    """
    left, top = box[:2]
    sx, sy = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    objects = []
    for obj in scene.objects:
        x1, x2 = ((x - left) * sx for x in obj.box[::2])
        y1, y2 = ((y - top) * sy for y in obj.box[1::2])
        if x1 < size[0] and y1 < size[1] and x2 > 0 and y2 > 0:
            objects.append(replace(obj, box=(x1, y1, x2, y2)))
    return replace(scene, width=size[0], height=size[1], objects=tuple(objects), mark=None)


def _star_corners() -> list[tuple[float, float]]:
    """Ten corners, in turn 1 and 0.42 from the middle, scaled to the unit square."""
    spokes = [(math.pi * i / 5, 1 if i % 2 == 0 else 0.42) for i in range(10)]
    xs = [math.sin(angle) * radius for angle, radius in spokes]
    ys = [-math.cos(angle) * radius for angle, radius in spokes]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    return [((x - min(xs)) / width, (y - min(ys)) / height) for x, y in zip(xs, ys)]


OUTLINES: dict[str, list[tuple[float, float]]] = {  # in the unit square
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "cross": [(.33, 0), (.67, 0), (.67, .33), (1, .33), (1, .67), (.67, .67),
              (.67, 1), (.33, 1), (.33, .67), (0, .67), (0, .33), (.33, .33)],
    "star": _star_corners(),
}


def _paint_shape(pen: ImageDraw.ImageDraw, shape: str, box: Box, fill) -> None:
    x1, y1, x2, y2 = box
    if shape == "circle":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
    elif shape == "ring":
        width = max(2, round(0.24 * min(x2 - x1, y2 - y1)))
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), outline=fill, width=width)
    elif shape == "square":
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
    else:
        pen.polygon([(x1 + x * (x2 - x1 - 1), y1 + y * (y2 - y1 - 1)) for x, y in OUTLINES[shape]],
                    fill=fill)


def _paint_texture(image: Image.Image, scene: Scene) -> None:
    pen = ImageDraw.Draw(image)
    width, height = image.size
    dark = tuple(max(0, value - 34) for value in scene.background)
    step = 7 * SUPERSAMPLING
    if scene.texture == "checks":
        for x in range(0, width, step):
            for y in range((x // step % 2) * step, height, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=dark)
    elif scene.texture == "lines":
        for x in range(-height, width, step):
            pen.line((x, height, x + height, 0), fill=dark, width=SUPERSAMPLING)
    else:
        # The seed says "Thing" because the published scenes were drawn with it.
        rng = random.Random(repr(scene.objects).replace("Object(", "Thing("))
        for _ in range(width * height // 160):
            x, y = rng.randrange(width), rng.randrange(height)
            pen.rectangle((x, y, x + SUPERSAMPLING, y + SUPERSAMPLING), fill=dark)


def _paint_striped(image: Image.Image, shape: str, box: Box, colour: tuple[int, int, int]) -> None:
    """The shape in a light tint, with upright bars of the full colour."""
    tint = tuple(value + round((255 - value) * 0.75) for value in colour)
    _paint_shape(ImageDraw.Draw(image), shape, box, tint)
    mask = Image.new("L", image.size, 0)
    _paint_shape(ImageDraw.Draw(mask), shape, box, 255)
    bars = Image.new("L", image.size, 0)
    bar_pen = ImageDraw.Draw(bars)
    x1, y1, x2, y2 = box
    step = max(2 * SUPERSAMPLING, round((x2 - x1) / 5))
    for x in range(round(x1), round(x2), step):
        bar_pen.rectangle((x, y1, x + step // 2 - 1, y2), fill=255)
    image.paste(colour, mask=ImageChops.multiply(mask, bars))


def render_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB image of scene.width x scene.height pixels."""
    s = SUPERSAMPLING
    image = Image.new("RGB", (scene.width * s, scene.height * s), scene.background)
    if scene.texture:
        _paint_texture(image, scene)
    for obj in scene.objects:
        box = tuple(value * s for value in obj.box)
        colour = COLOURS[obj.colour]
        if obj.pattern == "striped":
            _paint_striped(image, obj.shape, box, colour)
        else:
            _paint_shape(ImageDraw.Draw(image), obj.shape, box, colour)
    if scene.mark:
        x1, y1, x2, y2 = (value * s for value in scene.mark)
        outline = (x1 - 2 * s, y1 - 2 * s, x2 + 2 * s - 1, y2 + 2 * s - 1)
        ImageDraw.Draw(image).rectangle(outline, outline=MARK_COLOUR, width=s)
    return image.reduce(s)
