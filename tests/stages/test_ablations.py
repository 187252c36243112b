"""The guide's ablation table: its rows and commands are those of the recorded runs."""

import functools
import json
import re
import shlex

import pytest
import yaml

from mig_kit.common import PROJECT_ROOT
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.pipeline.params import profile_params, validate_params
from mig_kit.stages import compare
from mig_kit.stages.evaluated_runs import MARGINS, read_recorded
from mig_kit.stages.tables import CLAIMS
from mig_kit.world import suites

GUIDE = PROJECT_ROOT / "notebooks" / "guide"
PAGE = (GUIDE / "ablations.md").read_text()
FOLDER = GUIDE / "ablations"
RECORDS = {path.relative_to(FOLDER).with_suffix("").as_posix(): path
           for path in FOLDER.rglob("*.json")}
# the recipe's runs, by version; arms of 0.1 are compared with those of 0.2
RECIPES = {"0.3": ["default", *(f"seed{seed}" for seed in range(1, 8))],
           "0.2": ["0.2/default", *(f"0.2/seed{seed}" for seed in range(1, 6))]}
XEON = {"0": "xeon/default", **{seed: f"xeon/seed{seed}" for seed in "345"}}  # of 0.3, another CPU
NEWEST = {seed: f"0.4/seed{seed}" for seed in "0123"}  # of 0.4, a third one
FOLDERS = {"0.3": "", "0.4": "0.4/"}  # of arms, by version; else 0.2/
# eval_seed that nobody had looked at -> groups
FRESH = {16: {"recipe": [f"0.2/eval_seed_16/fresh_recipe-{seed}" for seed in (1, 4, 5)],
              "lora_attention_83": [f"0.2/eval_seed_16/fresh_attention-{seed}"
                                    for seed in range(5)]},
         97: {arm: [f"0.4/eval_seed_97/{arm}-{seed}" for seed in (1, 2, 3)]
              for arm in ("recipe", "true_claims")}}
FRESH_RUNS = {run: seed for seed, groups in FRESH.items() for runs in groups.values()
              for run in runs}
CONTROL = "sft_long"  # its last model is the control SFT model
# no part of an arm: what it is asked, and lora_alpha, twice lora_r in all of them
NOT_OF_ARMS = {"seed", "replies", "eval_seed", "suites", "kl_samples", "lora_alpha"}
ROW = re.compile(r"^\| (\S+) \| [^`|]*`([^`]+)` \| ([\d, ]+) \| ([^|]+) \| ([^|]+) \| (0\.\d) \|$",
                 re.MULTILINE)
# (arm, version) -> words of its command, seeds, difference in domain, out of domain
ROWS = {(arm, version): (shlex.split(words), seeds.split(", "), *cells)
        for arm, words, seeds, *cells, version in ROW.findall(PAGE)}
RUNS = {(arm, version): [f"{FOLDERS.get(version, '0.2/')}{arm}-{seed}" for seed in row[1]]
        for (arm, version), row in ROWS.items()}


@pytest.fixture(scope="module", autouse=True)
def suites_drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suites, "make_suite", functools.cache(suites.make_suite))
        yield


def render_tables(groups, system="grpo"):
    files = {name: [str(RECORDS[run]) for run in runs] for name, runs in groups.items()}
    blocks = compare.render_table(compare.compare_groups(files, system=system)).split("\n\n")
    return [block.strip() for block in blocks if block.startswith("| ")]


def reference_runs(row):
    """What an arm is compared with: one run with its partner, more with all; of 0.3 by seed."""
    seeds = ROWS[row][1]
    if row[1] in FOLDERS:
        return tuple((XEON if row[1] == "0.3" else NEWEST)[seed] for seed in seeds)
    return tuple(RECIPES["0.2"]) if len(seeds) > 1 else (RECIPES["0.2"][int(seeds[0])],)


@functools.cache
def render_differences(reference):
    arms = {row[0]: runs for row, runs in RUNS.items()
            if row[0] != CONTROL and reference_runs(row) == reference}
    return render_tables({"recipe": list(reference), **arms})[1]


def expected_cells(row):
    arm = row[0]
    table = (render_tables({arm: RUNS[row]}, system=CONTROL)[1] if arm == CONTROL
             else render_differences(reference_runs(row)))
    cells = re.search(rf"^\| {re.escape(arm)} \| \d \| ([^|]+) \| ([^|]+) \|", table, re.MULTILINE)
    numbers = [re.findall(r"[+-]\d+\.\d", cell) for cell in cells.groups()]
    if arm == CONTROL:  # there the GRPO model over the control
        numbers = [[f"{-float(number):+.1f}" for number in (value, high, low)]
                   for value, low, high in numbers]
    return ["{} ({} to {})".format(*cell) for cell in numbers]


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_row_is_that_of_its_records(row):
    cells = ROWS[row][2:4]
    assert [cell.strip("*") for cell in cells] == expected_cells(row)
    for cell in cells:
        low, high = re.findall(r"[+-]\d+\.\d", cell)[1:]
        is_known = len(RUNS[row]) > 1 and low[0] == high[0] and {low, high} != {"+0.0"}
        assert cell.startswith("**") == is_known


def render_claims(runs):
    """(value, interval) of the paper's four claims, of records' names."""
    claims = re.findall(r"RL over \w+ \| (\S+) (\([^)]+\))", render_tables({"recipe": runs})[-1])
    assert len(claims) == 4
    return claims


def test_the_page_of_results_has_those_of_another_cpu():
    text = " ".join((GUIDE / "results.md").read_text().split())
    assert all(f"{value} {interval}" in text for value, interval in render_claims([*XEON.values()]))


def test_the_margins_of_the_last_line_are_those_of_the_records():
    files = [str(RECORDS[run]) for run in RECIPES["0.3"]]
    rows = {(row["suite"], row["figure"]): row["by_run"]
            for row in compare.compare_groups({"recipe": files})["rows"]}
    margins = json.loads((PROJECT_ROOT / MARGINS).read_text())
    assert margins == {suite: [round(value, 1) for value in rows[suite, "grpo-sft"]]
                       for suite in margins}


def test_the_readme_has_these_figures():
    """Scores of the run that its reader gets; gains of all seeds, bold where they leave out 0."""
    readme = " ".join((PROJECT_ROOT / "README.md").read_text().split())
    record = read_recorded("notebooks/executed/scores.json").correct
    for system, label in SYSTEM_LABELS.items():
        if system in record:
            bits = [record[system][suite] for suite, *_ in CLAIMS]
            scores = [f"{100 * one.count('1') / len(one):.1f}" for one in bits]
            assert f"| {label} | {' | '.join(scores)} |" in readme
    gains = {"SFT": [""] * 4, "base": [""] * 4}  # by what GRPO is compared with
    for column, ((value, interval), (_, words, *_)) in enumerate(
            zip(render_claims(RECIPES["0.3"]), CLAIMS)):
        value = value if "(-" in interval else f"**{value}**"
        gains[words.removeprefix("RL over ")][column] = f"{value} {interval}"
    for other, cells in gains.items():
        row = "|".join(f" {cell} " if cell else " " for cell in cells)
        assert f"| GRPO over {other}, eight seeds |{row}|" in readme


def test_the_page_of_results_has_the_truth_of_the_records():
    page = (GUIDE / "results.md").read_text().replace("**", "")
    runs = [str(RECORDS[run]) for run in NEWEST.values()]
    rows = {(row["suite"], row["figure"]): row
            for row in compare.compare_groups({"recipe": runs})["rows"]}
    for suite, *_ in CLAIMS:
        truth, grounded = ([f"{rows[suite, f'{model} {name}']['value']:.1f}"
                            for model in ("sft", "grpo")] for name in ("truth", "grounded"))
        cells = [*truth, compare._cell(rows[suite, "grpo-sft truth"]), *grounded]
        assert f"| {compare.scope_title(suite)[:-len(' (drawn)')]} | {' | '.join(cells)} |" in page


def test_every_record_is_in_the_table():
    named = sum([*RECIPES.values(), *RUNS.values()],
                [*XEON.values(), *NEWEST.values(), *FRESH_RUNS])
    assert sorted(named) == sorted(RECORDS)


@pytest.mark.parametrize("groups", FRESH.values(), ids=FRESH)
def test_gains_on_fresh_questions_are_those_of_the_page(groups):
    rows = [row for row in render_tables(groups)[-1].splitlines() if "RL over SFT" in row]
    gains = re.findall(r"[+](\d+\.\d) (\([^)]+\))", " ".join(rows))
    assert len(gains) == 4 and all(text in PAGE for gain in gains for text in gain)


def test_records_say_which_questions_they_answer():
    assert all(read_recorded(str(path)).params["eval_seed"]
               == FRESH_RUNS.get(run, 14 if run.startswith("0.2/") else 53)
               for run, path in RECORDS.items())


@pytest.mark.parametrize("row", ROWS, ids="-".join)
def test_a_command_sets_what_its_runs_record(row):
    arm, version = row
    words = ROWS[row][0]
    stages = words[:words.index("-p")]
    values = {name: yaml.safe_load(value) for flag, name, value
              in zip(words, words[1:], words[2:]) if flag == "-p"}
    if "reward_weights" in values:  # added to the recipe's
        values["reward_weights"] = (profile_params("05_grpo")["reward_weights"]
                                    | values["reward_weights"])
    seed = values.pop("seed", None)
    for run in RUNS[row] + sum((groups.get(arm, []) for groups in FRESH.values()), []):
        record = read_recorded(str(RECORDS[run]))
        changed = record.control["changed"] if arm == CONTROL else record.changed
        assert seed is None or record.seed == seed
        assert values == {name: value for stage in changed.values()
                          for name, value in stage.items() if name not in NOT_OF_ARMS}
        first = min((stage[:2] for stage, parameters in changed.items()
                     if parameters.keys() & values.keys()), default="05")
        assert stages[0] == first, "from the first that differs"
        assert (version == "0.1" or arm == "no_merge") != can_be_run(changed)
    assert values or arm.startswith("other_draws"), "an arm changes something"
    assert stages[-2:] == (["02", "03"] if arm == CONTROL else ["05", "06"])


def can_be_run(changed):
    try:
        for stage, parameters in changed.items():
            validate_params({name: value for name, value in parameters.items()
                             if name not in NOT_OF_ARMS}, stage)
    except (KeyError, ValueError):
        return False
    return True
