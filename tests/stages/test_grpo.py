"""Stage 05 on a random model: advantages by hand, and the shared prefix against stock TRL."""

import ast
import math

import pytest
import torch
import two_processes
from safetensors import safe_open

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.engine import generation, models, parallel, training
from mig_kit.engine.prompt_cache import PromptCache
from mig_kit.prompts import format_answer
from mig_kit.stages import grpo
from mig_kit.world.suites import make_free_form
from mig_kit.world.tasks import TASKS, make_sample

VIEW = BoxFormat()


def test_advantages_by_hand():
    advantages, spread = grpo.group_advantages(torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    assert torch.allclose(advantages[:4], torch.tensor([1, -1, 1, -1]) * 0.5 / (1 / 3) ** 0.5, atol=1e-3)
    assert (advantages[4:] == 0).all() and (spread[4:] == 0).all()
    rewards = torch.tensor([1.0, 0.0, 0.6, 0.4])  # a group far apart, and one close together
    by_batch, _ = grpo.group_advantages(rewards, 2, "batch")
    assert torch.allclose(by_batch, torch.tensor([0.5, -0.5, 0.1, -0.1]) / (rewards.std() + 1e-4))
    assert torch.allclose(grpo.group_advantages(rewards, 2, "none")[0], torch.tensor([0.5, -0.5, 0.1, -0.1]))


def make_trainer(folder, random_folder, hw, processor, share, **changes):
    samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)] + make_free_form("rl", 1)
    model = models.load_model(random_folder, hw, four_bit=changes.pop("four_bit", False))
    options = dict(num_generations=4, batch_size=8, held=0, gradient_accumulation=1, max_steps=2, learning_rate=1e-3,
                   schedule="constant_with_warmup", warmup=1, scale_rewards="group", beta=0.0, temperature=1.0,
                   max_new_tokens=8, weights=[0.2, 0.3, 1.0, 1.3], clip_low=0.2, clip_high=0.28,
                   seed=0, save_steps=1, box_format=VIEW) | changes
    torch.manual_seed(0)
    return grpo.grpo_trainer(model, processor, samples, hw, folder, share_prefix=share, adapter=training.lora_config(4, 8), **options)


def shake(trainer):
    """A lively adapter, so that adapter and reference differ; in float32, for TRL makes it bfloat16 on a 4-bit model."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)


def test_rewards_apply_where_they_mean_something():
    samples = [make_sample("diff", "rl", 0), make_free_form("rl", 1)[0]]
    replies = [[{"role": "assistant", "content": f"<think></think><answer>{samples[1].letter}</answer>"}]] * 2
    found = {f.__name__: f(completions=replies, sample=[0, 1]) for f in grpo.reward_functions(samples, VIEW)}
    assert found == {"format": [1.0, 1.0], "image": [0.0, None], "box": [0.0, None], "choice": [None, 1.0]}


def test_a_citation_of_nothing_earns_nothing():
    samples = [make_sample("diff", "rl", 0)]
    image, box = samples[0].targets[0]
    answer = f"<answer>{format_answer(image, to_model_box(box, samples[0].sizes[image - 1], box_format=BoxFormat()))}</answer>"
    replies = [[{"role": "assistant", "content": f"<think>image {n}: a.</think>{answer}"}] for n in (2, 3)]
    for lost, (form, image) in {"nothing": (1.0, 1.0), "format": (0.0, 1.0), "all": (0.0, 0.0)}.items():
        found = {f.__name__: f(completions=replies, sample=[0, 0]) for f in grpo.reward_functions(samples, VIEW, lost)}
        assert found["format"] == [1.0, form] and found["image"] == [1.0, image] and (found["box"][1] > 0) == (image > 0)
        assert found["choice"] == [None, None] and found["box"][0] > 0
    with pytest.raises(ValueError, match="use nothing, format or all"):
        grpo.reward_functions(samples, VIEW, "everything")


@pytest.mark.slow
@pytest.mark.parametrize(("beta", "held", "four_bit", "layers", "family"), [
    (0.0, 0, False, False, ""), (0.0, 4, False, False, ""), (0.1, 4, False, False, ""), (0.1, 0, True, False, ""),
    (0.1, 0, False, True, ""), (0.0, 4, False, True, ""), (0.1, 4, False, False, "qwen2_vl"), (0.1, 0, True, False, "qwen3_vl"),
    (0.0, 4, False, True, "qwen3_vl")])
def test_loss_and_gradients_equal_stock_trl(tmp_path, random_folder, relatives, float32, beta, held, four_bit, layers, family):
    """The same completions through TRL's own loss, once with stock log-probabilities, once with shared prefixes."""
    folder, box_format = (relatives[family], BoxFormat(frame="thousand")) if family else (random_folder, VIEW)
    processor, same = models.load_processor(folder, box_format), dict(beta=beta, four_bit=four_bit, box_format=box_format)
    stock = make_trainer(tmp_path / "a", folder, float32, processor, False, **same)
    ours = make_trainer(tmp_path / "b", folder, float32, processor, True, held=held, checkpoint_layers=layers, **same)
    for trainer in (stock, ours):
        shake(trainer)
        trainer.model.train()
    rows = [stock.train_dataset[i] for i in (0, 7) for _ in range(4)]
    batch = stock._generate_and_score_completions(rows)
    batch["advantages"] = torch.linspace(-1, 1, 8)
    stock.current_gradient_accumulation_steps = ours.current_gradient_accumulation_steps = 1
    stock_loss = stock._compute_loss(stock.model, batch)
    stock_loss.backward()
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    where = torch.tensor([row["sample"] for row in rows])
    mine = {**batch, "sample": where, "prompt_ids": ids[:, :0], "prompt_mask": mask[:, :0]}
    if beta:
        with torch.no_grad(), ours.model.disable_adapter():
            mine["ref_per_token_logps"] = ours._logps(ours.model, where, ids, mask)[0]
        live = mask.bool()
        assert torch.allclose(mine["ref_per_token_logps"][live], batch["ref_per_token_logps"][live], atol=1e-5)
    loss = ours._compute_loss(ours.model, mine)
    loss.backward()
    assert loss.item() == pytest.approx(stock_loss.item(), abs=1e-5)
    theirs = dict(stock.model.named_parameters())
    whole = [torch.cat([p.grad.flatten() for p in t.model.parameters() if p.requires_grad]) for t in (stock, ours)]
    assert (whole[0] - whole[1]).norm() < 1e-5 * whole[0].norm()
    checked = 0
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            gap = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm().clamp(min=1e-7)
            assert gap < 1e-4, (name, gap)
            checked += 1
    assert checked == 28


@pytest.mark.slow
def test_resume_gives_the_same_continuation(tmp_path, random_folder, float32, processor):
    whole = make_trainer(tmp_path / "whole", random_folder, float32, processor, True, max_steps=3, save_steps=2)
    whole.train()
    first = make_trainer(tmp_path / "cut", random_folder, float32, processor, True, max_steps=3, save_steps=2)
    first.add_callback(training.StopAfter(2))
    first.train()
    again = make_trainer(tmp_path / "cut", random_folder, float32, processor, True, max_steps=3, save_steps=2)
    training.train_or_resume(again, tmp_path / "cut")
    a, b = ([row["reward"] for row in grpo.training_curves(t.state.log_history)] for t in (whole, again))
    assert a == b
    for (name, x), (_, y) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(x, y), name


@pytest.mark.slow
def test_killed_after_the_last_step_takes_no_step_more(tmp_path, random_folder, float32, processor):
    whole = make_trainer(tmp_path, random_folder, float32, processor, True)
    whole.train()
    again = make_trainer(tmp_path, random_folder, float32, processor, True)
    training.train_or_resume(again, tmp_path)
    assert again.state.global_step == 2
    rows = [grpo.training_curves(t.state.log_history) for t in (whole, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 2
    for (name, x), (_, y) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(x, y), name


@pytest.mark.slow
def test_several_iterations_and_accumulation_run(tmp_path, random_folder, float32, processor):
    trainer = make_trainer(tmp_path, random_folder, float32, processor, True, gradient_accumulation=2, beta=0.05)
    trainer.train()
    rows = grpo.training_curves(trainer.state.log_history)
    assert len(rows) == 2 and all(row["kl"] is not None and row["length"] > 0 for row in rows)


@pytest.mark.slow
def test_an_update_in_parts_has_the_same_gradient_and_whole_groups(tmp_path, random_folder, float32, processor, monkeypatch,
                                                                                 first_gradients):
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, group, scale: (
        torch.randn(len(rewards), generator=torch.Generator().manual_seed(0)), torch.ones(len(rewards))))
    found, logps = [], grpo.SharedPrefixGRPOTrainer._logps
    for size, parts in ((16, 1), (4, 4)):
        seen = []
        monkeypatch.setattr(grpo.SharedPrefixGRPOTrainer, "_logps", lambda self, model, rows, *given, seen=seen: (
            seen.append(rows) or logps(self, model, rows, *given)))
        trainer = make_trainer(tmp_path / str(parts), random_folder, float32, processor, True, batch_size=size,
                               gradient_accumulation=parts, max_steps=1)
        gradients = first_gradients(trainer)
        trainer.train()
        found.append((gradients, seen))
    (whole, all_rows), (split, rows) = found
    assert [len(r) for r in rows] == [4] * 4 and all(len(r.unique()) == 1 for r in rows)
    assert sorted(torch.cat(rows).tolist()) == sorted(all_rows[0].tolist())
    lengths = [len(p.ids) for p in trainer.cache.get([trainer.samples[r[0]] for r in rows])]
    assert lengths == sorted(lengths) and len(whole) == 28
    for name, gradient in whole.items():
        assert torch.allclose(gradient, split[name], atol=1e-5 * gradient.abs().max().item()), name


@pytest.mark.slow
def test_replies_drawn_in_rounds_are_the_same(tmp_path, random_folder, float32, processor, monkeypatch):
    """As good as greedy, four prompts at once and, with no room for keys and values, one after another."""
    found = []
    for name, room in (("whole", generation.KV_BYTES), ("rounds", 1)):
        monkeypatch.setattr(generation, "KV_BYTES", room)
        trainer = make_trainer(tmp_path / name, random_folder, float32, processor, True, temperature=1e-4, batch_size=16)
        trainer.current_gradient_accumulation_steps = 1
        found.append(trainer._generate_and_score_completions([trainer.train_dataset[i] for i in (0, 7, 3, 11) for _ in range(4)]))
    assert all(torch.equal(found[0][key], found[1][key]) for key in ("completion_ids", "completion_mask", "sample"))


@pytest.mark.slow
def test_stock_trl_runs_the_same_rows(tmp_path, random_folder, float32, processor):
    trainer = make_trainer(tmp_path, random_folder, float32, processor, False, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, random_folder):
    """Each has half of the prompts of an update; replies, advantages and gradients are those of one process, to rounding."""
    two_processes.train(tmp_path, random_folder, 1)
    with parallel.training_processes(2, two_processes.train, tmp_path, random_folder, 2):
        two_processes.train(tmp_path, random_folder, 2)
    alone, first, second = (safe_open(tmp_path / f"{name}.safetensors", "pt") for name in ("1-0", "2-0", "2-1"))
    samples, said = ([ast.literal_eval(file.metadata()[key]) for file in (alone, first, second)] for key in ("samples", "said"))
    assert [len(each) for each in samples] == [32, 16, 16] and not set(samples[1][:8]) & set(samples[2][:8])
    assert samples[0][:16] == samples[1][:8] + samples[2][:8] and said[0][:16] == said[1][:8] + said[2][:8]
    assert {file.metadata()["steps"] for file in (alone, first, second)} == {"2"}
    for name in alone.keys():
        assert torch.equal(first.get_tensor(name), second.get_tensor(name)), name
        if name.startswith("gradient"):
            one, two = alone.get_tensor(name), first.get_tensor(name)
            assert one.any() and (one - two).norm() <= 1e-4 * one.norm(), name


def test_processes_share_the_steps_of_an_update(tmp_path, random_folder, float32, processor):
    with pytest.raises(ValueError, match="2 processes cannot share 3 steps"):
        make_trainer(tmp_path, random_folder, float32, processor, True, gradient_accumulation=3, processes=2)


def test_too_few_prompts_for_an_update_are_one_sentence(tmp_path, random_folder, float32, processor):
    with pytest.raises(ValueError, match="there are 27 prompts, and an update needs 32 different ones .*; lower gradient_acc"):
        make_trainer(tmp_path, random_folder, float32, processor, True, gradient_accumulation=16)


@pytest.mark.slow
def test_the_reference_reads_a_step_of_replies_at_a_time(tmp_path, random_folder, float32, processor, monkeypatch):
    trainer = make_trainer(tmp_path, random_folder, float32, processor, True, beta=0.1, gradient_accumulation=4,
                           checkpoint_layers=True, max_steps=1)
    packed, seen = grpo.packed_logps, []

    def watched(*given):
        seen.append((torch.is_grad_enabled(), len(given[3])))
        return packed(*given)

    monkeypatch.setattr(grpo, "packed_logps", watched)
    trainer.train()
    assert [rows for wanted, rows in seen if not wanted] == [8] * 4 and [rows for wanted, rows in seen if wanted] == [8] * 4


@pytest.mark.slow
def test_it_trains_as_a_gpu_would(tmp_path, random_folder, processor):
    """Weights in bfloat16, checkpointed layers, a reference: what the full profiles do on a GPU; the adapter learns in float32."""
    as_on_a_gpu = models.Hardware("cpu", torch.bfloat16, False, "sdpa", "as on a GPU")
    trainer = make_trainer(tmp_path, random_folder, as_on_a_gpu, processor, True, beta=0.04, gradient_accumulation=2, held=4,
                           checkpoint_layers=True)
    trainer.train()
    rows = grpo.training_curves(trainer.state.log_history)
    assert len(rows) == 2 and all(math.isfinite(row["kl"]) and row["length"] > 0 for row in rows)
    learnt = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(learnt) == 28 and all(p.dtype == torch.float32 for p in learnt.values())
    assert any(p.any() for name, p in learnt.items() if "lora_B" in name)
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_groups_must_stay_whole(tmp_path, random_folder, float32, processor):
    with pytest.raises(ValueError, match="multiple of"):
        make_trainer(tmp_path, random_folder, float32, processor, True, batch_size=6, gradient_accumulation=2)


def test_lost_images_stop_the_rollout(random_model, processor, samples, monkeypatch):
    cache = PromptCache(random_model, processor, box_format=BoxFormat())
    monkeypatch.setattr("mig_kit.engine.prompt_cache.chat_messages", lambda s, *a: [{"role": "user", "content": "no picture here"}])
    with pytest.raises(ValueError):
        cache.get(samples[:2])


def test_replies_that_got_short_are_named():
    rows = [{"length": 40.0}] * 10 + [{"length": 26.0}] * 10
    assert grpo.length_collapse_warning(rows).startswith("replies fell from 40 to 26 tokens")
    assert grpo.length_collapse_warning(rows[:19]) == "" and grpo.length_collapse_warning(rows[::-1]) == ""
    assert grpo.length_collapse_warning([{"length": 40.0}] * 10 + [{"length": 32.0}] * 10) == "", "four fifths are enough"
