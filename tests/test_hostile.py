"""Input made to harm: each is refused with one sentence, in bounded memory, and nothing in it is run."""

import ast
import json
import pickle
import shutil
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from PIL import Image

import mig_kit
from mig_kit.boxes import BoxFormat
from mig_kit.data import own_data
from mig_kit.engine import models
from mig_kit.image_files import BadImage, open_rgb
from mig_kit.scoring import annotations


def png(path, width, height):
    """A well-formed PNG of a few hundred bytes that claims width x height pixels, all of them black."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    packer, rows = zlib.compressobj(9), []
    for _ in range(min(height, 4096)):
        rows.append(packer.compress(bytes(1 + width // 8)))
    data = b"".join(rows) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
                     + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width,height", [(60_000, 60_000), (20_000, 20_000), (2**31 - 1, 1), (10_001, 10_000)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, width, height):
    bomb = png(tmp_path / "a.png", width, min(height, 2**31 - 1))
    tracemalloc.start()
    with pytest.raises(BadImage):
        open_rgb(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    row = {"images": ["a.png"], "question": "Find it.", "image": 1, "box": [1, 2, 3, 4], "unit": "pixels"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert list(own_data.check_file(tmp_path / "a.jsonl", tmp_path))[0][1]


def test_an_image_is_what_its_bytes_say_and_not_its_name(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.gif")
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").size == (40, 30)
    for content in (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"\x7fELF", b"",
                    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(BadImage):
            open_rgb(tmp_path / "b.png")


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_code_and_pickles_in_a_model_folder_are_not_run(tmp_path, random_folder, float32):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(random_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {
        "AutoConfig": "harm.Config", "AutoModelForImageTextToText": "harm.Model", "AutoTokenizer": ["harm.T", "harm.T"]}}))
    (folder / "harm.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\nclass T: pass\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(ran)))
    models.load_model(folder, float32)
    models.load_processor(folder, box_format=BoxFormat())
    assert not ran.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="only safetensors"):
        models.load_model(folder, float32)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Harm(ran)))
    with pytest.raises(Exception, match="(?i)header|safetensor"):
        models.load_model(folder, float32)
    assert not ran.exists()


def test_the_kit_unpacks_no_archive_and_unpickles_nothing():
    """So there is no zip slip: who downloads a data set unpacks it; and no call trusts a model's own code."""
    for path in Path(mig_kit.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(
                node, ast.ImportFrom) else []
            assert not {"pickle", "zipfile", "tarfile", "joblib", "dill"} & {(n or "").split(".")[0] for n in names}, path
            assert not (isinstance(node, ast.Name) and node.id in ("eval", "exec")), path
            assert not (isinstance(node, ast.Attribute) and node.attr == "unpack_archive"), path
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
                        and getattr(node.value, "value", True)), path


def test_a_predictions_line_of_a_hundred_megabytes_takes_bounded_memory(tmp_path):
    path = tmp_path / "P.jsonl"
    with path.open("wb") as file:
        file.write(b'{"index": 0, "response": "a"}\n{"index": 1, "response": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 2 of .*P.jsonl is longer than"):
        annotations.read_records(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
