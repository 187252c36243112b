"""Parameters of a stage from their sources: defaults, a profile, `-p`, a notebook's cell.

`stage_params` says what they are; params/<profile>/ holds what a profile changes.
"""

from pathlib import Path

import yaml
from pydantic import ValidationError

from mig_kit.common import PROFILES, UserError, suggest_word
from mig_kit.pipeline.stage_params import (
    EXECUTION_PARAMS,
    MODELS,
    RUN_PARAMS,
    RUN_PARAMS_STAGE,
    stage_fields,
)

# TRL's config class of the stages that train
CONFIGS = {"02_sft": "SFTConfig", "05_grpo": "GRPOConfig"}
# settings of TRL whose updates 02's trainer was seen to make as TRL's own does; others are refused
ALLOWED = ("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing",
           "gradient_checkpointing_kwargs", "lr_scheduler_kwargs", "max_grad_norm", "max_steps",
           "optim", "weight_decay")
# of 05, read in methods of TRL's that sharing prompts replaces; TRL's own code reads all others
UNREAD = ("chat_template_kwargs", "use_vllm")
# what `params_text` shows of pydantic's JSON schema
LIMITS = ("type", "enum", "minimum", "exclusiveMinimum", "maximum")


def default_params(stage: str) -> dict:
    """A stage's parameters in the profile tiny."""
    return {name: field.get_default(call_default_factory=True)
            for name, field in stage_fields(stage).items()}


def profile_params(stage: str, profile: str = "tiny") -> dict:
    """A stage's parameters in a profile, not validated; UserError for an unknown profile."""
    profiles = ["tiny", *sorted(path.name for path in PROFILES.iterdir() if path.is_dir())]
    if profile not in profiles:
        raise UserError(f"no profile '{profile}' in params/; the profiles are "
                        f"{', '.join(profiles)}")
    values = _read_profile(PROFILES / profile / f"{stage}.yaml")
    return values | {name: merge_mappings(default, values.get(name, default))
                     for name, default in default_params(stage).items()}


def _read_profile(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no mapping in YAML; write lines of parameter: value")
    return values


def needs_gpu(profile: str) -> bool:
    """Whether a profile trains a full model: one of its files sets device to "cuda"."""
    return any(profile_params(stage, profile).get("device") == "cuda" for stage in MODELS)


def find_changed(params: dict, others: dict) -> dict:
    """The parameters that change results and have another value in `others`."""
    return {name: value for name, value in params.items()
            if name not in EXECUTION_PARAMS and value != others.get(name, value)}


def merge_mappings(value, change):
    """`change`; if both are mappings, `value` with the entries of `change`."""
    return {**value, **change} if isinstance(value, dict) and isinstance(change, dict) else change


def validate_params(values: dict, stage: str) -> dict:
    """`values` with the stage's defaults, in their types; a mapping keeps those that it leaves out.

    Raises: UserError for an unknown name, a value of the wrong type or out of its range, and values
        that cannot act together; each names the fix.
    """
    defaults = default_params(stage)
    try:
        params = MODELS[stage](**{name: merge_mappings(defaults.get(name), value)
                                  for name, value in values.items()})
    except ValidationError as error:
        raise UserError(f"{stage}: {_sentence(error.errors()[0], stage)}") from None
    if params_of_trl := getattr(params, "trl", {}):
        _check_trl(params_of_trl, stage, getattr(params, "share_prefix", True))
    values = params.model_dump()
    return {name: values[name] for name in stage_fields(stage)}


def choose_params(stage: str, profile: str, run_id: str, overrides: dict) -> dict:
    """All parameters of a stage: its profile's, then run id, profile and overrides it knows."""
    values = profile_params(stage, profile)
    known = {name: merge_mappings(values[name], value)
             for name, value in {"run_id": run_id, "profile": profile, **overrides}.items()
             if name in values}
    return validate_params(values | known, stage)


def _sentence(problem: dict, stage: str) -> str:
    """pydantic's error with the parameter's name in front; a validator's own sentence as it is."""
    name = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return unknown_parameter_message(name, "it", MODELS[stage].model_fields)
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    return f"{name} is {problem['input']!r}: {problem['msg']}"


def unknown_parameter_message(name: str, where: str, names) -> str:
    """One sentence on a parameter that `where` lacks, with the nearest of `names`."""
    if name in RUN_PARAMS:
        return f"'{name}' is set once per run, in {RUN_PARAMS_STAGE}; run that stage with it"
    hint = suggest_word(name, names) or f"its parameters are {', '.join(sorted(names))}"
    further = '; a setting of TRL\'s alone is written as -p trl "{NAME: VALUE}"'
    return f"{where} has no parameter '{name}'; {hint}{further * ('trl' in names)}"


def _check_trl(settings: dict, stage: str, shares_prefix: bool) -> None:
    """UserError for a setting that TRL's config lacks, or that may have no effect here."""
    import trl  # seconds, which a command without such settings need not wait for

    for name in settings:
        if name in MODELS[stage].model_fields:
            raise UserError(f"{stage}: {name} is a parameter of its own; write -p {name} "
                            f"{settings[name]}")
        known = getattr(trl, CONFIGS[stage]).__dataclass_fields__
        if name not in known:
            near = suggest_word(name, known) or "TRL's documentation lists them"
            raise UserError(f"{stage}: TRL's {CONFIGS[stage]} has no '{name}'; {near}")
        if stage == "02_sft" and name not in ALLOWED:
            raise UserError(f"{stage}: {name} of trl is not known to act in this stage as in TRL; "
                            f"take it out; this stage takes {', '.join(ALLOWED)}")
        if stage == "05_grpo" and shares_prefix and name in UNREAD:
            raise UserError(f"{stage}: {name} of trl has no effect where prompts are shared; take "
                            "it out, or set share_prefix to false")


def params_text(stage: str, profile: str = "tiny") -> str:
    """A stage's parameters in a profile as lines: value, help, tiny's value, type and limits."""
    values, lines = profile_params(stage, profile), []
    schema = MODELS[stage].model_json_schema()["properties"]
    for name, field in stage_fields(stage).items():
        value = yaml.safe_dump([values[name]], default_flow_style=True, sort_keys=False,
                               width=1000).strip()[1:-1]
        other = "" if values[name] == field.default else f" (tiny: {field.default})"
        limits = ", ".join(f"{key} {schema[name][key]}" for key in LIMITS if key in schema[name])
        lines += [f"{name}: {value}  # {field.description}{other}", f"    # {limits}"]
    return "\n".join(lines)
