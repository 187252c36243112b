"""Where stage 05 starts: the merged model, the base or a folder."""

import shutil
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch

from mig_kit.boxes import BoxFormat
from mig_kit.models import loading
from mig_kit.shared_prefix import generation
from mig_kit.shared_prefix import trainer as trainer_module
from mig_kit.stages import grpo
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 0, "max_completion_length": 8,
    "save_steps": 1, "lora_r": 4, "launcher": "", "dtype": "float32", "device": "cpu"}


@pytest.fixture
def params(stage_params, random_folder):
    """Call it with changes for the parameters of 05 and of the run."""
    def make(**changes) -> SimpleNamespace:
        run = {"base_model": str(random_folder), "min_pixels": BOX_FORMAT.min_pixels,
               "max_pixels": BOX_FORMAT.max_pixels, "coordinates": "absolute"}
        return SimpleNamespace(**vars(stage_params("05_grpo", **(SETTINGS | changes))), **run)

    return make


def test_what_it_starts_from(tmp_path, params, random_folder):
    assert grpo.resolve_start(params(), tmp_path) == tmp_path
    for name in ("base", str(random_folder)):
        assert grpo.resolve_start(params(start_from=name), tmp_path) == random_folder


def test_a_folder_that_saw_images_otherwise_is_said(tmp_path, params, random_folder, capsys):
    """Where the kit saved it; what a publisher allows is no way in which it was trained."""
    folder = shutil.copytree(random_folder, tmp_path / "trained")
    grpo.resolve_start(params(start_from=str(folder)), tmp_path)
    (folder / "mig_kit.json").write_text('{"coordinates": "normalized_1000"}')
    assert capsys.readouterr().out == ""
    grpo.resolve_start(params(start_from=str(folder)), tmp_path)
    assert capsys.readouterr().out == (
        f"warning: {folder} was trained on images of 3136 to 401408 pixels and normalized_1000 "
        "boxes, and this run has images of 3136 to 401408 pixels and absolute boxes; set "
        "min_pixels, max_pixels and coordinates of 01 to the model's unless you want to change "
        "them\n")


@pytest.mark.slow
def test_rollouts_leave_4_bit_weights_alone(tmp_path, params, random_folder, float32, monkeypatch):
    policy = loading.load_four_bit_policy(random_folder, float32, BOX_FORMAT)
    samples = [make_sample("diff", "rl", i) for i in range(2)]
    trainer = grpo.grpo_trainer(policy, samples, tmp_path, params())
    layers = [module for module in trainer.model.modules()
              if isinstance(module, bitsandbytes.nn.Linear4bit)]
    before = [layer.weight.data.clone() for layer in layers]
    in_train_mode = []

    def record_modes(model, *arguments):
        in_train_mode.append((model.training, {layer.training for layer in layers}))
        return generation.draw_completions(model, *arguments)

    monkeypatch.setattr(trainer_module, "draw_completions", record_modes)
    numbers, *_ = trainer._tokenize_prompts([trainer.train_dataset[0]["prompt"]] * 4)
    trainer._draw_completions([number for number, in numbers], 4)
    assert in_train_mode == [(False, {True})]
    assert all(torch.equal(layer.weight.data, packed) for layer, packed in zip(layers, before))
