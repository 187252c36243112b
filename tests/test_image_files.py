"""Image paths stay below their root; broken, turned and deep images."""

import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from mig_kit import image_files
from mig_kit.image_files import BadImage, EncodedImage, open_rgb, read_size


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../a.png", "a/../../b.png", "", ".", "a\0b", "link/x.png",
    "a\\b", "\ud800.png"])
def test_paths_stay_below_the_root(name, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", root / "link")
    with pytest.raises(BadImage) as error:
        image_files.resolve_under_root(root, name)
    assert error.value.reason == "outside root"


def test_a_size_is_read_from_the_header_and_what_is_no_image_is_refused(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[:45])  # the header alone
    assert read_size(tmp_path / "a.png") == read_size(tmp_path / "cut.png") == (30, 20)
    with pytest.raises(BadImage, match="^'cut.png': "):
        open_rgb(tmp_path / "cut.png")
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (801, 4)).save(tmp_path / "long.png")
    for name, reason in (("text.png", "unreadable image"), ("long.png", "image too large"),
                         ("none.png", "missing image")):
        with pytest.raises(BadImage) as error:
            read_size(tmp_path / name)
        assert error.value.reason == reason
    assert [image_files.is_regular_file(path) for path in (tmp_path / "a.png", tmp_path)] == [
        True, False]


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_exif_data_say(tmp_path, orientation, suffix):
    """As Pillow's exif_transpose, from the header alone, and only once."""
    exif, path = Image.Exif(), tmp_path / f"a.{suffix}"
    exif[0x0112] = orientation
    Image.effect_noise((40, 30), 80).save(path, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    opened = open_rgb(path)
    assert read_size(path) == opened.size == expected.size
    assert np.array_equal(np.array(opened), np.array(expected))
    again = ImageOps.exif_transpose(opened)
    assert again.size == opened.size, "a later reader does not turn it once more"
    stored = EncodedImage(path.read_bytes(), expected.size).open()
    assert np.array_equal(np.array(stored), np.array(expected))


def test_an_image_of_more_than_eight_bits_or_of_a_rare_format_is_refused(tmp_path):
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    deep.save(tmp_path / "a.png")
    Image.new("L", (40, 30)).save(tmp_path / "a.tiff")
    for read in (open_rgb, read_size):
        with pytest.raises(BadImage, match="scale it to 8"):
            read(tmp_path / "a.png")
        with pytest.raises(BadImage, match="cannot identify image file"):
            read(tmp_path / "a.tiff")
        Image.new("L", (40, 30)).save(tmp_path / "a.webp", exif=b"Exif\0\0garbage")
        with pytest.raises(BadImage, match="'a.webp': not a TIFF file"):
            read(tmp_path / "a.webp")


@pytest.mark.parametrize("mode, black, clear", [
    ("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), ("LA", (0, 255), (0, 0))])
def test_what_is_transparent_is_white(tmp_path, mode, black, clear):
    picture = Image.new(mode, (40, 30), clear)
    picture.paste(black, (0, 0, 20, 30))
    picture.save(tmp_path / "a.png")
    opened = open_rgb(tmp_path / "a.png")
    assert opened.mode == "RGB"
    assert (opened.getpixel((5, 5)), opened.getpixel((35, 5))) == ((0, 0, 0), (255, 255, 255))
