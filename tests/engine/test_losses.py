"""Every loss that stage 05 offers: the shared-prefix trainer against stock TRL, update by update.

Both score the same completions, so that advantages, masks, old and reference log-probabilities are
compared, too. With num_iterations 2 an optimiser's step lies between the two updates.
"""

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.engine import models
from mig_kit.pipeline.params import profile_params, validate_params
from mig_kit.stages import grpo
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
    "max_steps": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0,
    "learning_rate": 1e-2, "max_completion_length": 6, "save_steps": 2, "lora_r": 4,
    "lora_alpha": 8}
END = 2
LENGTHS = (5, 3, 6, 2, 6, 4, 1, 5)
HAS_END = (True, True, False, True, True, False, True, True)
CLIPS = {"cispo": "cispo_clip_ratio"}
NO_CLIP = ("sapo", "vespo")
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")


def offered_cases():
    """Every loss, level and number of updates that `validate_params` lets pass, four times: with
    every pair of values of beta, mask_truncated_completions and top_entropy_quantile.
    """
    cases = []
    for loss, level, iterations in product(LOSSES, ("token", "sequence"), (1, 2)):
        is_whole = level == "sequence" and loss != "cispo"  # top_entropy_quantile would be refused
        for number, (beta, mask) in enumerate(product((0.0, 0.04), (False, True))):
            case = {
                "loss_type": loss, "importance_sampling_level": level, "num_iterations": iterations,
                "beta": beta, "mask_truncated_completions": mask,
                "top_entropy_quantile": 0.5 if number in (1, 2) and not is_whole else 1.0,
                "scale_rewards": ("group", "batch", "none")[(number + len(cases)) % 3]}
            if iterations > 1 and loss not in NO_CLIP:
                case |= {"epsilon_high": 1.0} if loss == "cispo" else {
                    "epsilon": 0.01, "epsilon_high": 0.02}
            cases.append(case)
    return [case for case in cases if is_offered(case)]


def is_offered(case):
    try:
        validate_params(case, "05_grpo")
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module")
def make_trainer(random_folder, float32, tmp_path_factory):
    """Call it with changed parameters for a trainer on a random model, with a lively adapter.

    A random model earns no reward; here a reply earns by its letters.
    """
    def make(**changes):
        samples = [make_sample(task, "rl", 0) for task in TASKS]
        policy = models.load_policy(random_folder, float32, BOX_FORMAT)
        torch.manual_seed(0)
        params = SimpleNamespace(**profile_params("05_grpo") | SETTINGS | changes)
        trainer = grpo.grpo_trainer(policy, samples, tmp_path_factory.mktemp("stage"), params)
        torch.manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.05)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards, "format_reward", lambda reply, sample: len(set(reply)) / 10)
        yield make


@pytest.fixture(scope="module")
def pair(make_trainer):
    """(stock TRL's trainer, the kit's), which draw the same completions."""
    stock, sharing = (make_trainer(share_prefix=share) for share in (False, True))
    force_completions(stock, sharing)
    for trainer in (stock, sharing):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation
    return stock, sharing


def draw_completions(count):
    """Token ids of `count` completions, some without an end; always the same."""
    generator = torch.Generator().manual_seed(0)
    completions = []
    for number in range(count):
        length = LENGTHS[number % 8]
        ids = torch.randint(7, 600, (length,), generator=generator).tolist()
        completions.append([*ids[:-1], END] if HAS_END[number % 8] else ids)
    return completions


def force_completions(stock, sharing):
    """Let both trainers draw what `draw_completions` has."""
    stock._generate_single_turn = lambda prompt_ids, *_: (draw_completions(len(prompt_ids)), None)
    sharing._draw_completions = lambda inputs, *_: draw_completions(len(inputs))


def adopt(trainer, case, weights):
    """Give a trainer the parameters of a case, as its constructor would, and adapter weights."""
    for name, value in case.items():
        setattr(trainer, "epsilon_low" if name == "epsilon" else name, value)
    load_weights(trainer, weights)


def adapter(trainer):
    return {name: parameter for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad}


def load_weights(trainer, weights):
    for name, parameter in adapter(trainer).items():
        parameter.data.copy_(weights[name])


def copy_weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in adapter(trainer).items()}


def score(trainer):
    rows = [trainer.train_dataset[index] for index in (0, 5) for _ in range(4)]
    return trainer._generate_and_score_completions(rows)


def learn(trainer, batch):
    """(loss, gradients as one vector) of a batch."""
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in adapter(trainer).values()]
    return loss.item(), torch.cat(gradients)


def take_step(trainer):
    """An optimiser's step, and a kick, because a step alone moves all ratios towards their clip."""
    torch.optim.AdamW(adapter(trainer).values(), lr=1e-3).step()
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter(trainer).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def check_same_update(stock, sharing, batches):
    """Compare loss and gradients; returns stock's."""
    (expected_loss, expected), (loss, gradients) = (
        learn(trainer, batch) for trainer, batch in zip((stock, sharing), batches))
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
    largest = expected.abs().max().item()
    assert largest > 1e-6 and (gradients - expected).abs().max().item() <= 1e-5 * largest
    return expected_loss, expected


def check_same_scores(stock_batch, batch):
    for name in ("advantages", "completion_ids", "completion_mask", "num_items_in_batch"):
        width = stock_batch["completion_ids"].shape[1]
        value = batch[name][:, :width] if batch[name].ndim == 2 else batch[name]
        assert torch.allclose(value.float(), stock_batch[name].float(), atol=1e-5), name
    is_token = stock_batch["completion_mask"].bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        assert (name in batch) == (name in stock_batch)
        if name in batch:
            value = batch[name][:, :is_token.shape[1]]
            assert torch.allclose(value[is_token], stock_batch[name][is_token], atol=1e-5), name


@pytest.fixture(scope="module")
def initial_weights(pair):
    weights = [copy_weights(trainer) for trainer in pair]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    return weights[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", offered_cases(),
                         ids=lambda case: "-".join(map(str, case.values())))
def test_an_offered_loss_equals_stock_trls(pair, initial_weights, case):
    for trainer in pair:
        adopt(trainer, case, initial_weights)
    batches = [score(trainer) for trainer in pair]
    check_same_scores(*batches)
    check_same_update(*pair, batches)
    if case["num_iterations"] == 1:
        return
    stock, sharing = pair
    take_step(stock)
    load_weights(sharing, copy_weights(stock))
    check_same_update(*pair, batches)
    if case["loss_type"] in NO_CLIP:
        return
    name = CLIPS.get(case["loss_type"], "clip_ratio/region_mean")
    clipped, stock_clipped = (trainer._metrics["train"][name][-1] for trainer in (sharing, stock))
    assert 0 < clipped == pytest.approx(stock_clipped)


def test_the_cases_are_all_that_is_offered():
    """18 of 32: with num_iterations 1 four losses, with 2 seven at either level."""
    combinations = {tuple(case.values())[:3] for case in offered_cases()}
    assert len(combinations) == 18 and len(offered_cases()) == 72
