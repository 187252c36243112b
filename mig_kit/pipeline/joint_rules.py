"""Rules between parameters and for rewards, checked before any kernel starts.

With `num_iterations` 1 an update learns once from its replies, so the ratio of new to old
probabilities is exactly 1: no clip acts, and losses that differ in the ratio alone are the same.
"""

import importlib.util
import inspect
import json
import re
import symtable
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

import yaml

from mig_kit.common import PROFILES, PROJECT_ROOT, model_folder, split_function_name, suggest_word
from mig_kit.openai_client import ADDRESS, KEY_VARIABLE, parse_server
from mig_kit.pipeline.params import (
    RULES,
    RUN_PARAMS_STAGE,
    complete_params,
    describe_values,
    profile_params,
    shipped_params,
    stage_parameters,
)
from mig_kit.pipeline.processes import parse_launcher
from mig_kit.pipeline.run_folders import (
    COLD_START,
    has_cold_start,
    load_record,
    require_runs,
    stage_folder,
)

SINGLE = "with num_iterations 1 the ratio of new to old probabilities is exactly 1"
TWICE = "set num_iterations to 2 or more"
START_WORDS, NEEDS_SFT = ("merged", "base", "adapter"), ("merged", "adapter")
TABLE_COLUMNS = ("suite", "compared")  # of the table of claims, beside a column per group
HIDDEN = ("endpoint_url", "server")  # may hold a key, which no message repeats
# the names of `mig_kit.rewards.REWARDS`, which is slow to import
KIT_REWARDS = ("format", "image", "box", "choice")
# what the curves of stage 05 hold besides the rewards
NAMES_OF_CURVES = ("step", "reward", "length", "entropy", "kl", "zero_std", "clipped_ratio",
                   "clip_ratio", "ratio", "staleness", "adapter", "method", "finding", "evidence",
                   "truth", "coverage")
CURATION = "04_rejection_sampling"


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> runs of words "name=run,run"; a run alone is a group of its own name.

    Raises ValueError for a name or run that occurs twice, or a group without runs.
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


def _is_no_model(name: str) -> bool:
    """Whether a name is neither that of a folder nor one that the hub can have, USER/NAME."""
    return not re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not model_folder(name).is_dir()


def _leaves_steps_over(launcher: str, steps: int) -> bool:
    launch = parse_launcher(launcher)  # else ValueError
    return steps % (launch.local * launch.nodes or 1) > 0


# (whether parameters of these names break the rule, what holds; the remedy). A rule applies to the
# stages that have all its parameters. `changed` names those that are not at their defaults. Other
# names are facts of the run (`_list_facts`); a rule with one waits until it is known.
JOINT_RULES = (
    (lambda profile: profile != "tiny" and (not profile or not (PROFILES / profile).is_dir()),
     "it must be tiny or a folder of params/; name one of them"),
    (lambda model: model and _is_no_model(model),
     "it must be a folder that exists, or USER/NAME of the hub; correct it"),
    (lambda base_model: not base_model or _is_no_model(base_model),
     "it must be tiny, a folder that exists, or USER/NAME of the hub; correct it"),
    (lambda min_pixels, max_pixels: min_pixels > max_pixels,
     "the lower limit must be at most the upper one; swap them"),
    (lambda data_shares: abs(sum(data_shares) - 1) > 1e-6,
     "the shares of cold start, RL and validation must sum to 1; write three that do, as "
     "[0.75, 0.2, 0.05]"),
    (lambda data, data_shares: data != "scenes" and not data_shares[2],
     "some questions must be held out; raise the last share"),
    (lambda data, teacher: teacher == "own" and data == "scenes",
     "teacher own is the key 'reply' of your own data; name its file in data"),
    (lambda data, teacher: teacher == "rules" and data != "scenes",
     "the rules teacher reads synthetic scenes only; set teacher to none and start_from to base "
     "(RL alone: images, question and target are enough), to own (your key 'reply') or to "
     "endpoint"),
    (lambda data, train_find_all_per_task: data != "scenes" and train_find_all_per_task,
     "questions for all boxes are made of synthetic scenes only; set train_find_all_per_task to 0"),
    (lambda data, rl_per_task, rl_free_form_per_task, rl_boxes_per_task, train_find_all_per_task:
     data == "scenes" and not (rl_per_task or rl_free_form_per_task or rl_boxes_per_task
                               or train_find_all_per_task),
     "RL needs candidates; raise one of them"),
    (lambda data, teacher, cot_per_task, free_form_per_task, train_find_all_per_task:
     data == "scenes" and teacher != "none" and not (
         cot_per_task or free_form_per_task or train_find_all_per_task),
     "the teacher needs questions; raise one of them, or set teacher to none"),
    (lambda data: data != "scenes" and not (PROJECT_ROOT / data).is_file(),
     "it must be scenes or a file that exists; name the file of your questions, as -p data "
     "mine.jsonl"),
    (lambda image_root: not (PROJECT_ROOT / image_root).is_dir(),
     "it must be a folder that exists; correct it"),
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
    (lambda replies, min_pass_rate: not replies,
     "04 needs one reply or more to each prompt for a pass rate; for 06 without them run it by "
     "itself: mig-kit run 06 -p replies 0"),
    (lambda num_generations, per_device_train_batch_size, gradient_accumulation_steps, share_prefix:
     per_device_train_batch_size * (share_prefix or gradient_accumulation_steps) % num_generations,
     "per_device_train_batch_size must be a multiple of num_generations (without share_prefix, "
     "times gradient_accumulation_steps), so that groups stay whole; change one of them"),
    (lambda multi_objective_aggregation, share_prefix: (
        share_prefix and multi_objective_aggregation != "sum_then_normalize"),
     "the kit's trainer sums weighted rewards before it divides; leave multi_objective_aggregation "
     "out, or set share_prefix to false"),
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
     "the vllm_importance_sampling settings correct what a server sampled; name a server, or take "
     "them out"),
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
    (lambda loss_type, epsilon, epsilon_high: (
        loss_type == "cispo" and (epsilon_high or epsilon) < 1),
     "loss_type cispo caps the ratio itself at epsilon_high, and below 1 would multiply nearly "
     "every gradient by it; set epsilon_high to 1 or more (TRL advises 5.0)"),
    (lambda loss_type, importance_sampling_level: importance_sampling_level == (
        {"luspo": "token", "vespo": "sequence"}.get(loss_type)),
     "luspo weighs replies by a ratio per reply, and vespo has weights of its own per sequence; "
     "set importance_sampling_level to sequence for luspo, to token for vespo"),
    (lambda top_entropy_quantile, importance_sampling_level, loss_type: (
        importance_sampling_level == "sequence" and loss_type != "cispo"
        and top_entropy_quantile < 1),
     "top_entropy_quantile chooses tokens, and with level sequence a reply has one ratio for all "
     "of them; set one of the two back"),
    (lambda loss_type, gradient_accumulation_steps: (
        loss_type == "bnpo" and gradient_accumulation_steps == 1),
     "bnpo is the mean over the tokens of a step, and an update of one step makes it dapo; use "
     "dapo, or raise gradient_accumulation_steps"),
    (lambda wide_hidden: wide_hidden % 128, "heads are 128 wide; use a multiple of 128"),
    (lambda groups, reference: (
        (names := parse_groups(groups)) and reference and reference not in names),
     "the reference must be one of the groups; name one, or \"\" for the first"),
    (lambda num_train_epochs, teacher_of_01: teacher_of_01 == "none",
     "there is no cold-start set to learn from; run 01 again with another teacher, or leave 02 and "
     "03 out and set start_from of 05 to base"),
    (lambda start_from, teacher_of_01, has_sft: start_from in NEEDS_SFT and not has_sft,
     "there is no cold start; set start_from to base, for RL alone, or teacher to own (the key "
     "'reply' of your data) or endpoint"),
    (lambda start_from, lora_r, lora_targets, adapter_of_02: (
        start_from == "adapter" and adapter_of_02 != [lora_r, lora_targets]),
     "RL goes on with that adapter; set lora_r and lora_targets to those of 02"),
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


def params_text(stage: str, profile: str = "tiny") -> str:
    """A stage's parameters in a profile as lines: value, help, range; then the joint rules."""
    values, parameters = profile_params(stage, profile), stage_parameters(stage)
    lines = []
    for name, parameter in parameters.items():
        value = yaml.safe_dump([values[name]], default_flow_style=True, sort_keys=False,
                               width=1000).strip()[1:-1]
        is_edited = parameter.default != parameter.value == values[name]
        word = "edited in the notebook; shipped" if is_edited else "tiny"
        difference = "" if values[name] == parameter.default else f" ({word}: {parameter.default})"
        lines += [f"{name}: {value}  # {parameter.help}{difference}",
                  f"    # {describe_values(name, type(parameter.default))}"]
    for is_broken, text in JOINT_RULES:
        names = [name for name in NAMES[is_broken] if name != "changed"]
        if all(name in parameters or name not in RULES for name in names):
            lines.append(f"# {', '.join(names)}: {text.partition(';')[0]}")
    return "\n".join(lines)


def check_joint_rules(params: dict, defaults: dict, stage: str, **facts) -> None:
    """ValueError if parameters cannot act together, or not with the facts of `_list_facts`."""
    changed = {name for name in params if params[name] != defaults.get(name)}
    known = {**params, **facts, "changed": changed}
    for is_broken, text in JOINT_RULES:
        names = NAMES[is_broken]
        if known.keys() >= set(names) and is_broken(*(known[name] for name in names)):
            *others, last = (
                f"{name} is {'set' if known[name] and name in HIDDEN else repr(known[name])}"
                for name in names if name != "changed")
            values = f"{', '.join(others)} and {last}" if others else last
            raise ValueError(f"{stage}: {values}, but {text}")


def validate_params(values: dict, stage: str) -> dict:
    """`complete_params`, and ValueError or FileNotFoundError if they cannot act together."""
    params, defaults = complete_params(values, stage), shipped_params(stage)
    if "rewards" in params:
        check_reward_params(params, defaults["reward_weights"])
    check_joint_rules(params, defaults, stage)
    return params


def check_run(planned: dict[str, dict], run_id: str) -> None:
    """Raise if a planned stage cannot work on what the run's other stages have made or will make.

    planned: parameters by stage. run_id: the run, or the one that it starts from.
    """
    facts = {}
    if any("02" <= stage < "08" for stage in planned):
        facts = _list_facts(planned, run_id)
    for stage, params in planned.items():
        check_joint_rules(params, shipped_params(stage), stage, **facts)
        groups = parse_groups(params["groups"]) if "groups" in params else {}
        control = [params["control_run"]] if params.get("control_run") else []
        require_runs(*control, *(name for members in groups.values() for name in members
                                 if not name.endswith(".json")))


def _list_facts(planned: dict[str, dict], run_id: str) -> dict:
    """What rules need to know of stages other than their own, as far as it is known by now."""
    synthesize = _find_params(RUN_PARAMS_STAGE, planned, run_id)
    facts = {f"{name}_of_01": synthesize[name] for name in ("data", "teacher")
             if name in synthesize}
    facts["has_sft"] = any(stage in planned for stage in COLD_START) or (
        synthesize["teacher"] != "none" if RUN_PARAMS_STAGE in planned else has_cold_start(run_id))
    if sft := _find_params("02_sft", planned, run_id):
        facts["adapter_of_02"] = [sft[name] for name in ("lora_r", "lora_targets")]
    if p := planned.get("05_grpo"):
        replies = p["per_device_train_batch_size"] * p["gradient_accumulation_steps"]
        facts["prompts_of_an_update"] = replies // p["num_generations"]
    if (count := count_prompts(planned, run_id)) is not None:
        facts["prompts_of_04"] = count
    return facts


def _find_params(stage: str, planned: dict[str, dict], run_id: str) -> dict:
    """A stage's planned parameters, else the ones that it finished with, else {}."""
    return planned.get(stage) or (load_record(stage, run_id) or {}).get("params", {})


def count_prompts(planned: dict[str, dict], run_id: str) -> int | None:
    """How many prompts 04 has kept or, if it will run, keeps at most; None if unknown."""
    with suppress(OSError, ValueError):
        if CURATION not in planned:
            path = stage_folder(CURATION, run_id) / "metrics.json"
            return json.loads(path.read_text()).get("kept")
        if RUN_PARAMS_STAGE not in planned:
            from pyarrow.parquet import read_table  # a moment, which most commands need not wait

            path = stage_folder(RUN_PARAMS_STAGE, run_id) / "rl.parquet"
            counts = Counter(read_table(path, columns=["task"])["task"].to_pylist())
            return sum(min(count, planned[CURATION]["per_task"]) for count in counts.values())
    return None


def leave_out_cold_start(params: dict[str, dict], run_id: str) -> dict[str, dict]:
    """`params` by stage, without 02 and 03 if the run (or its source) has no teacher."""
    if _find_params(RUN_PARAMS_STAGE, params, run_id).get("teacher") != "none":
        return params
    return {stage: values for stage, values in params.items() if stage not in COLD_START}


def check_reward_params(params: dict, default_weights: dict[str, float]) -> None:
    """FileNotFoundError for a missing file, ValueError if rewards or weights cannot act."""
    references = params["rewards"]
    if not references:
        raise ValueError("rewards is []; list names of rewards, such as [format, image, box, "
                         "choice], and functions as file.py:function")
    names = [_check_reference(text) for text in references]
    paths = {split_function_name(text)[0] for text in references if ":" in text}
    for listed, sentence in (
            (names, "two of rewards are called '{}'; leave one out or rename a function"),
            ([path.name for path in paths], "rewards are in two files called {}; rename one")):
        if repeated := sorted({name for name in listed if listed.count(name) > 1}):
            raise ValueError(sentence.format(repeated[0]))
    for name, weight in params["reward_weights"].items():
        if name not in names and default_weights.get(name) != weight:  # a default may be idle
            raise ValueError(f"reward_weights has '{name}', which is not one of rewards "
                             f"({', '.join(names)}); add it there, or take its weight out")


def _check_reference(text: str) -> str:
    """The name under which a reward is logged; raises as `check_reward_params`."""
    if ":" not in text:
        if text in KIT_REWARDS:
            return text
        hint = suggest_word(text, KIT_REWARDS) or f"the kit's are {', '.join(KIT_REWARDS)}"
        raise ValueError(f"rewards has '{text}'; {hint} A function of your own is written as "
                         "file.py:function")
    path, function = split_function_name(text)
    if not path.is_file():
        near = suggest_word(path.name, [file.name for file in path.parent.glob("*.py")], 0.5)
        raise FileNotFoundError(f"rewards names {path}, which does not exist; "
                                f"{near or 'give its path from the project, or an absolute one'}")
    if function in NAMES_OF_CURVES:
        raise ValueError(f"the curves of 05 have a '{function}' of their own; rename the function "
                         f"in {path}")
    try:
        symbols = symtable.symtable(path.read_text(), str(path), "exec").get_symbols()
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ValueError(f"{path}, line {line}: {error.args[0]}; correct it") from None
    if not any(symbol.get_name() == function and (symbol.is_assigned() or symbol.is_imported())
               for symbol in symbols):
        functions = [symbol.get_name() for symbol in symbols if symbol.is_namespace()]
        raise ValueError(f"{path} has no function '{function}'; it has "
                         f"{', '.join(functions) or 'none'}")
    return function
