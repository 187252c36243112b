"""What users bring: folders laid out as the families are published, and photos over the limits.

From the processor to the `ground` command the model must see every image at the size that the kit
computes boxes for, and a box written in the model's coordinates must come back as it was.
"""

import json
import math
import re
import shutil

import pytest
import torch
from command_line import run_mig_kit
from PIL import Image
from published import format_of, save_model

from mig_kit import rewards
from mig_kit.boxes import BoxFormat, Coordinates, iou, seen_size
from mig_kit.evaluation import items
from mig_kit.models import loading, processors, sample_prompts
from mig_kit.prompts import read_reply
from mig_kit.sample import Sample, Target
from mig_kit.serving import reply_files
from mig_kit.stages import grpo

SIZES = [(1024, 768), (3000, 2000), (200, 150)]
BOXES = [(120.0, 96.0, 700.0, 560.0), (300.0, 500.0, 2100.0, 1900.0), (20.0, 30.0, 150.0, 140.0)]
FAMILIES = sorted(loading.FAMILIES)
FACTORS = dict.fromkeys(FAMILIES, 32) | {"qwen2_5_vl": 28, "qwen2_vl": 28}
# by hand: limits 3,136 and 401,408 px, sides multiples of 28 or of 32
SEEN = {28: [(728, 532), (756, 504), (196, 140)], 32: [(704, 544), (768, 512), (192, 160)]}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def policy(published, family, float32):
    return loading.load_policy(published[family], float32, format_of(family))


@pytest.fixture(scope="module")
def photos():
    return [Image.effect_noise(size, 60).convert("RGB") for size in SIZES]


@pytest.fixture(scope="module")
def photo_files(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate(photos):
        photo.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(photos))]


@pytest.fixture
def sample(photos):
    target = Target(1, BOXES[0])
    return Sample("photos", "", "", "", tuple(photos), "Where is it?", targets=(target,))


def sizes_of(grids: torch.Tensor, family: str) -> list[tuple[int, int]]:
    """(width, height) in pixels of the images with these grids of patches."""
    patch = FACTORS[family] // 2
    return [(columns * patch, rows * patch) for _, rows, columns in grids.tolist()]


def reply_with(box, size, seen, family: str, image: int) -> str:
    """The reply of a model that sees an image of `size` at `seen` and knows the box."""
    width, height = seen if family == "qwen2_5_vl" else (1000, 1000)
    scaled = [round(value * side / original)
              for value, side, original in zip(box, (width, height) * 2, size * 2, strict=True)]
    answer = json.dumps({"image": image, "box": scaled})
    return f"<think>It is there.</think><answer>{answer}</answer>"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_vl"])
def test_stock_trl_sees_that_size(policy, family, sample, tmp_path, stage_params):
    """Its batches are not checked, as those of the shared prefixes are."""
    params = stage_params(
        "05_grpo", share_prefix=False, lora_r=4, num_generations=4,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=1,
        max_completion_length=4)
    grids = []
    policy.model.model.visual.register_forward_pre_hook(
        lambda module, args, kwargs: grids.append(kwargs["grid_thw"]), with_kwargs=True)
    grpo.grpo_trainer(policy, [sample], tmp_path, params).train()
    assert set(sizes_of(torch.cat(grids), family)) == set(SEEN[FACTORS[family]])


def test_images_are_shown_at_the_size_that_boxes_are_computed_for_and_a_known_box_comes_back(
        policy, family, photos):
    grids = policy.processor.image_processor(photos, return_tensors="pt")["image_grid_thw"]
    assert sizes_of(grids, family) == SEEN[FACTORS[family]] == [
        seen_size(size, policy.box_format, FACTORS[family]) for size in SIZES]
    targets = tuple(Target(number, box) for number, box in enumerate(BOXES, 1))
    for target, size, seen in zip(targets, SIZES, sizes_of(grids, family), strict=True):
        reply = reply_with(target.box, size, seen, family, target.image)
        sample = Sample("x", "", "", "", tuple(photos), "Where?", targets=(target,))
        # half a pixel of rounding on each side of a box of 130 of 196 px
        answer = read_reply(reply, sample, policy.box_format)
        assert rewards.box_reward(answer, sample) > 0.985
        scores = items.score_answer(answer, sample)
        assert scores["iou"] > 0.985 and scores["image"] == scores["format"] == 1


def second_image_size(ids: torch.Tensor, image_token: int, factor: int) -> tuple[int, int]:
    """(width, height) of the second image as the model sees it, 3:2, from its tokens alone."""
    text = "".join("i" if token == image_token else "." for token in ids.tolist())
    tokens = len(re.findall("i+", text)[1])
    columns = round(math.sqrt(tokens * 3 / 2))
    assert tokens % columns == 0
    return columns * factor, tokens // columns * factor


@pytest.fixture
def ground(family, photo_files, tmp_path, monkeypatch):
    """Call it with a folder and options: the output, of a model that answers in what it sees."""
    def answer(model, processor, prompts, *_, **__):
        seen = second_image_size(prompts[0].ids, processor.image_token_id, FACTORS[family])
        reply = reply_with(BOXES[1], SIZES[1], seen, family, image=2)
        return [[processor.tokenizer.encode(reply)]]

    def call(folder, *options):
        arguments = ["--model", folder, "--out", tmp_path / "out.png", *options]
        for path in photo_files:
            arguments += ["--image", path]
        result = run_mig_kit("ground", *map(str, arguments), "Where is it?")
        output = result.stdout + result.stderr
        assert "image: 2" in output
        box = re.search(r"box: (\d+), (\d+), (\d+), (\d+)", output).groups()
        assert iou(tuple(map(float, box)), BOXES[1]) > 0.985
        return output

    monkeypatch.setattr(reply_files, "generate_rollouts", answer)
    return call


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=[pytest.mark.nightly] * (name not in ("qwen2_5_vl", "qwen3_vl")))
    for name in FAMILIES])
def test_ground_asks_with_the_folders_own_limits_or_those_of_options(published, family, ground,
                                                                     tmp_path):
    folder = shutil.copytree(published[family], tmp_path / "model")
    path = folder / "preprocessor_config.json"
    limits = {"min_pixels": 3136, "max_pixels": 200704}
    path.write_text(json.dumps(json.loads(path.read_text()) | limits))
    output = ground(folder)
    coordinates = format_of(family).coordinates
    assert f"asked with images of 3136 to 200704 pixels and {coordinates} boxes\n" in output
    output = ground(published[family], "--min-pixels", 3136, "--max-pixels", 401408)
    own = {28: "3136 to 12845056", 32: "65536 to 16777216"}[FACTORS[family]]
    assert "asked with images of 3136 to 401408 pixels and" in output
    assert f"(its own: images of {own} pixels and {coordinates} boxes)" in output


@pytest.mark.parametrize("layout", [
    {"min_pixels": 4000, "max_pixels": 50000}, {"size": {"shortest_edge": 4000,
                                                         "longest_edge": 50000}},
    {"min_pixels": 4000, "max_pixels": 50000, "size": {"shortest_edge": 9, "longest_edge": 99}}])
def test_limits_are_read_from_every_layout(published, tmp_path, layout):
    folder = shutil.copytree(published["qwen2_5_vl"], tmp_path / "model")
    path = folder / "preprocessor_config.json"
    settings = {name: value for name, value in json.loads(path.read_text()).items()
                if name not in ("min_pixels", "max_pixels")}
    path.write_text(json.dumps(settings | layout))
    assert processors.read_box_format(folder) == BoxFormat(4000, 50000)
    path.unlink()  # transformers 5 writes them elsewhere
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": settings | layout}))
    assert processors.read_box_format(folder) == BoxFormat(4000, 50000)


@pytest.mark.parametrize("text", ['{"min_pixels": 0}', '{"max_pixels": "many"}', "[", "[]",
                                  '{"size": {"shortest_edge": 3136}}'])
def test_limits_that_cannot_be_used_are_one_sentence(published, tmp_path, text):
    folder = shutil.copytree(published["qwen2_5_vl"], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match="preprocessor_config.json or mig_kit.json of .*model: "):
        processors.read_box_format(folder)


def test_a_saved_folder_brings_its_box_format_along(published, float32, tmp_path):
    """The kit's own file holds what the published layout has no place for."""
    box_format = BoxFormat(3136, 200704, Coordinates.NORMALIZED_1000)
    base = published["qwen2_5_vl"]
    policy = loading.load_policy(base, float32, box_format)
    save_model(policy.model, policy.processor, tmp_path, base)
    assert processors.read_box_format(tmp_path) == box_format
    assert processors.describe_other_format(tmp_path, box_format) == ""
    assert "was trained on images of 3136 to 200704 pixels and normalized_1000 boxes" in (
        processors.describe_other_format(tmp_path, BoxFormat()))
    assert processors.describe_other_format(base, BoxFormat()) == "", "a published budget"
    (tmp_path / processors.SETTINGS_FILE).write_text('{"coordinates": "furlongs"}')
    with pytest.raises(ValueError, match="mig_kit.json of .*: coordinates is 'furlongs'"):
        processors.read_box_format(tmp_path)


def test_a_batch_that_was_resized_otherwise_is_refused(published, photos, float32, sample):
    policy = loading.load_policy(published["qwen2_5_vl"], float32, BoxFormat())
    processor = policy.processor
    grids = processor.image_processor(photos, return_tensors="pt")["image_grid_thw"]
    processors.check_image_grids(processor, BoxFormat(), grids, SIZES)
    with pytest.raises(ValueError, match="image 1 of 3000x2000 px reaches the model at 728x532 px"):
        processors.check_image_grids(processor, BoxFormat(), grids, SIZES[1::-1] + SIZES[2:])
    with pytest.raises(ValueError, match="max_pixels 200704"):
        processors.check_image_grids(processor, BoxFormat(max_pixels=200704), grids, SIZES)
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": 602112}
    with pytest.raises(ValueError, match="image 1 of 1024x768 px reaches the model at 896x672 px"):
        sample_prompts.make_cache(policy).get([sample])
