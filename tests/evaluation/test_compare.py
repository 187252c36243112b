"""Groups of runs: hand-made replies, right or wrong by plan, and an independent computation.

At its end the last line of `make run`: do RL's margins lie within those of several seeds?
"""

import io
import itertools
import json
import random
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from command_line import run_mig_kit
from scipy.stats import binom
from scipy.stats import t as student_t

from mig_kit.common import PROJECT_ROOT, UserError, write_json
from mig_kit.drawing import plots
from mig_kit.evaluation import compare, evaluated_runs, items
from mig_kit.evaluation.evaluated_runs import EvaluatedRun
from mig_kit.pipeline import execute
from mig_kit.stats import mean_interval
from mig_kit.world import suites

PER_TASK = 4
SUITES = [name for name, suite in suites.SUITES.items() if suite.default]
PARAMS = {"eval_seed": 3, "min_pixels": 3136, "max_pixels": 401408, "coordinates": "absolute",
          "suites": dict.fromkeys(SUITES, PER_TASK)}

@pytest.fixture(autouse=True)
def runs(monkeypatch, tmp_path):
    """Records hold no keys here; pipeline/test_plan.py looks at stale runs."""
    monkeypatch.setattr(evaluated_runs.Run, "notes", lambda *_: [])
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def make_run(name, data_seed, seed, correct):
    return EvaluatedRun(name, data_seed, seed, correct, 0, 0, "", "", "", {})


def by_key(result):
    """(group, suite, figure) -> row"""
    return {(row["group"], row["suite"], row["figure"]): row for row in result["rows"]}


def change_json(path, **changes):
    write_json(path, json.loads(path.read_text()) | changes)


def write_run(root, run_id, seed=0, skill=None, data_seed=None, **changed):
    """A run whose systems are right with probability `skill`; gives (system, suite) -> values."""
    rng, correct, rows = random.Random(f"{run_id}"), {}, []
    skill = skill or {"base": 0.2, "sft": 0.5, "grpo": 0.7}
    synthesized, trained, evaluated = (root / run_id / stage for stage in
                                       ("01_synthesize", "05_grpo", "06_evaluate"))
    for folder in (synthesized, trained, evaluated):
        folder.mkdir(parents=True)
    for suite, system in itertools.product(SUITES, skill):
        tasks = [task for task in suites.SUITES[suite].tasks for _ in range(PER_TASK)]
        correct[system, suite] = [(task, int(rng.random() < skill[system])) for task in tasks]
        rows += [{"model": system, "suite": suite, "task": task, "part": task, "list": place,
                  "id": f"{suite}/{place}", "kind": "greedy", "draw": 0, "reply": "",
                  "correct": float(value), "true": None, "judged": None}
                 for place, (task, value) in enumerate(correct[system, suite])]
    items.write_items(pd.DataFrame(rows), evaluated)
    write_json(evaluated / "run.json",
               {"params": PARAMS | changed, "git": "abc", "machine": "two cores",
                "versions": {"mig-kit": "0.6.0"},
                "questions": dict.fromkeys(SUITES, "digest")})
    write_json(evaluated / "metrics.json", {"systems": {system: {
        suite: {"score": plain_score(correct[system, suite])} for suite in SUITES}
        for system in skill}})
    write_json(synthesized / "run.json",
               {"params": {"seed": seed if data_seed is None else data_seed}})
    write_json(trained / "run.json",
               {"params": {"seed": seed}, "seconds": 300, "processor_seconds": None})
    write_json(trained / "metrics.json", {"curves": [{"length": 50 + step} for step in range(20)]})
    return correct


@pytest.fixture(scope="module")
def written_runs(tmp_path_factory):
    """(folder, run -> its values): three groups of three seeds."""
    root = tmp_path_factory.mktemp("runs")
    skills = {"recipe": 0.6, "dr_grpo": 0.7, "r_100%": 0.4}
    return root, {f"{name}-{seed}": write_run(root, f"{name}-{seed}", seed,
                                              {"base": 0.2, "sft": 0.5, "grpo": skill})
                  for name, skill in skills.items() for seed in range(3)}


@pytest.fixture
def nine_runs(written_runs, runs, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(written_runs[0]))
    return written_runs[1]


GROUPS = {name: [f"{name}-{seed}" for seed in range(3)] for name in ("recipe", "dr_grpo", "r_100%")}


def plain_score(values):
    """Percent, the mean over tasks of the mean over samples, by plain loops."""
    tasks = {}
    for task, value in values:
        tasks.setdefault(task, []).append(value)
    return 100 * statistics.fmean(statistics.fmean(members) for members in tasks.values())


def plain_half_width(runs):
    """Half the interval of a mean over runs, percent; rows of (task, value) per run."""
    scores = [plain_score(run) for run in runs]
    return student_t.ppf(0.975, len(runs) - 1) * statistics.stdev(scores) / len(runs) ** 0.5


def test_three_variants_of_three_seeds_as_plain_loops_compute_them(nine_runs):
    values, result = nine_runs, compare.compare_groups(GROUPS)
    rows = by_key(result)
    for group, suite in itertools.product(GROUPS, SUITES):
        runs = [values[run]["grpo", suite] for run in GROUPS[group]]
        row = rows[group, suite, "grpo"]
        assert row["value"] == pytest.approx(statistics.fmean(map(plain_score, runs)), abs=1e-9)
        high = min(100, row["value"] + plain_half_width(runs))
        assert row["high"] == pytest.approx(high, abs=1e-9)
        assert (row["runs"], row["over"]) == (3, "seeds")
    for group, suite in itertools.product(list(GROUPS)[1:], SUITES):
        gaps = [[(task, a - b) for (task, a), (_, b) in zip(values[run]["grpo", suite],
                                                            values[other]["grpo", suite])]
                for run, other in zip(GROUPS[group], GROUPS["recipe"])]
        row = rows[group, suite, "vs recipe"]
        assert row["value"] == pytest.approx(statistics.fmean(map(plain_score, gaps)), abs=1e-9)
        assert row["value"] - row["low"] == pytest.approx(plain_half_width(gaps), abs=1e-9)
    task = rows["recipe", "ood_grounding/lisa", "sft-base"]
    lisa = [100 * statistics.fmean(a - b for (name, a), (_, b) in zip(
        values[run]["sft", "ood_grounding"], values[run]["base", "ood_grounding"])
        if name == "lisa") for run in GROUPS["recipe"]]
    assert task["value"] == pytest.approx(statistics.fmean(lisa))
    assert result["notes"] == []
    assert {fact["tokens"] for fact in result["runs"]} == {64.5}
    assert {fact["minutes"] for fact in result["runs"]} == {5.0}


OF_BOTH = 4 / 3 + 2 / 2  # variances 4 and 2 of three and two runs
OF_ONE_MORE = 4 + 4 / 3  # one run beside three with variance 4


@pytest.mark.parametrize(("runs", "others", "value", "variance", "degrees"), [
    ([1.0, 3, 5], [0.0, 2], 2, OF_BOTH, OF_BOTH ** 2 / ((4 / 3) ** 2 / 2 + (2 / 2) ** 2 / 1)),
    ([1.0, 3, 5], [4.0], -1, OF_ONE_MORE, 2), ([4.0], [1.0, 3, 5], 1, OF_ONE_MORE, 2)])
def test_differences_of_other_seeds_by_hand(runs, others, value, variance, degrees):
    half = student_t.ppf(0.975, degrees) * variance ** 0.5
    assert mean_interval(runs, others) == pytest.approx([value - half, value + half])
    assert mean_interval(runs[:1], others[:1]) is None


def test_the_recipe_is_no_other_than_itself():
    """Each recorded seed beside the others: of 95 % intervals about one in twenty leaves out 0."""
    files = sorted(map(str, (PROJECT_ROOT / "notebooks/guide/evidence").glob("recipe-*.json")))
    if len(files) < 3:
        pytest.skip(f"{len(files)} seeds of the recipe are recorded")
    rows = [row for mine in files for row in compare.compare_groups(
        {"recipe": [name for name in files if name != mine], "mine": [mine]})["rows"]
        if row["figure"] == "vs recipe" and "/" not in row["suite"]]
    assert all(row["over"] == "seeds" for row in rows)
    left_out = sum(not row["low"] <= 0 <= row["high"] for row in rows)
    assert left_out <= binom.ppf(0.99, len(rows), 0.05)


def test_a_base_has_no_seeds_and_one_group_no_differences(nine_runs):
    base = compare.compare_groups({"recipe": ["recipe-0"], "dr": ["dr_grpo-0"]}, system="base")
    assert base["notes"] == [], "a base is not trained, so that no seed moves it"
    one = compare.compare_groups({"recipe": ["recipe-0"]})
    assert all(row["over"] == "questions" for row in one["rows"])
    assert "Difference" not in compare.render_table(one)


def test_the_models_before_rl_are_compared_too(nine_runs, monkeypatch):
    groups = {name: GROUPS[name] for name in ("recipe", "dr_grpo")}
    result = compare.compare_groups(groups, system="sft")
    row = by_key(result)["dr_grpo", "mig_bench", "vs recipe"]
    scores = [statistics.fmean(plain_score(nine_runs[run]["sft", "mig_bench"]) for run in runs)
              for runs in groups.values()]
    assert row["value"] == pytest.approx(scores[1] - scores[0], abs=1e-9)
    text = compare.render_table(result)
    assert text.startswith("SFT model, percent (95 %)") and "paper" not in text
    assert len(compare.figure_rows(result)) == 2 * 8
    figure = plots.plot_groups(compare.figure_rows(result), "sft")
    assert "SFT models" in figure.get_suptitle()
    plots.plt.close(figure)
    read_items = items.read_items

    def read_without_sft(folder):
        table = read_items(folder)
        return table[(table["model"] != "sft") | ("dr_grpo-1" not in folder.parts)]

    monkeypatch.setattr(evaluated_runs, "read_items", read_without_sft)
    with pytest.raises(UserError, match="no SFT model; leave them out, .*: dr_grpo-1"):
        compare.compare_groups(groups, system="sft")


def test_an_interval_of_one_run_is_never_certain(tmp_path):
    write_run(tmp_path, "a", skill={"base": 0.0, "sft": 0.5, "grpo": 1.0})
    result = compare.compare_groups({"a": ["a"]})
    all_wrong, all_right = (by_key(result)["a", "mig_bench", name] for name in ("base", "grpo"))
    n = PER_TASK * 10
    bounds = [0, 100 * (1 - 0.025 ** (1 / n))]  # Clopper and Pearson for 0 of n
    assert [all_wrong["low"], all_wrong["high"]] == pytest.approx(bounds, abs=1e-9)
    assert [all_right["low"], all_right["high"]] == pytest.approx([100 - bounds[1], 100], abs=1e-9)


@pytest.mark.parametrize(("runs", "others", "tasks", "lists", "cell"), [
    pytest.param({0: "0000", 1: "1111"}, {2: "0000", 3: "1111"}, "tttt", range(4),
                 "+0.0 (-100.0 to +100.0)", id="equal means of other runs"),
    pytest.param({0: "1100"}, {0: "0011"}, "ttuu", range(4),
                 "+0.0 (-86.5 to +86.5, questions only)", id="one task gained, one lost"),
    pytest.param({0: "101"}, {1: "001"}, "ttt", [0] * 3,
                 "+33.3 (-100.0 to +100.0, questions only)", id="one list of images")])
def test_differences_that_say_little(runs, others, tasks, lists, cell):
    questions = pd.MultiIndex.from_arrays([["s"] * len(lists), [*tasks], [*tasks], lists],
                                          names=items.QUESTION[:4])
    runs, others = ([make_run("a", seed, seed, {"grpo": {"s": bits}})
                     for seed, bits in side.items()] for side in (runs, others))
    sides = compare._sides("grpo", runs, others, questions)
    row = compare._question_row("vs b", np.array([True] * len(lists)), *sides)
    assert compare._cell(row) == cell


def test_runs_are_paired_by_the_seed_of_01_and_a_shared_one_is_named(tmp_path):
    values = {name: write_run(tmp_path, name, seed, data_seed=data_seed) for name, seed, data_seed
              in (("a0", 5, 0), ("a1", 6, 1), ("b0", 6, 0), ("b1", 5, 1), ("c0", 5, 0),
                  ("c1", 6, 0))}
    groups = compare.parse_groups(["c=c0, c1", "b=b0,b1", "a=a0,a1"])
    result = compare.compare_groups(groups, "a")
    gaps = [plain_score(values[run]["grpo", "blink"]) - plain_score(values[other]["grpo", "blink"])
            for run, other in (("b0", "a0"), ("b1", "a1"))]
    assert by_key(result)["b", "blink", "vs a"]["by_run"] == pytest.approx(gaps)
    sharing, alone = result["notes"]
    assert sharing.startswith("Runs with the same seed of 01") and sharing.endswith("dent: c.")
    assert alone.startswith("Not compared with a seed by seed") and alone.endswith(" groups: c.")


def test_rl_from_the_base_is_not_compared_with_an_sft_model(tmp_path):
    write_run(tmp_path, "a")
    write_run(tmp_path, "b")
    change_json(tmp_path / "b" / "05_grpo" / "run.json", params={"seed": 0, "start_from": "base"})
    kept = str(evaluated_runs.record_run("b", tmp_path / "kept"))
    for run in ("b", kept):
        result = compare.compare_groups({"a": ["a"], "b": [run]})
        figures = {group: {row["figure"] for row in result["rows"] if row["group"] == group}
                   for group in "ab"}
        assert figures["a"] - figures["b"] == {"grpo-sft"}
        claims = compare.table_frames(result)["The paper's claims, points (95 %)"]
        assert claims["b"].tolist()[:2] == ["-", "-"] and "-" not in claims["b"].tolist()[2:]


# seeds of 01 and 05 of each run
@pytest.mark.parametrize(("first", "second", "pairs"), [
    ("2.0 0.0 1.0", "0.0 1.0 2.0", "2.0-2.0 0.0-0.0 1.0-1.0"),
    ("0.0 1.0 2.0 3.0", "1.0 3.0 7.0", "1.0-1.0 3.0-3.0"),
    ("0.0", "0.0", "0.0-0.0"),
    ("0.0 0.1 0.2", "0.0", ""),  # one pair says nothing about seeds
    ("0.0 0.0 1.1", "0.0 1.1", ""),  # two runs of seed 0 have no one partner
    ("0.1 0.2", "0.2 0.1 0.3", "0.1-0.1 0.2-0.2"),  # draws from one cold start: by both seeds
    ("0.0", "0.1", "0.0-0.1"),  # both from the same cold start
    ("0.0", "1.1", ""),
    ("0.0 1.0 2.0", "2.2 0.0 1.1", "0.0-0.0 1.0-1.1 2.0-2.2")])  # by 01's seed, not by 05's
def test_which_runs_are_paired(first, second, pairs):
    first, second = ([make_run(seeds, *map(int, seeds.split(".")), {}) for seeds in names.split()]
                     for names in (first, second))
    assert " ".join(f"{a.run_id}-{b.run_id}"
                    for a, b in evaluated_runs.pair_runs(first, second)) == pairs


def test_csv_reads_back_and_markdown_rounds(nine_runs):
    result = compare.compare_groups(GROUPS)
    table = pd.read_csv(io.StringIO(compare.render_table(result, "csv")))
    assert len(table) == len(result["rows"])
    for row, read in zip(result["rows"], table.to_dict("records")):
        assert (read["value"], read["low"], read["group"]) == (row["value"], row["low"],
                                                               row["group"])
        assert [float(value) for value in read["by_run"].split("; ")] == row["by_run"]
    text = compare.render_table(result)
    assert re.search(r"\| dr_grpo \| 3 \| [+-]\d+\.\d \([+-]\d+\.\d to [+-]\d+\.\d\)", text), text
    widths = {line.count("|") for line in text.split("\n\n")[1].splitlines()}
    assert len(widths) == 1
    row = {"figure": "vs a", "value": -0.04, "low": -0.04, "high": 0.04, "over": "seeds",
           "runs": 3, "by_run": []}
    assert compare._cell(row) == "+0.0 (+0.0 to +0.0)", "no zero has a minus"


@pytest.mark.parametrize(("call", "sentence"), [
    *((lambda groups=groups: compare.compare_groups(groups), sentence) for groups, sentence in (
        ({"a": ["a"], "b": ["b"]}, "eval_seed is a 3, b 4"),
        ({"c": ["c"]}, "mig-kit run 06 --run-id c"),
        ({"a": ["empty.json"]}, "is no file of evaluated_runs.record_run"),
        ({"a": ["cut.json"]}, "is no file of evaluated_runs.record_run"),
        ({"a": ["no.json"]}, "is no file of evaluated_runs.record_run; name a run, or another"),
        ({"d": ["d"]}, "holds no items.csv; make it again: a run's with mig-kit run 06 --force"),
        ({"a": ["a"], "e": ["e"]}, "e answered other questions of blink than the runs before it"),
        ({"a": ["a", "short.json"]}, "short.json answered another number of questions than"))),
    (lambda: compare.compare_groups({"a": ["a"]}, "x"), "no group 'x' to compare with; the groups"),
    *((lambda words=words: compare.parse_groups(words), sentence) for words, sentence in (
        (["a", "b=a"], "each once"), (["=a"], "no group"), (["a="], "no group"), ([], "name runs"),
        (["a=b", "a=c"], "of its own"), (["compared=a"], "of its own")))])
def test_what_cannot_be_compared(call, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path, "a")
    write_run(tmp_path, "b", eval_seed=4)
    for run in "de":
        write_run(tmp_path, run)
    (tmp_path / "d" / "06_evaluate" / "items.csv").unlink()
    change_json(tmp_path / "e" / "06_evaluate" / "run.json", questions={"blink": "another"})
    short = json.loads(evaluated_runs.record_run("a", tmp_path / "kept").read_text())
    write_json(tmp_path / "short.json", short | {"correct": {"grpo": {"blink": "01"}}})
    (tmp_path / "empty.json").write_text('{"run_id": "a"}')
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(UserError, match=sentence):
        call()


def test_the_command_prints_and_draws(nine_runs, tmp_path):
    words = ("table", "--group", "recipe=recipe-0,recipe-1,recipe-2", "--group",
             "dr=dr_grpo-0,dr_grpo-1,dr_grpo-2", "r_100%-0")
    result = run_mig_kit(*words, "--figure", str(tmp_path / "groups.pdf"))
    assert "Difference to recipe, points" in result.stdout and "| r_100%-0 | 1 |" in result.stdout
    assert (tmp_path / "groups.pdf").read_bytes().startswith(b"%PDF")
    csv = run_mig_kit(*words, "--format", "csv")
    assert csv.stdout.startswith("group,suite,figure,value,low,high")
    assert csv.stderr.startswith("One run each") and "more: r_100%-0." in csv.stderr
    figure = tmp_path / "gaps.svg"
    run_mig_kit(*words, "--figure", str(figure), "--differences")
    assert figure.is_file()
    refused = run_mig_kit(*words, "--figure", "groups.doc")
    assert "end its name in .png, .pdf or" in refused.stderr and not refused.stdout
    refused = run_mig_kit("table", "recipe-0", "--figure", str(tmp_path / "a.png"),
                          "--differences")
    assert "one group has no differences" in refused.stderr


def test_a_recorded_run_gives_the_runs_own_rows(tmp_path):
    """Its questions are those of the suites, with lists of their own."""
    write_run(tmp_path, "a")
    write_run(tmp_path, "older", seed=1)
    kept = str(evaluated_runs.record_run("a", tmp_path / "kept"))
    of_run, of_record = (compare.compare_groups({"a": [run], "older": ["older"]})["rows"]
                         for run in ("a", kept))
    assert of_run == of_record
    assert {row["suite"] for row in of_run} > {*SUITES}


def test_records_of_a_run_and_of_a_model_that_was_asked_alone_are_compared(runs):
    folder = PROJECT_ROOT / "notebooks" / "guide" / "evidence"
    groups = {arm: [str(folder / f"{arm}-3.json")] for arm in ("recipe", "equal_data")}
    result = compare.compare_groups(groups, system="sft")
    assert "Difference to recipe, points" in compare.render_table(result)


def test_truth_is_compared_over_seeds(runs):
    """Three seeds a group, by hand; one run has the interval of its 06; a share ends at 100."""
    for group, seed in itertools.product(("recipe", "remedy"), range(3)):
        write_run(runs, f"{group}-{seed}", seed)
        truth = {"sft": 70, "grpo": 96 + 2 * seed + seed * (group == "remedy")}
        write_json(runs / f"{group}-{seed}" / "06_evaluate" / "metrics.json", {"systems": {
            system: {"mig_bench": {"score": 0, "reasoning": {
                "truth": value, "truth_ci95": [value - 9, value + 1]}}}
            for system, value in truth.items()}})
    groups = {group: [f"{group}-{seed}" for seed in range(3)] for group in ("recipe", "remedy")}
    table = compare.render_table(compare.compare_groups(groups))
    assert [line.split(" | ")[:5] for line in table.splitlines() if "| truth |" in line] == [
        ["| recipe", "truth", "SFT", "3", "70.0 (61.0 to 71.0) |"],
        ["| recipe", "truth", "GRPO", "3", "98.0 (93.0 to 100.0) |"],
        ["| recipe", "truth", "GRPO - SFT", "3", "+28.0 (+23.0 to +33.0) |"],
        ["| remedy", "truth", "SFT", "3", "70.0 (61.0 to 71.0) |"],
        ["| remedy", "truth", "GRPO", "3", "99.0 (91.5 to 100.0) |"],
        ["| remedy", "truth", "GRPO - SFT", "3", "+29.0 (+21.5 to +36.5) |"],
        ["| remedy", "truth", "vs recipe", "3", "+1.0 (-1.5 to +3.5) |"]]
    assert "| truth | GRPO | 1 | 96.0 (87.0 to 97.0, questions only) |" in compare.render_table(
        compare.compare_groups({"one": ["recipe-0"]}))
    assert evaluated_runs.read_recorded(str(evaluated_runs.record_run("recipe-0", runs))).reasoning


MARGINS = json.loads((PROJECT_ROOT / evaluated_runs.MARGINS).read_text())


@pytest.mark.parametrize(("low", "high", "ends"), [
    (-11.0, 39.0, ""), (-9.0, -2.0, ": OUTSIDE"), (90.0, 95.0, ": OUTSIDE")])
def test_a_margin_stands_beside_the_seeds_and_lies_outside_with_its_whole_interval(
        low, high, ends, monkeypatch):
    gaps = {"mig_bench": {"value": 15.0, "ci95": [low, high]},
            "ood_grounding": {"value": 2.0, "ci95": [-1.0, 5.0]}}
    monkeypatch.setattr(evaluated_runs.Run, "record", lambda *_: {"params": {}})
    monkeypatch.setattr(evaluated_runs.store, "read_metrics",
                        lambda _: {"deltas": {"grpo-sft": gaps}})
    lowest, highest = (pick(MARGINS["mig_bench"]) for pick in (min, max))
    text, is_outside = evaluated_runs.check_margins("default")
    first, second = text.splitlines()
    assert first == (f"RL over SFT, MIG-Bench-like (drawn): +15.0 points ({low:+.1f} to {high:+.1f}"
                     f"); recorded seeds: {lowest:+.1f} to {highest:+.1f}{ends}")
    assert second.startswith("RL over SFT, out of domain (drawn): +2.0 points (-1.0 to +5.0); ")
    assert is_outside == bool(ends)
    monkeypatch.setattr(evaluated_runs, "changed_params", lambda *_: {"05_grpo": {"beta": 1}})
    assert evaluated_runs.check_margins("default") == ("", False), "another recipe"


@pytest.mark.parametrize("is_outside", [True, False])
def test_the_exit_status_says_whether_a_margin_lies_outside(is_outside, monkeypatch):
    monkeypatch.setattr(execute, "run_plan", lambda *_: None)
    monkeypatch.setattr(evaluated_runs, "check_margins", lambda _: ("the margins", is_outside))
    result = run_mig_kit("run")
    assert (result.returncode, result.stdout) == (int(is_outside), "the margins\n")
