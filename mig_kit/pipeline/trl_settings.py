"""Settings of TRL's trainers that the recipe never changes, or changes with a profile alone.

The parameter `trl` of 02 and 05 is a mapping from names of SFTConfig or GRPOConfig to values. Each
of its entries counts as a parameter of its own: a profile's file, `-p num_iterations 2` and the
rules name it directly. A setting that stands neither in that mapping nor in SETTINGS has TRL's
default; a stage gets it with `-p trl "{top_p: 0.9}"`.
"""

from dataclasses import MISSING, fields
from functools import cache

GROUP = "trl"  # the parameter of a notebook that holds them
CONFIGS = {"02_sft": "SFTConfig", "05_grpo": "GRPOConfig"}
HELP = {
    "lr_scheduler_type": "after warm-up: linear (to 0), cosine or constant_with_warmup",
    "warmup_steps": "linear warm-up, updates",
    "save_steps": "a checkpoint every so many updates; in 05 in whole num_iterations",
    "gradient_checkpointing": "keep only the layers' inputs: less memory, one more pass",
    "report_to": "send the curves to a tracker too: none, trackio or wandb",
    "importance_sampling_level": "ratio of new to old: per token, or per reply (sequence)",
    "num_iterations": "updates that learn from the same replies",
    "epsilon": "clips ratios to 1 - epsilon; needs num_iterations 2 or more",
    "epsilon_high": "clips them to 1 + epsilon_high; 0 for the same as epsilon",
    "mask_truncated_completions": "leave replies without an end out of the loss",
    "top_entropy_quantile": "share of tokens, those of highest entropy, in the policy loss",
    "vllm_importance_sampling_correction": "weigh served replies by learner / server",
    "vllm_importance_sampling_mode": "token_ or sequence_, mask or truncate",
    "vllm_importance_sampling_clip_max": "larger ratios are masked or truncated"}
# those with rules of the kit, and TRL's defaults; 0 stands for TRL's None
SETTINGS = {"02_sft": {"report_to": "none"}, "05_grpo": {
    "report_to": "none", "importance_sampling_level": "token", "num_iterations": 1,
    "epsilon": 0.2, "epsilon_high": 0.0, "mask_truncated_completions": False,
    "top_entropy_quantile": 1.0,
    "vllm_importance_sampling_correction": True, "vllm_importance_sampling_mode": "sequence_mask",
    "vllm_importance_sampling_clip_max": 3.0}}


def find_trl_default(name: str, stage: str):
    """TRL's own default of a setting of the stage's config class.

    KeyError where the stage trains nothing, or its class has no such setting.
    """
    return _class_defaults(CONFIGS[stage])[name]


def is_trl_setting(name: str, stage: str) -> bool:
    """Whether the config class of a training stage has a setting of this name."""
    return stage in CONFIGS and name in _class_defaults(CONFIGS[stage])


@cache
def _class_defaults(config_class: str) -> dict:
    import trl  # seconds, which a command with known parameters alone need not wait for

    defaults = {}
    for setting in fields(getattr(trl, config_class)):
        is_made = setting.default is MISSING and setting.default_factory is not MISSING
        defaults[setting.name] = setting.default_factory() if is_made else setting.default
    return defaults
