"""Images that annotations name by path: read safely, stored once under their SHA-256.

A path in an annotation file is not trusted: with all links resolved it must lie under the root. All
sizes and pixels are those of the upright picture, turned as its EXIF orientation says.
"""

import base64
import hashlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import ExifTags, Image, ImageOps

from mig_kit.common import UserError

IMAGE_FOLDER = "images"  # of stored images, in a stage's folder
IMAGE_MANIFEST = "images.txt"  # lists them
MAX_PIXELS = 2**26  # of an image, some 67 million: decoded and copied it takes 400 MB
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # refused by MAX_PIXELS
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_ASPECT_RATIO = 200
CUT = "is cut or broken; copy it again"
ORIENTATION = ExifTags.Base.Orientation
SWAPS_SIDES = (5, 6, 7, 8)  # of the orientations 1 to 8; 1 is upright
is_regular_file = os.path.isfile  # False for a name that no file system takes
DECODE_ERRORS = (OSError, ValueError, SyntaxError)  # of Pillow's readers of these formats


class BadImage(UserError):
    """An image that cannot be used; reason: a few words, such as "missing image"."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason = reason


class ImageHeader(NamedTuple):
    """(width, height) in pixels of the upright picture, and of the stored one."""

    size: tuple[int, int]
    stored_size: tuple[int, int]


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


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 also for EXIF data that are broken."""
    try:
        # a PNG's own method would decode it, in search of EXIF data after the pixels
        value = Image.Image.getexif(image).get(ORIENTATION)
    except Exception:  # Pillow's reader of TIFF tags raises anything
        return 1
    return value if type(value) is int and 1 <= value <= 8 else 1


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright picture, pixels, as `read_header`."""
    return read_header(path).size


def read_header(path: Path) -> ImageHeader:
    """The image's sizes, from the header alone; BadImage if it is unusable."""
    if not is_regular_file(path):
        raise BadImage("missing image", f"{path.name!r} is not there; copy it below the image "
                                        "root, or correct its path")
    with _name_fault(path, "is no readable image: give a PNG or JPEG file"), \
            Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        orientation, is_deep = read_orientation(image), image.mode[0] in "IF"
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise BadImage("image too large", f"{path.name!r} has {width}x{height} pixels; Qwen2.5-VL "
                       f"takes sides up to {MAX_ASPECT_RATIO} to 1, and the kit {MAX_PIXELS:,} "
                       "pixels; crop or shrink it")
    if is_deep:  # more bits would be cut, not scaled
        raise BadImage("deep image", f"{path.name!r} is grey of more than 8 bits a pixel; scale it "
                                     "to 8 and save it as PNG or JPEG")
    upright = (height, width) if orientation in SWAPS_SIDES else (width, height)
    return ImageHeader(upright, (width, height))


def open_rgb(path: Path) -> Image.Image:
    """The upright picture, decoded, RGB; raises as `read_header`."""
    read_header(path)
    with _name_fault(path, CUT), Image.open(path, formats=FORMATS) as image:
        return _decode_upright(image)


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file; BadImage if the system refuses them."""
    with _name_fault(path, CUT):
        return path.read_bytes()


def check_decodes(content: bytes, path: Path) -> None:
    """BadImage unless all pixels of an image file's bytes can be read. path: of the file."""
    with _name_fault(path, CUT), Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()


@contextmanager
def _name_fault(path: Path, broken: str) -> Iterator[None]:
    """Turns what reading raises into BadImage; errors of the system have a number."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise BadImage("image too large", f"{path.name!r} is too large, over {MAX_PIXELS:,} "
                                          "pixels; crop or shrink it") from error
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno:
            raise BadImage("closed file", f"{path.name!r} cannot be read: {error.strerror}; the "
                                          "image may be good: mend its rights, the disk or the "
                                          "limit, and start again") from error
        raise BadImage("unreadable image", f"{path.name!r} {broken}") from error


def _decode_upright(image: Image.Image) -> Image.Image:
    orientation = read_orientation(image)
    if image.has_transparency_data:  # on white, as transformers and viewers show it
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    picture = image.convert("RGB")
    picture.info = {}  # other EXIF data may be broken, and a later reader would turn it again
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
        with Image.open(io.BytesIO(self.read_bytes()), formats=FORMATS) as image:
            return _decode_upright(image)

    def read_bytes(self) -> bytes:
        """The bytes of the image's file; BadImage for a stored one that is missing or changed."""
        if isinstance(self.content, bytes):
            return self.content
        again = "run 01_synthesize again with --force"
        try:
            content = self.content.read_bytes()
        except FileNotFoundError as error:
            raise BadImage("missing image", f"{self.content} is missing; {again}") from error
        if self.sha256 and hashlib.sha256(content).hexdigest() != self.sha256:
            raise BadImage("changed image", f"{self.content} is not the image that was stored: its "
                                            f"bytes have another SHA-256; {again}")
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
        size = read_size(path)
        content = read_image_file(path)
        sha256 = hashlib.sha256(content).hexdigest()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            target = self.folder / f"{sha256}.{image.format.lower()}"
        is_stored = target.is_file() and (
            target.samefile(path) or hashlib.sha256(target.read_bytes()).hexdigest() == sha256)
        if not is_stored:
            check_decodes(content, path)
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
