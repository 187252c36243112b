"""Planted faults: each must stop the training before it starts or in its first steps, with a sentence."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model

from mig_kit.boxes import BoxFormat
from mig_kit.engine import models, training
from mig_kit.stages import sanity_checks, sft, synthesize
from mig_kit.world.tasks import TASKS, make_sample

STEP = {"loss": 0.1, "grad_norm": 1.0, "reward": 0.7, "frac_reward_zero_std": 0.2, "rewards/format/mean": 0.9,
        "rewards/image/mean": 0.8, "rewards/box/mean": 0.3, "rewards/choice/mean": math.nan}


@pytest.fixture(scope="module")
def lesson():
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(4)]
    return samples, [t.text for t in synthesize.write_traces(samples, 0, (1, 0, 0), 0.0, 0.7, box_format=BoxFormat())]


def watch(*rows):
    callback = sanity_checks.StopIfNothingLearns(patience=3)
    for step, row in enumerate(rows, 1):
        callback.on_log(None, SimpleNamespace(global_step=step), None, STEP | row)


def test_a_sound_training_goes_on():
    watch({}, {}, {}, {"reward": 0.0, "frac_reward_zero_std": 1.0}, {})
    watch({"rewards/box/mean": 0.0}, {"rewards/box/mean": 0.0}, {"rewards/box/mean": 0.01})
    watch(*3 * [{"rewards/box/mean": 0.0, "rewards/image/mean": 0.1}])  # not yet able to find the image either
    watch(*3 * [{"rewards/box/mean": None, "rewards/image/mean": None}])  # multiple choice only: so TRL logs it


@pytest.mark.parametrize(("row", "sentence"), [
    ({"grad_norm": math.nan}, "grad_norm is nan at step 1; lower learning_rate"),
    ({"loss": math.inf}, "loss is inf"),
    ({"reward": 0.0, "frac_reward_zero_std": 1.0}, "no reply earned anything in all of the first 3 steps"),
    ({"frac_reward_zero_std": 1.0}, "all replies to a prompt earned the same"),
    ({"rewards/box/mean": 0.0}, "no box met its target .* though 80% of the images were right; .* check the parameters frame")])
def test_planted_figures_stop_it(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        watch(row, row, row)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_the_trainer(tmp_path, random_folder, float32, processor, lesson):
    samples, replies = lesson
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, processor, sft.sft_rows(samples, replies, BoxFormat()), float32, tmp_path, epochs=2, batch_size=10,
                          gradient_accumulation=1, learning_rate=1e-3, warmup=1, seed=0, save_steps=100)
    next(p for n, p in model.named_parameters() if "lora_A" in n).data.fill_(math.nan)
    with pytest.raises(ValueError, match="at step 1; lower learning_rate"):
        trainer.train()


def test_boxes_in_another_frame_are_noticed(lesson):
    samples, replies = lesson
    assert sanity_checks.check_box_coordinates(samples, replies, BoxFormat()) == 1
    for other in (BoxFormat(frame="thousand"), BoxFormat(max_pixels=3136)):
        with pytest.raises(ValueError, match="meet their targets with boxes read as .* give 01 and this stage the same frame"):
            sanity_checks.check_box_coordinates(samples, replies, other)


@pytest.mark.slow
def test_swapped_images_are_noticed_by_a_model_that_sees(lesson, float32, processor):
    samples, replies = lesson
    model = models.load_model(models.TINY_BASE, float32)
    seen = sanity_checks.check_model_uses_images(model, processor, samples, replies, BoxFormat())
    assert seen["pairs"] > 30 and seen["gap"] > 3 * seen["error"]
    donors = [samples[i // 4 * 4 + (i + 2) % 4] for i in range(len(samples))]  # images of another sample of the same task
    mixed = [(replace(s, id=f"{s.id} mixed", images=d.images), r) for s, d, r in zip(samples, donors, replies)
             if len(s.images) == len(d.images)]
    with pytest.raises(ValueError, match="images and questions of the data are mixed up"):
        sanity_checks.check_model_uses_images(model, processor, *map(list, zip(*mixed)), BoxFormat())


@pytest.mark.slow
def test_a_model_that_does_not_see_is_noticed(lesson, random_model, processor):
    samples, replies = lesson
    for parameter in random_model.model.visual.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="or the model does not see"):
        sanity_checks.check_model_uses_images(random_model, processor, samples, replies, BoxFormat())
    assert sanity_checks.check_model_uses_images(random_model, processor, samples[:4], replies[:4], BoxFormat())["gap"] is None, "too few to judge"
    same = [replace(s, id=f"{i}", images=tuple(i.copy() for i in samples[0].images), task="x") for i, s in enumerate(samples[:10])]
    assert sanity_checks.check_model_uses_images(random_model, processor, same, replies[:10], BoxFormat())["pairs"] == 0, "ten questions, the same images"


@pytest.mark.slow
def test_adapters_and_four_bit_folders_are_not_evaluated(tmp_path, random_folder, float32):
    model = models.load_model(random_folder, float32, four_bit=True)
    model.save_pretrained(tmp_path / "four_bit")
    for name in ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / "four_bit" / name).write_bytes((random_folder / name).read_bytes())
    with pytest.raises(ValueError, match="holds quantised weights"):
        models.load_model(tmp_path / "four_bit", float32)
    torch.manual_seed(0)
    get_peft_model(model, training.lora_config(4, 8)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="holds an adapter, not a model; merge it"):
        models.load_model(tmp_path / "adapter", float32)
