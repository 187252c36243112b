"""The table of rules between parameters: what cannot act together is refused.

With `num_iterations` 1 an update learns once from its replies. The model is then its own old model,
and the ratio of new to old probabilities is exactly 1: no clip can act, and losses that differ only
in what they make of the ratio are the same.
"""

import importlib.util
import inspect
import re
from collections.abc import Iterator, Sequence

from mig_kit.common import PROJECT_ROOT, model_folder
from mig_kit.launchers import parse_launcher
from mig_kit.openai_client import ADDRESS, KEY_VARIABLE, parse_server
from mig_kit.pipeline.rules import RULES

SINGLE = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
TWICE = "set num_iterations to 2 or more"
START_WORDS, NEEDS_SFT = ("merged", "base", "adapter"), ("merged", "adapter")
TABLE_COLUMNS = ("suite", "compared")  # of the paper's claims, where the groups are columns, too
HIDDEN = ("endpoint_url", "server")  # may hold a key, which no message repeats


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> runs of words "name=run,run"; a run alone is a group of its own name.

    ValueError where a name or a run occurs twice, or a group has no run.
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        name, is_named, runs = word.partition("=")
        members = [run.strip() for run in (runs if is_named else name).split(",") if run.strip()]
        if not name.strip() or not members:
            raise ValueError(f"'{word}' is no group; write name=run or name=run,run")
        if name.strip() in groups:
            raise ValueError(f"two groups are called '{name.strip()}'; give each its own name")
        groups[name.strip()] = members
    everyone = [run for members in groups.values() for run in members]
    if twice := next((run for run in everyone if everyone.count(run) > 1), ""):
        raise ValueError(f"run '{twice}' is named twice; a run counts once, in one group")
    if taken := [name for name in groups if name in TABLE_COLUMNS]:
        raise ValueError(f"a group cannot be called '{taken[0]}', as a column of the table is; "
                         "give it another name")
    if not groups:
        raise ValueError("there is nothing to compare; name runs, or groups as name=run,run")
    return groups


def _is_no_file(name: str) -> bool:
    return not (PROJECT_ROOT / name).is_file()


def _is_no_folder(name: str) -> bool:
    return not (PROJECT_ROOT / name).is_dir()


def _is_no_model(name: str) -> bool:
    """Whether a name is neither that of a folder nor one that the hub can have, USER/NAME."""
    return not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not model_folder(name).is_dir()


def _leaves_steps_over(launcher: str, steps: int) -> bool:
    launch = parse_launcher(launcher)  # else ValueError
    return steps % (launch.local * launch.nodes or 1) > 0


# (whether parameters of these names break the rule, what holds; the remedy). A rule is of the
# stages that have all of them. `changed` names those that are not at their defaults. The rest are
# facts of the run, of `run_rules.list_facts`, and such a rule waits until they are known.
JOINT_RULES = (
    (lambda profile: profile != "tiny" and (not profile or _is_no_folder(f"params/{profile}")),
     "it must be tiny or a folder of params/; name one of them"),
    (lambda model: model and _is_no_model(model),
     "it must be a folder that exists, or USER/NAME of the hub; correct it"),
    (lambda base_model: not base_model or _is_no_model(base_model),
     "it must be tiny, a folder that exists, or USER/NAME of the hub; correct it"),
    (lambda min_pixels, max_pixels: min_pixels > max_pixels,
     "the lower limit must be at most the upper one; swap them"),
    (lambda detail_mix: not any(detail_mix), "one of the weights must be above 0; raise one"),
    (lambda data_shares: abs(sum(data_shares) - 1) > 1e-6,
     "the shares of cold start, RL and validation must sum to 1; write three that do, as "
     "[0.75, 0.2, 0.05]"),
    (lambda data, data_shares: data != "scenes" and not data_shares[2],
     "some questions must be held out; raise the last share"),
    (lambda data, teacher: teacher == "own" and data != "own",
     "teacher own is the key 'reply' of data own; use another teacher"),
    (lambda data, teacher: teacher == "rules" and data != "scenes",
     "the rules teacher reads drawn scenes only; set teacher to none and start_from to base (RL "
     "alone: images, question and target are enough), to own (your key 'reply') or to endpoint"),
    (lambda data, cot_find_all_per_task, rl_find_all_per_task:
     data != "scenes" and (cot_find_all_per_task or rl_find_all_per_task),
     "questions for all boxes are drawn, as scenes are; set them to 0"),
    (lambda teacher, cot_find_all_per_task: cot_find_all_per_task and teacher == "none",
     "cot_find_all_per_task is for the cold start, which teacher none leaves out; set it to 0, or "
     "use rl_find_all_per_task"),
    (lambda data, rl_per_task, rl_free_form_per_task, rl_boxes_per_task, rl_find_all_per_task:
     data == "scenes" and not (rl_per_task or rl_free_form_per_task or rl_boxes_per_task
                               or rl_find_all_per_task),
     "RL needs candidates; raise one of them"),
    (lambda data, teacher, cot_per_task, free_form_per_task, cot_find_all_per_task:
     data == "scenes" and teacher != "none" and not (
         cot_per_task or free_form_per_task or cot_find_all_per_task),
     "the teacher needs questions; raise one of them, or set teacher to none"),
    (lambda data, data_file: data != "scenes" and _is_no_file(data_file),
     "the questions must be in a file that exists; name it in data_file"),
    (lambda image_root: _is_no_folder(image_root), "it must be a folder that exists; correct it"),
    (lambda teacher, endpoint_url, endpoint_model: teacher == "endpoint" and not (
        ADDRESS.fullmatch(endpoint_url) and endpoint_model),
     "endpoint_url must be like http://localhost:8000/v1, with no name, key or query in it, and "
     "endpoint_model must be named; correct them, and put a key into the environment variable "
     f"{KEY_VARIABLE}"),
    (lambda launcher, gradient_accumulation_steps: launcher.strip() and _leaves_steps_over(
        launcher, gradient_accumulation_steps),
     "the launcher's processes must share the steps of an update evenly; set "
     "gradient_accumulation_steps to a multiple of their number, or launcher to \"\""),
    (lambda report_to: report_to != "none" and importlib.util.find_spec(report_to) is None,
     "a tracker must be installed; run pip install with its name, or set report_to to none"),
    (lambda server: server and parse_server(server) is None, "no key may be in it; take it out"),
    (lambda min_pass_rate, max_pass_rate: min_pass_rate > max_pass_rate,
     "the lower rate must be at most the upper one; swap them"),
    (lambda kept_prompts, curate: kept_prompts and curate != "random",
     "kept_prompts acts with curate random only, and with pass_rate as many prompts are kept as "
     "have a fitting one; set kept_prompts to 0"),
    (lambda replies, curate: not replies and curate == "pass_rate",
     "04 needs one reply or more to each prompt for a pass rate; for 06 without them run it by "
     "itself: mig-kit run 06 -p replies 0"),
    (lambda num_generations, per_device_train_batch_size, gradient_accumulation_steps, share_prefix:
     per_device_train_batch_size * (share_prefix or gradient_accumulation_steps) % num_generations,
     "per_device_train_batch_size must be a multiple of num_generations (without share_prefix, "
     "times gradient_accumulation_steps), so that groups stay whole; change one of them"),
    (lambda share_prefix, server: server and not share_prefix,
     "a server needs share_prefix, because TRL's own trainer has none; set share_prefix to true"),
    (lambda hallucinated_image_penalty, rewards: (
        hallucinated_image_penalty == "format" and "format" not in rewards),
     "the penalty format takes the reward format away, which must be one of rewards; set it to "
     "none or all"),
    (lambda start_from: start_from not in START_WORDS and (
        not start_from or not model_folder(start_from).is_dir()),
     "it must be merged, base, adapter or a folder that exists; correct it"),
    (lambda start_from, beta, server: start_from == "adapter" and (beta or server),
     "02's adapter is on 4-bit weights, which no server holds, and which without it are the base, "
     "not beta's reference; set beta to 0 and server to \"\", or start_from to merged"),
    (lambda server, vllm_importance_sampling_correction, vllm_importance_sampling_mode,
     vllm_importance_sampling_clip_max, changed: not server and any(
         name.startswith("vllm") for name in changed),
     "the latter correct what a server drew; name a server, or take them out"),
    (lambda loss_type, num_iterations: num_iterations == 1 and (
        loss_type in ("cispo", "vespo", "sapo", "luspo")),
     f"{SINGLE}, so that cispo and vespo are dapo, sapo is grpo, and luspo is dr_grpo times "
     f"max_completion_length; use that loss, or {TWICE}"),
    (lambda importance_sampling_level, num_iterations: (
        importance_sampling_level == "sequence" and num_iterations == 1),
     f"{SINGLE}, for a token and for a sequence; {TWICE}, or importance_sampling_level to token"),
    (lambda epsilon, epsilon_high, num_iterations, changed: (
        num_iterations == 1 and changed & {"epsilon", "epsilon_high"}),
     f"{SINGLE}, so neither has anything to clip; {TWICE}, or take them out"),
    (lambda epsilon, loss_type, changed: (
        "epsilon" in changed and loss_type in ("cispo", "sapo", "vespo")),
     "this loss_type does not read epsilon; take it out, or use another loss_type"),
    (lambda epsilon_high, loss_type, changed: (
        "epsilon_high" in changed and loss_type in ("sapo", "vespo")),
     "this loss_type does not read epsilon_high; take it out, or use another loss_type"),
    (lambda loss_type, epsilon, epsilon_high: (
        loss_type == "cispo" and (epsilon_high or epsilon) < 1),
     "loss_type cispo caps the ratio itself at epsilon_high, and below 1 would multiply nearly "
     "every gradient by it; set epsilon_high to 1 or more (TRL advises 5.0)"),
    (lambda loss_type, importance_sampling_level: importance_sampling_level == (
        {"luspo": "token", "vespo": "sequence"}.get(loss_type)),
     "luspo weighs replies by a ratio per reply, and vespo has weights of its own per sequence; "
     "set importance_sampling_level to sequence for luspo, to token for vespo"),
    (lambda loss_type, server, vllm_importance_sampling_correction, vllm_importance_sampling_mode:
     loss_type == "vespo" and server and vllm_importance_sampling_correction and (
         vllm_importance_sampling_mode.startswith("sequence")),
     "vespo reads the server's ratio per token; set vllm_importance_sampling_mode to "
     "token_truncate or token_mask"),
    (lambda top_entropy_quantile, importance_sampling_level, loss_type: (
        importance_sampling_level == "sequence" and loss_type != "cispo"
        and top_entropy_quantile < 1),
     "top_entropy_quantile chooses tokens, and with level sequence a reply has one ratio for all "
     "of them; set one of the two back"),
    (lambda loss_type, gradient_accumulation_steps: (
        loss_type == "bnpo" and gradient_accumulation_steps == 1),
     "bnpo is the mean over the tokens of a step, and an update of one step makes it dapo; use "
     "dapo, or raise gradient_accumulation_steps"),
    (lambda benchmark, annotations_file: benchmark and _is_no_file(annotations_file),
     "a benchmark needs a file that exists; name it in annotations_file"),
    (lambda wide_hidden: wide_hidden % 128, "heads are 128 wide; use a multiple of 128"),
    (lambda groups, reference: (
        (names := parse_groups(groups)) and reference and reference not in names),
     "the reference must be one of the groups; name one, or \"\" for the first"),
    (lambda num_train_epochs, teacher_of_01: teacher_of_01 == "none",
     "there is no cold-start set to learn from; run 01 again with another teacher, or leave 02 and "
     "03 out and set start_from of 05 to base"),
    (lambda kept_prompts, candidates: kept_prompts > candidates,
     "so many cannot be kept; lower it, or raise per_task"),
    (lambda start_from, teacher_of_01, has_sft: start_from in NEEDS_SFT and not has_sft,
     "there is no cold start; set start_from to base, for RL alone, or teacher to own (the key "
     "'reply' of your data) or endpoint"),
    (lambda start_from, lora_r, lora_alpha, lora_targets, adapter_of_02: (
        start_from == "adapter" and adapter_of_02 != [lora_r, lora_alpha, lora_targets]),
     "RL goes on with that adapter; set lora_r, lora_alpha and lora_targets to those of 02"),
    (lambda num_generations, prompts_of_an_update, prompts_of_04: (
        prompts_of_04 < prompts_of_an_update),
     "an update cannot use more prompts than there are (it uses per_device_train_batch_size x "
     "gradient_accumulation_steps / num_generations); lower "
     "gradient_accumulation_steps, widen min_pass_rate and max_pass_rate in 04, or make more "
     "candidates in 01"),
    (lambda data_of_01, mig_per_task, ood_per_task, blink_per_task, mmiu_per_task,
     find_all_per_task: data_of_01 == "scenes" and not (
         mig_per_task or ood_per_task or blink_per_task or mmiu_per_task or find_all_per_task),
     "there is nothing to score; raise one of them"))
NAMES = {is_broken: tuple(inspect.signature(is_broken).parameters) for is_broken, _ in JOINT_RULES}


def describe_joint_rules(names) -> Iterator[str]:
    """A line per rule of a stage that has the parameters `names`."""
    for is_broken, text in JOINT_RULES:
        shown = [name for name in NAMES[is_broken] if name != "changed"]
        if all(name in names or name not in RULES for name in shown):
            yield f"# {', '.join(shown)}: {text.partition(';')[0]}"


def check_joint_rules(params: dict, defaults: dict, stage: str, **facts) -> None:
    """ValueError, a sentence with the remedy, where parameters of a stage cannot act together, or
    not with what is known of its run; facts: of `run_rules.list_facts`.
    """
    changed = {name for name in params if params[name] != defaults[name]}
    known = {**params, **facts, "changed": changed}
    for is_broken, text in JOINT_RULES:
        names = NAMES[is_broken]
        if known.keys() >= set(names) and is_broken(*(known[name] for name in names)):
            *others, last = (
                f"{name} is {'set' if known[name] and name in HIDDEN else repr(known[name])}"
                for name in names if name != "changed")
            values = f"{', '.join(others)} and {last}" if others else last
            raise ValueError(f"{stage}: {values}, but {text}")
