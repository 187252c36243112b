"""Boxes (xyxy), and the coordinates that their numbers are in; all conversions happen here.

The kit keeps boxes in pixels of the original image. A model sees every image resized on its own:
Qwen2.5-VL answers in pixels of that resized image, Qwen2-VL and Qwen3-VL in 0 to 1000.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from mig_kit.common import UserError

Box = tuple[float, float, float, float]


class Coordinates(StrEnum):
    """What the four numbers of a box are measured in."""

    ABSOLUTE = "absolute"
    NORMALIZED_1000 = "normalized_1000"
    NORMALIZED_1 = "normalized_1"
    PIXELS = "pixels"

    @property
    def description(self) -> str:
        """A phrase for messages and data cards."""
        return DESCRIPTIONS[self]


DESCRIPTIONS = {
    Coordinates.ABSOLUTE: "pixels of the resized image that the model sees",
    Coordinates.NORMALIZED_1000: "0 to 1000 of the image's width and height",
    Coordinates.NORMALIZED_1: "0 to 1 of the image's width and height",
    Coordinates.PIXELS: "pixels of the original image",
}
PROMPT = "{question} {instruction}"
MODEL_COORDINATES = (Coordinates.ABSOLUTE, Coordinates.NORMALIZED_1000)


@dataclass(frozen=True)
class BoxFormat:
    """How a model sees images, is asked, and writes boxes.

    Args:
        min_pixels, max_pixels: limits of the resized image's area.
        coordinates: absolute (Qwen2.5-VL) or normalized_1000 (Qwen2-VL, Qwen3-VL).
        prompt: a question's text, with {question} and, if wanted, {instruction} in it.
    Raises: ValueError for other coordinates and for limits that no image can meet.
    """

    min_pixels: int = 3136
    max_pixels: int = 401408
    coordinates: Coordinates = Coordinates.ABSOLUTE
    prompt: str = PROMPT

    @classmethod
    def of(cls, params: Mapping) -> "BoxFormat":
        """That of a run's parameters."""
        return cls(params["min_pixels"], params["max_pixels"], params["coordinates"],
                   params["prompt"])

    def __post_init__(self):
        if self.coordinates not in MODEL_COORDINATES:
            raise UserError(f"coordinates is '{self.coordinates}'; use absolute (Qwen2.5-VL) or "
                            "normalized_1000 (Qwen2-VL, Qwen3-VL)")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise UserError(f"min_pixels is {self.min_pixels} and max_pixels {self.max_pixels}; "
                            "give two areas, the lower one first")
        object.__setattr__(self, "coordinates", Coordinates(self.coordinates))

    @property
    def description(self) -> str:
        """A phrase for messages."""
        prompt = f", the prompt {self.prompt!r}" * (self.prompt != PROMPT)
        return (f"images of {self.min_pixels} to {self.max_pixels} pixels and {self.coordinates} "
                f"boxes{prompt}")


def smart_resize(width: int, height: int, min_pixels: int = 3136, max_pixels: int = 401408,
                 factor: int = 28) -> tuple[int, int]:
    """(width, height) at which the model sees an image, as Qwen-VL's image processors compute it.

    Nothing is resized here; the model's processor does it (`models.processors.load_processor`).

    Args:
        factor: both sides are multiples of it: 28 pixels, and 32 for Qwen3-VL (patch x merge).
    Raises: ValueError for an aspect ratio over 200.
    """
    if min(width, height) < 1 or max(width, height) / min(width, height) > 200:
        raise UserError(f"an image of {width}x{height} px cannot be used: the aspect ratio must "
                        "be at most 200")
    w, h = (round(side / factor) * factor for side in (width, height))
    if w * h > max_pixels:
        beta = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(side / beta / factor) * factor) for side in (width, height))
    elif w * h < min_pixels:
        beta = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * beta / factor) * factor for side in (width, height))
    return w, h


def seen_size(size: tuple[int, int], box_format: BoxFormat, factor: int = 28) -> tuple[int, int]:
    """(width, height) at which the model sees an image of `size`; factor as in `smart_resize`."""
    return smart_resize(*size, box_format.min_pixels, box_format.max_pixels, factor)


def coordinate_size(size: tuple[int, int], coordinates: Coordinates,
                    box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) that the whole image of `size` has in these coordinates."""
    if coordinates == Coordinates.ABSOLUTE:
        return seen_size(size, box_format)
    fixed = {Coordinates.NORMALIZED_1000: (1000, 1000), Coordinates.NORMALIZED_1: (1, 1)}
    return fixed.get(coordinates, size)


def rescale_box(box: Box, source: tuple[int, int], target: tuple[int, int]) -> Box:
    """Convert a box from an image of size `source` (width, height) to that image at size `target`.
    """
    sx, sy = target[0] / source[0], target[1] / source[1]
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def to_model_box(box: Box, size: tuple[int, int], box_format: BoxFormat) -> Box:
    """Convert a box from pixels of the original, of `size`, to the model's coordinates."""
    return rescale_box(box, size, coordinate_size(size, box_format.coordinates, box_format))


def to_original_box(box: Box, size: tuple[int, int], box_format: BoxFormat) -> Box:
    """Convert a box from the model's coordinates to pixels of the original, of `size`."""
    return rescale_box(box, coordinate_size(size, box_format.coordinates, box_format), size)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of boxes in the same coordinates; 0 if one is inverted or empty."""
    area_a, area_b = (max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (a, b))
    if area_a == 0 or area_b == 0:
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    overlap = width * height
    return overlap / (area_a + area_b - overlap)
