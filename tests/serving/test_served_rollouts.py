"""Stage 05 over a double of a server: adapters move, ratios are 1, and an old one is refused."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from launched import StopAfter
from rollout_server import RolloutServer

from mig_kit import rewards
from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.models import loading
from mig_kit.sample import write_samples
from mig_kit.serving.served_rollouts import DIFFERENCE, StopIfServerDiffers
from mig_kit.stages import grpo
from mig_kit.training import resuming
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
    "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0, "scale_rewards": "group", "max_completion_length": 8, "save_steps": 1,
    "lora_r": 4, "concurrency": 2}


@pytest.fixture
def make_served(random_folder, float32, stage_params, tmp_path, monkeypatch):
    """Call it with changed parameters for a trainer and the server that draws for it.

    A random model earns no reward; here a reply earns by its letters.
    """
    monkeypatch.setitem(rewards.REWARDS, "format",
                        lambda answer, sample: len(set(answer.text)) / 10)

    def make(change=lambda body, answer: answer, server=None, fault="", **changes):
        server = server or RolloutServer(
            loading.load_policy(random_folder, float32, BOX_FORMAT), change=change, fault=fault)
        samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)]
        policy = loading.load_policy(random_folder, float32, BOX_FORMAT)
        torch.manual_seed(0)
        params = stage_params("05_grpo", server=server.url, **(SETTINGS | changes))
        return grpo.grpo_trainer(policy, samples, tmp_path, params), server

    return make


def updates(server):
    """Numbers of the updates whose adapters a server has loaded."""
    return [name.split("-")[1] for name in server.loaded if name.startswith("step-")]


def test_adapters_move_and_ratios_are_one(make_served):
    trainer, server = make_served()
    trainer.train()
    rows = grpo.training_curves(trainer.state.log_history)
    assert len(rows) == 3 and all(abs(row["ratio"] - 1) < 1e-3 for row in rows)
    assert updates(server) == ["1", "2", "3"] and server.loaded[0].startswith("canary-")
    assert server.loaded[::2] == server.loaded[:1] * 3, "the canary is tried before every update"
    hashes = {name.rpartition("-")[2] for name in server.loaded}
    assert len(hashes) == 4, "an adapter did not change"
    assert server.unloaded == server.loaded[:5]
    asked = [body["model"] for body in server.bodies]
    assert [asked.count(name) for name in ("sft", *server.loaded[:2])] == [3, 3, 4]


def test_a_run_from_the_base_is_drawn_by_the_server_of_that_name(make_served, random_folder,
                                                                 float32):
    server = RolloutServer(loading.load_policy(random_folder, float32, BOX_FORMAT), name="base")
    trainer, _ = make_served(server=server, start_from="base", max_steps=1)
    trainer.train()
    assert server.bodies[0]["model"] == "base"


def test_a_server_that_outlives_a_killed_stage_keeps_its_adapter(make_served, tmp_path):
    trainer, server = make_served()
    trainer.add_callback(StopAfter(2))
    resuming.train_or_resume(trainer, tmp_path)
    killed, _ = make_served(server=server)
    draw = killed.served.draw

    def draw_and_end(*arguments):
        draw(*arguments)
        raise KeyboardInterrupt

    killed.served.draw = draw_and_end
    with pytest.raises(KeyboardInterrupt):
        resuming.train_or_resume(killed, tmp_path)
    resumed, _ = make_served(server=server)
    resuming.train_or_resume(resumed, tmp_path)
    assert updates(server) == ["1", "2", "3"]
    assert len(grpo.training_curves(resumed.state.log_history)) == 3


def test_a_server_that_is_started_again_is_not_asked_to_unload(make_served):
    trainer, server = make_served(lambda body, answer: server.adapters.clear() or answer)
    trainer.train()
    assert updates(server) == ["1", "2", "3"] and server.unloaded == []


def test_completions_that_are_all_masked_are_no_error(make_served):
    trainer, _ = make_served(mask_truncated_completions=True, max_steps=1,
                             max_completion_length=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0


def test_replies_that_are_learnt_from_twice_are_drawn_once(make_served, tmp_path):
    """The second update has the ratio of the first, learner to server, beside that of new to old.
    """
    trainer, server = make_served(num_iterations=2, max_steps=6, epsilon=0.01)
    trainer.train()
    rows = grpo.training_curves(trainer.state.log_history)
    ratios = [row["ratio"] for row in rows]
    assert updates(server) == ["1", "3", "5"] and server.unloaded == server.loaded[:5]
    assert ratios == pytest.approx([1.0] * 3, abs=1e-3), "the weights' change is in the other one"
    assert all(row["clip_ratio"] > 0 for row in rows)
    kept = sorted(path.name for path in (tmp_path / "checkpoints" / "served").iterdir())
    assert kept == ["canary", "step-5"]


def test_what_servers_drew_with_is_deleted_when_it_has_been_learnt_from(
        make_served, random_folder, stage_params, tmp_path):
    _, server = make_served()
    kept = tmp_path / "kept.parquet"
    write_samples(kept, [make_sample(task, "rl", i) for task in TASKS for i in range(2)])
    params = stage_params("05_grpo", server=server.url, dtype="float32", **SETTINGS)
    folder = tmp_path / "run" / "05_grpo"
    grpo.train(folder, SimpleNamespace(**vars(params), **vars(BOX_FORMAT)), kept, random_folder)
    assert updates(server) == ["1", "2", "3"] and (folder / "adapter").is_dir()
    left = {path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()}
    assert left == {"checkpoint-3"}


def test_the_correction_reaches_the_loss(make_served, first_gradients):
    """Token by token: TRL's default would multiply a reply's ratios, and 8 of them give e^-8."""
    def shift(body, answer):  # the server claims e times the learner's probability of every token
        for choice in answer["choices"]:
            for token in choice["logprobs"]["content"]:
                token["logprob"] += 1.0
        return answer

    gradients = []
    for correction in (True, False):
        trainer, _ = make_served(shift, max_steps=1, trl={
            "vllm_importance_sampling_correction": correction})
        gradients.append(first_gradients(trainer))
        trainer.train()
    assert max(gradient.abs().max() for gradient in gradients[1].values()) > 1e-4
    for name, corrected in gradients[0].items():
        expected = gradients[1][name] * torch.tensor(-1.0).exp()
        assert torch.allclose(corrected, expected, rtol=1e-2, atol=1e-6), name


@pytest.mark.parametrize("option", [{"min_p": 0.1}, {"top_k": 5}, {"repetition_penalty": 1.1}])
def test_an_option_that_no_request_holds_is_refused(make_served, monkeypatch, option):
    arguments = resuming.trainer_arguments
    monkeypatch.setattr(resuming, "trainer_arguments", lambda *own, **others: arguments(
        *own, **others, **option))
    with pytest.raises(ValueError, match=f"servers are not asked for {next(iter(option))}; take"):
        make_served()


@pytest.mark.parametrize(("changed", "fault", "sentence"), [
    ({"model": "step-0"}, "", "answered as 'step-0'.*it has an old adapter"),
    ({}, "ignores adapters", "takes adapters and ignores them: one with large")])
def test_an_old_or_ignored_adapter_is_noticed_before_the_first_update(make_served, changed, fault,
                                                                       sentence):
    trainer, server = make_served(lambda body, answer: answer | changed, fault=fault)
    with pytest.raises(UserError, match=sentence):
        trainer.train()
    assert trainer.state.global_step == 0 and updates(server) == []


def test_a_server_that_loses_its_adapters_is_noticed_before_the_next_update(make_served):
    def lose(body, answer):
        if len(server.bodies) == 10:  # with the second update's last reply, as by sleeping
            server.fault = "ignores adapters"
        return answer

    trainer, server = make_served(lose)
    with pytest.raises(UserError, match="it has lost them since the last update; start it"):
        trainer.train()
    assert trainer.state.global_step == 2 and updates(server) == ["1", "2"]


def test_a_server_with_old_weights_ends_the_run_and_a_new_one_goes_on(make_served, tmp_path):
    changes = {"max_steps": 12, "learning_rate": 0.1}
    trainer, _ = make_served(fault="keeps weights", **changes)
    with pytest.raises(UserError, match="more than 0.15: the server draws with other weights"):
        resuming.train_or_resume(trainer, tmp_path)
    rows = grpo.training_curves(trainer.state.log_history)
    assert abs(rows[0]["ratio"] - 1) < 1e-3
    resumed, _ = make_served(**changes)
    resuming.train_or_resume(resumed, tmp_path)
    ratios = [row["ratio"] for row in grpo.training_curves(resumed.state.log_history)]
    assert len(ratios) == 12 and ratios[len(rows):] == pytest.approx([1.0] * (12 - len(rows)),
                                                                     abs=1e-2)


@pytest.mark.parametrize(("differences", "ends"), [
    ((4.0, 0.2, 0.16), True), ((0.01, 0.3, 0.3, 0.3), True), ((0.3, 0.3), False),
    ((0.3, 0.15, 0.3, 0.3), False), ((0.006, 0.017, 0.01), False)])
def test_only_three_updates_in_sequence_that_are_apart_end_a_run(differences, ends):
    callback = StopIfServerDiffers()
    with pytest.raises(UserError, match="last checkpoint") if ends else nullcontext():
        for difference in differences:
            callback.on_log(None, None, None, {"loss": 0.1, DIFFERENCE: difference})
            callback.on_log(None, None, None, {"loss": 0.1})  # learns again from these
