"""Parameters of the stages: a notebook's `parameters` cell holds the defaults, params/<profile>/ what differs."""

import difflib
import math
from pathlib import Path

import yaml

from mig_kit.common import PROJECT_ROOT


def params_file(stage: str, profile: str = "tiny") -> Path:
    """params/<profile>/<stage>.yaml; FileNotFoundError names the profiles there are."""
    path = PROJECT_ROOT / "params" / profile / f"{stage}.yaml"
    if not path.is_file():
        profiles = sorted(p.name for p in (PROJECT_ROOT / "params").iterdir() if p.is_dir())
        raise FileNotFoundError(f"no parameters for {stage} in profile '{profile}'; the profiles are {', '.join(profiles)}")
    return path


def read_params_file(path: Path) -> dict:
    """A flat parameter file; ValueError if it nests, is no mapping or no YAML."""
    try:
        data = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML ({str(error).splitlines()[0]}); write lines of parameter: value") from None
    if not isinstance(data, dict) or not all(_is_plain(v) or isinstance(v, list) and all(map(_is_plain, v)) for v in data.values()):
        raise ValueError(f"{path} must be a flat mapping of parameter: value; a value is a number, a word or a list of those")
    return data


def _is_plain(value) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def validate_params(given: dict, stage: str) -> dict:
    """`given` completed from the tiny profile's defaults and typed as they are.

    An unknown key is a KeyError that names the nearest known one; a wrong type is a TypeError. A number that YAML takes for a
    word (1e-5, without a point) is a number where one is due.
    """
    defaults = read_params_file(params_file(stage))
    given = {key: _to_number(value) if type(defaults.get(key)) is float else value for key, value in given.items()}
    for key, value in given.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1, 0.0)
            raise KeyError(f"{stage} has no parameter '{key}'; did you mean '{near[0]}'?")
        kind = type(defaults[key])
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise TypeError(f"{stage}: parameter '{key}' is {value!r}, a {type(value).__name__}; it must be a {kind.__name__}")
    merged = {**defaults, **given}
    return {key: float(value) if type(defaults[key]) is float else value for key, value in merged.items()}


def _to_number(value):
    try:
        return float(value) if isinstance(value, str) and math.isfinite(float(value)) else value
    except ValueError:
        return value
