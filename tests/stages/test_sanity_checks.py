"""Planted faults: each must stop the training with a sentence."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.stages import sanity_checks, sft, synthesize
from mig_kit.training import resuming
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
STEP = {"loss": 0.1, "grad_norm": 1.0, "reward": 0.7, "frac_reward_zero_std": 0.2,
        "rewards/format/mean": 0.9, "rewards/image/mean": 0.8, "rewards/box/mean": 0.3,
        "rewards/choice/mean": math.nan}


@pytest.fixture(scope="module")
def lesson():
    """Four samples of every task, and flawless replies to them."""
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(4)]
    traces = synthesize.RuleBasedTraces(samples, 0, BOX_FORMAT, 0.0, mix=(1, 0, 0))
    return samples, [trace.text for trace in traces]


def state_at(step):
    return SimpleNamespace(global_step=step, max_steps=99, is_world_process_zero=True)


def watch(*rows):
    callback = sanity_checks.StopIfNothingLearns(patience=3)
    for step, row in enumerate(rows, 1):
        callback.on_log(None, state_at(step), None, STEP | row)


def test_a_sound_training_goes_on():
    watch({}, {}, {}, {"reward": 0.0, "frac_reward_zero_std": 1.0}, {})
    watch({"rewards/box/mean": 0.0}, {"rewards/box/mean": 0.0}, {"rewards/box/mean": 0.01})
    # not yet able to find the image either
    watch(*3 * [{"rewards/box/mean": 0.0, "rewards/image/mean": 0.1}])
    # a reward of one's own is earned
    watch(*3 * [{"rewards/box/mean": 0.0, "rewards/image/mean": 0.0, "rewards/near/mean": 0.1}])
    # multiple choice only: so TRL logs it
    watch(*3 * [{"rewards/box/mean": None, "rewards/image/mean": None,
                 "rewards/choice/mean": 0.4}])


def test_updates_that_learn_again_from_the_same_replies_are_passed_over():
    again, poor = {"loss": 0.1, "grad_norm": 1.0}, STEP | {"frac_reward_zero_std": 1.0}
    callback = sanity_checks.StopIfNothingLearns(patience=2)
    for step, row in enumerate((poor, again), 1):
        callback.on_log(None, state_at(step), None, row)
    with pytest.raises(ValueError, match="all replies to a prompt earned the same"):
        callback.on_log(None, state_at(3), None, poor)
    resumed = sanity_checks.StopIfNothingLearns(patience=1)
    resumed.on_log(None, state_at(9), None, poor)


@pytest.mark.parametrize(("row", "sentence"), [
    ({"grad_norm": math.nan}, "grad_norm is nan at step 1; lower learning_rate"),
    ({"loss": math.inf}, "loss is inf"),
    ({"frac_reward_zero_std": 1.0}, "all replies to a prompt earned the same"),
    ({"rewards/box/mean": 0.0},
     "no box met its target .* though 80% of the images were correct; .* parameters coordinates"),
    ({"rewards/box/mean": 0.0, "rewards/image/mean": 0.0},
     "^no reply earned anything for box, image in all of the first 3 steps: RL only "
     "strengthens what a model sometimes gets right; let it learn from traces .*start_from of 05"),
    ({"rewards/box/mean": 0.0, "rewards/image/mean": 0.0, "rewards/choice/mean": 0.4},
     "^no reply earned anything for box, image in"),
    ({"rewards/choice/mean": 0.0}, "^no reply earned anything for choice in"),
])
def test_planted_figures_stop_it(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        watch(row, row, row)


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_stops_the_trainer(tmp_path, random_folder, float32, lesson,
                                                         stage_params):
    lora = resuming.lora_config(4)
    policy = sft.load_qlora_policy(random_folder, float32, BOX_FORMAT, lora, 0)
    params = stage_params("02_sft", num_train_epochs=2.0, per_device_train_batch_size=10,
                          gradient_accumulation_steps=1, warmup_steps=1)
    trainer = sft.sft_trainer(policy, *lesson, tmp_path, params)
    adapter = next(parameter for name, parameter in policy.model.named_parameters()
                   if "lora_A" in name)
    adapter.data.fill_(math.nan)
    with pytest.raises(ValueError, match="at step 1; lower learning_rate"):
        trainer.train()


def test_boxes_in_other_coordinates_are_noticed(lesson):
    assert sanity_checks.check_box_coordinates(*lesson, BOX_FORMAT) == 1
    sentence = "meet their targets with boxes read as .* run 01 again with this run's coordinates"
    for other in (BoxFormat(coordinates="normalized_1000"), BoxFormat(max_pixels=3136)):
        with pytest.raises(ValueError, match=sentence):
            sanity_checks.check_box_coordinates(*lesson, other)


@pytest.mark.slow
def test_swapped_images_are_noticed_by_a_model_that_sees(lesson, float32):
    samples, replies = lesson
    policy = loading.load_policy(loading.TINY_BASE, float32, BOX_FORMAT)
    result = sanity_checks.check_model_uses_images(policy, samples, replies)
    assert result["pairs"] > 30 and result["gap"] > 3 * result["error"]
    # images of another sample of the same task
    donors = [samples[i // 4 * 4 + (i + 2) % 4] for i in range(len(samples))]
    swapped = [(replace(sample, id=f"{sample.id} swapped", images=donor.images), reply)
               for sample, donor, reply in zip(samples, donors, replies)
               if len(sample.images) == len(donor.images)]
    with pytest.raises(ValueError, match="images and questions of the data are mixed up"):
        sanity_checks.check_model_uses_images(policy, *map(list, zip(*swapped)))


@pytest.mark.slow
def test_a_model_that_does_not_see_is_noticed(lesson, random_policy):
    samples, replies = lesson
    for parameter in random_policy.model.model.visual.parameters():
        parameter.data.zero_()
    with pytest.raises(ValueError, match="or the model does not see"):
        sanity_checks.check_model_uses_images(random_policy, samples, replies)
    few = sanity_checks.check_model_uses_images(random_policy, samples[:4], replies[:4])
    assert few["gap"] is None, "too few to judge"
    alike = [replace(sample, id=f"{i}", images=samples[0].images, task="x")
             for i, sample in enumerate(samples[:10])]
    assert sanity_checks.check_model_uses_images(random_policy, alike, replies[:10])["pairs"] == 0
