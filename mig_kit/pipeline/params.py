"""Parameters of the stages.

The `parameters` cell of a stage's notebook holds its parameters: type, default and one line of help
each. The defaults are the tiny profile; params/<profile>/<stage>.yaml holds only what another
profile changes. RUN_PARAMS are set once, in stage 01, and every later stage of the run takes them
from there.
"""

import ast
import difflib
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from mig_kit.boxes import MODEL_COORDINATES
from mig_kit.common import PROJECT_ROOT
from mig_kit.image_files import ORIENTATIONS
from mig_kit.pipeline.curation_params import check_curation_params
from mig_kit.pipeline.dependencies import notebook_cells
from mig_kit.pipeline.loss_params import check_loss_params
from mig_kit.pipeline.reward_params import check_reward_params

RUN_PARAMS = ("base_model", "min_pixels", "max_pixels", "coordinates", "orientation")
RUN_PARAMS_STAGE = "01_synthesize"
CURATION_STAGE = "04_rejection_sampling"
LOSS_STAGE = "05_grpo"
# how a stage runs, not what it makes: recorded, but no reason to run it again
EXECUTION_PARAMS = ("device", "launcher", "server", "concurrency", "workers", "report_to")
NAMES_OF_RUNS = ("run_id", "control_run")  # parameters that name a folder, not what is in it

# every parameter whose value is one of a few words
CHOICES = {
    "benchmark": ("", "mig_bench", "lisa", "revos", "ref_l4", "blink", "mmiu"),
    "coordinates": tuple(MODEL_COORDINATES),
    "curate": ("pass_rate", "random"),
    "data": ("scenes", "own", "mgrounding"),
    "device": ("auto", "cuda", "cpu"),
    "dtype": ("auto", "float32", "bfloat16"),
    "hallucinated_image_penalty": ("none", "format", "all"),
    "importance_sampling_level": ("token", "sequence"),
    "lora_targets": ("all", "attention", "gate_up"),
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "lr_scheduler_type": ("linear", "cosine", "constant_with_warmup"),
    "orientation": ORIENTATIONS,
    "report_to": ("none", "trackio", "wandb"),
    "scale_rewards": ("batch", "group", "none"),
    "teacher": ("rules", "endpoint", "own", "none"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask",
                                      "token_truncate"),
}
RENAMED_PARAMS = {
    "batch_size": "per_device_train_batch_size", "checkpoint_layers": "gradient_checkpointing",
    "clip_high": "epsilon_high", "clip_low": "epsilon",
    "drawn_per_task": "sampled_per_task", "epochs": "num_train_epochs", "frame": "coordinates",
    "gradient_accumulation": "gradient_accumulation_steps", "held": "micro_replies",
    "highest": "max_pass_rate", "lora_rank": "lora_r", "lowest": "min_pass_rate",
    "max_new_tokens": "max_completion_length", "missing_images": "hallucinated_image_penalty",
    "schedule": "lr_scheduler_type", "track": "report_to",
}
REMOVED_PARAMS = {
    "processes": "set launcher to a command that starts them, such as 'torchrun --standalone "
                 "--nproc-per-node 2'",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stage: its default and its line of help."""

    default: str | int | float | bool | list | dict
    help: str


def stage_parameters(stage: str) -> dict[str, Parameter]:
    """The parameters of a stage by name, as its notebook's `parameters` cell has them."""
    cell = next(cell for cell in notebook_cells(stage)
                if "parameters" in cell["metadata"].get("tags", ()))
    source = "".join(cell["source"])
    lines = source.splitlines()
    parameters = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            text = lines[node.lineno - 1].partition("  # ")[2]
            parameters[node.target.id] = Parameter(ast.literal_eval(node.value), text)
    return parameters


def list_profiles() -> list[str]:
    """The names of the profiles: tiny, and every folder of params/."""
    folders = [path.name for path in (PROJECT_ROOT / "params").iterdir() if path.is_dir()]
    return ["tiny", *sorted(folders)]


def profile_params(stage: str, profile: str = "tiny") -> dict:
    """All parameters of a stage in a profile: the notebook's defaults, and what the profile
    changes.

    FileNotFoundError names the profiles where there is no such one; otherwise raises as
    `validate_params`.
    """
    if profile not in list_profiles():
        raise FileNotFoundError(f"no profile '{profile}' in params/; the profiles are "
                                f"{', '.join(list_profiles())}")
    path = PROJECT_ROOT / "params" / profile / f"{stage}.yaml"
    return validate_params(read_params_file(path) if path.is_file() else {}, stage)


def needs_gpu(profile: str) -> bool:
    """Whether a profile trains a full model: a file of it sets device to "cuda"."""
    files = (PROJECT_ROOT / "params" / profile).glob("*.yaml")
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


def validate_params(values: dict, stage: str) -> dict:
    """`values` completed from the stage's defaults, of the defaults' types.

    KeyError for an unknown name, ValueError for a word that is not one of its CHOICES and for
    parameters of curation, loss or rewards that cannot act together, TypeError for a wrong type;
    each names the fix. A number that YAML reads as a word (1e-5, without a point) counts as a
    number where one is due. Of a mapping, what is not set keeps its default.
    """
    defaults = {name: parameter.default for name, parameter in stage_parameters(stage).items()}
    params = dict(defaults)
    for name, value in values.items():
        if name not in defaults:
            raise KeyError(unknown_parameter_message(name, stage, defaults))
        params[name] = merge_mappings(
            defaults[name], _typed(name, value, type(defaults[name]), stage, defaults[name]))
    if "rewards" in params:
        check_reward_params(params, defaults["reward_weights"])
    if stage == CURATION_STAGE:
        check_curation_params(params)
    if stage == LOSS_STAGE:
        check_loss_params(params, {name for name in params if params[name] != defaults[name]})
    return params


def merge_mappings(value, change):
    """`change`; where both are mappings, `value` with the entries of `change`."""
    return {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change


def unknown_parameter_message(name: str, where: str, names) -> str:
    """One sentence on a parameter that `where` does not have, with the nearest of `names` if one is
    near.
    """
    if name in REMOVED_PARAMS:
        return f"the parameter '{name}' was taken out: {REMOVED_PARAMS[name]}"
    new_name = RENAMED_PARAMS.get(name, name)
    renaming = f"the parameter '{name}' is now called '{new_name}'"
    if new_name in names:
        return renaming
    if new_name in RUN_PARAMS:
        start = f"{renaming}; it" if new_name != name else f"'{name}'"
        return f"{start} is set once per run, in {RUN_PARAMS_STAGE}; run that stage with it"
    near = difflib.get_close_matches(name, sorted(names), 1)
    everything = ", ".join(sorted(names))
    hint = f"did you mean '{near[0]}'?" if near else f"its parameters are {everything}"
    return f"{where} has no parameter '{name}'; {hint}"


def _typed(name: str, value, kind: type, stage: str, default):
    if kind is dict:
        return _typed_mapping(name, value, stage, default)
    if kind is float:
        value = _to_number(value)
    is_fitting = type(value) is kind or (kind is float and type(value) is int)
    if not is_fitting:
        raise TypeError(f"{stage}: parameter '{name}' is {value!r}, a {type(value).__name__}; "
                        f"it must be a {kind.__name__}")
    if name in CHOICES and value not in CHOICES[name]:
        near = difflib.get_close_matches(value, CHOICES[name], 1)
        words = ", ".join(word or '""' for word in CHOICES[name])
        hint = f"did you mean '{near[0]}'? It is" if near else "it must be"
        raise ValueError(f"{stage}: parameter '{name}' is '{value}'; {hint} one of {words}")
    return kind(value)


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


def params_text(stage: str, profile: str = "tiny") -> str:
    """The parameters of a stage in a profile as lines of "name: value  # help"; a value that
    differs from tiny says so.
    """
    values = profile_params(stage, profile)
    lines = []
    for name, parameter in stage_parameters(stage).items():
        value = yaml.safe_dump([values[name]], default_flow_style=True, sort_keys=False,
                               width=1000).strip()[1:-1]
        difference = "" if values[name] == parameter.default else f" (tiny: {parameter.default})"
        lines.append(f"{name}: {value}  # {parameter.help}{difference}")
    return "\n".join(lines)
