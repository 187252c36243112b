"""Parameters of the stages.

The `parameters` cell of a stage's notebook holds its parameters: type, default and one line of help
each. The defaults are the tiny profile; params/<profile>/<stage>.yaml holds only what another
profile changes. The entries of a cell's mapping `trl` are parameters, too (`trl_settings`).
RUN_PARAMS are set once, in stage 01, and every later stage of the run takes them from there. What
each may be is in `rules`, what holds between them in `joint_rules`.
"""

import ast
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from mig_kit.common import PROFILES, suggest_word
from mig_kit.pipeline.dependencies import notebook_cells
from mig_kit.pipeline.rules import check_value, describe_values, name_type
from mig_kit.pipeline.trl_settings import CONFIGS, GROUP, HELP, SETTINGS, find_trl_default

RUN_PARAMS = ("base_model", "min_pixels", "max_pixels", "coordinates")
RUN_PARAMS_STAGE = "01_synthesize"
# how a stage runs, not what it makes: recorded, but no reason to run it again
EXECUTION_PARAMS = ("device", "launcher", "server", "concurrency", "report_to")
# parameters that name a folder or file of a run, not what is in it
NAMES_OF_RUNS = ("run_id", "control_run", "plan_file")


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stage: its default and its line of help."""

    default: str | int | float | bool | list | dict
    help: str


def stage_parameters(stage: str) -> dict[str, Parameter]:
    """The parameters of a stage by name, as its notebook's `parameters` cell has them; in place of
    `trl` its entries and the others of SETTINGS.
    """
    cell = next(cell for cell in notebook_cells(stage)
                if "parameters" in cell["metadata"].get("tags", ()))
    source = "".join(cell["source"])
    lines = source.splitlines()
    parameters = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            name, default = node.target.id, ast.literal_eval(node.value)
            if name == GROUP:
                settings = {**default, **SETTINGS[stage], **default}  # the cell's first
                parameters |= {setting: Parameter(value, HELP.get(setting, f"of {CONFIGS[stage]}"))
                               for setting, value in settings.items()}
            else:
                text = lines[node.lineno - 1].partition("  # ")[2]
                parameters[name] = Parameter(default, text)
    return parameters


def list_profiles() -> list[str]:
    """The names of the profiles: tiny, and every folder of params/."""
    folders = [path.name for path in PROFILES.iterdir() if path.is_dir()]
    return ["tiny", *sorted(folders)]


def profile_params(stage: str, profile: str = "tiny") -> dict:
    """All parameters of a stage in a profile: the notebook's defaults, and what the profile
    changes.

    FileNotFoundError names the profiles where there is no such one; otherwise raises as
    `complete_params`.
    """
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
    """`values` completed from the stage's defaults, of the defaults' types, each as `rules` says.

    KeyError for an unknown name, TypeError for a wrong type, ValueError for a number out of its
    range and an unknown word; each names the fix. A number that YAML reads as a word (1e-5, without
    a point) counts as a number where one is due. Of a mapping, what is not set keeps its default.
    """
    defaults = {name: parameter.default for name, parameter in stage_parameters(stage).items()}
    params = dict(defaults)
    for name, value in list_settings(values, stage).items():
        default = defaults[name] if name in defaults else default_of_trl(name, stage, defaults)
        params[name] = merge_mappings(default, _typed(name, value, stage, default))
        check_value(name, params[name], stage)
    return params


def list_settings(values: dict, stage: str) -> dict:
    """`values` with the entries of their mapping `trl` in its place, those of a training stage."""
    settings = values.get(GROUP, {}) if stage in CONFIGS else {}
    return settings | {name: value for name, value in values.items() if name != GROUP}


def default_of_trl(name: str, stage: str, names):
    """TRL's default of a setting that the kit does not know; KeyError if TRL does not, either."""
    try:
        return find_trl_default(name, stage)
    except KeyError:
        raise KeyError(unknown_parameter_message(name, stage, names)) from None


def merge_mappings(value, change):
    """`change`; where both are mappings, `value` with the entries of `change`."""
    return {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change


def unknown_parameter_message(name: str, where: str, names) -> str:
    """One sentence on a parameter that `where` does not have, with the nearest of `names` if one is
    near.
    """
    if name in RUN_PARAMS:
        return f"'{name}' is set once per run, in {RUN_PARAMS_STAGE}; run that stage with it"
    hint = suggest_word(name, names) or f"its parameters are {', '.join(sorted(names))}"
    return f"{where} has no parameter '{name}'; {hint}"


def _typed(name: str, value, stage: str, default):
    if default is None:  # of TRL: a number, a word or a list
        return _to_number(value)
    kind = type(default)
    if kind is dict:
        return _typed_mapping(name, value, stage, default)
    if kind is list and type(value) is list:
        of_items = type(default[0])
        numbers = [_to_number(item) for item in value] if of_items is float else value
        is_fitting = all(_is_of(item, of_items) for item in numbers)
        value = [of_items(item) for item in numbers] if is_fitting else value
    else:
        value = _to_number(value) if kind is float else value
        is_fitting = _is_of(value, kind)
    if not is_fitting:
        raise TypeError(f"{stage}: parameter '{name}' is {value!r}, {name_type(type(value))}; "
                        f"it must be {describe_values(name, kind)}")
    return kind(value)


def _is_of(value, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


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
