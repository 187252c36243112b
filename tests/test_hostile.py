"""Input made to harm is refused in bounded memory, and nothing in it is run."""

import json
import pickle
import shutil
import struct
import tracemalloc
import zlib
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.data import own_data
from mig_kit.image_files import BadImage, open_rgb
from mig_kit.models import loading


def write_png(path, width, height):
    """A well-formed PNG of a few hundred bytes that claims width x height pixels, all black."""
    def chunk(kind, data):
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    compressor = zlib.compressobj(9)
    row = bytes(1 + width // 8)
    rows = b"".join(compressor.compress(row) for _ in range(min(height, 4096)))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                     + chunk(b"IDAT", rows + compressor.flush()) + chunk(b"IEND", b""))
    return path


@contextmanager
def memory_below(mebibytes: int):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < mebibytes << 20
    finally:
        tracemalloc.stop()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width,height", [
    (60_000, 60_000), (20_000, 20_000), (2**31 - 1, 1), (14_000, 7_000), (8_193, 8_192)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, width, height):
    bomb = write_png(tmp_path / "a.png", width, height)
    with memory_below(4), pytest.raises(BadImage, match="67,108,864 pixels; crop or shrink it"):
        open_rgb(bomb)
    row = {"images": ["a.png"], "question": "Find it.", "image": 1, "box": [1, 2, 3, 4],
           "coordinates": "pixels"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (line,) = own_data.iter_checked_lines(tmp_path / "a.jsonl", tmp_path, True)
    assert line.problems, "the image is named as a problem"


def test_an_image_is_what_its_bytes_say_and_not_its_name(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").size == (40, 30)
    for content in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"\x7fELF", b"",
                    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(BadImage):
            open_rgb(tmp_path / "b.png")


class Harm:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_and_pickles_in_a_model_folder_are_not_run(tmp_path, random_folder, float32):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    shutil.copytree(random_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    own_classes = {"AutoConfig": "harm.Config", "AutoModelForImageTextToText": "harm.Model",
                   "AutoTokenizer": ["harm.T", "harm.T"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own_classes}))
    (folder / "harm.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\n"
                                    "class Model: pass\nclass T: pass\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(marker)))
    loading.load_model(folder, float32)
    loading.load_processor(folder, BoxFormat())
    assert not marker.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has neither model.safetensors"):
        loading.load_model(folder, float32)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harm(marker)))
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        loading.load_model(folder, float32)
    assert not marker.exists()
