"""The table of rules: it knows every parameter, and a wrong value is refused in one sentence, with
nothing written, by the command line and by a notebook's setup cell.
"""

import json
import math

import papermill
import pytest
from click.testing import CliRunner
from command_line import describe_files

from mig_kit.commands.main import cli
from mig_kit.pipeline import params, store
from mig_kit.pipeline.joint_rules import validate_params

# stage, parameter and wrong value -> a part of the sentence
WRONG = [
    ("00", "memory_gib", -1, "0 or more"),
    ("00", "disk_gib", "nan", "it must be a float, 0 or more"),
    ("00", "profile", "huge", "it must be tiny or a folder of params/"),
    ("08", "model", "nowhere", "a folder that exists, or USER/NAME of the hub"),
    ("00", "device", "gpu", "one of auto, cuda, cpu"),
    ("01", "cot_per_task", -1, "it must be an int, 0 or more"),
    ("01", "seed", -1, "it must be an int, 0 to 4294967295"),
    ("01", "val_per_task", 0, "1 or more"),
    ("01", "data_shares", [0.5, 0.2, 0.2], "must sum to 1"),
    ("01", "data_shares", [0.5, 0.5], "it must be a list of 3 numbers, each 0 to 1"),
    ("01", "data", "own.jsonl", "the rules teacher reads drawn scenes only; set teacher to none"),
    ("01", "concurrency", 0, "1 or more"),
    ("01", "min_pixels", 500000, "the lower limit must be at most the upper one; swap them"),
    ("01", "max_pixels", 100, "784 or more"),
    ("01", "base_model", "qwen", "it must be tiny, a folder that exists, or USER/NAME of the hub"),
    ("02", "num_train_epochs", 0, "it must be a float, above 0"),
    ("02", "learning_rate", -1, "above 0"),
    ("02", "lora_dropout", 1, "0 to below 1"),
    ("04", "min_pass_rate", 0.95, "the lower rate must be at most the upper one; swap them"),
    ("04", "max_pass_rate", 1.1, "0 to 1"),
    ("04", "server", "somewhere", "give addresses such as http://localhost:8000/v1"),
    ("05", "num_generations", 1, "it must be an int, 2 or more"),
    ("05", "start_from", "nowhere", "it must be merged, base, adapter or a folder that exists"),
    ("05", "rewards", [], "list names of rewards"),
    ("05", "scale_rewards", "nope", "did you mean 'none'? It is one of batch, group, none"),
    ("05", "hallucinated_image_penalty", "xyz", "it must be one of none, format, all"),
    ("05", "loss_type", "dpo", "did you mean 'dapo'?"),
    ("06", "eval_seed", "x", "is 'x', a str; it must be an int, 0 to 4294967295"),
    ("01", "image_root", "nowhere", "it must be a folder that exists"),
    ("08", "images", 9, "1 to 8"),
    ("08", "side", 20, "56 to 1960"),
    ("08", "wide_hidden", 200, "use a multiple of 128"),
    ("09", "groups", ["a=b", "a=c"], "two groups are called 'a'"),
    ("09", "reference", "other", "the reference must be one of the groups"),
    ("90", "vision_steps", [1, 0], "a list of 2 numbers, each 1 or more"),
    ("90", "course_steps", [1], "a list of 4 numbers, each 1 or more"),
]
STAGES = {stage[:2]: stage for stage in store.STAGES}
IDS = [f"{stage}-{name}-{value}" for stage, name, value, _ in WRONG]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The run "default", which is finished but for its content; no kernel may start in it."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.setattr(papermill, "execute_notebook",
                        lambda *arguments, **options: pytest.fail("a kernel would start"))
    for stage in store.STAGES:
        folder = tmp_path / "default" / stage
        folder.mkdir(parents=True)
        (folder / "product").write_text(stage)
        (folder / "run.json").write_text(json.dumps(
            {"params": params.profile_params(stage), "key": "k", "outputs": {"product": "1"}}))
    return tmp_path


@pytest.mark.parametrize(("number", "name", "value", "part"), WRONG, ids=IDS)
def test_a_wrong_value_is_one_sentence(number, name, value, part):
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as error:
        validate_params({name: value}, STAGES[number])
    sentence = str(error.value.args[0])
    assert name.split("_")[0] in sentence and part in sentence and "\n" not in sentence


def test_a_cell_and_the_command_refuse_it_alike_and_touch_nothing(runs):
    before = describe_files(runs)
    with pytest.raises(ValueError) as in_a_notebook:
        store.begin_stage("02_sft", {"learning_rate": -1})
    on_command = CliRunner().invoke(cli, ["run", "02", "-p", "learning_rate", "-1"]).exception
    for error in (in_a_notebook.value, on_command):
        assert "'learning_rate' is -1.0; it must be a float, above 0" in str(error)
    assert describe_files(runs) == before


def test_a_whole_recipe_is_checked_before_its_first_stage(runs):
    before = describe_files(runs)
    result = CliRunner().invoke(cli, ["run", "-p", "num_generations", "7", "--force"])
    assert "num_generations is 7, per_device_train_batch_size is 32" in str(result.exception)
    assert describe_files(runs) == before


@pytest.mark.parametrize("stage", store.STAGES)
def test_every_parameter_has_a_rule(stage):
    parameters = params.stage_parameters(stage)
    assert parameters.keys() <= params.RULES.keys()
    for name, parameter in parameters.items():
        rule, is_text = params.RULES[name], isinstance(parameter.default, str)
        params.check_value(name, parameter.default, stage)
        items = parameter.default if isinstance(parameter.default, list) else [parameter.default]
        has_numbers = isinstance(items[0], int | float | dict) and not isinstance(items[0], bool)
        is_range = isinstance(rule, str) and params.RANGE.fullmatch(rule) is not None
        assert is_range == (has_numbers and name != "reward_weights"), name
        assert not isinstance(rule, tuple) or is_text, name


def test_no_rule_is_of_a_parameter_that_does_not_exist():
    names = {name for stage in store.STAGES for name in params.stage_parameters(stage)}
    assert params.RULES.keys() == names


@pytest.mark.parametrize("profile", params.list_profiles())
def test_every_profile_passes(profile, tmp_path):
    (tmp_path / "own.jsonl").write_text("{}\n")
    for stage in store.STAGES:
        values = params.profile_params(stage, profile)
        if values.get("data") == "":
            values["data"] = str(tmp_path / "own.jsonl")
        assert validate_params(values, stage) == values


@pytest.mark.parametrize(("rule", "inside", "outside"), [
    ("0 or more", [0, 5, 0.1], [-1e-9, math.nan, math.inf]), ("above 0", [1e-9, 2], [0, -1]),
    ("0 to 1", [0, 1, 0.5], [1.1, -0.1, math.nan]), ("0 to below 1", [0, 0.99], [1, 2]),
    ("2 numbers, each 0 to 1", [[0, 1]], [[0], [0, 1, 1], [0, 2]]),
    ("1 to 8", [[1], [8, 2]], [[]])])
def test_ranges(rule, inside, outside, monkeypatch):
    monkeypatch.setitem(params.RULES, "seed", rule)
    for value in inside:
        params.check_value("seed", value, "05_grpo")
    for value in outside:
        with pytest.raises(ValueError, match="05_grpo: parameter 'seed' is .*; it must be "):
            params.check_value("seed", value, "05_grpo")
