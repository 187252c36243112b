"""Boxes and the frames they live in.

A box is xyxy. The kit keeps boxes in pixels of the original image; Qwen2.5-VL sees and answers in pixels of the resized
image, and every image of a prompt is resized on its own; Qwen2-VL and Qwen3-VL answer in thousandths of an image's sides.
All conversions happen here, per target image.
"""

import math
from dataclasses import dataclass

Box = tuple[float, float, float, float]


FRAMES = {"resized": "pixels of the resized image", "thousand": "thousandths of the image's width and height"}


@dataclass(frozen=True)
class BoxFormat:
    """How a model sees images and writes boxes. min_pixels, max_pixels: area limits of the resized image.

    frame: "resized", boxes in pixels of the resized image, or "thousand", in 0..1000 of its width and height.
    """

    min_pixels: int = 3136
    max_pixels: int = 401408
    frame: str = "resized"

    def __post_init__(self):
        if self.frame not in FRAMES:
            raise ValueError(f"frame is '{self.frame}'; use resized (Qwen2.5-VL) or thousand (Qwen2-VL, Qwen3-VL)")


QWEN2_5 = BoxFormat()


def smart_resize(width: int, height: int, min_pixels: int = 3136, max_pixels: int = 401408,
                 factor: int = 28) -> tuple[int, int]:
    """Size (width, height) of the picture the model sees, both sides multiples of `factor` pixels.

    The rule of Qwen2.5-VL's image processor (patch 14 x merge 2 = 28). Raises ValueError for an aspect ratio over 200.
    """
    if min(width, height) < 1 or max(width, height) / min(width, height) > 200:
        raise ValueError(f"an image of {width}x{height} px cannot be used: the aspect ratio must be at most 200")
    w, h = (round(side / factor) * factor for side in (width, height))
    if w * h > max_pixels:
        beta = math.sqrt(width * height / max_pixels)
        w, h = (max(factor, math.floor(side / beta / factor) * factor) for side in (width, height))
    elif w * h < min_pixels:
        beta = math.sqrt(min_pixels / (width * height))
        w, h = (math.ceil(side * beta / factor) * factor for side in (width, height))
    return w, h


def rescale_box(box: Box, source: tuple[int, int], target: tuple[int, int]) -> Box:
    """The box moved from a frame of size `source` (width, height) to one of size `target`."""
    sx, sy = target[0] / source[0], target[1] / source[1]
    return box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy


def seen_size(size: tuple[int, int], box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) of the resized image that a Qwen2-VL or Qwen2.5-VL sees for an original of `size`."""
    return smart_resize(*size, box_format.min_pixels, box_format.max_pixels)


def coordinate_size(size: tuple[int, int], box_format: BoxFormat) -> tuple[int, int]:
    """(width, height) of the frame in which the model writes boxes of an original of `size`."""
    return (1000, 1000) if box_format.frame == "thousand" else seen_size(size, box_format)


def to_model_box(box: Box, size: tuple[int, int], box_format: BoxFormat = QWEN2_5) -> Box:
    """From pixels of the original image of `size` (width, height) to the frame in which the model answers."""
    return rescale_box(box, size, coordinate_size(size, box_format))


def to_original_box(box: Box, size: tuple[int, int], box_format: BoxFormat = QWEN2_5) -> Box:
    """From the frame in which the model answers to pixels of the original image of `size`."""
    return rescale_box(box, coordinate_size(size, box_format), size)


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two xyxy boxes in one frame; 0 for an inverted or empty box."""
    area_a, area_b = (max(0.0, x2 - x1) * max(0.0, y2 - y1) for x1, y1, x2, y2 in (a, b))
    if area_a == 0 or area_b == 0:
        return 0.0
    overlap = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / (area_a + area_b - overlap)
