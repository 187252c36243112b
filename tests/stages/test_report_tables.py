"""The report's tables: differences by suite out of domain, pass@k, and how a run was made."""

import json

import pytest

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.pipeline.params import profile_params
from mig_kit.plots import SUITE_NAMES
from mig_kit.prompts import format_answer
from mig_kit.stages import report, report_tables
from mig_kit.world.suites import make_suite

BOX_FORMAT = BoxFormat()


def right(sample):
    if not sample.targets:
        return "<think></think><answer>none</answer>"
    image, box = sample.targets[0]
    return f"<think></think><answer>{format_answer(image, box_of(sample, image, box))}</answer>"


def box_of(sample, image, box):
    return to_model_box(box, sample.sizes[image - 1], BOX_FORMAT)


def test_out_of_domain_by_hand():
    """LISA-like: the base is correct on all of four, SFT on none, GRPO on the first alone."""
    samples = [sample for sample in make_suite("ood_grounding", "test", 4)
               if sample.task in ("lisa", "unseen")]
    lisa = [sample.id for sample in samples if sample.task == "lisa"]
    correct = {"base": lisa, "sft": [], "grpo": lisa[:1]}
    replies = {system: {sample.id: right(sample) if sample.id in ids else "?"
                        for sample in samples} for system, ids in correct.items()}
    first, second = report_tables.out_of_domain_rows(samples, replies, BOX_FORMAT)
    assert first["suite"] == "LISA-like (drawn)"
    assert (first["base"], first["SFT"], first["GRPO"]) == ("100.0", "0.0", "25.0")
    assert first["SFT over base"] == "-100.0 (-100 to +20)", "four questions show no certain loss"
    assert first["GRPO over SFT"] == "+25.0 (+0 to +75)"
    assert first["GRPO over base"].startswith("▼ -75.0 (-100 to ")
    assert second["suite"] == "unseen things (drawn)"
    assert second["GRPO over base"] == "+0.0 (-60 to +60)", "none of four differs, so few may"


@pytest.mark.parametrize("interval, text", [
    ([0.1, 4], "▲ +2.0 (+0 to +4)"), ([-4, -0.1], "▼ +2.0 (-4 to -0)"),
    ([0.0, 4], "+2.0 (+0 to +4)"), ([-4, 4], "+2.0 (-4 to +4)")])
def test_a_change_is_marked_only_where_the_interval_leaves_out_0(interval, text):
    assert report_tables.gap_text({"value": 2.0, "ci95": interval}) == text


def test_replies_are_read_by_system_and_sample(tmp_path):
    samples = make_suite("mmiu", "test", 1)
    for system in ("base", "sft", "grpo"):
        lines = [json.dumps({"id": sample.id, "replies": [f"{system} {sample.task}"]}) + "\n"
                 for sample in samples]
        (tmp_path / f"{system}_mmiu_greedy.jsonl").write_text("".join(lines))
    replies = report_tables.load_greedy_replies(tmp_path, "mmiu", samples,
                                                   ("base", "sft", "grpo"))
    assert replies["sft"][samples[0].id] == f"sft {samples[0].task}"
    assert replies.keys() == {"base", "sft", "grpo"}


def evaluated_systems(**more):
    suite = {"score": 50.0, "ci95": [40.0, 60.0], "sampled": 45.0, "n_sampled": 8,
             "n": 20, "tasks": {"lisa": {"acc@0.5": 50.0, "ci95": [40.0, 60.0], "n": 20}}, **more}
    return {system: dict.fromkeys(report.SUITE_NAMES, suite) for system in ("base", "sft", "grpo")}


def test_pass_at_k_where_06_has_it():
    rows = report_tables.pass_at_k_rows(evaluated_systems(pass_at_k={"1": 45.0, "8": 80.0}))
    assert len(rows) == 2 * len(SUITE_NAMES) and rows[0] == {
        "suite": "MIG-Bench-like (drawn)", "system": "SFT", "samples": 8, "pass@1": 45.0,
        "pass@8": 80.0}
    assert rows[1]["system"] == "GRPO"
    assert report_tables.pass_at_k_rows(evaluated_systems()) == []


RECORDS = {
    "02_sft": {"params": {"seed": 3}, "run_id": "default", "seconds": 90, "git": "0123456789+",
               "machine": "two cores", "hardware": "CPU <b>"},
    "06_evaluate": {"params": {"seed": 3, "eval_seed": 14}, "run_id": "sharp", "seconds": 30,
                    "git": "", "machine": "two cores"}}


def test_how_a_run_was_made():
    first, second, total = report_tables.stage_rows(RECORDS)
    assert first == {"stage": "02_sft", "run": "default", "minutes": "1.5", "seed": "3",
                     "commit": "01234567+", "machine": "two cores"}
    assert second["seed"] == "3, eval_seed 14" and second["commit"] == ""
    assert total == {"stage": "together", "minutes": "2.0"}
    assert "Computed on CPU <b>." in report_tables.describe_hardware(RECORDS)
    assert "no stage recorded" in report_tables.describe_hardware({})


def test_the_head_of_the_page_says_what_run_it_is():
    params = {**profile_params("02_sft"), "seed": 3, "num_train_epochs": 99}
    records = {"02_sft": RECORDS["02_sft"] | {"params": params}, "06_evaluate": RECORDS[
        "06_evaluate"] | {"params": profile_params("06_evaluate") | {"seed": 3}}}
    samples = {"own": make_suite("mmiu", "test", 1), "mmiu": make_suite("mmiu", "test", 2)}
    assert report_tables.find_profile(records) == ("tiny", ["num_train_epochs"])
    text = report_tables.describe_run(records, samples)
    assert text == ("profile tiny but for num_train_epochs; seed 3; 3 held-out questions of own "
                    "data and 6 drawn questions, to be compared with each other alone; 2.0 "
                    "minutes; commit 01234567+; machine two cores")


def test_rows_of_suites_and_differences():
    samples = {"mmiu": make_suite("mmiu", "test", 2)}
    assert report_tables.suite_rows(samples) == [
        {"suite": "MMIU-like (drawn)", "questions": 6, "tasks": 3,
         "an example": samples["mmiu"][-1].question}]
    gap = {"value": 2.0, "ci95": [0.5, 4.0]}
    assert report_tables.difference_rows({"grpo-sft": {"mmiu": gap}}) == [
        {"compared": "GRPO over SFT", "MMIU-like (drawn)": "▲ +2.0 (+0 to +4)"}]
    replies = {"base": {"mmiu": {"greedy": list("abcdef")}}}
    by_id = report_tables.greedy_by_id(replies, samples, "mmiu")
    assert by_id["base"][samples["mmiu"][1].id] == "b"
    assert report_tables.greedy_by_id(replies, samples, "blink") == {}


def test_the_page_says_what_to_look_at():
    gap = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": 11.0}
    deltas = {delta: dict.fromkeys(report.SUITE_NAMES, gap) for delta in ("grpo-sft", "grpo-base")}
    figures = dict.fromkeys(("suites", "ood", "tasks", "outcomes", "loss", "grpo", "flow",
                             "dropped", "difficulty", "shares", "rollouts"))
    tables = {"benchmark": [], "ood": [{"suite": "LISA-like (drawn)", "base": "<i>"}],
              "rewards": [], "stages": report_tables.stage_rows(RECORDS)}
    metrics = {"systems": evaluated_systems(), "deltas": deltas}
    sections = report.report_sections(metrics, figures, report.Markup("cards"), tables,
                                      report_tables.describe_hardware(RECORDS))
    text = report.render_page("t", sections)
    assert text.count("<figcaption>") == 4, "claims, ood_rows, sampled and hardware"
    assert "CPU &lt;b&gt;" in text and "<i>" not in text and "pass@k" not in text
    figures["loss"] = report.draw_curves([{"step": 1, "loss": 2.0}], ["loss"], "Fine-tuning", 3)
    sections = report.report_sections(metrics, figures, report.Markup("cards"), tables, "")
    text = report.render_page("t", sections, "seed 3, <b>")
    assert "<p class=facts>seed 3, &lt;b&gt;</p>" in text
    assert 'alt="Fine-tuning: loss, nats per token from 2 to 2."' in text
    assert f"<figcaption>{report_tables.CAPTIONS['loss']}</figcaption>" in text
    assert str(report.captioned(report.Markup(""), "loss")) == ""


def test_the_held_out_part_of_own_data():
    suite = {"score": 40.0, "ci95": [30.0, 50.0], "sampled": None, "n": 60, "image": 90.0,
             "format": 100.0}
    systems = {"base": {"own": suite, "mmiu": suite}, "grpo": {"own": suite | {"score": 62.5}}}
    rows = report_tables.held_out_rows(systems)
    assert [(row["system"], row["questions"], row["correct"]) for row in rows] == [
        ("base", 60, 40.0), ("GRPO", 60, 62.5)]
    gap = {"value": 22.5, "ci95": [9.0, 35.0]}
    assert report_tables.gain_rows({"grpo-base": {"own": gap, "mmiu": gap}}) == [
        {"compared": "GRPO over base", "points (95 %)": "▲ +22.5 (+9 to +35)"}]
    assert report_tables.held_out_rows(evaluated_systems()) == []
    assert report.claim_rows({"deltas": {"grpo-base": {"own": gap}}}) == [], "no drawn suite"


def test_replies_of_a_run_without_a_cold_start(tmp_path):
    samples = make_suite("mmiu", "test", 1)
    for system in ("base", "grpo"):
        lines = [json.dumps({"id": sample.id, "replies": [right(sample)]}) for sample in samples]
        (tmp_path / f"{system}_mmiu_greedy.jsonl").write_text("\n".join(lines))
    replies = report_tables.load_greedy_replies(tmp_path, "mmiu", samples, ("base", "grpo"))
    assert list(replies) == ["base", "grpo"]
    rows = report_tables.out_of_domain_rows(
        make_suite("ood_grounding", "test", 1)[:1],
        {system: {sample.id: "?" for sample in make_suite("ood_grounding", "test", 1)}
         for system in replies}, BOX_FORMAT)
    assert "SFT" not in rows[0] and "GRPO over base" in rows[0] and "SFT over base" not in rows[0]


def test_bars_of_a_suite_out_of_domain():
    rows = report.task_bars(evaluated_systems(), "ood_grounding")
    assert rows[0] == {"task": "LISA-like (drawn)", "system": "base", "acc@0.5": 50.0,
                       "ci95": [40.0, 60.0], "n": 20}
