"""Stage 07: the tables show what was measured, and the page says what to look at."""

from mig_kit.boxes import BoxFormat
from mig_kit.drawing import plots
from mig_kit.stages import report
from mig_kit.training.reward_loading import correct_reply
from mig_kit.world.suites import SUITES, make_suite
from mig_kit.world.tasks import make_sample

BOX_FORMAT = BoxFormat()


def test_out_of_domain_by_hand():
    """LISA-like: the base is correct on all of four, SFT on none, GRPO on the first alone."""
    samples = [sample for sample in make_suite("ood_grounding", "test", 4)
               if sample.task in ("lisa", "unseen")]
    lisa = [sample.id for sample in samples if sample.task == "lisa"]
    correct = {"base": lisa, "sft": [], "grpo": lisa[:1]}
    replies = {system: {sample.id: correct_reply(sample, BOX_FORMAT) if sample.id in ids else "?"
                        for sample in samples} for system, ids in correct.items()}
    first, second = report.out_of_domain_rows(samples, replies, BOX_FORMAT)
    assert first["suite"] == "LISA-like (drawn)"
    assert (first["base"], first["SFT"], first["GRPO"]) == ("100.0", "0.0", "25.0")
    assert first["SFT over base"] == "-100.0 (-100.0 to +20.5)", "four are few"
    assert first["GRPO over SFT"] == "+25.0 (-54.6 to +100.0)"
    assert first["GRPO over base"] == "-75.0 (-100.0 to +4.6)"
    assert second["suite"] == "unseen things (drawn)"
    assert second["GRPO over base"] == "+0.0 (-60.2 to +60.2)", "none of four differs, so few may"


def evaluated_systems(**more):
    suite = {"score": 50.0, "ci95": [40.0, 60.0], "sampled": 45.0, "n_sampled": 8,
             "n": 20, "tasks": {"lisa": {"acc@0.5": 50.0, "ci95": [40.0, 60.0], "n": 20}}, **more}
    return {system: dict.fromkeys(SUITES, suite) for system in ("base", "sft", "grpo")}


def test_pass_at_k_where_06_has_it():
    rows = report.pass_at_k_rows(evaluated_systems(pass_at_k={"1": 45.0, "8": 80.0}))
    assert len(rows) == 2 * len(SUITES) and rows[0] == {
        "suite": "MIG-Bench-like (drawn)", "system": "SFT", "samples": 8, "pass@1": 45.0,
        "pass@8": 80.0}
    assert rows[1]["system"] == "GRPO"
    assert report.pass_at_k_rows(evaluated_systems()) == []


RECORDS = {
    "02_sft": {"params": {"seed": 3}, "run_id": "default", "seconds": 90, "git": "0123456789+",
               "machine": "two cores", "hardware": "CPU <b>"},
    "05_grpo": {"params": {"learning_rate": 1.0}, "run_id": "sharp", "seconds": 0, "git": "",
                "machine": "two cores"},
    "06_evaluate": {"params": {"seed": 3, "eval_seed": 14}, "run_id": "sharp", "seconds": 30,
                    "git": "", "machine": "two cores"}}


def test_how_a_run_was_made():
    first, _, second, total = report.stage_rows(RECORDS)
    assert first == {"stage": "02_sft", "run": "default", "minutes": "1.5", "seed": "seed 3",
                     "commit": "01234567+", "machine": "two cores"}
    assert second["seed"] == "seed 3, eval_seed 14" and second["commit"] == ""
    assert total == {"stage": "together", "minutes": "2.0"}


def test_the_head_of_the_page_says_what_run_it_is():
    samples = {"own": make_suite("mmiu", "test", 1), "mmiu": make_suite("mmiu", "test", 2)}
    assert report.describe_run(RECORDS, samples) == (
        "3 held-out questions of own data and 6 drawn questions, to be compared with each other "
        "alone; 2.0 minutes; CPU <b>")


def test_rows_of_suites_and_differences():
    samples = {"mmiu": make_suite("mmiu", "test", 2)}
    assert report.suite_rows(samples) == [
        {"suite": "MMIU-like (drawn)", "questions": 6, "tasks": 3,
         "an example": samples["mmiu"][-1].question}]
    gap = {"value": 2.0, "ci95": [0.5, 4.0]}
    assert report.difference_rows({"grpo-sft": {"mmiu": gap}}) == [
        {"compared": "GRPO over SFT", "MMIU-like (drawn)": "▲ +2.0 (+0.5 to +4.0)"}]


def test_the_page_says_what_to_look_at():
    gap = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": 11.0}
    deltas = {delta: dict.fromkeys(SUITES, gap) for delta in ("grpo-sft", "grpo-base")}
    figures = dict.fromkeys(("suites", "ood", "tasks", "outcomes", "loss", "grpo", "flow",
                             "dropped", "difficulty", "shares", "rollouts"))
    tables = {"ood": [{"suite": "LISA-like (drawn)", "base": "<i>"}],
              "rewards": [], "stages": report.stage_rows(RECORDS), "changed": []}
    metrics = {"systems": evaluated_systems(), "deltas": deltas}
    sections = report.report_sections(metrics, figures, report.Markup("cards"), tables)
    text = report.render_page("t", sections)
    assert text.count("<figcaption>") == 3, "claims, ood_rows and sampled"
    assert "&lt;i&gt;" in text and "<i>" not in text and "pass@k" not in text
    figures["loss"] = plots.plot_curves([{"step": 1, "loss": 2.0}], ["loss"], "Fine-tuning", 1)
    sections = report.report_sections(metrics, figures, report.Markup("cards"), tables)
    text = report.render_page("t", sections, "seed 3, <b>")
    assert "<p class=facts>seed 3, &lt;b&gt;</p>" in text
    assert 'alt="Fine-tuning"' in text
    assert "<figcaption>A loss that still falls steeply" in text


def test_the_held_out_part_of_own_data():
    suite = {"score": 40.0, "ci95": [30.0, 50.0], "sampled": None, "n": 60, "image": 90.0,
             "format": 100.0}
    systems = {"base": {"own": suite, "mmiu": suite}, "grpo": {"own": suite | {"score": 62.5}}}
    rows = report.held_out_rows(systems)
    assert [(row["system"], row["questions"], row["correct"]) for row in rows] == [
        ("base", 60, 40.0), ("GRPO", 60, 62.5)]
    gap = {"value": 22.5, "ci95": [9.0, 35.0]}
    assert report.own_data_rows({"grpo-base": {"own": gap, "mmiu": gap}}) == [
        {"compared": "GRPO over base", "own data (held out)": "▲ +22.5 (+9.0 to +35.0)"}]
    assert report.held_out_rows(evaluated_systems()) == []
    assert report.claim_rows({"deltas": {"grpo-base": {"own": gap}}}) == [], "no drawn suite"


def test_headline_rows():
    difference = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": 11.0}
    metrics = {
        "deltas": {
            "grpo-sft": {"mig_bench": difference, "ood_grounding": difference},
            "grpo-base": {"blink": difference, "mmiu": difference},
        }
    }
    rows = report.claim_rows(metrics)
    papers = [row["paper v2 (real benchmark, 7B)"] for row in rows]
    assert papers == ["+9.04", "+4.98", "+3.10", "+2.40"]
    from_base = report.claim_rows(metrics | {"start_from": "base"})
    assert [row["compared"] for row in from_base] == ["RL over base"] * 2, "no SFT model before it"
    assert rows[0]["suite"] == "MIG-Bench-like (drawn)"
    assert rows[0]["this run (95 %)"] == "▲ +9.5 (+7.0 to +12.0)"
    bare = report.html_table([{**row, "at temperature 1": None} for row in rows])
    assert "temperature" not in bare and "+9.5" in bare
    empty = report.html_table([{"system": "base", "mig_bench": None}])
    assert "drawn" not in report.render_page("t", [("drawn", empty)]), "nothing drawn, no heading"


def test_flow_adds_up():
    metrics = {
        "01_synthesize": {"traces": {"kept": 8, "dropped": {"format": 2}}},
        "04_rejection_sampling": {
            "why": {"diff": {"kept": 3, "below min_pass_rate": 1}, "region": {"kept": 2}}
        },
    }
    assert report.sample_counts(metrics) == {
        "traces": {"kept": 8, "dropped: format": 2},
        "candidates": {"kept": 5, "below min_pass_rate": 1},
    }


def test_calibration_counts_every_sample_once():
    samples = [make_sample("diff", "val", i) for i in range(40)]
    rows = report.pass_rate_by_difficulty({s.id: i / 40 for i, s in enumerate(samples)}, samples)
    assert sum(int(row["objects"].split(" = ")[1]) for row in rows) == 40
    assert all(0 <= row["pass rate"] <= 1 for row in rows)
    assert all(row["ci95"][0] <= row["pass rate"] <= row["ci95"][1] for row in rows)
    assert report.pass_rate_by_difficulty({"x": 0.5}, []) == [], "own data lists nothing"


def test_rewards_are_a_table():
    curves = [{"step": i, "box": float(i), "center": None, "choice": 1.0} for i in range(20)]
    params = {"rewards": ["box", "<b>.py:center", "choice"], "reward_weights": {"box": 2.0}}
    rows = report.reward_rows(curves, params)
    assert rows[0] == {"reward": "box", "weight": 2.0, "first 10 updates": 4.5,
                       "last 10 updates": 14.5}
    assert rows[1]["first 10 updates"] is None and rows[2]["weight"] == 1.0
    text = report.html_table(rows)
    assert "&lt;b&gt;.py:center" in text and "<td>14.50</td>" in text


def test_what_came_out_and_what_differs_from_the_source(monkeypatch):
    gap = {"value": -5.0, "ci95": [-12.04, 2.0]}
    metrics = {"systems": evaluated_systems(), "deltas": {"grpo-sft": {"mig_bench": gap}}}
    assert report.describe_outcome(metrics) == (
        "MIG-Bench-like (drawn), percent correct: base 50.0 → SFT 50.0 → GRPO 50.0; RL over SFT: "
        "-5.0 (-12.0 to +2.0) points, 95 % interval over questions.")
    monkeypatch.setattr(report, "load_record", lambda stage, run: {"params": {"learning_rate": 2}})
    assert report.changed_rows("sharp", RECORDS) == [
        {"stage": "05_grpo", "parameter": "learning_rate", "this run": "1.0", "run default": "2"}]


def test_own_data_shows_no_claim_of_the_paper_and_no_sft_where_there_is_none():
    gap = {"value": 9.5, "ci95": [7.0, 12.0], "sampled": None}
    deltas = {"grpo-base": {"own": gap, "blink": gap}}
    assert report.claim_rows({"deltas": deltas}) == []
    for name in report.macros.captions:
        assert "SFT" not in report._caption(name, False) and report._caption(name, True)
    assert "nan" not in report.html_table(report.stage_rows(RECORDS))
    assert "nan" not in report.html_table([{"stage": "a", "run": "x"}, {"stage": "together"}])
