"""Parameters: every notebook's cell, profiles, and wrong values, which are one sentence each."""

import ast
import importlib.util
import inspect
import json
import math
import re
import textwrap

import pytest
import trl
from command_line import describe_files, error_of, output_of

from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, UserError
from mig_kit.pipeline import params, reward_names, run_folders, store
from mig_kit.pipeline.params import choose_params, validate_params
from mig_kit.pipeline.plan import parse_overrides
from mig_kit.pipeline.stage_params import EXECUTION_PARAMS, MODELS
from mig_kit.serving.served_rollouts import SAMPLING_CURVES
from mig_kit.shared_prefix import obstacles, trainer
from mig_kit.stages import grpo
from mig_kit.stages.grpo import CURVES
from mig_kit.training import recipe_trainer, resuming
from mig_kit.training.recipe_trainer import RecipeTrainer

PROFILE_FILES = sorted((PROJECT_ROOT / "params").glob("*/*.yaml"))
STAGES = {stage[:2]: stage for stage in run_folders.STAGES}
KIT = ["format", "image", "box", "choice"]
NO_SHARING = {"share_prefix": False}
# stage, wrong values -> a part of the sentence; FILE and OTHER are files of rewards
REFUSED = [
    ("00", {"disk_gib": "nan"}, "disk_gib is 'nan': Input should be a finite number"),
    ("00", {"device": "gpu"}, "Input should be 'auto', 'cuda' or 'cpu'"),
    ("01", {"seed": -1}, "seed is -1: Input should be greater than or equal to 0"),
    ("01", {"data_shares": [0.5, 0.2, 0.2]}, "must sum to 1"),
    ("01", {"prompt": "Where is it?"}, "must be a text that holds {question} once, or a file"),
    ("01", {"prompt": "README.md"}, "prompt is 'README.md'; it must be"),
    ("01", {"data_shares": [0.5, 0.5]}, "List should have at least 3 items"),
    ("01", {"data": "README.md"}, "the rules teacher reads synthetic scenes only; set teacher"),
    ("01", {"data": "README.md", "teacher": "none", "data_shares": [0.5, 0.5, 0]}, "held out"),
    ("01", {"data": "none.jsonl", "teacher": "none"},
     "data is 'none.jsonl'; it must be scenes or a file that exists: name the"),
    ("01", {"data": "README.md", "teacher": "none", "image_root": "none"},
     "image_root is 'none'; name a folder that exists"),
    ("01", {"teacher": "own"}, "teacher own is the key 'reply' of your own data"),
    ("01", {"teacher": "endpoint"}, "endpoint_url like http://localhost"),
    ("01", {"teacher": "endpoint", "endpoint_model": "m", "endpoint_url": "http://u:secret@a/v1"},
     "endpoint_url like http://localhost"),
    ("01", {"min_pixels": 500000}, "min_pixels is 500000 and max_pixels 401408; give two areas"),
    ("01", {"base_model": "qwen"}, "it must be tiny, a folder that exists, or USER/NAME of"),
    ("02", {"learning_rate": -1}, "Input should be greater than 0"),
    *(("02", {"trl": {name: value}}, f"{name} of trl is not known to act in this stage as in TRL")
      for name, value in (("loss_type", "dft"), ("label_smoothing_factor", 0.5),
                          ("neftune_noise_alpha", 5.0), ("chat_template_path", "a.jinja"))),
    ("04", {"min_pass_rate": 0.95}, "min_pass_rate is above max_pass_rate; swap them"),
    ("04", {"server": "somewhere"}, "such as http://localhost:8000/v1"),
    ("05", {"num_generation": 4}, "it has no parameter 'num_generation'; did you mean"),
    ("05", {"trl": {"top_q": 1}}, "GRPOConfig has no 'top_q'; did you mean 'top_p'?"),
    ("05", {"trl": {"beta": 1}}, "beta is a parameter of its own; write -p beta 1"),
    ("05", {"trl": {"chat_template_kwargs": {"a": 1}}}, "out, or set share_prefix to false"),
    *(("05", {"reward_weights": weights}, "Input should be a") for weights in (
        [0.2, 0.3, 1.0, 1.3], {"box": "much"}, {"box": math.nan}, {1: 1.0}, 0.5)),
    ("05", {"run_id": "my run"}, "run_id is 'my run'; use letters, digits"),
    ("05", {"start_from": "nowhere"}, "it must be merged, base or a folder that exists"),
    ("05", {"scale_rewards": "nope"}, "Input should be 'batch', 'group' or 'none'"),
    ("05", {"loss_type": "cispo", "epsilon_high": 0.28}, "set epsilon_high to 1 or more"),
    ("05", {"num_generations": 3, **NO_SHARING, "per_device_train_batch_size": 2},
     "(without share_prefix, times gradient_accumulation_steps), so that groups stay whole"),
    ("05", {"gradient_accumulation_steps": 3}, "to a multiple of their number, or launcher"),
    ("05", {"launcher": "torchrun --nnodes 3 --nproc-per-node 2"}, "must share the steps of an"),
    ("05", {"launcher": "torchrunn"}, "which is neither beside"),
    ("05", {"launcher": "torchrun 'a"}, "No closing quotation"),
    ("05", {"server": "http://x", **NO_SHARING}, "a server needs share_prefix"),
    ("05", {"server": "http://u:secret@a/v1"}, "such as http://localhost:8000/v1"),
    ("05", {"rewards": []}, "list names of rewards, such as"),
    ("05", {"rewards": ["boxs"]}, "did you mean 'box'?"),
    ("05", {"rewards": [*KIT, "box"]}, "two of rewards are called 'box'"),
    ("05", {"reward_weights": {"boxes": 1.0}}, "reward_weights has 'boxes', which is not one of"),
    ("05", {"rewards": [*KIT, "none.py:center"]}, "none.py, which does not exist"),
    ("05", {"rewards": [*KIT, "FILE:centre"]}, "has no function 'centre'; it has center, length"),
    ("05", {"advantage": "maxrl"}, "advantage is 'maxrl'; write file.py:function"),
    ("05", {"advantage": "none.py:maxrl"}, "advantage names "),
    ("05", {"rewards": [*KIT, "FILE:length"]}, "have a 'length' of their own; rename the function"),
    ("05", {"rewards": [*KIT, "FILE:center", "OTHER:edge"]}, "use two files called my_rewards.py"),
    ("06", {"suites": {"mig": 1}}, "suites.mig.[key] is 'mig': Input should be 'mig_bench', 'ood_"),
    ("06", {"suites": {"blink": -1}}, "suites.blink is -1: Input should be greater"),
    ("08", {"model": "nowhere"}, "a folder that exists, or USER/NAME of the hub"),
]


@pytest.fixture
def reward_files(tmp_path):
    center = "def center(answer, sample):\n    return 1.0\n\n\n"
    texts = {"FILE": ("my_rewards.py", center + center.replace("center", "length")),
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
    with pytest.raises(UserError) as error:
        validate_params(values | ({"rewards": rewards} if rewards else {}), STAGES[number])
    sentence = str(error.value)
    assert part in sentence and "\n" not in sentence and "secret" not in sentence
    names = [name.split("_")[0] for name in (*values, *values.get("trl", ()))]
    assert any(name in sentence for name in (*names, ".py")), "which parameter, or which file"


def test_a_broken_file_of_rewards_shows_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ndef center(:\n")
    with pytest.raises(SyntaxError) as error:
        validate_params({"rewards": [f"{tmp_path / 'broken.py'}:center"]}, "05_grpo")
    assert error.value.lineno == 2


def test_the_names_are_those_of_the_curves():
    names = {"step", "reward", *CURVES.values(), *SAMPLING_CURVES.values()}
    assert names <= set(reward_names.NAMES_OF_CURVES)
    assert set(EXECUTION_PARAMS) <= {name for model in MODELS.values()
                                     for name in model.model_fields}


def test_a_cell_and_the_command_refuse_it_alike_and_touch_nothing(root, leave):
    for stage in run_folders.STAGES:
        leave(stage, "default")
    before = describe_files(root)
    with pytest.raises(UserError) as in_a_notebook:
        store.begin_stage("02_sft", {"learning_rate": -1})
    on_command = error_of("run", "02", "-p", "learning_rate", "-1")
    assert str(in_a_notebook.value) == on_command
    assert on_command == "02_sft: learning_rate is -1: Input should be greater than 0"
    # a whole recipe is checked before its first stage
    assert "multiple of num_generations" in error_of("run", "-p", "num_generations", "7", "--force")
    assert describe_files(root) == before


@pytest.mark.parametrize("cell", ["# parameters\nmemory_gb: float = 2.0  # free",
                                  "# Parameters\nrun_id = \"a\"\nmemory_gb = 2.0\n"])
def test_a_name_mistyped_in_a_parameters_cell_is_refused(cell):
    """Of the notebook's own cell, and of the one that papermill puts behind it."""
    names = {"In": ["", cell, "memory = 3"], "memory": 3, "run_id": "a", "memory_gb": 2.0}
    with pytest.raises(ValueError, match="no parameter 'memory_gb'; did you mean 'memory_gib'"):
        store.begin_stage("00_preflight", names)


@pytest.mark.parametrize("stage", MODELS)
def test_a_notebooks_cell_is_written_from_the_model(stage):
    """`make cells` writes it; papermill and people change it."""
    spec = importlib.util.spec_from_file_location("cells", PROJECT_ROOT / ".ci" / "cells.py")
    cells = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cells)
    path = NOTEBOOKS / f"{stage}.ipynb"
    if not path.is_file():
        pytest.skip("comes with a clone alone")
    source, = ("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
               if "parameters" in cell["metadata"].get("tags", ()))
    assert source == cells.parameters_cell(stage), "run make cells"
    values = {}
    exec(source, values)
    assert {name: values[name] for name in MODELS[stage].model_fields} == validate_params({}, stage)


@pytest.mark.parametrize("path", PROFILE_FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_profile_holds_only_what_differs_and_passes(path, tmp_path):
    defaults, values = params.default_params(path.stem), params._read_profile(path)
    assert [name for name, value in values.items() if value == defaults[name]] == []
    values = params.profile_params(path.stem, path.parent.name)
    if values.get("data") == "":  # of the profiles for own data
        values["data"] = str(tmp_path / "own.jsonl")
        (tmp_path / "own.jsonl").write_text("{}\n")
    assert validate_params(values, path.stem) == values


@pytest.mark.parametrize(("stage", "name", "change"), [
    ("05_grpo", "reward_weights", {"box": 0.5}), ("06_evaluate", "suites", {"blink": 3})])
def test_a_mapping_changes_only_what_it_names(stage, name, change):
    expected = {**params.profile_params(stage)[name], **change}
    assert validate_params({name: change}, stage)[name] == expected
    overrides = parse_overrides(((name, json.dumps(change)),), [stage])
    chosen = choose_params(stage, "smoke", "run", overrides)[name]
    assert chosen == {**params.profile_params(stage, "smoke")[name], **change}


def test_text_of_a_stage_shows_help_and_what_a_profile_changes():
    lines = output_of("params", "5", "--profile", "smoke").splitlines()
    named = {line.partition(": ")[0]: number for number, line in enumerate(lines) if line[0] > "#"}
    assert list(named) == list(params.default_params("05_grpo"))
    assert lines[named["loss_type"]].startswith("loss_type: dapo  # mean over all tokens")
    assert lines[named["max_steps"]] == "max_steps: 2  # updates (tiny: 100)"
    assert lines[named["max_steps"] + 1] == "    # type integer, minimum 1"
    assert lines[named["scale_rewards"] + 1] .endswith("enum ['batch', 'group', 'none']")


def test_hostile_parameter_files(tmp_path, monkeypatch):
    monkeypatch.setattr(params, "PROFILES", tmp_path)
    (tmp_path / "x").mkdir()
    for text in ("- 1", "a: [", "a: !!python/object/apply:os.system ['true']", "a: \x00"):
        (tmp_path / "x" / "05_grpo.yaml").write_text(text)
        with pytest.raises(UserError, match="is no mapping in YAML"):
            params.profile_params("05_grpo", "x")


def always_calls_super(method):
    tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    return any(f"super().{method.__name__}(" in ast.unparse(statement)
               for statement in tree.body if not isinstance(statement, ast.If))


def test_a_setting_that_only_an_overridden_method_reads_is_refused():
    """Found in the libraries' source: `self.args.NAME`, and attributes that are made of one."""
    library = [owner for owner in RecipeTrainer.__mro__
               if not owner.__module__.startswith("mig_kit") and owner is not object]
    attributes = re.findall(r"self\.(\w+) = .*args\.(\w+)", "".join(
        inspect.getsource(owner.__init__) for owner in library if "__init__" in vars(owner)))
    fields, read = set(trl.GRPOConfig.__dataclass_fields__), set()
    for name in dir(RecipeTrainer):
        own = inspect.getattr_static(RecipeTrainer, name)
        theirs = next((vars(owner)[name] for owner in library if name in vars(owner)), own)
        if theirs is own or not inspect.isfunction(own) or name.startswith("__"):
            continue
        if not always_calls_super(own):
            words = set(re.findall(r"self\.(?:args\.)?(\w+)",
                                   inspect.getsource(inspect.unwrap(theirs))))
            read |= words | {field for attribute, field in attributes if attribute in words}
    named = set(re.findall(r"\w+", "".join(map(inspect.getsource, (
        obstacles, trainer, recipe_trainer, resuming, grpo)))))
    assert len(read & fields) > 5
    # DeepSpeed is left to stock TRL
    assert read & fields - named - set(params.UNREAD) == {"ds3_gather_for_generation"}
