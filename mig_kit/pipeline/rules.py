"""The table of rules: which numbers and words each parameter of the notebooks may have.

What holds between them is in `joint_rules`.
"""

import math
import re

from mig_kit.boxes import MODEL_COORDINATES
from mig_kit.common import suggest_word

# how RULES writes a range of numbers
RANGE = re.compile(r"(?:(\d+) numbers, each )?(above )?([\d.]+)(?: or more| to (below )?([\d.]+))?")


def _each(rule: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), rule)


# every parameter of the notebooks -> its range (of each number of a list), its words or, where
# anything may stand, what that is
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
    "report_to": ("none", "trackio", "wandb"),
    "scale_rewards": ("batch", "group", "none"),
    "teacher": ("rules", "endpoint", "own", "none"),
    "vllm_importance_sampling_mode": ("sequence_mask", "sequence_truncate", "token_mask",
                                      "token_truncate"),
    **_each("true or false", "gradient_checkpointing mask_truncated_completions "
            "reasoning share_prefix vllm_importance_sampling_correction"),
    **_each("a file", "plan_file"),
    **_each("a model: tiny, a folder or a hub name", "base_model model"),
    **_each("a name of letters, digits, '-', '_' and '.'", "control_run run_id"),
    "endpoint_model": "a name", "endpoint_url": "an address", "image_root": "a folder",
    "groups": "name=run,run", "reference": "a name of groups", "launcher": "a command",
    "profile": "a folder of params/", "rewards": "names and file.py:function",
    "server": "addresses, or a command with {model} and {port}",
    "start_from": "merged, base, adapter or a folder"}


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
