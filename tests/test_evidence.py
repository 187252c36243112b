"""Records of runs, and the tables that pages print of them."""

import json
import re
import shlex
import sys

import numpy as np
import pytest
from scipy.stats import t as student_t

from mig_kit import __version__
from mig_kit.commands.main import stage_name
from mig_kit.common import PROJECT_ROOT
from mig_kit.evaluation.evaluated_runs import MARGINS, read_recorded
from mig_kit.pipeline.plan import parse_overrides
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.world.suites import SUITES

sys.path.insert(0, str(PROJECT_ROOT / ".ci"))
import evidence
import evidence_pages

ITEMS = evidence.list_items()
RECORDED = [item for item in ITEMS if item.path.is_file()]


def name_item(item):
    return f"{item.arm}-{item.seed}"


@pytest.mark.parametrize("item", [item for item in ITEMS if not item.seed], ids=name_item)
def test_a_command_of_the_list_has_parameters_of_today(item):
    for command in item.commands:
        words = shlex.split(command)
        if words[1] == "run":
            stages = [stage_name(word) for word in words[2:words.index("--run-id")]
                      if word.isdigit()]
            pairs = [words[place + 1:place + 3] for place, word in enumerate(words) if word == "-p"]
            assert parse_overrides(pairs, stages or list(RECIPE))


def test_records_are_of_the_list_and_of_this_version():
    assert {path.stem for path in evidence.FOLDER.glob("*.json")} <= set(map(name_item, ITEMS))
    assert RECORDED
    for item in RECORDED:
        record = json.loads(item.path.read_text())
        assert record["version"] == __version__ and len(record["evidence"]["smoke"]) == 64
        assert (record["evidence"]["arm"], record["seed"]) == (item.arm, item.seed)
        assert record["evidence"]["commands"] == item.commands
        assert read_recorded(str(item.path)).correct == record["correct"]
        for by_suite in record["correct"].values():
            assert {suite: len(bits) for suite, bits in by_suite.items()} == {
                suite: len(SUITES[suite].tasks) * size
                for suite, size in record["params"]["suites"].items()}


@pytest.mark.parametrize("item", RECORDED, ids=name_item)
def test_a_record_s_bits_give_the_scores_that_06_wrote(item):
    record = json.loads(item.path.read_text())
    for system, by_suite in record["correct"].items():
        for suite, bits in by_suite.items():  # every task has as many questions
            assert 100 * bits.count("1") / len(bits) == pytest.approx(
                record["scores"][system][suite], abs=1e-6)
    far = record.get("out_of_domain", {"correct": {}})
    for system, bits in far["correct"].items():
        assert len(bits) == 3200 and far["suites"] == evidence.FAR["suites"]
        assert 100 * bits.count("1") / 3200 == pytest.approx(far["scores"][system], abs=1e-6)


def test_pages_hold_what_the_records_say():
    """Also that no record was deleted or edited: results.md holds the SHA-256 of all of them."""
    records = evidence_pages.load_records()
    for page in evidence_pages.PAGES:
        text = page.read_text()
        assert evidence_pages.fill(text, records) == text, "make evidence-pages"
    margins = json.loads((PROJECT_ROOT / MARGINS).read_text())
    assert margins == evidence_pages.find_margins(records)


def test_an_interval_of_the_headline_by_hand():
    """Student's t over seeds, and the questions' variance within tasks by the normal law."""
    records = [json.loads(item.path.read_text()) for item in RECORDED if item.arm == "recipe"]
    grpo, sft = (np.array([[*map(int, record["correct"][system]["mig_bench"])]
                           for record in records]).reshape(len(records), 10, 100)
                 for system in ("grpo", "sft"))
    gaps = 100 * (grpo - sft).mean((1, 2))
    of_seeds = student_t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    of_questions = 1.96 * (100 * (grpo - sft).mean(0)).var(axis=1, ddof=1).mean() ** 0.5 / 1000**0.5
    row = next(line for line in (PROJECT_ROOT / "README.md").read_text().splitlines()
               if line.startswith("| GRPO over SFT |"))
    mean, low, high, worst = map(float, re.findall(r"[+-]\d+\.\d", row.split("|")[2]))
    assert mean == pytest.approx(gaps.mean(), abs=0.051)
    assert worst == pytest.approx(gaps.min(), abs=0.051)
    assert (high - low) / 2 == pytest.approx(np.hypot(of_seeds, of_questions), rel=0.05)
    assert ("**" in row.split("|")[2]) == (low > 0)


def make_records(gains, questions=800):
    """Records of seeds whose GRPO models answer so many more of `questions` a task correctly."""
    def bits(right, tasks):
        return "".join("1" * right + "0" * (questions - right) for _ in range(tasks))

    return [{"seed": seed, "correct": {
        system: {suite: bits(100 + gain * (system == "grpo"), len(SUITES[suite].tasks))
                 for suite in SUITES} for system in ("sft", "grpo")},
        "out_of_domain": {"correct": {"grpo": bits(100 + gain, 4)}}}
        for seed, gain in enumerate(gains)]


@pytest.mark.parametrize(("gains", "stars"), [((40, 41, 42, 43), 4), ((0, 9, -9, 1), 0)])
def test_arms_are_marked_where_holm_leaves_them(gains, stars, monkeypatch):
    monkeypatch.setattr(evidence_pages, "read_list", lambda: {
        "kl": {"title": "KL", "expected": "nothing", "commands": ["mig-kit run"]},
        "beta": {"title": "another KL", "expected": "nothing", "commands": ["mig-kit run"]}})
    table = evidence_pages.arms({"recipe": make_records((0, 0, 0, 0)), "kl": make_records(gains)})
    assert table.count(" *") - table.count(" **") == stars and "| KL | nothing | 4 |" in table
    assert table.endswith("Predicted and not run with this version: another KL.")


def test_two_equal_arms_differ_in_nothing():
    same = make_records((3, 5, 9))
    gaps = evidence_pages.gaps_between([*zip(same, same)], "grpo", "grpo", "ood_grounding")
    assert gaps.shape == (3, 4, 800) and not gaps.any()


def test_a_record_of_another_version_is_refused(tmp_path, monkeypatch):
    record = json.loads(RECORDED[0].path.read_text()) | {"version": "0.4.0"}
    (tmp_path / RECORDED[0].path.name).write_text(json.dumps(record))
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="is of version 0.4.0, not"):
        evidence_pages.load_records()


@pytest.mark.parametrize(("changed", "is_refused"), [
    ({}, False), ({"machine": "another CPU"}, False), ({"version": "0.4.0"}, True)])
def test_a_record_of_other_code_on_this_machine_is_refused(changed, is_refused, tmp_path,
                                                           monkeypatch):
    record = json.loads(RECORDED[0].path.read_text())
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "PROJECT_ROOT", tmp_path)
    RECORDED[0].path.write_text(json.dumps(record | changed))
    check = (evidence.require_same_code, RECORDED[:1], record["evidence"]["smoke"],
             record["machine"])
    if is_refused:
        with pytest.raises(SystemExit, match="delete it, and make evidence"):
            check[0](*check[1:])
    else:
        check[0](*check[1:])
    if not changed:
        with pytest.raises(SystemExit, match="was made by other code"):
            check[0](check[1], "f" * 64, check[3])


def test_what_is_missing_is_made_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(evidence, "list_items", lambda: ITEMS[:2])
    monkeypatch.setattr(evidence, "digest_smoke_run", lambda: "0" * 64)
    monkeypatch.setattr(evidence, "make_record", lambda item, smoke: item.path.write_text(
        json.dumps({"version": __version__, "machine": "", "evidence": {"smoke": smoke}})))
    for made in (2, 0):
        evidence.run()
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == made + 1 and lines[-1] == "nothing is missing"


@pytest.mark.parametrize(("name", "source"), [("all_prompts-1", "seed1"), ("draws-3", "default")])
def test_a_fresh_clone_makes_the_run_that_an_arm_starts_from(name, source, tmp_path, monkeypatch):
    """The recipe's record is there, and its run is not; a finished one is left as it is."""
    ran, item = [], next(item for item in ITEMS if name_item(item) == name)
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.setattr(evidence, "run_command", ran.append)
    monkeypatch.setattr(evidence, "record_run", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        evidence.make_record(item, "")
    assert f" --run-id {source} " in ran.pop(0) and ran == item.commands
    (tmp_path / source / "06_evaluate").mkdir(parents=True)
    (tmp_path / source / "06_evaluate" / "run.json").write_text('{"params": {}}')
    assert evidence.list_source_commands(item) == []
