"""Scenes of the tiny profile: coloured, patterned shapes with exact boxes, drawn from a random state alone.

A scene is data (things and a background); `draw` turns it into pixels. Boxes are xyxy in pixels of the drawn image.
Things keep to a grid of cells of about 28 px (one merged vision token of Qwen2.5-VL), at most one centre in a cell, so
that a 3x3-token image of a few million parameters' model can tell them apart.
"""

import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageChops, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")


COLOURS = {
    "red": (214, 39, 40), "green": (34, 139, 54), "blue": (31, 80, 200), "yellow": (240, 200, 20),
    "purple": (130, 50, 170), "orange": (255, 127, 14), "black": (25, 25, 25),
}


PATTERNS = ("plain", "striped")


# One pair per shape and per colour is kept out of every training split; the out-of-domain suites are made of them.
UNSEEN_PAIRS = frozenset({
    ("purple", "star"), ("green", "ring"), ("blue", "cross"), ("black", "circle"), ("orange", "square"),
    ("yellow", "triangle"), ("red", "diamond"),
})


BACKGROUNDS = ((255, 255, 255), (236, 236, 230), (225, 234, 245), (245, 232, 225), (228, 242, 228))


TEXTURES = ("checks", "lines", "grain")


# width, height in pixels; the first is the default, the last two are no multiples of 28 and get resized by the processor
SIZES = ((84, 84), (84, 112), (112, 84), (90, 80), (76, 104))


SIZE_WEIGHTS = (6, 1, 1, 1, 1)


SUPERSAMPLING = 3


def object_name(look: tuple[str, str, str]) -> str:
    """What the kit calls a (colour, shape, pattern): "red star", "striped red star"."""
    return f"{'striped ' if look[2] == 'striped' else ''}{look[0]} {look[1]}"


@dataclass(frozen=True)
class Object:
    """One shape. box: xyxy, pixels of the scene, the tight bounding box of what is drawn."""

    colour: str
    shape: str
    pattern: str
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """Its name, as `name_of` gives it."""
        return object_name((self.colour, self.shape, self.pattern))

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
    """Things on a background; `mark` is a box outlined in the picture (the reference of a question), or None."""

    width: int
    height: int
    things: tuple[Object, ...]
    background: tuple[int, int, int] = BACKGROUNDS[0]
    texture: str | None = None
    mark: tuple[float, float, float, float] | None = None

    def names(self) -> list[str]:
        """Names in reading order: by row of cells, then from left to right."""
        return [thing.name for thing in sorted(self.things, key=lambda t: (object_cell(self, t)[1], t.centre[0]))]

    def find(self, name: str) -> Object:
        """The thing of that name; KeyError if there is none."""
        for thing in self.things:
            if thing.name == name:
                return thing
        raise KeyError(name)


def grid_size(width: float, height: float) -> tuple[int, int]:
    """Columns and rows of 28 px cells, as Qwen2.5-VL's processor rounds them."""
    return max(1, round(width / 28)), max(1, round(height / 28))


def object_cell(scene: Scene, thing: Object) -> tuple[int, int]:
    """The (column, row) of the cell that holds the thing's centre."""
    columns, rows = grid_size(scene.width, scene.height)
    x, y = thing.centre
    return (min(columns - 1, max(0, int(x * columns / scene.width))),
            min(rows - 1, max(0, int(y * rows / scene.height))))


def are_separate(scene: Scene) -> bool:
    """True if no two boxes overlap or touch, no two centres share a cell, and every box is inside the picture."""
    boxes = [thing.box for thing in scene.things]
    if any(b[0] < 0 or b[1] < 0 or b[2] > scene.width or b[3] > scene.height for b in boxes):
        return False
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            if a[0] < b[2] + 1 and b[0] < a[2] + 1 and a[1] < b[3] + 1 and b[1] < a[3] + 1:
                return False
    return len({object_cell(scene, thing) for thing in scene.things}) == len(boxes)


def random_appearance(rng: random.Random, unseen: bool = False) -> tuple[str, str, str]:
    """A (colour, shape, pattern); `unseen` takes only the pairs that no training split holds, else never."""
    while True:
        colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
        if ((colour, shape) in UNSEEN_PAIRS) == unseen:
            return colour, shape, "striped" if rng.random() < 0.25 else "plain"


def random_appearances(rng: random.Random, count: int, unseen: bool = False) -> list[tuple[str, str, str]]:
    """`count` different looks."""
    looks: list[tuple[str, str, str]] = []
    while len(looks) < count:
        look = random_appearance(rng, unseen)
        if look not in looks:
            looks.append(look)
    return looks


def random_size(rng: random.Random) -> tuple[int, int]:
    """A picture size (width, height), mostly 84x84."""
    return rng.choices(SIZES, SIZE_WEIGHTS)[0]


def arrange_objects(rng: random.Random, looks, size: tuple[int, int] | None = None, textured: bool = False,
            sides: tuple[float, float] = (14, 26)) -> Scene:
    """A scene with one thing per look, each in a cell of its own. looks: (colour, shape, pattern) each."""
    width, height = size or random_size(rng)
    columns, rows = grid_size(width, height)
    background = rng.choice(BACKGROUNDS)
    texture = rng.choice(TEXTURES) if textured else None
    cell_w, cell_h = width / columns, height / rows
    while True:
        cells = rng.sample([(c, r) for c in range(columns) for r in range(rows)], len(looks))
        things = []
        for (colour, shape, pattern), (column, row) in zip(looks, cells):
            w = rng.uniform(*sides)
            h = min(max(w * rng.uniform(0.8, 1.25), sides[0]), sides[1])
            x = (column + 0.5) * cell_w + rng.uniform(-0.24, 0.24) * cell_w
            y = (row + 0.5) * cell_h + rng.uniform(-0.24, 0.24) * cell_h
            x = min(max(x, w / 2 + 1), width - w / 2 - 1)
            y = min(max(y, h / 2 + 1), height - h / 2 - 1)
            things.append(Object(colour, shape, pattern, round_box((x - w / 2, y - h / 2, x + w / 2, y + h / 2))))
        scene = Scene(width, height, tuple(things), background, texture)
        if are_separate(scene):
            return scene


def round_box(box) -> tuple[float, float, float, float]:
    """The box on whole pixels."""
    return tuple(float(round(v)) for v in box)


def change_viewpoint(rng: random.Random, scene: Scene, size: tuple[int, int] | None = None, tries: int = 40) -> Scene | None:
    """The scene from another viewpoint: scaled and shifted, everything still in the picture; None if no view fits."""
    width, height = size or (scene.width, scene.height)
    for _ in range(tries):
        scale = rng.uniform(0.8, 1.15)
        dx, dy = rng.uniform(-16, 16), rng.uniform(-16, 16)
        cx, cy = scene.width / 2, scene.height / 2
        things = tuple(
            replace(t, box=round_box(((t.box[0] - cx) * scale + width / 2 + dx, (t.box[1] - cy) * scale + height / 2 + dy,
                                    (t.box[2] - cx) * scale + width / 2 + dx, (t.box[3] - cy) * scale + height / 2 + dy)))
            for t in scene.things)
        view = replace(scene, width=width, height=height, things=things, mark=None)
        if are_separate(view) and abs(dx) + abs(dy) > 6:
            return view
    return None


def crop_scene(scene: Scene, box, size: tuple[int, int]) -> Scene:
    """What `box` (xyxy, scene pixels) shows, blown up to `size` (width, height); things cut by the edge are clipped."""
    sx, sy = size[0] / (box[2] - box[0]), size[1] / (box[3] - box[1])
    things = []
    for t in scene.things:
        moved = ((t.box[0] - box[0]) * sx, (t.box[1] - box[1]) * sy, (t.box[2] - box[0]) * sx, (t.box[3] - box[1]) * sy)
        if moved[0] < size[0] and moved[1] < size[1] and moved[2] > 0 and moved[3] > 0:
            things.append(replace(t, box=moved))
    return replace(scene, width=size[0], height=size[1], things=tuple(things), mark=None)


def _outline(shape: str) -> list[tuple[float, float]]:
    """The polygon of a shape, scaled to touch all four sides of the unit square."""
    if shape == "triangle":
        points = [(0.5, 0), (1, 1), (0, 1)]
    elif shape == "diamond":
        points = [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)]
    elif shape == "cross":
        points = [(.33, 0), (.67, 0), (.67, .33), (1, .33), (1, .67), (.67, .67), (.67, 1), (.33, 1), (.33, .67), (0, .67),
                  (0, .33), (.33, .33)]
    else:
        points = [(math.sin(math.pi * i / 5) * (1 if i % 2 == 0 else 0.42),
                   -math.cos(math.pi * i / 5) * (1 if i % 2 == 0 else 0.42)) for i in range(10)]
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    top, bottom = min(p[1] for p in points), max(p[1] for p in points)
    return [((x - left) / (right - left), (y - top) / (bottom - top)) for x, y in points]


OUTLINES = {shape: _outline(shape) for shape in ("triangle", "diamond", "cross", "star")}


def _paint(pen: ImageDraw.ImageDraw, shape: str, box, fill) -> None:
    x1, y1, x2, y2 = box
    if shape == "circle":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), fill=fill)
    elif shape == "ring":
        pen.ellipse((x1, y1, x2 - 1, y2 - 1), outline=fill, width=max(2, round(0.24 * min(x2 - x1, y2 - y1))))
    elif shape == "square":
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill=fill)
    else:
        pen.polygon([(x1 + px * (x2 - x1 - 1), y1 + py * (y2 - y1 - 1)) for px, py in OUTLINES[shape]], fill=fill)


def _texture(picture: Image.Image, scene: Scene, pen: ImageDraw.ImageDraw) -> None:
    width, height = picture.size
    dark = tuple(max(0, v - 34) for v in scene.background)
    step = 7 * SUPERSAMPLING
    if scene.texture == "checks":
        for x in range(0, width, step):
            for y in range((x // step % 2) * step, height, 2 * step):
                pen.rectangle((x, y, x + step - 1, y + step - 1), fill=dark)
    elif scene.texture == "lines":
        for x in range(-height, width, step):
            pen.line((x, height, x + height, 0), fill=dark, width=SUPERSAMPLING)
    else:
        # the seed of every published scene, from when the class was called Thing
        rng = random.Random(repr(scene.things).replace("Object(", "Thing("))
        for _ in range(width * height // 160):
            x, y = rng.randrange(width), rng.randrange(height)
            pen.rectangle((x, y, x + SUPERSAMPLING, y + SUPERSAMPLING), fill=dark)


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of scene.width x scene.height pixels."""
    s = SUPERSAMPLING
    picture = Image.new("RGB", (scene.width * s, scene.height * s), scene.background)
    pen = ImageDraw.Draw(picture)
    if scene.texture:
        _texture(picture, scene, pen)
    for thing in scene.things:
        box = tuple(v * s for v in thing.box)
        colour = COLOURS[thing.colour]
        if thing.pattern == "plain":
            _paint(pen, thing.shape, box, colour)
            continue
        mask = Image.new("L", picture.size, 0)
        _paint(ImageDraw.Draw(mask), thing.shape, box, 255)
        _paint(pen, thing.shape, box, tuple(v + round((255 - v) * 0.75) for v in colour))
        bars = Image.new("L", picture.size, 0)
        bar_pen = ImageDraw.Draw(bars)
        step = max(2 * s, round((box[2] - box[0]) / 5))
        for x in range(round(box[0]), round(box[2]), step):
            bar_pen.rectangle((x, box[1], x + step // 2 - 1, box[3]), fill=255)
        picture.paste(colour, mask=ImageChops.multiply(mask, bars))
    if scene.mark:
        x1, y1, x2, y2 = (v * s for v in scene.mark)
        pen.rectangle((x1 - 2 * s, y1 - 2 * s, x2 + 2 * s - 1, y2 + 2 * s - 1), outline=(255, 0, 255), width=s)
    return picture.reduce(s)
