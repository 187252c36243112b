"""Stage 02 on a random model."""

import os
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from launched import StopAfter, set_random_adapter
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mig_kit import filters
from mig_kit.boxes import BoxFormat
from mig_kit.image_files import image_digests
from mig_kit.pipeline.params import ALLOWED
from mig_kit.prompts import read_reply
from mig_kit.rewards import is_correct
from mig_kit.sample import Trace, write_samples
from mig_kit.shared_prefix.prompt_cache import unwrap_peft
from mig_kit.stages import sft, synthesize
from mig_kit.training import resuming
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()


def rows_of_all_tasks(box_format):
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(2)]
    traces = synthesize.RuleBasedTraces(samples, 0, box_format, error_rate=0.0)
    return samples, [trace.text for trace in traces]


@pytest.fixture
def rows():
    return rows_of_all_tasks(BOX_FORMAT)


@pytest.fixture
def make_trainer(random_folder, float32, stage_params):
    """Call it for a trainer of the random model, or of another, in 4 bit with a new adapter."""
    def make(folder, model=random_folder, box_format=BOX_FORMAT, **changes):
        settings = {"num_train_epochs": 1.0, "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "warmup_steps": 1}
        params = stage_params("02_sft", **(settings | changes))
        policy = sft.load_qlora_policy(model, float32, box_format, resuming.lora_config(4), 0)
        return sft.sft_trainer(policy, *rows_of_all_tasks(box_format), folder, params)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", ["", *(
    pytest.param(family, marks=pytest.mark.nightly)
    for family in ("qwen3_vl", "qwen3_5"))])
def test_loss_falls_and_only_the_adapter_moves(tmp_path, relatives, random_folder, make_trainer,
                                               family):
    box_format = BoxFormat(coordinates="normalized_1000" if family else "absolute")
    samples, replies = rows_of_all_tasks(box_format)
    assert not any(filters.drop_reason(reply, sample, box_format)
                   for reply, sample in zip(replies, samples))
    trainer = make_trainer(
        tmp_path, relatives[family] if family else random_folder, box_format,
        num_train_epochs=6.0, per_device_train_batch_size=10, learning_rate=2e-2)
    before = {name: parameter.detach().clone()
              for name, parameter in trainer.model.named_parameters() if "visual" in name}
    resuming.train_or_resume(trainer, tmp_path)
    curve = sft.loss_curve(trainer.state.log_history)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == {name for name in after if "lora_" in name}
    adapter = trainer.model.peft_config["default"]
    assert adapter.lora_alpha == 2 * adapter.r


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_figures_and_gradients_are_trls(tmp_path, make_trainer, rows, checkpointed):
    trainer = make_trainer(tmp_path)
    model, policy = trainer.model, trainer.cache
    set_random_adapter(model)
    if checkpointed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    chosen = [0, 7, 12, 19]
    collate = DataCollatorForVisionLanguageModeling(policy.processor, completion_only_loss=True)
    stock_batch = collate([sft.sft_row(rows[0][row], rows[1][row], BOX_FORMAT) for row in chosen])
    own_batch = trainer.collate([trainer.train_dataset[row] for row in chosen])

    def loss_and_gradients(compute_loss, batch):
        model.zero_grad()
        logged = trainer._metrics["train"]
        logged.clear()
        trainer._total_train_tokens = 0
        loss = compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(100))
        loss.backward()
        if compute_loss == trainer.compute_loss:
            trainer.log_figures()
        figures = {name: logged[name][0]
                   for name in ("entropy", "mean_token_accuracy", "num_tokens")}
        gradients = {name: parameter.grad.clone()
                     for name, parameter in model.named_parameters() if parameter.requires_grad}
        return loss.item(), figures, gradients

    loss, figures, gradients = loss_and_gradients(trainer.compute_loss, own_batch)
    stock = super(sft.CompletionLossTrainer, trainer).compute_loss
    stock_loss, stock_figures, stock_gradients = loss_and_gradients(stock, stock_batch)
    assert loss == pytest.approx(stock_loss, rel=1e-5)
    assert figures == pytest.approx(stock_figures, rel=1e-5)
    assert len(gradients) == 28
    for name, gradient in gradients.items():
        expected = stock_gradients[name]
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


CHANGES = [
    {"adam_beta1": 0.5}, {"adam_beta2": 0.9}, {"adam_epsilon": 0.01}, {"max_grad_norm": 1e-7},
    {"optim": "sgd"}, {"optim": "adafactor"}, {"weight_decay": 10.0}, {"max_steps": 2},
    {"lr_scheduler_kwargs": {"num_cycles": 2.0}},
    *({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": value}}
      for value in (False, True))]


@pytest.fixture(scope="module")
def updates_without_changes():
    return []


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, *CHANGES], ids=str)
def test_what_is_allowed_in_trl_updates_as_stock_trl(tmp_path, make_trainer, rows, changes,
                                                     updates_without_changes):
    assert {name for change in CHANGES for name in change} == set(ALLOWED)
    own, other = (make_trainer(tmp_path, trl={"max_steps": 3} | changes) for _ in range(2))
    stock = SFTTrainer(
        other.model, other.args, processing_class=other.cache.processor,
        train_dataset=Dataset.from_list([sft.sft_row(*pair, BOX_FORMAT) for pair in zip(*rows)]))
    resuming.train_in_float32(stock.model)
    updates = []
    for trainer in (own, stock):
        set_random_adapter(trainer.model)
        before = trained_weights(trainer)
        trainer.train()
        updates.append(trained_weights(trainer) - before)
    assert own.state.global_step == stock.state.global_step == changes.get("max_steps", 3)
    assert (updates[0] - updates[1]).norm() <= 1e-3 * updates[1].norm() > 0
    if not changes:
        updates_without_changes.append(updates[0])
    elif updates_without_changes and "gradient_checkpointing" not in changes:
        unchanged, = updates_without_changes
        assert (updates[0] - unchanged).norm() > 0.01 * unchanged.norm(), "the setting acts"


def trained_weights(trainer):
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()
                      if weight.requires_grad])


@pytest.mark.slow
def test_two_traces_of_a_question_teach_what_they_teach_apart(tmp_path, make_trainer, rows):
    """Their prompt is read once; figures are of all tokens, in however many parts."""
    samples, replies = rows[0][:6], rows[1][:6]
    samples = [sample for sample in samples for _ in range(2)]
    replies = [text for reply in replies
               for text in (reply, reply.replace("<think>", "<think>Well. "))]
    table = sft.sft_table(samples, replies, BOX_FORMAT)
    assert table["rows"][:] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    trainer = make_trainer(tmp_path)
    trainer.samples, trainer.replies = samples, replies
    set_random_adapter(trainer.model)

    def learn(*parts):
        trainer.model.zero_grad()
        trainer._metrics["train"].clear()
        loss = 0.0
        for part in parts:
            batch = trainer.collate([{"rows": numbers, "is_filler": False} for numbers in part])
            value = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))
            value.backward()
            loss += value.item()
        trainer.log_figures()
        figures = {name: trainer._metrics["train"][name][0]
                   for name in ("entropy", "mean_token_accuracy")}
        return loss, figures, torch.cat([weight.grad.flatten() for weight
                                         in trainer.model.parameters() if weight.requires_grad])

    loss, figures, gradient = learn(table["rows"][:4], table["rows"][4:])
    apart, figures_apart, gradient_apart = learn([[row] for row in range(12)])
    assert loss == pytest.approx(apart, rel=1e-5)
    assert figures == pytest.approx(figures_apart, rel=1e-5)
    assert (gradient - gradient_apart).norm() <= 1e-5 * gradient_apart.norm()


@pytest.mark.slow
def test_an_image_goes_through_the_tower_once_and_a_prompt_is_encoded_once(tmp_path, make_trainer,
                                                                          rows):
    trainer = make_trainer(tmp_path, num_train_epochs=3.0, per_device_train_batch_size=5)
    seen = []
    unwrap_peft(trainer.model).model.visual.register_forward_pre_hook(
        lambda module, arguments, given: seen.append(len(given["grid_thw"])), with_kwargs=True)
    trainer.train()
    digests = {digest for sample in rows[0] for digest in image_digests(sample.images)}
    checked_before = {digest for sample in rows[0][:4] for digest in image_digests(sample.images)}
    assert sum(seen) == len(digests - checked_before) > 20
    assert len(trainer.cache.texts) == len(trainer.completions) == len(rows[0])


def test_answers_alone_are_learned_without_reasoning(tmp_path, stage_params):
    samples, replies = rows_of_all_tasks(BOX_FORMAT)
    traces = [Trace(reply, "", "") for reply in replies]
    write_samples(tmp_path / "cot.parquet", samples, traces)
    rows = {reasoning: sft.read_traces(tmp_path / "cot.parquet",
                                       stage_params("02_sft", reasoning=reasoning))
            for reasoning in (True, False)}
    assert [sample.id for sample in rows[True][0]] == [sample.id for sample in rows[False][0]]
    for sample, reply, answer in zip(*rows[True], rows[False][1]):
        assert answer.startswith("<answer>") and reply.endswith(f"</think>{answer}")
        read = read_reply(answer, sample, BOX_FORMAT)
        assert is_correct(read, sample), "an answer alone still counts"


def test_like_lengths_are_together_within_an_update_only():
    lengths = [(7 * i) % 30 for i in range(25)]
    rows = sft.LengthGroupedSampler(lengths, 10, seed=3)
    first, again = list(rows), list(rows)
    rows.set_epoch(1)
    second = list(rows)
    assert first == again != second and len(rows) == 25
    assert sorted(first) == sorted(second) == list(range(25))
    for update in (first[:10], first[10:20], first[20:], second[:10]):
        assert [lengths[i] for i in update] == sorted(lengths[i] for i in update)
    shuffled = torch.randperm(25, generator=torch.Generator().manual_seed(3_000_009)).tolist()
    assert [set(first[:10]), set(first[10:20])] == [set(shuffled[:10]), set(shuffled[10:20])]


def test_processes_get_like_lengths_side_by_side():
    lengths = list(range(20))
    rows = list(sft.LengthGroupedSampler(lengths, 8, seed=3, batch=2, processes=2))
    alone = list(sft.LengthGroupedSampler(lengths, 8, seed=3))
    for start in (0, 8):
        a, b, c, d, e, f, g, h = alone[start:start + 8]
        assert rows[start:start + 8] == [a, c, b, d, e, g, f, h]
    assert sorted(rows) == lengths


def test_rows_are_filled_up_for_several_processes_with_rows_that_teach_nothing(
        tmp_path, make_trainer, rows):
    first = [part[:18] for part in rows]
    table, filled = (sft.sft_table(*first, BOX_FORMAT, multiple) for multiple in (1, 8))
    assert len(filled) == 24 and filled[17] == table[17]
    shortest = min(range(18), key=table["length"][:].__getitem__)
    assert filled[18] == filled[23] == {**table[shortest], "is_filler": True}
    sampler = sft.LengthGroupedSampler(filled["length"][:], 8, seed=3, fillers=6)
    one_process = sft.LengthGroupedSampler(table["length"][:], 8, seed=3)
    assert len(sampler) == 24 and list(sampler) == [*one_process, *range(18, 24)]
    trainer = make_trainer(tmp_path)
    batch = trainer.collate([filled[0], filled[18]])
    assert (batch["labels"][0] != -100).any() and (batch["labels"][1] == -100).all()
    losses = [trainer.compute_loss(trainer.model, trainer.collate(parts))
              for parts in ([filled[0]], [filled[0], filled[18]], [filled[18]])]
    assert losses[0] == losses[1] > 0 == losses[2] and losses[2].requires_grad


@pytest.mark.slow
def test_an_update_in_parts_has_the_same_gradient(tmp_path, make_trainer, first_gradients):
    recorded = []
    for name, size, parts in (("at once", 20, 1), ("in parts", 5, 4)):
        trainer = make_trainer(tmp_path / name, per_device_train_batch_size=size,
                               gradient_accumulation_steps=parts, warmup_steps=0)
        set_random_adapter(trainer.model)
        gradients = first_gradients(trainer)
        trainer.train()
        assert trainer.state.global_step == 1
        recorded.append(gradients)
    at_once, in_parts = recorded
    assert len(at_once) == 28
    for name, gradient in at_once.items():
        assert (gradient - in_parts[name]).abs().max() < 1e-5 * gradient.abs().max(), name


@pytest.mark.slow
def test_resume_in_the_second_pass_gives_the_same_adapter(tmp_path, make_trainer):
    settings = {"num_train_epochs": 2.0, "per_device_train_batch_size": 5, "save_steps": 3,
                "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    uninterrupted = make_trainer(tmp_path / "uninterrupted", **settings)
    resuming.train_or_resume(uninterrupted, tmp_path / "uninterrupted")
    first = make_trainer(tmp_path / "cut", **settings)
    first.add_callback(StopAfter(3))
    first.train()
    resumed = make_trainer(tmp_path / "cut", **settings)
    taken, step = [], resumed.training_step
    resumed.training_step = lambda *given, **more: taken.append(1) or step(*given, **more)
    resuming.train_or_resume(resumed, tmp_path / "cut")
    assert len(taken) == 2, "one update of two steps is left"
    assert resumed.state.global_step == uninterrupted.state.global_step == 4
    expected = dict(uninterrupted.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_learning_warning_by_hand():
    def warn(*losses):
        return sft.learning_warning([{"loss": loss} for loss in losses])

    assert warn(2.0, 9.0, 9.0, 9.0, 1.9) == warn(3.0, 1.0, *[2.0] * 6, 1.9, 1.8) == ""
    assert warn(2.0, 1.0, 1.0, 1.0, 2.0).startswith("the loss did not fall in 5 updates (2.00 -> 2")
    # a fifth of ten is two: single updates would have fallen
    assert "(2.00 -> 2.50); train longer" in warn(3.0, 1.0, *[0.0] * 6, 4.0, 1.0)
    assert "in 1 updates (2.00 -> 2.00)" in warn(2.0)


def test_newest_complete_checkpoint(tmp_path):
    for step, is_complete in ((5, True), (20, True), (100, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if is_complete:
            (folder / "trainer_state.json").write_text('{"global_step": 5}')
    cut = tmp_path / "checkpoints" / "checkpoint-30"
    cut.mkdir()
    (cut / "trainer_state.json").write_text('{"global_step": 3')
    assert resuming.last_checkpoint(tmp_path).endswith("checkpoint-20")
    assert resuming.last_checkpoint(tmp_path / "none") is None


def test_curves_go_to_a_tracker_only_where_one_is_named(tmp_path, monkeypatch):
    variables = ("WANDB_DIR", "TENSORBOARD_LOGGING_DIR")
    for name in variables:
        monkeypatch.setenv(name, "unset afterwards")
        monkeypatch.delenv(name)
    assert resuming.tracker_arguments("none", tmp_path) == {"report_to": "none"}
    assert not {*variables} & {*os.environ}
    folder = tmp_path / "02_sft.unfinished"
    assert resuming.tracker_arguments("wandb", folder)["report_to"] == "wandb"
    assert [os.environ[name] for name in variables] == [
        str(tmp_path), str(tmp_path / "tensorboard" / "02_sft")], "not in the clone"


def test_the_time_left_follows_the_last_steps(monkeypatch, capsys):
    """Five steps took a minute each, the next five a second."""
    lines, now = resuming.ProgressLines(("loss",)), 0.0
    monkeypatch.setattr(resuming.time, "monotonic", lambda: now)
    lines.on_train_begin(None, SimpleNamespace(global_step=0), None)
    for step in range(1, 11):
        now += 60.0 if step <= 5 else 1.0
        state = SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)
        lines.on_log(None, state, None, logs={"loss": 0.5})
    assert capsys.readouterr().out == (
        "step 5/100: loss 0.500; 95.0 min left\nstep 10/100: loss 0.500; 1.5 min left\n")
