"""The shared-prefix trainer as any user of TRL has it: a stock data set, a stock config."""

import json
import os
import re
import sys
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import peft
import pytest
import torch
from command_line import trainings_in_threads
from datasets import Dataset, Features, Image, IterableDataset, List, Value
from forced_completions import draw_completions, force_completions
from launched import set_random_adapter
from peft import LoraConfig, get_peft_model
from PIL import Image as Pictures
from published import format_of
from tokenizers import Tokenizer
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.generation import vllm_generation

from mig_kit.image_files import pixel_digest
from mig_kit.models.processors import load_processor
from mig_kit.shared_prefix import compare, decoding, generation, groups, logprobs, obstacles
from mig_kit.shared_prefix.generation import SamplingOptions, generate_rollouts
from mig_kit.shared_prefix.prompt_cache import PromptCache, PromptSource, describe_image
from mig_kit.shared_prefix.trainer import (
    SharedPrefixGRPOTrainer,
    average_gradients,
    move_images,
)

ROOT = Path(__file__).parents[2]
QUERIES = LoraConfig(r=4, target_modules=r".*language_model.*q_proj")
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
    columns = {"prompt": messages, "wanted": [*"aeioaeio"][:len(messages)], column: images}
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


@pytest.fixture(scope="module")
def make_pair(random_folder, relatives, processor, tmp_path_factory):
    """Call it with settings, and a model's family, for (stock TRL's trainer, the kit's)."""
    def make(peft=True, table=None, rewards=(letters, number_of_images), family="",
             tokenizer=False, **settings):
        trainers, folder = [], tmp_path_factory.mktemp("pair")
        base = relatives[family] if family else random_folder
        own_processor = load_processor(base, format_of(family)) if family else processor
        own_processor = own_processor.tokenizer if tokenizer else own_processor
        for name, trainer_class in (("stock", GRPOTrainer), ("own", SharedPrefixGRPOTrainer)):
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
            if not peft:
                model.model.visual.requires_grad_(False)
            config = GRPOConfig(**{
                "output_dir": str(folder / name), "num_generations": 4, "use_cpu": True,
                "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": False,
                "max_completion_length": 6, "report_to": "none", "learning_rate": 1e-3,
                "max_steps": 2, "logging_steps": 1, "gradient_checkpointing": False,
                "save_strategy": "no", "log_completions": True, "num_completions_to_print": 0,
                "lr_scheduler_type": "constant", **settings})
            torch.manual_seed(0)
            adapter = LoraConfig(
                r=4, target_modules=r".*language_model.*\.((q|v|down|out)_proj|in_proj_qkv)")
            trainer = trainer_class(
                model=model, reward_funcs=list(rewards), args=config,
                processing_class=own_processor, train_dataset=table or make_table(),
                peft_config=adapter if peft else None)
            set_random_adapter(trainer.model)
            trainers.append(trainer)
        force_completions(*trainers)
        return trainers

    return make


def make_own(model, processor, folder="out", adapter=QUERIES, **settings):
    """The kit's trainer as a user makes it; settings: of GRPOConfig, or eval_dataset."""
    tables = {"train_dataset": settings.pop("train_dataset", make_table()),
              "eval_dataset": settings.pop("eval_dataset", None)}
    own = {name: settings.pop(name) for name in ("strict", "check_every") if name in settings}
    peft_config = settings.pop("peft_config", adapter)
    config = GRPOConfig(str(folder), **{
        "num_generations": 4, "per_device_train_batch_size": 8, "use_cpu": True, "bf16": False,
        "max_completion_length": 6, "report_to": "none", "max_steps": 1, **settings})
    return SharedPrefixGRPOTrainer(
        model=model if adapter is None else str(model), reward_funcs=letters, args=config,
        processing_class=processor, peft_config=peft_config, **tables, **own)


def logged(trainer):
    """The log of the updates, without times and what stock TRL does not log."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: value for name, value in row.items() if "time" not in name and name != "shared"
             and not name.startswith("sampling/sampling_logp_difference")} for row in rows]


def trained_parameters(trainer):
    return {name: parameter for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad}


# TRL logs the mean of the steps' means, which depends on the rows that share a step
ONE_STEP = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16}


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {}, {"peft": False, "beta": 0.04, "loss_type": "grpo", **ONE_STEP},
    {"gradient_checkpointing": True, "beta": 0.04, **ONE_STEP},
    {"multi_objective_aggregation": "normalize_then_sum"},
    {"family": "qwen3_5", "beta": 0.04, "gradient_checkpointing": True, **ONE_STEP},
    *(pytest.param(settings, marks=pytest.mark.nightly) for settings in (
        {"num_iterations": 2, "max_steps": 4},  # test_losses.py has these updates
        {"scale_rewards": "batch", "mask_truncated_completions": True}))], ids=str)
def test_a_training_ends_and_logs_as_stock_trls(make_pair, settings):
    stock, own = make_pair(**settings)
    for trainer in (stock, own):
        trainer.train()
    assert not own.unshared and own.model.config._attn_implementation == "sdpa"
    for expected, row in zip(logged(stock), logged(own), strict=True):
        assert row.keys() == expected.keys()
        assert row == pytest.approx(expected, rel=5e-4, abs=2e-5, nan_ok=True)
    parameters = trained_parameters(own)
    for name, expected in trained_parameters(stock).items():
        if name.endswith("k_proj.bias"):
            continue  # softmax cancels it: its gradient is rounding, which AdamW's steps enlarge
        assert (parameters[name] - expected).norm() <= 2e-3 * expected.norm() + 1e-6, name


def test_an_image_is_decoded_once_for_all_completions(make_pair):
    _, own = make_pair()
    batch = next(iter(own.get_train_dataloader()))
    texts = [row["prompt"][-1]["content"] for row in batch]
    assert len(batch) == 16 and [texts.count(text) for text in texts] == [4] * 16
    for row, text in zip(batch, texts):
        first = batch[texts.index(text)]
        assert row["images"][0] is first["images"][0] and row["prompt"] == first["prompt"]
        assert row is first or row["prompt"][0] is not first["prompt"][0]


@pytest.mark.slow
def test_completions_are_logged_as_stock_trls(make_pair):
    import pandas

    tables = []
    for trainer in make_pair(max_steps=1):
        trainer.train()
        tables.append(pandas.read_parquet(
            Path(trainer.args.output_dir) / "completions" / "completions_00001.parquet"))
    expected, own = tables
    assert list(own) == list(expected) and "letter" in own
    for name in expected:
        if name != "advantage":
            assert own[name].astype(str).tolist() == expected[name].astype(str).tolist(), name
    assert own["advantage"].tolist() == pytest.approx(expected["advantage"].tolist(), abs=1e-5)


@pytest.mark.slow
def test_one_image_a_row_in_its_own_column(make_pair):
    def nothing_else(completions, image=None, **_):
        return [float(image is not None and len(text[0]["content"]) % 3)
                for text in completions]

    table = make_table(MESSAGES[:2], (1, 1), column="image")
    stock, own = make_pair(table=table, rewards=[nothing_else], max_steps=1,
                           gradient_accumulation_steps=1)
    for trainer in (stock, own):
        trainer.train()
    assert logged(own)[0] == pytest.approx(logged(stock)[0], rel=1e-3, abs=1e-5, nan_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "checkpoints"), [
    ("", True), *(pytest.param(*case, marks=pytest.mark.nightly) for case in (
        ("", False), ("qwen3_5", True), ("qwen3_5", False)))])
def test_rows_with_and_without_images_share_a_step(make_pair, family, checkpoints):
    """Each row's log-probabilities are those that it has when its group is alone."""
    _, own = make_pair(table=make_table(counts=(0, 1, 2, 6)), per_device_train_batch_size=16,
                       gradient_accumulation_steps=1, gradient_checkpointing=checkpoints,
                       family=family)
    own._check_update = lambda: None
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
def test_it_draws_and_evaluates_on_its_own(random_folder, processor, tmp_path, capsys):
    """No completion is forced; the evaluation set has other prompts than the training set."""
    trainer = make_own(random_folder, processor, tmp_path, per_device_eval_batch_size=4,
                       eval_strategy="steps", eval_steps=1, logging_steps=1,
                       eval_dataset=make_table(MESSAGES[:1], (3,)))
    trainer.train()
    history = trainer.state.log_history
    assert any("eval_reward" in row for row in history) and not trainer.unshared
    line, = re.findall("self-check at the first update: .*", capsys.readouterr().out)
    gaps = re.findall(r"(log-probabilities|gradients).*? (\S+) \(of (\S+) allowed", line)
    assert len(gaps) == 6 and all(float(gap) < float(limit) for _, gap, limit in gaps)
    assert {row["shared"] for row in history if "loss" in row} == {1}


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "reason"), [
    ({"top_k": 5}, "top_k"), *(pytest.param(*case, marks=pytest.mark.nightly) for case in (
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams")))])
def test_another_sampling_is_transformers_own(random_folder, processor, tmp_path, settings, reason):
    with pytest.warns(UserWarning, match=f"drawn by transformers.*{reason}"):
        trainer = make_own(random_folder, processor, tmp_path, num_generations=2,
                           per_device_train_batch_size=2, gradient_checkpointing=False, **settings)
    trainer.train()
    assert trainer.state.global_step == 1 and not trainer.unshared


@pytest.mark.slow
def test_a_head_may_be_float32_behind_bfloat16_weights(random_folder, processor, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(random_folder, dtype=torch.bfloat16)
    model.lm_head.float()
    make_own(model, processor, tmp_path, None, peft_config=QUERIES, bf16=True, strict=True).train()


@pytest.mark.slow
def test_a_new_way_to_draw_needs_one_module(random_folder, processor, tmp_path, monkeypatch):
    """As CONTRIBUTING says: a field of SamplingOptions, lines in sample_tokens. 1 is greedy."""
    @dataclass(frozen=True)
    class Options(SamplingOptions):
        min_p: float = 0.0

    def sample_tokens(logits, sampling, uniforms=None):
        probabilities = logits.softmax(-1)
        limit = sampling.min_p * probabilities.amax(-1, keepdim=True)
        return draw(logits.masked_fill(probabilities < limit, -torch.inf), sampling, uniforms)

    draw = generation.sample_tokens
    monkeypatch.setattr(generation, "SamplingOptions", Options)
    monkeypatch.setattr(generation, "sample_tokens", sample_tokens)
    for settings, is_greedy in (({}, False), ({"min_p": 1.0}, True)):
        trainer = make_own(random_folder, processor, tmp_path, strict=True, **settings)
        trainer.model.train()
        prompt = move_images(trainer.train_dataset[0])["prompt"]
        numbers, *_ = trainer._tokenize_prompts([prompt] * 4)
        drawn = trainer._draw_completions([number for number, in numbers], 4)
        assert (len({tuple(completion.ids) for completion in drawn}) == 1) == is_greedy


class VLLMDouble:
    """The engine that TRL makes in colocate mode: it puts as many image tokens as an image needs in
    the place of the next one that it is given, and tells the model's log-probabilities.
    """

    def __init__(self, processor, model, **_):
        self.processor = processor
        self.weights = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32)
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self
        self.model = self
        self.asked = []

    def load_weights(self, weights):
        assert not self.weights.load_state_dict(dict(weights), strict=False).unexpected_keys

    def reset_prefix_cache(self):
        pass

    def expand(self, ids, grid):
        sizes = iter((grid.prod(1) // self.processor.image_processor.merge_size**2).tolist())
        token = self.processor.image_token_id
        return [value for given in ids
                for value in [given] * (next(sizes, 1) if given == token else 1)]

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm):
        self.asked += prompts
        return [self.reply(row["prompt_token_ids"], row["multi_modal_data"]["image"], completion)
                for row, completion in zip(prompts, draw_completions(len(prompts)))]

    def reply(self, ids, images, completion):
        pixels = self.processor.image_processor(images, return_tensors="pt")
        ids = self.expand(ids, pixels["image_grid_thw"])
        row = torch.tensor([ids + completion])
        types = torch.tensor(self.processor.create_mm_token_type_ids(row))
        logits = self.weights(input_ids=row, mm_token_type_ids=types, **pixels).logits[0]
        logps = logits[len(ids) - 1:-1].log_softmax(-1)
        told = [{token: SimpleNamespace(logprob=values[token].item(), rank=1)}
                for token, values in zip(completion, logps)]
        return SimpleNamespace(prompt_token_ids=ids, outputs=[
            SimpleNamespace(token_ids=completion, logprobs=told)])


@pytest.mark.slow
def test_vllm_is_given_one_image_token_for_each_image(random_folder, processor, tmp_path,
                                                      monkeypatch):
    """TRL itself gives it all of them, and it makes more of them (TRL's issue 6294)."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", partial(VLLMDouble, processor), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    with patch.dict(os.environ):  # TRL sets variables of a launcher
        trainer = make_own(random_folder, processor, tmp_path, max_steps=3, logging_steps=1,
                           use_vllm=True, vllm_mode="colocate", learning_rate=1e-2,
                           train_dataset=make_table(counts=(1, 3, 2, 2)))
        trainer.train()
    asked = trainer.vllm_generation.llm.asked
    assert len(asked) == 24 and not trainer.unshared
    for row in asked:
        images = row["multi_modal_data"]["image"]
        count = len(images) if isinstance(images, list) else 1
        assert row["prompt_token_ids"].count(processor.image_token_id) == count
    for row in logged(trainer):
        for kind in ("min", "mean", "max"):
            assert row[f"sampling/importance_sampling_ratio/{kind}"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"entropy_coef": 0.01}, "entropy_coef and use_adaptive_entropy need"),
    ({"use_adaptive_entropy": True}, "entropy_coef and use_adaptive_entropy need"),
    ({"neftune_noise_alpha": 5.0}, "noise on embeddings"), ({"top_k": 5}, "top_k"),
    ({"generation_kwargs": {"do_sample": False}}, "do_sample"),
    ({"generation_kwargs": {"eos_token_id": [2, 282]}}, "eos_token_id"),
    ({"chat_template_kwargs": {"truncation": True}}, "chat_template_kwargs has truncation"),
    ({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}},  # before it is loaded
     "flash_attention_2 cannot attend in groups; load"),
    ({"adapter": None}, "the vision tower is trained; freeze it"),
    ({"adapter": LoraConfig(target_modules="all-linear")},
     "adapters reach the vision tower; set target_mod"),
    ({"adapter": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
     "PROMPT_TUNING of PEFT")])
def test_what_cannot_be_shared_is_named(random_model, random_folder, processor, tmp_path, changes,
                                        reason):
    model = random_model if "adapter" in changes and not changes["adapter"] else random_folder
    with pytest.raises(ValueError, match=reason):
        make_own(model, processor, tmp_path, strict=True, **changes)


@pytest.mark.slow
def test_a_leak_between_states_of_linear_attention_is_noticed_at_the_first_update(make_pair,
                                                                                 monkeypatch):
    _, own = make_pair(max_steps=1, gradient_checkpointing=True, family="qwen3_5")
    pack = logprobs._pack_completions
    monkeypatch.setattr(logprobs, "_pack_completions",
                        lambda *arguments: wrong_mask(pack(*arguments)))
    with pytest.warns(UserWarning, match="prompts are not shared: log-probabilities at the first"):
        own.train()
    assert own.unshared and own.state.global_step == 1


MODES = ("1", "L", "LA", "PA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I",
         "I;16", "F")


def random_image(mode, seed):
    """An image of few values, so that two often have equal bytes; P and L may be transparent."""
    draw = np.random.default_rng(seed)
    shape = (56, 84, *[len(Pictures.new(mode, (1, 1)).getbands())])
    low = draw.integers(0, 3, (2, 3, shape[2]), dtype=np.uint8).repeat(28, 0).repeat(28, 1) * 100
    if mode in ("I", "F", "I;16"):
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        image = Pictures.fromarray(low[..., 0].astype(kind))
    elif mode in ("P", "PA"):
        image = Pictures.fromarray(low[..., 0] // 100, "L")
        image.putpalette(draw.integers(0, 2, 12, dtype=np.uint8) * 255)
        if draw.integers(2) and mode == "P":
            image.info["transparency"] = int(draw.integers(3))
        image = image.convert(mode) if mode == "PA" else image
    elif mode == "1":
        image = Pictures.fromarray(low[..., 0]).convert("1", dither=Pictures.Dither.NONE)
    else:
        image = Pictures.frombytes(mode, (84, 56), low.tobytes())
    if draw.integers(2):
        image.getexif()[0x0112] = 6  # which datasets and the processor leave alone in an open image
    if draw.integers(2) and mode == "L":
        image.info["transparency"] = 100
    return image


@pytest.mark.nightly
def test_two_images_are_one_only_if_the_processor_sees_the_same(processor):
    images = [random_image(mode, seed) for mode in MODES for seed in range(12)]
    images += [np.asarray(image.convert("RGB")) for image in images[::7]]
    keys = [describe_image(image, processor.image_processor)[0] for image in images]
    pixels = [processor.image_processor([image], return_tensors="pt")["pixel_values"].numpy()
              .tobytes() for image in images]
    assert {MODES[n // 12] for n in range(180)} == {image.mode for image in images[:180]}
    assert len(set(zip(keys, pixels))) == len(set(keys)) == len(set(pixels)) > 60
    hall = [pixel_digest(image) for image in images[:180]]
    assert len(set(zip(hall, pixels))) == len(set(hall))


class Gradients(TrainerCallback):
    """Gradients of every update, as one vector."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()
                                     if parameter.grad is not None]))


def check_same_gradients(pair, updates):
    steps = []
    for trainer in pair:
        trainer.add_callback(gradients := Gradients())
        torch.manual_seed(0)  # TRL scatters the completions over the steps
        trainer.train()
        steps.append(gradients.steps)
    assert len(steps[0]) == updates and not pair[1].unshared
    for expected, gradient in zip(*steps, strict=True):
        assert (gradient - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.nightly
def test_gradients_are_stock_trls_whatever_the_images_modes(make_pair):
    rows = [{"prompt": MESSAGES[row % 4], "wanted": "aeio"[row % 4],
             "images": [random_image(mode, 2 * row + n) for n in range(2)
                        for mode in MODES[row % 3::3]]} for row in range(20)]
    table = IterableDataset.from_generator(lambda: iter(rows))
    check_same_gradients(make_pair(table=table, max_steps=4, learning_rate=1e-6, **ONE_STEP | {
        "per_device_train_batch_size": 20}), 4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"steps_per_generation": 4}, {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {"loss_type": "bnpo"},
    pytest.param({"torch_compile": True, "torch_compile_backend": "eager"},
                 marks=pytest.mark.nightly)], ids=str)
def test_an_update_learns_from_the_completions_that_stock_trls_does(make_pair, settings):
    table = make_table(MESSAGES * 2, COUNTS * 2)
    check_same_gradients(make_pair(table=table, learning_rate=1e-6, **settings), 2)


def encode(image):
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "passes"), [
    ({}, 2), ({"steps_per_generation": 1}, 4), ({"gradient_checkpointing": True}, 2),
    ({"family": "qwen3_vl"}, 2), ({"steps_per_generation": 4}, 0), ({"num_iterations": 2}, 0),
    ({"family": "qwen3_5"}, 0)], ids=str)
def test_an_update_learns_from_the_pass_that_drew(make_pair, monkeypatch, settings, passes):
    """settings, and how many passes are kept; gradients are those of prompts that are read again.
    """
    kept = []
    monkeypatch.setattr(logprobs.KeptPrompts, "backward", lambda prompts, right=(
        logprobs.KeptPrompts.backward): kept.append(len(prompts.copies)) or right(prompts))
    updates = []
    for reads_again in (False, True):
        if reads_again:
            monkeypatch.setattr(obstacles, "can_learn_from_draw", lambda trainer: False)
        _, own = make_pair(max_grad_norm=1e3, table=make_table(MESSAGES * 2, COUNTS * 2),
                           **settings)
        del own._generate_single_turn  # it draws
        own.add_callback(gradients := Gradients())
        torch.manual_seed(0)
        own.train()
        assert not own.unshared and not own.kept and len(gradients.steps) == 2
        updates.append(gradients.steps)
    assert len(kept) == passes and all(kept)
    for gradients, right in zip(*updates):
        assert right.any() and (gradients - right).norm() < 3e-6 * right.norm()


@pytest.mark.slow
def test_images_come_in_any_form(make_pair, tmp_path):
    """Paths, undecoded rows, bytes and arrays; stock TRL, which takes no bytes, gets images."""
    decoded, rows = list(make_table()), list(make_table())
    for number, row in enumerate(rows):
        images, paths = row["images"], []
        for image in images:
            paths.append(str(tmp_path / f"{number}_{len(paths)}.png"))
            image.save(paths[-1])
        row["images"] = [paths, [{"path": path, "bytes": None} for path in paths],
                         list(map(encode, images)), list(map(np.asarray, images))][number]
    plain, mixed = (IterableDataset.from_generator(lambda rows=rows: iter(rows))
                    for rows in (decoded, rows))
    stock, own = make_pair(max_steps=1, table=mixed)
    stock.train_dataset = plain
    check_same_gradients((stock, own), 1)


VARIANTS = {
    "plain": LoraConfig(), "rslora": LoraConfig(use_rslora=True), "dora": LoraConfig(use_dora=True),
    "bias": LoraConfig(lora_bias=True), "rank": LoraConfig(rank_pattern={"q_proj": 2}),
    "norms": LoraConfig(modules_to_save=["input_layernorm", "norm"]),
    "head": LoraConfig(modules_to_save=["lm_head"]),
    "parameter": LoraConfig(target_parameters=["language_model.layers.0.self_attn.q_proj.weight"]),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=100),
    "ia3": peft.IA3Config(feedforward_modules=[]), "loha": peft.LoHaConfig(),
    "lokr": peft.LoKrConfig(), "oft": peft.OFTConfig(oft_block_size=8, r=0),
    "vera": peft.VeraConfig(r=4), "hra": peft.HRAConfig(r=4), "road": peft.RoadConfig(group_size=4),
    "boft": peft.BOFTConfig(boft_block_size=4), "c3a": peft.C3AConfig(block_size=16),
    "fourierft": peft.FourierFTConfig(n_frequency=50), "miss": peft.MissConfig(r=4),
    "shira": peft.ShiraConfig(r=4),
    "vblora": peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=32, topk=2),
    "layer norms": peft.LNTuningConfig(target_modules=r".*language_model.*norm")}


NEAR_TIE = 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [
    torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)], ids=str)
@pytest.mark.parametrize("variant", [*VARIANTS, "two adapters"])
def test_the_decoder_writes_what_generate_writes(random_folder, processor, variant, dtype):
    model = AutoModelForImageTextToText.from_pretrained(random_folder, dtype=dtype)
    config = deepcopy(VARIANTS.get(variant, VARIANTS["plain"]))
    if not config.target_modules and variant != "parameter":
        config.target_modules = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    torch.manual_seed(0)
    model = get_peft_model(model, config)
    if variant == "two adapters":
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    cache = PromptCache(model, processor)
    texts = ["count the objects", "what is a circle"]
    prompts = cache.get([PromptSource(text, lambda text=text: text, (), (), tuple)
                         for text in texts])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = generate_rollouts(model, processor, prompts, 1, SamplingOptions(0.0, 1.0, 8, 9))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for prompt, (completion,) in zip(prompts, own):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.ids, *completion]])).logits[0]
        logits[:, [*generation.forbidden_token_ids(processor), *generation.end_token_ids(
            model.generation_config, processor)]] = -torch.inf
        logits = logits[len(prompt.ids) - 1:-1].float()
        highest = logits.amax(1)
        below = highest - logits[torch.arange(8), completion]
        if dtype == torch.float32:
            assert below.max() <= 1e-4, "the model's own choices, as `generate` makes them"
        else:  # only near ties may turn: in units of the logits' last place
            units = below / 2.0**(highest.abs().log2().floor() - 7)
            assert units.max() <= NEAR_TIE


@pytest.mark.slow
def test_generations_of_an_update_and_batches_of_an_evaluation_draw_anew(make_pair):
    table = make_table(MESSAGES[:1] * 4, (1,) * 4)
    table = Dataset.from_list([table[0]] * 4, table.features)
    _, own = make_pair(table=table, gradient_accumulation_steps=4, steps_per_generation=1,
                       per_device_train_batch_size=4, max_steps=1)
    drawn, held = [], []

    def record(numbers, group):
        drawn.append(SharedPrefixGRPOTrainer._draw_completions(own, numbers, group))
        held.append(len(own.sources))
        return drawn[-1]

    del own._generate_single_turn
    own._draw_completions = record
    own.args.per_device_eval_batch_size = 4
    own.evaluate(table)
    own.train()
    assert len(drawn) == 8 and len(set(map(str, drawn))) == 8
    assert held == [1, 1, 1, 1, 1, 2, 3, 4], "evaluation holds a batch's images, an update its own"


@pytest.mark.slow
def test_processes_share_a_group_and_draw_what_one_would(make_pair):
    _, own = make_pair(per_device_train_batch_size=4)
    rows = [own.train_dataset[row] for row in (0, 1, 2) for _ in range(4)]
    prompts = [move_images(row)["prompt"] for row in rows]
    own.model.train()

    def draw(part, process, processes):
        own.sources, own.draws = {}, Counter()
        own.accelerator = SimpleNamespace(
            num_processes=processes, process_index=process, device=torch.device("cpu"),
            gather=lambda values: values, unwrap_model=lambda model: model)
        numbers, _, _ = own._tokenize_prompts(prompts[part])
        drawn = own._draw_completions([number for number, in numbers], 4)
        return [completion.ids for completion in drawn]

    together = draw(slice(None), 0, 1)
    assert draw(slice(0, 6), 0, 2) + draw(slice(6, None), 1, 2) == together


@pytest.mark.slow
def test_a_batch_that_stock_trl_takes_over_is_counted_and_paid_once(make_pair):
    calls = []

    def paid(completions, **columns):
        calls.append(len(completions))
        return [float(len(text[0]["content"])) for text in completions]

    stock, own = make_pair(rewards=[paid], max_steps=1, gradient_accumulation_steps=1)
    logps = own._logps
    own._logps = lambda *arguments: tuple(values + 1 for values in logps(*arguments))
    stock.train()
    with pytest.warns(UserWarning, match="log-probabilities at the first update are 1 from stock"):
        own.train()
    assert calls == [8, 8] and logged(own)[0]["num_tokens"] == logged(stock)[0]["num_tokens"]


ROUNDED = {"weight": lambda weight: weight.bfloat16().to(weight.dtype)}


def change_fused_weights(monkeypatch, changes):
    """Let the decoder compute with other weights; changes: name -> function of its value."""
    fuse = decoding._fuse_layers

    def fuse_changed(*arguments):
        fused = fuse(*arguments)
        return fused and fused._replace(**{
            name: change(getattr(fused, name)) for name, change in changes.items()})

    monkeypatch.setattr(decoding, "_fuse_layers", fuse_changed)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [None, ROUNDED], ids=["left out", "rounded"])
def test_a_decoder_of_another_policy_is_noticed_though_the_adapter_is_zero(make_pair, monkeypatch,
                                                                           changes):
    """As one that leaves out what a new kind of adapter adds, which is nothing at first."""
    _, own = make_pair(max_steps=1, gradient_accumulation_steps=1)
    for name, parameter in own.model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    if changes:
        change_fused_weights(monkeypatch, changes)
    else:
        stock = decoding._active_adapter
        monkeypatch.setattr(decoding, "_active_adapter", lambda layer: stock(layer) and (
            *(torch.zeros_like(factor) for factor in stock(layer)[:2]), 1.0))
    with pytest.warns(UserWarning, match="the decoder's log-probabilities at the first update are"):
        own.train()


DIFFERENCES = "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [
    {"num_iterations": 2, "max_steps": 4},
    pytest.param({"steps_per_generation": 4}, marks=pytest.mark.nightly)], ids=str)
def test_a_decoder_that_rounds_otherwise_is_seen_in_the_log(make_pair, monkeypatch, settings):
    """The ratio of an update is 1 whatever drew its replies, so that no other figure tells."""
    def train():
        _, own = make_pair(**settings)
        del own._generate_single_turn
        own._check_update = lambda: None  # which would stop the sharing
        own.train()
        rows = [row for row in own.state.log_history if "loss" in row]
        assert [DIFFERENCES[0] in row for row in rows] == [True] * len(rows)
        return [[row[name] for name in DIFFERENCES] for row in rows]

    for mean, largest in train():
        assert 0 < mean < 1e-5 and mean <= largest < 1e-4
    change_fused_weights(monkeypatch, ROUNDED)
    for mean, largest in train():
        assert mean > 1e-4 and largest > 1e-3


@pytest.mark.slow
def test_text_alone_needs_only_a_tokenizer_and_a_tower_may_be_noticed_late(make_pair):
    table = make_table().remove_columns("images")
    pair = make_pair(table=table, rewards=[letters], max_steps=1, tokenizer=True)
    check_same_gradients(pair, 1)
    _, own = make_pair(max_steps=1)
    own.model.base_model.model.model.visual.requires_grad_(True)
    with pytest.warns(UserWarning, match="not shared: the vision tower is trained; freeze it"):
        own._check_sharing([])


@pytest.mark.slow
@pytest.mark.parametrize("trainings", [
    trainings_in_threads, pytest.param(nullcontext, marks=pytest.mark.nightly)])
def test_both_trainers_are_compared_on_a_users_table(tmp_path, capsys, trainings):
    """In threads; in processes, as people have them, at night."""
    table, base = tmp_path / "questions.jsonl", str(ROOT / "mig_kit/tiny_base")
    with pytest.raises(SystemExit):
        compare.main([str(table), "--model", base])
    assert "questions.jsonl is no file; give one of JSON lines" in capsys.readouterr().err
    picture(0).save(tmp_path / "0.png")
    table.write_text(json.dumps({"prompt": MESSAGES[0], "images": [str(tmp_path / "0.png")]}))
    with trainings():
        compare.main([str(table), "--model", base, "--group", "4", "--tokens", "6"])
    *sides, last = capsys.readouterr().out.splitlines()[-3:]
    assert [re.sub(r"[\d. ()]+", " ", side) for side in sides] == [
        "stock TRL MiB", "shared prompts MiB"]
    assert all(side.count("(") == 6 for side in sides)
    gap = float(re.search(r"difference of gradients: (\S+) of their norm", last)[1])
    assert 0 < gap < 1e-4  # rounding of five updates; with AVX2 alone 2.5e-5, a wrong mask 0.9


def wrong_mask(packed):
    """Replies go on one behind the other."""
    return replace(packed, lengths=[[sum(row)] for row in packed.lengths])


def wrong_split(packed):
    """Replies end where others do, which is right if all are of one length."""
    return replace(packed, lengths=[row[::-1] for row in packed.lengths])


def wrong_position(packed, step=0):
    """Positions of every reply are one too high from a step on."""
    positions, first = packed.positions.clone(), 0
    for length in sum(packed.lengths, []):
        positions[..., first + step:first + length] += 1
        first += length
    return replace(packed, positions=positions)


def wrong_key(read, model, prompts):
    """One token of every prompt is another one."""
    changed = [prompt.ids.clone() for prompt in prompts]
    for ids in changed:
        ids[-4] = 50
    return read(model, [replace(prompt, ids=ids) for prompt, ids in zip(prompts, changed)])


def see_the_future(is_affected, attend, query, key, value, prompt, lengths, window, options):
    """Replies attend to the token behind their own; is_affected: of their lengths."""
    if not is_affected(lengths):
        return attend(query, key, value, prompt, lengths, window, options)
    replies = []
    for own, *pair in zip(*(tensor.split(lengths, 2) for tensor in (query, key, value))):
        keys, values = (torch.cat(tensors, 2) for tensors in zip(prompt, pair))
        tokens, past = own.shape[2], keys.shape[2]
        sees = torch.ones(tokens, past, dtype=torch.bool).tril(past - tokens + 1)
        replies.append(scaled_dot_product_attention(own, keys, values, sees, enable_gqa=True,
                                                    **options))
    return torch.cat(replies, 2)


def turn_third(get, cache, sources):
    """From the third prompt of a batch on, the features of images are in the wrong order."""
    prompts = get(cache, sources)
    return prompts[:2] + [replace(prompt, features=prompt.features.flip(0))
                          for prompt in prompts[2:]]


def cap_logits(forward, states):
    """Another head than TRL's own method computes."""
    return 5 * torch.tanh(forward(states) / 5)


PACK = (logprobs, "_pack_completions")
FAULTS = {change.__name__: (*PACK, lambda pack, *arguments, change=change: change(
    pack(*arguments))) for change in (wrong_mask, wrong_position)}
FAULTS["wrong_key"] = (logprobs, "read_prompts", wrong_key)
RARE_FAULTS = {
    "wrong split": (*PACK, lambda pack, *arguments: wrong_split(pack(*arguments))),
    "position 33": (*PACK, lambda pack, *arguments: wrong_position(pack(*arguments), 32)),
    "future, groups of more than two": (
        groups, "_attend_replies", partial(see_the_future, lambda lengths: len(lengths) > 2)),
    "future, more than 32 tokens": (
        groups, "_attend_replies", partial(see_the_future, lambda lengths: max(lengths) > 32)),
    "third prompt": (PromptCache, "get", turn_third)}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "fault"), [
    *((torch.float32, fault) for fault in [None, "head", *FAULTS, *RARE_FAULTS]),
    *(pytest.param(torch.bfloat16, fault, marks=pytest.mark.nightly)
      for fault in (None, *FAULTS))], ids=str)
def test_one_wrong_thing_is_noticed_at_the_first_update(random_folder, processor, tmp_path,
                                                       monkeypatch, dtype, fault):
    is_float32 = dtype == torch.float32
    base, processor = ((random_folder, processor) if is_float32 else
                       (ROOT / "mig_kit/tiny_base", None))
    trainer = make_own(AutoModelForImageTextToText.from_pretrained(base, dtype=dtype), processor,
                       tmp_path, None, max_completion_length=40, bf16=not is_float32,
                       per_device_train_batch_size=16, peft_config=QUERIES, strict=True,
                       learning_rate=0.0)
    ids = torch.randint(7, 600, (16, 40), generator=torch.Generator().manual_seed(0)).tolist()
    trainer._generate_single_turn = lambda *_: (
        [row[:length] for row, length in zip(ids, [40, 3, 34, 12] * 4)], None)
    if fault == "head":
        owner, name, change = trainer.model.base_model.model.lm_head, "forward", cap_logits
    elif fault:
        owner, name, change = (FAULTS | RARE_FAULTS)[fault]
    else:
        trainer.train()
        assert not trainer.unshared and not any(
            parameter.any() for name, parameter in trainer.model.named_parameters()
            if "lora_B" in name), "the adapter is put back"
        return
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: change(right, *arguments))
    with pytest.raises(ValueError, match="not shared: .* at the first update are"):
        trainer.train()


def behind_seven(get, cache, sources):
    """The text behind seven images or more has positions that are one too high."""
    return [prompt if len(source.sizes) < 7 else replace(prompt, positions=torch.cat(
                [prompt.positions[:, :-4], prompt.positions[:, -4:] + 1], 1))
            for source, prompt in zip(sources, get(cache, sources))]


def mask_last_tokens(gather, own, steps):
    """The last token of every completion is left out on the way from TRL's steps."""
    return [step | {"completion_mask": (mask := step["completion_mask"]) * mask.roll(-1, 1)}
            for step in gather(own, steps)]


OWN = SharedPrefixGRPOTrainer
FAULTS_OF_UPDATES = {
    "last token masked where rows moved": (
        "log-probabilities at the first update", OWN, "_gather_groups", mask_last_tokens),
    "advantages stay where rows moved": (
        "gradients at the first update", OWN, "_gather_groups", lambda gather, own, steps: [
            moved | {"advantages": step["advantages"]}
            for step, moved in zip(steps, gather(own, steps))]),
    "another group's prompt": (
        "log-probabilities at the first update", OWN, "_logps",
        lambda read, own, model, numbers, *others: read(own, model, numbers.roll(1), *others)),
    "last token unscored": (
        "log-probabilities at the first update", OWN, "_logps",
        lambda read, own, model, numbers, ids, mask: [
            values * mask.roll(-1, 1) for values in read(own, model, numbers, ids, mask)]),
    "drawn from logits x 2": (
        "-log p of the tokens drawn at the first update", generation, "sample_tokens",
        lambda sample, logits, *others: sample(2 * logits, *others)),
    "positions behind seven images": ("log-probabilities at update 1", PromptCache, "get",
                                      behind_seven)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS_OF_UPDATES)
def test_an_update_of_another_gradient_or_policy_is_noticed(make_pair, monkeypatch, fault):
    what, owner, name, change = FAULTS_OF_UPDATES[fault]
    steps = 1 + (name == "_gather_groups")
    _, own = make_pair(table=make_table(counts=(1, 3, 7, 2)), shuffle_dataset=False,
                       max_completion_length=40, gradient_accumulation_steps=steps,
                       per_device_train_batch_size=8 // steps)
    if owner is generation:
        del own._generate_single_turn
    right, own.strict = getattr(owner, name), True
    monkeypatch.setattr(owner, name, lambda *arguments: change(right, *arguments))
    with pytest.raises(ValueError, match=f"not shared: (the decoder's )?{what} are"):
        own.train()


@pytest.mark.slow
@pytest.mark.parametrize("leaves_out", [False, True])
def test_the_tokens_drawn_are_measured_by_the_entropy_unless_some_are_left_out(make_pair, capsys,
                                                                               leaves_out):
    """Completions that ended are no fair sample: the tiny base's were 1.1 off, 0.99 allowed."""
    _, own = make_pair(max_steps=1, gradient_accumulation_steps=1, max_completion_length=200,
                       mask_truncated_completions=leaves_out)
    del own._generate_single_turn
    own.train()
    assert "sampling/mean_negative_logp" in own.state.log_history[0], "some have ended"
    assert ("-log p of the tokens drawn" in capsys.readouterr().out) != leaves_out


@pytest.mark.slow
@pytest.mark.parametrize(("case", "reason"), [
    ("hook", "a hook on lm_head acts"),
    ("augmentation", "rows of a group have different prompts or images")])
def test_what_no_sharing_can_follow_is_drawn_and_learnt_as_in_stock_trl(make_pair, case, reason):
    draws, table = np.random.default_rng(0), make_table()
    if case == "augmentation":
        table = table.with_transform(lambda rows: rows | {"images": [
            [picture(int(draws.integers(10**6)))] * len(row) for row in rows["images"]]})
    _, own = make_pair(table=table, rewards=[number_of_images], max_steps=3, **ONE_STEP)
    if case == "hook":
        own.model.base_model.model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=reason):
        own.train()
    assert [row["shared"] for row in own.state.log_history if "loss" in row] == [0, 0, 0]


class Shrink(TrainerCallback):
    """Makes images smaller from the second update on."""

    def on_step_begin(self, args, state, control, processing_class=None, **others):
        edges = (3136, 3136) if state.global_step else (3136, 401408)
        processing_class.image_processor.size = dict(zip(("shortest_edge", "longest_edge"), edges))


@pytest.mark.slow
def test_images_that_change_on_the_way_are_as_in_stock_trl(make_pair, processor, monkeypatch):
    """Rewards paint on them, in columns and in prompts, and a callback has them resized."""
    def scribble(prompts, completions, images, **columns):
        for number, (prompt, row) in enumerate(zip(prompts, images)):
            parts = [part for message in prompt if isinstance(message["content"], list)
                     for part in message["content"]]
            image = row[0] if number % 2 else next(
                part["image"] for part in parts if part["type"] == "image")
            image.paste("red", (0, 0, 40, 40))
        return [float(len(text[0]["content"])) for text in completions]

    monkeypatch.setattr(processor.image_processor, "size", processor.image_processor.size)
    pair = make_pair(rewards=[scribble], max_steps=3, learning_rate=1e-6, **ONE_STEP)
    for trainer in pair:
        trainer.add_callback(Shrink())
    check_same_gradients(pair, 3)


class BusyCallback(TrainerCallback):
    """Reads a row, and sets a temperature, which stock TRL read before."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **others):
        assert len(train_dataloader.dataset[1]["images"]) == COUNTS[1]

    def on_step_begin(self, args, state, control, **others):
        args.temperature = 7.0


@pytest.mark.slow
def test_callbacks_and_an_uneven_last_batch_are_as_in_stock_trl(make_pair):
    pair = make_pair(learning_rate=1e-6)
    evaluated = []
    for trainer in pair:
        trainer.add_callback(BusyCallback())
        trainer.args.per_device_eval_batch_size = 8
        figures = trainer.evaluate(make_table(MESSAGES[:3], COUNTS[:3]))
        evaluated.append({name: value for name, value in figures.items()
                          if name != "eval_shared" and "time" not in name
                          and "per_second" not in name})
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-3, abs=1e-5, nan_ok=True)
    check_same_gradients(pair, 2)
    own = pair[1]
    own.generation_config.max_new_tokens = 3
    assert max(len(drawn.ids) for drawn in own._draw_completions(
        list(own.sources)[:1] * 4, 4)) == 3


@pytest.mark.slow
def test_tokens_of_images_in_a_text_or_none_in_a_tokenizer_are_named(random_folder, processor,
                                                                     tmp_path):
    table = make_table([[{"role": "user", "content": f"{text}<|image_pad|>"}] for text in "ab"],
                       (1, 1))
    for with_images in (table, table.remove_columns("images")):
        trainer = make_own(random_folder, processor, tmp_path, train_dataset=with_images)
        with pytest.raises(ValueError, match="take image tokens out of what people wrote"):
            trainer.train()
    words = processor.tokenizer.backend_tokenizer.to_str().replace("<|image_pad|>", "<|gap|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(words), eos_token=processor.tokenizer.eos_token,
        pad_token=processor.tokenizer.pad_token, padding_side="left",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}")
    with pytest.warns(UserWarning, match="not shared: the tokenizer lacks the tokens of images"):
        make_own(random_folder, tokenizer, tmp_path,
                 train_dataset=make_table().remove_columns("images"))


def test_weight_decay_leaves_an_adapter_alone_that_is_not_active(random_folder):
    model = AutoModelForImageTextToText.from_pretrained(random_folder, dtype=torch.float32)
    model = get_peft_model(model, QUERIES)
    model.add_adapter("other", QUERIES)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    average_gradients(model, 1)
    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded and all(".default." in name for name in graded)


@pytest.mark.slow
@pytest.mark.parametrize(("drawn", "reason"), [(1000, "too short beside completions of 1000"),
                                               (12, "")])
def test_short_prompts_beside_long_completions_are_left_to_stock_trl(random_folder, processor,
                                                                      tmp_path, drawn, reason):
    """What was drawn decides, not the limit."""
    trainer = make_own(random_folder, processor, tmp_path, max_completion_length=2000)
    words = processor.tokenizer("a e i o u the")["input_ids"]
    trainer._generate_single_turn = lambda rows, *_: (
        [words[:1 + row % 4] + [words[-1]] * (drawn - 1 - row % 4) for row in range(len(rows))],
        None)
    with pytest.warns(UserWarning, match=reason) if reason else nullcontext():
        trainer.train()
    assert bool(trainer.unshared) == bool(reason)


class GeometricMean(SharedPrefixGRPOTrainer, GMPOTrainer):
    """Another trainer of TRL's behind the kit's."""


@pytest.mark.slow
def test_another_trainer_of_trl_may_stand_behind(make_pair, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "GRPOTrainer", GMPOTrainer)
    monkeypatch.setattr(sys.modules[__name__], "SharedPrefixGRPOTrainer", GeometricMean)
    monkeypatch.setattr(sys.modules[__name__], "GRPOConfig", GMPOConfig)
    check_same_gradients(make_pair(learning_rate=1e-6), 2)


def watch_rewards(trainer, seen):
    calculate = trainer._calculate_rewards
    trainer._calculate_rewards = lambda rows, *others: (
        seen.append([sorted(rows[0]), rows[0]["prompt"], len(rows[0]["images"])])
        or calculate(rows, *others))


class Memory:
    """An object that a reward keeps something in, and that cannot be copied."""

    def __init__(self):
        self.replies, self.lock = [], Lock()


@pytest.mark.slow
def test_hooks_see_trls_rows_and_rewards_the_objects_in_them(make_pair):
    def table():
        memories = [Memory() for _ in range(4)]
        return make_table().add_column("row", range(4)).with_transform(lambda rows: rows | {
            "memory": [memories[row] for row in rows["row"]]})

    def novelty(completions, memory, **columns):
        values = []
        for completion, own in zip(completions, memory):
            values.append(1 / (1 + len(own.replies)))
            own.replies.append(completion)
        return values

    trainers, seen = [], ([], [])
    for index, own_seen in enumerate(seen):
        trainer = make_pair(table=table(), rewards=[novelty], max_steps=3, log_completions=False,
                            **ONE_STEP)[index]
        watch_rewards(trainer, own_seen)
        trainer.train()
        trainers.append(trainer)
    stock, own = ([row["reward"] for row in logged(trainer)] for trainer in trainers)
    assert stock == own and stock[-1] < stock[0] and not trainers[1].unshared
    assert seen[0] == seen[1] and len(seen[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["completion_mask", "tool_mask"])
def test_a_mask_with_holes_is_refused_unless_it_is_of_the_loss_alone(make_pair, monkeypatch, name):
    score = GRPOTrainer._generate_and_score_completions

    def hide_two(trainer, inputs):
        output = score(trainer, inputs)
        output[name] = output["completion_mask"].clone()
        output[name][:, 1:3] = 0
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", hide_two)
    pair = make_pair(learning_rate=1e-6)
    if name == "tool_mask":
        return check_same_gradients(pair, 2)
    with pytest.raises(ValueError, match="completion_mask hides tokens before others"):
        pair[1].train()


@pytest.mark.slow
def test_a_parameter_that_no_pass_uses_does_not_decay(make_pair):
    for trainer in make_pair(weight_decay=0.5, max_steps=1):
        spare = torch.nn.Parameter(torch.ones(3))
        trainer.model.register_parameter("spare", spare)
        trainer.train()
        assert spare.tolist() == [1, 1, 1]
