"""What `rewards` and `reward_weights` of 05 may say, and the sentences for what they may not."""

import pytest

from mig_kit.common import split_function_name
from mig_kit.engine.served_rollouts import SAMPLING_CURVES
from mig_kit.pipeline import reward_params, store
from mig_kit.pipeline.params import validate_params
from mig_kit.rewards import REWARDS
from mig_kit.stages.grpo import CURVES

KIT = ["format", "image", "box", "choice"]


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text("def center(reply, sample, box_format):\n    return 1.0\n\n\n"
                    "def length(reply, sample, box_format):\n    return 1.0\n")
    return path


def check(**values):
    return validate_params(values, "05_grpo")


def test_the_names_are_those_of_the_rewards_and_curves():
    assert tuple(REWARDS) == reward_params.KIT_REWARDS
    names = {"step", "reward", *CURVES.values(), *SAMPLING_CURVES.values()}
    assert names <= set(reward_params.NAMES_OF_CURVES)


def test_what_can_be_chosen(own_file):
    params = check(rewards=["format", "box", f"{own_file}:center"],
                   reward_weights={"center": 0.5, "box": 2})
    assert params["reward_weights"]["center"] == 0.5 and params["reward_weights"]["box"] == 2.0
    assert check(rewards=["image", "box"], hallucinated_image_penalty="all")["rewards"]
    assert split_function_name(f"{own_file}:center") == (own_file, "center")


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
        check(**values)
    assert "\n" not in str(caught.value)


def test_the_file_of_a_reward_is_part_of_what_makes_05_stale(own_file, monkeypatch):
    monkeypatch.setattr(store, "with_run_params", lambda stage, run_id, params: params)
    monkeypatch.setattr(store, "require_record", lambda *_: {"outputs": {}})
    params = check(rewards=["format", f"{own_file}:center"])
    key = store.stage_key("05_grpo", "run", params)
    assert store.stage_key("05_grpo", "run", params) == key
    own_file.write_text(own_file.read_text().replace("1.0", "0.5"))
    assert store.stage_key("05_grpo", "run", params) != key
