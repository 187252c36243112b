"""Stage 02 on a random model."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mig_kit import filters
from mig_kit.boxes import BoxFormat
from mig_kit.engine import models, training
from mig_kit.engine.models import unwrap_peft
from mig_kit.engine.training import StopAfter
from mig_kit.stages import sft, synthesize
from mig_kit.world.tasks import TASKS, make_sample

VIEW = BoxFormat()


@pytest.fixture
def table():
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(2)]
    traces = synthesize.write_traces(samples, 0, (1, 1, 1), 0.0, 0.7, box_format=BoxFormat())
    return sft.sft_rows(samples, [t.text for t in traces], VIEW)


@pytest.mark.slow
def test_loss_falls_and_only_the_adapter_moves(tmp_path, random_folder, float32, processor, table):
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "visual" in n}
    trainer = sft.sft_trainer(model, processor, table, float32, tmp_path, epochs=6, batch_size=10, gradient_accumulation=1,
                          learning_rate=2e-2, warmup=1, seed=0, save_steps=100)
    trainer.train()
    curve = sft.loss_curve(trainer.state.log_history)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5
    assert all((p == before[n]).all() for n, p in model.named_parameters() if "visual" in n)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {n for n, _ in model.named_parameters() if "lora_" in n}


def test_rows_are_rounded_and_teach_the_same(tmp_path, random_folder, float32, processor, table):
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, processor, table, float32, tmp_path, epochs=1, batch_size=4, gradient_accumulation=1,
                          learning_rate=1e-3, warmup=1, seed=0, save_steps=100)
    assert {trainer.data_collator([table[i] for i in rows])["input_ids"].shape[1] % 32 for rows in ((0, 1), (5, 9, 13))} == {0}
    batch = trainer.data_collator([table[i] for i in range(4)])
    longest = int(batch["attention_mask"].sum(1).max())
    assert longest % 32
    per_token = ("input_ids", "attention_mask", "labels", "mm_token_type_ids")
    cut = {name: value[:, :longest] if name in per_token else value for name, value in batch.items()}
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(model(**cut).loss.item(), abs=1e-6)


def test_only_states_with_loss_reach_the_head_and_teach_the_same(tmp_path, random_folder, float32, processor, table):
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, processor, table, float32, tmp_path, epochs=1, batch_size=4, gradient_accumulation=1,
                          learning_rate=1e-3, warmup=1, seed=0, save_steps=100)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    batch, states = trainer.data_collator([table[i] for i in (0, 7, 12, 19)]), []
    unwrap_peft(model).model.register_forward_hook(lambda module, given, output: states.append(tuple(output.last_hidden_state.shape[:2])))

    def learnt(loss_of):
        model.zero_grad()
        trainer._metrics["train"].clear()
        loss = loss_of(model, dict(batch), num_items_in_batch=torch.tensor(100))
        loss.backward()
        figures = {name: trainer._metrics["train"][name][0] for name in ("entropy", "mean_token_accuracy")}
        return loss.item(), figures, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    loss, figures, gradients = learnt(trainer.compute_loss)
    theirs, their_figures, their_gradients = learnt(super(sft.CompletionLossTrainer, trainer).compute_loss)
    assert states == [(1, int((batch["labels"] != -100).sum())), tuple(batch["input_ids"].shape)]
    assert loss == pytest.approx(theirs, rel=1e-5) and figures == pytest.approx(their_figures, rel=1e-4)
    for name, gradient in gradients.items():
        assert (gradient.float() - their_gradients[name].float()).norm() <= 1e-2 * their_gradients[name].float().norm(), name


def test_between_bf16_products_the_language_model_stays_in_bf16(random_folder, float32):
    model = sft.load_qlora_model(random_folder, dataclasses.replace(float32, autocast=True), training.lora_config(4, 8), 0)
    plain = {n: p.dtype for n, p in model.named_parameters() if p.dtype.is_floating_point and "lora_" not in n}
    assert {dtype for name, dtype in plain.items() if "visual" in name} == {torch.float32}
    assert {dtype for name, dtype in plain.items() if "visual" not in name} == {torch.bfloat16}


def test_like_lengths_are_together_within_an_update_only():
    lengths = [(7 * i) % 30 for i in range(25)]
    rows = sft.LengthGroupedSampler(lengths, 10, seed=3)
    first, again = list(rows), list(rows)
    rows.set_epoch(1)
    second = list(rows)
    assert first == again != second and sorted(first) == sorted(second) == list(range(25)) and len(rows) == 25
    for update in (first[:10], first[10:20], first[20:], second[:10]):
        assert [lengths[i] for i in update] == sorted(lengths[i] for i in update)
    shuffled = torch.randperm(25, generator=torch.Generator().manual_seed(3_000_009)).tolist()
    assert [set(first[:10]), set(first[10:20])] == [set(shuffled[:10]), set(shuffled[10:20])]


@pytest.mark.slow
def test_an_update_in_parts_has_the_same_gradient(tmp_path, random_folder, float32, processor, table, first_gradients):
    found = []
    for name, size, parts in (("whole", 20, 1), ("parts", 5, 4)):
        model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
        made = sft.sft_trainer(model, processor, table, float32, tmp_path / name, epochs=1, batch_size=size,
                           gradient_accumulation=parts, learning_rate=1e-3, warmup=0, seed=0, save_steps=100)
        for parameter in made.model.parameters():  # TRL makes the adapter bfloat16 on a 4-bit model, and sums gradients in it
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
        gradients = first_gradients(made)
        made.train()
        assert made.state.global_step == 1
        found.append(gradients)
    assert len(found[0]) == 28
    gaps = {name: ((whole - found[1][name]).abs().max() / whole.abs().max()).item() for name, whole in found[0].items()
            if whole.abs().max() > 0}
    assert gaps and max(gaps.values()) < 1e-5, gaps


@pytest.mark.slow
@pytest.mark.parametrize(("size", "parts"), [(10, 1), (5, 2)])
def test_resume_in_the_second_pass_gives_the_same_adapter(tmp_path, random_folder, float32, processor, table, size, parts):
    def made(name):
        model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
        return sft.sft_trainer(model, processor, table, float32, tmp_path / name, epochs=2, batch_size=size,
                           gradient_accumulation=parts, learning_rate=1e-2, warmup=1, seed=0, save_steps=3)
    whole = made("whole")
    training.train_or_resume(whole, tmp_path / "whole")
    first = made("cut")
    first.add_callback(StopAfter(3))
    first.train()
    again = made("cut")
    training.train_or_resume(again, tmp_path / "cut")
    assert again.state.global_step == whole.state.global_step == 4
    for (name, x), (_, y) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(x, y), name


def test_loss_is_on_the_reply_only(tmp_path, random_folder, float32, processor, table):
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, processor, table, float32, tmp_path, epochs=1, batch_size=4, gradient_accumulation=1,
                          learning_rate=1e-3, warmup=1, seed=0, save_steps=100)
    batch = trainer.data_collator([table[0]])
    learnt = processor.tokenizer.decode(batch["labels"][batch["labels"] != -100])
    assert learnt.strip() == table[0]["completion"][0]["content"][0]["text"] + "<|im_end|>"
    models.check_tokens(processor, batch)


def test_newest_whole_checkpoint(tmp_path):
    for step, whole in ((5, True), (20, True), (100, False)):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        if whole:
            (folder / "trainer_state.json").write_text("{}")
    assert training.last_checkpoint(tmp_path).endswith("checkpoint-20")
    assert training.last_checkpoint(tmp_path / "none") is None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_relatives_learn_boxes_in_thousandths(tmp_path, relatives, family, float32):
    box_format = BoxFormat(frame="thousand")
    samples = [make_sample(task, "cot", i) for task in TASKS for i in range(2)]
    replies = [t.text for t in synthesize.write_traces(samples, 0, (1, 1, 1), 0.0, 0.7, box_format)]
    assert all(filters.drop_reason(r, s, box_format) == "" for r, s in zip(replies, samples))
    table = sft.sft_rows(samples, replies, box_format)
    model = sft.load_qlora_model(relatives[family], float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, models.load_processor(relatives[family], box_format), table, float32, tmp_path, epochs=6, batch_size=10,
                          gradient_accumulation=1, learning_rate=2e-2, warmup=1, seed=0, save_steps=100)
    training.train_or_resume(trainer, tmp_path)
    curve = sft.loss_curve(trainer.state.log_history)
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.5


def test_curves_go_to_a_tracker_only_where_one_is_named(tmp_path, monkeypatch):
    assert training.tracker_args("none", tmp_path) == {"report_to": "none"}
    with pytest.raises(ValueError, match="use none, trackio or wandb"):
        training.tracker_args("all", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="run: pip install wandb"):
        training.tracker_args("wandb", tmp_path)


@pytest.mark.slow
def test_trackio_gets_the_curve(tmp_path, random_folder, float32, processor, table, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported
    pytest.importorskip("trackio")
    model = sft.load_qlora_model(random_folder, float32, training.lora_config(4, 8), 0)
    trainer = sft.sft_trainer(model, processor, table, float32, tmp_path / "mine" / "02_sft", epochs=1, batch_size=10,
                          gradient_accumulation=1, learning_rate=1e-3, warmup=1, seed=0, save_steps=100, track="trackio")
    trainer.train()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert b"mine/02_sft" in stored and b"mean_token_accuracy" in stored


def test_live_curves_are_drawn_in_a_notebook_and_removed(monkeypatch):
    shown = []
    handle = SimpleNamespace(update=shown.append)
    history = [{"step": i, "loss": 1 / i, "mean_token_accuracy": 0.5} for i in (1, 2, 3)]
    state = SimpleNamespace(log_history=history, global_step=3, max_steps=9)
    monkeypatch.setattr(training, "display", lambda figure, display_id: shown.append(figure) or handle)
    live = training.LiveCurves(sft.loss_curve, ("loss", "token_accuracy"), seconds=0)
    live.on_log(None, state, None)
    assert shown == [], "no notebook, no picture"
    monkeypatch.setattr(training, "get_ipython", object)
    for _ in range(2):
        live.on_log(None, state, None)
    live.on_train_end(None, state, None)
    assert [axis.get_title() for axis in shown[0].axes] == ["loss", "token accuracy"]
    assert len(shown) == 3 and shown[2].data == ""
