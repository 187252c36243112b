"""Rows of a data set as TRL takes them, whose images are decoded once and prepared by the kit."""

from copy import deepcopy

from datasets import Dataset, Image
from trl.data_utils import is_conversational, prepare_multimodal_messages

IMAGE_COLUMNS = ("images", "image")
IMAGES = "images of the row"  # column that takes a row's images past TRL's processor


class RowsOnce:
    """A data set that decodes a row once; TRL asks again for those that it learns from."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.rows = dataset, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """The rows at `indices`; equal ones share their images and nothing else."""
        self.rows = {index: self.rows[index] if index in self.rows else self.dataset[index]
                     for index in set(indices)}
        return [{name: value if name in IMAGE_COLUMNS else deepcopy(value)
                 for name, value in self.rows[index].items()} for index in indices]


def move_images(row: dict) -> dict:
    """A row whose prompt holds its images, and whose column of images is IMAGES: TRL would hand
    the images of the columns that it knows to the processor, once for every completion.
    """
    columns = {name: row[name] for name in IMAGE_COLUMNS if name in row}
    if not columns or not is_conversational(row):  # TRL refuses images beside a text
        return row
    others = {name: value for name, value in row.items() if name not in columns}
    prompt = prepare_multimodal_messages(row["prompt"], images=list_images(row))
    return others | {"prompt": prompt, IMAGES: columns}


def restore_images(row: dict) -> dict:
    """A row of `move_images` with its columns of images, as rewards take them."""
    return {name: value for name, value in row.items() if name != IMAGES} | row.get(IMAGES, {})


def list_images(row: dict) -> list:
    """The images of a row as TRL reads them. Encoded ones, which it refuses, are decoded."""
    images = row["images"] if "images" in row else [row.get("image")]
    return [] if images is None else [_decode(image) for image in images if image is not None]


def _decode(image):
    """An image, decoded if it is a file's bytes or what `datasets.Image(decode=False)` gives."""
    if isinstance(image, bytes):
        image = {"path": None, "bytes": image}
    return Image().decode_example(image) if isinstance(image, dict) else image


def merge_image_tokens(ids: list[int], token: int) -> list[int]:
    """The ids with one image token, `token`, in the place of each run of it."""
    return [value for place, value in enumerate(ids)
            if value != token or not place or ids[place - 1] != token]
