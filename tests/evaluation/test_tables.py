"""Rows of the tables of 06 and 07 show what was measured."""

import pytest
from benchmark_files import correct_reply

from mig_kit import __version__
from mig_kit.boxes import BoxFormat
from mig_kit.drawing import plots
from mig_kit.evaluation import tables
from mig_kit.evaluation.items import make_items
from mig_kit.world.suites import SUITES, make_suite

BOX_FORMAT = BoxFormat()
GAP = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": 11.0}
RECORDS = {
    "02_sft": {"params": {"seed": 3}, "run_id": "default", "seconds": 90, "git": "0123456789+",
               "machine": "two cores", "hardware": "CPU <b>"},
    "05_grpo": {"params": {"learning_rate": 1.0}, "run_id": "sharp", "seconds": 0, "git": "",
                "machine": "two cores"},
    "06_evaluate": {"params": {"seed": 3, "eval_seed": 14}, "run_id": "sharp", "seconds": 30,
                    "git": "", "machine": "two cores"}}


def evaluated_systems(**more):
    suite = {"score": 50.0, "ci95": [40.0, 60.0], "sampled": 45.0, "n_sampled": 8,
             "n": 20, "tasks": {"lisa": {"acc@0.5": 50.0, "ci95": [40.0, 60.0], "n": 20}}, **more}
    return {system: dict.fromkeys(SUITES, suite) for system in ("base", "sft", "grpo")}


def judge(samples, correct):
    """The table of systems that answer the samples right or wrong."""
    return make_items({"s": samples}, {system: {"s": {
        "greedy": [correct_reply(sample, BOX_FORMAT) if is_right else "?"
                   for sample, is_right in zip(samples, values)],
        "drawn": [[]] * len(samples)}} for system, values in correct.items()}, BOX_FORMAT)


def test_out_of_domain_by_hand():
    """LISA-like: the base is correct on all of four, SFT on none, GRPO on the first alone."""
    samples = [sample for sample in make_suite("ood_grounding", "test", 4)
               if sample.task in ("lisa", "unseen")]
    lisa = [sample.id for sample in samples if sample.task == "lisa"]
    correct = {"base": lisa, "sft": [], "grpo": lisa[:1]}
    first, second = tables.task_rows(judge(samples, {
        system: [sample.id in ids for sample in samples] for system, ids in correct.items()}), "s")
    assert first == {
        "suite": "LISA-like (drawn)", "base": "100.0", "SFT": "0.0", "GRPO": "25.0",
        "SFT over base": "-100.0 (-100.0 to +20.5)",  # four are few
        "GRPO over SFT": "+25.0 (-59.6 to +80.6)", "GRPO over base": "-75.0 (-99.4 to +40.8)"}
    assert second["suite"] == "unseen things (drawn)"
    assert second["GRPO over base"] == "+0.0 (-60.2 to +60.2)", "none of four differs, so few may"


def test_tasks_that_rl_moved_are_named_both_ways():
    """RL learns one task, unlearns another, and leaves the others as they were."""
    samples = make_suite("mig_bench", "test", 12)

    def all_but(*wrong):
        return [sample.task not in wrong for sample in samples]

    text = tables.describe_moved_tasks(judge(samples, {
        "base": all_but(), "sft": all_but("diff"), "grpo": all_but("correspondence")}), "s")
    assert text.startswith("RL moved 2 of 10 tasks beyond their intervals: ▲ ")
    assert " 0.0 → 100.0; ▼ " in text and " 100.0 → 0.0. Of twenty" in text
    text = tables.describe_moved_tasks(judge(samples, dict.fromkeys(("base", "grpo"), all_but())),
                                       "s")
    assert text.startswith("RL moved 0 of 10 tasks beyond their intervals. Of twenty")


REASONING = {"truth": None, "truth_ci95": None, "silent": 0.0, "silent_ci95": [0.0, 9.0],
             "false": 9.0, "false_ci95": None}
OF_OWN = {"grpo-base": {"own": GAP, "blink": GAP}}
DELTAS = {"grpo-sft": {"mig_bench": GAP, "ood_grounding": GAP},
          "grpo-base": {"blink": GAP, "mmiu": GAP}}
TEXT = "▲ +9.5 (+7.0 to +12.0)"


def claim(suite, compared, paper):
    return {"suite": suite, "compared": compared, "this run (95 %)": TEXT,
            "at temperature 1": "+11.0", "paper v2 (real benchmark, 7B)": paper}


CLAIMS = [claim("MIG-Bench-like (drawn)", "RL over SFT", "+9.04"),
          claim("out of domain (drawn)", "RL over SFT", "+4.98"),
          claim("BLINK-like (drawn)", "RL over base", "+3.10"),
          claim("MMIU-like (drawn)", "RL over base", "+2.40")]


@pytest.mark.parametrize(("rows", "count", "first"), [
    (tables.difference_rows({"grpo-sft": {"mmiu": GAP}}), 1,
     [{"compared": "GRPO over SFT", "MMIU-like (drawn)": TEXT}]),
    (tables.own_data_rows(OF_OWN), 1,
     [{"compared": "GRPO over base", "own data (held out)": TEXT}]),
    (tables.claim_rows({"deltas": OF_OWN}), 0, []),  # the claims are about other questions
    (tables.claim_rows({"deltas": DELTAS}), 4, CLAIMS),
    (tables.claim_rows({"deltas": DELTAS, "start_from": "base"}), 2, CLAIMS[2:]),  # no SFT before
    (tables.reasoning_bars(evaluated_systems()), 0, []),
    (tables.reasoning_bars(evaluated_systems(reasoning=REASONING)), 9 * len(SUITES), []),
    (tables.pass_at_k_rows(evaluated_systems()), 0, []),
    (tables.pass_at_k_rows(evaluated_systems(pass_at_k={"1": 45.0, "8": 80.0})), 2 * len(SUITES),
     [{"suite": "MIG-Bench-like (drawn)", "system": name, "samples": 8, "pass@1": 45.0,
       "pass@8": 80.0} for name in ("SFT", "GRPO")])])
def test_rows_of_what_06_measured(rows, count, first):
    assert len(rows) == count and rows[:len(first)] == first


def test_reasoning_without_a_case_is_drawn_too():
    bars = tables.reasoning_bars(evaluated_systems(reasoning=REASONING))
    assert plots.plot_scores(bars, "figure", "t", "share", "%")


def test_how_a_run_was_made(monkeypatch):
    first, _, second, total = tables.stage_rows(
        RECORDS, {"02_sft": {"stale": "02_sft: sft has changed"}})
    assert first == {"stage": "02_sft (stale)", "run": "default", "minutes": "1.5",
                     "seed": "seed 3", "commit": "01234567+", "machine": "two cores"}
    assert second["seed"] == "seed 3, eval_seed 14" and second["commit"] == ""
    assert total == {"stage": "together", "minutes": "2.0"}
    samples = {"own": make_suite("mmiu", "test", 1), "mmiu": make_suite("mmiu", "test", 2)}
    assert tables.describe_run(RECORDS, samples) == (
        "3 held-out questions of own data and 6 drawn questions, to be compared with each other "
        f"alone; 2.0 minutes; CPU <b>; mig-kit {__version__}")
    monkeypatch.setattr(tables.Run, "params", lambda *_: {"learning_rate": 2})
    assert tables.changed_rows("sharp", RECORDS) == [
        {"stage": "05_grpo", "parameter": "learning_rate", "this run": "1.0", "run default": "2"}]


def test_the_outcome_is_one_sentence():
    gap = {"value": -5.0, "ci95": [-12.04, 2.0]}
    metrics = {"systems": evaluated_systems(), "deltas": {"grpo-sft": {"mig_bench": gap}}}
    assert tables.describe_outcome(metrics) == (
        "MIG-Bench-like (drawn), percent correct: base 50.0 → SFT 50.0 → GRPO 50.0; RL over SFT: "
        "-5.0 (-12.0 to +2.0) points, 95 % interval over questions.")
