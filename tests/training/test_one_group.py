"""The lesson of notebook 05: its own loss is the trainer's, and a training does not notice it."""

import math
import os
import random
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.common import NOTEBOOKS
from mig_kit.models import loading
from mig_kit.shared_prefix import logprobs, prompt_cache
from mig_kit.stages import grpo
from mig_kit.training import recipe_trainer
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {"num_generations": 8, "per_device_train_batch_size": 8, "max_completion_length": 8,
            "gradient_accumulation_steps": 1, "max_steps": 2, "save_steps": 2, "lora_r": 4,
            "launcher": "", "learning_rate": 1e-3}
LENGTHS = (8, 3, 5, 8, 2, 7, 4, 6)
LOSSES = ("dapo", "grpo", "dr_grpo")


def notebook_function(name, names):
    """A function that notebook 05 defines; names: the globals that it reads."""
    source = next(cell.source for cell in nbformat.read(NOTEBOOKS / "05_grpo.ipynb", 4).cells
                  if cell.cell_type == "code" and f"def {name}(" in cell.source)
    exec(source, names)
    return names[name]


def weigh_tokens(mask, loss_type, longest):
    """The weights of notebook 05, written down once more."""
    if loss_type == "grpo":
        return mask / mask.sum(1, keepdim=True) / len(mask)
    return mask / (mask.sum() if loss_type == "dapo" else len(mask) * longest)


@pytest.fixture
def make_params(stage_params):
    return lambda **changes: stage_params("05_grpo", **(SETTINGS | changes))


@pytest.fixture
def make_lesson(random_folder, float32, tmp_path, make_params):
    """Call it for (trainer, replies, batch) of one group of a random model."""
    def make(**changes):
        policy = loading.load_policy(random_folder, float32, BOX_FORMAT)
        sample = make_sample("common_object", "rl", 0)
        trainer = grpo.one_group_trainer(policy, sample, tmp_path, make_params(**changes))
        return trainer, *recipe_trainer.draw_group(trainer)

    return make


def vary(trainer, batch):
    """Completions of several lengths, log-probabilities of three models, and advantages."""
    mask = batch["completion_mask"]
    for row, length in enumerate(LENGTHS):
        mask[row] = torch.arange(mask.shape[1]) < length
    batch["num_items_in_batch"] = mask.sum()
    generator = torch.Generator().manual_seed(0)
    logps = recipe_trainer.token_logps(trainer, batch).detach()
    old, ref = (logps + 0.3 * torch.randn(logps.shape, generator=generator) * mask
                for _ in range(2))
    return logps, old, ref, torch.randn(len(mask), generator=generator)


def test_its_layers_are_checkpointed_as_in_the_training(make_lesson, monkeypatch):
    """Else the graph of a whole group is kept: 10 GiB more for a 3B with two photos a prompt."""
    trainer, _, batch = make_lesson(gradient_checkpointing=True, dtype="float32")
    plain, _, _ = make_lesson(dtype="float32")
    layers = prompt_cache.unwrap_peft(trainer.model).model.language_model.layers
    passes = []
    for name in ("_read_prompt_layer", "_read_replies"):
        read = getattr(logprobs, name)
        monkeypatch.setattr(logprobs, name, lambda *arguments, read=read: (
            passes.append(1) or read(*arguments)))
    logps = recipe_trainer.token_logps(trainer, batch)
    assert len(passes) == 2 * len(layers), "of the prompt, and of its replies"
    logps.sum().backward()
    assert len(passes) == 4 * len(layers), "they are computed again backwards"
    torch.testing.assert_close(logps, recipe_trainer.token_logps(plain, batch), atol=1e-5, rtol=0)


def test_the_loss_by_hand():
    """Two replies, of one token and of two; A = 1, -1; every case of ratio and clip."""
    params = SimpleNamespace(epsilon=0.2, epsilon_high=0.0)
    loss = notebook_function("grpo_loss", {"p": params, "torch": torch})
    old = torch.zeros(2, 2)
    logps = torch.tensor([[1.5, 1.0], [0.5, 1.0]]).log()
    weights = torch.tensor([[1.0, 0.0], [1.0, 1.0]]) / 3
    advantages = torch.tensor([1.0, -1.0])
    # 1.5 is clipped to 1.2; of the bad reply 0.5 counts as 0.8, and 1.0 as it is
    assert loss(logps, old, old, advantages, weights).item() == pytest.approx(
        -(1.2 - 0.8 - 1.0) / 3)
    kl = sum(1 + ratio * math.log(ratio) - ratio for ratio in (1.5, 0.5, 1.0))
    assert loss(logps, old, old, advantages, weights, 0.5).item() == pytest.approx(
        (0.6 + 0.5 * kl) / 3)
    params.epsilon_high = 0.4
    assert loss(logps, old, old, advantages, weights).item() == pytest.approx(0.4 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_notebooks_loss_is_the_trainers(make_lesson, loss_type, beta):
    """Ratios lie on both sides of the clips, and the gradients are the same, too."""
    trainer, replies, batch = make_lesson()
    assert len(replies) == 8
    _, old, ref, advantages = vary(trainer, batch)
    params = SimpleNamespace(epsilon=0.2, epsilon_high=0.0)
    function = notebook_function("grpo_loss", {"p": params, "torch": torch})
    weights = weigh_tokens(batch["completion_mask"], loss_type, 8)
    results = []
    for is_own in (True, False):
        trainer.model.zero_grad()
        loss = (function(recipe_trainer.token_logps(trainer, batch), old, ref, advantages, weights,
                         beta) if is_own else recipe_trainer.trainer_loss(
                             trainer, batch, advantages, old, ref, loss_type, beta))
        loss.backward()
        gradients = [weight.grad.flatten() for weight in trainer.model.parameters()
                     if weight.requires_grad]
        results.append((loss.item(), torch.cat(gradients)))
    (own, own_gradient), (expected, gradient) = results
    assert abs(own - expected) <= 1e-6 and abs(expected) > 1e-3
    assert gradient.any() and (own_gradient - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    {"share_prefix": False}, {"num_iterations": 2, "epsilon": 0.1},
    {"loss_type": "bnpo", "top_entropy_quantile": 0.5, "mask_truncated_completions": True},
    {"beta": 0.04, "gradient_checkpointing": True},
    {"micro_replies": 4, "server": "http://127.0.0.1:9"}])
def test_the_lesson_is_the_plain_one_whatever_the_training_varies(make_lesson, changes):
    trainer, _, batch = make_lesson(**changes)
    advantages = torch.linspace(-1, 1, 8)
    first, second = (recipe_trainer.token_logps(trainer, batch).detach() for _ in range(2))
    assert torch.equal(first, second)
    weights = batch["completion_mask"] / batch["completion_mask"].sum()
    loss = recipe_trainer.trainer_loss(trainer, batch, advantages, first)
    assert abs(loss.item() + (weights * advantages[:, None]).sum().item()) <= 1e-6


def test_global_state_is_put_back():
    os.environ["MIG_KIT_TEST"] = "before"
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    with recipe_trainer.keep_global_state():
        os.environ |= {"MIG_KIT_TEST": "within", "MIG_KIT_NEW": "1"}
        random.random(), np.random.rand(), torch.rand(1)
        torch.use_deterministic_algorithms(not deterministic, warn_only=True)
    assert os.environ.pop("MIG_KIT_TEST") == "before" and "MIG_KIT_NEW" not in os.environ
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[2])
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.are_deterministic_algorithms_enabled() == deterministic


@pytest.mark.slow
def test_a_training_does_not_notice_the_lesson(make_lesson, make_params, random_folder, float32,
                                               tmp_path, monkeypatch):
    """The same adapter to the bit, though the lesson has drawn, learnt and thrown away."""
    monkeypatch.setitem(rewards.REWARDS, "format",
                        lambda answer, sample: len(set(answer.text)) / 10)
    samples = [make_sample(task, "rl", 0) for task in TASKS]
    adapters = []
    for has_lesson in (False, True):
        if has_lesson:
            trainer, _, batch = make_lesson()
            weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
            recipe_trainer.trainer_loss(trainer, batch, torch.linspace(-1, 1, 8)).backward()
            torch.optim.AdamW(weights, lr=1e-2).step()
        policy = loading.load_policy(random_folder, float32, BOX_FORMAT)
        trainer = grpo.grpo_trainer(policy, samples, tmp_path / str(has_lesson), make_params())
        trainer.train()
        adapters.append({name: weight for name, weight in trainer.model.named_parameters()
                         if "lora" in name})
    plain, after_lesson = adapters
    assert any(weight.any() for name, weight in plain.items() if "lora_B" in name)
    assert all(torch.equal(weight, after_lesson[name]) for name, weight in plain.items())
