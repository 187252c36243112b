"""The guide's ablation table: its tables are those of the recorded runs beside the page, and every
arm's command sets what its runs record.
"""

import re
import shlex
from contextlib import nullcontext

import pytest
import yaml

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline.params import validate_params
from mig_kit.stages import compare
from mig_kit.stages.evaluated_runs import read_recorded

GUIDE = PROJECT_ROOT / "notebooks" / "guide"
PAGE = (GUIDE / "ablations.md").read_text()
FRESH_FOLDER = "eval_seed_16"
OF_QUESTIONS = {"seed", "replies", "eval_seed", "ood_per_task", "kl_samples"}  # no part of an arm


def read_command(text):
    """(groups, system) of a `mig-kit table` command."""
    words = shlex.split(text.replace("\\\n", " "))
    system = words[words.index("--system") + 1] if "--system" in words else "grpo"
    return compare.parse_groups([word for word in words if "=" in word]), system


TABLES = [read_command(text) for text in
          re.findall(r"^mig-kit table ((?:.*\\\n)*.*)$", PAGE, re.MULTILINE)]
RUNS = {}  # arm -> the records of its runs, over all tables
CONTROLS = {}  # the same of runs that were evaluated beside a control run
FRESH = {}  # the same of runs on questions that nobody had looked at
for table_groups, table_system in TABLES:
    for group, group_runs in table_groups.items():
        is_fresh = group_runs[0].startswith(f"ablations/{FRESH_FOLDER}/")
        members = CONTROLS if table_system == "sft_long" else FRESH if is_fresh else RUNS
        members[group] = sorted({*members.get(group, []), *group_runs})
# arms that an earlier version alone can run, for their parameters have left
EARLIER = set(re.findall(r"^\| (\S+) \| `[^`]+` \|[^|]*; version 0\.1 \|$", PAGE, re.MULTILINE))
# arm -> the words of its command, of the table of commands
COMMANDS = {name: shlex.split(words) for name, words in
            re.findall(r"^\| ([^|]+) \| `([^`]+)` \|", PAGE, re.MULTILINE)}


@pytest.mark.parametrize("groups, system", TABLES)
def test_the_tables_are_those_of_the_records(groups, system):
    files = {name: [str(GUIDE / run) for run in runs] for name, runs in groups.items()}
    blocks = compare.render_table(compare.compare_groups(files, system=system)).split("\n\n")
    tables = [block.strip() for block in blocks if block.startswith("| group")]
    assert len(tables) == 2 and all(table in PAGE for table in tables), "print them again"


def test_the_summary_is_that_of_the_tables():
    """Its rows: arm, what changes, runs, difference in domain, difference out of domain."""
    tables = re.sub(r"; [01]\.\d\d\)", ")", PAGE)
    rows = re.findall(r"^\| (\S+) \| [^|`]*(?:`\w+`[^|`]*)? \| (\d) \| ([^|]+) \| ([^|]+) \|$",
                      PAGE, re.MULTILINE)
    assert {arm for arm, *_ in rows} == RUNS.keys() - {"recipe"}
    for arm, runs, *cells in rows:
        plain = [cell.strip("*") for cell in cells]
        assert f"| {arm} | {runs} | {plain[0]} | {plain[1]} |" in tables
        for cell, text in zip(cells, plain):
            low, high = re.findall(r"[+-][\d.]+", text)[1:]
            is_known = int(runs) > 1 and low[0] == high[0] and {low, high} != {"+0.0"}
            assert cell.startswith("**") == is_known, (arm, cell)


def test_every_record_is_in_the_table():
    named = [run for members in (RUNS, CONTROLS, FRESH) for runs in members.values()
             for run in runs]
    assert sorted(named) == sorted(str(path.relative_to(GUIDE))
                                   for path in (GUIDE / "ablations").rglob("*.json"))


def test_fresh_questions_are_those_of_another_seed():
    seeds = {run: read_recorded(str(GUIDE / run))["params"]["eval_seed"]
             for members in (RUNS, CONTROLS, FRESH) for runs in members.values() for run in runs}
    assert all(seed == (16 if FRESH_FOLDER in run else 14) for run, seed in seeds.items())


def read_words(arm):
    """(words, parameters that they set) of an arm's command."""
    words = COMMANDS[arm]
    return words, {name: yaml.safe_load(value) for flag, name, value
                   in zip(words, words[1:], words[2:]) if flag == "-p"}


@pytest.mark.parametrize("arm", CONTROLS)
def test_a_command_sets_what_its_control_runs_record(arm):
    words, set_here = read_words(arm)
    for run in CONTROLS[arm]:
        control = read_recorded(str(GUIDE / run))["control"]
        changed = {name: value for values in control["changed"].values()
                   for name, value in values.items() if name != "seed"}
        assert changed == set_here and set_here and words[:2] == ["02", "03"]


@pytest.mark.parametrize("arm", [name for name in RUNS if name != "recipe"])
def test_a_command_sets_what_its_runs_record(arm):
    words, set_here = read_words(arm)
    for run in [*RUNS[arm], *FRESH.get(arm, [])]:
        record = read_recorded(str(GUIDE / run))
        assert record["seed"] == set_here.pop("seed", record["seed"])
        changed = {name: value for stage in record["changed"].values()
                   for name, value in stage.items() if name not in OF_QUESTIONS}
        assert changed == set_here
        with pytest.raises((KeyError, ValueError)) if arm in EARLIER else nullcontext():
            for stage, values in record["changed"].items():
                validate_params(values, stage)
        stages = words[:words.index("-p")]
        first = min((stage[:2] for stage, values in record["changed"].items()
                     if values.keys() & set_here.keys()), default="05")
        assert stages[0] == first and stages[-2:] == ["05", "06"], "from the first that differs"
    assert arm.startswith("other_draws") or set_here, "an arm changes something"
