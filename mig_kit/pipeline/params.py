"""Parameters of the stages: what they are called, which profile has which, what each may be.

A notebook's `parameters` cell holds type, tiny default and help of each; params/<profile>/ what a
profile changes; params/shipped.yaml a copy of the cells. A new parameter needs its line in the cell
and in shipped.yaml, its row in RULES, a joint rule if it can be idle, and new lesson pages.
"""

import ast
import json
import math
import re
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import yaml

from mig_kit.boxes import MODEL_COORDINATES
from mig_kit.common import NOTEBOOKS, PROFILES, suggest_word

# set once, in stage 01; every later stage of the run takes them from there
RUN_PARAMS = ("base_model", "min_pixels", "max_pixels", "coordinates")
RUN_PARAMS_STAGE = "01_synthesize"
# how a stage runs, not what it makes: recorded, but no reason to run it again
EXECUTION_PARAMS = ("device", "launcher", "server", "concurrency", "report_to")
# parameters that name a run, not what is in it
NAMES_OF_RUNS = ("run_id", "control_run")
# The notebook parameter that maps settings of SFTConfig or GRPOConfig to values. Each counts as
# a parameter of its own: `-p num_iterations 2` and the rules name it directly.
GROUP = "trl"
CONFIGS = {"02_sft": "SFTConfig", "05_grpo": "GRPOConfig"}
HELP = {
    "lr_scheduler_type": "after warm-up: linear (to 0), cosine or constant_with_warmup",
    "warmup_steps": "linear warm-up, updates",
    "save_steps": "a checkpoint every so many updates; in 05 in whole num_iterations",
    "gradient_checkpointing": "keep only the layers' inputs: less memory, one more pass",
    "report_to": "send the curves to a tracker too: none, tensorboard, trackio or wandb",
    "importance_sampling_level": "ratio of new to old: per token, or per reply (sequence)",
    "num_iterations": "updates that learn from the same replies",
    "epsilon": "clips ratios to 1 - epsilon; needs num_iterations 2 or more",
    "epsilon_high": "clips them to 1 + epsilon_high; 0 for the same as epsilon",
    "mask_truncated_completions": "leave replies without an end out of the loss",
    "top_entropy_quantile": "share of tokens, those of highest entropy, in the policy loss",
    "vllm_importance_sampling_correction": "weigh served replies by learner / server",
    "vllm_importance_sampling_mode": "token_ or sequence_, mask or truncate",
    "vllm_importance_sampling_clip_max": "larger ratios are masked or truncated"}
# settings that the kit has rules for, with TRL's defaults; 0 stands for TRL's None
SETTINGS = {"02_sft": {"report_to": "none"}, "05_grpo": {
    "report_to": "none", "importance_sampling_level": "token", "num_iterations": 1,
    "epsilon": 0.2, "epsilon_high": 0.0, "mask_truncated_completions": False,
    "top_entropy_quantile": 1.0,
    "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0}}
# how RULES writes a range of numbers
RANGE = re.compile(r"(?:(\d+) numbers, each )?(above )?([\d.]+)(?: or more| to (below )?([\d.]+))?")


def _each(rule: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), rule)


# every parameter of the notebooks -> its range (of each number of a list), its words or, if any
# value may stand, a description of it
RULES: dict[str, str | tuple[str, ...]] = {
    **_each("0 or more", "beta blink_per_task cot_per_task "
            "disk_gib epsilon epsilon_high find_all_per_task free_form_per_task max_samples "
            "memory_gib micro_replies mig_per_task mmiu_per_task ood_per_task "
            "replies rl_boxes_per_task "
            "rl_free_form_per_task rl_per_task sampled_per_task train_find_all_per_task "
            "warmup_steps"),
    **_each("1 or more", "albums concurrency "
            "examined_per_task gallery_per_kind gradient_accumulation_steps "
            "lora_r max_completion_length max_new_tokens max_steps min_pixels "
            "num_iterations per_device_train_batch_size per_task prompts "
            "repeats save_steps val_per_task"),
    **_each("2 numbers, each 1 or more", "rows vision_steps"),
    "course_steps": "4 numbers, each 1 or more",
    **_each("above 0", "learning_rate num_train_epochs temperature "
            "vllm_importance_sampling_clip_max"),
    **_each("0 to 1", "max_pass_rate min_pass_rate top_entropy_quantile"),
    **_each("0 to below 1", "lora_dropout"),
    **_each("2 or more", "group num_generations tokens"),
    **_each("1 to 8", "images"),
    **_each("0 to 4294967295", "eval_seed seed"),  # as numpy takes it
    "data_shares": "3 numbers, each 0 to 1",
    "max_pixels": "784 or more",  # one image token
    "reward_weights": "numbers",
    "side": "56 to 1960",
    "wide_hidden": "128 or more",
    "coordinates": tuple(MODEL_COORDINATES),
    "data": "scenes or a file",
    "device": ("auto", "cuda", "cpu"),
    "dtype": ("auto", "float32", "bfloat16"),
    "hallucinated_image_penalty": ("none", "format", "all"),
    "importance_sampling_level": ("token", "sequence"),
    "lora_targets": ("all", "attention", "gate_up"),
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "lr_scheduler_type": ("linear", "cosine", "constant_with_warmup"),
    "report_to": ("none", "tensorboard", "trackio", "wandb"),
    "scale_rewards": ("batch", "group", "none"),
    "teacher": ("rules", "endpoint", "own", "none"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask",
                                      "token_truncate"),
    **_each("true or false", "gradient_checkpointing mask_truncated_completions "
            "reasoning share_prefix vllm_importance_sampling_correction"),
    **_each("a model: tiny, a folder or a hub name", "base_model model"),
    **_each("a name of letters, digits, '-', '_' and '.'", "control_run run_id"),
    "endpoint_model": "a name", "endpoint_url": "an address", "image_root": "a folder",
    "groups": "name=run,run", "reference": "a name of groups", "launcher": "a command",
    "profile": "a folder of params/", "rewards": "names and file.py:function",
    "server": "addresses, or a command with {model} and {port}",
    "start_from": "merged, base, adapter or a folder"}


@dataclass(frozen=True)
class Parameter:
    """A parameter's shipped default, its line of help, and its value in the (edited) notebook."""

    default: str | int | float | bool | list | dict
    help: str
    value: str | int | float | bool | list | dict = ""


def notebook_cells(stage: str) -> list[dict]:
    """The code cells of a stage's notebook; [] if there is none."""
    path = NOTEBOOKS / f"{stage}.ipynb"
    cells = json.loads(path.read_text())["cells"] if path.is_file() else []
    return [cell for cell in cells if cell["cell_type"] == "code"]


def stage_parameters(stage: str) -> dict[str, Parameter]:
    """A stage's parameters by name, from its notebook; SETTINGS' entries in place of `trl`."""
    cell = next(cell for cell in notebook_cells(stage)
                if "parameters" in cell["metadata"].get("tags", ()))
    source, shipped, parameters = "".join(cell["source"]), _shipped_values(PROFILES)[stage], {}
    try:
        nodes = [node for node in ast.parse(source).body
                 if isinstance(node, ast.AnnAssign | ast.Assign)]
        values = [ast.literal_eval(node.value) for node in nodes]
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"the parameters cell of notebooks/{stage}.ipynb cannot be read ({error})"
                         "; write a line NAME: TYPE = VALUE each, without calculating") from None
    for node, value in zip(nodes, values):
        name = (node.target if isinstance(node, ast.AnnAssign) else node.targets[0]).id
        if name != GROUP:
            text = source.splitlines()[node.lineno - 1].partition("  # ")[2]
            parameters[name] = Parameter(shipped.get(name, value), text, value)
            continue
        known = SETTINGS[stage] | shipped
        known = (trl_defaults(stage) if value.keys() - known.keys() else {}) | known
        for name, setting in {**value, **SETTINGS[stage], **value}.items():  # the cell's first
            text = HELP.get(name, f"of {CONFIGS[stage]}")
            parameters[name] = Parameter(known.get(name, setting), text, setting)
    return parameters


@cache
def _shipped_values(folder: Path) -> dict[str, dict]:
    """Stage -> what its parameters cell is shipped with, which tells edited values from others."""
    return yaml.safe_load((folder / "shipped.yaml").read_text())


def shipped_params(stage: str) -> dict:
    """The parameters of a stage as they are shipped, even if its notebook is edited."""
    return {name: parameter.default for name, parameter in stage_parameters(stage).items()}


def describe_edits(stage: str, values: dict, is_cell: bool = False) -> str:
    """Those of `values` that the notebook edits, as "max_steps 10 (shipped: 125)", or "".

    is_cell: the values are those of a running cell, which may not be saved yet.
    """
    return ", ".join(f"{name} {values[name]!r} (shipped: {parameter.default!r})"
                     for name, parameter in stage_parameters(stage).items()
                     if name in values and name != "run_id" and parameter.default != values[name]
                     and (is_cell or parameter.value == values[name]))


def list_profiles() -> list[str]:
    """The names of the profiles: tiny, and every folder of params/."""
    folders = [path.name for path in PROFILES.iterdir() if path.is_dir()]
    return ["tiny", *sorted(folders)]


def profile_params(stage: str, profile: str = "tiny") -> dict:
    """All parameters of a stage in a profile; FileNotFoundError if there is no such profile."""
    if profile not in list_profiles():
        raise FileNotFoundError(f"no profile '{profile}' in params/; the profiles are "
                                f"{', '.join(list_profiles())}")
    path = PROFILES / profile / f"{stage}.yaml"
    return complete_params(read_params_file(path) if path.is_file() else {}, stage)


def needs_gpu(profile: str) -> bool:
    """Whether a profile trains a full model: a file of it sets device to "cuda"."""
    files = (PROFILES / profile).glob("*.yaml")
    return any(read_params_file(path).get("device") == "cuda" for path in files)


def read_params_file(path: Path) -> dict:
    """A flat parameter file; ValueError if it nests, is no mapping or no YAML."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no YAML ({reason}); write lines of parameter: value") from None
    if not isinstance(values, dict) or not all(_is_flat(value) for value in values.values()):
        raise ValueError(f"{path} must be a flat mapping of parameter: value; a value is a "
                         "number, a word, a list of those or a mapping of words to numbers")
    return values


def _is_flat(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and isinstance(_to_number(number), int | float)
                   for name, number in value.items())
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, str | int | float | bool) for item in items)


def complete_params(values: dict, stage: str) -> dict:
    """`values` completed by the stage's defaults, converted to their types, checked by RULES.

    Raises KeyError for an unknown name, TypeError for a wrong type, ValueError for a number out of
    its range or an unknown word; each names the fix.
    """
    parameters = stage_parameters(stage)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    params = {name: parameter.value for name, parameter in parameters.items()}
    edited = {name: value for name, value in params.items() if value != defaults[name]}
    settings = values.get(GROUP, {}) if stage in CONFIGS else {}
    for name, value in {**edited, **settings, **values}.items():
        if name == GROUP:
            continue
        if name not in defaults and name not in trl_defaults(stage):
            raise KeyError(unknown_parameter_message(name, stage, defaults))
        if name.endswith("_token"):
            raise ValueError(f"{name} would be kept in the notebook and in run.json; set HF_TOKEN "
                             "in the environment instead")
        default = defaults[name] if name in defaults else trl_defaults(stage)[name]
        params[name] = merge_mappings(params.get(name), _typed(name, value, stage, default))
        check_value(name, params[name], stage)
    return params


def merge_mappings(value, change):
    """`change`; if both are mappings, `value` with the entries of `change`."""
    return {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change


def unknown_parameter_message(name: str, where: str, names) -> str:
    """One sentence on a parameter that `where` lacks, with the nearest of `names`."""
    if name in RUN_PARAMS:
        return f"'{name}' is set once per run, in {RUN_PARAMS_STAGE}; run that stage with it"
    hint = suggest_word(name, names) or f"its parameters are {', '.join(sorted(names))}"
    return f"{where} has no parameter '{name}'; {hint}"


def _typed(name: str, value, stage: str, default):
    """`value` as the type of `default`; TypeError if it cannot be that."""
    kind = type(default)
    if default is None:  # of TRL: a number, a word or a list
        return _to_number(value)
    if kind is dict:
        return _typed_mapping(name, value, stage, default)
    items, item_kind = [value], kind
    if kind is list and type(value) is list:
        items, item_kind = value, type(default[0])
    if item_kind is float:
        items = [_to_number(item) for item in items]
    if not all(type(item) is item_kind or (item_kind is float and type(item) is int)
               for item in items):
        raise TypeError(f"{stage}: parameter '{name}' is {value!r}, {name_type(type(value))}; "
                        f"it must be {describe_values(name, kind)}")
    items = [item_kind(item) for item in items]
    return items if kind is list else items[0]


def _typed_mapping(name: str, value, stage: str, default: dict) -> dict[str, float]:
    numbers = value if isinstance(value, dict) else {"": None}
    numbers = {key: _to_number(number) for key, number in numbers.items()}
    if not all(isinstance(key, str) and type(number) in (int, float) and math.isfinite(number)
               for key, number in numbers.items()):
        example = yaml.safe_dump(default, default_flow_style=True, sort_keys=False, width=1000)
        raise TypeError(f"{stage}: parameter '{name}' is {value!r}; it must map names to numbers, "
                        f"as {example.strip()} or a part of it")
    return {key: float(number) for key, number in numbers.items()}


def _to_number(value):
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value


@cache
def trl_defaults(stage: str) -> dict:
    """TRL's defaults of all settings of the stage's config class; {} if it trains nothing."""
    if stage not in CONFIGS:
        return {}
    import trl  # seconds, which a command with known parameters alone need not wait for

    defaults = {}
    for setting in fields(getattr(trl, CONFIGS[stage])):
        is_made = setting.default is MISSING and setting.default_factory is not MISSING
        defaults[setting.name] = setting.default_factory() if is_made else setting.default
    return defaults


def describe_values(name: str, kind: type) -> str:
    """What a parameter may be, as "an int, 2 or more"; kind: of its default."""
    rule = RULES.get(name)
    if rule is None:  # a setting of TRL's
        return name_type(kind)
    if isinstance(rule, tuple):
        return "one of " + ", ".join(word or '""' for word in rule)
    is_range = RANGE.fullmatch(rule)
    if kind in (list, dict):
        values = f"numbers, each {rule}" if is_range and "numbers" not in rule else rule
        return f"a list of {values}" if kind is list else f"names with {values}"
    return f"{name_type(kind)}, {rule}" if is_range else rule


def name_type(kind: type) -> str:
    """A type's name with its article."""
    return f"{'an' if kind is int else 'a'} {kind.__name__}"


def check_value(name: str, value, stage: str) -> None:
    """ValueError, with what is allowed, for a value of the right type that RULES does not allow."""
    rule = RULES.get(name)
    if isinstance(rule, tuple) and value not in rule:
        near = suggest_word(value, rule)
        hint = f"{near} It is" if near else "it must be"
    elif isinstance(rule, str) and (bounds := RANGE.fullmatch(rule)) and not _is_within(
            value if isinstance(value, list) else [value], *bounds.groups()):
        hint = "it must be"
    else:
        return
    raise ValueError(f"{stage}: parameter '{name}' is {value!r}; {hint} "
                     f"{describe_values(name, type(value))}")


def _is_within(numbers: list[float], length: str | None, above: str | None, low: str,
               below: str | None, high: str | None) -> bool:
    """Whether numbers are finite, in the range, and as many as the groups of RANGE say."""
    lowest, highest = float(low), float(high or math.inf)
    return len(numbers) == int(length or max(1, len(numbers))) and all(
        math.isfinite(number) and lowest <= number <= highest
        and not (above and number == lowest) and not (below and number == highest)
        for number in numbers)
