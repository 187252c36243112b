"""Real benchmarks through the kit: made annotation files of each format, answered rightly and wrongly."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from mig_kit import image_files
from mig_kit.boxes import BoxFormat, seen_size, to_model_box
from mig_kit.common import PROJECT_ROOT
from mig_kit.prompts import format_answer, format_question
from mig_kit.rewards import is_correct
from mig_kit.scoring import annotations, run_benchmark

VIEW = BoxFormat()
SIZES = {"a.png": (400, 200), "b.png": (150, 333), "c.png": (90, 90)}
TASKS = [
    {"task": "multi_view", "images": ["a.png", "b.png", "c.png"], "answer": [0.1, 0.2, 0.5, 0.6],
     "question": "The object marked (<|box_start|>(250,500),(500,1000)<|box_end|>). Locate this object in the 2th image. "},
    {"task": "diff", "images": ["a.png", "b.png"], "question": "Give me their difference.", "answer": [0.0, 0.0, 0.5, 0.5]},
    {"task": "group_grounding", "images": ["c.png", "b.png", "a.png"], "answer": [0.5, 0.5, 1.0, 1.0],
     "question": "Find <|object_ref_start|>a cup<|object_ref_end|>.", "additional_info": "It is in the third image."}]


@pytest.fixture
def root(tmp_path):
    for name, size in SIZES.items():
        Image.new("RGB", size, "white").save(tmp_path / name)
    for name, records in {
            "mig_bench": TASKS,
            "lisa": [{"image_path": "b.png", "instruction": "What can be eaten?", "boxes": [[15, 30, 75, 200]]}],
            "ref_l4": [{"id": 7, "caption": "a cup", "bbox": [40, 20, 200, 100], "file_name": "a.png"}],
            "mmiu": [{"task": "order", "question": "Which is first?", "context": "Two frames.", "options": "A: one B: the other",
                      "input_image_path": ["a.png", "c.png"], "output": "B"}],
            "blink": [{"idx": "val_Counting_1", "task": "Counting", "question": "How many?", "choices": ["1", "3"],
                       "answer": "(A)", "images": ["c.png"]}]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "film").mkdir()
    for place in range(5):
        Image.new("RGB", (100 + 10 * place, 80), "white").save(tmp_path / "film" / f"{place:03}.jpg")
    (tmp_path / "revos.json").write_text(json.dumps(
        [{"video_id": "film", "frames": [0, 2, 4], "question": "Who runs?", "bbox_list": [[0, 0, 9, 9]] * 2 + [[14, 8, 70, 40]]}]))
    return tmp_path


def right_reply(sample, number=None):
    """What a model that knows everything says, in its own frame."""
    if sample.options:
        return f"<think>x</think><answer>{sample.letter}</answer>"
    image, box = next(t for t in sample.targets if number in (None, t[0]))
    return f"<think>x</think><answer>{format_answer(image, to_model_box(box, sample.sizes[image - 1], VIEW))}</answer>"


@pytest.mark.parametrize("name", run_benchmark.RUNNABLE)
def test_right_replies_score_everything_under_both_protocols(root, name):
    real = run_benchmark.read_runnable(name, root / f"{name}.json", root)
    sizes = run_benchmark.image_sizes(real, root)
    samples = [s for part in run_benchmark.iter_batches(real, root, 2) for s in part]
    assert [s.sizes for s in samples] == [sizes[s.id] for s in samples]
    good = {s.id: [right_reply(s)] for s in samples}
    assert all(is_correct(good[s.id][0], s, box_format=VIEW) for s in samples), "the kit's own rule agrees"
    bad = {s.id: ["<think>x</think><answer>H</answer>"] for s in samples}
    found = run_benchmark.score_systems(real, {"sft": bad, "grpo": good}, sizes, root, VIEW, [("grpo", "sft")])
    rows = {(row["system"], row["protocol"]): row["avg"] for row in run_benchmark.results_table(found)}
    assert rows == {("sft", "official"): 0, ("sft", "strict"): 0, ("grpo", "official"): 100, ("grpo", "strict"): 100}
    metric = next(iter(found["deltas"]["grpo-sft"]["strict"]))
    assert found["deltas"]["grpo-sft"]["strict"][metric]["value"] == 100 and found["name"] == name


def test_reference_boxes_reach_the_model_in_its_own_frame(root):
    real = run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root)
    sample = run_benchmark.to_sample(real.items[0], real.name, root)
    assert sample.reference == (100, 100, 200, 200) and sample.targets[0][0] == 2
    width, height = seen_size((400, 200), VIEW)
    text = format_question(sample, VIEW)
    assert f"[{round(width / 4)},{round(height / 2)},{round(width / 2)},{height}]" in text and "box_start" not in text
    assert "object_ref" not in run_benchmark.to_sample(real.items[2], real.name, root).question


def test_the_right_box_in_the_wrong_image_passes_only_the_official_rule(root):
    real = run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root)
    sizes = run_benchmark.image_sizes(real, root)
    item = annotations.Benchmark("mig_bench", "original", real.items[2:], False)
    width, height = seen_size(SIZES["b.png"], VIEW)
    reply = f"<think>x</think><answer>{format_answer(2, (width / 2, height / 2, width, height))}</answer>"
    found = run_benchmark.score_systems(item, {"grpo": {"mig_bench/2": [reply]}}, sizes, root, VIEW, [])
    assert [row["avg"] for row in run_benchmark.results_table(found)] == [100, 0]


@pytest.mark.parametrize("form,passes", [
    ('<answer>{{"image": 2, "box": {box}}}', (1, 0)), ("<answer>In image 2: {box}</answer>", (1, 1)),
    ('<answer>{{"target_image": 2, "bbox_2d": {box}}}</answer>', (1, 1)), ('```json\n[{{"bbox_2d": {box}}}]\n```', (1, 0)),
    ("First {box}, then [1, 2, 3, 4].", (1, 0))])
def test_boxes_in_other_forms_are_converted_too(root, form, passes):
    """A base model does not keep to the form that the kit asks for; its pixels must not be read as thousandths."""
    real = run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root)
    sizes, item = run_benchmark.image_sizes(real, root), annotations.Benchmark("mig_bench", "original", real.items[:1], False)
    sample = run_benchmark.to_sample(item.items[0], "mig_bench", root)
    number, target = sample.targets[0]
    box = str([round(v) for v in to_model_box(target, sample.sizes[number - 1], VIEW)])
    found = run_benchmark.score_systems(item, {"base": {"mig_bench/0": [form.format(box=box)]}}, sizes, root, VIEW, [])
    assert [row["avg"] / 100 for row in run_benchmark.results_table(found)] == list(passes)


@pytest.mark.parametrize("name,change", [("mmiu", {"options": "one or the other"}), ("blink", {"choices": None})])
def test_multiple_choice_without_options_is_not_asked_for_a_box(root, name, change):
    record, = json.loads((root / f"{name}.json").read_text())
    (root / f"{name}.json").write_text(json.dumps([record | change]))
    with pytest.raises(ValueError, match="1 multiple-choice items .* have no 2 to 8 options"):
        run_benchmark.read_runnable(name, root / f"{name}.json", root)


def test_frames_are_no_links_out_of_the_root(root):
    (root / "film" / "000.jpg").unlink()
    (root / "film" / "000.jpg").symlink_to("/etc/hostname")
    with pytest.raises(image_files.BadImage, match="leads out of the image root"):
        annotations.resolve_image_path(root, "film#0")


@pytest.mark.parametrize("error", [RuntimeError("Missing image item"), NotImplementedError("Unknown pixel format"), MemoryError()])
def test_whatever_a_reader_of_pictures_raises_names_the_picture(root, monkeypatch, error):
    """As those of AVIF, DDS and JPEG 2000 do for broken files."""
    def broken(path):
        raise error

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(image_files.BadImage, match="'a.png' is no readable image"):
        image_files.open_rgb(root / "a.png")


def test_multiple_choice_shows_the_texts_of_the_options(root):
    for name, texts in (("mmiu", ("one", "the other")), ("blink", ("1", "3"))):
        real = run_benchmark.read_runnable(name, root / f"{name}.json", root)
        sample = run_benchmark.to_sample(real.items[0], name, root)
        assert sample.options == texts and f"A. {texts[0]} B. {texts[1]}" in format_question(sample, VIEW)


def test_what_is_missing_is_said_before_any_model_is_loaded(root):
    (root / "b.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 images are missing .*b\.png"):
        run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root)
    with pytest.raises(ValueError, match="cannot run 'mc_bench'"):
        run_benchmark.read_runnable("mc_bench", root / "mig_bench.json", root)
    (root / "bare.json").write_text(json.dumps([{"idx": "val_x_1", "task": "x", "answer": "(A)"}]))
    with pytest.raises(ValueError, match="name no images"):
        run_benchmark.read_runnable("blink", root / "bare.json", root)


def test_questions_about_the_same_images_follow_each_other_and_open_them_once(root, monkeypatch):
    records = [TASKS[0], TASKS[1], TASKS[0], TASKS[2], TASKS[1], TASKS[0]]
    (root / "mig_bench.json").write_text(json.dumps(records))
    real = run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root)
    opened, opens = [], run_benchmark.image_files.open_rgb
    monkeypatch.setattr(run_benchmark.image_files, "open_rgb", lambda path: opened.append(path.name) or opens(path))
    first, second = run_benchmark.iter_batches(real, root, 4)
    assert [s.id for s in first + second] == [f"mig_bench/{i}" for i in (0, 2, 5, 1, 4, 3)]
    assert opened == ["a.png", "b.png", "c.png", "a.png", "b.png", "c.png"], "once a batch"
    assert first[0].images[0] is first[2].images[0] is first[3].images[0]


def test_a_limit_takes_the_first_of_every_task(root):
    (root / "mig_bench.json").write_text(json.dumps([*TASKS, *TASKS]))
    real = run_benchmark.read_runnable("mig_bench", root / "mig_bench.json", root, 1)
    assert [item.task for item in real.items] == ["multi_view", "diff", "group_grounding"]


def test_names_that_leave_the_root_are_refused(root):
    (root / "lisa.json").write_text(json.dumps([{"image_path": "../x.png", "instruction": "?", "boxes": [[0, 0, 1, 1]]}]))
    with pytest.raises(ValueError, match="below the image root"):
        run_benchmark.read_runnable("lisa", root / "lisa.json", root)


def test_every_official_item_becomes_a_sample(tmp_path):
    """All of the official file's questions, over one blank picture in place of the images nobody ships."""
    file = Path(os.environ.get("MIG_KIT_DATA", PROJECT_ROOT.parent / "shared" / "data")) / "mig_bench" / "MIG_data.json"
    if not file.is_file():
        pytest.skip("no mig_bench/MIG_data.json in the folder that MIG_KIT_DATA names")
    Image.new("RGB", (560, 420)).save(tmp_path / "one.png")
    real = annotations.read_mig_bench(annotations.read_records(file))
    marked = 0
    for item in real.items[::7]:
        blank = annotations.BenchmarkItem(**{**vars(item), "images": ("one.png",) * len(item.images)})
        sample = run_benchmark.to_sample(blank, real.name, tmp_path)
        text = format_question(sample, VIEW)
        assert sample.targets and "<|" not in text and "{ref}" not in text
        marked += sample.reference is not None
    assert marked > 80
