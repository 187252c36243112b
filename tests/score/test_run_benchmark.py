"""Real benchmarks through the kit: small annotation files of each format, answered."""

import json
from dataclasses import replace

import pytest
from benchmark_files import RECORDS, correct_reply, write_benchmarks
from mig_bench_records import MIG_FILE, needs_data

from mig_kit import image_files
from mig_kit.boxes import BoxFormat, seen_size, to_model_box
from mig_kit.image_files import EncodedImage, LazyImages
from mig_kit.prompts import format_question, read_reply
from mig_kit.rewards import is_correct
from mig_kit.score import annotations, benchmarks, protocols, run_benchmark
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import read_records
from mig_kit.score.result import summarize
from mig_kit.score.run_benchmark import to_sample

BOX_FORMAT = BoxFormat()


@pytest.fixture
def root(tmp_path):
    """A folder of images and annotation files."""
    write_benchmarks(tmp_path)
    return tmp_path


def read(root, name="mig_bench", places=slice(None), limit=0):
    """The benchmark and its samples, only these of its items."""
    benchmark, samples = run_benchmark.read_runnable(name, root / f"{name}.json", root, limit)
    return replace(benchmark, items=benchmark.items[places], complete=False), samples[places]


def score(benchmark, replies, root):
    """Averages of the headline metric by both protocols, in percent; boxes in pixels."""
    lines = [{"index": item.index, "response": reply}
             for item, reply in zip(benchmark.items, replies, strict=True)]
    averages = [summarize(protocols.score_predictions(
        benchmark, lines, "P", BOX_FORMAT, protocol, BOX_FORMAT.coordinates, str(root)))["avg"]
        for protocol in ("official", "strict")]
    return [round(next(iter(average.values())), 2) for average in averages]


@pytest.mark.parametrize("name", benchmarks.RUNNABLE)
def test_correct_replies_score_everything_under_both_protocols(root, name):
    benchmark, samples = read(root, name)
    options = {"mmiu": "A. one B. the other", "blink": "A. 1 B. 3"}.get(name, "")
    assert all(options in format_question(sample, BOX_FORMAT) for sample in samples)
    correct = [correct_reply(sample, BOX_FORMAT) for sample in samples]
    assert all(is_correct(read_reply(reply, sample, BOX_FORMAT), sample)
               for reply, sample in zip(correct, samples)), "the kit's own rule agrees"
    assert score(benchmark, correct, root) == [100, 100]
    wrong = ["<think>x</think><answer>H</answer>"] * len(samples)
    assert score(benchmark, wrong, root) == [0, 0]


def test_reference_boxes_reach_the_model_in_its_own_coordinates(root):
    _, samples = read(root)
    sample = samples[0]
    assert sample.reference == (100, 100, 200, 200) and sample.targets[0].image == 2
    width, height = seen_size((400, 200), BOX_FORMAT)
    text = format_question(sample, BOX_FORMAT)
    box = [round(width / 4), round(height / 2), round(width / 2), height]
    assert f"[{','.join(map(str, box))}]" in text and "box_start" not in text
    assert "object_ref" not in samples[2].question


@pytest.mark.parametrize("form,passes", [
    ('<answer>{{"image": 2, "box": {box}}}', [100, 0]),
    ('<answer>{{"target_image": 2, "bbox_2d": {box}}}</answer>', [100, 100]),
    ("First {box}, then [1, 2, 3, 4].", [100, 0])])
def test_boxes_in_other_forms_are_converted_too(root, form, passes):
    """A base model keeps to no form; its pixels must not be read as 0..1000."""
    benchmark, (sample,) = read(root, places=slice(1))
    target = sample.targets[0]
    box = to_model_box(target.box, sample.sizes[target.image - 1], BOX_FORMAT)
    reply = form.format(box=[round(value) for value in box])
    assert score(benchmark, [reply], root) == passes


@pytest.mark.parametrize("name,change,sentence", [
    ("mmiu", {"options": "one or the other"}, "1 items .* have no 2 to 8 options"),
    ("blink", {"choices": None}, "1 items .* have no 2 to 8 options"),
    ("blink", {"images": None}, "name no images"),
    ("lisa", {"image_path": "../x.png"}, "below the image root"),
    ("lisa", {"image_path": "x.png"}, r"1 of 1 images are missing .*x\.png"),
    ("lisa", {"image_path": "lisa.json"}, "cannot identify image"),
    ("lisa", {"boxes": [0, 0, 5, 5]}, "has no box of four numbers")])
def test_what_is_missing_is_said_before_any_model_is_loaded(root, name, change, sentence):
    (root / f"{name}.json").write_text(json.dumps([RECORDS[name][0] | change]))
    with pytest.raises(ValueError, match=sentence):
        read(root, name)


def test_frames_are_no_links_out_of_the_root(root):
    (root / "video" / "000.jpg").unlink()
    (root / "video" / "000.jpg").symlink_to("/etc/hostname")
    for name in ("video#0", "../../video#0"):
        with pytest.raises(image_files.BadImage, match="below the image root"):
            annotations.resolve_image_path(root, name)


def test_a_limit_is_per_task(root):
    (root / "mig_bench.json").write_text(json.dumps(RECORDS["mig_bench"] * 2))
    tasks = [sample.task for sample in read(root, limit=1)[1]]
    assert tasks == ["multi_view", "diff", "group_grounding"]


@needs_data
def test_every_official_item_becomes_a_sample():
    """Every seventh question, over one blank image in place of those nobody ships."""
    image = EncodedImage(b"", (560, 420))
    with_reference = 0
    for item in read_benchmark("mig_bench", read_records(MIG_FILE)).items[::7]:
        sample = to_sample(item, "mig_bench", LazyImages((image,) * len(item.images)))
        text = format_question(sample, BOX_FORMAT)
        assert sample.targets and "<|" not in text and "{ref}" not in text
        with_reference += sample.reference is not None
    assert with_reference > 80
