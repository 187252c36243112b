"""Rules of parameters: a wrong value, or values that cannot act together, are one sentence."""

import math

import pytest
from command_line import describe_files, error_of

from mig_kit.pipeline import joint_rules, params, stage_keys, store
from mig_kit.pipeline.joint_rules import validate_params
from mig_kit.rewards import REWARDS
from mig_kit.serving.served_rollouts import SAMPLING_CURVES
from mig_kit.stages.grpo import CURVES

STAGES = {stage[:2]: stage for stage in store.STAGES}
SINGLE = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
TWINS = f"{SINGLE}, so that cispo and vespo are dapo, sapo is grpo, and luspo is dr_grpo times"
TWICE = {"num_iterations": 2}
SEQUENCE = {"importance_sampling_level": "sequence"}
KIT = ["format", "image", "box", "choice"]
NO_SHARING = {"share_prefix": False}
SHARES = "it must be a list of 3 numbers, each 0 to 1"
WEIGHTS = "it must map names to numbers, as {format: 0.2, image: 0.3, box: 1.0, choice: 1.3}"
# stage, wrong values -> a part of the sentence; FILE, BROKEN and OTHER are files of rewards
REFUSED = [
    ("00", {"memory_gib": -1}, "0 or more"),
    ("00", {"disk_gib": "nan"}, "it must be a float, 0 or more"),
    ("00", {"profile": "huge"}, "it must be tiny or a folder of params/"),
    ("00", {"device": "gpu"}, "one of auto, cuda, cpu"),
    ("01", {"cot_per_task": -1}, "it must be an int, 0 or more"),
    ("01", {"seed": -1}, "it must be an int, 0 to 4294967295"),
    ("01", {"val_per_task": 0}, "1 or more"),
    ("01", {"data_shares": [0.5, 0.2, 0.2]}, "must sum to 1"),
    ("01", {"data_shares": [0.5, 0.5]}, SHARES),
    ("01", {"data_shares": [1, "a", 0]}, "a list of 3 numbers, each 0 to 1"),
    ("01", {"data": "own.jsonl"}, "the rules teacher reads synthetic scenes only; set teacher"),
    ("01", {"data": "", "teacher": "none"}, "scenes or a file that exists; name the"),
    ("01", {"data": "none.jsonl", "teacher": "none"},
     "data is 'none.jsonl', but it must be scenes or a file that exists"),
    ("01", {"teacher": "own"}, "teacher own is the key 'reply' of your own data"),
    ("01", {"data": "x", "teacher": "none", "train_find_all_per_task": 9},
     "questions for all boxes are made of synthetic scenes only"),
    ("01", {"teacher": "endpoint"}, "endpoint_url must be like http://localhost"),
    ("01", {"teacher": "endpoint", "endpoint_model": "m", "endpoint_url": "http://u:secret@a/v1"},
     "endpoint_url is set and endpoint"),
    ("01", {"image_root": "nowhere"}, "it must be a folder that exists"),
    ("01", {"min_pixels": 500000}, "the lower limit must be at most the upper one; swap them"),
    ("01", {"max_pixels": 100}, "784 or more"),
    ("01", {"base_model": "qwen"}, "it must be tiny, a folder that exists, or USER/NAME of"),
    ("02", {"learning_rate": -1}, "it must be a float, above 0"),
    ("02", {"lora_dropout": 1}, "0 to below 1"),
    ("04", {"min_pass_rate": 0.95}, "the lower rate must be at most the upper one; swap them"),
    ("04", {"max_pass_rate": 1.1}, "0 to 1"),
    ("04", {"replies": 0}, "04 needs one reply or more"),
    ("04", {"server": "somewhere"}, "give addresses such as http://localhost:8000/v1"),
    ("05", {"num_generation": 4}, "05_grpo has no parameter 'num_generation'; did you mean"),
    ("05", {"num_generations": "many"}, "is 'many', a str; it must be an int, 2 or more"),
    ("05", {"num_generations": 1}, "it must be an int, 2 or more"),
    ("05", {"hub_token": "hf_x"}, "would be kept in the notebook and in run.json; set HF_TOKEN"),
    ("05", {"multi_objective_aggregation": "normalize_then_sum"}, "leave multi_objective_aggreg"),
    ("05", {"share_prefix": 1}, "'share_prefix' is 1, an int; it must be true or false"),
    ("05", {"learning_rate": "small"}, "must be a float, above 0"),
    *(("05", {"reward_weights": weights}, WEIGHTS) for weights in (
        [0.2, 0.3, 1.0, 1.3], {"box": "much"}, {"box": True}, {"box": math.nan}, {1: 1.0}, 0.5)),
    ("05", {"start_from": "nowhere"}, "it must be merged, base, adapter or a folder that exists"),
    ("05", {"scale_rewards": "nope"}, "did you mean 'none'? It is one of batch, group, none"),
    ("05", {"hallucinated_image_penalty": "xyz"}, "it must be one of none, format, all"),
    ("05", {"loss_type": "dpo"}, "did you mean 'dapo'?"),
    ("05", {"loss_type": "sapo"}, f"loss_type is 'sapo' and num_iterations is 1, but {TWINS}"),
    ("05", {"loss_type": "vespo"}, TWINS),
    ("05", {"loss_type": "cispo", "epsilon_high": 5.0}, TWINS),
    ("05", {"loss_type": "luspo", **SEQUENCE}, "use that loss, or set num_iterations to 2 or more"),
    ("05", SEQUENCE, f"{SINGLE}, for a token and for a sequence; set num_iterations to 2"),
    ("05", {"epsilon": 0.1}, "so neither has anything to clip; set num_iterations to 2 or more"),
    ("05", {"trl": {"epsilon_high": 0.28}},
     "epsilon_high is 0.28 and num_iterations is 1, but with num_iterat"),
    ("05", {"trl": {"num_iterations": 0}}, "1 or more"),
    ("05", {"trl": {"top_p": "all"}}, "'top_p' is 'all', a str; it must be a float"),
    ("05", {"trl": {"top_q": 1}}, "05_grpo has no parameter 'top_q'"),
    ("05", {"loss_type": "bnpo", "gradient_accumulation_steps": 1, "launcher": ""},
     "use dapo, or raise gradient_acc"),
    ("05", {"loss_type": "cispo", "epsilon_high": 0.28, **TWICE}, "set epsilon_high to 1 or more"),
    ("05", {"loss_type": "cispo", **TWICE}, "would multiply nearly every gradient by it"),
    ("05", {"loss_type": "luspo", **TWICE}, "set importance_sampling_level to sequence for luspo"),
    ("05", {"loss_type": "vespo", **TWICE, **SEQUENCE}, "sequence for luspo, to token for vespo"),
    ("05", {"vllm_importance_sampling_mode": "token_mask"}, "name a server, or take them out"),
    ("05", {"vllm_importance_sampling_clip_max": 2.0}, "_clip_max is 2.0, but "),
    ("05", {"top_entropy_quantile": 0.2, **TWICE, **SEQUENCE}, "set one of the two back"),
    ("05", {"num_generations": 3, **NO_SHARING, "per_device_train_batch_size": 2},
     "(without share_prefix, times gradient_accumulation_steps), so that groups stay whole"),
    ("05", {"gradient_accumulation_steps": 3}, "to a multiple of their number, or launcher"),
    ("05", {"launcher": "torchrun --nnodes 3 --nproc-per-node 2"},
     "must share the steps of an update"),
    ("05", {"launcher": "torchrunn"}, "which is neither beside"),
    ("05", {"server": "http://x", **NO_SHARING}, "a server needs share_prefix"),
    ("05", {"server": "http://u:secret@a/v1"}, "give addresses such as http://localhost:8000/v1"),
    ("05", {"start_from": "adapter", "beta": 0.1}, "not beta's reference"),
    ("05", {"start_from": "adapter", "server": "http://x"}, "4-bit weights, which no server holds"),
    ("05", {"rewards": []}, "list names of rewards, such as"),
    ("05", {"rewards": ["image", "box"]}, "takes the reward format away, which must be one of rew"),
    ("05", {"rewards": ["boxs"]}, "did you mean 'box'?"),
    ("05", {"rewards": [*KIT, "?"]}, "the kit's are format, image, box,"),
    ("05", {"rewards": [*KIT, "box"]}, "two of rewards are called 'box'"),
    ("05", {"reward_weights": {"boxes": 1.0}}, "reward_weights has 'boxes', which is not one of"),
    ("05", {"rewards": ["format", "image"], "reward_weights": {"box": 0.5}}, "has 'box', which is"),
    ("05", {"rewards": [*KIT, "none.py:center"]}, "none.py, which does not exist"),
    ("05", {"rewards": [*KIT, "FILE:centre"]}, "has no function 'centre'; it has center, length"),
    ("05", {"rewards": [*KIT, "FILE:truth"]}, "have a 'truth' of their own; rename the function"),
    ("05", {"rewards": [*KIT, "FILE:length"]}, "have a 'length' of their own; rename the function"),
    ("05", {"rewards": [*KIT, "BROKEN:center"]}, "broken.py, line 2: invalid syntax; correct it"),
    ("05", {"rewards": [*KIT, "FILE:center", "OTHER:edge"]}, "two files called my_rewards.py"),
    ("06", {"eval_seed": "x"}, "is 'x', a str; it must be an int, 0 to 4294967295"),
    ("08", {"model": "nowhere"}, "a folder that exists, or USER/NAME of the hub"),
    ("08", {"images": 9}, "1 to 8"),
    ("08", {"wide_hidden": 200}, "use a multiple of 128"),
    ("09", {"groups": ["a=b", "a=c"]}, "two groups are called 'a'"),
    ("09", {"groups": [1]}, "a list of name=run,run"),
    ("09", {"groups": "a"}, "is 'a', a str; it must be a list of name=run,run"),
    ("09", {"reference": "other"}, "the reference must be one of the groups"),
    ("90", {"vision_steps": [1, 0]}, "a list of 2 numbers, each 1 or more"),
    ("90", {"rows": [1.5, 2]}, "a list of 2 numbers, each 1 or more"),
    ("90", {"course_steps": [1]}, "a list of 4 numbers, each 1 or more"),
]
OFFERED = [
    {}, {"num_generations": 16}, {"num_generations": 64, **NO_SHARING},
    {"epsilon": 0.2, "epsilon_high": 0.0}, {"loss_type": "bnpo"}, {"loss_type": "dr_grpo"},
    {"top_entropy_quantile": 0.2, "mask_truncated_completions": True}, {"num_iterations": 4},
    {"epsilon": 0.1, "epsilon_high": 0.28, **TWICE}, {"loss_type": "sapo", **TWICE, **SEQUENCE},
    {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.2, **TWICE, **SEQUENCE},
    {"loss_type": "luspo", **TWICE, **SEQUENCE}, {"loss_type": "vespo", **TWICE},
    {"loss_type": "vespo", "server": "http://a/v1", "vllm_importance_sampling_mode": "token_mask",
     **TWICE}, {"rewards": ["image", "box"], "hallucinated_image_penalty": "all"},
]


@pytest.fixture
def reward_files(tmp_path):
    center = "def center(reply, sample, box_format):\n    return 1.0\n\n\n"
    texts = {"FILE": ("my_rewards.py", center + center.replace("center", "length")),
             "BROKEN": ("broken.py", "x = 1\ndef center(:\n"),
             "OTHER": ("other/my_rewards.py", center.replace("center", "edge"))}
    (tmp_path / "other").mkdir()
    for name, text in texts.values():
        (tmp_path / name).write_text(text)
    return {word: tmp_path / name for word, (name, _) in texts.items()}


@pytest.mark.parametrize(("number", "values", "part"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_one_sentence(number, values, part, reward_files):
    rewards = values.get("rewards", [])
    for word, path in reward_files.items():
        rewards = [text.replace(word, str(path)) for text in rewards]
    with pytest.raises((ValueError, TypeError, KeyError, FileNotFoundError)) as error:
        validate_params(values | ({"rewards": rewards} if rewards else {}), STAGES[number])
    sentence = str(error.value.args[0])
    assert part in sentence and "\n" not in sentence and "secret" not in sentence
    names = [name.split("_")[0] for name in (*values, *values.get("trl", ()))]
    assert any(name in sentence for name in (*names, ".py")), "which parameter, or which file"


@pytest.mark.parametrize("values", OFFERED, ids=str)
def test_what_acts_is_not_refused(values):
    assert values.items() <= validate_params(values, "05_grpo").items()


def test_a_tracker_has_to_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to is 'wandb', but a tracker must be installed"):
        validate_params({"report_to": "wandb"}, "02_sft")


def test_the_names_are_those_of_the_rewards_and_curves():
    assert tuple(REWARDS) == joint_rules.KIT_REWARDS
    names = {"step", "reward", *CURVES.values(), *SAMPLING_CURVES.values()}
    assert names <= set(joint_rules.NAMES_OF_CURVES)


def test_the_file_of_a_reward_is_part_of_what_makes_05_stale(reward_files, monkeypatch):
    monkeypatch.setattr(stage_keys, "with_run_params", lambda stage, run_id, params: params)
    monkeypatch.setattr(stage_keys, "require_record", lambda *_: {"outputs": {}})
    own_file = reward_files["FILE"]
    values = {"rewards": ["format", f"{own_file}:center"], "reward_weights": {"center": 0.5}}
    values = validate_params(values, "05_grpo")
    key = store.stage_facts("05_grpo", "run", values)["key"]
    assert store.stage_facts("05_grpo", "run", values)["key"] == key
    own_file.write_text(own_file.read_text().replace("1.0", "0.5"))
    assert store.stage_facts("05_grpo", "run", values)["key"] != key


def test_a_cell_and_the_command_refuse_it_alike_and_touch_nothing(root, leave):
    for stage in store.STAGES:
        leave(stage, "default")
    before = describe_files(root)
    with pytest.raises(ValueError) as in_a_notebook:
        store.begin_stage("02_sft", {"learning_rate": -1})
    on_command = error_of("run", "02", "-p", "learning_rate", "-1")
    for sentence in (str(in_a_notebook.value), on_command):
        assert "'learning_rate' is -1.0; it must be a float, above 0" in sentence
    # a whole recipe is checked before its first stage
    sentence = error_of("run", "-p", "num_generations", "7", "--force")
    assert "num_generations is 7, per_device_train_batch_size is 32" in sentence
    assert describe_files(root) == before


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
