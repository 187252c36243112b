"""Image paths stay below their root; near duplicates are found."""

import os

import pytest
from PIL import Image

from mig_kit.image_files import (
    BadImage,
    SkipReport,
    find_near_duplicates,
    open_rgb,
    perceptual_hashes,
    resolve_under_root,
)
from mig_kit.world.tasks import make_sample


@pytest.mark.parametrize("name", [
    "/etc/passwd", "../a.png", "a/../../b.png", "", ".", "a\0b", "link/x.png", "loop/x.png",
    "a\\b", "x" * 5000 + "/a", "\ud800.png"])
def test_paths_stay_below_the_root(name, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    os.symlink(tmp_path / "outside", root / "link")
    os.symlink(root / "loop", root / "loop")
    with pytest.raises(BadImage):
        path = resolve_under_root(root, name)
        open_rgb(path)


def test_near_duplicates_finds_copies_and_nothing_else():
    drawn = [make_sample("diff", "val", i).images[0].resize((320, 240)) for i in range(12)]
    noise = [Image.effect_noise((320, 240), 90).convert("RGB") for _ in range(12)]
    mixed = [Image.blend(a, b, 0.3) for a, b in zip(drawn, noise)]
    copies = [image.resize((200, 150)).resize((330, 250)) for image in mixed[:4]]
    train = perceptual_hashes((f"t{i}", image) for i, image in enumerate(mixed))
    held_out = perceptual_hashes((f"e{i}", image) for i, image in enumerate(copies))
    pairs = list(find_near_duplicates(train, held_out))
    assert {(a, b) for a, b, _ in pairs} == {(f"t{i}", f"e{i}") for i in range(4)}
    assert all(0 <= bits <= 4 for _, _, bits in pairs)


def test_a_report_names_the_first_few_of_each_reason():
    report = SkipReport(read=9, kept=1, max_names=2)
    report.add("missing image", "a\n.png")
    for number in range(3):
        report.add("unreadable image", f"{number}.png")
    assert report.summarize().splitlines() == [
        "records 9, questions kept 1, left out 4",
        "        3  unreadable image: 0.png, 1.png, ...",
        "        1  missing image: a?.png"]
