"""Parameters that cannot act together are refused with the remedy, before any kernel starts."""

import pytest

from mig_kit.pipeline import joint_rules, store
from mig_kit.pipeline.joint_rules import validate_params
from mig_kit.rewards import REWARDS
from mig_kit.serving.served_rollouts import SAMPLING_CURVES
from mig_kit.stages.grpo import CURVES

SINGLE = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
TWINS = f"{SINGLE}, so that cispo and vespo are dapo, sapo is grpo, and luspo is dr_grpo times"
TWICE = {"num_iterations": 2}
SEQUENCE = {"importance_sampling_level": "sequence"}
KIT = ["format", "image", "box", "choice"]
NO_SHARING = {"share_prefix": False}
REFUSED = [
    ({"loss_type": "sapo"}, f"loss_type is 'sapo' and num_iterations is 1, but {TWINS}"),
    ({"loss_type": "vespo"}, TWINS),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, TWINS),
    ({"loss_type": "luspo", **SEQUENCE}, "use that loss, or set num_iterations to 2 or more"),
    (SEQUENCE, f"{SINGLE}, for a token and for a sequence; set num_iterations to 2"),
    ({"epsilon": 0.1}, "so neither has anything to clip; set num_iterations to 2 or more"),
    ({"epsilon_high": 0.28}, "epsilon_high is 0.28 and num_iterations is 1, but with num_iterat"),
    ({"loss_type": "bnpo", "gradient_accumulation_steps": 1, "launcher": ""},
     "use dapo, or raise gradient_acc"),
    ({"loss_type": "cispo", "epsilon_high": 0.28, **TWICE}, "set epsilon_high to 1 or more"),
    ({"loss_type": "cispo", **TWICE}, "would multiply nearly every gradient by it"),
    ({"loss_type": "luspo", **TWICE}, "set importance_sampling_level to sequence for luspo"),
    ({"loss_type": "vespo", **TWICE, **SEQUENCE}, "sequence for luspo, to token for vespo"),
    ({"vllm_importance_sampling_mode": "token_mask"}, "correct what a server drew; name a server"),
    ({"vllm_importance_sampling_clip_max": 2.0}, "_clip_max is 2.0, but the latter correct what"),
    ({"top_entropy_quantile": 0.2, **TWICE, **SEQUENCE}, "set one of the two back"),
    ({"num_generations": 3, **NO_SHARING, "per_device_train_batch_size": 2},
     "(without share_prefix, times gradient_accumulation_steps), so that groups stay whole"),
    ({"gradient_accumulation_steps": 3}, "to a multiple of their number, or launcher to \"\""),
    ({"launcher": "torchrun --nnodes 3 --nproc-per-node 2"}, "must share the steps of an update"),
    ({"launcher": "torchrunn"}, "which is neither beside"),
    ({"server": "http://x", **NO_SHARING}, "a server needs share_prefix"),
    ({"server": "http://u:secret@a/v1"}, "give addresses such as http://localhost:8000/v1"),
    ({"rewards": ["image", "box"]}, "takes the reward format away, which must be one of rewards"),
    ({"start_from": "adapter", "beta": 0.1}, "which without it are the base, not beta's reference"),
    ({"start_from": "adapter", "server": "http://x"}, "on 4-bit weights, which no server holds"),
]
OFFERED = [
    {}, {"num_generations": 16}, {"num_generations": 64, **NO_SHARING},
    {"epsilon": 0.2, "epsilon_high": 0.0}, {"loss_type": "bnpo"}, {"loss_type": "dr_grpo"},
    {"top_entropy_quantile": 0.2, "mask_truncated_completions": True}, {"num_iterations": 4},
    {"epsilon": 0.1, "epsilon_high": 0.28, **TWICE}, {"loss_type": "sapo", **TWICE, **SEQUENCE},
    {"loss_type": "cispo", "epsilon_high": 5.0, "top_entropy_quantile": 0.2, **TWICE, **SEQUENCE},
    {"loss_type": "luspo", **TWICE, **SEQUENCE}, {"loss_type": "vespo", **TWICE},
    {"loss_type": "vespo", "server": "http://a/v1", "vllm_importance_sampling_mode": "token_mask",
     **TWICE},
]


@pytest.mark.parametrize(("values", "sentence"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_act_is_refused(values, sentence):
    with pytest.raises(ValueError) as error:
        validate_params(values, "05_grpo")
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("values", OFFERED, ids=str)
def test_what_acts_is_not_refused(values):
    assert values.items() <= validate_params(values, "05_grpo").items()


@pytest.mark.parametrize(("stage", "values", "sentence"), [
    ("01_synthesize", {"data": "", "teacher": "none"}, "scenes or a file that exists; name the"),
    ("01_synthesize", {"data": "none.jsonl", "teacher": "none"},
     "data is 'none.jsonl', but it must be scenes or a file that exists"),
    ("01_synthesize", {"teacher": "own"}, "teacher own is the key 'reply' of your own data"),
    ("01_synthesize", {"data": "x", "teacher": "none", "train_find_all_per_task": 9},
     "questions for all boxes are drawn, as scenes are"),
    ("01_synthesize", {"teacher": "endpoint"}, "endpoint_url must be like http://localhost"),
    ("01_synthesize", {"teacher": "endpoint", "endpoint_model": "m",
                       "endpoint_url": "http://u:secret@a/v1"}, "endpoint_url is set and endpoint"),
    ("04_rejection_sampling", {"replies": 0}, "04 needs one reply or more")])
def test_what_the_other_stages_refuse(stage, values, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        validate_params(values, stage)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_a_tracker_has_to_be_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to is 'wandb', but a tracker must be installed"):
        validate_params({"report_to": "wandb"}, "02_sft")


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text("def center(reply, sample, box_format):\n    return 1.0\n\n\n"
                    "def length(reply, sample, box_format):\n    return 1.0\n")
    return path


def test_the_names_are_those_of_the_rewards_and_curves():
    assert tuple(REWARDS) == joint_rules.KIT_REWARDS
    names = {"step", "reward", *CURVES.values(), *SAMPLING_CURVES.values()}
    assert names <= set(joint_rules.NAMES_OF_CURVES)


def test_what_can_be_chosen(own_file):
    weights = validate_params({"rewards": ["format", "box", f"{own_file}:center"],
                               "reward_weights": {"center": 0.5, "box": 2}}, "05_grpo")
    assert weights["reward_weights"]["center"] == 0.5 and weights["reward_weights"]["box"] == 2.0
    assert validate_params({"rewards": ["image", "box"], "hallucinated_image_penalty": "all"},
                           "05_grpo")["rewards"] == ["image", "box"]


@pytest.mark.parametrize(("values", "sentence"), [
    ({"rewards": []}, "list names of rewards, such as"),
    ({"rewards": ["boxs"]}, "did you mean 'box'?"),
    ({"rewards": [*KIT, "?"]}, "the kit's are format, image, box,"),
    ({"rewards": [*KIT, "box"]}, "two of rewards are called 'box'"),
    ({"reward_weights": {"boxes": 1.0}}, "reward_weights has 'boxes', which is not one of rewards"),
    ({"rewards": ["format", "image"], "reward_weights": {"box": 0.5}}, "has 'box', which is"),
    ({"rewards": [*KIT, "none.py:center"]}, "none.py, which does not exist"),
    ({"rewards": [*KIT, "FILE:centre"]}, "has no function 'centre'; it has center, length"),
    ({"rewards": [*KIT, "FILE:length"]}, "have a 'length' of their own; rename the function"),
    ({"rewards": [*KIT, "BROKEN:center"]}, "broken.py, line 2: .*; correct it"),
    ({"rewards": [*KIT, "FILE:center", "OTHER:edge"]}, "two files called my_rewards.py"),
])
def test_what_cannot_be_is_one_sentence(own_file, values, sentence):
    broken, other = own_file.with_name("broken.py"), own_file.parent / "other" / own_file.name
    broken.write_text("x = 1\ndef center(:\n")
    other.parent.mkdir()
    other.write_text("def edge(reply, sample, box_format):\n    return 0.0\n")
    paths = {"FILE": own_file, "BROKEN": broken, "OTHER": other}
    if "rewards" in values:
        for word, path in paths.items():
            values["rewards"] = [text.replace(word, str(path)) for text in values["rewards"]]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        validate_params(values, "05_grpo")
    assert "\n" not in str(caught.value)


def test_the_file_of_a_reward_is_part_of_what_makes_05_stale(own_file, monkeypatch):
    monkeypatch.setattr(store, "with_run_params", lambda stage, run_id, params: params)
    monkeypatch.setattr(store, "require_record", lambda *_: {"outputs": {}})
    params = validate_params({"rewards": ["format", f"{own_file}:center"]}, "05_grpo")
    key = store.stage_facts("05_grpo", "run", params)["key"]
    assert store.stage_facts("05_grpo", "run", params)["key"] == key
    own_file.write_text(own_file.read_text().replace("1.0", "0.5"))
    assert store.stage_facts("05_grpo", "run", params)["key"] != key
