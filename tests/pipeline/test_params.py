"""Parameters: types, words, unknown names, and hostile files."""

import pytest
from command_line import output_of

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import params, store
from mig_kit.pipeline.joint_rules import params_text, validate_params
from mig_kit.pipeline.plan import choose_params, parse_overrides

PROFILE_FILES = sorted((PROJECT_ROOT / "params").glob("*/*.yaml"))


@pytest.mark.parametrize("stage", store.STAGES)
def test_every_parameter_has_a_default_and_a_line_of_help(stage):
    parameters = params.stage_parameters(stage)
    assert parameters["run_id"].default == "default"
    assert all(parameter.help for parameter in parameters.values())
    shipped = params._shipped_values(params.PROFILES)[stage]
    settings = params.SETTINGS.get(stage, {}).keys() - shipped.keys()
    assert shipped.keys() == parameters.keys() - settings, "params/shipped.yaml"
    for name, parameter in parameters.items():
        assert repr(parameter.default) == repr(parameter.value), f"{name} in params/shipped.yaml"
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert params.profile_params(stage) == defaults == validate_params({}, stage)


@pytest.mark.parametrize("path", PROFILE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_profile_holds_only_what_differs(path):
    values = params.read_params_file(path)
    parameters = params.stage_parameters(path.stem)
    assert [name for name, value in values.items() if value == parameters[name].default] == []
    resolved = params.profile_params(path.stem, path.parent.name)
    assert resolved.keys() == parameters.keys() and values.items() <= resolved.items()


def test_numbers_have_the_type_of_the_default():
    values = validate_params({"beta": 1, "learning_rate": "1e-5"}, "05_grpo")
    assert type(values["beta"]) is float and values["learning_rate"] == 1e-5
    values = validate_params({"data_shares": [0, "5e-1", 0.5]}, "01_synthesize")
    assert values["data_shares"] == [0.0, 0.5, 0.5]


def test_a_mapping_changes_only_what_it_names(tmp_path):
    weights = params.profile_params("05_grpo")["reward_weights"]
    values = validate_params({"reward_weights": {"box": "5e-1"}}, "05_grpo")
    assert values["reward_weights"] == {**weights, "box": 0.5}
    assert list(values["reward_weights"]) == list(weights)
    overrides = parse_overrides((("reward_weights", "{box: 2}"),), ["05_grpo"])
    chosen = choose_params("05_grpo", "smoke", "run", overrides)
    assert chosen["reward_weights"] == {**weights, "box": 2.0}
    (tmp_path / "x.yaml").write_text("reward_weights: {box: 0.5}\n")
    assert params.read_params_file(tmp_path / "x.yaml") == {"reward_weights": {"box": 0.5}}


def test_text_of_a_stage_shows_help_and_what_a_profile_changes():
    lines = output_of("params", "5", "--profile", "smoke").splitlines()
    named = {line.partition(": ")[0]: number for number, line in enumerate(lines) if line[0] > "#"}
    assert list(named) == list(params.stage_parameters("05_grpo"))
    by_name = {name: lines[number] for name, number in named.items()}
    assert by_name["loss_type"].startswith("loss_type: dapo  # mean over: all tokens")
    weights = "{format: 0.2, image: 0.3, box: 1.0, choice: 1.3}"
    assert by_name["reward_weights"].startswith(f"reward_weights: {weights}  # ")
    assert by_name["rewards"].startswith("rewards: [format, image, box, choice]  # ")
    assert by_name["max_steps"] == "max_steps: 2  # updates (tiny: 125)"
    assert lines[named["max_steps"] + 1] == "    # an int, 1 or more"
    assert lines[named["scale_rewards"] + 1] == "    # one of batch, group, none"
    assert any("prompts_of_04: an update cannot use more prompts" in line for line in lines)
    assert not any("prompts_of_04" in line for line in params_text("02_sft").splitlines())


def test_settings_of_trl_count_as_parameters():
    """Those of the mapping `trl`, directly or in it, and any other of the config class in it."""
    defaults = validate_params({}, "05_grpo")
    assert (defaults["warmup_steps"], defaults["num_iterations"]) == (5, 1)
    assert params.GROUP not in defaults
    for values in ({"num_iterations": 2, "top_p": 0.9},
                   {"trl": {"num_iterations": 2, "top_p": "9e-1"}},
                   {"trl": {"num_iterations": 3, "top_p": 0.9}, "num_iterations": 2}):
        assert validate_params(values, "05_grpo") == defaults | {"num_iterations": 2, "top_p": 0.9}


def test_a_cell_may_hold_any_setting_of_trl(monkeypatch):
    cell = {"metadata": {"tags": ["parameters"]},
            "source": 'trl: dict = {"top_p": 0.9, "num_iterations": 2}  # of GRPOConfig'}
    monkeypatch.setattr(params, "notebook_cells", lambda stage: [cell])
    parameters = params.stage_parameters("05_grpo")
    assert parameters["top_p"] == params.Parameter(1.0, "of GRPOConfig", 0.9)
    assert (parameters["num_iterations"].value, parameters["epsilon"].value) == (2, 0.2)


@pytest.mark.parametrize(("line", "sentence"), [
    ("max_steps: int = 10  # updates", "max_steps 10 (shipped: 125)"),
    ("max_steps = 10", "max_steps 10 (shipped: 125)"), ("max_steps: int = 125", ""),
    ('reward_weights: dict = {"box": 2.0}',
     "reward_weights {'box': 2.0} (shipped: {'format': 0.2, 'image': 0.3, 'box': 1.0, 'choice': "
     "1.3})"),
    ('trl: dict = {"warmup_steps": 5, "top_p": 0.9}', "top_p 0.9 (shipped: 1.0)"),
    ('max_steps: int = "10"', "05_grpo: parameter 'max_steps' is '10', a str; it must be an int"),
    ("max_steps: int = 0", "it must be an int, 1 or more"),
    ("max_steps: int = 5 * 2", "the parameters cell of notebooks/05_grpo.ipynb cannot be read"),
    ("max_steps: int = ", "the parameters cell of notebooks/05_grpo.ipynb cannot be read")])
def test_an_edited_cell_is_named_and_checked(monkeypatch, line, sentence):
    cell = {"metadata": {"tags": ["parameters"]}, "source": f"# parameters\n{line}"}
    monkeypatch.setattr(params, "notebook_cells", lambda stage: [cell])
    if "(shipped" in sentence or not sentence:
        values = params.profile_params("05_grpo")
        assert params.describe_edits("05_grpo", values) == sentence
        assert params.describe_edits("05_grpo", dict.fromkeys(values, "of -p")) == ""
        return
    with pytest.raises((TypeError, ValueError)) as error:
        params.profile_params("05_grpo")
    assert sentence in str(error.value)


def test_the_settings_that_the_kit_knows_have_the_defaults_of_trl():
    for stage, settings in params.SETTINGS.items():
        for name, default in settings.items():
            assert default == (params.trl_defaults(stage)[name] or 0), name


def test_hostile_parameter_files(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    for text in (bomb, "a: {b: {c: 1}}", "a: {b: c}", "a: {1: 1}", "- 1", "a: [",
                 "a: !!python/object/apply:os.system ['true']", "a: \x00", "a: [[1]]"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match="must be a flat mapping|is no YAML"):
            params.read_params_file(tmp_path / "x.yaml")
