"""Images that annotations name by path: read safely, stored once under their SHA-256.

A path in an annotation file is not trusted: with all links resolved it must lie under the root. All
sizes and pixels are those of the upright picture, turned as its EXIF orientation says.
"""

import base64
import hashlib
import io
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image, ImageOps

from mig_kit.common import UserError

IMAGE_FOLDER = "images"  # of stored images, in a stage's folder
IMAGE_MANIFEST = "images.txt"  # lists them
MAX_PIXELS = 2**26  # of an image, some 67 million: decoded and copied it takes 400 MB
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_ASPECT_RATIO = 200
AGAIN = "run 01_synthesize again with --force"
ORIENTATION = ExifTags.Base.Orientation
SWAPS_SIDES = (5, 6, 7, 8)  # of the orientations 1 to 8; 1 is upright
is_regular_file = os.path.isfile  # False for a name that no file system takes


class BadImage(UserError):
    """An image that cannot be used; reason: a few words, such as "missing image"."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


def resolve_under_root(root: Path, name: str) -> Path:
    """The path of `name` under `root`, existing or not; BadImage if it is, or leads, elsewhere."""
    name = name.removeprefix("file://")
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "\\" in name or ".." in parts:
        raise BadImage("outside root", f"{name!r} is no path below the image root; write it "
                                       "relative to the root, with / and without '..'")
    base = root.resolve()
    try:
        path = Path(os.path.realpath(root / name))
    except (OSError, ValueError):  # a name that no file system takes
        path = base
    if not path.is_relative_to(base) or path == base:
        raise BadImage("outside root", f"{name!r} is not below the image root {root}; copy it "
                                       "there, or give the folder that holds all images as root")
    return path


@contextmanager
def _open_image(path: Path, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image of a usable size, from a file or from its bytes; BadImage with Pillow's words."""
    if content is None and not is_regular_file(path):
        raise BadImage("missing image", f"{str(path)!r} is not there; copy it below the image "
                                        "root, or correct its path")
    try:
        source = path if content is None else io.BytesIO(content)
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS or max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise Image.DecompressionBombError(f"{width}x{height}")
            if image.mode[0] in "IF":  # of which Pillow would cut the upper bits
                raise BadImage("deep image", f"{path.name!r} has more than 8 bits a pixel; scale "
                                             "it to 8")
            yield image
    except Image.DecompressionBombError as error:
        raise BadImage("image too large", f"{path.name!r}: {error}; the kit takes sides up to "
                       f"{MAX_ASPECT_RATIO} to 1 and {MAX_PIXELS:,} pixels; crop or shrink it"
                       ) from error
    except (OSError, ValueError, SyntaxError, struct.error) as error:
        if isinstance(error, BadImage) or getattr(error, "errno", None):  # the system's
            raise
        raise BadImage("unreadable image", f"{path.name!r}: {error}") from error


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, pixels, from the header; BadImage if unusable."""
    with _open_image(path) as image:
        # a PNG's own method would decode it, in search of EXIF data after the pixels
        is_turned = Image.Image.getexif(image).get(ORIENTATION) in SWAPS_SIDES
        return image.size[::-1] if is_turned else image.size


def open_rgb(path: Path, content: bytes | None = None) -> Image.Image:
    """The upright picture, RGB, of a file or its bytes; what is transparent is white. BadImage if
    it is unusable.
    """
    with _open_image(path, content) as image:
        orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
        if image.has_transparency_data:  # as transformers and viewers show it
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        picture = image.convert("RGB")
        picture.info = {}  # a later reader would turn it again
        picture.getexif()[ORIENTATION] = orientation
        ImageOps.exif_transpose(picture, in_place=True)
        return picture


def encode_image(image: Image.Image, form: str = "PNG", **options) -> bytes:
    """The bytes of an image file; form, options: as of Pillow's save."""
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def to_data_url(image: Image.Image, form: str = "PNG", **options) -> str:
    """The file of `encode_image` as an address that pages and OpenAI's messages take."""
    data = base64.b64encode(encode_image(image, form, **options)).decode()
    return f"data:image/{form.lower()};base64,{data}"


@dataclass(frozen=True)
class EncodedImage:
    """An image that is decoded when it is opened."""

    content: bytes | Path  # of a PNG or JPEG file
    size: tuple[int, int]  # (width, height) of the upright picture, pixels
    sha256: str = ""  # of a stored file, whose bytes must not have changed

    def open(self) -> Image.Image:
        """The upright picture as RGB; BadImage for a missing, broken or changed file."""
        if isinstance(self.content, Path) and not self.sha256:
            return open_rgb(self.content)
        path = self.content if isinstance(self.content, Path) else Path("an image of a table")
        return open_rgb(path, self.read_bytes())

    def read_bytes(self) -> bytes:
        """The bytes of the image's file; BadImage for a stored one that is missing or changed."""
        if isinstance(self.content, bytes):
            return self.content
        if not self.content.is_file():
            raise BadImage("missing image", f"{self.content} is missing; {AGAIN}")
        content = self.content.read_bytes()
        if self.sha256 and hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadImage("changed image", f"{self.content} is not the image that was stored: its "
                                            f"bytes have another SHA-256; {AGAIN}")
        return content

    def digest(self) -> bytes:
        """SHA-256 of the image's file."""
        if self.sha256:
            return bytes.fromhex(self.sha256)
        return hashlib.sha256(self.read_bytes()).digest()


@dataclass(frozen=True)
class LazyImages(Sequence):
    """The images of a sample, each decoded when it is looked at and not kept."""

    encoded: tuple[EncodedImage, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return LazyImages(self.encoded[index])
        return self.encoded[index].open()

    def __iter__(self) -> Iterator[Image.Image]:  # Sequence's own ends at any IndexError
        return (image.open() for image in self.encoded)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every image, pixels; decodes nothing."""
        return [image.size for image in self.encoded]


def image_digests(images: Sequence[Image.Image]) -> tuple[bytes, ...]:
    """A digest of each image, by which equal images are recognised; encoded ones stay encoded."""
    if isinstance(images, LazyImages):
        return tuple(image.digest() for image in images.encoded)
    return tuple(pixel_digest(image) for image in images)


def pixel_digest(image: Image.Image) -> bytes:
    """A hash of the image's size and colours, which its palette and transparency decide, too."""
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    image = image.convert("RGBA" if has_alpha else "RGB")
    key = f"{image.mode} {image.size}".encode()
    return hashlib.blake2b(image.tobytes(), digest_size=16, key=key).digest()


class ImageStore:
    """A folder of image files as they are, each once, named by its SHA-256."""

    def __init__(self, folder: Path):
        self.folder = folder
        # by the path that it came from: a file's name here and (width, height)
        self.stored: dict[str, tuple[str, tuple[int, int]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, path: Path) -> EncodedImage:
        """Store a file once, as a hard link if possible; BadImage unless it decodes."""
        if str(path) not in self.stored:
            self.stored[str(path)] = self._store(path)
        name, size = self.stored[str(path)]
        return EncodedImage(self.folder / name, size, Path(name).stem)

    def manifest(self) -> str:
        """The names of the files, one a line."""
        return "".join(f"{name}\n" for name in sorted({name for name, _ in self.stored.values()}))

    def _store(self, path: Path) -> tuple[str, tuple[int, int]]:
        size, content = read_size(path), path.read_bytes()
        sha256 = hashlib.sha256(content).hexdigest()
        with _open_image(path, content) as image:
            target = self.folder / f"{sha256}.{image.format.lower()}"
            is_stored = target.is_file() and (
                target.samefile(path) or hashlib.sha256(target.read_bytes()).hexdigest() == sha256)
            if not is_stored:
                image.load()
                link_or_copy(path, target)
        return target.name, size


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where links are refused; never half."""
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    temporary.replace(target)
