"""Where stage 05 starts: the merged model, the base, a folder, or 02's adapter on a 4-bit base."""

import shutil
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from launched import set_random_adapter
from peft import PeftModel

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading, merging, sample_prompts
from mig_kit.sample import write_samples
from mig_kit.shared_prefix import decoding, generation
from mig_kit.shared_prefix import trainer as trainer_module
from mig_kit.stages import grpo, sft
from mig_kit.training import resuming
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "max_completion_length": 8,
    "save_steps": 1, "lora_r": 4, "launcher": "", "dtype": "float32", "device": "cpu"}


@pytest.fixture
def adapter(tmp_path, random_folder, float32):
    """The folder of an adapter that changes the random model, as 02 leaves it."""
    lora = resuming.lora_config(4, 0.1)
    policy = sft.load_qlora_policy(random_folder, float32, BOX_FORMAT, lora, 0)
    set_random_adapter(policy.model)
    policy.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def params(stage_params, random_folder):
    """Call it with changes for the parameters of 05 and of the run."""
    def make(**changes) -> SimpleNamespace:
        run = {"base_model": str(random_folder), "min_pixels": BOX_FORMAT.min_pixels,
               "max_pixels": BOX_FORMAT.max_pixels, "coordinates": "absolute"}
        return SimpleNamespace(**vars(stage_params("05_grpo", **(SETTINGS | changes))), **run)

    return make


def test_what_it_starts_from(tmp_path, params, adapter, random_folder):
    merged = tmp_path / "merged"
    assert grpo.resolve_start(params(), merged, adapter) == {"start": merged}
    for name in ("base", str(random_folder)):
        assert grpo.resolve_start(params(start_from=name), merged, adapter) == {
            "start": random_folder}
    assert grpo.resolve_start(params(start_from="adapter"), merged, adapter) == {
        "start": random_folder, "adapter": adapter}


def test_a_folder_that_saw_images_otherwise_is_said(tmp_path, params, random_folder, capsys):
    """Where the kit saved it; what a publisher allows is no way in which it was trained."""
    folder = shutil.copytree(random_folder, tmp_path / "trained")
    grpo.resolve_start(params(start_from=str(folder)), tmp_path, tmp_path)
    (folder / "mig_kit.json").write_text('{"coordinates": "normalized_1000"}')
    assert capsys.readouterr().out == ""
    grpo.resolve_start(params(start_from=str(folder)), tmp_path, tmp_path)
    assert capsys.readouterr().out == (
        f"warning: {folder} was trained on images of 3136 to 401408 pixels and normalized_1000 "
        "boxes, and this run has images of 3136 to 401408 pixels and absolute boxes; set "
        "min_pixels, max_pixels and coordinates of 01 to the model's unless you want to change "
        "them\n")


@pytest.mark.slow
def test_it_goes_on_with_the_adapter_on_the_4_bit_base(tmp_path, params, adapter, random_folder,
                                                       float32):
    samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)]
    write_samples(tmp_path / "kept.parquet", samples)
    replies = ["<think>Compare.</think>"] * 3
    folder = tmp_path / "05_grpo"
    start = grpo.resolve_start(params(start_from="adapter"), tmp_path, adapter)

    def read_logps(model):
        processor = loading.load_processor(random_folder, BOX_FORMAT)
        return torch.cat(sample_prompts.reply_logps(model, processor, samples[:3], replies,
                                                    BOX_FORMAT))

    policy = grpo.load_start(float32, BOX_FORMAT, **start)
    trained = [name for name, parameter in policy.model.named_parameters()
               if parameter.requires_grad]
    assert len(trained) == 28 and all("lora_" in name for name in trained)
    fresh = PeftModel.from_pretrained(loading.load_model(random_folder, float32, four_bit=True),
                                      adapter)
    decoding.train_mode_for_4bit_layers(fresh.eval())
    decoding.train_mode_for_4bit_layers(policy.model.eval())
    before = read_logps(policy.model)
    assert torch.allclose(before, read_logps(fresh), atol=1e-5)
    grpo.train(folder, params(start_from="adapter"), str(tmp_path / "kept.parquet"),
               str(start["start"]), str(adapter))
    policy = grpo.load_start(float32, BOX_FORMAT, random_folder, folder / "adapter")
    after = read_logps(policy.model)
    merging.write_merged_model(random_folder, folder / "adapter", folder / "model", float32,
                               policy.processor, four_bit=True)
    merged = read_logps(loading.load_model(folder / "model", float32))
    assert (merged - after).abs().mean() < 1e-3
    assert (after - before).abs().mean() > 5 * (merged - after).abs().mean()


@pytest.mark.slow
def test_rollouts_leave_4_bit_weights_alone(tmp_path, params, adapter, random_folder, float32,
                                            monkeypatch):
    policy = loading.load_adapter_policy(random_folder, adapter, float32, BOX_FORMAT)
    assert policy.model.peft_config["default"].lora_dropout == 0.0
    samples = [make_sample("diff", "rl", i) for i in range(2)]
    trainer = grpo.grpo_trainer(policy, samples, tmp_path, params(start_from="adapter"))
    layers = [module for module in trainer.model.modules()
              if isinstance(module, bitsandbytes.nn.Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    in_train_mode = []

    def record_modes(model, *arguments):
        in_train_mode.append((model.training, {layer.training for layer in layers}))
        return generation.generate_rollouts(model, *arguments)

    monkeypatch.setattr(trainer_module, "generate_rollouts", record_modes)
    numbers, *_ = trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]] * 4)
    trainer._draw_completions([number for number, in numbers], 4)
    assert in_train_mode == [(False, {True})]
    assert all(torch.equal(layer.weight.data, packed) for layer, packed in zip(layers, before))
