"""Tables of the report (07) that are computed from replies and records, and what to look at in each
table and figure.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.engine.stored_replies import load_replies
from mig_kit.pipeline.params import EXECUTION_PARAMS, list_profiles, profile_params
from mig_kit.plots import HELD_OUT_NAMES, OOD_NAMES, SYSTEM_LABELS, suite_name
from mig_kit.prompts import parse_boxes
from mig_kit.rewards import image_overlap, is_correct, weakest_iou
from mig_kit.sample import Sample
from mig_kit.stats import group_by_task, paired_gap_by_list

SYSTEM_NAMES = {name: SYSTEM_LABELS[name] for name in ("base", "sft", "start", "grpo")}
RL_STARTS = ("start", "sft", "base")  # what RL is compared with, the first that a run has
DIFFERENCES = (("sft", "base"), ("grpo", "sft"), ("grpo", "start"), ("grpo", "base"))

CAPTIONS = {
    "claims": "Points by which the GRPO model leads, with the 95 % interval over test samples: "
              "over SFT what RL adds, over the base what SFT and RL add together. What another "
              "seed would give is not in the interval: mig-kit table compares seeds.",
    "held_out": "Questions of your data that nothing was trained on, answered greedily, in "
                "percent. They were set aside by the hash of their first image; left_out.txt of 01 "
                "says how many of their images are in training all the same.",
    "gains": "Points, paired by question. An interval that leaves out 0, marked ▲ or ▼, is a gain "
             "or loss on your data; a wide one asks for more held-out questions (data_shares).",
    "suites": "Points are percent correct, lines their 95 % intervals over samples. Look at "
              "whether GRPO stands above SFT by more than its line, and whether either falls below "
              "the base.",
    "sampled": "The first samples of each task, answered several times. Compare with the greedy "
               "scores: a model that is sure of its answers loses little.",
    "pass_at_k": "The chance that one of k replies at temperature 1 is correct, in percent. Where "
                 "GRPO leads at k = 1 and no longer at k = 8, RL made likelier what SFT could do.",
    "boxes": "Questions that ask for all boxes, of which there may be none. Precision, recall and "
             "F1 are over boxes at IoU 0.5, paired by Hungarian matching. Rejection rate: how "
             "often \"none\" is said where there is none; wrongly none: where there is one. A "
             "model that always says \"none\" has 100 in both.",
    "ood": "Look for suites where SFT or GRPO stands below the base: fine-tuning lost what the "
           "base could do.",
    "ood_rows": "Percent correct, and differences in points with 95 % intervals, paired by "
                "sample. ▲ and ▼ mark gains and losses whose interval leaves out 0; ▼ against the "
                "base is what this run lost.",
    "gallery": "One picture a question: the target is solid green, a reference dotted pink, and "
               "every system's box dashed in its colour with its letter (b base, S SFT, R start of "
               "RL, G GRPO). A "
               "loose box overlaps the target more than any other object; a wrong object is "
               "another thing, or nothing.",
    "tasks": "Look for tasks that stay where SFT left them: their prompts may be too easy, too "
             "hard, or few.",
    "outcomes": "Look at what shrinks from SFT to GRPO. A loose box is on the right object and "
                "not tight enough; a wrong object is a mistake of reasoning or look-up.",
    "loss": "A loss that still falls steeply at the end asks for more epochs.",
    "grpo": "Strong lines are means over ten updates. The reward should rise while the entropy "
            "stays above 0. From a group whose replies all earn the same (zero std) nothing is "
            "learnt.",
    "shares": "Share of all replies of an update that name only the method, give the finding, or "
              "list the evidence in every image, as running means. SFT learns all three from its "
              "teacher; look at which one RL keeps.",
    "rollouts": "Four replies to one prompt of 04, the first of the kept ones that asks for a box, "
                "before RL and after so many updates, drawn with the same random numbers: blue "
                "boxes are correct, orange ones are not, the target is green. Look at when the "
                "boxes come together, and at what the reply writes down by then.",
    "flow": "A large piece that is not \"kept\" names the rule to look at.",
    "dropped": "A task with few kept prompts hardly takes part in RL.",
    "difficulty": "The SFT model's pass rate should fall with the number of things to be listed; "
                  "if it does not, the tasks are hard for another reason.",
}


def load_greedy_replies(folder: Path, suite: str, samples: Sequence[Sample],
                        systems: Iterable[str]) -> dict[str, dict[str, str]]:
    """System -> sample id -> its greedy reply, of those SYSTEM_NAMES that are in `systems`; folder:
    "replies" of 06.
    """
    replies = {}
    for system in [name for name in SYSTEM_NAMES if name in systems]:
        stored = load_replies(folder / f"{system}_{suite}_greedy.jsonl")
        replies[system] = {sample.id: stored[sample.id][0] for sample in samples}
    return replies


def suite_rows(samples: dict[str, Sequence[Sample]]) -> list[dict]:
    """Rows {suite, questions, tasks, an example}; samples: by suite."""
    return [{"suite": suite_name(suite), "questions": len(part),
             "tasks": len({sample.task for sample in part}), "an example": part[-1].question}
            for suite, part in samples.items()]


def greedy_by_id(replies: dict, samples: dict[str, Sequence[Sample]],
                 suite: str) -> dict[str, dict[str, str]]:
    """System -> sample id -> its greedy reply; {} without the suite. replies: of
    `engine.systems.suite_replies`.
    """
    return {system: {sample.id: reply for sample, reply
                     in zip(samples[suite], by_suite[suite]["greedy"], strict=True)}
            for system, by_suite in replies.items() if suite in by_suite}


def difference_rows(deltas: dict) -> list[dict]:
    """A row per pair of systems, a column per suite, of `gap_text`; deltas: of stage 06's metrics.
    """
    return [{"compared": " over ".join(SYSTEM_LABELS.get(name, name) for name in pair.split("-")),
             **{suite_name(suite): gap_text(gap) for suite, gap in by_suite.items()}}
            for pair, by_suite in deltas.items()]


def held_out_rows(systems: dict) -> list[dict]:
    """A row per system on the held-out part of own data, in percent; [] for a run without such.

    systems: of stage 06's metrics.
    """
    return [{"system": SYSTEM_NAMES.get(system, system), "questions": result["n"],
             "correct": result["score"], "95 %": result["ci95"], "right image": result["image"],
             "well formed": result["format"], "at temperature 1": result["sampled"]}
            for system, by_suite in systems.items() for suite, result in by_suite.items()
            if suite in HELD_OUT_NAMES]


def gain_rows(deltas: dict) -> list[dict]:
    """A row per pair of systems on the held-out part of own data, in points; deltas: of stage 06's
    metrics.
    """
    return [{"compared": " over ".join(SYSTEM_NAMES.get(name, name) for name in pair.split("-")),
             "points (95 %)": gap_text(by_suite[suite])}
            for pair, by_suite in deltas.items() for suite in by_suite
            if suite in HELD_OUT_NAMES]


def out_of_domain_rows(samples: list[Sample], replies: dict[str, dict[str, str]],
                       box_format: BoxFormat) -> list[dict]:
    """Per suite out of domain: percent correct of every system, their differences in points with
    95 % intervals, ▲ or ▼ before one whose interval leaves out 0.

    replies: of base, sft (where the run has it) and grpo, by sample id.
    """
    correct = {system: np.array([is_correct(by_id[sample.id], sample, box_format)
                                 for sample in samples], dtype=float)
               for system, by_id in replies.items()}
    rows = []
    for task, indices in group_by_task([sample.task for sample in samples],
                                       np.arange(len(samples))).items():
        row = {"suite": OOD_NAMES[task]}
        row |= {name: f"{100 * correct[system][indices].mean():.1f}"
                for system, name in SYSTEM_NAMES.items() if system in correct}
        for after, before in DIFFERENCES:
            if after not in correct or before not in correct:
                continue
            gaps = correct[after][indices] - correct[before][indices]
            gap = paired_gap_by_list([(gaps, indices)])  # no two share their images
            row[f"{SYSTEM_NAMES[after]} over {SYSTEM_NAMES[before]}"] = gap_text(gap)
        rows.append(row)
    return rows


def gap_text(gap: dict) -> str:
    """"+1.0 (-2 to +4)" of {"value", "ci95"}, with ▲ or ▼ before it if the interval leaves out 0.
    """
    low, high = gap["ci95"]
    mark = "▲ " if low > 0 else "▼ " if high < 0 else ""
    return f"{mark}{gap['value']:+.1f} ({low:+.0f} to {high:+.0f})"


def pass_at_k_rows(systems: dict) -> list[dict]:
    """Rows {suite, system, samples, pass@1, ...} of GRPO and what it began with, in percent; []
    where 06 drew no replies. systems: of stage 06's metrics.
    """
    return [{"suite": suite_name(suite), "system": SYSTEM_NAMES[system],
             "samples": result["n_sampled"],
             **{f"pass@{k}": value for k, value in result["pass_at_k"].items()}}
            for suite in systems["grpo"] for system in ("sft", "start", "grpo") if system in systems
            if (result := systems[system][suite]).get("pass_at_k")]


def classify_list(reply: str, sample: Sample, box_format: BoxFormat) -> str:
    """What is wrong with a reply to a question for all boxes that is not correct: one of
    `report.OUTCOMES`. As many boxes as targets are "loose box" if each overlaps one of its own.
    """
    boxes = parse_boxes(reply)
    if boxes is None:
        return "no answer"
    if not boxes:
        return "wrongly none"
    if not sample.targets:
        return "box where none is"
    if image_overlap(reply, sample) < 1:
        return "wrong image"
    if len(boxes) != len(sample.targets):
        return "wrong number of boxes"
    return "loose box" if weakest_iou(reply, sample, box_format) > 0 else "wrong object"


def box_rows(systems: dict) -> list[dict]:
    """Rows {suite, system, questions, precision, ...} of the suites whose questions ask for all
    boxes, rounded to one decimal; [] where there is none. systems: of stage 06's metrics.
    """
    def rounded(figure):
        return np.round(figure, 1).tolist() if figure is not None else None

    names = {"precision": "precision", "recall": "recall", "f1": "F1", "f1_ci95": "F1, 95 %",
             "rejection": "rejection rate", "rejection_ci95": "rejection rate, 95 %",
             "wrong_rejection": "wrongly none"}
    return [{"suite": suite_name(suite), "system": system,
             "questions": result["boxes"]["n"], "without a box": result["boxes"]["n_none"],
             **{title: rounded(result["boxes"][name]) for name, title in names.items()}}
            for system, suites in systems.items() for suite, result in suites.items()
            if "boxes" in result]


def stage_rows(records: dict[str, dict]) -> list[dict]:
    """Rows {stage, run, minutes, seed, commit, machine} of finished stages, and their sum.

    records: stage -> run.json; that of a stage which a branch took from its source is the source's.
    """
    rows = []
    for stage, record in records.items():
        params = record["params"]
        seeds = [str(params["seed"])] if "seed" in params else []
        seeds += [f"eval_seed {params['eval_seed']}"] if "eval_seed" in params else []
        rows.append({"stage": stage, "run": record["run_id"],
                     "minutes": f"{record['seconds'] / 60:.1f}", "seed": ", ".join(seeds),
                     "commit": shorten_commit(record["git"]),
                     "machine": record["machine"]})
    total = sum(record["seconds"] for record in records.values()) / 60
    return [*rows, {"stage": "together", "minutes": f"{total:.1f}"}]


def describe_run(records: dict[str, dict], samples: dict[str, Sequence[Sample]]) -> str:
    """One line on a run: profile, seed, what it was asked, minutes, commit and machine.

    records: stage -> run.json. samples: by suite, those that 06 asked.
    """
    profile, changed = find_profile(records)
    seeds = dict.fromkeys(str(record["params"]["seed"]) for record in records.values()
                          if "seed" in record["params"])
    commits, machines = (dict.fromkeys(record[key] for record in records.values() if record[key])
                         for key in ("git", "machine"))
    minutes = sum(record["seconds"] for record in records.values()) / 60
    drawn = sum(len(part) for suite, part in samples.items() if suite not in HELD_OUT_NAMES)
    own = sum(len(part) for suite, part in samples.items() if suite in HELD_OUT_NAMES)
    asked = [f"{own} held-out questions of own data"] * bool(own)
    asked += [f"{drawn} drawn questions, to be compared with each other alone"] * bool(drawn)
    facts = [f"profile {profile}" + (f" but for {', '.join(changed)}" if changed else ""),
             f"seed {', '.join(seeds)}", " and ".join(asked), f"{minutes:.1f} minutes",
             f"commit {', '.join(shorten_commit(commit) for commit in commits) or 'unknown'}",
             f"machine {', '.join(machines)}"]
    return "; ".join(facts)


def find_profile(records: dict[str, dict]) -> tuple[str, list[str]]:
    """The profile that most parameters of a run are of, and the names of the others.

    records: stage -> run.json. Seeds, the run's name and how a stage ran do not count.
    """
    ignored = {"run_id", "seed", "eval_seed", *EXECUTION_PARAMS}
    best: tuple[str, list[str]] | None = None
    for profile in list_profiles():
        changed = []
        for stage, record in records.items():
            own = profile_params(stage, profile)
            changed += [name for name, value in record["params"].items()
                        if name in own and name not in ignored and own[name] != value]
        if best is None or len(changed) < len(best[1]):
            best = profile, list(dict.fromkeys(changed))
    return best


def shorten_commit(commit: str) -> str:
    """Its first eight characters, and the + of a tree with changes."""
    return commit[:8] + "+" * commit.endswith("+")


def describe_hardware(records: dict[str, dict]) -> str:
    """One sentence on what the stages computed with."""
    used = dict.fromkeys(record["hardware"] for record in records.values()
                         if record.get("hardware"))
    return ("A commit with a + had changes that were not committed. Computed on "
            f"{'; '.join(used) or 'hardware that no stage recorded'}.")
