"""Stage 05 on a random model; its loss against stock TRL's: shared_prefix/test_losses.py."""

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import accelerate
import bitsandbytes
import pytest
import torch
from benchmark_files import correct_reply
from launched import StopAfter
from torch.utils.data import DataLoader
from trl import GRPOTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import RepeatSampler

from mig_kit.boxes import BoxFormat, iou
from mig_kit.common import NOTEBOOKS, UserError
from mig_kit.models import loading
from mig_kit.prompts import correct_answer, parse_reply, read_reply
from mig_kit.rewards import REWARDS
from mig_kit.serving import stored_replies
from mig_kit.shared_prefix import generation, obstacles
from mig_kit.shared_prefix import trainer as trainer_module
from mig_kit.stages import grpo
from mig_kit.training import recipe_trainer, resuming, reward_loading
from mig_kit.training.reward_loading import as_completions
from mig_kit.world.suites import iter_free_form
from mig_kit.world.tasks import TASKS, make_sample

BOX_FORMAT = BoxFormat()
SETTINGS = {
    "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1,
    "max_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 1, "scale_rewards": "group", "max_completion_length": 8, "save_steps": 1,
    "lora_r": 4}


@pytest.fixture
def make_trainer(random_folder, float32, stage_params):
    def make(folder, hardware=float32, load=loading.load_policy, **changes):
        samples = [make_sample(task, "rl", i) for task in TASKS for i in range(2)]
        samples += list(iter_free_form("rl", 1))[:7]  # 27 in all: no pass ends with a step
        policy = load(random_folder, hardware, BOX_FORMAT)
        torch.manual_seed(0)
        params = stage_params("05_grpo", **(SETTINGS | changes))
        return grpo.grpo_trainer(policy, samples, folder, params)

    return make


def test_rewards_apply_where_they_mean_something():
    samples = [make_sample("diff", "rl", 0), next(iter_free_form("rl", 1))]
    reply = f"<think></think><answer>{samples[1].letter}</answer>"
    functions = grpo.reward_functions(reward_loading.score_functions(REWARDS, BOX_FORMAT), samples,
                                      BOX_FORMAT)
    scores = {reward.__name__: reward(completions=as_completions([reply, reply]), sample=[0, 1])
              for reward in functions}
    expected = {"format": [1.0, 1.0], "image": [0.0, None], "box": [0.0, None],
                "choice": [None, 1.0]}
    assert {name: scores[name] for name in expected} == expected


@pytest.mark.parametrize(("penalty", "format_score", "is_all_lost"), [
    ("none", 1, False), ("format", 0, False), ("all", 0, True)])
def test_citing_an_image_that_does_not_exist_costs(penalty, format_score, is_all_lost):
    sample = make_sample("diff", "rl", 0)
    answer = f"<answer>{correct_answer(sample, BOX_FORMAT)}</answer>"
    scores = reward_loading.score_functions(REWARDS, BOX_FORMAT, penalty)
    replies = (f"<think>image {n}: a.</think>{answer}" for n in (2, 3))
    sound, unsound = ([scores[name](read_reply(reply, sample, BOX_FORMAT), sample)
                       for name in ("format", "image", "box")] for reply in replies)
    assert sound[:2] == [1, 1] and sound[2] > 0.9
    assert unsound == ([0, 0, 0] if is_all_lost else [format_score, *sound[1:]])


def test_shares_of_what_replies_write_down():
    drawn, own = make_sample("diff", "rl", 0), replace(make_sample("diff", "rl", 1), notes=())
    replies = ["<think>Compare.</think>", "<think>Compare. new: b.</think>",
               "<think>image 1: a. image 2: b.</think>", "<think>image 1: a. image 2: b.</think>"]
    answers = list(map(parse_reply, replies))
    shares = grpo.detail_shares(answers, [drawn] * 4)
    assert shares == {"evidence": 0.5, "finding": 0.25, "method": 0.25}
    assert grpo.detail_shares(answers, [own] * 4) == {}
    assert grpo.detail_shares(answers, [own] * 3 + [drawn])["evidence"] == 1


def test_shares_of_what_is_true_and_of_what_is_listed():
    drawn, own = make_sample("diff", "rl", 0), replace(make_sample("diff", "rl", 1), notes=(),
                                                       spec=None)
    listed = drawn.notes[0].count(",") + 1
    replies = [f"<think>{' '.join(drawn.notes)}</think>",
               f"<think>{drawn.notes[0]} new: x.</think>",
               "<think>image 9: red star.</think>"]
    total = sum(note.count(",") + 1 for note in drawn.notes)
    answers = list(map(parse_reply, replies))
    assert grpo.reasoning_shares(answers, [drawn] * 3) == {
        "truth": 3 / 4, "coverage": (total + listed) / (3 * total)}
    assert grpo.reasoning_shares([parse_reply("")] * 2, [drawn] * 2) == {}
    assert grpo.reasoning_shares(answers, [own] * 3) == {}
    false, = grpo.describe_answer(answers[2], drawn, {}, {})["false"]
    assert replies[2][slice(*false)] == "image 9: red star."


def test_what_is_kept_of_a_rollout():
    sample = make_sample("diff", "rl", 0)
    answer = read_reply(correct_reply(sample, BOX_FORMAT), sample, BOX_FORMAT)
    rewards = {name: REWARDS[name] for name in ("box", "choice")}
    scores = reward_loading.score_functions(rewards, BOX_FORMAT)
    row = grpo.describe_answer(answer, sample, scores, {"box": 2.0})
    assert row["reward"] == 2 * row["rewards"]["box"] > 1.8 and row["rewards"]["choice"] is None
    assert row["correct"] and row["detail"] == "method"
    (image, box), = row["boxes"]
    assert image == sample.targets[0].image and iou(box, sample.targets[0].box) > 0.9
    assert grpo.describe_answer(parse_reply(""), sample, scores, {})["boxes"] == []


IN_TRLS_FORM = """
from trl.rewards import get_soft_overlong_punishment
overlong = get_soft_overlong_punishment(6, 4)
def shortest(completions, **kwargs):
    lengths = [len(c[0]["content"]) for c in completions]
    return [float(n == min(lengths)) for n in lengths]
def ids(completions, completion_ids, images, **kwargs):
    return [len(i) + image[0].width / 7 if len(image) > 2 else None
            for i, image in zip(completion_ids, images)]
class Judge:
    def __call__(self, prompts, completions, trainer_state, log_metric, log_extra, **kwargs):
        log_metric("judged", len(completions)), log_extra("mine", [1] * len(prompts))
        return [len(p[0]["content"]) + sum("image" in part for part in p[0]["content"]) / 8
                + trainer_state.max_steps for p in prompts]
judge = Judge()
"""


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
def test_rewards_in_trls_form_are_those_of_stock_trl(tmp_path, make_trainer, share_prefix):
    (tmp_path / "mine.py").write_text(IN_TRLS_FORM)
    names = ["overlong", "shortest", "ids", "judge"]
    references = [f"{tmp_path / 'mine.py'}:{name}" for name in names]
    reward_loading.copy_own_files(references, tmp_path)
    trainer = make_trainer(tmp_path, rewards=references, max_steps=1, share_prefix=share_prefix)
    stock, batches = GRPOTrainer._calculate_rewards, []

    def record(self, inputs, prompts, completions, ids):
        rewards = stock(self, inputs, prompts, completions, ids)
        batches.append((inputs, completions, ids, rewards))
        return rewards

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPOTrainer, "_calculate_rewards", record)
        trainer.train()
    (inputs, completions, ids, rewards), = batches
    assert len(rewards) == 8 and trainer.state.log_history[0]["judged"] == 8
    rows = make_trainer(tmp_path / "stock", share_prefix=False).train_dataset
    rows = [rows[row["sample"]] for row in inputs]
    loaded = reward_loading.load_rewards(references, tmp_path)
    trainer.reward_funcs = [loaded[name] for name in names]
    prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    expected = stock(trainer, rows, prompts, completions, ids)
    assert torch.equal(rewards.nan_to_num(-9), expected.nan_to_num(-9))
    assert expected.nan_to_num(-9).unique().numel() > 5


TRLS = """
from trl.trainer.utils import nanstd
def trls(rewards):
    return (rewards - rewards.nanmean(1, keepdim=True)) / (nanstd(rewards.flatten()) + 1e-4)
def flat(rewards):
    return rewards.flatten()
def endless(rewards):
    return rewards / 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [True, False])
def test_advantages_of_ones_own_stand_where_trls_would(tmp_path, make_trainer, share_prefix,
                                                       monkeypatch):
    monkeypatch.setitem(REWARDS, "format", lambda answer, sample: len(set(answer.text)) / 10)
    (tmp_path / "mine.py").write_text(TRLS)
    names = {name: f"{tmp_path / 'mine.py'}:{name}" for name in ("trls", "flat", "endless")}
    reward_loading.copy_own_files(list(names.values()), tmp_path)
    trainers = []
    for advantage in ("", names["trls"]):
        trainers.append(make_trainer(tmp_path, share_prefix=share_prefix, scale_rewards="batch",
                                     advantage=advantage, save_steps=9))
        torch.manual_seed(0)
        trainers[-1].train()
    check_same_training(*trainers)
    assert trainers[0]._logs["advantages"] == trainers[1]._logs["advantages"]
    assert any(trainers[0]._logs["advantages"])
    for name, sentence in (("flat", "one per reply"), ("endless", "not finite")):
        with pytest.raises(UserError, match=sentence):
            make_trainer(tmp_path, share_prefix=share_prefix, advantage=names[name]).train()


def test_advantages_by_hand():
    guide = NOTEBOOKS / "guide" / "advantages.py"
    maxrl, rloo = (reward_loading.load_function(f"{guide}:{name}", None)
                   for name in ("maxrl", "rloo"))
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(recipe_trainer.own_advantages(maxrl, rewards), torch.tensor(
        [[3.0, -1, -1, -1], [1 / 3, 1 / 3, 1 / 3, -1], [0, 0, 0, 0]]))
    assert torch.allclose(recipe_trainer.own_advantages(rloo, rewards)[0], torch.tensor(
        [1, -1 / 3, -1 / 3, -1 / 3]))
    rewards[2] = torch.nan
    assert not recipe_trainer.own_advantages(rloo, rewards)[2].any(), "no reward applies"


@pytest.mark.slow
def test_rollouts_are_kept_and_change_nothing_nor_does_a_kill_after_the_last_step(
        tmp_path, make_trainer, monkeypatch):
    trainers = []
    for steps in (99, 1):
        monkeypatch.setattr(grpo, "ROLLOUT_STEPS", steps)
        trainers.append(make_trainer(tmp_path / str(steps)))
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
    check_same_training(*trainers)
    rows = stored_replies.load_rollouts(tmp_path / "1")
    assert [row["step"] for row in rows] == [step for step in (0, 1, 2) for _ in range(16)]
    assert {row["prompt"] for row in rows} == {0, 6, 13, 20}
    assert all(row["rewards"].keys() == {"format", "image", "box", "choice"} for row in rows)
    assert {row["step"] for row in stored_replies.load_rollouts(tmp_path / "99")} == {0, 2}
    curves = grpo.training_curves(trainers[1].state.log_history)
    assert all(0 <= row["method"] + row["finding"] + row["evidence"] <= 1 for row in curves)
    resumed = make_trainer(tmp_path / "1")
    resuming.train_or_resume(resumed, tmp_path / "1")
    assert resumed.state.global_step == 2
    check_same_training(trainers[1], resumed)
    assert grpo.training_curves(resumed.state.log_history) == curves and len(curves) == 2


def test_no_rollouts_are_kept_whose_options_the_decoder_lacks(tmp_path, make_trainer):
    with pytest.warns(UserWarning, match="top_k"):
        trainer = make_trainer(tmp_path, trl={"top_k": 1})
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert stored_replies.load_rollouts(tmp_path) == []


@pytest.mark.slow
def test_no_step_is_kept_twice(tmp_path, make_trainer, monkeypatch):
    """Killed after the rollouts of step 2, but before its checkpoint."""
    monkeypatch.setattr(grpo, "ROLLOUT_STEPS", 1)
    first = make_trainer(tmp_path, max_steps=3)
    first.add_callback(StopAfter(1))
    resuming.train_or_resume(first, tmp_path)
    rows = stored_replies.load_rollouts(tmp_path)
    later = [{**row, "step": 2, "reply": "of a step that was lost"} for row in rows[:16]]
    text = "".join(json.dumps(row) + "\n" for row in rows + later)
    (tmp_path / stored_replies.ROLLOUTS).write_text(text)
    resuming.train_or_resume(make_trainer(tmp_path, max_steps=3), tmp_path)
    resumed = stored_replies.load_rollouts(tmp_path)
    assert [row["step"] for row in resumed] == [step for step in range(4) for _ in range(16)]
    assert resumed[:32] == rows and "lost" not in str(resumed)


def test_every_parameter_that_trl_knows_reaches_it(tmp_path, make_trainer, stage_params):
    args = make_trainer(tmp_path / "a").args
    assert args.loss_type == "dapo", "the notebook's, whatever TRL's default becomes"
    changes = {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.03, "temperature": 0.8,
               "max_completion_length": 9, "learning_rate": 3e-4, "lr_scheduler_type": "linear",
               "gradient_checkpointing": True, "max_steps": 7, "save_steps": 4, "warmup_steps": 3}
    args = make_trainer(tmp_path / "b", **changes).args
    assert {name: getattr(args, name) for name in changes} == changes
    params = stage_params("05_grpo")
    assert args.reward_weights == [params.reward_weights[name] for name in params.rewards]
    args = make_trainer(tmp_path / "c", rewards=["choice", "format"]).args
    assert args.reward_weights == [1.3, 0.2]


@pytest.mark.slow
@pytest.mark.parametrize("share_prefix", [
    True, pytest.param(False, marks=pytest.mark.nightly)])  # stock TRL, twenty seconds
def test_resume_in_the_second_pass_gives_the_same_adapter(tmp_path, make_trainer, share_prefix):
    settings = {"rewards": ["format"], "max_steps": 8, "save_steps": 7, "max_completion_length": 4,
                "per_device_train_batch_size": 16, "share_prefix": share_prefix}
    drawn = {}

    def train(name, folder, steps):
        trainer = make_trainer(tmp_path / folder, **settings)
        trainer.add_callback(StopAfter(steps))
        record_prompts(trainer, drawn.setdefault(name, []))
        resuming.train_or_resume(trainer, tmp_path / folder)
        return trainer

    uninterrupted = train("uninterrupted", "uninterrupted", 8)
    first = train("first", "cut", 7)
    assert 1 < first.state.epoch < 2
    resumed = train("resumed", "cut", 8)
    assert drawn["first"] + drawn["resumed"] == drawn["uninterrupted"]
    check_same_training(uninterrupted, resumed)


def test_a_pass_has_the_order_of_a_training_that_nobody_interrupts():
    arguments = (range(7), 2, 3, 2, True, 5)
    stock = RepeatSampler(*arguments)
    for epoch in range(3):
        expected = list(stock)
        sampler = resuming.EpochRepeatSampler(*arguments)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler) == expected and len(sampler) == len(expected) == 24
    ordered = resuming.EpochRepeatSampler(range(3), 1, shuffle=False)
    ordered.set_epoch(1)
    assert list(ordered) == [0, 1, 2]


def test_the_sampler_of_several_processes_is_told_its_pass():
    """As it is after a kill in the middle of a pass, where transformers tells it nothing."""
    sampler = resuming.EpochRepeatSampler(range(8), 2, seed=5)
    loader = accelerate.data_loader.prepare_data_loader(
        DataLoader(range(8), batch_size=2, sampler=sampler), num_processes=2, process_index=1,
        put_on_device=False)
    resuming.SetSamplerEpoch().on_epoch_begin(
        None, SimpleNamespace(epoch=1.25), None, train_dataloader=loader)
    rest = accelerate.skip_first_batches(loader, 1)
    rest.set_epoch(1)  # as transformers does
    expected = resuming.EpochRepeatSampler(range(8), 2, seed=5)
    expected.set_epoch(1)
    assert torch.cat(list(rest)).tolist() == torch.tensor(list(expected)).view(4, 2, 2)[
        1:, 1].flatten().tolist()


def record_prompts(trainer, drawn):
    stock = trainer._generate_and_score_completions

    def record(inputs):
        drawn.append([row["sample"] for row in inputs])
        return stock(inputs)

    trainer._generate_and_score_completions = record


def check_same_training(expected, trainer):
    rewards, expected_rewards = (
        [row["reward"] for row in grpo.training_curves(t.state.log_history)]
        for t in (trainer, expected))
    assert rewards == expected_rewards and rewards
    parameters = dict(expected.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.slow
def test_an_update_in_parts_has_the_same_gradient_and_whole_groups(tmp_path, make_trainer,
                                                                   monkeypatch, first_gradients):
    def random_rewards(trainer, inputs, *arguments):
        generator = torch.Generator().manual_seed(0)
        trainer.rewards = torch.rand(len(inputs), 4, generator=generator)
        return trainer.rewards

    monkeypatch.setattr(recipe_trainer.RecipeTrainer, "_calculate_rewards", random_rewards)
    logps, recorded = trainer_module.SharedPrefixGRPOTrainer._logps, []
    for size, parts in ((16, 1), (4, 4)):
        rows_of_steps = []

        def record_rows(self, model, rows, *arguments, rows_of_steps=rows_of_steps):
            rows_of_steps.append(rows)
            return logps(self, model, rows, *arguments)

        monkeypatch.setattr(trainer_module.SharedPrefixGRPOTrainer, "_logps", record_rows)
        trainer = make_trainer(tmp_path / str(parts), per_device_train_batch_size=size,
                               gradient_accumulation_steps=parts, max_steps=1)
        trainer._check_update = lambda: None  # nothing is read the stock way, too
        gradients = first_gradients(trainer)
        trainer.train()
        recorded.append((gradients, rows_of_steps))
    (at_once, all_rows), (in_parts, rows) = recorded
    assert [len(step) for step in rows] == [4] * 4
    assert all(len(step.unique()) == 1 for step in rows)
    assert sorted(torch.cat(rows).tolist()) == sorted(all_rows[0].tolist())
    prompts = trainer._prompts_of([int(step[0]) for step in rows])
    lengths = [len(prompt.ids) for prompt in prompts]
    assert lengths == sorted(lengths) and len(at_once) == 16
    for name, gradient in at_once.items():
        tolerance = 1e-5 * gradient.abs().max().item()
        assert torch.allclose(gradient, in_parts[name], atol=tolerance), name


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"trl": {"logging_steps": 3}}, "the kit sets logging_steps itself"),
    ({"gradient_accumulation_steps": 3}, "2 processes cannot share 3 steps")])
def test_what_a_trainer_is_not_made_of(tmp_path, make_trainer, monkeypatch, changes, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, **changes)


@pytest.mark.slow
def test_it_trains_as_a_gpu_would(tmp_path, make_trainer):
    """Weights in bfloat16, checkpointed layers, a reference; the adapter learns in float32."""
    as_on_a_gpu = loading.Hardware("cpu", torch.bfloat16, "sdpa", "as on a GPU")
    trainer = make_trainer(tmp_path, hardware=as_on_a_gpu, beta=0.04, micro_replies=4,
                           gradient_accumulation_steps=2, gradient_checkpointing=True)
    trainer.train()
    rows = grpo.training_curves(trainer.state.log_history)
    assert len(rows) == 2 and all(math.isfinite(row["kl"]) and row["length"] > 0 for row in rows)
    trained, frozen = (
        {name: parameter for name, parameter in trainer.model.named_parameters()
         if parameter.requires_grad == is_trained}
        for is_trained in (True, False))
    assert len(trained) == 16
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any(parameter.any() for name, parameter in trained.items() if "lora_B" in name)
    assert {parameter.dtype for parameter in frozen.values()} == {torch.bfloat16}


def test_curves_hold_every_reward_that_is_logged():
    history = [{"step": 1, "reward": 0.5, "rewards/format/mean": 1.0, "rewards/format/std": 0.1,
                "rewards/new/mean": math.nan, "entropy": 2.0, "detail/truth": 0.75},
               {"step": 1, "train_loss": 0.1}]
    assert grpo.training_curves(history) == [
        {"step": 1, "reward": 0.5, "format": 1.0, "new": None, "length": None, "entropy": 2.0,
         "kl": None, "zero_std": None, "clipped_ratio": None,
         "logp_difference": None, "truth": 0.75}]


def test_replies_that_got_short_are_named():
    long, short = [{"length": 40.0}] * 10, [{"length": 26.0}] * 10
    warning = grpo.length_collapse_warning(long + short)
    assert warning.startswith("replies fell from 40 to 26 tokens")
    assert grpo.length_collapse_warning((long + short)[:19]) == ""
    assert grpo.length_collapse_warning(short + long) == ""
    assert grpo.length_collapse_warning(long + [{"length": 32.0}] * 10) == "", "four fifths do"


@pytest.mark.slow
def test_a_model_whose_prompts_cannot_be_shared_is_one_sentence(tmp_path, make_trainer,
                                                                monkeypatch):
    monkeypatch.setattr(obstacles, "LIMITS_FLOAT32", (-1.0,) * 4)
    with pytest.raises(ValueError, match="prompts cannot be shared: log-probabilities .* from "
                                           "stock TRL's.*; set share_prefix to false"):
        make_trainer(tmp_path).train()
    monkeypatch.setattr(obstacles, "FAMILIES", ("another",))
    with pytest.raises(ValueError, match="qwen2_5_vl is none of another, or set share_prefix to f"):
        make_trainer(tmp_path)


@pytest.mark.slow
def test_replies_drawn_from_other_logits_are_noticed_though_the_model_is_sure(
        tmp_path, make_trainer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sample = generation.sample_tokens
    monkeypatch.setattr(generation, "sample_tokens",
                        lambda logits, *others: sample(3 * logits, *others))
    trainer = make_trainer(
        tmp_path, load=lambda _, *others: loading.load_policy(
            loading.resolve_model("tiny/sft"), *others),
        num_generations=8, per_device_train_batch_size=64, max_completion_length=160)
    with pytest.raises(UserError, match="-log p of the tokens drawn at the first update are"):
        trainer.train()


def test_where_rl_starts(tmp_path, random_folder, capsys):
    """A folder whose model saw images otherwise is said, where the kit saved it."""
    folder = shutil.copytree(random_folder, tmp_path / "trained")

    def resolve(start_from):
        params = SimpleNamespace(start_from=start_from, base_model=str(random_folder),
                                 **vars(BOX_FORMAT))
        return grpo.resolve_start(params, tmp_path)

    assert [resolve("merged"), resolve("base"), resolve(str(folder))] == [
        tmp_path, random_folder, folder]
    (folder / "mig_kit.json").write_text('{"coordinates": "normalized_1000"}')
    assert capsys.readouterr().out == "", "what a publisher allows is no way to be trained"
    resolve(str(folder))
    assert capsys.readouterr().out.startswith(f"warning: {folder} was trained on images of ")


@pytest.mark.slow
def test_rollouts_leave_4_bit_weights_alone(tmp_path, make_trainer, monkeypatch):
    trainer = make_trainer(tmp_path, load=loading.load_four_bit_policy)
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
