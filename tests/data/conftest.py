"""The images that most tests of data ask about."""

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with white and noisy images, a broken one, and one below sub/."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sub").mkdir()
    Image.new("RGB", (100, 50), "white").save(folder / "a.png")
    noise = Image.effect_noise((200, 100), 80)
    for name in ("b.png", "sub/c d.jpg"):
        noise.save(folder / name)
    Image.new("RGB", (900, 3)).save(folder / "long.png")
    (folder / "broken.png").write_bytes(b"no image")
    return folder
