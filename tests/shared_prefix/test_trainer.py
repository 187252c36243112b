"""The shared-prefix trainer as any user of TRL has it: a stock data set, a stock config."""

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig
from PIL import Image as Pictures
from transformers import Qwen2_5_VLForConditionalGeneration
from trl import GRPOConfig, GRPOTrainer

from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer

COUNTS = (1, 6, 3, 2)  # images of the rows; stock TRL stops at a row with none beside others
MESSAGES = [
    [{"role": "user", "content": "count the objects"}],
    [{"role": "system", "content": "find"}, {"role": "user", "content": "the red circle"}],
    [{"role": "user", "content": "what is a circle"}, {"role": "assistant", "content": "a circle"},
     {"role": "user", "content": "and a square"}],
    [{"role": "user", "content": "which image shows the red circle"}]]


def picture(seed, size=(84, 56)):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Pictures.fromarray(pixels.numpy())


def make_table(messages=MESSAGES, counts=COUNTS, column="images"):
    """A table with prompts, images and a column for the reward."""
    first = [sum(counts[:row]) for row in range(len(counts))]
    images = [[picture(start + n, (84 + 28 * n, 56)) for n in range(count)]
              for start, count in zip(first, counts)]
    if column == "image":
        images = [row[0] for row in images]
    columns = {"prompt": messages, "wanted": ["a", "e", "i", "o"][:len(messages)], column: images}
    kind = Image() if column == "image" else List(Image())
    message = {"role": Value("string"), "content": Value("string")}
    return Dataset.from_dict(columns, features=Features(
        {"prompt": List(message), "wanted": Value("string"), column: kind}))


def letters(completions, wanted, images=None, log_extra=None, log_metric=None, **columns):
    """Share of a letter; None for one reply, as a reward that does not apply gives it."""
    texts = [completion[0]["content"] for completion in completions]
    log_extra("letter", wanted)
    log_metric("length", sum(map(len, texts)) / len(texts))
    values = [text.count(letter) / (1 + len(text)) + len(set(text)) / 50
              for text, letter in zip(texts, wanted)]
    return [*values[:-1], None]


def number_of_images(completions, images=None, **columns):
    """Tells whether a reward gets the images of its row."""
    return [0.1 * len(row or ()) for row in images]


@pytest.fixture
def make_pair(random_folder, processor, tmp_path):
    """Call it with settings for (stock TRL's trainer, the kit's), which draw the same completions.
    """
    def make(peft=True, table=None, rewards=(letters, number_of_images), **settings):
        trainers = []
        for name, trainer_class in (("stock", GRPOTrainer), ("own", SharedPrefixGRPOTrainer)):
            model = Qwen2_5_VLForConditionalGeneration.from_pretrained(random_folder,
                                                                       dtype=torch.float32)
            if not peft:
                model.model.visual.requires_grad_(False)
            config = GRPOConfig(**{
                "output_dir": str(tmp_path / name), "num_generations": 4, "use_cpu": True,
                "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": False,
                "max_completion_length": 6, "report_to": "none", "learning_rate": 1e-3,
                "max_steps": 2, "logging_steps": 1, "gradient_checkpointing": False,
                "save_strategy": "no", "log_completions": True, "num_completions_to_print": 0,
                "lr_scheduler_type": "constant",
                **settings})
            torch.manual_seed(0)
            adapter = LoraConfig(r=4, target_modules=r".*language_model.*(q|v|down)_proj")
            trainer = trainer_class(
                model=model, reward_funcs=list(rewards), args=config, processing_class=processor,
                train_dataset=table or make_table(), peft_config=adapter if peft else None)
            torch.manual_seed(1)
            for parameter_name, parameter in trainer.model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.data.normal_(0, 0.05)
            trainers.append(trainer)
        force_completions(*trainers)
        return trainers

    return make


def draw_completions(count):
    """Token ids of `count` completions, one of them cut; always the same."""
    generator = torch.Generator().manual_seed(count)
    lengths = [5, 3, 6, 2, 6, 4, 1, 5]
    return [torch.randint(7, 600, (lengths[row % 8],), generator=generator).tolist()
            + ([] if lengths[row % 8] == 6 else [2]) for row in range(count)]


def force_completions(stock, own):
    stock._generate_single_turn = lambda prompt_ids, *_: (draw_completions(len(prompt_ids)), None)
    own._draw_completions = lambda prompts, group: draw_completions(len(prompts) * group)


def logged(trainer):
    """The log of the updates, without times."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: value for name, value in row.items() if "time" not in name} for row in rows]


def trained_parameters(trainer):
    return {name: parameter for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad}


# TRL logs the mean of the steps' means, which depends on the rows that share a step
ONE_STEP = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {}, {"peft": False}, {"beta": 0.04, **ONE_STEP},
    {"peft": False, "beta": 0.04, "loss_type": "grpo", **ONE_STEP},
    {"num_iterations": 2, "max_steps": 4},
    {"gradient_checkpointing": True, "beta": 0.04, **ONE_STEP},
    {"multi_objective_aggregation": "normalize_then_sum", "steps_per_generation": 4},
    {"scale_rewards": "batch", "mask_truncated_completions": True}], ids=str)
def test_a_training_ends_and_logs_as_stock_trls(make_pair, settings):
    stock, own = make_pair(**settings)
    for trainer in (stock, own):
        trainer.train()
    assert not own.unshared
    for expected, row in zip(logged(stock), logged(own), strict=True):
        assert row.keys() == expected.keys()
        assert row == pytest.approx(expected, rel=2e-4, abs=2e-5, nan_ok=True)
    parameters = trained_parameters(own)
    for name, expected in trained_parameters(stock).items():
        assert (parameters[name] - expected).norm() <= 2e-3 * expected.norm() + 1e-6, name


@pytest.mark.slow
def test_the_first_update_has_stock_trls_loss_and_gradient(make_pair):
    gradients = []
    for trainer in make_pair(gradient_accumulation_steps=1, per_device_train_batch_size=16):
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        rows = [trainer.train_dataset[row] for row in (0, 1, 2, 3) for _ in range(4)]
        loss = trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows))
        loss.backward()
        gradients.append([loss.detach(), *(parameter.grad for parameter in
                                           trained_parameters(trainer).values())])
    for expected, own in zip(*gradients):
        assert torch.allclose(own, expected, atol=1e-5 * max(1e-3, expected.abs().max().item()))


@pytest.mark.slow
def test_completions_are_logged_as_stock_trls(make_pair, tmp_path):
    import pandas

    tables = []
    for trainer in make_pair(max_steps=1):
        trainer.train()
        tables.append(pandas.read_parquet(
            tmp_path / trainer.args.output_dir / "completions" / "completions_00001.parquet"))
    expected, own = tables
    assert list(own) == list(expected) and "letter" in own
    for name in expected:
        if name != "advantage":
            assert own[name].astype(str).tolist() == expected[name].astype(str).tolist(), name
    assert own["advantage"].tolist() == pytest.approx(expected["advantage"].tolist(), abs=1e-5)


@pytest.mark.slow
def test_one_image_a_row_in_its_own_column_and_text_alone(make_pair):
    def nothing_else(completions, image=None, **_):
        return [float(image is not None and len(text[0]["content"]) % 3)
                for text in completions]

    table = make_table(MESSAGES[:2], (1, 1), column="image")
    for stock, own in (make_pair(table=table, rewards=[nothing_else], max_steps=1,
                                 gradient_accumulation_steps=1),
                       make_pair(table=make_table().remove_columns("images"),
                                 rewards=[letters], max_steps=1)):
        for trainer in (stock, own):
            trainer.train()
        assert logged(own)[0] == pytest.approx(logged(stock)[0], rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", [False, True])
def test_rows_with_and_without_images_share_a_step(make_pair, checkpoints):
    """Each row's log-probabilities are those that it has when its group is alone."""
    _, own = make_pair(table=make_table(counts=(0, 1, 2, 6)), per_device_train_batch_size=16,
                       gradient_accumulation_steps=1, gradient_checkpointing=checkpoints)
    own.is_checked = True
    rows = [own.train_dataset[row] for row in (0, 1, 2, 3) for _ in range(4)]
    batch = own._generate_and_score_completions(rows)
    numbers, ids = batch["prompt_ids"][:, -1], batch["completion_ids"]
    together = own._logps(own.model, numbers, ids, batch["completion_mask"])[0]
    for number in numbers.unique():
        group = numbers == number
        mask = batch["completion_mask"][group]
        alone = own._logps(own.model, numbers[group], ids[group], mask)[0]
        assert torch.allclose(together[group], alone, atol=1e-5) and alone.any()


@pytest.mark.slow
def test_it_draws_and_evaluates_on_its_own(random_folder, processor, tmp_path):
    """No completion is forced; the evaluation set has other prompts than the training set."""
    config = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, use_cpu=True, bf16=False,
        per_device_eval_batch_size=4, max_completion_length=6, report_to="none", max_steps=1,
        eval_strategy="steps", eval_steps=1)
    trainer = SharedPrefixGRPOTrainer(
        model=str(random_folder), reward_funcs=letters, args=config, processing_class=processor,
        train_dataset=make_table(), eval_dataset=make_table(MESSAGES[:1], (3,)),
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))
    trainer.train()
    history = trainer.state.log_history
    assert any("eval_reward" in row for row in history) and not trainer.unshared


@pytest.mark.parametrize(("settings", "reason"), [
    ({"top_k": 5}, "top_k"), ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"generation_kwargs": {"num_beams": 2}}, "num_beams")])
@pytest.mark.slow
def test_another_sampling_is_transformers_own(random_folder, processor, tmp_path, settings, reason):
    config = GRPOConfig(str(tmp_path), num_generations=2, per_device_train_batch_size=2,
                        use_cpu=True, bf16=False, max_completion_length=4, report_to="none",
                        max_steps=1, gradient_checkpointing=False, **settings)
    with pytest.warns(UserWarning, match=f"drawn by transformers.*{reason}"):
        trainer = SharedPrefixGRPOTrainer(
            model=str(random_folder), reward_funcs=letters, args=config,
            processing_class=processor, train_dataset=make_table(),
            peft_config=LoraConfig(r=4, target_modules=r".*language_model.*q_proj"))
    trainer.train()
    assert trainer.state.global_step == 1 and not trainer.unshared


def test_what_cannot_be_shared_is_left_to_stock_trl(make_pair):
    with pytest.warns(UserWarning, match="vision tower is trained; freeze it"):
        SharedPrefixGRPOTrainer(
            model=Qwen2_5_VLForConditionalGeneration(make_pair()[0].model.config),
            reward_funcs=letters, processing_class=make_pair()[0].processing_class,
            train_dataset=make_table(), args=GRPOConfig("out", use_cpu=True, bf16=False,
                                                        report_to="none"))


@pytest.mark.slow
def test_a_leak_between_replies_is_noticed_at_the_first_batch(make_pair, monkeypatch):
    """What a model does whose state runs on through the neighbour's reply."""
    _, own = make_pair(max_steps=1, gradient_checkpointing=True)
    from mig_kit.shared_prefix import logprobs

    allowed = logprobs._PackedRows.is_allowed

    def leak(rows):
        order = torch.arange(rows.ids.shape[1])
        return allowed(rows) | ((order[:, None] >= order) & (rows.part >= 0)[:, None])

    monkeypatch.setattr(logprobs._PackedRows, "is_allowed", leak)
    own._generate_single_turn = lambda prompt_ids, *_: (draw_completions(len(prompt_ids)), None)
    with pytest.warns(UserWarning, match="prompts are not shared: log-probabilities at the first"):
        own.train()
    assert own.unshared and own.state.global_step == 1
